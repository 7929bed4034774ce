"""Compiles the launchers and writes the counts and the model's predictions as JSON and Markdown."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import model, sass, toolchain
from .chips import A100, H100, clocks
from .hot import Hot, hot
from .model import Turns

PREDICTION = "prediction"
HEADLINE = ((4_096, 128), (16_384, 64), (16_384, 128), (16_384, 256), (16_384, 512), (65_536, 128))
CONTRASTIVE, GUIDED = "csrc/ops/contrastive/cuda/sm90/launch.cu", "csrc/ops/guided/cuda/sm90/launch.cu"
CONTRASTIVE_80 = "csrc/ops/contrastive/cuda/launch.cu"
BF16 = "__nv_bfloat16"


OUTPUT = Path(__file__).resolve().parents[1] / "results/static_cost.json"


def read(path: Path = OUTPUT) -> dict[str, Any]:
    """A result that was written."""
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, result: dict[str, Any]) -> None:
    """The JSON, a kernel a line, and the tables in a file of the same name."""
    kernels = result["kernels"]
    lines = [
        json.dumps(key)
        + ": {\n"
        + ",\n".join(f"{json.dumps(n)}: {json.dumps(k)}" for n, k in kernels[key].items())
        + "}"
        for key in kernels
    ]
    rest = json.dumps({key: value for key, value in result.items() if key != "kernels"}, indent=1)
    path.write_text(rest[:-2] + ',\n "kernels": {\n' + ",\n".join(lines) + "}\n}\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(result), encoding="utf-8")


def inspect(launcher: str, arch: str, folder: Path) -> dict[str, Any]:
    """Kernel -> what ptxas says, and its hot loops where it has products in one."""
    cubin = folder / f"{launcher.replace('/', '_')}.{arch}.cubin"
    report = toolchain.compile_cubin(launcher, arch, cubin)
    return describe(report, toolchain.disassemble(cubin))


def describe(report: str, listing: str) -> dict[str, Any]:
    used = toolchain.resources(report)
    functions = {function.name: function for function in sass.parse(listing) if function.name in used}
    names = toolchain.demangle(list(functions))
    result = {}
    for mangled, function in functions.items():
        entry: dict[str, Any] = asdict(used[mangled]) | {"instructions": len(function.instructions)}
        if found := hot(function):
            entry |= {
                "products": found.products,
                "waits": found.waits,
                "k_steps": [dict(step) for step in found.steps],
                "tile": dict(found.tile),
                "exponentials": found.exponentials,
            }
        result[names[mangled]] = entry
    return dict(sorted(result.items()))


def hot_of(entry: dict[str, Any]) -> Hot:
    """The loops of an entry of ``describe``."""
    steps = tuple(Counter(step) for step in entry["k_steps"])
    return Hot(steps, Counter(entry["tile"]), entry["exponentials"], entry["products"], entry["waits"])


def run(launchers: Iterable[str] = toolchain.LAUNCHERS) -> dict[str, Any]:
    kernels: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for launcher in launchers:
            for arch in ("90a",) if "/sm90/" in launcher else ("80", "90a"):
                kernels[f"{launcher} sm_{arch}"] = inspect(launcher, arch, Path(folder))
    return {
        "nvcc": toolchain.nvcc_version(),
        "kind": PREDICTION,
        "assumptions": list(model.ASSUMPTIONS),
        "kernels": kernels,
    } | predictions(kernels)


def _tile_row(title: str, found: Hot, turns: Turns) -> dict[str, Any]:
    """Clocks of a tile of both warpgroups by pipe; what is largest limits it."""
    pipes = {name: 2 * value for name, value in clocks(found.tile).items()}
    pipes["tensor"] = 2 * turns.products
    products = turns.count
    pipes["issue"] += 2 * products * found.per_product
    pipes["l2"] = turns.from_l2
    shown = {name: round(pipes[name]) for name in ("tensor", "special", "fma", "alu", "issue", "l2")}
    limiter = max(shown, key=lambda name: shown[name])
    return {
        "tile": title,
        "k_step": sum(found.steps[0].values()),
        "products_a_wait": round(found.steps[0]["tensor"] / found.waits, 1),
        "epilogue": sum(found.tile.values()),
        "clocks": shown,
        "limiter": limiter,
        "modelled_clocks": round(turns.period),
    }


def _tiles(kernels: dict[str, Any]) -> list[dict[str, Any]]:
    of = {name: kernels.get(f"{name} sm_90a", {}) for name in (CONTRASTIVE, GUIDED)}
    rows = []
    if entries := of[CONTRASTIVE]:
        forward = f"contrastive_tiles_sm90_kernel<{BF16}, "
        for title, arguments, k_tiles, wide in (
            ("log-sum-exp, 256 × 128, D = 128", "true, false>", 2, True),
            ("log-sum-exp, 128 × 128, D = 512", "false, false>", 8, False),
            ("with neighbours, 128 × 128, D = 128", "false, true>", 2, False),
        ):
            found = hot_of(entries[forward + arguments])
            rows.append(_tile_row(title, found, model.forward_turns(found, k_tiles, wide)))
        for d, outputs in ((64, 1), (128, 2), (256, 4)):
            found = hot_of(entries[f"contrastive_lse_bwd_sm90_kernel<{BF16}, 1, {outputs}>"])
            title = f"log-sum-exp backward, 128 × {64 if outputs == 4 else 128}, D = {d}"
            rows.append(_tile_row(title, found, model.backward_turns(found, d // 64, outputs)))
    if entries := of[GUIDED]:
        for name, arguments in (("negatives", "true, false>"), ("distillation", "false, true>")):
            for way in ("forward", "backward"):
                found = hot_of(entries[f"guided_{way}_sm90_kernel<{BF16}, {arguments}"])
                serialised = found.waits >= found.steps[0]["tensor"]
                turns = model.guided_turns(found, 2, way == "backward", serialised)
                rows.append(_tile_row(f"guided {way}, {name}, 128 × 64, D = Dg = 128", found, turns))
    return rows


def _nt_xent(kernels: dict[str, Any]) -> list[dict[str, Any]]:
    """Forward and backward of nt_xent on 16-bit rows, µs and the share of a floor: a symmetric forward and a backward
    by rows, five N² D multiply-adds at the chip's dense rate."""
    sm90, on_90, on_80 = (
        kernels.get(key, {}) for key in (f"{CONTRASTIVE} sm_90a", f"{CONTRASTIVE_80} sm_90a", f"{CONTRASTIVE_80} sm_80")
    )

    def sm80(entries, chip):
        if not entries:
            return None
        forward = hot_of(entries[f"contrastive_tiles_kernel<{BF16}, false, false>"])
        backward = {k: hot_of(entries[f"contrastive_lse_bwd_kernel<{BF16}, 1, {k}, false>"]) for k in (1, 2)}
        return lambda n, d: model.nt_xent_sm80_us(n, d, forward, backward, chip)

    def hopper(entries):
        if not entries:
            return None
        name = f"contrastive_tiles_sm90_kernel<{BF16}, "
        forward = {True: hot_of(entries[name + "true, false>"]), False: hot_of(entries[name + "false, false>"])}
        backward = {k: hot_of(entries[f"contrastive_lse_bwd_sm90_kernel<{BF16}, 1, {k}>"]) for k in (1, 2, 4)}
        return lambda n, d: model.nt_xent_sm90_us(n, d, forward, backward)

    rows = []
    for code, chip, us in (
        ("sm_90a", H100, hopper(sm90)), ("sm_80 code", H100, sm80(on_90, H100)), ("sm_80", A100, sm80(on_80, A100)),
    ):  # fmt: skip
        for n, d in HEADLINE if us else ():
            time, floor = us(n, d), 5 * n * n * d / chip.peak_flops * 1e6
            rows.append(
                {"chip": chip.name, "code": code, "n": n, "d": d, "us": round(time), "floor": round(floor / time, 2)}
            )
    return rows


def predictions(kernels: dict[str, Any]) -> dict[str, Any]:
    return {"tiles": _tiles(kernels), "nt_xent": _nt_xent(kernels)}


def _line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def markdown(result: dict[str, Any]) -> str:
    """The tables of a result."""
    pipes = ("tensor", "special", "fma", "alu", "issue", "l2")
    head = ("tile of both warpgroups", "k-step", "products a wait", "epilogue", *pipes, "limiter", "modelled")
    lines = [
        f"**Predictions** from the machine code of nvcc {result['nvcc']}; nothing here was measured. Instructions of a"
        " warp in a k-step and in a tile's epilogue; clocks of an H100's multiprocessor by pipe, and by the model.",
        "",
        _line(head),
        _line(["---"] + ["---:"] * (len(head) - 3) + ["---", "---:"]),
    ]
    for row in result["tiles"]:
        lines.append(
            _line(
                [row["tile"], row["k_step"], row["products_a_wait"], row["epilogue"]]
                + [f"{row['clocks'][pipe]:,}" for pipe in pipes]
                + [row["limiter"], f"{row['modelled_clocks']:,}"]
            )
        )
    sizes = [f"{n:,} × {d}" for n, d in HEADLINE]
    lines += ["", "`nt_xent`, forward and backward, 16-bit rows: µs predicted (share of the floor).", ""]
    lines += [_line(["", *sizes]), _line(["---"] + ["---:"] * len(sizes))]
    for chip, code in dict.fromkeys((row["chip"], row["code"]) for row in result["nt_xent"]):
        of = {(r["n"], r["d"]): r for r in result["nt_xent"] if (r["chip"], r["code"]) == (chip, code)}
        cells = [f"{of[size]['us']:,} ({of[size]['floor']:.0%})" for size in HEADLINE]
        lines.append(_line([f"{chip}, {code}", *cells]))
    lines += ["", "Assumed: " + "; ".join(result["assumptions"]) + "."]
    return "\n".join(lines) + "\n"

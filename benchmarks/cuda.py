"""The ops on a GPU against their rivals: python -m benchmarks.cuda [--quick] [--results FOLDER]

Every implementation is checked first, loss and gradient in float64 norms against the reference on the same inputs; a
wrong one is listed with its error and not timed. Times are CUDA events around one call, forward and backward, with four
input sets in turn and the L2 cache overwritten before each, medians of the rounds. Peak memory is the allocator's. The
floors come from rates that are measured in the same run: a large bfloat16 product and a large copy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import ltood_fast
from benchmarks.registry import knn_matmul_topk, reference_of

ROOT = Path(__file__).resolve().parent.parent
TAU = 0.2
SETS = 4
ALLOWED = {torch.bfloat16: 1e-2, torch.float32: 1e-4}


@dataclass(frozen=True)
class Case:
    """An op at one size. `products` counts N×N×D (N×Q×D) products of our scheme, the floor's arithmetic."""

    op: str
    size: dict[str, int]
    products: float
    dtype: torch.dtype = torch.bfloat16
    rivals: tuple[str, ...] = ("eager", "compile")

    @property
    def name(self) -> str:
        return f"{self.op} " + " ".join(f"{k}={v}" for k, v in self.size.items()) + f" {str(self.dtype)[6:]}"

    def inputs(self, seed: int) -> dict:
        torch.manual_seed(seed)
        n, d, k = self.size["N"], self.size["D"], self.size.get("K", 10)
        z = torch.randn(n, d, device="cuda").to(self.dtype)
        if self.op == "knn":
            return {"x": z, "k": self.size["k"]}
        if self.op == "cluster_kl":
            centroids = torch.randn(k, d, device="cuda")
            return {"z": z.requires_grad_(), "centroids": centroids.to(self.dtype).requires_grad_()}
        inputs = {"z": z.requires_grad_(), "temperature": TAU}
        if self.op == "stage1_loss":
            inputs["domain"] = torch.randint(0, 2, (n // 2,), device="cuda").repeat(2)
        if self.op in ("guided_contrastive", "relational_distill", "stage2_loss"):
            inputs["guide"] = (z.detach().float() + 0.5 * torch.randn_like(z, dtype=torch.float)).to(self.dtype)
        if self.op in ("guided_contrastive", "stage2_loss"):
            inputs["clusters"] = torch.randint(0, k, (n // 2,), device="cuda").repeat(2)
            inputs["far"] = ltood_fast.farthest_cluster(torch.randn(k, d, device="cuda"))
        return inputs

    def floor_ms(self, product_rate: float) -> float:
        n, other = self.size["N"], self.size.get("K", self.size["N"]) if self.op == "cluster_kl" else self.size["N"]
        return 1e3 * self.products * 2 * n * other * self.size["D"] / product_rate


CASES = [
    Case("nt_xent", {"N": 4096, "D": 128}, 2.5, rivals=("eager", "compile", "flex_attention")),
    Case("nt_xent", {"N": 16384, "D": 128}, 2.5, rivals=("eager", "compile", "flex_attention")),
    Case("nt_xent", {"N": 16384, "D": 128}, 7.5, torch.float32),
    Case("nt_xent", {"N": 65536, "D": 128}, 2.5, rivals=("flex_attention",)),
    Case("stage1_loss", {"N": 16384, "D": 128}, 2.5),
    Case("psd_loss", {"N": 16384, "D": 128}, 2.5),
    Case("guided_contrastive", {"N": 16384, "D": 128, "K": 10}, 0.5),
    Case("relational_distill", {"N": 16384, "D": 128}, 5),
    Case("stage2_loss", {"N": 16384, "D": 128, "K": 10}, 5.5),
    Case("cluster_kl", {"N": 200_000, "D": 128, "K": 1000}, 5),
    Case("knn", {"N": 100_000, "D": 128, "k": 10}, 1, rivals=("matmul+topk",)),
    Case("knn", {"N": 300_000, "D": 128, "k": 10}, 1, rivals=("matmul+topk",)),
]
QUICK = [case for case in CASES if case.size["N"] <= 16384]


def nt_xent_flex_attention(z: torch.Tensor, temperature: float) -> torch.Tensor:
    """The log-sum-exp that attention computes, with a mask that takes out the diagonal; its values are not used."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n = z.shape[0]
    mask = create_block_mask(lambda b, h, i, j: i != j, None, None, n, n, device="cuda")
    call = torch.compile(flex_attention, dynamic=False)
    u = F.normalize(z, dim=1)
    rows = u[None, None]
    _, lse = call(rows, rows, rows, block_mask=mask, scale=1 / temperature, return_lse=True)
    positive = (u * u.roll(n // 2, 0)).sum(1, dtype=torch.float32) / temperature
    return (lse.flatten() - positive).mean()


def implementations(case: Case) -> dict[str, Callable]:
    reference = reference_of(case.op)
    known = {
        "eager": lambda: reference,
        "compile": lambda: torch.compile(reference, fullgraph=True, dynamic=False),
        "flex_attention": lambda: nt_xent_flex_attention,
        "matmul+topk": lambda: knn_matmul_topk,
    }
    return {**{name: known[name]() for name in case.rivals}, "ours": getattr(ltood_fast, case.op)}


def call(function: Callable, inputs: dict) -> tuple[torch.Tensor, ...]:
    """(loss, gradients...), or what a search returns."""
    result = function(**inputs)
    leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    if not leaves:
        return (result[0],)
    loss = result[0] if isinstance(result, tuple) else result
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


def error_of(case: Case, function: Callable) -> float:
    """The largest relative error of loss and gradients against the float64 reference, at 2,048 rows."""
    small = Case(case.op, {**case.size, "N": 2048}, case.products, case.dtype)
    inputs = small.inputs(0)
    wide = {
        k: v.detach().double().requires_grad_(v.requires_grad) if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    pairs = zip(call(function, inputs), call(reference_of(case.op), wide), strict=True)
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)


def median_ms(run: Callable[[int], object], rounds: int) -> tuple[float, float]:
    """(median, 90th percentile) of single calls, by events, with a cold L2."""
    scratch = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for i in range(rounds + 2):
        scratch.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run(i)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    times = torch.tensor(times[2:])
    return times.median().item(), times.quantile(0.9).item()


def rates() -> dict[str, float]:
    """What this device reaches: multiply-adds × 2 a second in bfloat16, bytes a second copied (read + written)."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product, _ = median_ms(lambda i: a @ a, 20)
    source, target = torch.randn(2, 1 << 28, device="cuda")
    copy, _ = median_ms(lambda i: target.copy_(source), 20)
    return {"product_flop_per_s": 2 * 8192**3 / product * 1e3, "copy_bytes_per_s": 8 * (1 << 28) / copy * 1e3}


def measure(case: Case, name: str, function: Callable, rounds: int) -> dict:
    row = {"case": case.name, "implementation": name, **case.size, "dtype": str(case.dtype)[6:]}
    try:
        error = error_of(case, function)
        row["error"] = error
        if not error <= ALLOWED[case.dtype]:
            return {**row, "failed": f"wrong, off by {error:.1e}"}
        sets = [case.inputs(seed) for seed in range(SETS)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(function, sets[0])
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        row["median_ms"], row["p90_ms"] = median_ms(lambda i: call(function, sets[i % SETS]), rounds)
    except Exception as failure:
        row["failed"] = f"{type(failure).__name__}: {str(failure).splitlines()[0][:120]}"
    torch.cuda.empty_cache()
    return row


def table(rows: list[dict]) -> str:
    lines = [
        "| case | implementation | ms | MiB | best rival / ours | of floor | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['case']} | {row['implementation']} | {row['failed']} | | | | |")
            continue
        ratio = f"{row['ratio']:.2f}x" if "ratio" in row else ""
        floor = f"{100 * row['of_floor']:.0f} %" if "of_floor" in row else ""
        lines.append(
            f"| {row['case']} | {row['implementation']} | {row['median_ms']:.3f} | {row['peak_mib']:.0f} | {ratio} | "
            f"{floor} | {row['error']:.0e} |"
        )
    return "\n".join(lines)


def run(cases: list[Case], rounds: int) -> dict:
    measured = rates()
    rows = []
    for case in cases:
        group = [measure(case, name, function, rounds) for name, function in implementations(case).items()]
        times = {row["implementation"]: row["median_ms"] for row in group if "median_ms" in row}
        ours = group[-1]
        if "median_ms" in ours:
            ours["of_floor"] = case.floor_ms(measured["product_flop_per_s"]) / ours["median_ms"]
            if rivals := [t for name, t in times.items() if name != "ours"]:
                ours["ratio"] = min(rivals) / ours["median_ms"]
        rows += group
        print(table(group).split("\n", 2)[2], flush=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "rates": measured,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda")
    parser.add_argument("--quick", action="store_true", help="sizes up to N = 16,384 only")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks/results", help="folder of <device>-<date>.json"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("python -m benchmarks.cuda: a CUDA device is needed, torch.cuda.is_available() is False")
    result = run(QUICK if arguments.quick else CASES, arguments.rounds)
    name = result["device"].lower().replace(" ", "-") + f"-{result['date']}.json"
    output = arguments.results / name
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{table(result['rows'])}\n\nwritten to {output}")


if __name__ == "__main__":
    main()

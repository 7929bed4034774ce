"""python -m benchmarks scaling: the losses and the sampler on several ranks, measured small and modelled large.

Measured on the CPU, gloo over the loopback interface, a thread a rank: time, bytes and memory of nt_xent forward and
backward with 1, 2 and 4 ranks. Bytes are those that the kernel counts as written by a process, to its sockets.
Modelled for 8 to 1,024 GPUs, none of which has been measured: a step is its products at an assumed rate and its
exchange over assumed links, one after the other. The same formulas with this machine's rates are shown next to the
measurements. nt_xent alone: the losses of stage 2 divide their rows among the ranks in the same way, and cost what the
docstring of guided_contrastive says.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
import torch.distributed as dist
from matplotlib.axes import Axes

import ltood_fast
from ltood_fast._memory import peak_mib_cpu, status_mib
from ltood_fast.eval.plots import STYLE

from .machine import machine, provenance
from .picture_style import figure_of, headline, label_ends, log_sizes, png

RESULTS = Path(__file__).resolve().parent / "results"
WIDTH = 128
RANKS = (1, 2, 4)
ROWS = {"strong": 2048, "weak": 1024}  # of all ranks; of each
EXCHANGES = ("gather", "ring")
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
GPU_ROWS = {"strong": 65536, "weak": 1024}
STEPS = 5
ROW_DOUBLES = (
    3  # a row's log-sum-exp, its weight and its gradient at the other views, gathered by the backward of nt_xent
)
CANDIDATES = (100_000, 200_000, 400_000)
PLANNED = 10_000_000
CLUSTERS, BUDGET = 50, 10_000


@dataclass(frozen=True)
class Machine:
    """What the model assumes, a rank."""

    name: str
    flop_per_s: float  # that the products reach
    bytes_per_s: float  # received, between ranks of a node
    network_bytes_per_s: float  # received, as soon as a ring leaves the node
    node: int  # ranks
    latency_s: float  # of a hop
    itemsize: int  # of an embedding's numbers


GPU = Machine("assumed GPU", 3e14, 4e11, 5e10, 8, 5e-6, 2)


def rows_a_rank(kind: str, ranks: int, rows: dict[str, int] = ROWS) -> int:
    return max(1, rows[kind] // ranks) if kind == "strong" else rows[kind]


def exchanged_bytes(ranks: int, rows: int, itemsize: int, exchange: str) -> int:
    """Sent by one rank in a step, and received, `rows` being those of each: every other rank's embeddings once (twice
    in a ring, whose backward lets them pass again), and three doubles a row."""
    times = 1 if exchange == "gather" else 2
    return (ranks - 1) * rows * (times * WIDTH * itemsize + 8 * ROW_DOUBLES)


def products_flop(ranks: int, rows: int) -> int:
    """Of one rank in a step. Similarities forward, again backward, and the gradient: 3 products of rows x all rows,
    2 FLOP a number each. One process alone computes each similarity for both of its rows at once: 2 products."""
    return 2 * (2 if ranks == 1 else 3) * rows * (rows * ranks) * WIDTH


def embeddings_bytes(ranks: int, rows: int, itemsize: int, exchange: str) -> int:
    """Of other ranks that one holds at a time: all of them, or in a ring one shard to use and one that comes."""
    held = ranks if exchange == "gather" else min(2, ranks - 1)
    return held * rows * WIDTH * itemsize


def step_seconds(machine: Machine, ranks: int, rows: int, exchange: str) -> tuple[float, float]:
    """(products, exchange): nothing overlaps; exponentials and memory traffic are left out."""
    bandwidth = machine.bytes_per_s if ranks <= machine.node else machine.network_bytes_per_s
    hops = (ranks - 1) * (2 if exchange == "gather" else 3)
    transfer = exchanged_bytes(ranks, rows, machine.itemsize, exchange) / bandwidth
    return products_flop(ranks, rows) / machine.flop_per_s, hops * machine.latency_s + transfer


def written_bytes() -> int:
    """By this process since it began, to sockets and files: what gloo sends, with its headers."""
    return int(re.search(r"^wchar: (\d+)$", Path("/proc/self/io").read_text(), re.MULTILINE)[1])


def peak_anonymous_mib(call: Callable[[], object]) -> float:
    """Growth of the memory that no file backs (what is mapped from a file the kernel may drop), looked at every
    millisecond."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before, peak, done = status_mib("RssAnon"), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, status_mib("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        call()
    finally:
        done.set()
        thread.join()
    return max(peak, status_mib("RssAnon")) - before


def _rank(rank: int, ranks: int, store: str, cases: list[tuple[int, str]], output: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    rows = [_measure(rank, ranks, n, exchange) for n, exchange in cases]
    rates = _rates(ranks)
    if rank == 0:
        Path(output).write_text(json.dumps({"rows": rows, **rates}))
    dist.barrier()
    dist.destroy_process_group()


def _measure(rank: int, ranks: int, n: int, exchange: str) -> dict[str, object]:
    """A step is as slow as its slowest rank; memory is that of the rank that needs most."""
    z = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    where = {} if ranks == 1 else {"group": dist.group.WORLD, "exchange": exchange}

    def step() -> None:
        torch.autograd.grad(ltood_fast.nt_xent(z, 0.2, **where), z)

    step()
    peak = peak_mib_cpu(step)
    dist.barrier()
    sent, spent = written_bytes(), time.process_time()
    slowest = torch.tensor([_seconds(step) for _ in range(STEPS)] + [peak], dtype=torch.float64)
    sent, spent = (written_bytes() - sent) / STEPS, (time.process_time() - spent) / STEPS
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return {
        "ranks": ranks, "rows_a_rank": n, "exchange": exchange, "ms": 1e3 * float(slowest[:-1].median()),
        "cpu_ms": 1e3 * spent, "sent_bytes": sent, "formula_bytes": exchanged_bytes(ranks, n, 4, exchange),
        "gflop": products_flop(ranks, n) / 1e9, "peak_mib": float(slowest[-1]),
        "embeddings_mib": embeddings_bytes(ranks, n, 4, exchange) / 2**20,
    }  # fmt: skip


def _seconds(call: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _rates(ranks: int) -> dict[str, float]:
    """What the model takes for this machine: products and gathered bytes a second, and the time of a small gather, with
    all ranks at it."""
    a, out = torch.randn(2, 1024, 1024)
    product = min(_seconds(lambda: torch.mm(a, a, out=out)) for _ in range(5))
    large, small = torch.randn(1 << 20), torch.randn(1)
    rates = {"flop_per_s": 2 * 1024**3 / product}
    if ranks > 1:
        gathered = {len(x): list(torch.empty(ranks, len(x))) for x in (large, small)}
        transfer, hop = (
            min(_seconds(lambda x=x: dist.all_gather(gathered[len(x)], x)) for _ in range(5)) for x in (large, small)
        )
        rates |= {"bytes_per_s": 4 * len(large) * (ranks - 1) / transfer, "latency_s": hop / (ranks - 1)}
    return rates


def measure_ranks() -> list[dict]:
    """Per number of ranks: its rows (strong, then weak, each exchange) and its rates."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "numpy", "ltood_fast"])
    os.environ["OMP_NUM_THREADS"] = "1"
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in RANKS:
            sizes = dict.fromkeys(rows_a_rank(kind, ranks) for kind in ROWS)
            cases = [(n, exchange) for n in sizes for exchange in (EXCHANGES if ranks > 1 else EXCHANGES[:1])]
            output = str(Path(folder) / f"{ranks}.json")
            arguments = ranks, str(Path(folder) / f"store{ranks}"), cases, output
            processes = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(ranks)]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            if any(process.exitcode for process in processes):
                raise RuntimeError(f"scaling: every one of {ranks} processes must end well, got an error above")
            found.append({"ranks": ranks, **json.loads(Path(output).read_text())})
    return found


def measure_sampler() -> dict[str, object]:
    """sample_ood streamed from a memory-mapped file; time and memory over the number of candidates, and their lines."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    centroids, tailness = torch.randn(CLUSTERS, WIDTH, generator=generator), torch.rand(CLUSTERS, generator=generator)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pool.npy"
        pool = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(CANDIDATES[-1], WIDTH))
        for block in np.array_split(np.arange(CANDIDATES[-1]), 16):
            pool[block[0] : block[-1] + 1] = torch.randn(len(block), WIDTH, generator=generator).numpy()
        del pool
        pool = np.load(path, mmap_mode="r")
        ltood_fast.sample_ood(pool[: 2 * BUDGET], centroids, tailness, BUDGET)
        for count in CANDIDATES:
            seconds = []

            def sample(count: int = count, seconds: list[float] = seconds) -> None:
                start = time.perf_counter()
                ltood_fast.sample_ood(pool[:count], centroids, tailness, BUDGET)
                seconds.append(time.perf_counter() - start)

            rows.append({"candidates": count, "peak_mib": peak_anonymous_mib(sample), "seconds": seconds[0]})
    counts = [row["candidates"] for row in rows]
    seconds, memory = (np.polyfit(counts, [row[name] for row in rows], 1) for name in ("seconds", "peak_mib"))
    return {
        "clusters": CLUSTERS, "budget": BUDGET, "rows": rows, "candidates": PLANNED,
        "seconds": float(np.polyval(seconds, PLANNED)), "peak_mib": max(row["peak_mib"] for row in rows),
        "mib_per_million": 1e6 * float(memory[0]),
    }  # fmt: skip


def model(machine: Machine) -> list[dict[str, object]]:
    rows = []
    for kind in GPU_ROWS:
        for ranks in GPUS:
            n = rows_a_rank(kind, ranks, GPU_ROWS)
            for exchange in EXCHANGES:
                products, transfer = step_seconds(machine, ranks, n, exchange)
                rows.append({
                    "kind": kind, "ranks": ranks, "rows_a_rank": n, "exchange": exchange,
                    "exchanged_mib": exchanged_bytes(ranks, n, machine.itemsize, exchange) / 2**20,
                    "gflop": products_flop(ranks, n) / 1e9, "products_ms": 1e3 * products,
                    "exchange_ms": 1e3 * transfer,
                    "embeddings_mib": embeddings_bytes(ranks, n, machine.itemsize, exchange) / 2**20,
                })  # fmt: skip
    return rows


def this_machine(measured: list[dict]) -> dict[int, Machine]:
    """The model's constants as measured with each number of ranks: cores are shared as soon as there are too few."""
    return {
        found["ranks"]: Machine(
            "this machine", found["flop_per_s"], found.get("bytes_per_s", 1.0), 1.0, os.cpu_count() * 64,
            found.get("latency_s", 0.0), 4,
        )
        for found in measured
    }  # fmt: skip


def table(rows: list[dict], columns: dict[str, str]) -> list[str]:
    """`columns`: heading -> how a row's value of that name is written."""
    cells = [list(columns)] + [[form.format(**row) for form in columns.values()] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]


def text(result: dict) -> str:
    gpu, sampler, cores = result["assumptions"], result["sampler"], result["cores"]
    too_many = "".join(f"; {ranks} ranks oversubscribe them" for ranks in RANKS if ranks > cores)
    common = {"ranks": "{ranks}", "rows a rank": "{rows_a_rank}", "exchange": "{exchange}"}
    measured = [
        {**row, **{f"{name}_mib": row[f"{name}_bytes"] / 2**20 for name in ("sent", "formula")}}
        for row in result["measured"]
    ]
    return "\n".join([
        f"nt_xent forward and backward, D={WIDTH}, float32, gloo on {cores} cores, a thread a rank{too_many}",
        f"load {result['load']:.1f} when it began: far from 0, ms are those of a busy machine, CPU ms less so",
        *table(measured, {
            **common, "ms": "{ms:.1f}", "CPU ms": "{cpu_ms:.1f}", "model ms": "{model_ms:.1f}",
            "sent MiB": "{sent_mib:.3f}", "formula MiB": "{formula_mib:.3f}", "GFLOP": "{gflop:.2f}",
            "peak MiB": "{peak_mib:.1f}", "of which rows MiB": "{embeddings_mib:.1f}",
        }),
        "",
        f"a model, not measured: {gpu['flop_per_s'] / 1e12:.0f} TFLOP/s, {gpu['bytes_per_s'] / 1e9:.0f} GB/s in nodes "
        f"of {gpu['node']}, {gpu['network_bytes_per_s'] / 1e9:.0f} GB/s a GPU between them, "
        f"{1e6 * gpu['latency_s']:.0f} us a hop, {gpu['itemsize']}-byte numbers,",
        "exchange and products one after the other, the encoder left out",
        *table(result["modelled"], {
            "": "{kind}", **common, "sent MiB": "{exchanged_mib:.2f}", "GFLOP": "{gflop:.1f}",
            "products ms": "{products_ms:.3f}", "exchange ms": "{exchange_ms:.3f}", "rows MiB": "{embeddings_mib:.1f}",
        }),
        "",
        f"sample_ood from a file, D={WIDTH}, K={CLUSTERS}, budget {BUDGET}, one process, one thread",
        *table(
            [*sampler["rows"], sampler],
            {"candidates": "{candidates:,}", "s": "{seconds:.2f}", "peak MiB": "{peak_mib:.1f}"},
        ),
        f"The last row is a plan: s on the line through the others, MiB the most, as block and budget bound it "
        f"(their line: {sampler['mib_per_million']:+.1f} MiB a million). A rank of R reads 1/R of them.",
    ])  # fmt: skip


EXCHANGE_LOOKS = {"gather": ("#0072B2", "o", "-"), "ring": ("#D55E00", "s", "--")}


def draw(result: dict, source: str = "") -> bytes:
    """Bytes of a step over the number of ranks, by formula (lines) and measured (points); the predicted time."""
    machine = result["machine"]
    with mpl.rc_context(STYLE):
        figure = figure_of(9.5, 4.2)
        bytes_axes, time_axes = figure.subplots(1, 2)
        _draw_bytes(bytes_axes, result["measured"])
        _draw_prediction(time_axes, Machine(**result["assumptions"]))
        most = max(abs(row["sent_bytes"] / row["formula_bytes"] - 1) for row in result["measured"] if row["ranks"] > 1)
        headline(
            figure,
            f"Bytes sent match the formula to {100 * most:.1f} %; times on GPUs are a prediction",
            f"nt_xent forward + backward, D = {WIDTH}; points: gloo on {result['cores']} cores of an "
            f"{machine['device']}, commit {result['commit'][:7]}",
        )
        return png(figure, source)


def _draw_bytes(axes: Axes, measured: list[dict]) -> None:
    ends = []
    for kind in ROWS:
        for exchange, (color, marker, style) in EXCHANGE_LOOKS.items():
            line = [exchanged_bytes(r, rows_a_rank(kind, r), 4, exchange) / 2**20 for r in GPUS]
            axes.plot(GPUS, line, style, color=color)
            ends.append(
                (
                    GPUS[-1],
                    line[-1],
                    f"{exchange}, {ROWS[kind]:,} rows {'in all' if kind == 'strong' else 'each'}",
                    color,
                )
            )
            points = [
                (row["ranks"], row["sent_bytes"] / 2**20)
                for row in measured
                if row["exchange"] == exchange
                and row["ranks"] > 1
                and row["rows_a_rank"] == rows_a_rank(kind, row["ranks"])
            ]
            low = [exchanged_bytes(r, rows_a_rank(kind, r), 4, exchange) / 2**20 for r in (2, 4, 8)]
            axes.plot((2, 4, 8), low, style, color=color)
            axes.plot(*zip(*points, strict=True), marker, color=color)
    log_sizes(axes, [2, 4, *GPUS], room=60)
    label_ends(axes, ends)
    axes.set_xlabel("ranks")
    axes.tick_params(axis="x", labelrotation=45)
    axes.set_title("sent by a rank in a step, MiB", loc="left")


def _draw_prediction(axes: Axes, gpu: Machine) -> None:
    ends = []
    for kind in GPU_ROWS:
        for exchange, (color, _, style) in EXCHANGE_LOOKS.items():
            line = [1e3 * sum(step_seconds(gpu, r, rows_a_rank(kind, r, GPU_ROWS), exchange)) for r in GPUS]
            axes.plot(GPUS, line, style, color=color)
            ends.append(
                (
                    GPUS[-1],
                    line[-1],
                    f"{exchange}, {GPU_ROWS[kind]:,} rows {'in all' if kind == 'strong' else 'each'}",
                    color,
                )
            )
    log_sizes(axes, list(GPUS), room=40)
    label_ends(axes, ends)
    axes.set_xlabel("ranks")
    axes.tick_params(axis="x", labelrotation=45)
    axes.set_title("a step on assumed GPUs, predicted, ms", loc="left")


def run(results: Path) -> dict:
    load = os.getloadavg()[0]
    found = measure_ranks()
    machines = this_machine(found)
    measured = [row for part in found for row in part["rows"]]
    for row in measured:
        seconds = step_seconds(machines[row["ranks"]], row["ranks"], row["rows_a_rank"], row["exchange"])
        row["model_ms"] = 1e3 * sum(seconds)
    result = {
        **provenance(), "machine": machine("cpu", 1), "cores": os.cpu_count(), "load": load,
        "width": WIDTH,
        "machines": {ranks: asdict(constants) for ranks, constants in machines.items()}, "measured": measured,
        "assumptions": asdict(GPU), "modelled": model(GPU), "sampler": measure_sampler(),
    }  # fmt: skip
    results.mkdir(parents=True, exist_ok=True)
    (results / "scaling.json").write_text(json.dumps(result, indent=1) + "\n")
    (results / "scaling.png").write_bytes(draw(result))
    return result


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("scaling", help="losses on 1, 2 and 4 ranks, a model of 8 to 1,024 GPUs, the sampler")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of scaling.json and scaling.png")
    parser.set_defaults(function=main)


def main(arguments: argparse.Namespace) -> int:
    print(text(run(arguments.results)))
    return 0

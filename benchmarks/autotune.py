"""Times the tiles of the Hopper kernels against their neighbours and prints the table of csrc/cuda/tile_sizes_sm90.h.

A candidate is another table: it is compiled with the launchers and autotune.cu in a folder that the compiler looks in
before csrc, so that no kernel knows of it. Entries do not touch each other: the n-th candidates of all share a table.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from .static_cost import toolchain

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "csrc/cuda/tile_sizes_sm90.h"
SOURCES = (
    "benchmarks/autotune.cu", "csrc/cuda/operand.cu", "csrc/ops/contrastive/cuda/sm90/launch.cu",
    "csrc/ops/guided/cuda/sm90/launch.cu", "csrc/cuda/topk/sm90/launch.cu",
)  # fmt: skip
# What may differ from the entry; what fits is left to the header.
RING = {"stages": (4, 6, 8)}
CHOICES = {
    "kSums": RING | {"rows": (128, 256), "work_tiles": (4, 8, 16)},
    "kNeighbors": RING | {"work_tiles": (4, 8, 16)},
    "kLseBwd": RING | {"columns": (64, 128), "stage_k_tiles": (1, 2), "work_tiles": (1, 2)},
    "kTopk": RING,
    "kGuided": RING,
    "kGuidedBwd": RING,
}
ROWS = 16_384
NOISE = 0.02  # an entry stays unless another is faster by more
SAME = 1e-3  # sums of 16-bit products in another order
SHARE = "LTOOD_POLYNOMIAL_EIGHTHS"  # of the exponentials, of these kernels' entries
SHARES = (0, 1, 2, 3)
SHARING = ("kSums", "kNeighbors", "kLseBwd")


@dataclass(frozen=True)
class Tile:
    """An entry of the table, as in the header."""

    kernel: str
    splits: int
    k_tiles: int
    rows: int
    columns: int
    stage_k_tiles: int
    stages: int
    work_tiles: int

    def source(self) -> str:
        return "{" + ", ".join(map(str, astuple(self))) + "},"


@dataclass(frozen=True)
class Timed:
    """A problem's median, and the sum of its result."""

    ms: float
    sum: float


_ENTRY = re.compile(r"^    \{(k\w+), ([\d, ]+)\},.*\n", re.MULTILINE)


def read(text: str) -> list[Tile]:
    """The entries of a header's text."""
    return [Tile(match[1], *map(int, match[2].split(","))) for match in _ENTRY.finditer(text)]


def write(text: str, tiles: list[Tile], notes: list[str] | None = None) -> str:
    """The header's text with other entries, each followed by a note."""
    remarks = [f"  // {note}" for note in notes] if notes else [""] * len(tiles)
    lines = iter(f"    {tile.source()}{remark}\n" for tile, remark in zip(tiles, remarks, strict=True))
    return _ENTRY.sub(lambda _: next(lines), text)


def fitting(tiles: list[Tile], compiler: str = "g++") -> list[Tile]:
    """Those that the header's own limits allow: registers, shared memory, depth of the ring."""
    entries = "\n".join(tile.source() for tile in tiles)
    program = (
        '#include <cstdio>\n#include "cuda/tile_sizes_sm90.h"\nusing namespace ltood::tile_sizes;\n'
        f"constexpr TileSize candidates[] = {{{entries}}};\n"
        "int main() {\n  for (const TileSize& t : candidates) std::puts(fits(t) ? \"1\" : \"0\");\n}\n"
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "limits.cpp"), Path(folder, "limits")
        source.write_text(program)
        subprocess.run([compiler, "-std=c++17", f"-I{ROOT / 'csrc'}", source, "-o", binary], check=True)
        lines = subprocess.run([binary], capture_output=True, text=True, check=True).stdout.split()
    return [tile for tile, line in zip(tiles, lines, strict=True) if line == "1"]


def variants(tile: Tile) -> list[Tile]:
    """The entry itself and what CHOICES makes of it, fitting or not."""
    choices = CHOICES[tile.kernel]
    others = (replace(tile, **dict(zip(choices, values))) for values in itertools.product(*choices.values()))  # noqa: B905
    return [tile, *(other for other in others if other != tile)]


def candidates(tiles: list[Tile]) -> list[list[Tile]]:
    """For each entry itself and the others that fit."""
    allowed = set(fitting(list(dict.fromkeys(itertools.chain.from_iterable(map(variants, tiles))))))
    return [[variant for variant in variants(tile) if variant in allowed] for tile in tiles]


def problems(tiles: list[Tile], at: int) -> list[tuple[int, int, int]]:
    """(splits, k_tiles, rows) on which entry `at` is timed: the widest that it takes, and half of that if it does.
    K tiles are those of the table: student and guide have half each."""
    tile = tiles[at]
    if tile.kernel == "kLseBwd":
        return [(tile.splits, tile.k_tiles, ROWS)]
    of_kernel = [other for other in tiles if other.kernel == tile.kernel]
    widths = {tile.k_tiles, tile.k_tiles // 2}
    taken = [w for w in sorted(widths) if next(other for other in of_kernel if w <= other.k_tiles) == tile]
    return [(1, width, ROWS) for width in taken]


def compile_command(nvcc: str, folder: Path, share: int | None = None) -> list[str]:
    """Makes `folder`/autotune, with the table at `folder`/cuda/tile_sizes_sm90.h."""
    flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-DLTOOD_SM90A=1"]
    flags += [] if share is None else [f"-D{SHARE}={share}"]
    target = ["-gencode=arch=compute_90a,code=sm_90a", f"-I{folder}", f"-I{ROOT / 'csrc'}"]
    return [nvcc, *flags, *target, *(str(ROOT / source) for source in SOURCES), "-o", str(folder / "autotune")]


def kernel_number(kernel: str) -> str:
    """As the header's enumeration counts."""
    names = re.findall(r"^  (k\w+),", TABLE.read_text(), re.MULTILINE)
    return str(names.index(kernel))


def run(binary: Path, tiles: list[Tile], entries: list[int]) -> dict[int, list[Timed]]:
    """What autotune.cu prints for the problems of those entries of the original table."""
    asked = {at: problems(tiles, at) for at in entries}
    numbers: list[str] = []
    for at, cases in asked.items():
        for case in cases:
            numbers += (kernel_number(tiles[at].kernel), *map(str, case))
    done = subprocess.run([binary, *numbers], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"a candidate failed on the device: {done.stderr.strip()}")
    lines = iter(done.stdout.splitlines())
    return {at: [Timed(*map(float, next(lines).split())) for _ in cases] for at, cases in asked.items()}


def choose(timed: list[list[Timed]]) -> int:
    """Which candidate, the first being the entry itself. One whose result is another is wrong, not fast."""
    own = timed[0]

    def ratio(cases: list[Timed]) -> float:
        if not all(abs(case.sum - ref.sum) <= SAME * abs(ref.sum) for case, ref in zip(cases, own, strict=True)):
            return float("inf")
        return sum(case.ms / ref.ms for case, ref in zip(cases, own, strict=True)) / len(own)

    ratios = [ratio(cases) for cases in timed]
    best = min(range(len(timed)), key=ratios.__getitem__)
    return best if ratios[best] < 1 - NOISE else 0


def note(tiles: list[Tile], at: int, timed: list[list[Timed]], chosen: int) -> str:
    """The medians of what was chosen, and of the entry that it replaces."""
    width = 32 if tiles[at].kernel.startswith("kGuided") else 64
    medians = ", ".join(
        f"{case.ms:.3f} ms at D = {width * k_tiles}"
        for case, (_, k_tiles, _) in zip(timed[chosen], problems(tiles, at), strict=True)
    )
    return medians if chosen == 0 else f"{medians} ({', '.join(f'{case.ms:.3f}' for case in timed[0])} before)"


def build(nvcc: str, folder: Path, jobs: int, tables: list[str], shares: list[int | None]) -> list[Path]:
    """A binary of each table and share."""
    folders = [folder / str(i) for i in range(len(tables))]
    for place, table in zip(folders, tables, strict=True):
        (place / "cuda").mkdir(parents=True)
        (place / "cuda" / TABLE.name).write_text(table)
    commands = [compile_command(nvcc, place, share) for place, share in zip(folders, shares, strict=True)]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(partial(subprocess.run, check=True), commands))
    return [place / "autotune" for place in folders]


def tune(nvcc: str, folder: Path, jobs: int) -> str:
    """The header's text with the best entries and their medians."""
    text = TABLE.read_text()
    tiles = read(text)
    found = candidates(tiles)
    count = max(map(len, found))
    tables = [
        write(text, [of_entry[i] if i < len(of_entry) else of_entry[0] for of_entry in found]) for i in range(count)
    ]
    timed: list[list[list[Timed]]] = [[] for _ in tiles]
    for i, binary in enumerate(build(nvcc, folder, jobs, tables, [None] * count)):
        entries = [at for at, of_entry in enumerate(found) if i < len(of_entry)]
        for at, cases in run(binary, tiles, entries).items():
            timed[at].append(cases)
    chosen = [choose(of_entry) for of_entry in timed]
    notes = [note(tiles, at, timed[at], chosen[at]) for at in range(len(tiles))]
    return write(text, [found[at][chosen[at]] for at in range(len(tiles))], notes)


def share_line(timed: list[list[Timed]]) -> str:
    """The define of the best share, and the ratio of every share's time to that of none."""
    ratios = [sum(case.ms / own.ms for case, own in zip(cases, timed[0], strict=True)) / len(cases) for cases in timed]
    described = ", ".join(f"{share}: {ratio:.3f}" for share, ratio in zip(SHARES, ratios, strict=True))
    return f"#define {SHARE} {SHARES[choose(timed)]}  // time with so many of eight, by that with none: {described}"


def tune_share(nvcc: str, folder: Path, jobs: int, text: str) -> str:
    """The line for the share of exponentials on the FMA pipe, timed with the chosen table."""
    tiles = read(text)
    entries = [at for at, tile in enumerate(tiles) if tile.kernel in SHARING]
    binaries = build(nvcc, folder, jobs, [text] * len(SHARES), list(SHARES))
    timed = [run(binary, tiles, entries) for binary in binaries]
    return share_line([[case for cases in of_share.values() for case in cases] for of_share in timed])


def _run(arguments: argparse.Namespace) -> int:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise ValueError("needs a CUDA device of compute capability 9.0, and there is none here")
    nvcc = toolchain.nvcc()
    if nvcc is None:
        raise ValueError("needs nvcc, which is neither in CUDA_HOME nor on PATH")
    with tempfile.TemporaryDirectory() as folder:
        tuned = tune(nvcc, Path(folder, "tiles"), arguments.jobs)
        share = tune_share(nvcc, Path(folder, "shares"), arguments.jobs, tuned)
    print("".join(match[0] for match in _ENTRY.finditer(tuned)) + share)
    return 0


def add_parser(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("autotune", help="time the Hopper kernels' tiles on a device, print their table")
    command.set_defaults(function=_run)
    command.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time (default: all cores)")

"""Published rates of the chips: clocks that a warp instruction keeps a pipe of its quarter of a multiprocessor busy.

From the table "Throughput of Native Arithmetic Instructions" of the CUDA C++ Programming Guide (results a clock and
multiprocessor, a quarter of them each scheduler's) and the data sheets' dense 16-bit rates.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    name: str
    clock_hz: float
    multiprocessors: int
    peak_flops: float
    mma_clocks: float
    """Clocks of mma.m16n8k16 on a quarter's tensor core."""
    l2_bytes: float = 24.0
    """A clock and multiprocessor, sustained: assumed."""

    def us(self, clocks: float) -> float:
        return clocks / self.clock_hz * 1e6


# mma.sync reaches about 65 % of the H100's wgmma rate (4 clocks an instruction): assumed.
H100 = Chip("H100", 1.755e9, 132, 990e12, 6.2)
A100 = Chip("A100", 1.41e9, 108, 312e12, 8.0)
CHIPS = (H100, A100)

# Lanes a clock and multiprocessor: 128 for float32, 64 for comparisons, logic and integers, 16 for special functions,
# 32 for shuffles and shared memory.
CLOCKS = {"fma": 1, "imad": 2, "alu": 2, "special": 8, "shared": 4}


def clocks(counts: Counter[str]) -> dict[str, float]:
    """Clocks of one warp's instructions on every pipe, tensor cores left out; ``issue`` is one an instruction."""
    return {pipe: counts[pipe] * each for pipe, each in CLOCKS.items()} | {"issue": sum(counts.values())}


def wgmma_clocks(columns: int, count: int = 1) -> float:
    """Clocks of m64nNk16 on a whole multiprocessor: 1,024 multiply-adds a column, 2,048 a clock."""
    return count * columns / 2

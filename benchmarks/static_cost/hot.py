"""The hot loops of a kernel: a k-step (the innermost loop with products) and a tile (the loop around it)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from .sass import Function, Instruction, pipes


def is_product(x: Instruction) -> bool:
    return x.pipe == "tensor"


def is_step(x: Instruction) -> bool:
    """Products, and the loads of a later step, which the last steps leave out."""
    return is_product(x) or x.name == "LDGSTS"


def is_exponential(x: Instruction) -> bool:
    return x.opcode.startswith("MUFU.EX2")


def _epilogue_way(function: Function, header: int, free: frozenset[int] = frozenset()) -> list[int]:
    """The way around the loop over tiles. It is known by its products, of an output for example, and its exponentials,
    of which rescaling needs a few more, or else its arithmetic, of which a list that takes an entry may do as much
    again."""
    if function.count(function.loops[header], is_exponential):
        return function.way_around(header, lambda x: is_exponential(x) or is_product(x), 0.9, free)
    return function.way_around(header, lambda x: x.pipe == "fma" or is_product(x), 0.5, free)


def _tile_loop(function: Function, with_products: list[int], innermost: list[int]) -> tuple[int, frozenset[int]]:
    """(header, blocks of the loops over k_tiles inside). The loop over tiles is the smallest that holds the epilogue;
    where steps and tiles are one loop, that loop."""
    loops = function.loops
    around = [h for h in with_products if h not in innermost and loops[innermost[0]] <= loops[h]]
    if not around or function.count(loops[innermost[0]], is_exponential):
        return innermost[0], frozenset()
    around.sort(key=lambda h: len(loops[h]))
    header = next((h for h in around if function.count(loops[h], is_exponential)), around[0])
    return header, frozenset(b for h in innermost for b in loops[h])


@dataclass(frozen=True)
class Hot:
    """Instructions of a warp by pipe."""

    steps: tuple[Counter[str], ...]
    """The loops over k_tiles, the most frequent first: one pass each."""
    tile: Counter[str]
    """One pass of the loop over tiles, without the loops over k_tiles."""
    exponentials: int
    """Among the tile's special functions."""
    products: int
    """Tensor instructions of the kernel."""
    waits: int
    """Waits for wgmma in the first loop over k_tiles."""

    @property
    def per_product(self) -> float:
        """Instructions of a k-step for each of its tensor instructions."""
        return sum(self.steps[0].values()) / self.steps[0]["tensor"]


def hot(function: Function) -> Hot | None:
    """None where the kernel has no products in a loop."""
    with_products = [h for h, body in function.loops.items() if function.count(body, is_product)]
    if not with_products:
        return None
    loops = function.loops
    innermost = [h for h in with_products if not any(g != h and loops[g] < loops[h] for g in with_products)]
    depth = {h: sum(h in loops[g] for g in with_products) for h in innermost}
    deepest = max(depth.values())
    innermost = [h for h in innermost if depth[h] == deepest]
    epilogues = [h for h in innermost if function.count(loops[h], is_exponential)]
    if epilogues and len(innermost) > len(epilogues):  # a loop over k_tiles in front of the one with the epilogue
        innermost = [h for h in innermost if h not in epilogues]
        header, free, apart = epilogues[0], frozenset(), True
    else:
        header, free = _tile_loop(function, with_products, innermost)
        apart = bool(free)
    steps = [pipes(function.along(function.way_around(h, is_step, 0.9))) for h in innermost]
    tile = function.along(b for b in _epilogue_way(function, header, free) if b not in free)
    counts = pipes(tile)
    if not apart:
        counts.subtract(steps[0])
    waits = function.count(loops[innermost[0]], lambda x: x.opcode.startswith("WARPGROUP.DEPBAR"))
    return Hot(
        tuple(steps),
        Counter({pipe: n for pipe, n in counts.items() if n > 0}),
        sum(map(is_exponential, tile)),
        sum(map(is_product, function.instructions)),
        waits,
    )

"""A model of whole ops from the counts: PREDICTIONS, no device has been asked.

Hopper kernels: one block a multiprocessor, two consumer warpgroups that take turns at the tensor cores. sm_80 code: as
many warps as fit share the issue slots. The constants below are assumptions; allow 15 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .chips import CHIPS, H100, Chip, clocks, wgmma_clocks
from .hot import Hot

LATENCY = 100  # clocks that an epilogue lasts longer than its busiest pipe
HANDOVER = 280  # clocks between a product's end and its epilogue, and back
WORK_TILE = 1_700  # clocks that a work tile of the forward costs beyond its tiles
BLOCK = 4_000  # clocks before a block's first product
LAUNCH_US = 1.8  # a launch of a small kernel
DRAM = {"H100": 2.5e12, "A100": 1.4e12}  # bytes a second, sustained
SM80_FORWARD, SM80_BACKWARD = 0.85, 0.75  # of the issue slots that 16 and 8 warps fill
ASSUMPTIONS = (
    *(f"{c.name}: {c.clock_hz / 1e9:.3g} GHz, {c.multiprocessors} multiprocessors" for c in CHIPS),
    f"{H100.l2_bytes:.0f} bytes a clock and multiprocessor from L2",
    f"{HANDOVER} clocks between a product and its epilogue, {LATENCY} more than its busiest pipe for an epilogue",
    f"{WORK_TILE:,} clocks a work tile, {BLOCK:,} a block, {LAUNCH_US} µs a small launch",
    f"mma.sync at {4 / H100.mma_clocks:.0%} of the H100's wgmma rate; sm_80 code fills {SM80_FORWARD:.0%} (forward) and"
    f" {SM80_BACKWARD:.0%} (backward) of the issue slots",
)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Turns:
    """A tile of one warpgroup: clocks of products on the tensor cores, of its epilogue alone, and of the latter's
    busiest pipe, which two epilogues at a time share; bytes from L2 for both warpgroups."""

    products: float
    epilogue: float
    pipe: float
    bytes: float = 0
    handover: float = HANDOVER
    count: int = 0
    """Number of products."""

    @classmethod
    def of(cls, hot: Hot, products: float, count: int, bytes_: float, handover: float = HANDOVER) -> Turns:
        """From the products' clocks and number."""
        pipes = clocks(hot.tile)
        issue = pipes["issue"] + count * hot.per_product
        busiest = max(*pipes.values(), issue)
        return cls(products, max(pipes.values()) + LATENCY, busiest, bytes_, handover, count)

    def sweep(self, tiles: int) -> float:
        """Clocks from two ready warpgroups to both done with so many tiles each."""
        return max(_sweep(tiles, self.products, self.epilogue, self.pipe, self.handover), tiles * self.from_l2)

    @property
    def from_l2(self) -> float:
        return self.bytes / H100.l2_bytes

    @property
    def period(self) -> float:
        """Clocks a tile of both warpgroups in the long run."""
        return (self.sweep(48) - self.sweep(24)) / 24


@lru_cache(None)
def _sweep(tiles: int, products: float, epilogue: float, pipe: float, handover: float, dt: float = 4.0) -> float:
    if tiles <= 0:
        return 0.0
    now = tensor_free = 0.0
    done, phase, left, turn = [0, 0], ["turn", "turn"], [0.0, 0.0], 0
    shared = min(1.0, epilogue / (2 * pipe))
    while phase != ["done", "done"]:
        for w in (0, 1):
            if phase[w] == "turn" and turn == w:
                tensor_free = max(now, tensor_free) + products
                phase[w], left[w] = "products", tensor_free
                turn = w if phase[1 - w] == "done" else 1 - w
        speed = shared if phase == ["epilogue", "epilogue"] else 1.0
        for w in (0, 1):
            if phase[w] == "products" and now >= left[w]:
                phase[w], left[w] = "handover", handover
            elif phase[w] == "handover":
                left[w] -= dt
                if left[w] <= 0:
                    phase[w], left[w] = "epilogue", left[w] + epilogue
            elif phase[w] == "epilogue":
                left[w] -= dt * speed
                if left[w] <= 0:
                    done[w] += 1
                    phase[w] = "done" if done[w] >= tiles else "turn"
                    if phase[w] == "done" and turn == w:
                        turn = 1 - w
        now += dt
    return now


@dataclass(frozen=True)
class Triangle:
    """How the forward cuts its triangle of tiles, as contrastive::cut_triangle does."""

    n: int
    together: int
    work_tiles: int = 8
    most: int = 8

    def sweeps(self) -> list[list[int]]:
        """The lengths of every work tile's sweeps."""
        tiles = _ceil(self.n, 128)
        rows = _ceil(tiles, 128 * self.together) * self.together
        count = tiles * (tiles + 1) // 2
        wanted = self.work_tiles * H100.multiprocessors
        columns = max(1, min(self.most, _ceil(_ceil(count, rows), wanted)))
        result = []
        for strip in range(_ceil(tiles, rows)):
            left = tiles - strip * rows
            for chunk in range(_ceil(left, columns)):
                of_chunk = min(columns, left - chunk * columns)
                result.append(
                    [max(0, of_chunk - (r if chunk == 0 else 0)) for r in range(0, min(rows, left), self.together)]
                )
        return result


def forward_us(n: int, together: int, turns: Turns) -> float:
    """The contrastive forward on Hopper: the slowest block's work tiles one after the other."""
    work = Triangle(n, together).sweeps()
    blocks = min(len(work), H100.multiprocessors)
    worst = 0.0
    for b in range(blocks):
        mine = work[len(work) * b // blocks : len(work) * (b + 1) // blocks]
        worst = max(worst, BLOCK + sum(turns.sweep(t) + WORK_TILE for sweeps in mine for t in sweeps if t > 0))
    return H100.us(worst)


def backward_us(n: int, columns: int, y_blocks: int, turns: Turns) -> tuple[float, int]:
    """The contrastive backward on Hopper, and its ranges of columns."""
    rows = _ceil(n, 128) * y_blocks
    splits = max(1, min(H100.multiprocessors // rows, 8, _ceil(n, columns)))
    rounds = _ceil(rows * splits, H100.multiprocessors)
    tiles = _ceil(_ceil(n, columns), splits)
    return H100.us(rounds * (tiles * turns.period + BLOCK)), splits


def small_kernels_us(n: int, d: int, splits: int, chip: Chip) -> float:
    """Preparation, reduction of rows, factors, the sum of the ranges; about ten launches in each direction."""
    dram = DRAM[chip.name]
    prepare = max(2.5, 4 * n * d / dram * 1e6 + 1.5)
    rows = max(3.0, n * 65 * 8 / (2e12 if n <= 16_384 else 1.25e12) * 1e6)
    finish = 2.5 + (splits * n * d * 4 + 10 * n * d) / dram * 1e6
    return 2 * prepare + rows + 4 + finish + 11 * LAUNCH_US


def _sm80_tile_clocks(hot: Hot, k_tiles: int, chip: Chip, outputs: int = 0) -> float:
    """Clocks of 128 × 128 pairs on a multiprocessor whose schedulers share the warps evenly."""
    warps = 128 * 128 / 32 / hot.exponentials / 4
    instructions = warps * (k_tiles * sum(hot.steps[0].values()) + sum(hot.tile.values()))
    products = 32 * 32 * (k_tiles + outputs) * chip.mma_clocks / 4 / 2
    special = 128 * 128 / 16
    return max(instructions / (SM80_BACKWARD if outputs else SM80_FORWARD), products / 0.9, special)


def nt_xent_sm80_us(n: int, d: int, forward: Hot, backward: dict[int, Hot], chip: Chip) -> float:
    """Forward and backward with the sm_80 code."""
    k_tiles, tiles = d // 64, _ceil(n, 128)
    of_forward = _sm80_tile_clocks(forward, k_tiles, chip)
    outputs = min(k_tiles, 2)
    hot = backward[outputs]
    of_backward = _sm80_tile_clocks(hot, k_tiles, chip, outputs) * _ceil(k_tiles, outputs)
    clocks_ = tiles * (tiles + 1) / 2 * of_forward + tiles * tiles * of_backward
    return chip.us(clocks_ / chip.multiprocessors) * 1.05 + small_kernels_us(n, d, 1, chip)


def nt_xent_sm90_us(n: int, d: int, forward: dict[bool, Hot], backward: dict[int, Hot]) -> float:
    """Forward and backward with the Hopper kernels, for 16-bit rows."""
    k_tiles = d // 64
    wide = k_tiles <= 4
    turns = forward_turns(forward[wide], k_tiles, wide)
    outputs = 1 if k_tiles == 1 else 2 if k_tiles == 2 else 4
    back = backward_turns(backward[outputs], k_tiles, outputs)
    of_backward, splits = backward_us(n, 64 if outputs == 4 else 128, _ceil(k_tiles, outputs), back)
    return forward_us(n, 2 if wide else 1, turns) + of_backward + small_kernels_us(n, d, splits, H100)


def forward_turns(hot: Hot, k_tiles: int, wide: bool) -> Turns:
    count = k_tiles * (8 if wide else 4)
    return Turns.of(hot, wgmma_clocks(128, count), count, 128 * k_tiles * 64 * 2)


def backward_turns(hot: Hot, k_tiles: int, outputs: int) -> Turns:
    """A turn: the output's product of one tile and S of the next."""
    columns = 64 if outputs == 4 else 128
    mine = min(k_tiles, outputs)
    products = k_tiles * wgmma_clocks(columns, 4) + mine * wgmma_clocks(64, columns // 16)
    loaded = columns * 64 * 2 * (k_tiles if k_tiles <= outputs else k_tiles + mine)
    return Turns.of(hot, products, 4 * k_tiles, loaded, handover=180)


def guided_turns(hot: Hot, k_tiles: int, backward: bool, serialised: bool) -> Turns:
    """Student and guide of ``k_tiles`` each, 128 × 64 pairs a block; serialised products wait for each other."""
    step, value = (100, 150) if serialised else (wgmma_clocks(64), wgmma_clocks(128))
    products = 2 * k_tiles * 4 * step + (4 * value if backward else 0)
    loaded = 64 * 64 * 2 * (2 * k_tiles + (2 if backward else 0))
    return Turns.of(hot, products, 8 * k_tiles, loaded, handover=180)

"""wgmma: a warpgroup multiplies out of shared memory while its threads go on (sm_90a).

An accumulator in flight reads as NaN; operands in shared memory must stay as they are until wait_group."""

from dataclasses import dataclass, field

import numpy as np

from ..errors import SimError
from .bulk_copy import swizzle
from .registry import implements, unsupported
from .tensor import WARP, matrix_a, unpack_halves

_SWIZZLE_128B = 1


@dataclass
class Product:
    """One wgmma of one warp: accumulator slots, operands, and the bytes they were at issue."""

    slots: list[int]
    a: np.ndarray | None  # fragments [4, 32], or None: from shared memory
    a_offsets: np.ndarray | None  # [16, 16]
    b_offsets: np.ndarray  # [N, 16]
    accumulates: bool
    signs: int
    type: str
    before: bytes
    site: int


@dataclass
class Warpgroup:
    """What one warp has in flight."""

    open: list[Product] = field(default_factory=list)
    groups: list[list[Product]] = field(default_factory=list)
    values: dict[int, np.ndarray] = field(default_factory=dict)  # accumulators in flight: slot -> [32]
    fenced: bool = False


def _operand_offsets(descriptor: int, count: int, transposed: bool, where: str) -> np.ndarray:
    """Shared offsets of a [count, 16] operand, from its matrix descriptor with 128-byte swizzle.

    K-major: rows of 128 bytes, groups of 8 rows `stride` apart. MN-major (transposed): 64 elements of the long side lie
    together, `leading` apart from the next 64; 8 of K are 128 bytes apart each, groups of 8 `stride` apart."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    if descriptor >> 62 != _SWIZZLE_128B or descriptor >> 49 & 7:
        raise SimError(f"{where}: only matrix descriptors with 128-byte swizzle and base offset 0 are modelled")
    i, k = np.arange(count)[:, None], np.arange(16)[None, :]
    if transposed:
        linear = i % 64 * 2 + i // 64 * leading + k % 8 * 128 + k // 8 * stride
    else:
        linear = i % 8 * 128 + i // 8 * stride + k * 2
    return swizzle(start + linear, 3)


@implements("wgmma.fence", collective=True)
def compile_fence(instruction, operands):
    def run(block, mask):
        for warp in block.warps_of(mask):
            block.warpgroups[warp].fenced = True

    return run


@implements("wgmma.mma_async", collective=True)
def compile_product(instruction, operands):
    """d, a | {a registers}, b, scale-d, scale-a, scale-b{, transpose a}, transpose b."""
    parts, names = instruction.parts, instruction.operands
    if not parts[4].endswith("k16") or parts[5] != "f32" or parts[6] != parts[7] or parts[6] not in ("bf16", "f16"):
        raise unsupported(instruction)
    accumulators = operands.vector(names[0])
    slots = [operands.slot(name) for name in accumulators]
    from_registers = names[1].startswith("{")
    fragments = [operands.bits(name, np.uint32) for name in operands.vector(names[1])] if from_registers else None
    a = None if from_registers else operands.bits(names[1], np.uint64)
    b, keeps = operands.bits(names[2], np.uint64), operands.bits(names[3], bool)
    signs = int(names[4]) * int(names[5])
    transposes = [bool(int(name)) for name in names[6:]]
    site, where, columns = operands.site, instruction.where, 2 * len(slots)

    def run(block, mask):
        for warp in block.warps_of(mask):
            state, lanes = block.warpgroups[warp], slice(warp * WARP, (warp + 1) * WARP)
            if not state.fenced:
                raise SimError(f"{where}: wgmma.mma_async without wgmma.fence")
            rows = a_offsets = None
            if from_registers:
                rows = np.stack([read(block)[lanes] for read in fragments])
            else:
                whole = _operand_offsets(int(a(block)[lanes][0]), 64, transposes[0], where)
                a_offsets = whole[warp % 4 * 16 : warp % 4 * 16 + 16]
            b_offsets = _operand_offsets(int(b(block)[lanes][0]), columns, transposes[-1], where)
            before = _read(block, warp, (a_offsets, b_offsets), site)
            keep = bool(keeps(block)[lanes][0])
            product = Product(slots, rows, a_offsets, b_offsets, keep, signs, parts[6], before, site)
            state.open.append(product)
            for slot in slots:
                held = block.registers[slot]
                state.values.setdefault(slot, held[lanes].copy())
                block.registers[slot] = held = held.copy()
                held[lanes] = np.nan

    return run


def _read(block, warp: int, operands, site: int) -> bytes:
    """Checks and returns the bytes of the shared operands."""
    space, found = block.shared_space, b""
    for offsets in (each.ravel() for each in operands if each is not None):
        threads = np.full(len(offsets), warp * WARP)
        space.memory.check(offsets, 2, block.program.where[site])
        space.require_written(threads, offsets, 2, 1, site)
        space.note_read(threads, offsets, 2, site)
        found += space.memory.bytes.view(np.uint16)[offsets // 2].tobytes()
    return found


@implements("wgmma.commit_group", collective=True)
def compile_commit(instruction, operands):
    def run(block, mask):
        for warp in block.warps_of(mask):
            state = block.warpgroups[warp]
            state.groups.append(state.open)
            state.open = []

    return run


@implements("wgmma.wait_group", collective=True)
def compile_wait(instruction, operands):
    left = int(instruction.operands[0], 0)

    def run(block, mask):
        for warp in block.warps_of(mask):
            state = block.warpgroups[warp]
            while len(state.groups) > left:
                for product in state.groups.pop(0):
                    _epilogue(block, warp, state, product)
            flying = {slot for group in (*state.groups, state.open) for product in group for slot in product.slots}
            for slot in [slot for slot in state.values if slot not in flying]:
                held = block.registers[slot] = block.registers[slot].copy()
                held[warp * WARP : (warp + 1) * WARP] = state.values.pop(slot)
            if not flying:
                state.fenced = False

    return run


def _epilogue(block, warp: int, state: Warpgroup, product: Product):
    now = _read(block, warp, (product.a_offsets, product.b_offsets), product.site)
    if now != product.before:
        raise SimError(f"{block.program.where[product.site]}: an operand in shared memory was overwritten in flight")
    words = block.shared_space.memory.bytes.view(np.uint16)
    b = _numbers(words[product.b_offsets // 2], product.type)
    if product.a is None:
        a = _numbers(words[product.a_offsets // 2], product.type)
    else:
        a = matrix_a(product.a[None], product.type)[0]
    result = product.signs * (a.astype(np.float64) @ b.T)
    # Accumulator register 4 j + 2 r + h: row g + 8 r, column 8 j + 2 q + h.
    shape = (len(product.slots) // 4, 2, 2, 8, 4)
    if product.accumulates:
        held = np.stack([state.values[slot] for slot in product.slots]).reshape(shape)
        result = result + held.transpose(1, 3, 0, 4, 2).reshape(result.shape)
    fragments = result.astype(np.float32).reshape(2, 8, shape[0], 4, 2).transpose(2, 0, 4, 1, 3).reshape(-1, WARP)
    for slot, values in zip(product.slots, fragments, strict=True):
        state.values[slot] = values


def _numbers(words: np.ndarray, type_name: str) -> np.ndarray:
    pairs = np.ascontiguousarray(words).view(np.uint32)
    return unpack_halves(pairs, type_name).reshape(words.shape)

"""ldmatrix and mma.sync. A warp holds a matrix as fragments: lane = 4 g + q owns row g and columns 2q, 2q + 1.

mma sums exact products in float64 and rounds once; tensor cores keep a few bits more than float32 in an order of their
own, so results differ by a few units in the last place of float32."""

import numpy as np

from ..values import bf16_to_f32, f32_to_f16
from .registry import implements, unsupported

WARP, GROUP, QUAD = 32, 8, 4


@implements("ldmatrix", collective=True)
def compile_ldmatrix(instruction, operands):
    """Lanes 8 i .. 8 i + 7 give the row addresses of matrix i; each row is 8 elements of 16 bits."""
    if "m8n8" not in instruction.parts or "b16" not in instruction.parts:
        raise unsupported(instruction)
    destinations = operands.vector(instruction.operands[0])
    writes = [operands.write_bits(name) for name in destinations]
    address = operands.address(instruction.operands[1])
    transposed, count, site = "trans" in instruction.parts, len(destinations), operands.site

    def run(block, mask):
        warps = block.warps_of(mask)
        threads = (warps[:, None] * WARP + np.arange(GROUP * count)).ravel()
        rows = block.shared_space.load(threads, address(block)[threads], 8, 2, site)
        matrices = rows.view(np.uint16).reshape(len(warps), count, GROUP, GROUP)
        if transposed:
            matrices = np.ascontiguousarray(matrices.transpose(0, 1, 3, 2))
        fragments = matrices.view(np.uint32).reshape(len(warps), count, WARP)
        for index, write in enumerate(writes):
            write(block, mask, block.from_warps(fragments[:, index], warps))

    return run


@implements("movmatrix", collective=True)
def compile_movmatrix(instruction, operands):
    read = operands.bits(instruction.operands[1], np.uint32)
    write = operands.write_bits(instruction.operands[0])

    def run(block, mask):
        matrices = np.ascontiguousarray(read(block)).view(np.uint16).reshape(-1, GROUP, GROUP)
        write(block, mask, np.ascontiguousarray(matrices.transpose(0, 2, 1)).reshape(-1).view(np.uint32))

    return run


def unpack_halves(registers: np.ndarray, type_name: str) -> np.ndarray:
    """[...] uint32 -> [..., 2] float32."""
    halves = np.ascontiguousarray(registers).view(np.uint16)
    if type_name == "bf16":
        return bf16_to_f32(halves).reshape(*registers.shape, 2)
    return halves.view(np.float16).astype(np.float32).reshape(*registers.shape, 2)


def tf32_to_f32(registers: np.ndarray) -> np.ndarray:
    """Tensor cores ignore the low 13 bits of a tf32 operand."""
    return (registers & np.uint32(0xFFFFE000)).view(np.float32)


def matrix_a(registers: np.ndarray, type_name: str) -> np.ndarray:
    """Registers [warps, 4, 32] of operand A -> matrices [warps, 16, K]. Register 2 c + r: row half r, column half c."""
    warps = len(registers)
    shape = (warps, 2, 2, GROUP, QUAD)
    if type_name == "tf32":  # K = 8, one element a register: column q + 4 c
        values = tf32_to_f32(registers).reshape(shape)
        return values.transpose(0, 2, 3, 1, 4).reshape(warps, 16, 8)
    values = unpack_halves(registers, type_name).reshape(*shape, 2)
    return values.transpose(0, 2, 3, 1, 4, 5).reshape(warps, 16, 16)


def matrix_b(registers: np.ndarray, type_name: str) -> np.ndarray:
    """Registers [warps, 2, 32] of operand B -> matrices [warps, K, 8]."""
    warps = len(registers)
    shape = (warps, 2, GROUP, QUAD)
    if type_name == "tf32":
        return tf32_to_f32(registers).reshape(shape).transpose(0, 1, 3, 2).reshape(warps, 8, 8)
    return unpack_halves(registers, type_name).reshape(*shape, 2).transpose(0, 1, 3, 4, 2).reshape(warps, 16, 8)


def matrix_c(registers: np.ndarray) -> np.ndarray:
    """Registers [warps, 4, 32] of an accumulator -> matrices [warps, 16, 8]."""
    warps = len(registers)
    return registers.reshape(warps, 2, 2, GROUP, QUAD).transpose(0, 1, 3, 4, 2).reshape(warps, 16, 8)


def fragments_c(matrices: np.ndarray) -> np.ndarray:
    """Inverse of matrix_c."""
    warps = len(matrices)
    return matrices.reshape(warps, 2, GROUP, QUAD, 2).transpose(0, 1, 4, 2, 3).reshape(warps, 4, WARP)


_SHAPES = {"m16n8k16": ("bf16", "f16"), "m16n8k8": ("tf32",)}


@implements("mma", collective=True)
def compile_mma(instruction, operands):
    parts = instruction.parts
    shape, types = parts[3], parts[-4:]
    if types[1] not in _SHAPES.get(shape, ()) or types[1] != types[2] or parts[4:6] != ["row", "col"]:
        raise unsupported(instruction)
    if types[0] != types[3] or types[0] not in ("f32", "f16"):
        raise unsupported(instruction)
    reads = [
        [operands.bits(name, np.uint32) for name in operands.vector(operand)] for operand in instruction.operands[1:4]
    ]
    writes = [operands.write_bits(name) for name in operands.vector(instruction.operands[0])]
    input_type, half_accumulator = types[1], types[0] == "f16"

    def run(block, mask):
        a, b, c = (np.stack([read(block).reshape(-1, WARP) for read in group], 1) for group in reads)
        addend = _accumulator(c, half_accumulator)
        product = matrix_a(a, input_type).astype(np.float64) @ matrix_b(b, input_type)
        result = fragments_c((product + addend).astype(np.float32))
        if half_accumulator:
            packed = np.ascontiguousarray(result.reshape(-1, 2, 2, WARP).transpose(0, 1, 3, 2))
            result = f32_to_f16(packed).view(np.uint32)[..., 0]
        for index, write in enumerate(writes):
            write(block, mask, np.ascontiguousarray(result[:, index]).ravel())

    return run


def _accumulator(registers: np.ndarray, half: bool) -> np.ndarray:
    if not half:
        return matrix_c(registers.view(np.float32))
    values = unpack_halves(registers, "f16").transpose(0, 1, 3, 2)
    return matrix_c(np.ascontiguousarray(values).reshape(len(registers), 4, WARP))

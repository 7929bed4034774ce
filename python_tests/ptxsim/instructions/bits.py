"""Moves and bit manipulation."""

import numpy as np

from ..values import CODECS
from .arithmetic import elementwise, operand_type
from .registry import implements, unsupported

_LOGIC = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "shl": np.left_shift,
    "shr": np.right_shift,
}


@implements("and", "or", "xor")
def compile_logic(instruction, operands):
    return elementwise(instruction, operands, _LOGIC[instruction.parts[0]], 2)


@implements("not", "cnot")
def compile_not(instruction, operands):
    if instruction.parts[0] == "cnot":
        return elementwise(instruction, operands, lambda x: (x == 0).astype(x.dtype), 1)
    return elementwise(instruction, operands, np.invert, 1)


@implements("shl", "shr")
def compile_shift(instruction, operands):
    """Amounts beyond the width give 0, or the sign for a signed right shift."""
    type_name = operand_type(instruction)
    function, bits = _LOGIC[instruction.parts[0]], CODECS[type_name].bits
    value = operands.read(instruction.operands[1], type_name)
    amount = operands.read(instruction.operands[2], "u32")
    write = operands.write(instruction.operands[0], type_name)
    width = 8 * bits.itemsize
    signed_right = instruction.parts[0] == "shr" and bits.kind == "i"
    limit = np.uint32(width - 1 if signed_right else width)

    def run(block, mask):
        count = np.minimum(amount(block), limit)
        shifted = function(value(block), np.minimum(count, np.uint32(width - 1)).astype(bits))
        write(block, mask, shifted if signed_right else np.where(count == width, bits.type(0), shifted))

    return run


@implements("shf")
def compile_funnel(instruction, operands):
    """shf.l / shf.r: 32 bits out of the 64 of high:low."""
    parts = instruction.parts
    left, wrap = parts[1] == "l", parts[2] == "wrap"
    low, high, amount = (operands.read(name, "u32") for name in instruction.operands[1:4])
    write = operands.write(instruction.operands[0], "u32")
    thirty_two = np.uint64(32)

    def run(block, mask):
        pair = high(block).astype(np.uint64) << thirty_two | low(block)
        count = amount(block).astype(np.uint64)
        count = count & np.uint64(31) if wrap else np.minimum(count, thirty_two)
        moved = (pair << count) >> thirty_two if left else pair >> count
        write(block, mask, moved.astype(np.uint32))

    return run


@implements("mov")
def compile_mov(instruction, operands):
    destination, source = instruction.operands
    if destination.startswith("{"):
        return _unpack(instruction, operands)
    if source.startswith("{"):
        return _pack(instruction, operands)
    if source == "%activemask":
        raise unsupported(instruction)
    read = operands.bits(source, CODECS[operand_type(instruction)].bits)
    write = operands.write_bits(destination)
    return lambda block, mask: write(block, mask, read(block))


def _member_dtype(instruction, count: int) -> np.dtype:
    return np.dtype(f"u{CODECS[operand_type(instruction)].bits.itemsize // count}")


def _pack(instruction, operands):
    members = operands.vector(instruction.operands[1])
    dtype = _member_dtype(instruction, len(members))
    reads = [operands.bits(member, dtype) for member in members]
    write = operands.write_bits(instruction.operands[0])
    whole = np.dtype(f"u{dtype.itemsize * len(members)}")
    return lambda block, mask: write(block, mask, np.stack([read(block) for read in reads], 1).view(whole)[:, 0])


def _unpack(instruction, operands):
    members = operands.vector(instruction.operands[0])
    dtype = _member_dtype(instruction, len(members))
    read = operands.bits(instruction.operands[1], np.dtype(f"u{dtype.itemsize * len(members)}"))
    writes = [operands.write_bits(member) for member in members]

    def run(block, mask):
        halves = np.ascontiguousarray(read(block)).view(dtype).reshape(-1, len(members))
        for index, write in enumerate(writes):
            write(block, mask, np.ascontiguousarray(halves[:, index]))

    return run


@implements("bfi")
def compile_bfi(instruction, operands):
    type_name = operand_type(instruction)
    width = np.uint32(8 * CODECS[type_name].bits.itemsize)
    insert, into = (operands.read(name, type_name) for name in instruction.operands[1:3])
    position, length = (operands.read(name, "u32") for name in instruction.operands[3:5])
    write = operands.write(instruction.operands[0], type_name)

    def run(block, mask):
        at, count = position(block) & np.uint32(255), length(block) & np.uint32(255)
        field = _ones(np.minimum(count, width)) << at.astype(np.uint64)
        target = into(block).astype(np.uint64)
        moved = insert(block).astype(np.uint64) << at.astype(np.uint64)
        write(block, mask, ((target & ~field) | (moved & field)).astype(f"u{int(width) // 8}"))

    return run


def _ones(count: np.ndarray) -> np.ndarray:
    """count low bits set, as uint64; count may be 64."""
    full = np.uint64(0xFFFFFFFFFFFFFFFF)
    return np.where(count == 0, np.uint64(0), full >> (np.uint64(64) - np.maximum(count, 1).astype(np.uint64)))


@implements("bfe")
def compile_bfe(instruction, operands):
    type_name = operand_type(instruction)
    bits = CODECS[type_name].bits
    width = 8 * bits.itemsize
    value = operands.read(instruction.operands[1], type_name)
    position, length = (operands.read(name, "u32") for name in instruction.operands[2:4])
    write = operands.write(instruction.operands[0], type_name)

    def run(block, mask):
        at = (position(block) & np.uint32(255)).astype(np.int64)
        count = np.minimum((length(block) & np.uint32(255)).astype(np.int64), width)
        source = value(block)
        bounded = np.minimum(at, width - 1).astype(bits)
        moved = np.where(at < width, source >> bounded, (source >> bits.type(width - 1)) if bits.kind == "i" else 0)
        field = moved.view(f"u{bits.itemsize}").astype(np.uint64) & _ones(count)
        if bits.kind == "i":
            sign_at = np.minimum(at + count, width) - 1
            sign = (
                source.view(f"u{bits.itemsize}").astype(np.uint64) >> np.maximum(sign_at, 0).astype(np.uint64)
            ) & np.uint64(1)
            negative = (sign == 1) & (count > 0)
            field = np.where(negative, field | ~_ones(count), field)
        write(block, mask, field.astype(f"u{bits.itemsize}"))

    return run


@implements("bfind")
def compile_bfind(instruction, operands):
    """Position of the highest set bit (of the highest bit unlike the sign, for signed types); -1 if there is none."""
    type_name, parts = operand_type(instruction), instruction.parts
    bits = CODECS[type_name].bits
    source = operands.read(instruction.operands[1], type_name)
    write = operands.write(instruction.operands[0], "u32")
    shift = "shiftamt" in parts
    width = 8 * bits.itemsize

    def run(block, mask):
        value = source(block)
        if bits.kind == "i":
            value = np.where(value < 0, ~value, value).view(f"u{bits.itemsize}")
        position = _bit_length(value) - 1
        if shift:
            position = np.where(position < 0, position, width - 1 - position)
        write(block, mask, position.astype(np.int32))

    return run


def _bit_length(value: np.ndarray) -> np.ndarray:
    high = (value.astype(np.uint64) >> np.uint64(32)).astype(np.float64)
    low = (value.astype(np.uint64) & np.uint64(0xFFFFFFFF)).astype(np.float64)
    return np.where(high > 0, 32 + np.frexp(high)[1], np.frexp(low)[1]).astype(np.int64)


@implements("clz")
def compile_clz(instruction, operands):
    type_name = operand_type(instruction)
    width = 8 * CODECS[type_name].bits.itemsize
    source = operands.read(instruction.operands[1], type_name)
    write = operands.write(instruction.operands[0], "u32")
    return lambda block, mask: write(block, mask, (width - _bit_length(source(block))).astype(np.uint32))


@implements("popc")
def compile_popc(instruction, operands):
    source = operands.read(instruction.operands[1], operand_type(instruction))
    write = operands.write(instruction.operands[0], "u32")
    return lambda block, mask: write(block, mask, np.bitwise_count(source(block)).astype(np.uint32))


@implements("brev")
def compile_brev(instruction, operands):
    type_name = operand_type(instruction)
    size = CODECS[type_name].bits.itemsize
    source = operands.read(instruction.operands[1], type_name)
    write = operands.write(instruction.operands[0], type_name)

    def run(block, mask):
        octets = np.ascontiguousarray(source(block)).view(np.uint8).reshape(-1, size)
        flipped = np.packbits(np.unpackbits(octets, axis=1, bitorder="little"), axis=1, bitorder="big")[:, ::-1]
        write(block, mask, np.ascontiguousarray(flipped).view(f"u{size}")[:, 0])

    return run


@implements("lop3")
def compile_lop3(instruction, operands):
    """Any function of three bits: the table says which of the eight minterms count."""
    if "BOOL" in instruction.opcode or "|" in instruction.operands[0]:
        raise unsupported(instruction)
    first, second, third = (operands.read(name, "u32") for name in instruction.operands[1:4])
    table = int(instruction.operands[4], 0)
    write = operands.write(instruction.operands[0], "u32")

    def run(block, mask):
        a, b, c = first(block), second(block), third(block)
        result = np.zeros_like(a)
        for index in range(8):
            if table >> index & 1:
                result = result | ((a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c))
        write(block, mask, result)

    return run


@implements("prmt")
def compile_prmt(instruction, operands):
    """Picks four bytes out of the eight of two registers."""
    if instruction.parts[1:] != ["b32"]:
        raise unsupported(instruction, "a prmt mode")
    first, second, selector = (operands.read(name, "u32") for name in instruction.operands[1:4])
    write = operands.write(instruction.operands[0], "u32")

    def run(block, mask):
        octets = np.stack([first(block), second(block)], 1).view(np.uint8)
        choice = selector(block)[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)
        picked = np.take_along_axis(octets, (choice & np.uint32(7)).astype(np.int64), 1)
        sign = np.where(picked & 0x80, 0xFF, 0).astype(np.uint8)
        result = np.where(choice & np.uint32(8), sign, picked)
        write(block, mask, np.ascontiguousarray(result).view(np.uint32)[:, 0])

    return run

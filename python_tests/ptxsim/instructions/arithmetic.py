"""Integer and floating-point arithmetic, comparison and selection.

Deviations from hardware: the .approx functions are correctly rounded here (hardware is off by a few units in the last
place), fma of float32 is rounded from float64, of float64 from a compensated sum. Only .ftz flushes subnormals."""

import numpy as np

from ..operands import Operands
from ..ptx import Instruction
from ..values import CODECS, FLOAT_TYPES, SIGNED_TYPES, flush_subnormals
from .registry import implements, unsupported

_WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def operand_type(instruction: Instruction) -> str:
    """The last part of the opcode that names a type."""
    for part in reversed(instruction.parts):
        if part in CODECS:
            return part
    raise unsupported(instruction, "an opcode without a type")


def saturate(values: np.ndarray) -> np.ndarray:
    """.sat: clamp to [0, 1]; NaN and -0 become 0."""
    return np.where(values > 0, np.minimum(values, values.dtype.type(1)), values.dtype.type(0))


def elementwise(instruction: Instruction, operands: Operands, function, count: int, type_name: str | None = None):
    """destination = function(sources), with .ftz, .sat and .relu taken care of."""
    type_name = type_name or operand_type(instruction)
    sources = [operands.read(name, type_name) for name in instruction.operands[1 : count + 1]]
    write = operands.write(instruction.operands[0], type_name)
    parts = instruction.parts
    if type_name in FLOAT_TYPES and {"ftz", "sat", "relu"} & set(parts):
        return _adjusted(parts, function, sources, write)
    if count == 1:
        (first,) = sources
        return lambda block, mask: write(block, mask, function(first(block)))
    if count == 2:
        first, second = sources
        return lambda block, mask: write(block, mask, function(first(block), second(block)))
    first, second, third = sources
    return lambda block, mask: write(block, mask, function(first(block), second(block), third(block)))


def _adjusted(parts, function, sources, write):
    ftz, sat, relu = "ftz" in parts, "sat" in parts, "relu" in parts

    def run(block, mask):
        values = [source(block) for source in sources]
        if ftz:
            values = [flush_subnormals(value) for value in values]
        result = function(*values)
        if ftz:
            result = flush_subnormals(result)
        if sat:
            result = saturate(result)
        if relu:
            result = np.where(np.isnan(result), result, np.maximum(result, 0))
        write(block, mask, result)

    return run


def _divide_integers(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rounds towards zero; a division by zero gives all ones, as the hardware does."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        quotient = a // safe
    else:
        quotient = a // safe
        quotient = quotient + ((a % safe != 0) & ((a < 0) != (safe < 0)))
    return np.where(b == 0, ~np.zeros_like(a), quotient.astype(a.dtype))


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(b == 0, a, a - _divide_integers(a, b) * b)


_INTEGER_BINARY = {
    "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "div": _divide_integers, "rem": _remainder,
}  # fmt: skip
_FLOAT_BINARY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.true_divide, "min": np.fmin, "max": np.fmax,
}  # fmt: skip


@implements("add", "sub", "min", "max", "div", "rem")
def compile_binary(instruction, operands):
    type_name, parts = operand_type(instruction), instruction.parts
    root = parts[0]
    if "cc" in parts:
        raise unsupported(instruction, "a carry")
    if type_name in FLOAT_TYPES:
        if {"rz", "rm", "rp"} & set(parts):
            return _directed(instruction, operands, _FLOAT_BINARY[root], 2)
        function = _FLOAT_BINARY[root]
        if "NaN" in parts:
            function = np.minimum if root == "min" else np.maximum
        return elementwise(instruction, operands, function, 2, type_name)
    if "sat" in parts:
        return _saturating_integer(instruction, operands, _INTEGER_BINARY[root])
    return elementwise(instruction, operands, _INTEGER_BINARY[root], 2, type_name)


def _saturating_integer(instruction, operands, function):
    first, second = (operands.read(name, "s32") for name in instruction.operands[1:3])
    write = operands.write(instruction.operands[0], "s32")
    limits = np.iinfo(np.int32)

    def run(block, mask):
        exact = function(first(block).astype(np.int64), second(block).astype(np.int64))
        write(block, mask, np.clip(exact, limits.min, limits.max).astype(np.int32))

    return run


def _directed(instruction, operands, function, count):
    """add.rz.f32 and its kin: computed in float64, then rounded in the direction asked for."""
    if operand_type(instruction) != "f32":
        raise unsupported(instruction, "directed rounding of this type")
    mode = next(part for part in instruction.parts if part in ("rz", "rm", "rp"))

    def rounded(*values):
        return round_to_f32(function(*(value.astype(np.float64) for value in values)), mode)

    return elementwise(instruction, operands, rounded, count, "f32")


def round_to_f32(exact: np.ndarray, mode: str) -> np.ndarray:
    """float64 -> float32 with rounding rn, rz (to zero), rm (down) or rp (up)."""
    nearest = exact.astype(np.float32)
    if mode == "rn":
        return nearest
    back = nearest.astype(np.float64)
    too_high, too_low = back > exact, back < exact
    down = np.nextafter(nearest, np.float32(-np.inf))
    up = np.nextafter(nearest, np.float32(np.inf))
    if mode == "rm":
        return np.where(too_high, down, nearest)
    if mode == "rp":
        return np.where(too_low, up, nearest)
    return np.where(too_high & (exact > 0), down, np.where(too_low & (exact < 0), up, nearest))


def _high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Upper half of the full product."""
    width = a.dtype.itemsize * 8
    if width <= 32:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return (a.astype(wide) * b.astype(wide) >> wide(width)).astype(a.dtype)
    exact = a.astype(object) * b.astype(object)
    mask = (1 << 64) - 1
    return np.array([int(x) >> 64 & mask for x in exact.ravel()], np.uint64).view(a.dtype)


@implements("mul", "mul24")
def compile_multiply(instruction, operands):
    type_name, parts = operand_type(instruction), instruction.parts
    if type_name in FLOAT_TYPES:
        if {"rz", "rm", "rp"} & set(parts):
            return _directed(instruction, operands, np.multiply, 2)
        return elementwise(instruction, operands, np.multiply, 2, type_name)
    if "wide" in parts:
        wide = CODECS[_WIDER[type_name]].bits
        first, second = (operands.read(name, type_name) for name in instruction.operands[1:3])
        write = operands.write(instruction.operands[0], _WIDER[type_name])
        return lambda block, mask: write(block, mask, first(block).astype(wide) * second(block).astype(wide))
    function = _high_product if "hi" in parts else np.multiply
    return elementwise(instruction, operands, function, 2, type_name)


@implements("mad", "fma", "mad24")
def compile_multiply_add(instruction, operands):
    type_name, parts = operand_type(instruction), instruction.parts
    if type_name in FLOAT_TYPES:
        return _fused(instruction, operands, type_name)
    if "cc" in parts or parts[0] == "madc":
        raise unsupported(instruction, "a carry")
    if "wide" in parts:
        wide_name = _WIDER[type_name]
        wide = CODECS[wide_name].bits
        first, second = (operands.read(name, type_name) for name in instruction.operands[1:3])
        third = operands.read(instruction.operands[3], wide_name)
        write = operands.write(instruction.operands[0], wide_name)
        return lambda block, mask: write(
            block, mask, first(block).astype(wide) * second(block).astype(wide) + third(block)
        )
    if "hi" in parts:
        return elementwise(instruction, operands, lambda a, b, c: _high_product(a, b) + c, 3, type_name)
    return elementwise(instruction, operands, lambda a, b, c: a * b + c, 3, type_name)


def _fused(instruction, operands, type_name):
    mode = next((part for part in instruction.parts if part in ("rz", "rm", "rp")), "rn")
    if type_name == "f64":
        if mode != "rn":
            raise unsupported(instruction, "directed rounding of this type")
        return elementwise(instruction, operands, fused_f64, 3, type_name)
    if type_name == "f32" and mode != "rn":
        return _directed(instruction, operands, lambda a, b, c: a * b + c, 3)
    return elementwise(
        instruction, operands, lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32), 3, type_name
    )


def fused_f64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c with the error of the product and of the sum added back (Dekker, Knuth)."""
    product = a * b
    split = np.float64(134217729.0)  # 2^27 + 1
    a_high = a * split - (a * split - a)
    b_high = b * split - (b * split - b)
    a_low, b_low = a - a_high, b - b_high
    product_error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    total = product + c
    virtual = total - product
    sum_error = (product - (total - virtual)) + (c - virtual)
    error = product_error + sum_error
    return np.where(np.isfinite(error), total + error, total)


_UNARY = {
    "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt, "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
    "rcp": lambda x: 1 / x, "rsqrt": lambda x: 1 / np.sqrt(x),
}  # fmt: skip


@implements(*_UNARY)
def compile_function(instruction, operands):
    function = _UNARY[instruction.parts[0]]
    type_name = operand_type(instruction)
    if type_name == "f64":
        return elementwise(instruction, operands, function, 1, type_name)
    return elementwise(instruction, operands, lambda x: function(x.astype(np.float64)).astype(np.float32), 1, type_name)


@implements("neg", "abs")
def compile_sign(instruction, operands):
    """On floats these touch the sign bit only, which also keeps NaN payloads."""
    function = np.negative if instruction.parts[0] == "neg" else np.abs
    return elementwise(instruction, operands, function, 1)


@implements("copysign")
def compile_copysign(instruction, operands):
    return elementwise(instruction, operands, lambda sign, value: np.copysign(value, sign), 2)


@implements("testp")
def compile_testp(instruction, operands):
    type_name = operand_type(instruction)
    tiny = np.finfo(CODECS[type_name].bits).tiny
    tests = {
        "finite": np.isfinite, "infinite": np.isinf, "number": lambda x: ~np.isnan(x), "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= tiny), "subnormal": lambda x: (x != 0) & (np.abs(x) < tiny),
    }  # fmt: skip
    test = tests[instruction.parts[1]]
    source = operands.read(instruction.operands[1], type_name)
    write = operands.write_bits(instruction.operands[0])
    return lambda block, mask: write(block, mask, test(source(block)))


def _ordered(compare):
    return lambda a, b: compare(a, b) & ~(np.isnan(a) | np.isnan(b))


def _unordered(compare):
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


_INTEGER_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_FLOAT_COMPARE = {
    "eq": np.equal, "ne": _ordered(np.not_equal), "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "equ": _unordered(np.equal), "neu": np.not_equal, "ltu": _unordered(np.less),
    "leu": _unordered(np.less_equal), "gtu": _unordered(np.greater), "geu": _unordered(np.greater_equal),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@implements("setp")
def compile_setp(instruction, operands):
    type_name, parts = operand_type(instruction), instruction.parts
    if type_name.endswith("x2"):
        raise unsupported(instruction, "a packed comparison")
    compare = (_FLOAT_COMPARE if type_name in FLOAT_TYPES else _INTEGER_COMPARE)[parts[1]]
    first, second = (operands.read(name, type_name) for name in instruction.operands[1:3])
    ftz = "ftz" in parts
    destinations = [operands.write_bits(name.strip()) for name in instruction.operands[0].split("|")]
    combine = _COMBINE.get(parts[2])
    third = operands.bits(instruction.operands[3], bool) if combine else None
    write = destinations[0]

    def compared(block):
        a, b = first(block), second(block)
        return compare(flush_subnormals(a), flush_subnormals(b)) if ftz else compare(a, b)

    if combine is None and len(destinations) == 1:
        return lambda block, mask: write(block, mask, compared(block))

    def run(block, mask):
        result = compared(block)
        other = third(block) if combine else None
        for destination, outcome in zip(destinations, (result, ~result), strict=False):
            destination(block, mask, combine(outcome, other) if combine else outcome)

    return run


@implements("set")
def compile_set(instruction, operands):
    """set.op.dtype.stype: 1.0 or all ones where the comparison holds."""
    parts = instruction.parts
    types = [part for part in parts if part in CODECS]
    to_type, from_type = types[0], types[-1]
    if parts[2] in _COMBINE or from_type.endswith("x2"):
        raise unsupported(instruction)
    compare = (_FLOAT_COMPARE if from_type in FLOAT_TYPES else _INTEGER_COMPARE)[parts[1]]
    first, second = (operands.read(name, from_type) for name in instruction.operands[1:3])
    write = operands.write(instruction.operands[0], to_type)
    true = np.float32(1) if to_type in FLOAT_TYPES else np.uint32(0xFFFFFFFF)
    return lambda block, mask: write(
        block, mask, np.where(compare(first(block), second(block)), true, true.dtype.type(0))
    )


@implements("selp")
def compile_selp(instruction, operands):
    bits = CODECS[operand_type(instruction)].bits
    first, second = (operands.bits(name, bits) for name in instruction.operands[1:3])
    condition = operands.bits(instruction.operands[3], bool)
    write = operands.write_bits(instruction.operands[0])
    return lambda block, mask: write(block, mask, np.where(condition(block), first(block), second(block)))


@implements("slct")
def compile_slct(instruction, operands):
    types = [part for part in instruction.parts if part in CODECS]
    bits = CODECS[types[0]].bits
    first, second = (operands.bits(name, bits) for name in instruction.operands[1:3])
    condition = operands.read(instruction.operands[3], types[1])
    write = operands.write_bits(instruction.operands[0])
    return lambda block, mask: write(block, mask, np.where(condition(block) >= 0, first(block), second(block)))


@implements("sad")
def compile_sad(instruction, operands):
    signed = operand_type(instruction) in SIGNED_TYPES

    def distance(a, b, c):
        difference = np.maximum(a, b) - np.minimum(a, b)
        return c + difference if not signed else (c + difference).astype(a.dtype)

    return elementwise(instruction, operands, distance, 3)

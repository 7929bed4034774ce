"""cvt between all scalar types, with its rounding modes, and the packed forms."""

import numpy as np

from ..memory import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW
from ..values import CODECS, FLOAT_TYPES, flush_subnormals
from .arithmetic import round_to_f32, saturate
from .registry import implements, unsupported

_WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}
_TO_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_MODES = ("rn", "rz", "rm", "rp", "rna")
_MANTISSA_BITS = {"f16": 10, "bf16": 7, "f16x2": 10, "bf16x2": 7}


@implements("cvt")
def compile_cvt(instruction, operands):
    parts = instruction.parts
    types = [part for part in parts[1:] if part in CODECS or part == "tf32"]
    if len(types) != 2:
        raise unsupported(instruction)
    to_type, from_type = types
    if to_type in _MANTISSA_BITS and {"rm", "rp"} & set(parts):
        raise unsupported(instruction, "this rounding")
    if to_type == "tf32":
        return _to_tf32(instruction, operands)
    if to_type.endswith("x2"):
        return _packed(instruction, operands, to_type)
    read = operands.read(instruction.operands[1], from_type)
    convert = _conversion(instruction, to_type, from_type)
    bits = CODECS[to_type].bits
    store = operands.write_bits(instruction.operands[0])
    encode = CODECS[to_type].encode or (lambda values: values.astype(bits))

    # A destination register may be wider than the type (cvt.u8 into a 16-bit register): extend by sign or by zero.
    def run(block, mask):
        with np.errstate(all="ignore"):
            store(block, mask, encode(convert(read(block))))

    return run


def _conversion(instruction, to_type, from_type):
    parts = instruction.parts
    to_float, from_float = to_type in FLOAT_TYPES, from_type in FLOAT_TYPES
    integral = next((_TO_INTEGRAL[part] for part in parts if part in _TO_INTEGRAL), None)
    mode = next((part for part in parts[1:] if part in _MODES), "rn")
    ftz, sat, relu = "ftz" in parts, "sat" in parts, "relu" in parts
    if from_float and not to_float:
        return lambda x: float_to_integer(flush_subnormals(x) if ftz else x, CODECS[to_type].bits, integral)
    if not from_float and not to_float:
        return _integer_to_integer(CODECS[to_type].bits, sat)

    def convert(x):
        if ftz and x.dtype == np.float32:
            x = flush_subnormals(x)
        if integral:
            x = integral(x)
        if to_type == "f64":
            result = x.astype(np.float64)
        elif mode == "rn":
            result = x.astype(np.float32) if from_type != "f64" or to_type == "f32" else _odd_f32(x)
        elif to_type == "f32":
            result = round_to_f32(x.astype(np.float64), mode)
        else:
            result = _narrow(x.astype(np.float32), to_type)
        if ftz and result.dtype == np.float32:
            result = flush_subnormals(result)
        if sat:
            result = saturate(result)
        return np.maximum(result, 0) if relu else result

    return convert


def _odd_f32(x: np.ndarray) -> np.ndarray:
    """float64 -> float32 rounded to odd, so that the next rounding (to 16 bits) is as if it were the only one."""
    toward_zero = round_to_f32(x, "rz")
    inexact = (toward_zero.astype(np.float64) != x) & np.isfinite(x)
    return np.where(inexact, (toward_zero.view(np.uint32) | np.uint32(1)).view(np.float32), toward_zero)


def _narrow(x: np.ndarray, to_type: str) -> np.ndarray:
    """float32 with the low bits cut (rz), so that the 16-bit encoding is exact for normal numbers."""
    drop = 23 - _MANTISSA_BITS[to_type]
    return (x.view(np.uint32) & np.uint32(0xFFFFFFFF << drop & 0xFFFFFFFF)).view(np.float32)


def float_to_integer(x: np.ndarray, dtype: np.dtype, integral=None) -> np.ndarray:
    """Rounds, then clamps to the range of the integer; NaN becomes 0, or 1 << 63 for 64 bits, as on hardware."""
    rounded = (integral or np.trunc)(x.astype(np.float64))
    limits = np.iinfo(dtype)
    low, high = float(limits.min), float(limits.max)
    inside = (rounded >= low) & (rounded < high if dtype.itemsize == 8 else rounded <= high)
    with np.errstate(invalid="ignore"):
        result = np.where(inside, rounded, 0).astype(dtype)
    result = np.where(~inside & (rounded > 0), dtype.type(limits.max), result)
    result = np.where(~inside & (rounded < 0), dtype.type(limits.min), result)
    not_a_number = (
        dtype.type(0) if dtype.itemsize < 8 else dtype.type(1 << 63) if dtype.kind == "u" else dtype.type(limits.min)
    )
    return np.where(np.isnan(rounded), not_a_number, result)


def _integer_to_integer(dtype: np.dtype, sat: bool):
    limits = np.iinfo(dtype)
    if not sat:
        return lambda x: x.astype(dtype)

    def clamped(x):
        low = max(limits.min, np.iinfo(x.dtype).min)
        high = min(limits.max, np.iinfo(x.dtype).max)
        return np.clip(x, low, high).astype(dtype)

    return clamped


def _packed(instruction, operands, to_type):
    """cvt.rn.bf16x2.f32 d, a, b: a goes to the upper half."""
    mode = next(part for part in instruction.parts if part in _MODES)
    high, low = (operands.read(name, "f32") for name in instruction.operands[1:3])
    write = operands.write(instruction.operands[0], to_type)
    relu = "relu" in instruction.parts

    def run(block, mask):
        values = np.stack([low(block), high(block)], 1)
        if relu:
            values = np.maximum(values, 0)
        write(block, mask, values if mode == "rn" else _narrow(values, to_type))

    return run


def _to_tf32(instruction, operands):
    """Rounds the mantissa to 10 bits: to nearest, ties away (rna) or to even (rn)."""
    mode = next(part for part in instruction.parts if part in _MODES)
    source = operands.bits(instruction.operands[1], np.uint32)
    write = operands.write_bits(instruction.operands[0])

    def run(block, mask):
        bits = source(block)
        odd = (bits >> np.uint32(13)) & np.uint32(1)
        half = np.uint32(0x1000) if mode == "rna" else np.uint32(0x0FFF) + odd
        rounded = (bits + half) & np.uint32(0xFFFFE000)
        special = (bits & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
        write(block, mask, np.where(special, bits & np.uint32(0xFFFFE000), rounded))

    return run


@implements("cvta")
def compile_cvta(instruction, operands):
    """Between a state space and the generic window of it; global addresses are generic already."""
    parts = instruction.parts
    space = parts[2] if parts[1] == "to" else parts[1]
    window = _WINDOWS.get(space.split("_")[0], 0)
    dtype = CODECS[parts[-1]].bits
    read = operands.bits(instruction.operands[1], dtype)
    write = operands.write_bits(instruction.operands[0])
    offset = dtype.type(window) if dtype.itemsize == 8 else dtype.type(0)
    if parts[1] == "to":
        return lambda block, mask: write(block, mask, read(block) - offset)
    return lambda block, mask: write(block, mask, read(block) + offset)

"""PTX types as numpy values. A register holds bits; an instruction reads them through a codec of its type.

Narrow floats are computed in float32 (add and mul of two halves round correctly through it) and rounded when written;
packed pairs (f16x2, bf16x2) become arrays [lanes, 2]."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

REGISTER_DTYPES = {
    "pred": np.dtype(bool), "b8": np.dtype(np.uint8), "u8": np.dtype(np.uint8), "s8": np.dtype(np.int8),
    "b16": np.dtype(np.uint16), "u16": np.dtype(np.uint16), "s16": np.dtype(np.int16), "f16": np.dtype(np.uint16),
    "bf16": np.dtype(np.uint16), "b32": np.dtype(np.uint32), "u32": np.dtype(np.uint32), "s32": np.dtype(np.int32),
    "f16x2": np.dtype(np.uint32), "bf16x2": np.dtype(np.uint32), "f32": np.dtype(np.float32),
    "b64": np.dtype(np.uint64), "u64": np.dtype(np.uint64), "s64": np.dtype(np.int64), "f64": np.dtype(np.float64),
}  # fmt: skip

SMALLEST_NORMAL = np.finfo(np.float32).tiny


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even; every NaN becomes the canonical 0x7FFF, as on the hardware."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


def f32_to_f16(values: np.ndarray) -> np.ndarray:
    halves = np.asarray(values).astype(np.float16)
    return np.where(np.isnan(halves), np.uint16(0x7FFF), halves.view(np.uint16))


def flush_subnormals(values: np.ndarray) -> np.ndarray:
    """.ftz: subnormal float32 become zeros of the same sign."""
    return np.where(np.abs(values) < SMALLEST_NORMAL, np.copysign(np.float32(0), values), values)


@dataclass(frozen=True)
class Codec:
    bits: np.dtype  # what the instruction sees in the register
    decode: Callable[[np.ndarray], np.ndarray] | None = None  # bits -> numbers; None: they are the same
    encode: Callable[[np.ndarray], np.ndarray] | None = None


def _halves(bits: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(bits).view(np.uint16).reshape(*bits.shape, 2)


def _pair(halves: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(halves).view(np.uint32)[..., 0]


def _f16_to_f32(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float16).astype(np.float32)


CODECS = {name: Codec(dtype) for name, dtype in REGISTER_DTYPES.items()}
CODECS["f16"] = Codec(np.dtype(np.uint16), _f16_to_f32, f32_to_f16)
CODECS["bf16"] = Codec(np.dtype(np.uint16), bf16_to_f32, f32_to_bf16)
CODECS["f16x2"] = Codec(np.dtype(np.uint32), lambda x: _f16_to_f32(_halves(x)), lambda v: _pair(f32_to_f16(v)))
CODECS["bf16x2"] = Codec(np.dtype(np.uint32), lambda x: bf16_to_f32(_halves(x)), lambda v: _pair(f32_to_bf16(v)))

SIGNED_TYPES = {"s8", "s16", "s32", "s64"}
FLOAT_TYPES = {"f16", "bf16", "f16x2", "bf16x2", "f32", "f64"}

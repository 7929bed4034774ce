"""The parameter structs of csrc/cuda and csrc/cuda/topk/topk.h as ctypes, and operands made by their real launcher."""

import ctypes
from ctypes import c_int, c_int64, c_void_p
from dataclasses import dataclass

import numpy as np

K_TILE = 64
ELEMENT_TYPES = {np.dtype(np.float32): 0, np.dtype(np.uint16): 1, np.dtype(np.float16): 2}  # uint16: bfloat16 bits


class Operand(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p), ("scale", c_void_p), ("rows", c_int), ("k_tiles", c_int), ("splits", c_int),
        ("is_half", c_int),
    ]  # fmt: skip


class PrepareParams(ctypes.Structure):
    _fields_ = [
        ("x", c_void_p), ("type", c_int), ("rows", c_int), ("d", c_int), ("normalize", c_int), ("out", Operand),
        ("inv_norm", c_void_p), ("origin", c_void_p), ("squares", c_void_p), ("unscaled", c_int),
    ]  # fmt: skip


class SegmentSumsParams(ctypes.Structure):
    _fields_ = [
        ("x", Operand), ("keys", c_void_p), ("order", c_void_p), ("count", c_int64), ("entries_per_row", c_int),
        ("weight", c_void_p), ("d", c_int), ("sums", c_void_p), ("edges", c_void_p),
    ]  # fmt: skip


class TopkParams(ctypes.Structure):
    _fields_ = [
        ("x", Operand), ("y", Operand), ("k", c_int), ("exclude_self", c_int), ("diagonal", c_int),
        ("views", c_int),
        ("x_instance", c_void_p), ("y_instance", c_void_p), ("x_domain", c_void_p), ("y_domain", c_void_p),
        ("values", c_void_p), ("indices", c_void_p), ("workspace", c_void_p),
    ]  # fmt: skip


@dataclass
class Prepared:
    """An operand on the device, and what its rows are in float64: as the caller gave them, rounded to their type."""

    operand: Operand
    data: object
    scale: object
    inv_norm: object
    rows: np.ndarray
    given: object  # the rows on the device
    squares: object


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """Rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def as_type(x: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(storage, the values it holds in float64) of "float32", "bfloat16" (uint16 bits) or "float16"."""
    if kind == "bfloat16":
        bits = bf16_bits(x)
        return bits, bf16_values(bits).astype(np.float64)
    storage = np.ascontiguousarray(x, np.dtype(kind))
    return storage, storage.astype(np.float64)


def prepare(
    dev,
    x: np.ndarray,
    kind: str = "float32",
    normalize: bool = True,
    *,
    half: bool = False,
    splits: int | None = None,
    origin=None,
    unscaled: bool = False,
) -> Prepared:
    """Rows [N, D] through ltood_launch_prepare_rows, in splits as the torch glue chooses them. half: float16 splits."""
    storage, values = as_type(x, kind)
    n, d = x.shape
    k_tiles = -(-d // K_TILE)
    is_half = half or (kind == "float16" and normalize)
    splits = splits or (2 if kind == "float32" or (kind == "float16" and not is_half) else 1)
    data = dev.empty((splits, n, K_TILE * k_tiles), np.float16 if is_half else np.uint16)
    scale, inv_norm, squares, given = dev.empty(n), dev.empty(n), dev.empty(n), dev.put(storage)
    operand = Operand(data.ptr, scale.ptr, n, k_tiles, splits, is_half)
    params = PrepareParams(
        given.ptr, ELEMENT_TYPES[storage.dtype], n, d, normalize, operand, inv_norm.ptr,
        None if origin is None else origin.ptr, squares.ptr, unscaled,
    )  # fmt: skip
    check(dev, dev.call("ltood_launch_prepare_rows", params, None))
    return Prepared(operand, data, scale, inv_norm, values, given, squares)


def check(dev, error: int):
    assert error == 0, dev.complaint


def pointer(dev, array: np.ndarray | None):
    return None if array is None else dev.put(array).ptr

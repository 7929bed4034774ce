"""Checks of arguments, one error format: "<op>: <argument> must be <what is allowed>, got <what came>"."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum", "none")


def require(condition: bool, op: str, argument: str, allowed: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{op}: {argument} must be {allowed}, got {got}")


def require_type(condition: bool, op: str, argument: str, allowed: str, got: object) -> None:
    if not condition:
        raise TypeError(f"{op}: {argument} must be {allowed}, got {got}")


def embeddings(op: str, argument: str, x: Tensor, *, allow_empty: bool = False) -> None:
    """A float matrix, one embedding a row; non-empty unless it is one rank's part of a larger one."""
    require_type(isinstance(x, Tensor), op, argument, "a tensor", type(x).__name__)
    require_type(x.dtype in FLOAT_DTYPES, op, argument, "float64, float32, bfloat16 or float16", x.dtype)
    require(x.dim() == 2, op, argument, "a matrix [N, D], one embedding a row", f"shape {tuple(x.shape)}")
    filled = x.shape[1] > 0 and (allow_empty or x.shape[0] > 0)
    require(filled, op, argument, "non-empty", f"shape {tuple(x.shape)}")


def same_width(op: str, argument: str, y: Tensor, x_argument: str, x: Tensor, *, allow_empty: bool = False) -> None:
    """A second matrix of embeddings that lives in the space of the first."""
    embeddings(op, argument, y, allow_empty=allow_empty)
    require(y.shape[1] == x.shape[1], op, argument, f"{x.shape[1]} wide as {x_argument} is", f"shape {tuple(y.shape)}")
    same_device(op, argument, y, x_argument, x)


def same_device(op: str, argument: str, y: Tensor, x_argument: str, x: Tensor) -> None:
    require(y.device == x.device, op, argument, f"on {x.device} as {x_argument} is", y.device)


def integer_tensor(op: str, argument: str, x: Tensor, like: Tensor) -> None:
    """Integers of any shape, on the device of `like`."""
    require_type(isinstance(x, Tensor), op, argument, "an integer tensor", type(x).__name__)
    allowed = not x.dtype.is_floating_point and not x.dtype.is_complex and x.dtype != torch.bool
    require_type(allowed, op, argument, "an integer tensor", x.dtype)
    same_device(op, argument, x, "the embeddings", like)


def integers(op: str, argument: str, x: Tensor, length: int, like: Tensor) -> None:
    """An integer vector of the given length, on the device of `like`."""
    integer_tensor(op, argument, x, like)
    require(x.shape == (length,), op, argument, f"of shape [{length}]", f"shape {tuple(x.shape)}")


def index_range(op: str, argument: str, x: Tensor, low: int, high: int) -> None:
    """low <= x < high. Values are read on the CPU only: on a GPU the check would wait for the device."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() == 0:
        return
    smallest, largest = int(x.min()), int(x.max())
    require(smallest >= low and largest < high, op, argument, f"in [{low}, {high})", f"[{smallest}, {largest}]")


def finite_rows(op: str, argument: str, x: Tensor, first: int = 0) -> None:
    """No NaN or Inf; `first` is the number of row 0. Reads values: for functions that wait for the device anyway."""
    broken = ~x.isfinite().all(dim=1)
    if broken.any():
        require(False, op, argument, "finite", f"NaN or Inf in row {first + int(broken.int().argmax())}")


def temperature(op: str, value: float | Tensor, argument: str = "temperature") -> None:
    if isinstance(value, Tensor):
        require_type(value.dtype.is_floating_point, op, argument, "a float or a 0-d float tensor", value.dtype)
        require(value.dim() == 0, op, argument, "a float or a 0-d float tensor", f"shape {tuple(value.shape)}")
        if value.device.type == "cpu" and not torch.compiler.is_compiling():
            require(value.item() > 0, op, argument, "positive", value.item())
        return
    positive_number(op, argument, value)


def positive_number(op: str, argument: str, value: float) -> None:
    require_type(isinstance(value, (int, float)), op, argument, "a number", type(value).__name__)
    require(0 < value < math.inf, op, argument, "positive and finite", value)


def nonnegative_number(op: str, argument: str, value: float) -> None:
    require_type(isinstance(value, (int, float)), op, argument, "a number", type(value).__name__)
    require(0 <= value < math.inf, op, argument, "non-negative and finite", value)


def row_weights(op: str, argument: str, x: Tensor, length: int, like: Tensor) -> None:
    """One non-negative weight a row. Values are read on the CPU only, as in `index_range`."""
    require_type(x.dtype in FLOAT_DTYPES, op, argument, "a number or a float tensor", x.dtype)
    require(x.shape == (length,), op, argument, f"a number or of shape [{length}]", f"shape {tuple(x.shape)}")
    same_device(op, argument, x, "the embeddings", like)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        smallest, largest = float(x.detach().min()), float(x.detach().max())
        allowed = smallest >= 0 and math.isfinite(largest)
        require(allowed, op, argument, "non-negative and finite", f"[{smallest}, {largest}]")


def count(op: str, argument: str, value: int, low: int, high: int | None = None) -> None:
    require_type(isinstance(value, int) and not isinstance(value, bool), op, argument, "an int", type(value).__name__)
    allowed = f"at least {low}" if high is None else f"in [{low}, {high}]"
    require(value >= low and (high is None or value <= high), op, argument, allowed, value)


def choice(op: str, argument: str, value: str, allowed: tuple[str, ...]) -> None:
    require(value in allowed, op, argument, "one of " + ", ".join(allowed), repr(value))

"""Checks of arguments, one error format: "<op>: <argument> must be <what is allowed>, got <what came>".

A sentence is made only when its check fails. To torch.compile, text made of a size would fix the size: one graph for
every size of the batch. So sentences that name sizes are passed as functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor

from ..reference._common import concrete

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REDUCTIONS = ("mean", "sum", "none")
NAMED_GAPS = 5  # missing labels that an error lists
VIEWS = "two views? pass torch.cat([z0, z1])"

Text = str | Callable[[], str]


def require(condition: bool, op: str, argument: str, allowed: Text, got: object) -> None:
    """`allowed` and `got` may be functions, called when the check fails."""
    if not condition:
        raise ValueError(_sentence(op, argument, allowed, got))


def require_type(condition: bool, op: str, argument: str, allowed: Text, got: object) -> None:
    if not condition:
        raise TypeError(_sentence(op, argument, allowed, got))


def _sentence(op: str, argument: str, allowed: Text, got: object) -> str:
    allowed, got = (text() if callable(text) else text for text in (allowed, got))
    return f"{op}: {argument} must be {allowed}, got {got}"


def shape_of(x: Tensor) -> str:
    return f"shape {tuple(x.shape)}"


def readable(x: Tensor) -> bool:
    """Whether the values of x can be read without waiting for a GPU."""
    return x.device.type == "cpu" and concrete(x)


def embeddings(op: str, argument: str, x: Tensor, *, allow_empty: bool = False) -> None:
    """A float matrix, one embedding a row; non-empty unless it is one rank's part of a larger one."""
    if not isinstance(x, Tensor):
        listed = isinstance(x, (list, tuple)) and len(x) > 0 and isinstance(x[0], Tensor)
        hint = f"; join tensors by torch.cat({argument})" if listed else ""
        require_type(False, op, argument, "a tensor", type(x).__name__ + hint)
    require_type(x.dtype in FLOAT_DTYPES, op, argument, "float64, float32, bfloat16 or float16", x.dtype)
    dense(op, argument, x)
    require(x.dim() == 2, op, argument, "a matrix [N, D], one embedding a row", lambda: _not_a_matrix(argument, x))
    filled = x.shape[1] > 0 and (allow_empty or x.shape[0] > 0)
    require(filled, op, argument, "non-empty", lambda: shape_of(x))


def _not_a_matrix(argument: str, x: Tensor) -> str:
    if x.dim() != 3:
        return shape_of(x)
    ids = "torch.arange(B).repeat_interleave(V)"
    return (
        f"{shape_of(x)}; of V views of B images, [B, V, D], pass {argument}.flatten(0, 1), with instance_ids={ids} "
        "where it takes them, and labels.repeat_interleave(V) for labels"
    )


def dense(op: str, argument: str, x: Tensor) -> None:
    if x.layout is not torch.strided:
        require_type(False, op, argument, "a dense tensor", f"{x.layout}; pass {argument}.to_dense()")


def same_width(op: str, argument: str, y: Tensor, x_argument: str, x: Tensor, *, allow_empty: bool = False) -> None:
    """A second matrix of embeddings that lives in the space of the first."""
    embeddings(op, argument, y, allow_empty=allow_empty)
    same = y.shape[1] == x.shape[1]
    require(same, op, argument, lambda: f"{x.shape[1]} wide as {x_argument} is", lambda: shape_of(y))
    same_device(op, argument, y, x_argument, x)


def same_device(op: str, argument: str, y: Tensor, x_argument: str, x: Tensor) -> None:
    if y.device != x.device:
        require(False, op, argument, f"on {x.device}, the device of {x_argument}", y.device)


def integer_tensor(op: str, argument: str, x: Tensor, like: Tensor, *, mask: bool = False) -> None:
    """Integers of any shape, on the device of `like`; a mask is allowed where they name classes."""
    allowed = "an integer or bool tensor" if mask else "an integer tensor"
    if not isinstance(x, Tensor):
        hint = f"; pass torch.as_tensor({argument})" if hasattr(x, "__len__") and not isinstance(x, str) else ""
        require_type(False, op, argument, allowed, type(x).__name__ + hint)
    if x.dtype not in INTEGER_DTYPES and not (mask and x.dtype == torch.bool):
        embedded = x.dim() == 2 and like.dim() == 2 and x.shape == like.shape
        require_type(False, op, argument, allowed, f"{x.dtype} of {shape_of(x)}; {VIEWS}" if embedded else x.dtype)
    dense(op, argument, x)
    same_device(op, argument, x, "the embeddings", like)


def integers(op: str, argument: str, x: Tensor, length: int, like: Tensor, *, mask: bool = False) -> None:
    """An integer vector of the given length, on the device of `like`."""
    integer_tensor(op, argument, x, like, mask=mask)
    right = x.dim() == 1 and x.shape[0] == length
    require(right, op, argument, lambda: f"of shape [{length}]", lambda: shape_of(x))


def index_range(op: str, argument: str, x: Tensor, low: int, high: int, *, classes: bool = False) -> None:
    """low <= x < high, of values that can be read. `classes`: they name one of `high` classes each."""
    if not readable(x) or x.numel() == 0:
        return
    smallest, largest = int(x.min()), int(x.max())
    if smallest < low or largest >= high:
        hint = _gaps(argument, x, high) if classes and smallest >= low else ""
        require(False, op, argument, f"in [{low}, {high})", f"[{smallest}, {largest}]{hint}")


def _gaps(argument: str, x: Tensor, high: int) -> str:
    """The advice for labels that are too large: some are missing below them, or there are more classes."""
    found = x.unique().tolist()
    missing = found[-1] + 1 - len(found)
    if missing == 0:
        return f", {len(found)} different ones"
    named: list[str] = []
    for below, label in zip([-1, *found], found, strict=False):
        named += [str(gap) for gap in range(below + 1, min(label, below + 2 + NAMED_GAPS))]
        if len(named) > NAMED_GAPS:
            break
    listed = ", ".join(named[:NAMED_GAPS]) + (", ..." if missing > NAMED_GAPS else "")
    fits = "" if len(found) <= high else f", which are {len(found)} classes"
    return f" without {listed}; renumber them by torch.unique({argument}, return_inverse=True)[1]{fits}"


def finite_rows(op: str, argument: str, x: Tensor, first: int = 0) -> None:
    """No NaN or Inf; `first` is the number of row 0. Reads values: for functions that wait for the device anyway."""
    broken = ~x.isfinite().all(dim=1)
    if broken.any():
        require(False, op, argument, "finite", f"NaN or Inf in row {first + int(broken.int().argmax())}")


def temperature(op: str, value: float | Tensor, argument: str = "temperature") -> float | Tensor:
    """A number, or a float tensor of one element; returns it as a float or a 0-d tensor."""
    if not isinstance(value, Tensor):
        return positive_number(op, argument, value)
    allowed = "a float or a float tensor of one element"
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != 1):
        require(False, op, argument, allowed, f"{value.dtype} of {shape_of(value)}; {_no_temperature(value)}")
    if not value.dtype.is_floating_point:
        require_type(False, op, argument, allowed, value.dtype)
    if readable(value):
        require(0 < value.item() < math.inf, op, argument, "positive and finite", value.item)
    return value if value.dim() == 0 else value.reshape(())


def _no_temperature(value: Tensor) -> str:
    if value.dtype.is_floating_point:
        return VIEWS
    return "ids of images? pass instance_ids=; labels? see supcon"


def flag(op: str, argument: str, value: bool) -> None:
    require_type(isinstance(value, bool), op, argument, "True or False", type(value).__name__)


def number(op: str, argument: str, value: float) -> float:
    """A Python or NumPy number, as a float."""
    right = isinstance(value, float) or (isinstance(value, (int, Real)) and not isinstance(value, bool))
    require_type(right, op, argument, "a number", type(value).__name__)
    return float(value)


def positive_number(op: str, argument: str, value: float) -> float:
    x = number(op, argument, value)
    require(0 < x < math.inf, op, argument, "positive and finite", lambda: value)
    return x


def nonnegative_number(op: str, argument: str, value: float) -> float:
    x = number(op, argument, value)
    require(0 <= x < math.inf, op, argument, "non-negative and finite", lambda: value)
    return x


def row_weights(op: str, argument: str, x: Tensor, length: int, like: Tensor, also: str = "") -> None:
    """One non-negative weight a row. Values are checked where they can be read. `also`: what else may be passed."""
    require_type(x.dtype in FLOAT_DTYPES, op, argument, f"{also}a float tensor", x.dtype)
    dense(op, argument, x)
    right = x.dim() == 1 and x.shape[0] == length
    require(right, op, argument, lambda: f"{also}of shape [{length}]", lambda: shape_of(x))
    same_device(op, argument, x, "the embeddings", like)
    if readable(x):
        smallest, largest = float(x.detach().min()), float(x.detach().max())
        allowed = smallest >= 0 and math.isfinite(largest)
        require(allowed, op, argument, "non-negative and finite", f"[{smallest}, {largest}]")


def count(op: str, argument: str, value: int, low: int, high: int | None = None) -> None:
    # Python's int here, torch.SymInt while torch.compile or torch.export traces; no bool.
    whole = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
    require_type(whole, op, argument, "an int", type(value).__name__)
    right = value >= low and (high is None or value <= high)
    require(right, op, argument, lambda: f"at least {low}" if high is None else f"in [{low}, {high}]", lambda: value)


def choice(op: str, argument: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        require(False, op, argument, "one of " + ", ".join(allowed), repr(value))

"""Pieces that every reference shares. Plain PyTorch; float64 stays float64, everything else is computed in float32."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

Loss = TypeVar("Loss", bound=Callable[..., Any])
SMALLEST_INVERTIBLE_NORM = 1 / torch.finfo(torch.float16).max
LONG_FLOAT, LONG_DOUBLE = 1e15, 1e150  # elements whose squares are far from the largest number
LARGEST_LOGIT = 2.0**35  # whose rounding in float64 moves a softmax by 1e-6


def full_precision(x: Tensor) -> AbstractContextManager:
    """Autocast would round the sums. The meta device, which computes nothing, has no autocast."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def wide(x: Tensor) -> Tensor:
    """The dtype that sums are carried in: float64 for float64, float32 for all others."""
    return x if x.dtype == torch.float64 else x.float()


def common_dtype(*inputs: Tensor) -> torch.dtype:
    """The wide dtype for products of the inputs: float64 if one of them is float64, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32


def unit_rows(x: Tensor, normalize: bool = True) -> Tensor:
    """Rows of x in the wide dtype, L2-normalised on request (eps 1e-12, gradient through the norm).

    Long rows are scaled by their largest element first, as their squares would overflow. A float16 row whose norm has
    no finite inverse in float16 gets a gradient of 0.
    """
    rows = wide(x)
    if not normalize:
        return rows
    if x.dtype == torch.float16:
        dead = rows.detach().norm(dim=1, keepdim=True) < SMALLEST_INVERTIBLE_NORM
        rows = rows.detach().where(dead, rows)
    largest = rows.detach().abs().amax(dim=1, keepdim=True)
    long = largest > (LONG_DOUBLE if rows.dtype == torch.float64 else LONG_FLOAT)
    return F.normalize(rows / largest.where(long, 1), dim=1, eps=1e-12)


def transformed() -> bool:
    """Whether this call is inside forward-mode AD or a transform of torch.func, 0.1 us."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def concrete(x: Tensor) -> bool:
    """Whether x has values: it has none on the meta device, inside vmap, and while a graph is traced."""
    plain = (type(x) is Tensor or type(x) is torch.nn.Parameter) and not x.is_meta
    return plain and not torch.compiler.is_compiling() and not transformed()


def rows_as_given_in_double(loss: Loss) -> Loss:
    """A loss that computes in float64 where `normalize=False` lets logits have any size, and refuses those that float64
    rounds too much, as the kernels do. Results have the wide dtype of z."""
    signature = inspect.signature(loss)

    @functools.wraps(loss)
    def run(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        if given["normalize"] or given.get("kind") == "bce":
            return loss(*args, **kwargs)
        z = given["z"]
        _refuse_long(loss.__name__, z, given["temperature"])
        dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
        given["z"] = z.double()
        return _in_dtype(loss(*call.args, **call.kwargs), dtype)

    return cast("Loss", run)


def _refuse_long(op: str, z: Tensor, temperature: float | Tensor) -> None:
    if not concrete(z) or z.device.type != "cpu":  # (elsewhere that would wait for the device)
        return
    tau = temperature.detach().item() if isinstance(temperature, Tensor) else temperature
    bound = z.detach().double().norm(dim=1).max().item() ** 2 / tau
    if LARGEST_LOGIT < bound < torch.inf:
        raise ValueError(
            f"{op}: z must be of rows with |z_i| |z_j| / temperature up to 3.4e10, where float64 still carries a "
            f"softmax, got {bound:.6g} (normalise the rows, scale them down, or raise the temperature)"
        )


def _in_dtype(result: Any, dtype: torch.dtype) -> Any:
    if isinstance(result, Tensor):
        return result.to(dtype) if result.dtype == torch.float64 else result
    parts = [_in_dtype(part, dtype) for part in result]
    return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)


def inner_products(x: Tensor, y: Tensor) -> Tensor:
    """x @ y.T, with the same bits in columns of equal rows, so that they tie: how a matrix product rounds an element
    depends on its position. Only where rows have values, as the number of distinct rows is data."""
    products = x @ y.T
    if not concrete(y):
        return products
    with torch.no_grad():
        group = torch.unique(y, dim=0, return_inverse=True)[1]
        rows = torch.arange(len(y), device=y.device)
        first = torch.full_like(rows, len(y)).scatter_reduce(0, group, rows, "amin")
    return products[:, first[group]]


def view_mask(n: int, instance_ids: Tensor | None, device: torch.device) -> Tensor:
    """[N, N] bool: j is another view of i. Without ids, row i and row i + N/2 (mod N) are the two views of an image."""
    if instance_ids is None:
        instance_ids = torch.arange(n, device=device) % (n // 2)
    return (instance_ids[:, None] == instance_ids[None, :]) & ~torch.eye(n, dtype=torch.bool, device=device)


def best_k(scores: Tensor, admissible: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(scores [N, k], columns [N, k]) of the k largest admissible entries of each row, best first, ties to the lower
    column. A row with fewer than k admissible entries ends in score -inf and column -1."""
    ranked, columns = scores.masked_fill(~admissible, -torch.inf).sort(dim=1, descending=True, stable=True)
    ranked, columns = ranked[:, :k], columns[:, :k]
    return ranked, columns.masked_fill(ranked == -torch.inf, -1)


def not_negative(rows: Tensor) -> Tensor:
    """Row losses that rounding made negative become 0; the gradient stays, and so does NaN."""
    return rows + (-rows.detach()).clamp(min=0)


def reduce_rows(rows: Tensor, counted: Tensor, reduction: str) -> Tensor:
    """`mean` divides by the number of rows that count (the others hold 0), or by their weights; without one it is 0."""
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    total = counted.sum()
    return rows.sum() / total.where(total > 0, 1)

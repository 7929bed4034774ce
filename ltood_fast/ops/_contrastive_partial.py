"""torch.ops.ltood_fast.contrastive_partial and its backward: the contrastive similarities of the rows of one process
with the columns of all of them, or of one other. The building blocks of the losses over a process group.

    s = normalize(x) @ normalize(y).T / temperature;  s[i, i + diagonal] = -inf      # the same embedding
    lse = s.logsumexp(1)
    g = (s - x_lse[:, None]).exp() * x_weight[:, None] + (s - y_lse).exp() * y_weight
    grad_unit = g @ normalize(y) / temperature
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._ext import has_kernel
from ._schema import Arguments, int64, not_differentiable, overload, temperature_arguments, wide_dtype

Pair = tuple[Tensor, Tensor]


class ContrastivePartial(NamedTuple):
    lse: Tensor  # [n] float64, -inf where a row has no column
    cosines: Tensor  # [n, k] float32 (float64 of float64), best first, -inf where the candidates run out
    indices: Tensor  # [n, k] int64, columns of y; -1 where the candidates run out


def contrastive_partial(
    x: Tensor,
    y: Tensor,
    temperature: float | Tensor,
    *,
    normalize: bool,
    diagonal: int,
    k: int = 0,
    instances: Pair | None = None,
    domains: Pair | None = None,
    excluded: Pair | None = None,
) -> ContrastivePartial:
    """Row log-sum-exp over the columns, and the k best columns of every row.

    Args:
        x, y: rows ``[n, D]`` and columns ``[M, D]`` of the same dtype. Not differentiable: the caller has the gradient.
        temperature: tau, a number or a 0-d tensor.
        normalize: L2-normalise the rows of x and of y.
        diagonal: row i and column ``i + diagonal`` are the same embedding, a pair that is left out; a diagonal outside
            ``(-n, M)`` meets nothing.
        k: how many columns to find.
        instances, domains: int64 of the rows ``[n]`` and of the columns ``[M]``; columns of the row's instance, and
            those of another domain, are no candidates.
        excluded: int64 of the rows and of the columns: columns of the row's id, if it is not -1, leave lse. None on
            CUDA.
    """
    pairs = (pair or (None, None) for pair in (instances, domains, excluded))
    (x_instance, y_instance), (x_domain, y_domain), (x_excluded, y_excluded) = pairs
    return ContrastivePartial(
        *overload("contrastive_partial")(
            x=x,
            y=y,
            x_instance=int64(x_instance),
            y_instance=int64(y_instance),
            x_domain=int64(x_domain),
            y_domain=int64(y_domain),
            x_excluded=int64(x_excluded),
            y_excluded=int64(y_excluded),
            normalize=normalize,
            diagonal=diagonal,
            k=k,
            **temperature_arguments(temperature),
        )
    )


def contrastive_partial_bwd(
    x: Tensor,
    y: Tensor,
    temperature: float | Tensor,
    *,
    normalize: bool,
    diagonal: int,
    of_rows: Pair,
    of_columns: Pair | None = None,
    excluded: Pair | None = None,
) -> Tensor:
    """Gradient at the (normalised) rows of x of ``sum(weight * lse)`` over the rows of all processes: ``[n, D]``
    float32, float64 of float64.

    Args:
        x, y, temperature, normalize, diagonal, excluded: as in `contrastive_partial`.
        of_rows: float64 ``[n]`` each: log-sum-exp of the rows over all columns, and its gradient.
        of_columns: the same of the columns, ``[M]``; None: the columns have no gradient.
    """
    (x_lse, x_weight), (y_lse, y_weight) = of_rows, of_columns or (None, None)
    x_excluded, y_excluded = excluded or (None, None)
    return overload("contrastive_partial_bwd")(
        x=x,
        y=y,
        x_lse=x_lse,
        x_weight=x_weight,
        y_lse=y_lse,
        y_weight=y_weight,
        x_excluded=int64(x_excluded),
        y_excluded=int64(y_excluded),
        normalize=normalize,
        diagonal=diagonal,
        **temperature_arguments(temperature),
    )


def _fake(*args, **kwargs):
    call = Arguments("contrastive_partial", args, kwargs)
    x, n = call.x, call.x.shape[0]
    return (
        x.new_empty(n, dtype=torch.float64),
        x.new_empty((n, call.k), dtype=wide_dtype(x.dtype)),
        x.new_empty((n, call.k), dtype=torch.int64),
    )


def _fake_bwd(x, *_, **__):
    return x.new_empty(x.shape, dtype=wide_dtype(x.dtype))


if has_kernel("contrastive_partial", "cpu") or has_kernel("contrastive_partial", "cuda"):
    torch.library.register_fake("ltood_fast::contrastive_partial", _fake)
    torch.library.register_fake("ltood_fast::contrastive_partial_bwd", _fake_bwd)
    not_differentiable("contrastive_partial")
    not_differentiable("contrastive_partial_bwd")

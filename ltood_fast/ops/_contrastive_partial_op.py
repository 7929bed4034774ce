"""torch.ops.ltood_fast.contrastive_partial and its backward: the contrastive similarities of the rows of one process with
the columns of all of them, or of one other. The building blocks of the losses over a process group.

    s = normalize(x) @ normalize(y).T / temperature;  s[i, i + diagonal] = -inf      # the same embedding
    lse = s.logsumexp(1)
    grad_unit = ((s - x_lse[:, None]).exp() * x_weight[:, None] + (s - y_lse).exp() * y_weight) @ normalize(y) / temperature
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._ext import has_kernel
from ._contrastive_op import _int64, _wide_dtype


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
    x_instance: Tensor | None = None,
    y_instance: Tensor | None = None,
    x_domain: Tensor | None = None,
    y_domain: Tensor | None = None,
) -> ContrastivePartial:
    """Row log-sum-exp over the columns, and the k best columns of every row.

    Args:
        x: rows ``[n, D]``; y: columns ``[M, D]`` of the same dtype. Not differentiable: the caller has the gradient.
        temperature: tau, a number or a 0-d tensor.
        normalize: L2-normalise the rows of x and of y.
        diagonal: row i and column ``i + diagonal`` are the same embedding, a pair that is left out; a diagonal outside
            ``(-n, M)`` meets nothing.
        k: how many columns to find; columns of the row's instance (``*_instance``, int64, both or none) and columns of
            another domain (``*_domain``, likewise) are no candidates.
    """
    learned = isinstance(temperature, Tensor)
    return ContrastivePartial(
        *torch.ops.ltood_fast.contrastive_partial(
            x,
            y,
            1.0 if learned else float(temperature),
            temperature if learned else None,
            normalize,
            diagonal,
            k,
            _int64(x_instance),
            _int64(y_instance),
            _int64(x_domain),
            _int64(y_domain),
        )
    )


def contrastive_partial_bwd(
    x: Tensor,
    y: Tensor,
    temperature: float | Tensor,
    *,
    normalize: bool,
    diagonal: int,
    x_lse: Tensor,
    x_weight: Tensor,
    y_lse: Tensor | None = None,
    y_weight: Tensor | None = None,
) -> Tensor:
    """Gradient at the (normalised) rows of x of ``sum(weight * lse)`` over the rows of all processes: ``[n, D]``
    float32, float64 of float64.

    Args:
        x, y, temperature, normalize, diagonal: as in `contrastive_partial`.
        x_lse, x_weight: float64 ``[n]``, log-sum-exp of the rows over all columns, and the gradient that arrives at it.
        y_lse, y_weight: the same of the columns, ``[M]``; None: the columns have no gradient.
    """
    learned = isinstance(temperature, Tensor)
    return torch.ops.ltood_fast.contrastive_partial_bwd(
        x,
        y,
        1.0 if learned else float(temperature),
        temperature if learned else None,
        normalize,
        diagonal,
        x_lse,
        x_weight,
        y_lse,
        y_weight,
    )


def _fake(x, y, temperature, temperature_tensor, normalize, diagonal, k, *_):
    n, wide = x.shape[0], _wide_dtype(x.dtype)
    return (
        x.new_empty(n, dtype=torch.float64),
        x.new_empty((n, k), dtype=wide),
        x.new_empty((n, k), dtype=torch.int64),
    )


def _fake_bwd(x, *_):
    return x.new_empty(x.shape, dtype=_wide_dtype(x.dtype))


def _refuse(op: str):
    def backward(ctx, *_):
        raise RuntimeError(f"{op}: differentiation is not supported; the loss that calls it implements its gradient")

    return backward


if has_kernel("contrastive_partial", "cpu") or has_kernel("contrastive_partial", "cuda"):
    torch.library.register_fake("ltood_fast::contrastive_partial", _fake)
    torch.library.register_fake("ltood_fast::contrastive_partial_bwd", _fake_bwd)
    torch.library.register_autograd("ltood_fast::contrastive_partial", _refuse("contrastive_partial"))
    torch.library.register_autograd("ltood_fast::contrastive_partial_bwd", _refuse("contrastive_partial_bwd"))

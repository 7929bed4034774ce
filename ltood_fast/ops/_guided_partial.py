"""torch.ops.ltood_fast.guided_partial and its backward: the pairs of stage 2 between the rows of one process and the
columns of all of them, or of one other. The building blocks of its losses over a process group, called by them alone.

With s, cos, w+ and w- as in `guided_contrastive`, j over the columns, N'(i) those of the farthest cluster (all of them
in lse_every, for the rows that ask for it), V(i) the other views:

    lse = log( sum_{j in N'(i)} w-_ij exp(s_ij) + sum_{v in V(i)} (1 - [v in N'(i)] w-_iv) exp(s_iv) )
    weight, positive_logit = sum_{v in V(i)} w+_iv, sum_{v in V(i)} w+_iv s_iv
    excess, gap = sum_j p_ij (t_ij - s_ij), sum_j exp(s_ij) / sum_j exp(t_ij) - 1,  t = cos / teacher_temperature, p its
                  softmax over the columns
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._ext import has_kernel
from ._schema import Arguments, not_differentiable, wide_dtype


class GuidedPartial(NamedTuple):
    """[n] float64 of the enabled losses, which combine with those of other columns; and the k best columns."""

    lse: Tensor
    lse_every: Tensor
    weight: Tensor
    positive_logit: Tensor
    cosines: Tensor  # [n, k] of the guide, best first, -inf where the candidates run out
    indices: Tensor  # [n, k] int64, columns; -1 where the candidates run out
    student_lse: Tensor
    teacher_lse: Tensor
    excess: Tensor
    gap: Tensor


def _fake(*args, **kwargs):
    call = Arguments("guided_partial", args, kwargs)
    x, n = call.x, call.x.shape[0]

    def rows(used: bool, count: int) -> tuple[Tensor, ...]:
        return tuple(x.new_empty(n if used else 0, dtype=torch.float64) for _ in range(count))

    best = x.new_empty((n, call.k), dtype=wide_dtype(x.dtype)), x.new_empty((n, call.k), dtype=torch.int64)
    return *rows(call.x_clusters is not None, 4), *best, *rows(call.distill, 4)


def _fake_bwd(*args, **kwargs):
    x = Arguments("guided_partial_bwd", args, kwargs).x
    return x.new_empty(x.shape, dtype=wide_dtype(x.dtype))


if has_kernel("guided_partial", "cpu") or has_kernel("guided_partial", "cuda"):
    torch.library.register_fake("ltood_fast::guided_partial", _fake)
    torch.library.register_fake("ltood_fast::guided_partial_bwd", _fake_bwd)
    not_differentiable("guided_partial")
    not_differentiable("guided_partial_bwd")

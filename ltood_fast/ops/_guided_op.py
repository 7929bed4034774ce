"""torch.ops.ltood_fast.guided: its shapes, its gradient, and the call that all functions of the family make."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._group import ALONE, GroupContext, all_of
from ._schema import (
    Arguments,
    call,
    differentiable,
    fake_gradients,
    int64,
    overload,
    temperature_arguments,
    varying,
    wide_dtype,
)


class GuidedRows(NamedTuple):
    """The outputs of the operator. Rows of a disabled loss are empty."""

    loss: Tensor  # [N] guided contrastive, float64 for float64 z, else float32
    weight: Tensor  # [N] float64, sum of the attractions, 0 where a row has no positive
    lse: Tensor  # [N] float64
    neighbors: Tensor  # [N, k] int64, the guide's neighbours that are positives, -1 = none
    kl: Tensor  # [N] relational distillation, in the dtype of loss
    student_lse: Tensor  # [N] float64
    teacher_lse: Tensor  # [N] float64

    @property
    def contrast(self) -> tuple[Tensor, Tensor]:
        """Losses, and which of them count."""
        return self.loss, self.weight != 0

    @property
    def divergence(self) -> tuple[Tensor, Tensor]:
        return all_of(self.kl)


def guided(
    z: Tensor,
    guide: Tensor,
    temperature: float | Tensor,
    *,
    context: GroupContext = ALONE,
    must_match: str = "",
    **options: object,
) -> GuidedRows:
    """Row losses from the kernel: the contrastive part where there are `clusters`, distillation on request, one pass.

    Args:
        context: over a process group the rows are those of this rank among the rows of all ranks.
        must_match: what the ranks have to agree on, lines `name=value`.
        options: the other arguments of the operator by name; ids of any integer type.
    """
    arguments = {"z": z, "guide": guide.detach(), **temperature_arguments(temperature)}
    arguments |= {name: int64(x) if isinstance(x, Tensor) else x for name, x in options.items()}
    if not context.many:
        return GuidedRows(*call("guided", context.op, **arguments))
    outputs = overload("guided_group")(**arguments, **context.options(True, must_match))
    return GuidedRows(*outputs[: len(GuidedRows._fields)])


@torch.library.register_fake("ltood_fast::guided")
def fake_guided(*args, **kwargs):
    given = Arguments("guided", args, kwargs)
    z, n, contrast, distill = given.z, given.z.shape[0], given.clusters is not None, given.distill
    width = 0 if not contrast else given.k if given.pos_idx is None else given.pos_idx.shape[1]

    def rows(used: bool, dtype: torch.dtype = torch.float64) -> Tensor:
        return z.new_empty(n if used else 0, dtype=dtype)

    wide = wide_dtype(z.dtype)
    neighbors = z.new_empty((n, width), dtype=torch.int64)
    contrasts = rows(contrast, wide), rows(contrast), rows(contrast)
    return *contrasts, neighbors, rows(distill, wide), rows(distill), rows(distill)


fake_gradients("guided")
differentiable("guided")
varying("guided")

"""torch.ops.ltood_fast.guided: its fake, its gradient, and the call that all functions of the family make."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._group import ALONE, GroupContext


class Rows(NamedTuple):
    """What the op returns. Rows of a part that was not asked for are empty."""

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


def all_of(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows, torch.ones_like(rows, dtype=torch.bool)


def guided(
    z: Tensor,
    guide: Tensor,
    clusters: Tensor | None,
    far: Tensor | None,
    temperature: float | Tensor,
    *,
    k: int = 0,
    pos_idx: Tensor | None = None,
    weighted: bool = True,
    gamma: float = 1.0,
    instance_ids: Tensor | None = None,
    normalize: bool,
    distill: bool = False,
    teacher_temperature: float | None = None,
    context: GroupContext = ALONE,
    must_match: str = "",
) -> Rows:
    """Row losses from the kernel: the contrastive part where there are clusters, distillation on request, one pass.
    `context`: the ranks whose rows are one batch, `must_match` what they have to agree on."""
    learned = isinstance(temperature, Tensor)
    arguments = (
        z,
        guide.detach(),
        _int64(clusters),
        _int64(far),
        _int64(instance_ids),
        _int64(pos_idx),
        1.0 if learned else float(temperature),
        temperature if learned else None,
        teacher_temperature,
        k,
        weighted,
        float(gamma),
        normalize,
        distill,
    )
    if not context.many:
        return Rows(*torch.ops.ltood_fast.guided(*arguments))
    return Rows(
        *torch.ops.ltood_fast.guided_group(*arguments, context.op, must_match, context.exchange, context.name)[:7]
    )


def _int64(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int64).contiguous()


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("ltood_fast::guided")
def _fake(z, guide, clusters, far, ids, pos_idx, tau, tau_tensor, teacher, k, weighted, gamma, normalize, distill):
    n, contrast = z.shape[0], clusters is not None
    width = 0 if not contrast else k if pos_idx is None else pos_idx.shape[1]

    def rows(used: bool, dtype: torch.dtype = torch.float64) -> Tensor:
        return z.new_empty(n if used else 0, dtype=dtype)

    wide = _wide_dtype(z.dtype)
    neighbors = z.new_empty((n, width), dtype=torch.int64)
    contrasts = rows(contrast, wide), rows(contrast), rows(contrast)
    return *contrasts, neighbors, rows(distill, wide), rows(distill), rows(distill)


@torch.library.register_fake("ltood_fast::guided_bwd")
def _fake_bwd(grad_loss, grad_lse, grad_kl, grad_student_lse, z, *_):
    return z.new_empty(z.shape), z.new_empty((), dtype=_wide_dtype(z.dtype))


def _setup_context(ctx, inputs, output):
    z, guide, clusters, far, ids, _, tau, tau_tensor, teacher, _, weighted, gamma, normalize, distill = inputs
    _, weight, lse, neighbors, _, student_lse, teacher_lse = output
    ctx.mark_non_differentiable(weight, neighbors, teacher_lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z, guide, clusters, far, ids, weight, lse, neighbors, student_lse, teacher_lse, tau_tensor)
    ctx.scalars = tau, teacher, weighted, gamma, normalize, distill


def _backward(ctx, grad_loss, _weight, grad_lse, _neighbors, grad_kl, grad_student_lse, _teacher_lse):
    *saved, tau_tensor = ctx.saved_tensors
    tau, *scalars = ctx.scalars
    grad_z, grad_tau = torch.ops.ltood_fast.guided_bwd(
        grad_loss, grad_lse, grad_kl, grad_student_lse, *saved, tau, tau_tensor, *scalars
    )
    grad_tau = None if tau_tensor is None else grad_tau.to(tau_tensor.dtype)
    return grad_z, *([None] * 6), grad_tau, *([None] * 6)


def _refuse_double_backward(ctx, *_):
    raise RuntimeError("guided: double backward is not supported")


torch.library.register_autograd("ltood_fast::guided", _backward, setup_context=_setup_context)
torch.library.register_autograd("ltood_fast::guided_bwd", _refuse_double_backward)

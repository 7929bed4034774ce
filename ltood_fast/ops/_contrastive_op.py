"""torch.ops.ltood_fast.contrastive: its fake, its gradient, and the call that all functions of the family make."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._ext import has_kernel
from ._group import GroupContext


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Rows(NamedTuple):
    """What the op returns. Rows of a part that was not asked for are empty."""

    instance_loss: Tensor  # [N]
    class_loss: Tensor  # [N]
    lse: Tensor  # [N] float64
    instance_weight: Tensor  # [N] float64, 0 where a row has no positive
    class_weight: Tensor  # [N] float64
    cosines: Tensor  # [N, k]
    indices: Tensor  # [N, k] int64

    @property
    def instance(self) -> tuple[Tensor, Tensor]:
        """(losses, which rows have a positive), for `reduce_parts`."""
        return self.instance_loss, self.instance_weight > 0

    @property
    def classes(self) -> tuple[Tensor, Tensor]:
        return self.class_loss, self.class_weight > 0

    def extras(self, return_lse: bool, return_neighbors: bool) -> tuple[Tensor, ...]:
        lse = (self.lse.to(self.cosines.dtype),) if return_lse else ()
        return lse + ((self.cosines.detach(), self.indices) if return_neighbors else ())


def contrastive(
    z: Tensor,
    temperature: float | Tensor,
    *,
    normalize: bool,
    views: bool = True,
    instance_ids: Tensor | None = None,
    labels: Tensor | None = None,
    k: int = 0,
    neighbor_weight: float | Tensor = 1.0,
    domain: Tensor | None = None,
    bank: Tensor | None = None,
    bank_ids: Tensor | None = None,
    bank_domain: Tensor | None = None,
    context: GroupContext | None = None,
    kernel: bool = True,
) -> Rows:
    """Row losses: the instance part (`views`) and the class part (`labels`) from one pass. With `context` the rows are
    those of this rank among the rows of all ranks; without `kernel` (only then) from the reference."""
    learned, weighted = isinstance(temperature, Tensor), isinstance(neighbor_weight, Tensor)
    arguments = (
        z,
        1.0 if learned else float(temperature),
        temperature if learned else None,
        normalize,
        views,
        _int64(instance_ids),
        _int64(labels),
        k,
        1.0 if weighted else float(neighbor_weight),
        neighbor_weight.detach().to(torch.float64) if weighted else None,
        _int64(domain),
        None if bank is None else bank.detach(),
        _int64(bank_ids),
        _int64(bank_domain),
    )
    if context is None or not context.many:
        return Rows(*torch.ops.ltood_fast.contrastive(*arguments))
    options = (kernel, context.op, context.reduction, context.exchange, context.name)
    *rows, _, _ = torch.ops.ltood_fast.contrastive_group(*arguments, *options)
    return Rows(*rows)


def _int64(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int64)


def _fake(z, temperature, temperature_tensor, normalize, views, instance_ids, labels, k, *_):
    n, wide = z.shape[0], _wide_dtype(z.dtype)
    n_instance, n_class = n if views else 0, n if labels is not None else 0
    return (
        z.new_empty(n_instance, dtype=wide),
        z.new_empty(n_class, dtype=wide),
        z.new_empty(n, dtype=torch.float64),
        z.new_empty(n_instance, dtype=torch.float64),
        z.new_empty(n_class, dtype=torch.float64),
        z.new_empty((n, k), dtype=wide),
        z.new_empty((n, k), dtype=torch.int64),
    )


def _fake_bwd(grad_instance, grad_class, grad_lse, z, *_):
    return z.new_empty(z.shape), z.new_empty((), dtype=_wide_dtype(z.dtype))


def _setup_context(ctx, inputs, output):
    z, temperature, temperature_tensor, normalize, _, ids, labels, _, weight, weights, _, bank, _, _ = inputs
    _, _, lse, instance_weight, class_weight, cosines, indices = output
    ctx.mark_non_differentiable(instance_weight, class_weight, cosines, indices)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        z, temperature_tensor, ids, labels, weights, bank, lse, instance_weight, class_weight, cosines, indices
    )
    ctx.scalars = temperature, normalize, weight


def _used(gradient: Tensor | None) -> Tensor | None:
    """None for the gradient of a part that was not asked for, which torch.compile makes an empty tensor."""
    return None if gradient is None or gradient.shape[0] == 0 else gradient


def _backward(ctx, grad_instance, grad_class, grad_lse, *_):
    z, temperature_tensor, ids, labels, weights, bank, *rows = ctx.saved_tensors
    temperature, normalize, weight = ctx.scalars
    grad_z, grad_temperature = torch.ops.ltood_fast.contrastive_bwd(
        _used(grad_instance),
        _used(grad_class),
        grad_lse,
        z,
        temperature,
        temperature_tensor,
        normalize,
        ids,
        labels,
        weight,
        weights,
        bank,
        *rows,
    )
    if temperature_tensor is not None:
        grad_temperature = grad_temperature.to(temperature_tensor.dtype)
    return grad_z, None, grad_temperature if temperature_tensor is not None else None, *([None] * 11)


def _refuse_double_backward(ctx, *_):
    raise RuntimeError("contrastive: double backward is not supported")


if has_kernel("contrastive", "cpu") or has_kernel("contrastive", "cuda"):
    torch.library.register_fake("ltood_fast::contrastive", _fake)
    torch.library.register_fake("ltood_fast::contrastive_bwd", _fake_bwd)
    torch.library.register_autograd("ltood_fast::contrastive", _backward, setup_context=_setup_context)
    torch.library.register_autograd("ltood_fast::contrastive_bwd", _refuse_double_backward)

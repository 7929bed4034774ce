"""torch.ops.ltood_fast.contrastive: its shapes, its gradient, and the call that all functions of the family make."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._ext import has_kernel
from ..reference.options import Bank
from ._group import ALONE, GroupContext
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


class ContrastiveRows(NamedTuple):
    """The outputs of the operator. Rows of a disabled part are empty."""

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
    neighbor_weight: float | Tensor | None = None,
    bank: Bank | None = None,
    context: GroupContext = ALONE,
    kernel: bool = True,
    **options: object,
) -> ContrastiveRows:
    """Row losses: the instance part (`views`) and the class part (`labels`) from one pass.

    Args:
        context: over a process group the rows are those of this rank among the rows of all ranks.
        kernel: False computes with the reference, over a process group only.
        options: the other arguments of the operator by name; ids of any integer type.
    """
    arguments = {"z": z, **temperature_arguments(temperature)}
    arguments |= {name: int64(x) if isinstance(x, Tensor) else x for name, x in options.items()}
    if isinstance(neighbor_weight, Tensor):
        arguments["neighbor_weights"] = neighbor_weight.detach().to(torch.float64)
    elif neighbor_weight is not None:  # (a default number would vary, to a graph of dynamic sizes)
        arguments["neighbor_weight"] = float(neighbor_weight)
    if bank is not None:
        arguments |= {"bank": bank.z.detach(), "bank_ids": int64(bank.ids), "bank_domain": int64(bank.domain)}
    if not context.many:
        return ContrastiveRows(*call("contrastive", context.op, **arguments))
    arguments |= context.options(kernel, f"reduction={context.reduction}")
    return ContrastiveRows(*overload("contrastive_group")(**arguments)[: len(ContrastiveRows._fields)])


def _fake(*args, **kwargs):
    given = Arguments("contrastive", args, kwargs)
    z, n, wide = given.z, given.z.shape[0], wide_dtype(given.z.dtype)
    n_instance, n_class = n if given.views else 0, n if given.labels is not None else 0
    return (
        z.new_empty(n_instance, dtype=wide),
        z.new_empty(n_class, dtype=wide),
        z.new_empty(n, dtype=torch.float64),
        z.new_empty(n_instance, dtype=torch.float64),
        z.new_empty(n_class, dtype=torch.float64),
        z.new_empty((n, given.k), dtype=wide),
        z.new_empty((n, given.k), dtype=torch.int64),
    )


if has_kernel("contrastive", "cpu") or has_kernel("contrastive", "cuda"):
    torch.library.register_fake("ltood_fast::contrastive", _fake)
    fake_gradients("contrastive")
    differentiable("contrastive")
    varying("contrastive")

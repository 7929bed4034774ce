"""torch.ops.ltood_fast.gather_batch: the rows of all ranks on every rank, for the losses of stage 2 where there is no
kernel for blocks of rows and columns (`_guided_group`): the reference, which float64 on CUDA runs too.

Every rank then computes the whole loss; its gradient with respect to the rows of a rank comes back from all ranks in a
reduce-scatter, so that it is the gradient of the sum of what all ranks return.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._ext import has_kernel
from . import _check as check
from ._group import ALONE, GroupContext, RankLayout, operator, resolve
from ._shards import fingerprint


class Batch(NamedTuple):
    """The rows that a loss is called with: those of this process, or those of all ranks."""

    z: Tensor  # [M, D]
    guide: Tensor  # [M, Dg]
    clusters: Tensor | None  # [M]
    instance_ids: Tensor | None  # [M]
    pos_idx: Tensor | None  # [M, k]
    own: Tensor | None = None  # [N], where the rows of this rank are; None: they are all there are
    context: GroupContext = ALONE  # the ranks that the loss still has to go over
    must_match: str = ""  # what they have to agree on

    def local(self, rows: Tensor) -> Tensor:
        """The rows of this rank, of one value a row; a number stays as it is."""
        return rows if self.own is None or rows.dim() == 0 else rows[self.own]


def batch_of(
    context: GroupContext,
    kernel: bool,
    z: Tensor,
    guide: Tensor,
    far: Tensor | None = None,
    clusters: Tensor | None = None,
    instance_ids: Tensor | None = None,
    pos_idx: Tensor | None = None,
    **same: object,
) -> Batch:
    """The rows that the call is about. `kernel`: whether kernels serve it. `same`: arguments that must be the same on
    all ranks."""
    if not context.many:
        return Batch(z, guide, clusters, instance_ids, pos_idx)
    same = {**same, "reduction": context.reduction, "exchange": context.exchange}
    must_match = "\n".join([f"{name}={'a tensor' if isinstance(x, Tensor) else x}" for name, x in same.items()])
    if kernel and has_kernel("guided_partial", z.device.type):
        return Batch(z, guide, clusters, instance_ids, pos_idx, context=context, must_match=must_match)
    keys = [None if x is None else x.to(torch.int64) for x in (clusters, instance_ids, pos_idx)]
    z, guide, keys, own, _ = torch.ops.ltood_fast.gather_batch(
        z, guide, far, *keys, context.op, must_match, context.name
    )
    return Batch(
        z,
        guide,
        None if clusters is None else keys[:, 1],
        keys[:, 0],
        None if pos_idx is None else keys[:, 2:],
        own,
    )


GATHER = (
    "(Tensor z, Tensor guide, Tensor? far, Tensor? clusters, Tensor? instance_ids, Tensor? pos_idx, str op, str must_match, "
    "str group) -> (Tensor z_all, Tensor guide_all, Tensor keys, Tensor own, Tensor sizes)"
)


def agree(z, guide, far, instance_ids, pos_idx, op, must_match, group) -> RankLayout:
    """The ranks, once they agree on what must be the same on all of them."""
    same = {
        "the width of z": z.shape[1],
        "the dtype of z": str(z.dtype),
        "the width of the guide": guide.shape[1],
        "the dtype of the guide": str(guide.dtype),
        "far": None if far is None or far.device.type != "cpu" else fingerprint(far),  # a GPU's is not read
        "instance_ids": "None" if instance_ids is None else "a tensor",
        "the width of pos_idx": None if pos_idx is None else pos_idx.shape[1],
        **dict(line.split("=", 1) for line in must_match.splitlines()),
    }
    layout = RankLayout.of(op, group, z.shape[0], same)
    if pos_idx is None and "k" in same:
        check.count(op, "k", int(same["k"]), 1, layout.total - 1)
    return layout


def ids_of(layout: RankLayout, z: Tensor, instance_ids: Tensor | None) -> Tensor:
    """[N]: by default the rows i and i + n/2 of one rank are views."""
    n = z.shape[0]
    if instance_ids is not None:
        return instance_ids
    return layout.first + torch.arange(n, device=z.device) % max(n // 2, 1)


@operator("gather_batch", GATHER)
def gather_batch(z, guide, far, clusters, instance_ids, pos_idx, op, must_match, group):
    layout = agree(z, guide, far, instance_ids, pos_idx, op, must_match, group)
    own = layout.first + torch.arange(z.shape[0], device=z.device)
    instance_ids = ids_of(layout, z, instance_ids)
    clusters = torch.zeros_like(instance_ids) if clusters is None else clusters
    columns = [instance_ids[:, None], clusters[:, None]] + ([] if pos_idx is None else [pos_idx])
    keys = layout.gather(torch.cat(columns, dim=1))
    check.index_range(op, "pos_idx", keys[:, 2:], -1, layout.total)
    return layout.gather(z), layout.gather(guide), keys, own, torch.tensor(layout.sizes)


@torch.library.register_fake("ltood_fast::gather_batch")
def _(z, guide, far, clusters, instance_ids, pos_idx, op, must_match, group):
    rows = torch.library.get_ctx().new_dynamic_size()
    width = 2 if pos_idx is None else 2 + pos_idx.shape[1]
    return (
        z.new_empty((rows, z.shape[1])),
        guide.new_empty((rows, guide.shape[1])),
        z.new_empty((rows, width), dtype=torch.int64),
        z.new_empty(z.shape[0], dtype=torch.int64),
        torch.empty(resolve(group).size(), dtype=torch.int64, device="cpu"),
    )


SCATTER = "(Tensor gradient, Tensor sizes, SymInt n, str op, str group) -> Tensor"


@operator("scatter_batch", SCATTER)
def scatter_batch(gradient, sizes, n, op, group):
    layout = resolve(group)
    return RankLayout(op, layout, layout.rank(), sizes.tolist()).scatter_sum(gradient)


@torch.library.register_fake("ltood_fast::scatter_batch")
def _(gradient, sizes, n, op, group):
    return gradient.new_empty((n, gradient.shape[1]))


def _setup_context(ctx, inputs, output):
    z, *_, ctx.op, _, ctx.group = inputs
    ctx.n = z.shape[0]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[-1])


def _backward(ctx, gradient, *_):
    nothing = [None] * 8
    if gradient is None:
        return None, *nothing
    (sizes,) = ctx.saved_tensors
    return torch.ops.ltood_fast.scatter_batch(gradient, sizes, ctx.n, ctx.op, ctx.group), *nothing


torch.library.register_autograd("ltood_fast::gather_batch", _backward, setup_context=_setup_context)

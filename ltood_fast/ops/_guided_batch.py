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
from ._schema import Arguments, int64
from ._shards import fingerprint


class Batch(NamedTuple):
    """The rows that a loss is called with: those of this process, or those of all ranks."""

    z: Tensor  # [M, D]
    guide: Tensor  # [M, Dg]
    clusters: Tensor | None = None  # [M]
    instance_ids: Tensor | None = None  # [M]
    pos_idx: Tensor | None = None  # [M, k]
    own: Tensor | None = None  # [N], where the rows of this rank are; None: they are all there are
    context: GroupContext = ALONE  # the ranks that the loss still has to go over
    must_match: str = ""  # what they have to agree on

    @property
    def ranks(self) -> dict[str, object]:
        return {"context": self.context, "must_match": self.must_match}

    def clusters_and(self, far: Tensor) -> dict[str, Tensor | None]:
        return {"clusters": self.clusters, "far": far}

    def local(self, rows: Tensor) -> Tensor:
        """The rows of this rank, of one value a row; a number stays as it is."""
        return rows if self.own is None or rows.dim() == 0 else rows[self.own]


def batch_of(batch: Batch, far: Tensor | None, context: GroupContext, kernel: bool, same: dict[str, object]) -> Batch:
    """The rows that a call is about: those of this process, unless every rank needs the rows of all.

    Args:
        kernel: whether kernels serve the call.
        same: arguments that must be the same on all ranks.
    """
    if not context.many:
        return batch._replace(context=context)
    same = {**same, "reduction": context.reduction, "exchange": context.exchange}
    must_match = "\n".join([f"{name}={'a tensor' if isinstance(x, Tensor) else x}" for name, x in same.items()])
    if kernel and has_kernel("guided_partial", batch.z.device.type):
        return batch._replace(context=context, must_match=must_match)
    z, guide, keys, own, _ = torch.ops.ltood_fast.gather_batch(
        z=batch.z,
        guide=batch.guide,
        far=far,
        clusters=int64(batch.clusters),
        instance_ids=int64(batch.instance_ids),
        pos_idx=int64(batch.pos_idx),
        op=context.op,
        must_match=must_match,
        group=context.name,
    )
    return Batch(
        z=z,
        guide=guide,
        clusters=None if batch.clusters is None else keys[:, 1],
        instance_ids=keys[:, 0],
        pos_idx=None if batch.pos_idx is None else keys[:, 2:],
        own=own,
    )


GATHER = (
    "(Tensor z, Tensor guide, Tensor? far=None, Tensor? clusters=None, Tensor? instance_ids=None, "
    "Tensor? pos_idx=None, *, str op, str must_match, str group) -> "
    "(Tensor z_all, Tensor guide_all, Tensor keys, Tensor own, Tensor sizes)"
)


def agree(call: Arguments) -> RankLayout:
    """The ranks, once they agree on what must be the same on all of them."""
    far, pos_idx = call.far, call.pos_idx
    same = {
        "the width of z": call.z.shape[1],
        "the dtype of z": str(call.z.dtype),
        "the width of the guide": call.guide.shape[1],
        "the dtype of the guide": str(call.guide.dtype),
        "far": None if far is None or far.device.type != "cpu" else fingerprint(far),  # a GPU's is not read
        "instance_ids": "None" if call.instance_ids is None else "a tensor",
        "the width of pos_idx": None if pos_idx is None else pos_idx.shape[1],
        **dict(line.split("=", 1) for line in call.must_match.splitlines()),
    }
    layout = RankLayout.of(call.op, call.group, call.z.shape[0], same)
    if pos_idx is None and "k" in same:
        check.count(call.op, "k", int(same["k"]), 1, layout.total - 1)
    return layout


def ids_of(layout: RankLayout, z: Tensor, instance_ids: Tensor | None) -> Tensor:
    """[N]: by default the rows i and i + n/2 of one rank are views."""
    n = z.shape[0]
    if instance_ids is not None:
        return instance_ids
    return layout.first + torch.arange(n, device=z.device) % max(n // 2, 1)


@operator("gather_batch", GATHER)
def gather_batch(*args, **kwargs):
    call = Arguments("gather_batch", args, kwargs)
    layout = agree(call)
    own = layout.first + torch.arange(call.z.shape[0], device=call.z.device)
    instance_ids = ids_of(layout, call.z, call.instance_ids)
    clusters = torch.zeros_like(instance_ids) if call.clusters is None else call.clusters
    columns = [instance_ids[:, None], clusters[:, None]] + ([] if call.pos_idx is None else [call.pos_idx])
    keys = layout.gather(torch.cat(columns, dim=1))
    check.index_range(call.op, "pos_idx", keys[:, 2:], -1, layout.total)
    return layout.gather(call.z), layout.gather(call.guide), keys, own, torch.tensor(layout.sizes)


@torch.library.register_fake("ltood_fast::gather_batch")
def _(*args, **kwargs):
    call = Arguments("gather_batch", args, kwargs)
    z, guide, pos_idx = call.z, call.guide, call.pos_idx
    rows = torch.library.get_ctx().new_dynamic_size()
    width = 2 if pos_idx is None else 2 + pos_idx.shape[1]
    return (
        z.new_empty((rows, z.shape[1])),
        guide.new_empty((rows, guide.shape[1])),
        z.new_empty((rows, width), dtype=torch.int64),
        z.new_empty(z.shape[0], dtype=torch.int64),
        torch.empty(resolve(call.group).size(), dtype=torch.int64, device="cpu"),
    )


SCATTER = "(Tensor gradient, Tensor sizes, SymInt n, str op, str group) -> Tensor"


@operator("scatter_batch", SCATTER)
def scatter_batch(gradient, sizes, n, op, group):
    layout = resolve(group)
    return RankLayout(op, layout, layout.rank(), sizes.tolist()).scatter_sum(gradient)


@torch.library.register_fake("ltood_fast::scatter_batch")
def _(gradient, sizes, n, op, group):
    return gradient.new_empty((n, gradient.shape[1]))


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    ctx.n, ctx.inputs = inputs[0].shape[0], len(inputs)
    ctx.op, ctx.group = keyword_only_inputs["op"], keyword_only_inputs["group"]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[-1])


def _backward(ctx, gradient, *_):
    others = [None] * (ctx.inputs - 1)
    if gradient is None:
        return None, *others
    (sizes,) = ctx.saved_tensors
    return torch.ops.ltood_fast.scatter_batch(gradient, sizes, ctx.n, ctx.op, ctx.group), *others


torch.library.register_autograd("ltood_fast::gather_batch", _backward, setup_context=_setup_context)

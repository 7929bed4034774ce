"""The losses between two sets of embeddings over a process group: each rank's rows against the keys of all ranks.

The keys of all ranks are gathered, with a gradient: what a rank's losses give the keys of another one is summed there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.two_sets import Direction
from ._group import GroupContext, RankLayout, operator
from ._info_nce_op import Options, info_nce_directions


@operator("gather_rows", "(Tensor x, str op, str must_match, str group) -> (Tensor rows, Tensor first)")
def gather_rows(x: Tensor, op: str, must_match: str, group: str) -> tuple[Tensor, Tensor]:
    """The rows of all ranks, and the number of this rank's row 0 among them. `must_match`: lines `name=value`."""
    agreed = {"the width D of the rows": x.shape[1] if x.dim() > 1 else 1, "the dtype of the rows": str(x.dtype)}
    agreed |= dict(line.split("=", 1) for line in must_match.splitlines())
    layout = RankLayout.of(op, group, x.shape[0], agreed)
    rows = layout.gather(x)
    return rows.clone() if rows is x else rows, torch.tensor(layout.first, device=x.device)


@operator("scatter_rows", "(Tensor rows, int count, str op, str group) -> Tensor")
def scatter_rows(rows: Tensor, count: int, op: str, group: str) -> Tensor:
    """This rank's rows, summed over the ranks: the transpose of `gather_rows`. `count`: how many they are."""
    return RankLayout.of(op, group, count, {}).scatter_sum(rows)


@torch.library.register_fake("ltood_fast::gather_rows")
def _(x, op, must_match, group):
    total = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty(total, *x.shape[1:]), x.new_empty((), dtype=torch.int64)


@torch.library.register_fake("ltood_fast::scatter_rows")
def _(rows, count, op, group):
    return rows.new_empty(count, *rows.shape[1:])


def _gather_context(ctx, inputs, output):
    x, ctx.op, _, ctx.group = inputs
    ctx.count = x.shape[0]
    ctx.mark_non_differentiable(output[1])


def _gather_backward(ctx, gradient, _):
    return torch.ops.ltood_fast.scatter_rows(gradient, ctx.count, ctx.op, ctx.group), None, None, None


torch.library.register_autograd("ltood_fast::gather_rows", _gather_backward, setup_context=_gather_context)


def gathered_directions(
    context: GroupContext,
    kernel: bool,
    query: Tensor,
    keys: tuple[Tensor, Tensor | None],
    options: Options,
    *,
    target: Tensor | None,
    ids: tuple[Tensor | None, Tensor | None],
    symmetric: bool,
) -> list[Direction]:
    """As `info_nce_directions`, over the keys of all ranks. A queue is the same on all of them: nothing is gathered."""
    if keys[1] is not None:
        return [*info_nce_directions(context.op, kernel, query, keys, options, target=target, ids=ids)]

    def one_direction(rows: Tensor, columns: Tensor, own: Tensor | None, ids: tuple) -> Direction:
        every, first = _gather(columns, context, options, symmetric)
        if ids[0] is not None:
            ids = ids[0], _gather(ids[1], context, options, symmetric)[0]
        own = torch.arange(len(rows), device=rows.device) if own is None else own
        return info_nce_directions(context.op, kernel, rows, (every, None), options, target=own + first, ids=ids)[0]

    sides = [one_direction(query, keys[0], target, ids)]
    return sides + [one_direction(keys[0], query, None, ids[::-1])] * symmetric


def _gather(x: Tensor, context: GroupContext, options: Options, symmetric: bool) -> tuple[Tensor, Tensor]:
    named = {
        "temperature": options.temperature,
        "label_smoothing": options.label_smoothing,
        "denominator.decoupled": options.decoupled,
        "normalize": options.normalize,
        "symmetric": symmetric,
        "reduction": context.reduction,
    }
    return gather_with(x, context, named)


def gather_with(x: Tensor, context: GroupContext, named: dict[str, object]) -> tuple[Tensor, Tensor]:
    """(The rows of all ranks, the number of this rank's row 0), where all ranks agree on the named values. A number on
    a GPU is not read: it is not compared."""

    def value(given: object) -> object:
        if not isinstance(given, Tensor):
            return given
        return given.item() if given.device.type == "cpu" and not torch.compiler.is_compiling() else None

    must_match = "\n".join(f"{name}={value(given)}" for name, given in named.items())
    return torch.ops.ltood_fast.gather_rows(x, context.op, must_match, context.name)

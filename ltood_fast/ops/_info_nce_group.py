"""The losses between two sets of embeddings over a process group: each rank's rows against the keys of all ranks.

The keys of all ranks are gathered, with a gradient: what a rank's losses give the keys of another one is summed there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..reference.two_sets import Direction
from ._group import GroupContext, RankLayout, operator
from ._info_nce_op import Options, Pairs, info_nce_directions

if TYPE_CHECKING:
    from ..reference.options import Exclude


@operator("gather_rows", "(Tensor x, str op, str must_match, str group) -> (Tensor rows, Tensor first)")
def gather_rows(x: Tensor, op: str, must_match: str, group: str) -> tuple[Tensor, Tensor]:
    """The rows of all ranks, and the number of this rank's row 0 among them. `must_match`: lines `name=value`."""
    agreed = {"the width D of the rows": x.shape[1] if x.dim() > 1 else 1, "the dtype of the rows": str(x.dtype)}
    agreed |= dict(line.split("=", 1) for line in must_match.splitlines())
    layout = RankLayout.of(op, group, x.shape[0], agreed)
    return layout.gather(x), torch.tensor(layout.first, device=x.device)


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
    pairs: Pairs,
    named: dict[str, object],
) -> list[Direction]:
    """As `info_nce_directions`, over the keys of all ranks, which agree on the named values. A queue is the same on all
    of them: nothing is gathered."""
    op, exclude = context.op, pairs.exclude
    if context.many:
        given = {"negative_keys": keys[1], "exclude": exclude}
        named = named | {name: "None" if x is None else "given" for name, x in given.items()}
    if context.many and keys[1] is not None:
        gather_with(query[:0], context, named)  # no rows: the ranks compare the values
    if not context.many or keys[1] is not None:
        return info_nce_directions(op, kernel, query, keys, options, pairs)

    def one_direction(rows: Tensor, columns: Tensor, own: Tensor | None, exclude: Exclude | None) -> Direction:
        every, first = gather_with(columns, context, named)
        if exclude is not None:
            exclude = replace(exclude, key_ids=gather_with(exclude.key_ids, context, named)[0])
        own = torch.arange(len(rows), device=rows.device) if own is None else own
        return info_nce_directions(op, kernel, rows, (every, None), options, Pairs(own + first, exclude))[0]

    sides = [one_direction(query, keys[0], pairs.target, exclude)]
    turned = exclude and replace(exclude, query_ids=exclude.key_ids, key_ids=exclude.query_ids)
    return sides + ([one_direction(keys[0], query, None, turned)] if pairs.symmetric else [])


def gather_with(x: Tensor, context: GroupContext, named: dict[str, object]) -> tuple[Tensor, Tensor]:
    """(The rows of all ranks, the number of this rank's row 0), where all ranks agree on the named values. A number on
    a GPU is not read: it is not compared."""

    def value(given: object) -> object:
        if not isinstance(given, Tensor):
            return given
        return given.item() if given.device.type == "cpu" and not torch.compiler.is_compiling() else None

    must_match = "\n".join(f"{name}={value(given)}" for name, given in named.items())
    return torch.ops.ltood_fast.gather_rows(x, context.op, must_match, context.name)

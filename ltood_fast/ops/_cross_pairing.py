"""psd_loss with pairing="cross": from the row losses without neighbours, as no log-sum-exp depends on who is attracted.

With a_i the mean similarity to the other views, M the neighbours of the other view and S_i the sum of the similarities
to them, l_i = lse_i - (|V| a_i + lam_i S_i) / (|V| + lam_i |M|) is

    l_i(lam = 0) + lam_i (|M| a_i - S_i) / (|V| + lam_i |M|)    with a_i = lse_i - l_i(lam = 0).

One gathered row a neighbour: O(N D) at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference._common import full_precision, unit_rows
from ..reference.options import Bank
from . import _check as check
from ._contrastive_op import ContrastiveRows, contrastive
from ._group import GroupContext

PAIRINGS = ("same", "cross")


def next_view(n: int, instance_ids: Tensor | None, device: torch.device) -> Tensor:
    """int64 [N]: the next row of the same instance in order, after the last the first; a row without one itself."""
    rows = torch.arange(n, device=device)
    if instance_ids is None:
        return (rows + n // 2) % n
    ids, order = instance_ids.sort(stable=True)
    first = torch.searchsorted(ids, ids)
    last = ids != ids.roll(-1)
    last = last | (rows == n - 1)
    return torch.empty_like(order).scatter(0, order, order[torch.where(last, first, (rows + 1) % n)])


def cross_rows(
    rows: ContrastiveRows,  # of lam = 0
    z: Tensor,
    temperature: float | Tensor,
    *,
    neighbor_weight: float | Tensor,
    bank: Bank | None,
    instance_ids: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """(losses [N], which rows have a positive): a row without another view has none, as nothing is its pair."""
    with full_precision(z):
        u = unit_rows(z, normalize)
        targets = u.detach() if bank is None else unit_rows(bank.z.detach(), normalize).to(u.dtype)
        other = next_view(len(z), instance_ids, z.device)
        columns = rows.indices.masked_fill((other == torch.arange(len(z), device=z.device))[:, None], -1)[other]
        found = columns >= 0
        views, count = rows.instance_weight.to(u.dtype), found.sum(dim=1)
        lam = neighbor_weight.detach().to(u.dtype) if isinstance(neighbor_weight, Tensor) else neighbor_weight
        near = torch.zeros_like(views)
        for column, is_found in zip(columns.clamp(min=0).unbind(1), found.unbind(1), strict=True):
            near = near + ((u * targets[column]).sum(dim=1) / temperature).where(is_found, 0)
        base = rows.instance_loss
        pulled = (count > 0) & (views > 0)
        own = (rows.lse.to(u.dtype) - base).where(pulled, 0)
        losses = base + lam * (count * own - near).where(pulled, 0) / (views + lam * count).where(pulled, 1)
        if bank is None:  # at least 0 but for rounding, as every similarity is part of the log-sum-exp
            losses = losses - losses.detach().clamp(max=0)
        return losses, views > 0


def check_pairing(op: str, pairing: str, context: GroupContext) -> None:
    check.choice(op, "pairing", pairing, PAIRINGS)
    allowed = "same over a process group, where a neighbour's row may lie on another rank"
    check.require(pairing == "same" or not context.many, op, "pairing", allowed, repr(pairing))


def instance_rows(
    z: Tensor, temperature: float | Tensor, pairing: str, context: GroupContext, kernel: bool, **options: Any
) -> tuple[ContrastiveRows, tuple[Tensor, Tensor]]:
    """The operator's rows, and (losses, which rows have a positive) of the instance part."""
    if pairing == "same":
        rows = contrastive(z, temperature, context=context, kernel=kernel, **options)
        return rows, rows.instance
    rows = contrastive(z, temperature, context=context, kernel=kernel, **{**options, "neighbor_weight": 0.0})
    names = ("neighbor_weight", "bank", "instance_ids", "normalize")
    return rows, cross_rows(rows, z, temperature, **{name: options[name] for name in names})

"""Rows that stay on the ranks of a process group: how a function of all of them goes over them.

The rows of all ranks count as one matrix, concatenated in rank order. A rank may hold none.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ._group import GroupContext, RankLayout


def agree(op: str, group: object, check: Callable[[], tuple[int, dict[str, object]]]) -> RankLayout:
    """Who holds how many rows. `check` gives this rank's number and what must be the same on all ranks; the error that
    it raises on one is raised on all, so that none waits alone."""
    with GroupContext(op, group) as context:
        count, must_match = check()
    return RankLayout.of(op, context.name, count, must_match)


def shards_of(op: str, group: object, x: Tensor, check: Callable[[], dict[str, object]] = dict) -> RankLayout:
    """The same of the rows of x, whose width and dtype must be the same too."""

    def header() -> tuple[int, dict[str, object]]:
        same = check()
        return len(x), {"shape": list(x.shape[1:]), "dtype": str(x.dtype), **same}

    return agree(op, group, header)


def fingerprint(x: Tensor) -> str:
    """Dtype, shape and bits of a small tensor, to compare it between ranks."""
    content = x.detach().resolve_neg().cpu().contiguous().view(torch.uint8).numpy() if x.numel() else b""
    return f"{x.dtype} {tuple(x.shape)} {zlib.crc32(content):08x}"


def passing(layout: RankLayout, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(number of its first row, rows) of every rank that holds any, in rank order; two shards are in memory at a time,
    the second on its way while the first is worked on."""
    ranks = [rank for rank, count in enumerate(layout.sizes) if count]

    def send(rank: int) -> tuple[Tensor, dist.Work]:
        rows = x.contiguous() if rank == layout.rank else x.new_empty(layout.sizes[rank], *x.shape[1:])
        return rows, dist.broadcast(rows, group=layout.group, group_src=rank, async_op=True)

    coming = send(ranks[0])
    for place, rank in enumerate(ranks):
        rows, work = coming
        work.wait()
        if place + 1 < len(ranks):
            coming = send(ranks[place + 1])
        yield layout.offset(rank), rows


def fetch(layout: RankLayout, x: Tensor, rows: Tensor) -> Tensor:
    """Rows on every rank, by their numbers in the concatenation."""
    local = rows - layout.first
    mine = (local >= 0) & (local < len(x))
    fetched = x.new_zeros(len(rows), *x.shape[1:])
    fetched[mine] = x[local[mine]]
    return add(fetched, layout.group)


def add(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the ranks, in place; the same bits on every rank."""
    dist.all_reduce(x, group=group)
    return x

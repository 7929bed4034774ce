"""Rows that stay on the ranks of a process group: who holds how many, and how a function of all of them goes over them.

The rows of all ranks count as one matrix, concatenated in rank order. A rank may hold none.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def agree(op: str, group: dist.ProcessGroup, check: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """What `check` returns on every rank. A TypeError or ValueError of one is raised on all, so that none waits alone.

    Keys whose name does not begin with "_" are arguments that must be the same on every rank.
    """
    try:
        mine = None, check()
    except (TypeError, ValueError) as error:
        mine = type(error), str(error)
    reports: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(reports, mine, group=group)
    for rank, (kind, found) in enumerate(reports):
        if kind is not None:
            raise kind(f"{found}, on rank {rank}")
    found = [report for _, report in reports]
    for name in found[0]:
        values = [report[name] for report in found]
        if not name.startswith("_") and any(value != values[0] for value in values):
            raise ValueError(f"{op}: {name} must be the same on every rank, got {', '.join(map(str, values))}")
    return found


def fingerprint(x: Tensor) -> str:
    """Dtype, shape and bits of a small tensor, to compare it between ranks."""
    content = x.detach().cpu().contiguous().view(torch.uint8).numpy() if x.numel() else b""
    return f"{x.dtype} {tuple(x.shape)} {zlib.crc32(content):08x}"


@dataclass(frozen=True)
class Shards:
    """Where the rows of every rank lie in their concatenation."""

    group: dist.ProcessGroup
    counts: tuple[int, ...]

    @classmethod
    def agree(cls, op: str, group: dist.ProcessGroup, rows: Tensor, check: Callable[[], dict[str, Any]]) -> Shards:
        """Of `rows` on every rank, checked as in `agree`; their width and dtype must be the same too."""

        def header() -> dict[str, Any]:
            same = check()
            return {"width": rows.shape[1], "dtype": rows.dtype, "_count": len(rows), **same}

        return cls(group, tuple(found["_count"] for found in agree(op, group, header)))

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def total(self) -> int:
        return sum(self.counts)

    def first(self, rank: int) -> int:
        """The number of a rank's row 0."""
        return sum(self.counts[:rank])

    def passing(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(rank, its rows) of every rank that holds any, in rank order; two shards are in memory at a time, the second
        on its way while the first is worked on."""
        ranks = [rank for rank, count in enumerate(self.counts) if count]

        def send(rank: int) -> tuple[Tensor, dist.Work]:
            rows = x.contiguous() if rank == self.rank else x.new_empty(self.counts[rank], *x.shape[1:])
            return rows, dist.broadcast(rows, group=self.group, group_src=rank, async_op=True)

        coming = send(ranks[0])
        for place, rank in enumerate(ranks):
            rows, work = coming
            work.wait()
            if place + 1 < len(ranks):
                coming = send(ranks[place + 1])
            yield rank, rows

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' rows on every rank."""
        return torch.cat([rows for _, rows in self.passing(x)])

    def own(self, x: Tensor) -> Tensor:
        """This rank's part of what is one row a row of the concatenation."""
        return x.split(self.counts)[self.rank]

    def fetch(self, x: Tensor, rows: Tensor) -> Tensor:
        """x[rows] on every rank, by numbers in the concatenation."""
        local = rows - self.first(self.rank)
        mine = (local >= 0) & (local < len(x))
        fetched = x.new_zeros(len(rows), *x.shape[1:])
        fetched[mine] = x[local[mine]]
        return add(fetched, self.group)


def add(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the ranks, in place; the same bits on every rank."""
    dist.all_reduce(x, group=group)
    return x

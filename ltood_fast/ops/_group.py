"""One batch on several ranks: the exchange of rows, and one error on every rank where the ranks do not agree.

The batch of a process group is the concatenation of its ranks' rows in the order of the ranks; n rows here, M in all, W
ranks, largest batch n_max. Whole rows are sent as bytes, so that every dtype travels on every backend.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..reference._common import reduce_rows, transformed
from . import _check as check

EXCHANGES = ("gather", "ring")


class GroupContext:
    """The process group of one call, and the `with` statement around the checks of its arguments: an error of one rank
    is raised by all. (While torch.compile traces, a rank that refuses is alone: the others see its absence as the
    time-out of the group.)"""

    def __init__(
        self,
        op: str,
        group: object,
        reduction: str = "mean",
        exchange: str = "gather",
        exchanges: tuple[str, ...] = EXCHANGES,
    ):
        check.choice(op, "exchange", exchange, exchanges)
        self.op, self.reduction, self.exchange = op, reduction, exchange
        self.many = group is not None  # also for a group of one rank
        if self.many and transformed():
            raise RuntimeError(
                f"{op}: a process group has no forward-mode derivatives and does not run inside transforms of "
                "torch.func (jvp, grad, hessian, vmap, ...); use group=None"
            )
        self.name = group_name(op, group) if self.many else ""

    def __enter__(self) -> GroupContext:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.many and isinstance(error, (ValueError, TypeError, RuntimeError)):
            RankLayout.of(self.op, self.name, 0, {}, refusal=f"{type(error).__name__}: {error}")

    def options(self, kernel: bool, must_match: str) -> dict[str, object]:
        """The arguments that an operator's variant over a process group takes in addition."""
        values = {"op": self.op, "exchange": self.exchange, "group": self.name}
        return {"use_kernel": kernel, "must_match": must_match, **values}


ALONE = GroupContext("", None)


def group_name(op: str, group: object) -> str:
    """The name by which operators know a process group."""
    available = dist.is_available()
    right = available and isinstance(group, dist.ProcessGroup)
    check.require_type(right, op, "group", "a torch.distributed.ProcessGroup or None", type(group).__name__)
    if not dist.is_initialized():
        raise RuntimeError(f"{op}: group needs torch.distributed, call torch.distributed.init_process_group() first")
    return group.group_name


class RankLayout(NamedTuple):
    """A rank's knowledge of the others after they agreed."""

    op: str
    group: dist.ProcessGroup
    rank: int
    sizes: list[int]

    @staticmethod
    def of(op: str, name: str, n: int, must_match: dict[str, object], refusal: str = "") -> RankLayout:
        """Exchanges the sizes and a digest of `must_match`, 16 bytes a rank, which must be the same on all ranks.

        It goes over the group's CPU backend where there is one: no device is waited for.
        """
        group = resolve(name)
        text = refusal or json.dumps({"call": op, **must_match})
        digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
        header = torch.tensor([[-1 if refusal else n, digest]], device=_header_device(group))
        headers = gather_even(op, group, header).tolist()
        sizes = [size for size, _ in headers]
        if min(sizes) < 0 or len({digest for _, digest in headers}) > 1:
            length = 4096
            encoded = text.encode()[:length].ljust(length, b"\0")
            row = torch.frombuffer(bytearray(encoded), dtype=torch.uint8).to(header.device)
            texts = gather_even(op, group, row[None]).cpu()
            texts = [bytes(text.tolist()).rstrip(b"\0").decode(errors="replace") for text in texts]
            raise _disagreement([size < 0 for size in sizes], texts)
        return RankLayout(op, group, dist.get_rank(group), sizes)

    @property
    def first(self) -> int:
        """The number of this rank's row 0 in the batch."""
        return self.offset(self.rank)

    def offset(self, rank: int) -> int:
        return sum(self.sizes[:rank])

    @property
    def total(self) -> int:
        return sum(self.sizes)

    def gather(self, x: Tensor) -> Tensor:
        """[n, ...] here -> [M, ...]; no gradient. Shorter batches travel padded to the longest, then are cut."""
        longest = max(self.sizes)
        if longest == min(self.sizes):
            return gather_even(self.op, self.group, x)
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: x.shape[0]] = x
        rows = gather_even(self.op, self.group, padded).split(longest)
        return torch.cat([part[:size] for part, size in zip(rows, self.sizes, strict=True)])

    def scatter_sum(self, x: Tensor) -> Tensor:
        """[M, ...] on each rank -> [n, ...]: the sum over the ranks of this rank's rows, in the order of the ranks."""
        n = self.sizes[self.rank]
        width = x[0].numel() * x.element_size()
        received = x.new_empty(n * len(self.sizes), *x.shape[1:])
        with _named(self.op):
            dist.all_to_all_single(
                _bytes(received),
                _bytes(x.contiguous()),
                [n * width] * len(self.sizes),
                [size * width for size in self.sizes],
                group=self.group,
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        total = received[:n].to(wide)
        for part in received.split(n)[1:]:
            total += part
        return total.to(x.dtype)

    def shards(self, x: Tensor, exchange: str) -> Iterator[tuple[int, Tensor]]:
        """(number of its first row, rows) of the shards: all rows at once, or ("ring") one rank's at a time, the
        own ones first, while the next ones are on their way."""
        if exchange == "gather":
            yield 0, self.gather(x)
            return
        ranks, shard = len(self.sizes), x.contiguous()
        buffers = [x.new_empty(max(self.sizes), *x.shape[1:]) for _ in range(min(2, ranks - 1))]
        for step in range(ranks):
            source = (self.rank - step) % ranks
            coming, works = shard, []
            if step + 1 < ranks:
                coming = buffers[step % 2][: self.sizes[source - 1]]
                with _named(self.op):
                    works = self._shift(shard, coming)
            yield self.offset(source), shard
            with _named(self.op):
                for work in works:
                    work.wait()
            shard = coming

    def _shift(self, outgoing: Tensor, coming: Tensor) -> list[dist.Work]:
        ranks = len(self.sizes)
        send = dist.P2POp(dist.isend, _bytes(outgoing), group=self.group, group_peer=(self.rank + 1) % ranks)
        receive = dist.P2POp(dist.irecv, _bytes(coming), group=self.group, group_peer=(self.rank - 1) % ranks)
        return dist.batch_isend_irecv([send, receive])


def resolve(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)


def gather_even(op: str, group: dist.ProcessGroup, x: Tensor) -> Tensor:
    """[n, ...] -> [W * n, ...] in the order of the ranks, n the same on all."""
    out = x.new_empty(x.shape[0] * dist.get_world_size(group), *x.shape[1:])
    if x.numel():
        # Newer releases of torch call it all_gather_single and warn of the other name.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        with _named(op):
            all_gather(_bytes(out), _bytes(x.detach().contiguous()), group=group)
    return out


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


def _header_device(group: dist.ProcessGroup) -> torch.device:
    if torch.device("cpu") in group._device_types:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def _named(op: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        cause = str(error).splitlines()[0]
        raise RuntimeError(f"{op}: a rank of the group failed or did not answer in time ({cause})") from error


def _disagreement(refused: list[bool], texts: list[str]) -> Exception:
    """The one sentence that every rank raises, of the first rank that refused, or of the first that differs."""
    if any(refused):
        rank = refused.index(True)
        kind, _, sentence = texts[rank].partition(": ")
        kinds = {"TypeError": TypeError, "RuntimeError": RuntimeError}
        return kinds.get(kind, ValueError)(f"{sentence}, on rank {rank}")
    calls = [json.loads(text) for text in texts]
    rank = next(rank for rank, call in enumerate(calls) if call != calls[0])
    name = next(name for name in {**calls[0], **calls[rank]} if calls[0].get(name) != calls[rank].get(name))
    return ValueError(
        f"{calls[0]['call']}: {name} must be the same on all ranks of the group, got {calls[0].get(name)} on rank 0 "
        f"and {calls[rank].get(name)} on rank {rank}"
    )


def operator(name: str, schema: str) -> Callable[[Callable], Callable]:
    """Makes a function that exchanges rows ``torch.ops.ltood_fast.<name>``, opaque to torch.compile: other ranks' sizes
    and errors are read on the host, which a CUDA graph cannot capture. (`torch.library.custom_op` would import
    torch._dynamo, which takes seconds, at the first call.)
    """

    def register(function: Callable) -> Callable:
        torch.library.define(f"ltood_fast::{name}", schema)
        torch.library.impl(f"ltood_fast::{name}", "default", function)
        return function

    return register


@operator("sum_over_ranks", "(Tensor x, str op, str same, str group) -> Tensor")
def sum_over_ranks(x: Tensor, op: str, same: str, group: str) -> Tensor:
    """`same`: what the ranks have to agree on first, "" where they have done so."""
    if same:
        RankLayout.of(op, group, 1, {"arguments": same})
    return gather_even(op, resolve(group), x[None]).sum(dim=0)


@torch.library.register_fake("ltood_fast::sum_over_ranks")
def _(x, op, same, group):
    return torch.empty_like(x)


def _sum_backward(ctx, gradient):
    return torch.ops.ltood_fast.sum_over_ranks(gradient, ctx.op, "", ctx.group), None, None, None


def _sum_context(ctx, inputs, output):
    _, ctx.op, _, ctx.group = inputs


torch.library.register_autograd("ltood_fast::sum_over_ranks", _sum_backward, setup_context=_sum_context)


def all_of(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(losses, which of them count) for `reduce_parts`: all of them."""
    return rows, torch.ones_like(rows, dtype=torch.bool)


def reduce_parts(
    parts: list[tuple[Tensor, Tensor]], reduction: str, context: GroupContext, same: str = ""
) -> list[Tensor]:
    """`reduce_rows` of each (rows, counted) over all ranks: 16 bytes a part and rank, summed in one order. `same`:
    what the ranks have to agree on, where nothing before made them."""
    if context.many and (same or reduction != "none"):
        sums = [rows.sum(dtype=torch.float64) for rows, _ in parts]
        counts = [counted.sum(dtype=torch.float64) for _, counted in parts]
        totals = torch.ops.ltood_fast.sum_over_ranks(torch.stack(sums + counts), context.op, same, context.name)
    if not context.many or reduction == "none":
        return [reduce_rows(*part, reduction) for part in parts]
    losses, counts = totals.split(len(parts))
    if reduction == "mean":
        losses = losses / counts.detach().where(counts > 0, 1)
    return [loss.to(rows.dtype) for loss, (rows, _) in zip(losses, parts, strict=True)]

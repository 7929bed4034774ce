"""torch.ops.ltood_fast.contrastive_group: the contrastive losses of this rank's rows against the rows of all ranks.

    s_ij = <u_i, u_j> / tau over the batch of the group, lse_i = log sum_{j != i} exp(s_ij), i a row of this rank
    g_i  = (1/tau) [ sum_j (w_i exp(s_ij - lse_i) + w_j exp(s_ij - lse_j)) u_j                     (lse_bwd)
                     - sum_{j in V(i)} (p_i + p_j) u_j - sum_{m in M(i)} q_i u_m - sum_{j: i in M(j)} q_j u_j ]

is the gradient at u_i of what all ranks' losses send back: w to the log-sum-exp, p and q to the mean of the positives
(views or class, neighbours). G is symmetric, so with the w, lse, p and q of all rows (a few doubles a row) every rank
has the gradient of its own rows whole: no N×D reduce-scatter. Both passes read the other ranks' rows from shards that
pass by: all rows in one (gather; kept for the backward), or one rank's at a time (ring; sent again by the backward).

Sole positives (one other row of the instance or class) leave the passes and are added in float64, so that a small loss
keeps its digits; all positives leave them where the loss is decoupled. CUDA kernels leave nothing out yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import contrastive as reference
from ..reference._common import SMALLEST_INVERTIBLE_NORM
from ._contrastive_op import _fake as fake_of_one
from ._contrastive_partial import contrastive_partial, contrastive_partial_bwd
from ._group import RankLayout, operator, resolve
from ._schema import RANK_NAMES, Arguments, differentiable, fake_gradients, group_schemas, wide_dtype

PARTS = ("instance", "class")
NORM_EPS = 1e-12
CHUNK = 256  # rows that are widened to float64 at a time: a small part of the memory
FORWARD, BACKWARD = group_schemas("contrastive", "Tensor gathered, Tensor sizes")


class Inputs(Arguments):
    """The arguments of the operator, or of its backward."""

    @property
    def lam(self) -> float | Tensor:
        return self.neighbor_weight if self.neighbor_weights is None else self.neighbor_weights

    @property
    def k_batch(self) -> int:
        """Neighbours that are searched for in the batch."""
        return self.k if self.bank is None else 0

    @property
    def part(self) -> str:
        """The part of the loss whose positives the passes may leave out."""
        return PARTS[0] if self.views else PARTS[1]

    @property
    def similarity(self) -> Similarity:
        tensor = self.temperature_tensor
        return Similarity(self.temperature if tensor is None else tensor.detach(), self.normalize, self.use_kernel)


class Similarity(NamedTuple):
    """s = <u(x), u(y)> / tau of blocks of rows and columns, by the kernels or by the reference."""

    temperature: float | Tensor
    normalize: bool
    kernel: bool

    @property
    def tau(self) -> float | Tensor:
        tau = self.temperature
        return tau.double() if isinstance(tau, Tensor) else tau

    def unit(self, x: Tensor) -> Tensor:
        """float64 rows."""
        x = x.double()
        return x / x.norm(dim=1, keepdim=True).clamp(min=NORM_EPS) if self.normalize else x

    def partial(self, x: Tensor, y: Tensor, **options: object) -> tuple[Tensor, Tensor, Tensor]:
        function = contrastive_partial if self.kernel else reference.contrastive_partial
        return function(x, y, self.temperature, normalize=self.normalize, **options)

    def lse_bwd(self, x: Tensor, y: Tensor, **options: object) -> Tensor:
        function = contrastive_partial_bwd if self.kernel else reference.contrastive_partial_bwd
        return function(x, y, self.temperature, normalize=self.normalize, **options)

    def gradient(self, x: Tensor, at_unit: Tensor) -> Tensor:
        """From the gradient at u(x) to the one at x: through the norm, which is constant below its eps."""
        if not self.normalize:
            return at_unit
        norm, u = x.double().norm(dim=1, keepdim=True), self.unit(x)
        u_dot_du = (at_unit * u).sum(dim=1, keepdim=True).where(norm >= NORM_EPS, 0)
        gradient = (at_unit - u_dot_du * u) / norm.clamp(min=NORM_EPS)
        # float16 cannot hold 1 / norm of a dead row
        return gradient.where(norm >= SMALLEST_INVERTIBLE_NORM, 0) if x.dtype == torch.float16 else gradient


def occurrences(values: Tensor, wanted: Tensor) -> Tensor:
    """How often each of the wanted is among the values: what `bincount` would wait for a GPU to tell."""
    ranked = values.sort().values
    return torch.searchsorted(ranked, wanted, right=True) - torch.searchsorted(ranked, wanted)


class Segments:
    """Rows of this rank that share a key (an instance, a class) with rows of any rank."""

    def __init__(self, own: Tensor, every: Tensor):
        self.sorted = own.sort().values
        self.every = every
        self.slot = torch.searchsorted(self.sorted, own)  # [n]: equal keys, equal slot
        self.others = occurrences(every, own) - 1  # [n]

    def slots(self, columns: slice) -> Tensor:
        """The slots of rows of the batch, -1 for a key that this rank does not have."""
        keys = self.every[columns]
        slot = torch.searchsorted(self.sorted, keys).clamp(max=len(self.sorted) - 1)
        return slot.where(self.sorted[slot] == keys, -1)


class Excluded:
    """The positives that the passes leave out: ids of the rows of all ranks, -1 = none, and the rows of this rank that
    have a sole positive."""

    def __init__(self, inputs: Inputs, keys: Tensor, own: slice):
        self.own, order = own, keys.argsort(stable=True)
        ranked = keys[order]
        first = torch.searchsorted(ranked, keys)  # one number for each key
        pair = occurrences(keys, keys) == 2
        self.ids = first if inputs.decoupled else first.where(pair, -1)
        self.sole = pair[own] & (not inputs.decoupled)  # [n]
        rows, first = torch.arange(len(keys), device=keys.device)[own], first[own]
        two = [order[(first + member).clamp(max=len(order) - 1)] for member in (0, 1)]
        self.partner = two[0] + two[1] - rows  # [n], where it is sole: a row of the batch

    @staticmethod
    def of(inputs: Inputs, columns: Columns) -> Excluded | None:
        if inputs.use_kernel and inputs.z.device.type == "cuda":
            return None
        return Excluded(inputs, columns.keys[inputs.part], columns.own)

    def of_shard(self, columns: slice) -> tuple[Tensor, Tensor]:
        return self.ids[self.own].contiguous(), self.ids[columns].contiguous()


def add_rows(out: Tensor, index: Tensor, similarity: Similarity, x: Tensor, weight: Tensor | None = None) -> None:
    """out[index_j] += weight_j u(x_j) where index_j >= 0, in float64, in the order of j: the same bits every time."""
    cpu = x.device.type == "cpu"
    chosen = (index >= 0).nonzero()[:, 0] if cpu else torch.arange(len(x), device=x.device)
    for part in chosen.split(CHUNK):
        rows = similarity.unit(x[part])
        if weight is not None:
            rows *= weight[part, None]
        if cpu:
            out.index_add_(0, index[part], rows)
        else:  # index_add_ of CUDA adds in no order, index_put_ sorts; unwanted rows add zeros to row 0
            wanted = index[part] >= 0
            out.index_put_((index[part].clamp(min=0),), rows.where(wanted[:, None], 0), accumulate=True)


def add_chosen(out: Tensor, choice: Tensor, similarity: Similarity, y: Tensor, weight: Tensor) -> None:
    """out[i] += weight_i u(y[choice_i]) where choice_i is a row of y."""
    rows = torch.arange(len(out), device=out.device)
    inside = (choice >= 0) & (choice < len(y))
    add_rows(out, rows.where(inside, -1), similarity, y[choice.where(inside, 0)], weight)


class Columns:
    """A pass's view of the rows of all ranks: the keys they are grouped by, neighbours, columns of doubles."""

    def __init__(
        self, inputs: Inputs, layout: RankLayout, choices: tuple[Tensor, ...] = (), doubles: tuple[Tensor, ...] = ()
    ):
        self.own = slice(layout.first, layout.first + layout.sizes[layout.rank])
        domain = inputs.domain if inputs.k_batch else None
        keys = {"instance": inputs.instance_ids, "class": inputs.labels, "domain": domain}
        named = {name: key for name, key in keys.items() if key is not None}
        own = [*named.values(), *choices, *(x.view(torch.int64) for x in doubles)]
        every = [x.contiguous() for x in layout.gather(torch.stack(own, dim=1)).unbind(dim=1)] if own else []
        self.keys = dict(zip(named, every, strict=False))
        self.choices = every[len(named) : len(named) + len(choices)]
        self.doubles = [x.view(torch.float64) for x in every[len(named) + len(choices) :]]
        if inputs.views and inputs.instance_ids is None:  # rows i and i + n/2 of one rank
            pairs = [torch.arange(n, device=inputs.z.device) % (n // 2) for n in layout.sizes]
            self.keys["instance"] = torch.cat([pair + layout.offset(rank) for rank, pair in enumerate(pairs)])

    def segments(self, inputs: Inputs) -> dict[str, Segments]:
        names = (["instance"] if inputs.views else []) + (["class"] if inputs.labels is not None else [])
        return {name: Segments(self.keys[name][self.own], self.keys[name]) for name in names}

    def admissible(self, columns: slice) -> dict[str, tuple[Tensor, Tensor]]:
        """Instances and domains of the own rows and of a shard's columns, for the search of neighbours."""
        keys = {f"{name}s": self.keys[name] for name in ("instance", "domain") if name in self.keys}
        return {name: (key[self.own].contiguous(), key[columns].contiguous()) for name, key in keys.items()}


def _agree(inputs: Inputs) -> RankLayout:
    """Compares what must be the same on all ranks. A temperature on a GPU is not read: its value is not compared."""
    op, tensor = inputs.op, inputs.temperature_tensor
    value = inputs.temperature if tensor is None else tensor.item() if tensor.device.type == "cpu" else None
    optional = ("instance_ids", "labels", "domain", "bank")
    must_match = {
        "the width D of z": inputs.z.shape[1],
        "the dtype of z": str(inputs.z.dtype),
        "temperature": value,
        "normalize": inputs.normalize,
        "exchange": inputs.exchange,
        "k": inputs.k,
        "decoupled": inputs.decoupled,
        **dict(line.split("=", 1) for line in inputs.must_match.splitlines()),
        **{name: "None" if getattr(inputs, name) is None else "a tensor" for name in optional},
    }
    layout = RankLayout.of(op, inputs.group, inputs.z.shape[0], must_match)
    if inputs.k_batch > layout.total - 1:
        raise ValueError(
            f"{op}: k must be in [1, {layout.total - 1}], {layout.total} rows on all ranks, got {inputs.k}"
        )
    return layout


def combine_best(best: tuple[Tensor, ...], more: tuple[Tensor, ...], k: int) -> tuple[Tensor, ...]:
    """The k best of two lists of (cosines, columns, whatever goes with them), ties to the lower column of the batch."""
    cosines, columns, *others = (torch.cat(pair, dim=1) for pair in zip(best, more, strict=True))
    columns, by_column = columns.sort(dim=1)
    cosines, order = cosines.gather(1, by_column).sort(dim=1, descending=True, stable=True)
    ranked = [columns.gather(1, order), *(x.gather(1, by_column).gather(1, order) for x in others)]
    return cosines[:, :k], *(x[:, :k] for x in ranked)


def _search_bank(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The k nearest rows of the bank, which is on this rank: nothing is exchanged."""
    z, bank, keys = inputs.z, inputs.bank, {}
    if bank.dtype != z.dtype:
        z, bank = z.to(wide_dtype(z.dtype)), bank.to(wide_dtype(z.dtype))
    if inputs.bank_ids is not None:
        keys["instances"] = inputs.instance_ids, inputs.bank_ids
    if inputs.bank_domain is not None:
        keys["domains"] = inputs.domain, inputs.bank_domain
    outside = len(bank)  # no row of z is a row of the bank
    return inputs.similarity.partial(z, bank, diagonal=outside, k=inputs.k, **keys)[1:]


def _sums_of_similarities(similarity: Similarity, z: Tensor, segment: Segments, sums: Tensor) -> Tensor:
    """[n]: the sum of s over the other rows of the segment."""
    out = torch.empty(len(z), dtype=torch.float64, device=z.device)
    for part in torch.arange(len(z), device=z.device).split(CHUNK):
        u = similarity.unit(z[part])
        out[part] = ((sums[segment.slot[part]] - u) * u).sum(dim=1)
    return out.where(segment.others > 0, 0) / similarity.tau


def _row_loss(lse: Tensor, attraction: Tensor, weight: Tensor) -> Tensor:
    return torch.where(weight > 0, lse - attraction / weight.where(weight > 0, 1), 0)


def _sole_loss(rest: Tensor, s: Tensor, attraction: Tensor, weight: Tensor) -> Tensor:
    """(lse - s) + (s - attraction / weight), whose first term keeps its digits; rest: lse without the positive."""
    alone = weight == 1
    return torch.logaddexp(rest - s, torch.zeros_like(s)) + (s - attraction / weight).where(~alone, 0)


@operator("contrastive_group", FORWARD)
def contrastive_group(*args, **kwargs):
    inputs = Inputs("contrastive_group", args, kwargs)
    z, similarity, layout = inputs.z, inputs.similarity, _agree(inputs)
    columns = Columns(inputs, layout)
    segments, excluded = columns.segments(inputs), Excluded.of(inputs, columns)
    sums = {name: z.new_zeros(z.shape, dtype=torch.float64) for name in segments}
    n, wide, k = z.shape[0], wide_dtype(z.dtype), inputs.k_batch
    lse = z.new_full((n,), -torch.inf, dtype=torch.float64)
    found = z.new_empty((n, 0), dtype=wide), z.new_empty((n, 0), dtype=torch.int64)
    for first, shard in layout.shards(z, inputs.exchange):
        passing = slice(first, first + len(shard))
        keys = columns.admissible(passing) if k else {}
        keys |= {"excluded": excluded.of_shard(passing)} if excluded else {}
        part, cosines, indices = similarity.partial(
            z, shard, diagonal=layout.first - first, k=min(k, len(shard)), **keys
        )
        lse = torch.logaddexp(lse, part)
        found = combine_best(found, (cosines, indices.where(indices < 0, indices + first)), k)
        for name, segment in segments.items():
            add_rows(sums[name], segment.slots(passing), similarity, shard)
    cosines, indices = found if inputs.bank is None else _search_bank(inputs)
    weights = {name: segment.others.double() for name, segment in segments.items()}
    attraction = {name: _sums_of_similarities(similarity, z, segment, sums[name]) for name, segment in segments.items()}
    rest, s_sole = lse, attraction[inputs.part]
    if excluded:
        lse = torch.logaddexp(rest, s_sole).where(excluded.sole, rest)
    if inputs.decoupled:  # a row without negatives has no loss
        weights[inputs.part] = weights[inputs.part].where(lse > -torch.inf, 0)
    if inputs.k:
        near = cosines.double().masked_fill(indices < 0, 0).sum(dim=1)
        weights["instance"] += inputs.lam * (indices >= 0).sum(dim=1)
        attraction["instance"] = attraction["instance"] + inputs.lam * near / similarity.tau
    none = z.new_empty(0, dtype=torch.float64)
    losses = [_row_loss(lse, attraction[name], weights[name]) if name in segments else none for name in PARTS]
    if excluded:
        small = _sole_loss(rest, s_sole, attraction[inputs.part], weights[inputs.part])
        at = PARTS.index(inputs.part)
        losses[at] = small.where(excluded.sole, losses[at])
    gathered = shard if inputs.exchange == "gather" else z.new_empty((0, z.shape[1]))
    row_weights = [weights.get(name, none.clone()) for name in PARTS]
    sizes = torch.tensor(layout.sizes)
    return *(x.to(wide) for x in losses), lse, *row_weights, cosines.contiguous(), indices.contiguous(), gathered, sizes


@torch.library.register_fake("ltood_fast::contrastive_group")
def _(*args, **kwargs):
    inputs = Inputs("contrastive_group", args, kwargs)
    rows = torch.library.get_ctx().new_dynamic_size() if inputs.exchange == "gather" else 0
    one = {name: value for name, value in vars(inputs).items() if name not in RANK_NAMES}
    return (
        *fake_of_one(**one),
        inputs.z.new_empty((rows, inputs.z.shape[1])),
        torch.empty(resolve(inputs.group).size(), dtype=torch.int64, device="cpu"),
    )


class PositiveGrads(NamedTuple):
    """Gradients that the losses of the own rows send to the log-sum-exp and to the positives, doubles [n] each."""

    lse: Tensor
    parts: dict[str, Tensor]  # to each of the other rows of the instance, of the class
    neighbor: Tensor | None  # to each neighbour

    @staticmethod
    def of(inputs: Inputs) -> PositiveGrads:
        lse, of_lse = inputs.lse, inputs.grad_lse
        of_parts = inputs.grad_instance_loss, inputs.grad_class_loss
        weights = inputs.instance_weight, inputs.class_weight
        total = torch.zeros_like(lse) if of_lse is None else of_lse.double()
        parts = {}
        for name, gradient, weight in zip(PARTS, of_parts, weights, strict=True):
            if len(weight):
                received = torch.zeros_like(lse) if gradient is None else gradient.double().where(weight > 0, 0)
                total = total + received
                parts[name] = received / weight.where(weight > 0, 1)
        return PositiveGrads(
            total.where(lse > -torch.inf, 0), parts, inputs.lam * parts["instance"] if inputs.k else None
        )


class Attraction:
    """Sums of rows of the batch, float64, from which the gradient of the positives at the own rows is made."""

    def __init__(
        self, inputs: Inputs, columns: Columns, positive_grads: PositiveGrads, choices: tuple[Tensor, ...], first: int
    ):
        z = inputs.z
        self.similarity, self.positive_grads, self.choices, self.first = (
            inputs.similarity,
            positive_grads,
            choices,
            first,
        )
        self.segments, self.columns = columns.segments(inputs), columns
        self.excluded, self.part = Excluded.of(inputs, columns), inputs.part
        self.sums, self.grad_sums = ({name: _zeros(z) for name in self.segments} for _ in range(2))
        self.near = _zeros(z) if inputs.k else None
        # lse, its gradient, and that at a positive of the part, of the rows of all ranks
        self._of_all = *columns.doubles[:2], columns.doubles[2 + list(positive_grads.parts).index(inputs.part)]

    def add(self, first: int, shard: Tensor) -> None:
        """The rows of a shard, as positives of the own rows and as rows that the own ones are positives of."""
        passing = slice(first, first + len(shard))
        *all_parts, all_neighbor = self.columns.doubles[2:] + [None] * (not self.choices)
        for (name, segment), positive_grad in zip(self.segments.items(), all_parts, strict=True):
            slots = segment.slots(passing)
            add_rows(self.sums[name], slots, self.similarity, shard)
            add_rows(self.grad_sums[name], slots, self.similarity, shard, positive_grad[passing])
        for mine, every in zip(self.choices, self.columns.choices, strict=True):
            add_chosen(self.near, mine - first, self.similarity, shard, self.positive_grads.neighbor)
            here = every[passing] - self.first
            add_rows(self.near, here.where(here < len(mine), -1), self.similarity, shard, all_neighbor[passing])

    def of_rows(self, rows: Tensor, u: Tensor) -> Tensor:
        """tau times the gradient of the segments at the given own rows."""
        total = torch.zeros_like(u)
        for name, segment in self.segments.items():
            own, slot = self.positive_grads.parts[name][rows, None], segment.slot[rows]
            part = own * (self.sums[name][slot] - 2 * u) + self.grad_sums[name][slot]
            if self.excluded and name == self.part:
                part = self._of_sole(rows, u, self.sums[name][slot] - u).where(self.excluded.sole[rows, None], part)
            total += part
        return total

    def _of_sole(self, rows: Tensor, u: Tensor, partner: Tensor) -> Tensor:
        """The same of sole positives, together with what their softmax repels: g - w P = -g (P - 1) - (w - g) P."""
        s = (u * partner).sum(dim=1) / self.similarity.tau
        partners = self.excluded.partner[rows].where(self.excluded.sole[rows], 0)
        weight = torch.zeros_like(s)
        for members in (self.first + rows, partners):  # rows of the batch
            lse, w, g = (x[members] for x in self._of_all)
            weight -= g * torch.expm1(s - lse) + (w - g) * torch.exp(s - lse)
        return weight[:, None] * partner


def _zeros(z: Tensor) -> Tensor:
    return z.new_zeros(z.shape, dtype=torch.float64)


@operator("contrastive_group_bwd", BACKWARD)
def contrastive_group_bwd(*args, **kwargs):
    inputs = Inputs("contrastive_group_bwd", args, kwargs)
    z, similarity, group, indices, lse = inputs.z, inputs.similarity, resolve(inputs.group), inputs.indices, inputs.lse
    layout = RankLayout(inputs.op, group, group.rank(), inputs.sizes.tolist())
    positive_grads = PositiveGrads.of(inputs)
    choices = indices.unbind(dim=1) if inputs.k_batch else ()
    doubles = (lse, positive_grads.lse, *positive_grads.parts.values(), *([positive_grads.neighbor] if choices else []))
    columns = Columns(inputs, layout, choices, doubles)
    attraction = Attraction(inputs, columns, positive_grads, choices, layout.first)
    grad_unit = None
    for first, shard in [(0, inputs.gathered)] if inputs.exchange == "gather" else layout.shards(z, "ring"):
        passing = slice(first, first + len(shard))
        part = similarity.lse_bwd(
            z,
            shard,
            diagonal=layout.first - first,
            excluded=attraction.excluded and attraction.excluded.of_shard(passing),
            of_rows=(lse, positive_grads.lse),
            of_columns=(columns.doubles[0][passing], columns.doubles[1][passing]),
        )
        grad_unit = part if grad_unit is None else grad_unit.add_(part)
        del part  # before that of the next shard is made
        attraction.add(first, shard)
    if inputs.bank is not None and inputs.k:
        for mine in indices.unbind(dim=1):
            add_chosen(attraction.near, mine, similarity, inputs.bank, positive_grads.neighbor)
    grad_z, grad_temperature = _epilogue(inputs, grad_unit, attraction)
    all_lse, all_grad_lse = columns.doubles[:2]
    undefined = ((all_grad_lse != 0) & ~(all_lse < torch.inf)).any()  # a row's softmax, and so all that it reaches
    return grad_z.masked_fill(undefined, torch.nan), grad_temperature.masked_fill(undefined, torch.nan)


def _epilogue(inputs: Inputs, grad_unit: Tensor, attraction: Attraction) -> tuple[Tensor, Tensor]:
    """The gradients at z and at tau, from those at the unit rows."""
    z, similarity = inputs.z, inputs.similarity
    grad_z, u_dot_du = torch.empty_like(z, memory_format=torch.contiguous_format), z.new_zeros((), dtype=torch.float64)
    for rows in torch.arange(len(z), device=z.device).split(CHUNK):
        u = similarity.unit(z[rows])
        in_batch = grad_unit[rows].double() - attraction.of_rows(rows, u) / similarity.tau
        near = torch.zeros_like(u) if attraction.near is None else attraction.near[rows] / similarity.tau
        # A similarity within the batch is in the gradients of both its rows, one with the bank in that of one.
        shared = 2 if inputs.bank is None else 1
        u_dot_du += (u * (in_batch / 2 - near / shared)).sum()
        grad_z[rows] = similarity.gradient(z[rows], in_batch - near).to(z.dtype)
    return grad_z, (-u_dot_du / similarity.tau).to(grad_unit.dtype)


fake_gradients("contrastive_group")
differentiable("contrastive_group")

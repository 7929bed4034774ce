"""torch.ops.ltood_fast.guided_group: the losses of stage 2 of this rank's rows against the rows of all ranks.

    l_i = lse_i - sum_{p in P(i)} w+_ip s_ip / weight_i, i a row of this rank, P(i) = V(i) + M(i)

Shards of the other ranks' rows pass by, all in one (gather) or one rank's at a time (ring), and `guided_partial` sums
over each what a row meets there: its negatives, its views, both softmaxes, the guide's nearest. Which M(i) are the
nearest is known when all have passed; what a row needs of them, s and cos, goes along with each candidate. Only then is
it known, too, which rows have no negative left in their farthest cluster and fall back on all rows; the few that might
(their farthest cluster holds at most k rows of other images) are summed both ways.

The gradient of the own rows needs G_ij = dL/ds_ij and G_ji: with what arrived at every row (4 doubles a part, gathered)
`guided_partial_bwd` has both, for the views too. G_im of a neighbour m of i is known to the owner of i alone: these k
coefficients a row are gathered with the neighbours' numbers, and the owner of m adds G_im u_i when i's shard passes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _check as check
from ._contrastive_group import CHUNK, Similarity, add_chosen, add_rows, combine_best, occurrences
from ._group import RankLayout, gather_even, operator, resolve
from ._guided_batch import agree, ids_of
from ._guided_op import fake_guided
from ._guided_partial import GuidedPartial
from ._schema import RANK_NAMES, Arguments, differentiable, fake_gradients, group_schemas, overload, wide_dtype

GUIDE = Similarity(1.0, True, True)  # cosines
FORWARD, BACKWARD = group_schemas(
    "guided", "Tensor pairs, Tensor fallback, Tensor gathered, Tensor gathered_guide, Tensor sizes"
)


class Inputs(Arguments):
    """The arguments of the operator, or of its backward."""

    @property
    def contrast(self) -> bool:
        return self.clusters is not None

    @property
    def searched(self) -> int:
        """Neighbours to search for."""
        return self.k if self.contrast and self.pos_idx is None else 0

    @property
    def width(self) -> int:
        """Neighbours of a row."""
        return self.searched if self.pos_idx is None else self.pos_idx.shape[1]

    @property
    def student(self) -> Similarity:
        tensor = self.temperature_tensor
        return Similarity(self.temperature if tensor is None else tensor.detach(), self.normalize, True)

    @property
    def of_pairs(self) -> dict[str, object]:
        """The options that decide the forces and exponents of a pair."""
        names = "temperature_tensor", "temperature", "teacher_temperature", "weighted", "gamma", "normalize"
        return {name: getattr(self, name) for name in names}

    def shards(self, layout: RankLayout):
        """(number of the first row, z, guide) of the shards."""
        both = zip(layout.shards(self.z, self.exchange), layout.shards(self.guide, self.exchange), strict=True)
        for (first, z), (_, guide) in both:
            yield first, z, guide

    def force(self, cosines: Tensor) -> Tensor:
        return ((1 + cosines) / 2).clamp(min=0) ** self.gamma if self.weighted else torch.ones_like(cosines)


class Keys:
    """The instance and the cluster of every row of the batch, and further columns of 8 bytes."""

    def __init__(self, inputs: Inputs, layout: RankLayout, more: tuple[Tensor, ...] = ()):
        self.own = slice(layout.first, layout.first + layout.sizes[layout.rank])
        self.far = inputs.far
        named = [ids_of(layout, inputs.z, inputs.instance_ids), inputs.clusters] if inputs.contrast else []
        columns = [x.view(torch.int64) for x in (*named, *more)]
        every = [x.contiguous() for x in layout.gather(torch.stack(columns, dim=1)).unbind(dim=1)] if columns else []
        self.instance, self.cluster = every[:2] if inputs.contrast else (None, None)
        self.more = every[len(named) :]
        if inputs.contrast:  # a GPU's numbers are not read: what is out of range belongs to no cluster, here K
            count = len(inputs.far)
            self.cluster = self.cluster.where((self.cluster >= 0) & (self.cluster < count), count)
            far = inputs.far.where((inputs.far >= 0) & (inputs.far < count), count + 1)
            self.own_far = torch.cat([far, far.new_full((1,), count + 1)])[self.cluster[self.own]]

    def of_columns(self, columns: slice) -> dict[str, Tensor]:
        """Clusters, far and instances of the own rows and of a shard, as the kernels take them."""
        if self.cluster is None:
            return {}
        keys = {"clusters": self.cluster, "instance": self.instance}
        of_rows = {f"x_{name}": key[self.own].contiguous() for name, key in keys.items()}
        return {"far": self.far, **of_rows, **{f"y_{name}": key[columns].contiguous() for name, key in keys.items()}}

    def others_in_far(self) -> Tensor:
        """[n]: how many rows of other instances each own row's farthest cluster holds."""
        stride, instance = len(self.far) + 2, torch.searchsorted(self.instance.sort().values, self.instance)
        of_own = occurrences(instance * stride + self.cluster, instance[self.own] * stride + self.own_far)
        return occurrences(self.cluster, self.own_far) - of_own


def _given(inputs: Inputs, layout: RankLayout, keys: Keys) -> Tensor:
    """pos_idx without what is no neighbour of its own: the row itself and its views, a row that was named before."""
    chosen = inputs.pos_idx
    if chosen.device.type == "cpu" and chosen.numel():  # what one rank refuses, all of them raise
        extremes = torch.stack([chosen.min(), chosen.max()])[None]
        check.index_range(inputs.op, "pos_idx", gather_even(inputs.op, layout.group, extremes), -1, layout.total)
    outside = (chosen < 0) | (chosen >= layout.total)  # a GPU's numbers are not read
    same = keys.instance[chosen.masked_fill(outside, 0)] == keys.instance[keys.own][:, None]
    chosen = chosen.masked_fill(outside | same, -1)
    named_before = (chosen[:, :, None] == chosen[:, None, :]).tril(-1).any(dim=2)
    return chosen.masked_fill(named_before, -1)


def _products(similarity: Similarity, x: Tensor, y: Tensor, choice: Tensor) -> Tensor:
    """[n, k] float64: similarities with the chosen rows of y; of what is no row of it, any."""
    out = torch.empty(choice.shape, dtype=torch.float64, device=x.device)
    for rows in torch.arange(len(x), device=x.device).split(CHUNK):
        u = similarity.unit(x[rows])
        for slot in range(choice.shape[1]):
            chosen = similarity.unit(y[choice[rows, slot].clamp(0, len(y) - 1)])
            out[rows, slot] = (u * chosen).sum(dim=1)
    return out / similarity.tau


class Sums:
    """Running results of the own rows over the shards so far."""

    def __init__(self, inputs: Inputs, given: Tensor | None):
        n, k, z = inputs.z.shape[0], inputs.width, inputs.z
        self.inputs, self.partial = inputs, None
        self.neighbors = z.new_full((n, k), -1, dtype=torch.int64) if given is None else given
        self.ranked = z.new_full((n, k), -torch.inf, dtype=wide_dtype(z.dtype))
        self.s, self.cos = (z.new_zeros((n, k), dtype=torch.float64) for _ in range(2))

    def add(self, first: int, shard: Tensor, guide: Tensor, partial: GuidedPartial) -> None:
        inputs = self.inputs
        self.partial = partial if self.partial is None else _combined(self.partial, partial)
        local = partial.indices if inputs.searched else self.neighbors - first
        s = _products(inputs.student, inputs.z, shard, local)
        cos = _products(GUIDE, inputs.guide, guide, local)
        if inputs.searched:
            best = self.ranked, self.neighbors, self.s, self.cos
            more = partial.cosines, local.where(local < 0, local + first), s, cos
            self.ranked, self.neighbors, self.s, self.cos = combine_best(best, more, inputs.k)
        else:
            inside = (self.neighbors >= 0) & (local >= 0) & (local < len(shard))
            self.s, self.cos = s.where(inside, self.s), cos.where(inside, self.cos)

    def contrast(self, keys: Keys, others: Tensor) -> tuple[Tensor, ...]:
        """(loss, weight, lse, pairs, fallback), pairs [3, n, k]: s, the share of exp(s) that the sums of the shards
        have left out, and the attraction, of the neighbours."""
        partial, chosen = self.partial, self.neighbors >= 0
        in_far = chosen & (keys.cluster[self.neighbors.clamp(min=0)] == keys.own_far[:, None])
        fallback = others == in_far.sum(dim=1)
        share = 1 - self.inputs.force(-self.cos).where(in_far | fallback[:, None], 0)
        attract = self.inputs.force(self.cos).where(chosen, 0)
        missing = (self.s + share.log()).masked_fill(~chosen, -torch.inf)
        counted = partial.lse_every.where(fallback, partial.lse)
        lse = torch.cat([counted[:, None], missing], dim=1).logsumexp(dim=1)
        weight = partial.weight + attract.sum(dim=1)
        positive_logit = partial.positive_logit + (attract * self.s).where(chosen, 0).sum(dim=1)
        has_positive = weight != 0  # true for NaN, which has to reach the loss
        loss = torch.where(has_positive, lse - positive_logit / weight.where(has_positive, 1), 0)
        loss = loss.masked_fill(loss < 0, 0)
        return loss, weight, lse, torch.stack([self.s, share, attract]), fallback

    def divergence(self) -> Tensor:
        """KL(p || q) = E_p[t - s] + lse_s - lse_t, the difference through the gap where it is small; alone: 0."""
        partial = self.partial
        difference = partial.gap.log1p().where(partial.gap.abs() < 0.5, partial.student_lse - partial.teacher_lse)
        rows = (partial.excess + difference).where(partial.teacher_lse != -torch.inf, 0)
        return rows.masked_fill(rows < 0, 0)


def _combined(a: GuidedPartial, b: GuidedPartial) -> GuidedPartial:
    """Of the columns of both."""
    teacher = torch.logaddexp(a.teacher_lse, b.teacher_lse)

    def mean(of_a: Tensor, of_b: Tensor) -> Tensor:
        """Of what is a share of the teacher's sum."""
        parts = (
            (partial.teacher_lse - teacher).exp().where(partial.teacher_lse != -torch.inf, 0) for partial in (a, b)
        )
        return sum(part * x for part, x in zip(parts, (of_a, of_b), strict=True))

    return GuidedPartial(
        lse=torch.logaddexp(a.lse, b.lse),
        lse_every=torch.logaddexp(a.lse_every, b.lse_every),
        weight=a.weight + b.weight,
        positive_logit=a.positive_logit + b.positive_logit,
        cosines=b.cosines,
        indices=b.indices,
        student_lse=torch.logaddexp(a.student_lse, b.student_lse),
        teacher_lse=teacher,
        excess=mean(a.excess, b.excess),
        gap=mean(a.gap, b.gap),
    )


@operator("guided_group", FORWARD)
def guided_group(*args, **kwargs):
    inputs = Inputs("guided_group", args, kwargs)
    z, guide = inputs.z, inputs.guide
    layout = agree(inputs)
    keys = Keys(inputs, layout)
    others = keys.others_in_far() if inputs.contrast else None
    every = None if others is None else others <= inputs.width
    sums = Sums(inputs, None if inputs.pos_idx is None else _given(inputs, layout, keys))
    options = {"k": inputs.searched, "distill": inputs.distill, "x_every": every, **inputs.of_pairs}
    for first, shard, guide_shard in inputs.shards(layout):
        pair = {"x": z, "x_guide": guide, "y": shard, "y_guide": guide_shard, "diagonal": layout.first - first}
        of_columns = keys.of_columns(slice(first, first + len(shard)))
        sums.add(first, shard, guide_shard, GuidedPartial(*overload("guided_partial")(**pair, **of_columns, **options)))
    wide, none = wide_dtype(z.dtype), z.new_empty(0, dtype=torch.float64)
    contrast = none, none.clone(), none.clone(), z.new_empty((3, len(z), 0), dtype=torch.float64), none.bool()
    loss, weight, lse, pairs, fallback = sums.contrast(keys, others) if inputs.contrast else contrast
    kl = sums.divergence() if inputs.distill else none
    if inputs.exchange == "ring":
        shard, guide_shard = z.new_empty((0, z.shape[1])), guide.new_empty((0, guide.shape[1]))
    contrasts = loss.to(wide), weight, lse, sums.neighbors.contiguous()
    softmaxes = kl.to(wide, copy=True), sums.partial.student_lse, sums.partial.teacher_lse
    return *contrasts, *softmaxes, pairs, fallback, shard, guide_shard, torch.tensor(layout.sizes)


@torch.library.register_fake("ltood_fast::guided_group")
def _(*args, **kwargs):
    inputs = Inputs("guided_group", args, kwargs)
    z, guide, n = inputs.z, inputs.guide, inputs.z.shape[0]
    rows = torch.library.get_ctx().new_dynamic_size() if inputs.exchange == "gather" else 0
    one = {name: value for name, value in vars(inputs).items() if name not in RANK_NAMES}
    return (
        *fake_guided(**one),
        z.new_empty((3, n, inputs.width), dtype=torch.float64),
        z.new_empty(n if inputs.contrast else 0, dtype=torch.bool),
        z.new_empty((rows, z.shape[1])),
        guide.new_empty((rows, guide.shape[1])),
        torch.empty(resolve(inputs.group).size(), dtype=torch.int64, device="cpu"),
    )


class Arrived(NamedTuple):
    """The gradients that the losses of the own rows send back, float64: states as `guided_partial_bwd` takes them, and
    coefficients of the neighbours."""

    contrast: Tensor | None  # [n, 4]
    distill: Tensor | None  # [n, 4]
    coefficients: Tensor  # [n, k], dL/ds

    @staticmethod
    def of(inputs: Inputs) -> Arrived:
        contrast, distill, coefficients = None, None, inputs.pairs[0]
        if inputs.contrast:
            weight, lse = inputs.weight, inputs.lse
            loss = _doubles(inputs.grad_loss, lse).where(weight != 0, 0)
            grad_lse = (_doubles(inputs.grad_lse, lse) + loss).where(lse != -torch.inf, 0)
            attract = loss / weight.where(weight != 0, 1)
            contrast = torch.stack([lse, grad_lse, attract, inputs.fallback.double()], dim=1)
            s, share, force = inputs.pairs
            coefficients = grad_lse[:, None] * share * (s - lse[:, None]).exp() - attract[:, None] * force
            coefficients = coefficients.where(inputs.neighbors >= 0, 0)
        if inputs.distill:
            student_lse, kl = inputs.student_lse, _doubles(inputs.grad_kl, inputs.student_lse)
            of_lse = _doubles(inputs.grad_student_lse, student_lse) + kl
            distill = torch.stack([student_lse, inputs.teacher_lse, of_lse, kl], dim=1)
        return Arrived(contrast, distill, coefficients)


def _doubles(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient.double()


@operator("guided_group_bwd", BACKWARD)
def guided_group_bwd(*args, **kwargs):
    inputs = Inputs("guided_group_bwd", args, kwargs)
    z, student, group, neighbors = inputs.z, inputs.student, resolve(inputs.group), inputs.neighbors
    layout = RankLayout(inputs.op, group, group.rank(), inputs.sizes.tolist())
    arrived = Arrived.of(inputs)
    states = [state for state in (arrived.contrast, arrived.distill) if state is not None]
    doubles = torch.cat([*states, arrived.coefficients], dim=1)
    keys = Keys(inputs, layout, (*doubles.unbind(dim=1), *neighbors.unbind(dim=1)))
    every = torch.stack(keys.more, dim=1)
    *states, coefficients = (
        every[:, : doubles.shape[1]].view(torch.float64).split([4] * len(states) + [inputs.width], 1)
    )
    choices = every[:, doubles.shape[1] :]
    near, grad_unit = z.new_zeros(z.shape, dtype=torch.float64), None
    here = [(0, inputs.gathered, inputs.gathered_guide)] if inputs.exchange == "gather" else inputs.shards(layout)
    for first, shard, guide_shard in here:
        passing = slice(first, first + len(shard))
        pair = {"x": z, "x_guide": inputs.guide, "y": shard, "y_guide": guide_shard, "diagonal": layout.first - first}
        of_columns = iter(states)
        arrivals = {}
        for name in ("contrast", "distill"):
            if (of_rows := getattr(arrived, name)) is not None:
                arrivals |= {f"x_{name}": of_rows, f"y_{name}": next(of_columns)[passing].contiguous()}
        part = overload("guided_partial_bwd")(**pair, **keys.of_columns(passing), **arrivals, **inputs.of_pairs)
        grad_unit = part if grad_unit is None else grad_unit.add_(part)
        del part  # before that of the next shard is made
        for slot in range(inputs.width):
            add_chosen(near, neighbors[:, slot] - first, student, shard, arrived.coefficients[:, slot])
            mine = choices[passing, slot] - layout.first
            add_rows(near, mine.where(mine < len(z), -1), student, shard, coefficients[passing, slot])
    return _epilogue(inputs, grad_unit, near)


def _epilogue(inputs: Inputs, grad_unit: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients at z and at tau, from those at the unit rows. A similarity is in the gradients of both its rows."""
    z, student = inputs.z, inputs.student
    grad_z, u_dot_du = torch.empty_like(z, memory_format=torch.contiguous_format), z.new_zeros((), dtype=torch.float64)
    for rows in torch.arange(len(z), device=z.device).split(CHUNK):
        at_unit = grad_unit[rows].double() + near[rows] / student.tau
        u_dot_du += (student.unit(z[rows]) * at_unit).sum() / 2
        grad_z[rows] = student.gradient(z[rows], at_unit).to(z.dtype)
    return grad_z, (-u_dot_du / student.tau).to(grad_unit.dtype)


fake_gradients("guided_group")
differentiable("guided_group")

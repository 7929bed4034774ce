"""The partial ops of stage 2 against a dense float64 definition, and against the square op they are cut from."""

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize as unit

import ltood_fast
from ltood_fast._ext import has_kernel
from ltood_fast.ops._group import ALONE
from ltood_fast.ops._guided_group import Keys, _combined
from ltood_fast.ops._guided_partial import GuidedPartial
from python_tests.ops.test_contrastive_partial import assert_neighbors_right
from python_tests.tolerances import assert_gradient_close, assert_loss_close

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CONTRAST = ("lse", "lse_every", "weight", "positive_logit")
DISTILL = ("student_lse", "teacher_lse", "excess", "gap")
NOBODY = -7  # no cluster's number


@dataclass
class PartialProblem:
    """Rows x against columns y; row i is column i + diagonal, where there is one. clusters None: distillation alone."""

    x: Tensor
    x_guide: Tensor
    y: Tensor
    y_guide: Tensor
    diagonal: int
    x_clusters: Tensor | None = None
    y_clusters: Tensor | None = None
    far: Tensor | None = None
    x_instance: Tensor | None = None
    y_instance: Tensor | None = None
    every: Tensor | None = None
    temperature: float | Tensor = 0.3
    teacher_temperature: float | None = None
    k: int = 0
    weighted: bool = True
    gamma: float = 1.0
    normalize: bool = True
    distill: bool = False

    def arguments_of_both(self, device) -> dict[str, object]:
        rows = "x", "y", "x_guide", "y_guide", "x_clusters", "y_clusters", "far", "x_instance", "y_instance"
        options = "diagonal", "teacher_temperature", "weighted", "gamma", "normalize"
        named = {name: getattr(self, name) for name in (*rows, *options)}
        named["temperature_tensor" if isinstance(self.temperature, Tensor) else "temperature"] = self.temperature
        return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in named.items()}

    def forward(self, device="cpu") -> GuidedPartial:
        every = None if self.every is None else self.every.to(device)
        found = torch.ops.ltood_fast.guided_partial(
            **self.arguments_of_both(device), x_every=every, k=self.k, distill=self.distill
        )
        return GuidedPartial(*(x.cpu() for x in found))

    def lse_bwd(self, states, device="cpu") -> Tensor:
        """states: of the rows and the columns for the contrast, then for the distillation."""
        moved = [None if t is None else t.to(device) for t in states]
        named = dict(zip(("x_contrast", "y_contrast", "x_distill", "y_distill"), moved, strict=True))
        return torch.ops.ltood_fast.guided_partial_bwd(**self.arguments_of_both(device), **named).cpu()


class Dense:
    """Every pair of a partial problem in float64."""

    def __init__(self, p: PartialProblem):
        rows = [t.double() for t in (p.x, p.y)]
        u, self.u = (unit(t, dim=1, eps=1e-12) for t in rows) if p.normalize else rows
        self.p, self.tau = p, float(p.temperature)
        self.s = u @ self.u.t() / self.tau
        self.cos = unit(p.x_guide.double(), dim=1) @ unit(p.y_guide.double(), dim=1).t()
        self.t = self.cos / (p.teacher_temperature or self.tau)
        self.self = torch.arange(len(p.x))[:, None] + p.diagonal == torch.arange(len(p.y))
        self.attract, self.repel = (
            ((1 + c) / 2).clamp(min=0) ** p.gamma if p.weighted else torch.ones_like(c) for c in (self.cos, -self.cos)
        )
        if p.far is not None:
            self.views = (p.x_instance[:, None] == p.y_instance) & ~self.self
            self.out = self._far_of(p.x_clusters)[:, None] == p.y_clusters
            self.back = self._far_of(p.y_clusters) == p.x_clusters[:, None]

    def _far_of(self, clusters: Tensor) -> Tensor:
        count = len(self.p.far)
        far = self.p.far[clusters.clamp(0, count - 1)]
        return far.where((far >= 0) & (far < count) & (clusters >= 0) & (clusters < count), NOBODY)

    def shares(self, negatives: Tensor) -> Tensor:
        """What multiplies exp(s) in a sum: the force of a negative, 1 of a view."""
        return torch.where(self.views, 1.0, self.repel.where(negatives & ~self.self, 0))

    def lse(self, negatives: Tensor, dim: int = 1) -> Tensor:
        read = self.views | (negatives & ~self.self)
        return (self.s + self.shares(negatives).log()).where(read, -math.inf).logsumexp(dim)

    def forward(self) -> dict[str, Tensor]:
        p, out = self.p, {}
        if p.far is not None:
            every = torch.zeros(len(p.x), dtype=torch.bool) if p.every is None else p.every
            out["lse"] = self.lse(self.out)
            out["lse_every"] = self.lse(torch.ones_like(self.out)).where(every, -math.inf)
            attract = self.attract.where(self.views, 0)
            out |= {"weight": attract.sum(1), "positive_logit": (attract * self.s).where(self.views, 0).sum(1)}
        if p.distill:
            s, t = (pairs.masked_fill(self.self, -math.inf) for pairs in (self.s, self.t))
            out |= {"student_lse": s.logsumexp(1), "teacher_lse": t.logsumexp(1)}
            met = out["teacher_lse"] != -math.inf
            share = (t - out["teacher_lse"][:, None]).exp()
            out["excess"] = (share * (self.t - self.s)).where(~self.self, 0).sum(1).where(met, 0)
            out["gap"] = ((out["student_lse"] - out["teacher_lse"]).exp() - 1).where(met, 0)
        return out

    def states(self) -> list[Tensor | None]:
        """Log-sums of more columns than these, weights of every sign, some rows and columns that fell back."""
        p, states = self.p, []
        draw = torch.Generator().manual_seed(5)
        for part in (self._contrast_lse, self._distill_lse):
            for dim in (1, 0):
                sums = part(dim)
                if sums is None:
                    states.append(None)
                    continue
                lse = [torch.logaddexp(x, torch.zeros(())) for x in sums[0]]
                weights = torch.randn(len(lse[0]), 4 - len(sums[0]) - len(sums[1]), generator=draw).double()
                states.append(torch.cat([torch.stack([*lse], 1), weights, *(x[:, None] for x in sums[1])], 1))
        assert p.far is None or states[0].shape == (len(p.x), 4)
        return states

    def _fallback(self, dim: int) -> Tensor:
        return torch.arange(self.s.shape[1 - dim]) % 5 == dim

    def _contrast_lse(self, dim: int):
        if self.p.far is None:
            return None
        negatives, fallback = (self.out, self.back)[1 - dim], self._fallback(dim)
        return [self.lse(negatives | fallback.unsqueeze(dim), dim)], [fallback.double()]

    def _distill_lse(self, dim: int):
        if not self.p.distill:
            return None
        return [pairs.masked_fill(self.self, -math.inf).logsumexp(dim) for pairs in (self.s, self.t)], []

    def lse_bwd(self, states) -> Tensor:
        of_pairs = torch.zeros_like(self.s)
        for dim, contrast, distill in ((1, *states[::2]), (0, *states[1::2])):
            if contrast is not None:
                lse, grad_lse, attract, fallback = (x.unsqueeze(dim) for x in contrast.unbind(1))
                negatives = (self.out, self.back)[1 - dim] | (fallback != 0)
                of_pairs += grad_lse * self.shares(negatives) * (self.s - lse).exp()
                of_pairs -= attract * self.attract.where(self.views, 0)
            if distill is not None:
                student, teacher, grad_lse, attract = (x.unsqueeze(dim) for x in distill.unbind(1))
                of_pairs += (grad_lse * (self.s - student).exp() - attract * (self.t - teacher).exp()).where(
                    ~self.self, 0
                )
        return of_pairs @ self.u / self.tau


def close_where_finite(actual: Tensor, expected: Tensor, dtype: torch.dtype, name: str) -> None:
    finite = expected.isfinite()
    assert torch.equal(actual[~finite], expected[~finite]), name
    if finite.any():
        assert_loss_close(actual[finite], expected[finite], dtype)


def check(p: PartialProblem, device="cpu") -> GuidedPartial:
    """Everything that the two ops return, against the dense definition."""
    dense, dtype = Dense(p), p.x.dtype
    found = p.forward(device)
    expected = dense.forward()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (found.cosines.dtype, found.indices.dtype) == (wide, torch.int64)
    for name in (*CONTRAST, *DISTILL):
        rows = getattr(found, name)
        assert rows.dtype == torch.float64
        if name in expected:
            close_where_finite(rows, expected[name], dtype, name)
        else:
            assert rows.numel() == 0
    if p.k:
        rules = {"instances": (p.x_instance, p.y_instance)}
        rounding = 1e-13 if dtype == torch.float64 else 1e-6
        own = dense.cos.masked_fill(dense.self, -math.inf)
        assert_neighbors_right(own, found.cosines, found.indices, p.k, rules, rounding)
    states = dense.states()
    grad_unit = p.lse_bwd(states, device)
    assert (grad_unit.dtype, grad_unit.shape) == (wide, p.x.shape)
    assert_gradient_close(grad_unit, dense.lse_bwd(states), dtype)
    return found


def square(n: int, d: int, dg: int, dtype=torch.float64, clusters: int = 4, **options) -> PartialProblem:
    """All rows against themselves: pairs of views and some alone, the last cluster empty and the farthest of one."""
    z, guide = (torch.randn(n, width, dtype=torch.float64) for width in (d, dg))
    members = torch.randint(clusters - 1, (n,))
    guide += 2 * torch.randn(clusters, dg, dtype=torch.float64)[members]
    far = torch.tensor([1, clusters - 1, *range(clusters - 2)])
    ids = torch.arange(n) % max(2 * n // 3, 1)
    keys = {"x_clusters": members, "y_clusters": members, "far": far, "x_instance": ids, "y_instance": ids}
    if options.pop("alone", False):
        keys = {}
    else:
        options = {"every": torch.arange(n) % 3 == 1, "k": 3} | options
    z, guide = z.to(dtype), guide.to(dtype)
    return PartialProblem(z, guide, z, guide, 0, **keys, **options)


def cut(whole: PartialProblem, rows: slice, columns: slice) -> PartialProblem:
    """The rows and the columns of one of its parts."""
    of_x = {name: getattr(whole, name)[rows] for name in ("x", "x_guide", "x_clusters", "x_instance", "every")
            if getattr(whole, name) is not None}  # fmt: skip
    of_y = {name: getattr(whole, name)[columns] for name in ("y", "y_guide", "y_clusters", "y_instance")
            if getattr(whole, name) is not None}  # fmt: skip
    return replace(whole, **of_x, **of_y, diagonal=rows.start - columns.start)


# (N, D, Dg, rows, columns, options) of a square and the part that is cut from it: why it is there
CASES = {
    "both parts, the diagonal runs out": (300, 20, 24, (120, 300), (0, 200), {"distill": True}),
    "contrast alone, no row is a column": (250, 17, 9, (0, 110), (110, 250), {}),
    "distillation alone": (200, 20, 12, (70, 200), (0, 140), {"alone": True, "distill": True}),
    "one row, few columns": (40, 3, 2, (11, 12), (10, 15), {"distill": True}),
    "a force that needs a logarithm": (150, 70, 66, (20, 150), (0, 70), {"gamma": 0.5, "teacher_temperature": 0.15}),
    "no forces": (150, 20, 16, (0, 140), (0, 150), {"weighted": False, "distill": True}),
    "rows as they are": (150, 12, 16, (0, 70), (10, 150), {"normalize": False, "temperature": 2.0, "distill": True}),
    "two groups of features": (140, 150, 20, (0, 140), (60, 140), {"distill": True, "k": 0}),
}


def case(name: str, dtype: torch.dtype) -> PartialProblem:
    n, d, dg, rows, columns, options = CASES[name]
    return cut(square(n, d, dg, dtype, **options), slice(*rows), slice(*columns))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_the_dense_definition(device, name, dtype):
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("there is no float64 kernel for CUDA")
    check(case(name, dtype), device)


def test_a_learned_temperature(device):
    p = case("both parts, the diagonal runs out", torch.float32)
    check(replace(p, temperature=torch.tensor(0.25, dtype=torch.float64)), device)


def check_the_square(whole: PartialProblem, device="cpu", shards=(0, 130, 131)) -> None:
    """Shards of the columns combine to what the square op gives where no neighbours are positives; so do gradients."""
    n, dtype = len(whole.x), whole.x.dtype
    keys = {"clusters": whole.x_clusters, "far": whole.far, "instance_ids": whole.x_instance}
    named = {"z": whole.x, "guide": whole.x_guide, **keys, "pos_idx": torch.full((n, 1), -1)}
    arguments = {name: t.to(device) for name, t in named.items()} | {
        "temperature": 0.3,
        "weighted": whole.weighted,
        "gamma": whole.gamma,
        "normalize": whole.normalize,
        "distill": whole.distill,
    }
    loss, weight, lse, neighbors, kl, student_lse, teacher_lse = torch.ops.ltood_fast.guided(**arguments)
    out_of_far = Dense(whole)
    fallback = ~(out_of_far.out & ~out_of_far.views & ~out_of_far.self).any(1)
    assert 0 < fallback.sum() < n
    whole = replace(whole, every=fallback, k=0)
    parts = [cut(whole, slice(0, n), slice(*ends)) for ends in zip(shards, (*shards[1:], n), strict=True)]
    combined = None
    for part in parts:
        found = part.forward(device)
        combined = found if combined is None else _combined(combined, found)
    counted = combined.lse_every.where(fallback, combined.lse)
    assert_loss_close(counted, lse.cpu(), dtype)
    has_view = combined.weight != 0
    assert_loss_close((counted - combined.positive_logit / combined.weight)[has_view], loss.cpu()[has_view], dtype)
    difference = combined.gap.log1p().where(combined.gap.abs() < 0.5, combined.student_lse - combined.teacher_lse)
    assert_loss_close(combined.excess + difference, kl.cpu(), dtype)
    of_loss, of_lse, of_kl, of_student = torch.randn(4, n).double() / n
    gradients = [x.to(device) for x in (of_loss, of_lse, of_kl, of_student)]
    saved = weight, lse, neighbors, student_lse, teacher_lse
    grad_z, _ = torch.ops.ltood_fast.guided_bwd(*gradients, *saved, **arguments)
    grad_lse = of_loss.where(has_view, 0)
    contrast = torch.stack(
        [lse.cpu(), grad_lse + of_lse, (grad_lse / weight.cpu()).where(has_view, 0), fallback.double()], 1
    )
    distill = torch.stack([student_lse.cpu(), teacher_lse.cpu(), of_kl + of_student, of_kl], 1)
    grad_unit = 0
    for part, first, end in zip(parts, shards, (*shards[1:], n), strict=True):
        grad_unit = (
            grad_unit + part.lse_bwd((contrast, contrast[first:end], distill, distill[first:end]), device).double()
        )
    u = unit(whole.x.double(), dim=1)
    through = (grad_unit - u * (u * grad_unit).sum(1, keepdim=True)) / whole.x.double().norm(dim=1, keepdim=True)
    assert_gradient_close(through, grad_z.cpu(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shards", [(0,), (0, 130, 131)], ids=["whole", "three"])
def test_shards_combine_to_the_square(device, dtype, shards):
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("there is no float64 kernel for CUDA")
    check_the_square(square(200, 20, 24, dtype, distill=True), device, shards)


def test_a_row_without_a_column(device):
    p = cut(square(30, 4, 4, torch.float32, distill=True), slice(9, 10), slice(9, 10))
    found = check(replace(p, every=torch.tensor([True])), device)
    assert found.lse.tolist() == found.lse_every.tolist() == found.student_lse.tolist() == [-math.inf]
    assert found.weight.tolist() == found.excess.tolist() == found.gap.tolist() == [0]
    assert found.indices.tolist() == [[-1] * 3]


def check_not_a_number(p: PartialProblem, device="cpu") -> None:
    """A column's NaN is in the sums of the rows that read it, and in no others."""
    p.y[3], p.y_guide[5] = math.nan, math.nan
    found, expected = p.forward(device), Dense(p).forward()
    for name in (*CONTRAST, *DISTILL):
        assert torch.equal(getattr(found, name).isnan(), expected[name].isnan()), name
    assert 0 < found.lse.isnan().sum() < len(p.x)


def test_not_a_number_reaches_the_sums(device):
    check_not_a_number(case("both parts, the diagonal runs out", torch.float32), device)


@pytest.mark.parametrize(("dtype", "gathers"), [(torch.float32, False), (torch.bfloat16, False), (torch.float64, True)])
def test_a_group_on_cuda_takes_the_kernels(monkeypatch, dtype, gathers):
    """By blocks where a build has them; float64, which no CUDA kernel takes, gathers all rows for the reference."""
    from ltood_fast.ops import _backend, _guided_batch

    with FakeTensorMode():
        z = torch.empty(6, 4, dtype=dtype, device="cuda")
    for module in (_backend, _guided_batch):
        monkeypatch.setattr(module, "has_kernel", lambda op, device: device == "cuda" and op.startswith("guided"))
    gathered = []
    monkeypatch.setattr(
        torch.ops.ltood_fast, "gather_batch", lambda **a: gathered.append(a) or (z, z, torch.zeros(6, 2), None, None)
    )
    context = SimpleNamespace(many=True, op="stage2_loss", reduction="mean", exchange="ring", name="0")
    kernel = _backend.use_kernel("stage2_loss", "auto", z, z)
    batch = _guided_batch.batch_of(_guided_batch.Batch(z, z), None, context, kernel, {})
    assert bool(gathered) == gathers
    assert batch.context is (ALONE if gathers else context)


def test_how_many_rows_a_farthest_cluster_holds():
    """Of other images. On a device numbers out of range get here: they belong to no cluster."""
    p = square(300, 3, 3)
    clusters, far = p.x_clusters.clone(), torch.tensor([1, 2, -5, 9])
    clusters[::5] = 3
    clusters[::7], clusters[3::11] = -1, 4
    inputs = SimpleNamespace(contrast=True, clusters=clusters, far=far, instance_ids=p.x_instance, z=p.x)
    layout = SimpleNamespace(first=100, rank=1, sizes=[100, 150, 50], gather=lambda x: x)
    counted = Keys(inputs, layout).others_in_far()
    of_row = Dense(replace(p, x_clusters=clusters, y_clusters=clusters, far=far))
    expected = (of_row.out & (p.x_instance[:, None] != p.x_instance)).sum(1)
    assert counted.tolist() == expected[100:250].tolist()


def test_the_kernel_is_announced():
    assert has_kernel("guided_partial", "cpu")
    assert "guided_partial" not in ltood_fast.build_info()["kernels"]


def test_the_ops_check_what_reaches_them():
    p = case("both parts, the diagonal runs out", torch.float32)
    n = len(p.x)
    every = r"x_every must be contiguous bool of shape \[n\] on the device of x, got bool \[3\] on cpu"
    with pytest.raises(ValueError, match=f"guided_partial: {every}"):
        replace(p, every=torch.ones(3, dtype=torch.bool)).forward()
    with pytest.raises(ValueError, match="guided: k must be at least 0, got -1"):
        replace(p, k=-1).forward()
    with pytest.raises(ValueError, match="guided_partial: clusters must be given of the rows and of the columns"):
        replace(p, x_clusters=None).forward()
    with pytest.raises(ValueError, match="guided_partial_bwd: y_distill must be float64 with a row of 4 for each row"):
        p.lse_bwd((torch.zeros(n, 4).double(), torch.zeros(200, 4).double(), torch.zeros(n, 4).double(), None))

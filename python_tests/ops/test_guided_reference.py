"""The stage 2 references against loops written from the formulas, and every sentence that bad input gets."""

import math
from functools import partial

import numpy as np
import pytest
import torch

import ltood_fast as lt
from ltood_fast.nn import GuidedContrastiveLoss, RelationalDistillLoss, Stage2Loss

RTOL = 1e-10
guided_contrastive = partial(lt.guided_contrastive, backend="reference")
relational_distill = partial(lt.relational_distill, backend="reference")
stage2_loss = partial(lt.stage2_loss, backend="reference")


def unit(x, normalize=True):
    return np.stack([row / max(math.sqrt(sum(v * v for v in row)), 1e-12) if normalize else row for row in x])


def loop_positives(e, k, pos_idx, ids):
    n, positives = len(e), []
    for i in range(n):
        views = {j for j in range(n) if j != i and ids[j] == ids[i]}
        if pos_idx is not None:
            chosen = {int(j) for j in pos_idx[i]} - {-1, i}
        else:
            others = [j for j in range(n) if ids[j] != ids[i]]
            chosen = set(sorted(others, key=lambda j: (-float(e[i] @ e[j]), j))[:k])
        positives.append(views | chosen)
    return positives


def loop_guided(z, guide, clusters, far, tau=0.2, *, k=5, pos_idx=None, weighted=True, gamma=1.0, ids=None, norm=True):
    """(losses, lse, has a positive) of each row."""
    n = len(z)
    ids = [i % (n // 2) for i in range(n)] if ids is None else ids
    z, e = unit(z, norm), unit(guide)
    losses, lses, counted = [], [], []
    for i, positives in enumerate(loop_positives(e, k, pos_idx, ids)):
        rest = [j for j in range(n) if j != i and j not in positives]
        negatives = [j for j in rest if clusters[j] == far[clusters[i]]] or rest
        force = {j: ((1 + e[i] @ e[j]) / 2) ** gamma if weighted else 1.0 for j in positives}
        total = sum(math.exp(z[i] @ z[j] / tau) for j in positives)
        for j in negatives:
            total += (((1 - e[i] @ e[j]) / 2) ** gamma if weighted else 1.0) * math.exp(z[i] @ z[j] / tau)
        lses.append(math.log(total) if total else -math.inf)
        counted.append(sum(force.values()) > 0)
        positive_logit = sum(force[j] * (z[i] @ z[j] / tau - lses[i]) for j in positives)
        losses.append(-positive_logit / sum(force.values()) if counted[i] else 0.0)
    return np.array(losses), np.array(lses), np.array(counted)


def loop_relational(z, guide, tau=0.2, teacher=None, norm=True):
    n, z, e = len(z), unit(z, norm), unit(guide)
    losses, lses = [], []
    for i in range(n):
        others = [j for j in range(n) if j != i]
        q = {j: math.exp(z[i] @ z[j] / tau) for j in others}
        p = {j: math.exp(e[i] @ e[j] / (teacher or tau)) for j in others}
        q_sum, p_sum = sum(q.values()), sum(p.values())
        losses.append(sum(p[j] / p_sum * math.log(p[j] / p_sum * q_sum / q[j]) for j in others))
        lses.append(math.log(q_sum) if others else -math.inf)
    return np.array(losses), np.array(lses)


def problem(n=12, d=5, dg=4, clusters=3):
    """Rows with every cluster used, and a far map without fixed points."""
    z = torch.randn(n, d, dtype=torch.float64)
    guide = torch.randn(n, dg, dtype=torch.float64)
    return z, guide, torch.randint(clusters, (n,)), (torch.arange(clusters) + 1) % clusters


def close(actual, expected):
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=RTOL, atol=1e-13)


CASES = {
    "defaults": {},
    "k=1": {"k": 1},
    "k=n-1": {"k": 11},  # more than there are candidates outside the own instance
    "tau": {"temperature": 0.07},
    "unweighted": {"weighted": False},
    "gamma": {"gamma": 2.5},
    "gamma=0": {"gamma": 0.0},
    "multi-crop": {"instance_ids": torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4, 5])},
    "no views": {"instance_ids": torch.arange(12)},
    "as they are": {"normalize": False},
    "pos_idx": {"pos_idx": torch.randint(-1, 12, (12, 4), generator=torch.Generator().manual_seed(1))},
    "pos_idx of views, self, twice": {"pos_idx": torch.stack([torch.arange(12), (torch.arange(12) + 6) % 12] * 2, 1)},
    "pos_idx of -1": {"pos_idx": torch.full((12, 2), -1)},
    "some without positives": {
        "pos_idx": torch.tensor([[3]] + [[-1]] * 11),
        "instance_ids": torch.tensor([0, 0, *range(2, 12)]),
    },
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_guided_contrastive_is_the_loop(options):
    z, guide, clusters, far = problem()
    rows, lse = guided_contrastive(z, guide, clusters, far, **options, reduction="none", return_lse=True)
    names = {"temperature": "tau", "instance_ids": "ids", "normalize": "norm"}
    plain = {names.get(key, key): v.tolist() if isinstance(v, torch.Tensor) else v for key, v in options.items()}
    losses, lses, counted = loop_guided(z.numpy(), guide.numpy(), clusters.tolist(), far.tolist(), **plain)
    close(rows, losses)
    close(lse, lses)
    close(guided_contrastive(z, guide, clusters, far, **options, reduction="sum"), losses.sum())
    close(guided_contrastive(z, guide, clusters, far, **options), losses.sum() / max(counted.sum(), 1))


@pytest.mark.parametrize(
    ("clusters", "far"),
    [
        ([0] * 12, [0]),  # K = 1: the farthest cluster is the own one
        ([0] * 12, [1, 0]),  # N(i) empty for all: the far cluster has no rows
        ([0] * 11 + [2], [2, 0, 0, 1]),  # one negative, which is a positive of some; an empty and an unused cluster
        (list(range(12)), [*range(1, 12), 0]),  # a cluster a row
        ([1, 0] * 6, [*range(20)][::-1]),  # K > N
    ],
)
def test_guided_contrastive_with_odd_clusters(clusters, far):
    z, guide, _, _ = problem()
    rows = guided_contrastive(z, guide, torch.tensor(clusters), torch.tensor(far), k=2, reduction="none")
    close(rows, loop_guided(z.numpy(), guide.numpy(), clusters, far, k=2)[0])


def test_ties_go_to_the_lower_index():
    z, guide, clusters, far = problem()
    guide = guide[[0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]].contiguous()
    rows = guided_contrastive(z, guide, clusters, far, k=2, reduction="none")
    close(rows, loop_guided(z.numpy(), guide.numpy(), clusters.tolist(), far.tolist(), k=2)[0])


@pytest.mark.parametrize("options", [{}, {"temperature": 0.1, "teacher_temperature": 0.04}, {"normalize": False}])
def test_relational_distill_is_the_loop(options):
    z, guide, _, _ = problem()
    rows, lse = relational_distill(z, guide, **options, reduction="none", return_lse=True)
    arguments = (options.get("temperature", 0.2), options.get("teacher_temperature"), options.get("normalize", True))
    losses, lses = loop_relational(z.numpy(), guide.numpy(), *arguments)
    close(rows, losses)
    close(lse, lses)
    close(relational_distill(z, guide, **options), losses.mean())
    close(relational_distill(z, guide, **options, reduction="sum"), losses.sum())


def test_relational_distill_of_the_guide_itself_is_zero():
    z = torch.randn(9, 4, dtype=torch.float64)
    close(relational_distill(z, 3 * z), 0.0)


def test_feature_distill_is_the_loop():
    z, guide, _, _ = problem(dg=5)
    losses = 1 - (unit(z.numpy()) * unit(guide.numpy())).sum(1)
    close(lt.feature_distill(z, guide, reduction="none"), losses)
    close(lt.feature_distill(z, guide, reduction="sum"), losses.sum())
    close(lt.feature_distill(z, guide), losses.mean())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("distill", ["relational", "feature"])
def test_stage2_loss_is_the_sum_of_its_parts(distill, reduction):
    z, guide, clusters, far = problem(dg=5)
    losses, lse = stage2_loss(
        z, guide, clusters, far, 0.3, beta=0.7, distill=distill, k=2, reduction=reduction, return_lse=True
    )
    rows, lses, _ = loop_guided(z.numpy(), guide.numpy(), clusters.tolist(), far.tolist(), 0.3, k=2)
    relational = loop_relational(z.numpy(), guide.numpy(), 0.3)[0]
    distilled = relational if distill == "relational" else 1 - (unit(z.numpy()) * unit(guide.numpy())).sum(1)
    reduce = {"mean": np.mean, "sum": np.sum, "none": np.array}[reduction]
    close(losses.guided, reduce(rows))
    close(losses.distill, reduce(distilled))
    close(losses.total, reduce(rows) + 0.7 * reduce(distilled))
    close(lse, lses)
    assert losses._fields == ("total", "guided", "distill")


def test_stage2_loss_hands_every_option_on():
    z, guide, clusters, far = problem()
    shared = {"weighted": False, "normalize": False, "instance_ids": torch.arange(12) // 3, "k": 3}
    losses = stage2_loss(z, guide, clusters, far, 0.5, distill=lt.Distill(teacher_temperature=0.1), **shared)
    close(losses.guided, guided_contrastive(z, guide, clusters, far, 0.5, **shared))
    close(losses.distill, relational_distill(z, guide, 0.5, teacher_temperature=0.1, normalize=False))
    options = {"pos_idx": torch.arange(12)[:, None].flip(0), "gamma": 3.0}
    losses = stage2_loss(z, guide, clusters, far, **options)
    close(losses.guided, guided_contrastive(z, guide, clusters, far, **options))


def test_farthest_cluster():
    centroids = torch.randn(7, 3)
    c = unit(centroids.double().numpy())
    expected = [min((j for j in range(7) if j != i), key=lambda j: (c[i] @ c[j], j)) for i in range(7)]
    assert lt.farthest_cluster(centroids).tolist() == expected
    east, west, north = [2.0, 0.0], [-1.0, 0.0], [0.0, 5.0]
    assert lt.farthest_cluster(torch.tensor([north, west, west, east])).tolist() == [1, 3, 3, 1]  # ties: the lower one
    assert lt.farthest_cluster(torch.tensor([north, north])).tolist() == [1, 0]  # never itself
    assert lt.farthest_cluster(torch.tensor([north])).tolist() == [0]  # but for K = 1
    assert lt.farthest_cluster(centroids.bfloat16()).dtype == torch.int64


def test_gradients():
    z, guide, clusters, far = problem(n=8, d=3)
    z.requires_grad_()
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    lone = {"instance_ids": torch.tensor([0, 0, 1, 1, 2, 2, 3, 4]), "pos_idx": torch.tensor([[5], [-1]] * 4)}
    for options in ({"k": 2}, {"k": 2, "normalize": False, "gamma": 2.0}, {**lone, "weighted": False}):

        def guided(z, tau, options=options):
            return guided_contrastive(z, guide, clusters, far, tau, **options, reduction="none", return_lse=True)

        assert torch.autograd.gradcheck(guided, (z, tau))
    for options in ({"teacher_temperature": 0.1}, {"teacher_temperature": 0.3, "normalize": False}):

        def relational(z, tau, options=options):
            return relational_distill(z, guide, tau, **options, reduction="none", return_lse=True)

        assert torch.autograd.gradcheck(relational, (z, tau))
    same_width = torch.randn(8, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: lt.feature_distill(z, same_width), (z,))


def test_only_the_student_and_its_temperature_get_a_gradient():
    z, guide, clusters, far = problem()
    guide.requires_grad_()
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    stage2_loss(z.requires_grad_(), guide, clusters, far, tau).total.backward()
    assert guide.grad is None
    (shared,) = torch.autograd.grad(relational_distill(z, guide, tau), tau)
    (own,) = torch.autograd.grad(relational_distill(z, guide, tau, teacher_temperature=0.2), tau)
    close(shared, own.item())  # the teacher's temperature is a constant even where it is the student's


def test_small_and_degenerate_batches():
    one = {"instance_ids": torch.tensor([7]), "pos_idx": torch.tensor([[-1]])}
    z = torch.randn(1, 3, requires_grad=True)
    loss, lse = guided_contrastive(z, torch.randn(1, 2), torch.tensor([0]), torch.tensor([0]), **one, return_lse=True)
    distilled, distilled_lse = relational_distill(z, torch.randn(1, 2), return_lse=True)
    (loss + distilled).backward()
    assert loss == 0
    assert distilled == 0
    assert lse.item() == distilled_lse.item() == -math.inf
    assert z.grad.eq(0).all()

    z, guide = torch.randn(2, 3), torch.randn(2, 2)
    assert guided_contrastive(z, guide, torch.zeros(2).long(), torch.zeros(1).long(), k=1) == 0  # one view, alone
    assert relational_distill(z, guide) == 0  # one other row: both sides say 1

    guide = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # the only positive has force 0
    assert guided_contrastive(z, guide, torch.zeros(2).long(), torch.zeros(1).long(), k=1) == 0


def test_zero_rows_are_finite_and_nan_is_passed_on():
    z, guide, clusters, far = problem()
    z[3], guide[5] = 0, 0
    rows = guided_contrastive(z, guide, clusters, far, k=2, reduction="none")
    close(rows, loop_guided(z.numpy(), guide.numpy(), clusters.tolist(), far.tolist(), k=2)[0])
    assert relational_distill(z, guide).isfinite()
    z[3, 1] = math.nan
    assert guided_contrastive(z, guide, clusters, far).isnan()
    assert relational_distill(z, guide).isnan()
    z[3], guide[5, 0] = 1.0, math.inf
    assert guided_contrastive(z, guide, clusters, far).isnan()
    assert relational_distill(z, guide).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_and_narrow_inputs_give_a_float32_loss(dtype):
    z, guide, clusters, far = (x.to(dtype) if x.dtype == torch.float64 else x for x in problem(dg=5))
    expected = stage2_loss(z.float(), guide.float(), clusters, far)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = stage2_loss(z, guide, clusters, far)
        feature = lt.feature_distill(z, guide)
    for loss, value in zip(losses, expected, strict=True):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, value, rtol=1e-6, atol=0)
    torch.testing.assert_close(feature, lt.feature_distill(z.float(), guide.float()), rtol=1e-6, atol=0)


def test_modules_are_the_functions():
    z, guide, clusters, far = problem()
    given = {"instance_ids": torch.arange(12) // 2}
    tau = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    module = GuidedContrastiveLoss(tau, k=3, weighted=False, gamma=2.0, normalize=False, reduction="sum")
    options = {"k": 3, "weighted": False, "gamma": 2.0, "normalize": False, "reduction": "sum"}
    close(
        module(z, guide, clusters, far, **given),
        guided_contrastive(z, guide, clusters, far, 0.3, **options, **given),
    )
    assert list(module.parameters()) == [tau]
    distill = RelationalDistillLoss(0.5, teacher_temperature=0.1, reduction="sum")
    close(distill(z, guide), relational_distill(z, guide, 0.5, teacher_temperature=0.1, reduction="sum"))
    options = {"k": 1, "beta": 2.0, "distill": lt.Distill("relational", 0.1)}
    for loss, value in zip(
        Stage2Loss(0.5, **options)(z, guide, clusters, far),
        stage2_loss(z, guide, clusters, far, 0.5, **options),
        strict=True,
    ):
        close(loss, value.item())
    assert "beta=2.0" in repr(Stage2Loss(0.5, **options))


GOOD = {
    "z": torch.ones(6, 3),
    "guide": torch.ones(6, 2),
    "clusters": torch.tensor([0, 1, 0, 1, 0, 1]),
    "far": torch.tensor([1, 0]),
    "k": 2,
}
BAD_SELECTION = [
    ({"z": [[1.0]]}, TypeError, "z must be a tensor, got list"),
    ({"z": torch.ones(6)}, ValueError, r"z must be a matrix \[N, D\], one embedding a row, got shape \(6,\)"),
    ({"z": torch.ones(0, 3)}, ValueError, r"z must be non-empty, got shape \(0, 3\)"),
    ({"z": torch.ones(6, 0)}, ValueError, r"z must be non-empty, got shape \(6, 0\)"),
    ({"z": torch.ones(6, 3, dtype=torch.int32)}, TypeError, "z must be float64, float32, bfloat16 or float16"),
    ({"guide": torch.ones(5, 2)}, ValueError, r"guide must be of 6 rows as z is, got shape \(5, 2\)"),
    ({"guide": torch.ones(6, 2, device="meta")}, ValueError, "guide must be on cpu, the device of z, got meta"),
    ({"clusters": torch.zeros(5).long()}, ValueError, r"clusters must be of shape \[6\], got shape \(5,\)"),
    ({"clusters": torch.zeros(6)}, TypeError, "clusters must be an integer tensor, got torch.float32"),
    ({"clusters": torch.tensor([0, 1, 0, 1, 0, 2])}, ValueError, r"clusters must be in \[0, 2\), got \[0, 2\]"),
    ({"clusters": torch.tensor([0, 1, -1, 1, 0, 1])}, ValueError, r"clusters must be in \[0, 2\), got \[-1, 1\]"),
    ({"far": torch.tensor([2, 0])}, ValueError, r"far must be in \[0, 2\), got \[0, 2\]"),
    ({"far": torch.tensor([]).long()}, ValueError, r"far must be of shape \[K\], K > 0, got shape \(0,\)"),
    ({"far": torch.tensor([[1, 0]])}, ValueError, r"far must be of shape \[K\], K > 0, got shape \(1, 2\)"),
    ({"far": [1, 0]}, TypeError, "far must be an integer tensor, got list"),
    ({"k": 0}, ValueError, r"k must be in \[1, 5\], got 0"),
    ({"k": 6}, ValueError, r"k must be in \[1, 5\], got 6"),
    ({"k": 1.5}, TypeError, "k must be an int, got float"),
    ({"gamma": -1.0}, ValueError, "gamma must be non-negative and finite, got -1.0"),
    ({"pos_idx": torch.zeros(6).long()}, ValueError, r"pos_idx must be of shape \[6, k\], got shape \(6,\)"),
    ({"pos_idx": torch.zeros(5, 2).long()}, ValueError, r"pos_idx must be of shape \[6, k\], got shape \(5, 2\)"),
    ({"pos_idx": torch.full((6, 1), 6)}, ValueError, r"pos_idx must be in \[-1, 6\), got \[6, 6\]"),
    ({"pos_idx": torch.full((6, 1), -2)}, ValueError, r"pos_idx must be in \[-1, 6\), got \[-2, -2\]"),
    ({"pos_idx": torch.ones(6, 1)}, TypeError, "pos_idx must be an integer tensor, got torch.float32"),
    ({"instance_ids": torch.zeros(4).long()}, ValueError, r"instance_ids must be of shape \[6\], got shape \(4,\)"),
    ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
    (
        {"temperature": torch.ones(2)},
        ValueError,
        r"temperature must be a float or a float tensor of one element, got torch.float32 of shape \(2,\)",
    ),
    ({"temperature": torch.tensor(-1.0)}, ValueError, "temperature must be positive and finite, got -1.0"),
    ({"reduction": "max"}, ValueError, "reduction must be one of mean, sum, none, got 'max'"),
    ({"backend": "gpu"}, ValueError, "backend must be one of auto, reference, cpu, cuda, got 'gpu'"),
    ({"backend": "cuda"}, ValueError, "backend='cuda' needs inputs on a cuda device, got cpu"),
]


@pytest.mark.parametrize("function", [lt.guided_contrastive, lt.stage2_loss])
@pytest.mark.parametrize(("change", "error", "sentence"), BAD_SELECTION)
def test_bad_input_gets_its_sentence(function, change, error, sentence):
    with pytest.raises(error, match=f"^{function.__name__}: {sentence}"):
        function(**{**GOOD, **change})


def test_odd_rows_need_instance_ids():
    z, clusters = torch.ones(5, 3), torch.zeros(5).long()
    sentence = "^guided_contrastive: instance_ids must be given when the number of rows is odd .*, got None for 5 rows"
    with pytest.raises(ValueError, match=sentence):
        guided_contrastive(z, z, clusters, torch.tensor([0]), k=1)


BAD_DISTILLATION = [
    (lt.relational_distill, {"teacher_temperature": 0}, ValueError, "teacher_temperature must be positive and finite"),
    (lt.relational_distill, {"teacher_temperature": "a"}, TypeError, "teacher_temperature must be a number, got str"),
    (lt.relational_distill, {"guide": torch.ones(4, 2)}, ValueError, "guide must be of 6 rows as z is"),
    (lt.relational_distill, {"temperature": math.inf}, ValueError, "temperature must be positive and finite, got inf"),
    (lt.feature_distill, {}, ValueError, r"guide must be 3 wide as z is, got shape \(6, 2\)"),
    (lt.feature_distill, {"z": torch.ones(6, 2), "reduction": "x"}, ValueError, "reduction must be one of"),
    (lt.feature_distill, {"z": torch.ones(6, 2), "backend": "cpu"}, RuntimeError, "backend='cpu' was asked for, but"),
]


@pytest.mark.parametrize(("function", "change", "error", "sentence"), BAD_DISTILLATION)
def test_bad_distillation_gets_its_sentence(function, change, error, sentence):
    with pytest.raises(error, match=f"^{function.__name__}: {sentence}"):
        function(**{"z": GOOD["z"], "guide": GOOD["guide"], **change})


def test_bad_stage2_and_centroids_get_their_sentences():
    for change, sentence in (
        ({"beta": -0.1}, "beta must be non-negative and finite, got -0.1"),
        ({"distill": "l2"}, "distill must be one of relational, feature, got 'l2'"),
        ({"distill": "feature"}, r"guide must be 3 wide as z is, got shape \(6, 2\)"),
        ({"distill": lt.Distill("relational", 0)}, "distill.teacher_temperature must be positive and finite, got 0"),
    ):
        with pytest.raises(ValueError, match=f"^stage2_loss: {sentence}"):
            stage2_loss(**{**GOOD, **change})
    for centroids, sentence in (
        (torch.ones(3), "centroids must be a matrix"),
        (torch.ones(0, 3), "centroids must be non-empty"),
        (torch.tensor([[1.0], [math.nan]]), "centroids must be finite, got NaN or Inf"),
    ):
        with pytest.raises(ValueError, match=f"^farthest_cluster: {sentence}"):
            lt.farthest_cluster(centroids)


@pytest.mark.parametrize(
    ("module", "options", "sentence"),
    [
        (GuidedContrastiveLoss, {"temperature": 0.0}, "temperature must be positive"),
        (GuidedContrastiveLoss, {"k": 0}, "k must be at least 1, got 0"),
        (GuidedContrastiveLoss, {"gamma": math.nan}, "gamma must be non-negative and finite"),
        (GuidedContrastiveLoss, {"reduction": "max"}, "reduction must be one of"),
        (RelationalDistillLoss, {"teacher_temperature": 0.0}, "teacher_temperature must be positive"),
        (RelationalDistillLoss, {"backend": "tpu"}, "backend must be one of"),
        (Stage2Loss, {"beta": math.inf}, "beta must be non-negative and finite"),
        (Stage2Loss, {"distill": "both"}, "distill must be one of"),
    ],
)
def test_modules_check_their_hyper_parameters(module, options, sentence):
    with pytest.raises(ValueError, match=f"^{module.__name__}: {sentence}"):
        module(**options)


def test_references_compile_whole():
    z, guide, clusters, far = problem(dg=5)
    z.requires_grad_()

    def both(z, guide, clusters, far):
        losses = stage2_loss(z, guide, clusters, far, k=2, backend="reference")
        return losses.total + lt.feature_distill(z, guide, backend="reference")

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    close(compiled(z, guide, clusters, far), both(z, guide, clusters, far).item())
    (grad,) = torch.autograd.grad(compiled(z, guide, clusters, far), z)
    close(grad, torch.autograd.grad(both(z, guide, clusters, far), z)[0].numpy())

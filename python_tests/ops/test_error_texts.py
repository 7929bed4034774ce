"""Errors say what to do next: the mistakes that users of other libraries make with these ops."""

from __future__ import annotations

import inspect
import re
import time
import warnings

import numpy as np
import pytest
import torch

import ltood_fast as lt
from ltood_fast.ops import _shards
from ltood_fast.ops import cluster_kl as cluster_kl_module
from python_tests.ops import one_call_each as each

N, D = 8, 4


@pytest.fixture
def z():
    return torch.randn(N, D)


@pytest.fixture
def labels():
    return torch.arange(N) % 2


def refused(kind: type[Exception], sentence: str):
    return pytest.raises(kind, match="^" + re.escape(sentence))


VIEWS = "two views? pass torch.cat([z0, z1])"


@pytest.mark.parametrize("op", [lt.nt_xent, lt.psd_loss])
def test_two_views_as_two_arguments_of_a_loss(op, z):
    text = f"temperature must be a float or a float tensor of one element, got torch.float32 of shape (8, 4); {VIEWS}"
    with refused(ValueError, f"{op.__name__}: {text}"):
        op(z, torch.randn(N, D))


@pytest.mark.parametrize(
    ("module", "argument", "integer"),
    [
        (lt.nn.NTXentLoss, "nt_xent: instance_ids", "an integer"),
        (lt.nn.PSDLoss, "psd_loss: instance_ids", "an integer"),
        (lt.nn.SupConLoss, "supcon: labels", "an integer or bool"),
        (lt.nn.DomainLoss, "domain_loss: domain", "an integer or bool"),
        (lt.nn.Stage1Loss, "stage1_loss: domain", "an integer or bool"),
    ],
)
def test_two_views_as_two_arguments_of_a_module(module, argument, integer, z):
    with refused(TypeError, f"{argument} must be {integer} tensor, got torch.float32 of shape (8, 4); {VIEWS}"):
        module()(z, torch.randn(N, D))


FLAGS = [
    (op, argument)
    for op in each.OPS
    for argument, parameter in inspect.signature(getattr(lt, op)).parameters.items()
    if isinstance(parameter.default, bool)
]


@pytest.mark.parametrize(("op", "argument"), FLAGS)
def test_a_flag_that_is_no_bool(op, argument):
    """1 and "no" are true: a result of another shape would surprise far from here."""
    z, others = torch.randn(N, each.D), each.OPS[op].others(N, torch.device("cpu"))
    for value in (1, "no"):
        with refused(TypeError, f"{op}: {argument} must be True or False, got {type(value).__name__}"):
            each.OPS[op].function(z, *others, **{argument: value})


def test_labels_in_place_of_the_temperature(z, labels):
    with pytest.raises(
        ValueError, match=r"got torch.int64 of shape \(8,\); ids of images\? pass instance_ids=; labels"
    ):
        lt.nt_xent(z, labels)


def test_a_mask_is_as_good_as_labels(z, labels):
    mask = labels.bool()
    bank = torch.randn(5, D)
    for backend in ("auto", "reference"):
        assert torch.equal(lt.supcon(z, mask, backend=backend), lt.supcon(z, labels, backend=backend))
        assert torch.equal(lt.domain_loss(z, mask, backend=backend), lt.domain_loss(z, labels, backend=backend))
        assert torch.equal(
            lt.stage1_loss(z, mask, backend=backend).total, lt.stage1_loss(z, labels, backend=backend).total
        )
        assert torch.equal(lt.psd_loss(z, domain=mask, backend=backend), lt.psd_loss(z, domain=labels, backend=backend))
        head = {"kind": "bce", "weight": torch.ones(D), "bias": torch.zeros(()), "backend": backend}
        assert torch.equal(lt.domain_loss(z, mask, **head), lt.domain_loss(z, labels, **head))
        by_mask, by_number = (
            lt.psd_loss(z, domain=d, bank=lt.Bank(bank, domain=b), backend=backend)
            for d, b in ((mask, mask[:5]), (labels, labels[:5]))
        )
        assert torch.equal(by_mask, by_number)


def test_a_mask_is_no_index(z, labels):
    with refused(TypeError, "nt_xent: instance_ids must be an integer tensor, got torch.bool"):
        lt.nt_xent(z, instance_ids=labels.bool())


def test_views_as_a_third_dimension(labels):
    z = torch.randn(N, 2, D)
    hint = "got shape (8, 2, 4); of V views of B images, [B, V, D], pass z.flatten(0, 1), with instance_ids="
    with refused(ValueError, f"nt_xent: z must be a matrix [N, D], one embedding a row, {hint}"):
        lt.nt_xent(z)
    ids = torch.arange(N).repeat_interleave(2)  # as the sentence says
    expected = lt.nt_xent(torch.cat([z[:, 0], z[:, 1]]))
    torch.testing.assert_close(lt.nt_xent(z.flatten(0, 1), instance_ids=ids), expected)
    with pytest.raises(ValueError, match=r"and labels.repeat_interleave\(V\) for labels$"):
        lt.supcon(z, labels)


@pytest.mark.parametrize("views", [list, tuple])
def test_views_as_a_list(z, views):
    with refused(TypeError, f"nt_xent: z must be a tensor, got {views.__name__}; join tensors by torch.cat(z)"):
        lt.nt_xent(views([z, z]))


def test_labels_as_a_list(z, labels):
    sentence = "supcon: labels must be an integer or bool tensor, got list; pass torch.as_tensor(labels)"
    with refused(TypeError, sentence):
        lt.supcon(z, labels.tolist())
    with pytest.raises(TypeError, match=r"got ndarray; pass torch.as_tensor\(labels\)"):
        lt.supcon(z, labels.numpy())


TEMPERATURES = {
    "np.float32": np.float32(0.25),
    "np.float64": np.float64(0.25),
    "one element": torch.tensor([0.25]),
    "a Parameter": torch.nn.Parameter(torch.tensor([0.25])),
    "one float64 element": torch.tensor([0.25], dtype=torch.float64),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("temperature", TEMPERATURES.values(), ids=TEMPERATURES)
def test_any_single_number_is_a_temperature(temperature, backend, z, labels):
    guide, far = torch.randn(N, D), torch.tensor([1, 0])
    calls = (
        lambda t: lt.nt_xent(z, t, backend=backend),
        lambda t: lt.supcon(z, labels, t, backend=backend),
        lambda t: lt.psd_loss(z, t, backend=backend),
        lambda t: lt.stage1_loss(z, labels, t, backend=backend).total,
        lambda t: lt.guided_contrastive(z, guide, labels, far, t, k=2, backend=backend),
        lambda t: lt.relational_distill(z, guide, t, teacher_temperature=0.25, backend=backend),
        lambda t: lt.stage2_loss(z, guide, labels, far, t, k=2, backend=backend).total,
        lambda t: lt.nn.NTXentLoss(t, backend=backend)(z),
    )
    for call in calls:
        torch.testing.assert_close(call(temperature), call(0.25))


def test_a_temperature_of_one_element_gets_its_gradient(z):
    learned, number = (torch.nn.Parameter(torch.full(shape, 0.25)) for shape in ((1,), ()))
    module = lt.nn.NTXentLoss(learned)
    assert [name for name, _ in module.named_parameters()] == ["temperature"]
    module(z).backward()
    lt.nt_xent(z, number).backward()
    assert torch.equal(learned.grad, number.grad.view(1))
    assert "parameter 0.25" in repr(module)


def test_numpy_numbers_are_numbers(z, labels):
    half = np.float32(0.5)
    guide, far = torch.randn(N, D), torch.tensor([1, 0])
    for x in (half, 0.5):
        distill = lt.Distill("relational", x)
        losses = (
            lt.psd_loss(z, neighbor_weight=x),
            lt.stage1_loss(z, labels, alpha=x).total,
            lt.stage2_loss(z, guide, labels, far, k=2, beta=x, gamma=x, distill=distill).total,
            lt.relational_distill(z, guide, teacher_temperature=x),
            lt.cluster_kl(z, guide[:3], nu=x),
            lt.refine_centroids(z, guide[:3], nu=x, lr=x, tol=x, steps=2)[0].sum(),
        )
        if x is half:
            by_numpy = losses
    assert all(torch.equal(a, b) for a, b in zip(by_numpy, losses, strict=True))


@pytest.mark.parametrize("temperature", [True, "0.1", None, [0.1]])
def test_what_is_no_number_is_no_temperature(temperature, z):
    with pytest.raises(TypeError, match="^nt_xent: temperature must be a number, got "):
        lt.nt_xent(z, temperature)


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_sparse_input(layout, z, labels):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CSR is in beta
        sparse = getattr(z, layout)()
    for call in (
        lambda: lt.nt_xent(sparse),
        lambda: lt.supcon(sparse, labels),
        lambda: lt.relational_distill(sparse, z),
        lambda: lt.cluster_kl(sparse, z[:2]),
    ):
        with pytest.raises(TypeError, match=rf": z must be a dense tensor, got {sparse.layout}; pass z.to_dense\(\)$"):
            call()
    with refused(TypeError, "supcon: labels must be a dense tensor, got torch.sparse_coo; pass labels.to_dense()"):
        lt.supcon(z, labels.to_sparse())


def test_missing_labels_are_named_with_the_way_to_renumber(z):
    labels = torch.tensor([0, 2, 2, 5, 0, 2, 5, 5])
    sentence = (
        "cluster_tailness: assignments must be in [0, 3), got [0, 5] without 1, 3, 4; renumber them by "
        "torch.unique(assignments, return_inverse=True)[1]"
    )
    with refused(ValueError, sentence):
        lt.cluster_tailness(z, labels, 3, k=2)
    renumbered = torch.unique(labels, return_inverse=True)[1]
    assert lt.cluster_tailness(z, renumbered, 3, k=2).isfinite().all()
    with pytest.raises(ValueError, match="clusters must be in .* without 1, 3, 4; renumber them by torch.unique"):
        lt.guided_contrastive(z, z, labels, torch.tensor([1, 2, 0]), k=2)


def test_labels_far_apart_name_the_first_gaps(z):
    labels = torch.tensor([0] * 4 + [900_000] * 4)
    started = time.perf_counter()
    with pytest.raises(ValueError, match=r"got \[0, 900000\] without 1, 2, 3, 4, 5, \.\.\.; renumber"):
        lt.cluster_tailness(z, labels, 2, k=2)
    assert time.perf_counter() - started < 1


def test_more_classes_than_allowed_are_counted(z):
    with pytest.raises(ValueError, match=r"must be in \[0, 2\), got \[0, 3\], 4 different ones$"):
        lt.cluster_tailness(z, torch.arange(N) % 4, 2, k=2)
    with pytest.raises(ValueError, match=r"got \[-1, 1\]$"):  # a negative label is no gap
        lt.cluster_tailness(z, torch.arange(N) % 3 - 1, 3, k=2)


def test_a_million_clusters_are_answered_at_once(z, labels):
    started = time.perf_counter()
    tailness = lt.cluster_tailness(z, labels * 999_999, 1_000_000, k=2)
    assert time.perf_counter() - started < 1
    expected = lt.cluster_tailness(z, labels, 2, k=2)
    assert torch.equal(tailness[[0, 999_999]], expected)
    assert int(tailness.isnan().sum()) == 999_998


def test_centroids_are_not_hashed_without_a_group(z, monkeypatch):
    def hashed(x):
        raise AssertionError("hashed")

    monkeypatch.setattr(cluster_kl_module, "fingerprint", hashed, raising=False)
    lt.refine_centroids(z, z[:2], steps=2)


def test_centroids_with_the_negative_bit(z):
    negative = torch._neg_view(torch.randn(3, D))
    assert negative.is_neg()
    assert negative.is_contiguous()
    expected = lt.refine_centroids(z, negative.resolve_neg(), steps=2)
    for got, want in zip(lt.refine_centroids(z, negative, steps=2), expected, strict=True):
        assert torch.equal(got, want)
    assert _shards.fingerprint(negative) == _shards.fingerprint(negative.resolve_neg())
    candidates, tailness = torch.randn(20, D), torch.rand(3)
    assert torch.equal(
        lt.sample_ood(candidates, negative, tailness, 5)[0],
        lt.sample_ood(candidates, negative.resolve_neg(), tailness, 5)[0],
    )


REFERENCES = (
    "clip_loss", "cluster_kl", "cluster_tailness", "domain_loss", "farthest_cluster", "feature_distill",
    "guided_contrastive", "info_nce", "knn", "knn_density", "nt_xent", "psd_loss", "refine_centroids",
    "relational_distill", "sample_ood", "sigmoid_loss", "stage1_loss", "stage2_loss", "supcon",
)  # fmt: skip


@pytest.mark.parametrize("name", REFERENCES)
def test_every_op_has_its_reference(name):
    import ltood_fast.reference

    assert callable(getattr(ltood_fast.reference, name))
    assert hasattr(lt, name)
    assert name in ltood_fast.reference.__all__


def test_the_reference_is_the_definition(z):
    assert torch.equal(lt.reference.nt_xent(z, 0.2), lt.nt_xent(z, 0.2, backend="reference"))
    assert torch.equal(lt.reference.knn(z, 2)[1], lt.knn(z, 2)[1])


WRONG_TYPES = {
    "nt_xent: normalize must be True or False, got int": lambda z: lt.nt_xent(z, normalize=1),
    "nt_xent: decoupled must be True or False, got str": lambda z: lt.nt_xent(z, decoupled="yes"),
    "stage1_loss: same_domain must be True or False, got int": lambda z: lt.stage1_loss(z, z[:, 0] > 0, same_domain=1),
    "NTXentLoss: decoupled must be True or False, got int": lambda z: lt.nn.NTXentLoss(decoupled=1),
    "sample_ood: generator must be a torch.Generator or None, got int": lambda z: lt.sample_ood(
        z, z, torch.rand(N), 3, generator=3
    ),
    "cluster_tailness: density must be a float tensor, as knn_density returns, got list": lambda z: lt.cluster_tailness(
        z, torch.zeros(N).long(), 2, density=[1.0]
    ),
}
WRONG_VALUES = {
    "nt_xent: temperature must be positive and finite, got nan": lambda z: lt.nt_xent(z, torch.tensor(torch.nan)),
    "cluster_tailness: density must be of shape [8], got shape (7,)": lambda z: lt.cluster_tailness(
        z, torch.zeros(N).long(), 2, density=torch.rand(7)
    ),
    "Stage1Loss: alpha must be non-negative and finite, got -1": lambda z: lt.nn.Stage1Loss(alpha=-1),
    "ClusterKL: nu must be positive and finite, got -1": lambda z: lt.nn.ClusterKL(z, nu=-1),
}


@pytest.mark.parametrize("sentence", WRONG_TYPES)
def test_a_wrong_type_gets_its_sentence(sentence, z):
    with refused(TypeError, sentence):
        WRONG_TYPES[sentence](z)


@pytest.mark.parametrize("sentence", WRONG_VALUES)
def test_a_wrong_value_gets_its_sentence(sentence, z):
    with refused(ValueError, sentence):
        WRONG_VALUES[sentence](z)

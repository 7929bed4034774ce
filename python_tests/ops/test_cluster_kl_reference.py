"""reference.cluster_kl against a loop-by-loop NumPy version, and what the public functions do with bad input."""

import math

import numpy as np
import pytest
import torch

import ltood_fast
from ltood_fast import nn
from ltood_fast.reference import clustering as reference


def unit(rows):
    return np.array([row / max(np.sqrt(sum(v * v for v in row)), 1e-12) for row in rows])


def loops_q(z, mu, nu):
    """q [N, K], one number at a time."""
    q = np.zeros((len(z), len(mu)))
    for i, zi in enumerate(z):
        for j, mj in enumerate(mu):
            q[i, j] = (1 + sum((a - b) ** 2 for a, b in zip(zi, mj, strict=True)) / nu) ** (-(nu + 1) / 2)
        q[i] /= q[i].sum()
    return q


def loops_target(q):
    n, k = q.shape
    f = [sum(q[i, j] for i in range(n)) for j in range(k)]
    p = np.array([[q[i, j] ** 2 / f[j] for j in range(k)] for i in range(n)])
    return np.array([row / row.sum() for row in p])


def loops_kl(q, p):
    """Loss a row."""
    n, k = q.shape
    return np.array([sum(p[i, j] * math.log(p[i, j] / q[i, j]) for j in range(k)) for i in range(n)])


def tiny(n=7, k=3, d=4):
    return torch.randn(n, d, dtype=torch.float64), torch.randn(k, d, dtype=torch.float64)


@pytest.mark.parametrize("nu", [1.0, 0.5, 7.0])
@pytest.mark.parametrize("normalize", [False, True])
def test_loss_and_assignment_match_the_loops(nu, normalize):
    z, mu = tiny()
    q = loops_q(*(unit(a.numpy()) if normalize else a.numpy() for a in (z, mu)), nu)
    rows = loops_kl(q, loops_target(q))
    for reduction, expected in {"none": rows, "sum": rows.sum(), "mean": rows.mean()}.items():
        loss, got_q = ltood_fast.cluster_kl(
            z, mu, nu=nu, normalize=normalize, reduction=reduction, return_q=True, backend="reference"
        )
        np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-10)
        np.testing.assert_allclose(got_q.numpy(), q, rtol=1e-10)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradient_is_that_of_a_constant_target(normalize):
    """Central differences of the loop version, with the target held at the start point."""
    z, mu = tiny(n=5)
    prepare = unit if normalize else np.asarray
    target = loops_target(loops_q(prepare(z.numpy()), prepare(mu.numpy()), 1.0))

    def loss(z, mu):
        return loops_kl(loops_q(prepare(z), prepare(mu), 1.0), target).mean()

    leaves = [z.clone().requires_grad_(), mu.clone().requires_grad_()]
    reference.cluster_kl(*leaves, normalize=normalize).backward()
    for which, leaf in enumerate(leaves):
        numeric = np.zeros(leaf.shape)
        for place in np.ndindex(*leaf.shape):
            values = []
            for step in (1e-5, -1e-5):
                moved = [z.numpy().copy(), mu.numpy().copy()]
                moved[which][place] += step
                values.append(loss(*moved))
            numeric[place] = (values[0] - values[1]) / 2e-5
        np.testing.assert_allclose(leaf.grad.numpy(), numeric, atol=1e-8)


def test_equal_distances_give_zero_loss():
    """Closed form: a row as far from every centroid has q = 1/K; with all rows so, p = q."""
    mu = torch.eye(4, dtype=torch.float64)
    z = torch.full((6, 4), 0.25, dtype=torch.float64, requires_grad=True)
    loss = reference.cluster_kl(z, mu)
    assert abs(loss.item()) < 1e-15
    loss.backward()
    assert z.grad.abs().max() < 1e-15


def test_common_offset_does_not_cost_accuracy():
    z, mu = tiny()
    offset = torch.full((4,), 1e3)
    mu[1] = -1e3  # a far centroid must not move the origin away from the others
    near = reference.cluster_kl(z.float() + offset, mu.float() + offset)
    assert torch.allclose(near.double(), reference.cluster_kl(z, mu), rtol=2e-3)


def test_a_cluster_that_no_row_is_near_stays_finite():
    z, mu = tiny()
    mu[1] = 1e6
    for dtype in (torch.float64, torch.float32):
        leaves = [a.to(dtype, copy=True).requires_grad_() for a in (z, mu)]
        loss = reference.cluster_kl(*leaves, nu=30.0)
        loss.backward()
        assert loss.isfinite()
        assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_dtypes():
    z, mu = tiny()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        leaves = [z.to(dtype).requires_grad_(), mu.to(dtype).requires_grad_()]
        loss = reference.cluster_kl(*leaves)
        loss.backward()
        assert loss.dtype == torch.float32
        assert [leaf.grad.dtype for leaf in leaves] == [dtype, dtype]
    assert reference.cluster_kl(z.bfloat16(), mu.float()).dtype == torch.float32
    assert reference.cluster_kl(z.float(), mu).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reference.cluster_kl(z.float(), mu.float()), reference.cluster_kl(z.float(), mu.float()))


def test_refine_centroids_is_gradient_descent():
    z, mu = tiny(n=20)
    start = mu.clone()
    by_hand = mu.clone().requires_grad_()
    for _ in range(5):
        (gradient,) = torch.autograd.grad(reference.cluster_kl(z, by_hand, nu=2.0), by_hand)
        by_hand = (by_hand - 0.7 * gradient).detach().requires_grad_()
    refined, assignments = ltood_fast.refine_centroids(z, mu, nu=2.0, steps=5, lr=0.7, tol=0.0, backend="reference")
    assert torch.allclose(refined, by_hand, rtol=1e-12)
    assert torch.equal(mu, start)
    assert assignments.tolist() == loops_q(z.numpy(), refined.numpy(), 2.0).argmax(1).tolist()
    assert not refined.requires_grad


def test_refine_centroids_stops_when_few_assignments_move():
    z, mu = tiny(n=50)
    once, _ = ltood_fast.refine_centroids(z, mu, steps=1, tol=0.0, backend="reference")
    stopped, _ = ltood_fast.refine_centroids(z, mu, steps=100, lr=0.1, tol=1.0, backend="reference")
    assert torch.equal(stopped, once)  # fewer than all of the assignments moved by the second look
    ten, _ = ltood_fast.refine_centroids(z, mu, steps=10, tol=0.0, backend="reference")
    assert not torch.equal(ten, once)


def test_module():
    z, mu = tiny()
    module = nn.ClusterKL(mu, nu=2.0, normalize=True, reduction="sum", return_q=True)
    loss, q = module(z)
    expected, expected_q = ltood_fast.cluster_kl(z, mu, nu=2.0, normalize=True, reduction="sum", return_q=True)
    assert torch.equal(loss, expected)
    assert torch.equal(q, expected_q)
    loss.backward()
    assert module.centroids.grad.abs().sum() > 0
    assert module.centroids is not mu
    assert repr(module) == "ClusterKL(n_clusters=3, dim=4, nu=2.0, normalize=True, reduction='sum')"


GOOD = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"z": [1.0]}, TypeError, "z must be a tensor, got list"),
        ({"z": GOOD.int()}, TypeError, "z must be float64, float32, bfloat16 or float16, got torch.int32"),
        ({"z": GOOD[0]}, ValueError, "z must be a matrix [N, D], one embedding a row, got shape (3,)"),
        ({"z": GOOD[:0]}, ValueError, "z must be non-empty, got shape (0, 3)"),
        ({"centroids": GOOD[:, :2]}, ValueError, "centroids must be 3 wide as z is, got shape (4, 2)"),
        ({"centroids": GOOD[:0]}, ValueError, "centroids must be non-empty, got shape (0, 3)"),
        ({"centroids": GOOD.to("meta")}, ValueError, "centroids must be on cpu, the device of z, got meta"),
        ({"nu": 0.0}, ValueError, "nu must be positive and finite, got 0.0"),
        ({"nu": "1"}, TypeError, "nu must be a number, got str"),
        ({"backend": "gpu"}, ValueError, "backend must be one of auto, reference, cpu, cuda, got 'gpu'"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' needs inputs on a cuda device, got cpu"),
    ],
)
@pytest.mark.parametrize("function", ["cluster_kl", "refine_centroids"])
def test_bad_input(function, arguments, error, sentence):
    with pytest.raises(error) as raised:
        getattr(ltood_fast, function)(**{"z": GOOD, "centroids": GOOD, **arguments})
    assert str(raised.value) == f"{function}: {sentence}"


@pytest.mark.parametrize(
    ("function", "arguments", "sentence"),
    [
        ("cluster_kl", {"reduction": "max"}, "reduction must be one of mean, sum, none, got 'max'"),
        ("refine_centroids", {"steps": 0}, "steps must be at least 1, got 0"),
        ("refine_centroids", {"lr": -1.0}, "lr must be positive and finite, got -1.0"),
        ("refine_centroids", {"tol": -1.0}, "tol must be non-negative and finite, got -1.0"),
    ],
)
def test_bad_options(function, arguments, sentence):
    with pytest.raises(ValueError, match=".") as raised:
        getattr(ltood_fast, function)(GOOD, GOOD, **arguments)
    assert str(raised.value) == f"{function}: {sentence}"

"""The kernels of cluster_kl, executed, against the formulas in float64 on the same rounded rows."""

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from python_tests.cuda_sim.structs import ELEMENT_TYPES, Operand, bf16_values, check, prepare
from python_tests.tolerances import GRADIENT, LOSS

SOURCES = (
    "csrc/ops/cluster_kl/cuda/launch.cu",
    "csrc/ops/cluster_kl/cuda/bwd_launch.cu",
    "csrc/cuda/operand.cu",
)
SHARE = {"float32": 1 / 8, "bfloat16": 1 / 1024, "float16": 1 / 1024}  # as in cluster_kl/cuda/glue.cpp


class ClusterDistances(ctypes.Structure):
    _fields_ = [
        ("z", Operand), ("mu", Operand), ("z_squares", c_void_p), ("mu_squares", c_void_p), ("z_rows", c_void_p),
        ("mu_rows", c_void_p), ("type", c_int), ("d", c_int), ("nu", c_float), ("share", c_float),
    ]  # fmt: skip


class ClusterKlParams(ctypes.Structure):
    _fields_ = [
        ("inputs", ClusterDistances), ("loss", c_void_p), ("mass", c_void_p), ("stats", c_void_p),
        ("distances", c_void_p), ("cached_rows", c_int64), ("q", c_void_p), ("assignments", c_void_p),
        ("workspace", c_void_p),
    ]  # fmt: skip


class ClusterKlBwdParams(ctypes.Structure):
    _fields_ = [
        ("inputs", ClusterDistances), ("grad_loss", c_void_p), ("mass", c_void_p), ("stats", c_void_p),
        ("origin", c_void_p), ("z_splits", Operand), ("mu_splits", Operand), ("weight_splits", c_int),
        ("grad_z", c_void_p), ("grad_mu", c_void_p), ("chunk_rows", c_int), ("workspace", c_void_p),
    ]  # fmt: skip


@dataclass
class Problem:
    """Rows and centroids on the device, prepared as the torch glue prepares them."""

    dev: object
    kind: str
    nu: float
    z: np.ndarray
    mu: np.ndarray

    def __post_init__(self):
        self.origin = None
        if self.kind == "float32":
            self.origin = self.dev.put(np.median(self.mu, axis=0).astype(np.float32))
        self.rows, self.centroids = (self._operand(x) for x in (self.z, self.mu))
        self.z, self.mu = self.rows.rows, self.centroids.rows
        self.inputs = ClusterDistances(
            self.rows.operand, self.centroids.operand, self.rows.squares.ptr, self.centroids.squares.ptr,
            self.rows.given.ptr, self.centroids.given.ptr, ELEMENT_TYPES[self.rows.given.dtype], self.z.shape[1],
            self.nu, SHARE[self.kind],
        )  # fmt: skip

    def _operand(self, x, **options):
        options = {"half": True, **options}
        return prepare(self.dev, x, self.kind, normalize=False, origin=self.origin, **options)

    def _workspace(self, name, params):
        size = self.dev.call(name, params, restype=c_int64)
        assert size > 0
        self.workspace_bytes = size
        return self.dev.empty(size, np.uint8).ptr

    def forward(self, cached_rows=0):
        n, k, dev = len(self.z), len(self.mu), self.dev
        self.mass, self.stats = dev.empty(k), dev.empty((4, n))
        loss, q, assignments = dev.empty(n), dev.empty((n, k)), dev.empty(n, np.int64)
        distances = dev.empty((cached_rows, k))
        params = ClusterKlParams(
            self.inputs, loss.ptr, self.mass.ptr, self.stats.ptr, distances.ptr, cached_rows, q.ptr, assignments.ptr
        )  # fmt: skip
        params.workspace = self._workspace("ltood_cluster_kl_workspace", params)
        check(dev, dev.call("ltood_launch_cluster_kl", params, None))
        return {
            "loss": dev.get(loss), "mass": dev.get(self.mass), "q": dev.get(q), "assignments": dev.get(assignments),
            "distances": dev.get(distances),
        }  # fmt: skip

    def backward(self, grad_loss, chunk_rows=None, need_z=True, need_mu=True):
        dev, shape = self.dev, self.z.shape
        z_splits, mu_splits = (self._operand(x, half=False, unscaled=True) for x in (self.z, self.mu))
        grad_z = dev.empty(shape, self.rows.given.dtype) if need_z else None
        grad_mu = dev.empty(self.mu.shape) if need_mu else None
        splits = 2 if self.kind == "float32" else 1
        if chunk_rows is None:
            chunk_rows = dev.call("ltood_cluster_kl_chunk_rows", shape[0], len(self.mu), splits)
        params = ClusterKlBwdParams(
            self.inputs, dev.put(grad_loss.astype(np.float32)).ptr, self.mass.ptr, self.stats.ptr,
            self.origin and self.origin.ptr, z_splits.operand, mu_splits.operand, splits, grad_z and grad_z.ptr,
            grad_mu and grad_mu.ptr, chunk_rows,
        )  # fmt: skip
        params.workspace = self._workspace("ltood_cluster_kl_bwd_workspace", params)
        check(dev, dev.call("ltood_launch_cluster_kl_bwd", params, None))
        got_z = dev.get(grad_z) if need_z else None
        if need_z and self.kind == "bfloat16":
            got_z = bf16_values(got_z)
        return got_z, dev.get(grad_mu) if need_mu else None


def expected(z, mu, nu, grad_loss):
    """Everything in float64 from the formulas of the kernel's header."""
    d = ((z[:, None] - mu[None]) ** 2).sum(2)
    log_e = -(nu + 1) / 2 * np.log1p(d / nu)
    e = np.exp(log_e - log_e.max(1, keepdims=True))
    q = e / e.sum(1, keepdims=True)
    mass = q.sum(0)
    p = q * (q / mass)
    p /= p.sum(1, keepdims=True)
    loss = np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(p > 0, q, 1)), 0).sum(1)
    w = -2 * grad_loss[:, None] * (p - q) * (nu + 1) / 2 / (nu + d)
    grad_z = w @ mu - w.sum(1)[:, None] * z
    grad_mu = w.T @ z - w.sum(0)[:, None] * mu
    return {"d": d, "q": q, "mass": mass, "loss": loss, "grad_z": grad_z, "grad_mu": grad_mu}


def tolerance(table, kind):
    return table[getattr(torch, kind)]


def error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def run(simulate, kind, z, mu, nu=1.0, sm_count=1, **options):
    """Forward and backward, each against the formulas."""
    problem = Problem(simulate(*SOURCES, seed=1, sm_count=sm_count), kind, nu, z, mu)
    grad_loss = np.random.default_rng(9).uniform(0.5, 1.5, len(z))
    want = expected(problem.z, problem.mu, nu, grad_loss.astype(np.float32).astype(np.float64))
    got = problem.forward(cached_rows=len(z) // 2)
    assert error(got["loss"], want["loss"]) <= tolerance(LOSS, kind)
    assert error(got["q"], want["q"]) <= tolerance(LOSS, kind)
    assert error(got["mass"], want["mass"]) <= tolerance(LOSS, kind)
    assert error(got["distances"], want["d"][: len(z) // 2]) <= tolerance(LOSS, kind)
    ranked = np.take_along_axis(want["d"], got["assignments"][:, None], 1)[:, 0]
    assert np.allclose(ranked, want["d"].min(1), rtol=1e-4)
    grad_z, grad_mu = problem.backward(grad_loss, **options)
    assert error(grad_z, want["grad_z"]) <= tolerance(GRADIENT, kind)
    assert error(grad_mu, want["grad_mu"]) <= tolerance(GRADIENT, kind)
    return problem, got, (grad_z, grad_mu)


def inputs(n, k, d, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return scale * rng.standard_normal((n, d)), scale * rng.standard_normal((k, d))


@pytest.mark.parametrize(
    ("kind", "n", "k", "d", "chunk_rows"),
    [
        ("float32", 260, 130, 17, 128),  # three blocks of rows, three tiles of centroids, three chunks
        ("float32", 40, 20, 257, None),  # rows do not fit: streamed
        ("bfloat16", 140, 140, 100, None),  # one chunk
        ("float16", 140, 130, 64, 128),  # float16 rows are weighed in two bfloat16 splits
        ("float32", 1, 1, 1, None),  # everything is one
    ],
)
def test_matches_the_formulas(simulate, kind, n, k, d, chunk_rows):
    if (n, k) == (1, 1):
        problem = Problem(simulate(*SOURCES), kind, 1.0, *inputs(n, k, d))
        assert problem.forward()["loss"] == 0
        return
    run(simulate, kind, *inputs(n, k, d), chunk_rows=chunk_rows)


@pytest.mark.parametrize("nu", [0.3, 50.0])
def test_degrees_of_freedom(simulate, nu):
    run(simulate, "float32", *inputs(50, 20, 9, scale=0.5), nu=nu)


def test_splits_and_groups(simulate):
    """Many multiprocessors: the columns of the weights in ranges, the rows of the chunk, eight steps, in k_splits."""
    problem, *_ = run(simulate, "bfloat16", *inputs(400, 70, 5), sm_count=40)
    weights, sums = 512 * 128 * 2, 70 * (5 + 1) * 4
    assert problem.workspace_bytes == weights + 2 * sums


def test_tight_clusters_far_from_the_origin(simulate):
    """Distances of 1 between norms of 50. The gradient is a difference of sums that keep 16 bits of the rows."""
    rng = np.random.default_rng(3)
    mu = rng.standard_normal((6, 32))
    mu *= 50 / np.linalg.norm(mu, axis=1, keepdims=True)
    z = mu[np.arange(60) % 6] + 0.2 * rng.standard_normal((60, 32))
    problem = Problem(simulate(*SOURCES, seed=1), "float32", 1.0, z, mu)
    want = expected(problem.z, problem.mu, 1.0, np.ones(len(z)))
    assert error(problem.forward()["loss"], want["loss"]) <= tolerance(LOSS, "float32")
    grad_z, _ = problem.backward(np.ones(len(z)))
    assert error(grad_z, want["grad_z"]) <= 20 * tolerance(GRADIENT, "float32")


def test_rows_that_are_nearly_certain(simulate):
    """q = 1 - 1e-7 for the nearest centroid: p - q must not be a difference of numbers near 1."""
    rng = np.random.default_rng(4)
    mu = rng.standard_normal((6, 32))
    mu *= 5 / np.linalg.norm(mu, axis=1, keepdims=True)
    _, got, _ = run(simulate, "float32", mu[np.arange(60) % 6] + 0.1 * rng.standard_normal((60, 32)), mu, nu=50.0)
    assert np.median(1 - got["q"].max(1)) < 1e-6


def test_far_centroid_and_duplicates(simulate):
    z, mu = inputs(50, 5, 16)
    mu[2], mu[4], z[7] = 1e6, mu[1], mu[1]
    run(simulate, "float32", z, mu)


@pytest.mark.parametrize("nu", [1.0, 3.0])
@pytest.mark.parametrize("where", ["z", "mu"])
def test_broken_values_show(simulate, nu, where):
    z, mu = inputs(40, 3, 5)
    (z if where == "z" else mu)[1, 2] = np.nan if where == "z" else np.inf
    problem = Problem(simulate(*SOURCES, seed=1), "float32", nu, z, mu)
    assert np.isnan(problem.forward()["loss"]).all()
    for gradient in problem.backward(np.ones(40)):
        assert np.isnan(gradient).all()


def test_one_gradient_at_a_time(simulate):
    problem, _, both = run(simulate, "float32", *inputs(40, 6, 10))
    grad_z, nothing = problem.backward(np.random.default_rng(9).uniform(0.5, 1.5, 40), need_mu=False)
    assert nothing is None
    assert np.array_equal(grad_z, both[0])
    nothing, grad_mu = problem.backward(np.random.default_rng(9).uniform(0.5, 1.5, 40), need_z=False)
    assert nothing is None
    assert np.array_equal(grad_mu, both[1])

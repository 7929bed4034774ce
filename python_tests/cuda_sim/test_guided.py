"""The guided family's CUDA kernels, executed, against the float64 reference: losses, gradients, and what is read."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ltood_fast.reference import guided as reference
from python_tests.cuda_sim.guided_run import COLUMNS, ROWS, SOURCES, GuidedRun, Problem
from python_tests.tolerances import GRADIENT, LOSS

DIFFERENTIABLE = ("loss", "lse", "kl", "student_lse")


def problem(n=270, d=64, dg=64, clusters=5, k=2, **options) -> Problem:
    """Rows around as many centres as there are clusters; half of the neighbours are -1."""
    rng = np.random.default_rng(n + d + dg)
    z, guide = (rng.standard_normal((n, width)).astype(np.float32) for width in (d, dg))
    if not clusters:
        return Problem(z, guide, **options)
    members = rng.integers(0, clusters, n)
    guide += 2 * rng.standard_normal((clusters, dg)).astype(np.float32)[members]
    pos_idx = np.where(rng.random((n, k)) < 0.5, -1, rng.integers(0, n, (n, k)))
    chosen = {"clusters": members, "far": (np.arange(clusters) + 1) % clusters, "pos_idx": pos_idx}
    return Problem(z, guide, **(chosen | options))


def tensor(array):
    return None if array is None else torch.from_numpy(np.asarray(array))


def expected(x: Problem, gradients: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray, float]:
    """(outputs by name, dL/dz, dL/dtemperature) of the reference for the rows that the device reads."""
    z, guide = (tensor(rows) for rows in x.rounded())
    z.requires_grad_()
    tau = torch.tensor(x.temperature, dtype=torch.float64, requires_grad=True)
    options = {"normalize": x.normalize, "reduction": "none", "return_lse": True}
    outputs = {}
    if x.clusters is not None:
        selection = {"pos_idx": tensor(x.pos_idx), "instance_ids": tensor(x.instance_ids)}
        outputs["loss"], outputs["lse"] = reference.guided_contrastive(
            z, guide, tensor(x.clusters), tensor(x.far), tau, weighted=x.weighted, gamma=x.gamma, **selection, **options
        )
    if x.distill:
        outputs["kl"], outputs["student_lse"] = reference.relational_distill(
            z, guide, tau, teacher_temperature=x.teacher_temperature, **options
        )
    sum((tensor(gradients[name]) * rows).sum() for name, rows in outputs.items()).backward()
    return {name: rows.detach().numpy() for name, rows in outputs.items()}, z.grad.numpy(), tau.grad.item()


def error(actual, exact) -> float:
    return np.linalg.norm(actual - exact) / (np.linalg.norm(exact) or 1)


def gradients_for(x: Problem) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {name: rng.uniform(0.2, 1, x.n) / x.n for name in DIFFERENTIABLE}


def compare(simulate, x: Problem, seed: int = 1) -> GuidedRun:
    """Runs forward and backward and holds every result against the reference."""
    run = GuidedRun(simulate(*SOURCES, seed=seed), x)
    outputs = run.forward()
    gradients = gradients_for(x)
    exact, exact_z, exact_tau = expected(x, gradients)
    coarse = x.splits == 1
    dtype = torch.bfloat16 if coarse else getattr(torch, x.kind)
    for name, rows in exact.items():
        assert error(outputs[name], rows) <= LOSS[dtype], name
    grad_z, grad_tau = run.backward(**{f"grad_{name}": gradients[name] for name in exact})
    assert error(grad_z, exact_z) <= GRADIENT[dtype]
    assert abs(grad_tau - exact_tau) <= GRADIENT[dtype] * abs(exact_tau)
    return run


def test_float32_with_an_empty_cluster(simulate):
    # 3 row blocks and 5 column tiles; cluster 4 is empty, so rows of cluster 3 fall back on all others
    x = problem(d=100, dg=17, clusters=4, k=1)
    x = replace(x, far=np.array([1, 2, 3, 4, 0]))
    run = compare(simulate, x)
    assert (run.get("fallback")[run.get("position_of")] == (x.clusters == 3)).all()


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_both_parts_share_the_tiles(simulate, kind):
    ids = np.arange(270) % 90  # three views
    wide = kind == "bfloat16"
    options = {"d": 72, "dg": 136, "gamma": 2.0, "k": 1} if wide else {"d": 17, "dg": 64, "gamma": 0.5}
    compare(simulate, problem(kind=kind, distill=True, instance_ids=ids, **options))


def test_distillation_alone_over_two_groups_of_features(simulate):
    compare(simulate, problem(n=270, d=200, clusters=0, distill=True, teacher_temperature=0.1, kind="bfloat16"))


@pytest.mark.parametrize("options", [{"weighted": False}, {"gamma": 0.0}], ids=["unweighted", "gamma 0"])
def test_a_single_cluster_is_its_own_farthest(simulate, options):
    compare(simulate, problem(n=130, clusters=1, k=5, d=16, dg=16, **options))


def test_temperature_on_the_device_and_one_part(simulate):
    compare(simulate, problem(n=130, distill=True, device_temperature=True, splits=1))


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_rows_as_they_are(simulate, kind):
    x = problem(n=130, d=20, dg=20, clusters=2, kind=kind, normalize=False, k_splits=2)
    compare(simulate, replace(x, z=x.z / 2))


def test_a_student_that_equals_its_guide(simulate):
    # the divergence vanishes but for the temperatures: its two sums nearly cancel
    x = problem(n=130, d=64, clusters=0, distill=True, teacher_temperature=0.201)
    run = GuidedRun(simulate(*SOURCES), replace(x, guide=x.z))
    zeros = dict.fromkeys(DIFFERENTIABLE, np.zeros(x.n))
    assert error(run.forward()["kl"], expected(run.problem, zeros)[0]["kl"]) <= 2e-4


def test_positives_are_a_set_and_may_be_all_rows(simulate):
    n = 44
    pos_idx = np.tile(np.arange(n), (n, 1))
    pos_idx[30:] = np.array([5, 5, -1, 7, 41, 8, 5, *[-1] * (n - 7)])  # twice, and the row's own view or itself
    x = problem(n=n, d=16, dg=16, clusters=2, pos_idx=pos_idx)
    run = compare(simulate, x)
    kept = run.get("neighbors")
    assert (kept[33][:7] == [5, -1, -1, 7, 41, 8, -1]).all()
    assert (kept[41][:7] == [5, -1, -1, 7, -1, 8, -1]).all()


def test_rows_without_positives_have_no_loss(simulate):
    ids = np.arange(100)
    x = problem(n=100, d=16, dg=16, instance_ids=ids)
    x.pos_idx[10:] = -1
    run = compare(simulate, x)
    assert (run.get("loss")[10:] == 0).all()
    assert (run.get("loss")[:10] != 0).any()


def test_what_is_out_of_range_belongs_to_no_cluster(simulate):
    x = problem(n=130, d=16, dg=16, clusters=3)
    stray = replace(x, clusters=x.clusters.copy(), far=np.array([1, 2, 3]), pos_idx=x.pos_idx.copy())
    stray.clusters[::7], stray.clusters[3], stray.pos_idx[0, 0] = -1, 10**12, x.n
    run = GuidedRun(simulate(*SOURCES), stray)
    run.forward()
    run.backward(grad_loss=np.ones(x.n))
    lost = (stray.clusters < 0) | (stray.clusters >= 2)  # far[2] is out of range
    assert (run.get("fallback")[run.get("position_of")] == lost).all()


def test_only_tiles_with_negatives_are_read(simulate):
    x = problem(n=1000, d=8, dg=8, clusters=10, k=1)
    run = GuidedRun(simulate(*SOURCES), x)
    run.params.n, run.params.columns, run.params.padded = x.n, x.n, 1024
    run.params.contrast, run.params.weighted = 1, 1
    run._order()
    bits = {}
    for backward in (False, True):
        run.params.z = run.params.e = run.params.v = _scales_only(run, x.n)
        run._plan(backward)
        words = run.get("tiles")
        bits[backward] = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : 1024 // COLUMNS]
        if not backward:
            run.params.weight, run.params.lse = (run.dev.put(np.ones(x.n)).ptr for _ in range(2))
    cluster = np.pad(x.clusters[run.order], (0, 24), constant_values=-1)
    far = np.where(cluster < 0, -2, x.far[cluster])
    reads = far[:, None] == cluster[None, :]
    tile = lambda pairs: pairs.reshape(1024 // ROWS, ROWS, -1, COLUMNS).any(axis=(1, 3))  # noqa: E731
    assert (bits[False] == tile(reads)).all()
    assert (bits[True] == tile(reads | reads.T)).all()
    assert bits[False].mean() < 0.3


def _scales_only(run, n):
    from python_tests.cuda_sim.structs import Operand

    return Operand(None, run.dev.put(np.ones(n, np.float32)).ptr, n, 1, 1, 0)


def test_the_schedule_changes_no_bit(simulate):
    x = problem(n=130, d=16, dg=16, distill=True, k_splits=3)
    runs = [compare(simulate, x, seed) for seed in (1, 2)]
    for name in ("loss", "lse", "kl", "grad_z", "u_dot_du"):
        assert np.array_equal(*(run.get(name) for run in runs)), name


def test_not_a_number_reaches_the_loss(simulate):
    x = problem(n=130, d=16, dg=16, clusters=2, k=1, distill=True)
    x.guide[3], x.z[4] = np.nan, np.nan
    out = GuidedRun(simulate(*SOURCES), x).forward()
    assert np.isnan(out["kl"]).all()
    exact = expected(x, dict.fromkeys(DIFFERENTIABLE, np.zeros(x.n)))[0]
    assert (np.isnan(out["loss"]) == np.isnan(exact["loss"])).all()

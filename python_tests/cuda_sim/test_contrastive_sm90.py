"""The Hopper kernels of the contrastive family, executed: asked for by LTOOD_CUDA_PATH=sm90, on a simulated sm_90a."""

import re

import numpy as np
import pytest
import torch
from cuda_sim.contrastive_sim import Simulated
from cuda_sim.test_contrastive import PAIRS, SOURCES, TAU, check, expected, pairs_that_agree, rows
from tolerances import LOSS, relative_error


@pytest.fixture
def device(simulate, monkeypatch):
    monkeypatch.setenv("LTOOD_CUDA_PATH", "sm90")
    options = {"arch": "90a", "defines": {"LTOOD_SM90A": "1"}, "seed": 1, "sm_count": 2}
    return lambda **more: simulate(*SOURCES, **{**options, **more})


def kernels(device):
    """Names and template arguments of the launched Hopper kernels: `4sm90<length><name>I<arguments>EEvNS...`."""
    found = (re.search(r"4sm90\d\d(contrastive_.*?)EvNS", name) for name in device.launches)
    return {match[1] for match in found if match}


# Every kernel of the backward: type, splits, and one, two or four k_tiles; then S in four chunks, V on its own. The
# forward is wide, and narrow where rows have more than four k_tiles.
@pytest.mark.parametrize(
    ("kind", "n", "d"),
    [
        ("bfloat16", 270, 50),
        ("bfloat16", 390, 100),
        ("bfloat16", 270, 200),
        ("bfloat16", 270, 450),
        ("float16", 270, 64),
        ("float16", 270, 70),
        ("float16", 270, 330),
        ("float32", 270, 40),
        ("float32", 270, 128),
        ("float32", 270, 200),
    ],
)
def test_nt_xent(device, kind, n, d):
    rng = np.random.default_rng(0)
    dev = device()
    check(Simulated(dev, rows(rng, n, d), TAU, kind), rng)
    assert len(kernels(dev)) == 2, dev.launches


@pytest.mark.parametrize("name", ["views", "ids", "classes"])
def test_small_losses_keep_their_digits(device, name):
    rng = np.random.default_rng(3)
    check(Simulated(device(), pairs_that_agree(rng, 270, 40), 0.05, "float32", **PAIRS[name]), rng)


@pytest.mark.parametrize(("kind", "d"), [("bfloat16", 40), ("float32", 40)])
def test_stage1(device, kind, d):
    """Views, a nearest neighbour of the own domain with a weight a row, and the domains' part."""
    rng = np.random.default_rng(1)
    domain = np.tile(rng.integers(0, 2, 150), 2)
    options = {"k": 1, "domain": domain, "labels": domain, "neighbor_weights": rng.uniform(0, 2, 300)}
    check(Simulated(device(), rows(rng, 300, d), TAU, kind, **options), rng)


def test_instances(device):
    rng = np.random.default_rng(2)
    ids = rng.permutation(np.r_[np.repeat(np.arange(25) * 7, 5), np.arange(50).repeat(2) + 1000, np.arange(75) - 99])
    check(Simulated(device(), rows(rng, 300, 33), TAU, "bfloat16", instance_ids=ids, k=1), rng)


@pytest.mark.parametrize("k", [0, 1])
def test_work_tiles_of_many_tiles(device, k):
    """Nine tiles a side, strips of four rows of them (an odd one is left), chunks of three columns; two blocks."""
    rng = np.random.default_rng(4)
    problem = Simulated(device(seed=3), rows(rng, 1100, 16), TAU, "bfloat16", k=k)
    planned = problem.plan_only().plan
    plan = {"row_tiles": 4, "col_tiles": 3, "strips": 3, "chunks": 3, "work_tiles": 6, "blocks": 2}
    row_tiles = 1 if k else 2
    per_tile = 128 * (4 * row_tiles + 8 * k)
    problem.options["plan"] = {**plan, "shared_bytes": planned.shared_bytes + (3 - planned.col_tiles) * per_tile}
    _, _, lse, indices = problem.forward()
    _, _, lse_ref, indices_ref = expected(problem, torch.from_numpy(problem.prepared.rows), TAU)
    assert relative_error(torch.from_numpy(lse), lse_ref) <= LOSS[torch.bfloat16] / 1000
    assert k == 0 or np.array_equal(indices, indices_ref.numpy())


@pytest.mark.parametrize("seed", range(2))
def test_any_schedule_gives_the_same_bits(device, seed):
    rng = np.random.default_rng(5)
    z = rows(rng, 270, 64)

    def run(seed):
        problem = Simulated(device(seed=seed), z, TAU, "bfloat16")
        _, _, lse, _ = problem.forward()
        return lse, problem.backward(np.ones(270))[0]

    for found, first in zip(run(seed + 10), run(1), strict=True):
        assert np.array_equal(found, first)


def test_columns_in_ranges(device):
    """Ranges of columns of the backward, one of them empty."""
    rng = np.random.default_rng(6)
    check(Simulated(device(), rows(rng, 270, 64), TAU, "float16", bwd_plan={"k_splits": 4}), rng)


def test_what_it_does_not_take_goes_to_the_other_path(device):
    rng = np.random.default_rng(7)
    dev = device()
    problem = Simulated(dev, rows(rng, 64, 1100), TAU, "bfloat16")
    assert problem.plan_only().plan.stages == 0
    assert Simulated(dev, rows(rng, 64, 20), 0.01, "bfloat16").plan_only().plan.stages == 0  # the online form
    assert Simulated(dev, rows(rng, 64, 20), TAU, "bfloat16").plan_only().plan.stages > 0


def test_it_must_be_asked_for(device, monkeypatch):
    monkeypatch.delenv("LTOOD_CUDA_PATH")
    problem = Simulated(device(), rows(np.random.default_rng(8), 64, 20), TAU, "bfloat16")
    assert problem.plan_only().plan.stages == 0

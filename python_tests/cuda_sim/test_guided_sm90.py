"""The Hopper kernels of the guided family, executed: asked for by LTOOD_CUDA_PATH=sm90, on a simulated sm_90a."""

from dataclasses import replace

import numpy as np
import pytest

from python_tests.cuda_sim.guided_run import SOURCES, GuidedRun
from python_tests.cuda_sim.test_guided import compare, problem


@pytest.fixture
def simulate(simulate, monkeypatch):
    monkeypatch.setenv("LTOOD_CUDA_PATH", "sm90")
    return lambda *sources, **options: simulate(*sources, arch="90a", defines={"LTOOD_SM90A": "1"}, **options)


def hopper_kernels(run):
    return [name for name in run.dev.launches if "sm90_kernel" in name]


# Three blocks of rows and five column tiles, or two and three; the last ones are not full.
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        # two groups of output features, the second not full; three stages a tile, fifteen through a ring of six
        ("bfloat16", {"d": 200, "dg": 64, "clusters": 0, "distill": True, "teacher_temperature": 0.1}),
        # both parts, three views, a force that needs a logarithm, a temperature on the device
        ("float16", {"n": 150, "d": 17, "dg": 136, "distill": True, "gamma": 0.5, "instance_ids": np.arange(150) % 50,
                     "device_temperature": True}),
        # the negatives alone: few of the tiles; without forces the guide is not multiplied
        ("bfloat16", {"d": 72, "dg": 40, "k": 1}),
        ("float16", {"n": 150, "d": 64, "dg": 40, "weighted": False, "k_splits": 2}),
    ],
    ids=["distill", "both", "guided", "unweighted"],
)  # fmt: skip
def test_losses_and_gradients(simulate, kind, options):
    assert len(hopper_kernels(compare(simulate, problem(kind=kind, **options)))) == 2


def test_the_widest_rows_fill_the_ring(simulate):
    """Four k_tiles of each operand: a turn holds five of six stages. One of four k_splits has no tile."""
    run = compare(simulate, problem(n=130, d=250, dg=256, kind="bfloat16", distill=True, k_splits=4))
    assert len(hopper_kernels(run)) == 2


def test_the_schedule_changes_no_bit(simulate):
    x = problem(n=130, d=16, dg=16, clusters=0, distill=True, kind="float16")
    runs = [compare(simulate, x, seed) for seed in (1, 2)]
    for name in ("kl", "student_lse", "teacher_lse", "grad_z", "u_dot_du"):
        assert np.array_equal(*(run.get(name) for run in runs)), name


def test_not_a_number_reaches_the_loss(simulate):
    x = problem(n=130, d=16, dg=16, clusters=0, distill=True, kind="bfloat16")
    x.guide[3] = np.nan
    run = GuidedRun(simulate(*SOURCES), x)
    assert np.isnan(run.forward()["kl"]).all()
    assert hopper_kernels(run)


def test_what_they_do_not_take_goes_to_the_other_path(simulate, monkeypatch):
    x = problem(n=66, d=16, dg=16, clusters=0, distill=True, kind="bfloat16")
    for other in (replace(x, kind="float32"), problem(n=66, d=280, dg=250, clusters=0, distill=True, kind="bfloat16")):
        run = GuidedRun(simulate(*SOURCES), other)
        run.forward()
        assert not hopper_kernels(run)
    monkeypatch.delenv("LTOOD_CUDA_PATH")
    run = GuidedRun(simulate(*SOURCES), x)
    run.forward()
    assert not hopper_kernels(run)

"""The worked Hopper kernel (TMA, mbarrier, wgmma): right on any schedule, and every planted bug of it is found."""

import math

import numpy as np
import pytest
from ptxsim import Device, Library, SimError
from ptxsim.values import bf16_to_f32

WIDTH, SCALE = 128, 10.0


@pytest.fixture(scope="module")
def library():
    return Library(["python_tests/ptxsim/kernels/softmax_sm90.cu"], arch="90a")


def run(library, n, bug=0, seed=1):
    """Errors of log-sum-exp and of the weighted rows against float64."""
    rows = np.random.default_rng(0).standard_normal((n, WIDTH)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    device = Device(library, seed=seed)
    z, lse, out = device.put_bf16(rows), device.empty(n), device.empty((n, WIDTH))
    assert device.call("launch_softmax_sm90", bug, z, n, SCALE / math.log(2), lse, out) == 0, device.complaint
    exact = bf16_to_f32(device.get(z)).astype(np.float64)
    s = SCALE * exact @ exact.T
    np.fill_diagonal(s, -np.inf)
    weights = np.exp(s - s.max(1, keepdims=True))
    want_lse = s.max(1) + np.log(weights.sum(1))
    want = weights @ exact / weights.sum(1, keepdims=True)
    return np.abs(device.get(lse) - want_lse).max(), np.abs(device.get(out) - want).max()


@pytest.mark.parametrize("seed", range(4))
def test_right_on_any_schedule(library, seed):
    lse_error, out_error = run(library, 200, seed=seed)
    assert lse_error < 1e-5
    assert out_error < 5e-4  # the weights are rounded to bfloat16


BUGS = {
    1: "race on shared memory|overwritten in flight|never written",
    2: "race on shared memory|never written",
    3: "deadlock: .*poll at|race on shared memory",
    5: "deadlock: .*poll at",
    8: "without wgmma.fence",
    9: "overwritten in flight",
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(library, bug, seed):
    with pytest.raises(SimError, match=BUGS[bug]):
        run(library, 200, bug, seed)


@pytest.mark.parametrize("bug", [4, 6, 7])
def test_a_silent_bug_gives_wrong_numbers(library, bug):
    lse_error, _ = run(library, 200, bug)
    assert not lse_error < 1e-2  # or NaN: what an accumulator in flight reads as

"""The worked Ampere kernel: right on any schedule, and every planted bug of it is found."""

import ctypes
import math

import numpy as np
import pytest
from ptxsim import Device, Library, SimError
from ptxsim.values import bf16_to_f32

WIDTH, SCALE = 64, 10.0


class Problem(ctypes.Structure):
    _fields_ = [
        ("z", ctypes.c_void_p), ("n", ctypes.c_int), ("scale", ctypes.c_float), ("lse", ctypes.c_void_p),
        ("out", ctypes.c_void_p), ("total", ctypes.c_void_p),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def library():
    return Library(["python_tests/ptxsim/kernels/softmax_sm80.cu"])


def run(library, n, bug=0, seed=1):
    """((lse, out, total) of the kernel, the same in float64)."""
    rows = np.random.default_rng(0).standard_normal((n, WIDTH)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    device = Device(library, seed=seed)
    z = device.put_bf16(rows)
    lse, out, total = device.empty(n), device.empty((n, WIDTH)), device.zeros(1)
    problem = Problem(z.ptr, n, SCALE / math.log(2), lse.ptr, out.ptr, total.ptr)
    assert device.call("launch_softmax", bug, problem) == 0, device.complaint
    exact = bf16_to_f32(device.get(z)).astype(np.float64)
    s = SCALE * exact @ exact.T
    np.fill_diagonal(s, -np.inf)
    weights = np.exp(s - s.max(1, keepdims=True))
    want_lse = s.max(1) + np.log(weights.sum(1))
    want = (want_lse, weights @ exact / weights.sum(1, keepdims=True), want_lse.sum())
    return (device.get(lse), device.get(out), device.get(total)[0]), want


def assert_close(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=0, atol=5e-4)  # the weights are rounded to bfloat16
    np.testing.assert_allclose(got[2], want[2], rtol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_right_on_any_schedule(library, seed):
    assert_close(*run(library, 200, seed=seed))


# The tail must be the first tile of its buffer for a missing zero fill to show: 100 rows are two tiles.
BUGS = {
    1: (200, "race on shared memory"),
    2: (200, "race on shared memory|never written"),
    3: (200, "shared memory that was never written"),
    4: (200, "global memory out of bounds"),
    5: (100, "shared memory that was never written"),
    6: (200, "shared memory out of bounds"),
    7: (200, "race on shared memory"),
    8: (200, "divergent barrier|never written|race on shared memory"),
    9: (200, "race on global memory"),
    11: (200, "diverged warp"),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(library, bug, seed):
    n, message = BUGS[bug]
    with pytest.raises(SimError, match=message):
        run(library, n, bug, seed)


def test_a_wrong_swizzle_gives_wrong_numbers(library):
    got, want = run(library, 100, bug=10)
    assert np.abs(got[0] - want[0]).max() > 0.01

"""Exponentials without the special-function unit: their accuracy, and how many take it."""

import numpy as np
import pytest


def exponentials(dev, x):
    x = np.asarray(x, np.float32)
    outputs = [dev.empty(len(x)) for _ in range(2)]
    assert dev.call("launch_exponentials", dev.put(x), len(x), *outputs) == 0, dev.complaint
    return [dev.get(output) for output in outputs]


@pytest.mark.parametrize("eighths", [0, 3])
def test_exponentials(simulate, eighths):
    """Over all that the fixed shift can give, and where the polynomial's pieces meet."""
    defines = {"LTOOD_POLYNOMIAL_EIGHTHS": str(eighths)} if eighths else {}
    dev = simulate("python_tests/cuda_sim/kernels/exponentials.cu", defines=defines)
    rng = np.random.default_rng(0)
    halves = np.float32(np.arange(-125, 1) - 0.5)
    whole = np.arange(-126, 2)
    x = np.concatenate([rng.uniform(-126, 1, 4000), halves, np.nextafter(halves, np.float32(9)), whole])
    polynomial, shared = exponentials(dev, x)
    exact = np.exp2(np.float32(x).astype(np.float64))
    assert (np.abs(polynomial - exact) / exact)[x > -125.5].max() <= 2**-22
    assert np.abs(polynomial - exact)[x <= -125.5].max() <= 2**-126
    for residue in range(8):
        same = shared[residue::8] == polynomial[residue::8]
        assert same.all() == (residue < eighths)


def test_not_a_number_stays_one(simulate):
    """The device's own is 0x7fffffff: shifted and added to itself it would be a number."""
    dev = simulate("python_tests/cuda_sim/kernels/exponentials.cu")
    x = np.array([0x7FFFFFFF, 0x7FC00000, 0xFFC00000], np.uint32).view(np.float32)
    assert np.isnan(exponentials(dev, x)[0]).all()

"""Operands and segment sums, executed, against numpy."""

import ctypes
from functools import partial

import numpy as np
import pytest

from python_tests.cuda_sim.structs import SegmentSumsParams, bf16_values, check, pointer, prepare

OPERANDS = ("csrc/cuda/operand.cu",)
SUMS = ("csrc/cuda/segment_sums.cu", "csrc/cuda/operand.cu")


def rows_of(dev, prepared):
    """What the operand's splits and scale say, in float64, and how the padding reads."""
    data = dev.get(prepared.data)
    data = data.astype(np.float64) if data.dtype == np.float16 else bf16_values(data).astype(np.float64)
    d = prepared.rows.shape[1]
    with np.errstate(invalid="ignore"):
        return dev.get(prepared.scale).astype(np.float64)[:, None] * data.sum(0)[:, :d], data[:, :, d:]


@pytest.mark.parametrize(
    ("kind", "half", "error"),
    [("float32", False, 2.0**-16), ("float32", True, 2.0**-21), ("bfloat16", False, 1e-6), ("float16", False, 1e-6)],
)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("d", [1, 17, 64, 200])
def test_operand_holds_the_rows(simulate, kind, half, error, normalize, d):
    dev = simulate(*OPERANDS, seed=1)
    x = prepare(dev, np.random.default_rng(0).standard_normal((9, d)), kind, normalize, half=half)
    got, padding = rows_of(dev, x)
    norms = np.linalg.norm(x.rows, axis=1)
    want = x.rows / norms[:, None] if normalize else x.rows
    assert np.abs(got - want).max() <= error * np.abs(want).max()
    assert (padding == 0).all()
    inverse = dev.get(x.inv_norm)
    assert np.allclose(inverse, 1 / norms if normalize else 1, rtol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_norms_far_from_one(simulate, normalize):
    """Squares of 1e30 and 1e-30 leave float32. Below 1e-12 a row is divided by 1e-12, as in torch."""
    norms = np.array([1e-30, 1e-13, 1e-10, 1e10, 1e30, 0])
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((len(norms), 33))
    rows = norms[:, None] * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    dev = simulate(*OPERANDS, seed=1)
    x = prepare(dev, rows, "float32", normalize)
    got, _ = rows_of(dev, x)
    lengths = np.maximum(np.linalg.norm(x.rows, axis=1, keepdims=True), 1e-12)
    want = x.rows / lengths if normalize else x.rows
    assert np.allclose(got, want, rtol=2.0**-15, atol=0)
    if normalize:
        assert np.allclose(dev.get(x.inv_norm), 1 / lengths[:, 0], rtol=1e-6)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_broken_rows_stay_broken(simulate, kind, broken):
    rows = np.ones((3, 5))
    rows[1, 2] = broken
    dev = simulate(*OPERANDS, seed=1)
    got, _ = rows_of(dev, prepare(dev, rows, kind))
    assert np.isnan(got[1, 2])
    assert np.isfinite(got[[0, 2]]).all()


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("counts", "entries", "d"),
    [
        ([5, 3], 1, 70),  # two segments in one block of 16 positions
        ([10, 20, 0, 400, 1, 15], 1, 70),  # one over 26 blocks, one empty, ends inside and on the edges of blocks
        ([14, 16, 32, 44], 3, 70),  # segments that begin on the edges; three entries a row
        ([2, 700], 1, 33),  # more pieces than lanes look at in one round
    ],
)
def test_segment_sums(simulate, kind, counts, entries, d):
    check_segment_sums(simulate, kind, counts, entries, d)


def test_segment_sums_of_many_rows(simulate):
    """Blocks of 128 positions, which begin beyond 65,536 rows, here of few: a segment over four of them."""
    many = {"LTOOD_FEW_POSITIONS": "64"}
    check_segment_sums(partial(simulate, defines=many), "bfloat16", [100, 420, 3, 100], 1, 34)


def check_segment_sums(simulate, kind, counts, entries, d):
    rng = np.random.default_rng(1)
    dev = simulate(*SUMS, seed=1)
    count = sum(counts) + 2
    n = -(-count // entries)
    x = prepare(dev, rng.standard_normal((n, d)), kind, normalize=False)
    keys = np.concatenate([[-1, -1], np.repeat(np.arange(len(counts)), counts)])
    order, weight = rng.permutation(count), rng.standard_normal(n).astype(np.float32)
    sums = dev.put(np.full((len(counts), d), 7, np.float32))
    edges = dev.empty((dev.call("ltood_segment_edges", count, restype=ctypes.c_int64), d))
    params = SegmentSumsParams(
        x.operand, pointer(dev, keys), pointer(dev, order), count, entries, pointer(dev, weight), d, sums.ptr,
        edges.ptr,
    )  # fmt: skip
    check(dev, dev.call("ltood_launch_segment_sums", params, None))
    want = np.full((len(counts), d), 7.0)
    terms = weight[order // entries][:, None] * x.rows[order // entries]
    for key, size in enumerate(counts):
        if size:
            want[key] = terms[keys == key].sum(0)
    assert np.abs(dev.get(sums) - want).max() < 1e-4 * np.abs(want).max()


def test_a_launch_returns_its_own_error_alone(simulate):
    """An error that another library's kernel left behind is neither returned nor taken away."""
    dev = simulate(*OPERANDS, seed=1)
    dev.earlier_error = 719
    prepare(dev, np.ones((3, 5)), "float32")
    assert dev.last_error == 719


def test_a_failed_launch_leaves_no_error_behind(simulate):
    dev = simulate(*SUMS, seed=1)
    x = prepare(dev, np.ones((3, 5)), "float32")
    unused = dev.empty((1, 5))
    params = SegmentSumsParams(x.operand, unused.ptr, unused.ptr, 0, 1, None, 5, unused.ptr, unused.ptr)
    assert dev.call("ltood_launch_segment_sums", params, None) == 9  # an empty grid: cudaErrorInvalidConfiguration
    assert "grid or block" in dev.complaint
    assert dev.last_error == 0


@pytest.mark.parametrize("unscaled", [False, True])
def test_origin_and_squared_norms(simulate, unscaled):
    rng = np.random.default_rng(2)
    dev = simulate(*OPERANDS, seed=1)
    origin = rng.standard_normal(70).astype(np.float32)
    rows = origin + rng.standard_normal((5, 70)) * np.array([1e-3, 1, 30, 0, 1])[:, None]
    rows[4, 3] = np.inf
    x = prepare(dev, rows, "float32", False, half=not unscaled, origin=dev.put(origin), unscaled=unscaled)
    want = x.rows - origin
    got, _ = rows_of(dev, x)
    assert np.allclose(got[:4], want[:4], rtol=0, atol=2.0**-16 * np.abs(want[:4]).max(1, keepdims=True))
    squares = dev.get(x.squares)
    assert np.allclose(squares[:4], (want[:4] ** 2).sum(1), rtol=1e-6)
    assert np.isnan(squares[4])
    if unscaled:
        assert (dev.get(x.scale) == 1).all()

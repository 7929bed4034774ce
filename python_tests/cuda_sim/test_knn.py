"""The top-k kernel, executed, against a float64 search of the same rounded rows."""

import ctypes

import numpy as np
import pytest

from python_tests.cuda_sim.structs import TopkParams, check, pointer, prepare
from python_tests.tolerances import LOSS

SOURCES = ("csrc/cuda/topk/launch.cu", "csrc/cuda/topk/sm90/launch.cu", "csrc/cuda/operand.cu")
TOLERANCE = LOSS[next(dtype for dtype in LOSS if str(dtype) == "torch.float32")]


def search(dev, x, y, k, **rules):
    """(values, indices) of the kernel; y=None searches x itself."""
    y = x if y is None else y
    n = len(x.rows)
    values, indices = dev.empty((n, k)), dev.empty((n, k), np.int64)
    arrays = {
        name: pointer(dev, rules.get(name)) for name in ("x_instance", "y_instance", "x_domain", "y_domain")
    }  # fmt: skip
    params = TopkParams(
        x.operand, y.operand, k, rules.get("exclude_self", 0), rules.get("diagonal", 0),
        rules.get("views", 0), **arrays,
        values=values.ptr, indices=indices.ptr,
    )  # fmt: skip
    size = dev.call("ltood_topk_workspace", params, restype=ctypes.c_int64)
    assert size >= 0
    params.workspace = dev.empty(size, np.uint8).ptr if size else None
    check(dev, dev.call("ltood_launch_topk", params, None))
    return dev.get(values), dev.get(indices)


def expected(x, y, k, normalize=True, **rules):
    """(values, indices, similarities) in float64: best first, ties to the lower index."""
    rows, base = (unit(a.rows) if normalize else a.rows for a in (x, x if y is None else y))
    with np.errstate(invalid="ignore"):
        s = rows @ base.T
    i, j = np.arange(len(rows))[:, None], np.arange(len(base))[None, :]
    barred = np.zeros(s.shape, bool)
    if rules.get("exclude_self"):
        barred |= i + rules.get("diagonal", 0) == j
    if rules.get("views"):
        barred |= i % rules["views"] == j % rules["views"]
    if "x_instance" in rules:
        barred |= rules["x_instance"][:, None] == rules["y_instance"][None, :]
    if "x_domain" in rules:
        barred |= rules["x_domain"][:, None] != rules["y_domain"][None, :]
    s = np.where(barred, -np.inf, s)
    order = np.argsort(-np.where(np.isnan(s), np.inf, s), axis=1, kind="stable")[:, :k]
    values = np.take_along_axis(s, order, 1)
    return values, np.where(values == -np.inf, -1, order), s


def unit(rows):
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(norms, 1e-12)


def integers(rng, n, d):
    """Products of such rows are exact in every type, and most of them tie."""
    return rng.integers(-2, 3, (n, d)).astype(np.float64)


def check_exact(dev, kind, x, y, k, **rules):
    x, y = (None if a is None else prepare(dev, a, kind, normalize=False) for a in (x, y))
    values, indices = search(dev, x, y, k, **rules)
    want = expected(x, y, k, normalize=False, **rules)
    assert np.array_equal(values, want[0])
    assert np.array_equal(indices, want[1])
    return indices


@pytest.mark.parametrize(
    ("kind", "n", "q", "d", "k"),
    [
        ("bfloat16", 300, 200, 64, 5),  # three row blocks, four column tiles, whole k_tiles
        ("bfloat16", 129, 180, 500, 3),  # 8 k_tiles: rows do not fit, streamed
        ("float16", 150, 190, 100, 7),  # half a k_tile
        ("float16", 129, 130, 460, 1),  # streamed
        ("float32", 300, 200, 17, 5),  # two splits, a third of a k_tile
        ("float32", 129, 140, 128, 10),  # resident in two splits
        ("float32", 129, 130, 200, 1),  # streamed in two splits
        ("float32", 2, 1, 1, 1),  # the least
    ],
)
def test_random_rows(simulate, kind, n, q, d, k):
    """float32 rows are given in two float16 splits, as knn does."""
    rng = np.random.default_rng(0)
    dev = simulate(*SOURCES, seed=1, sm_count=1)
    half = kind == "float32"
    x, y = (prepare(dev, rng.standard_normal((rows, d)) * 3, kind, half=half) for rows in (n, q))
    values, indices = search(dev, x, y, k)
    want, want_indices, s = expected(x, y, k)
    assert np.abs(values - want).max() <= TOLERANCE
    assert np.abs(np.take_along_axis(s, indices, 1) - want).max() <= TOLERANCE
    assert (np.diff(values, axis=1) <= 0).all()
    assert all(len(set(row)) == k for row in indices.tolist())
    assert (indices == want_indices).mean() > 0.99


def test_bfloat16_parts(simulate):
    """float32 rows as a loss may give them: 16 bits of mantissa."""
    rng = np.random.default_rng(0)
    dev = simulate(*SOURCES, seed=1, sm_count=1)
    x = prepare(dev, rng.standard_normal((140, 70)), "float32")
    values, _ = search(dev, x, None, 3, exclude_self=1)
    assert np.abs(values - expected(x, None, 3, exclude_self=1)[0]).max() <= 2.0**-16


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
def test_rows_that_search_themselves(simulate, kind):
    rng = np.random.default_rng(1)
    dev = simulate(*SOURCES, seed=2, sm_count=1)
    check_exact(dev, kind, integers(rng, 140, 17), None, 5, exclude_self=1)


@pytest.mark.parametrize("diagonal", [-20, 15])
def test_a_diagonal(simulate, diagonal):
    """Each row's best column would be itself: row i and column i + diagonal are the same."""
    rng = np.random.default_rng(1)
    dev = simulate(*SOURCES, seed=2, sm_count=1)
    y = integers(rng, 140, 17) * 2 + 1
    indices = check_exact(dev, "bfloat16", np.roll(y, -diagonal, axis=0)[:130], y, 2, exclude_self=1, diagonal=diagonal)
    assert not (indices == np.arange(130)[:, None] + diagonal).any()


@pytest.mark.parametrize("views", [70, 7, 1])
def test_views(simulate, views):
    dev = simulate(*SOURCES, seed=3, sm_count=1)
    indices = check_exact(dev, "bfloat16", integers(np.random.default_rng(2), 140, 9), None, 4, views=views)
    assert (indices < 0).all() if views == 1 else (indices >= 0).all()


def test_instances_and_domains(simulate):
    """Few candidates are left to some rows, none to others."""
    rng = np.random.default_rng(3)
    n, q = 140, 150
    x, y = integers(rng, n, 9), integers(rng, q, 9)
    instances = {"x_instance": rng.integers(0, 40, n) << 32, "y_instance": rng.integers(0, 40, q) << 32}
    domains = {"x_domain": rng.integers(0, 4, n), "y_domain": rng.choice(3, q, p=[0.7, 0.28, 0.02])}
    dev = simulate(*SOURCES, seed=4, sm_count=1)
    check_exact(dev, "float16", x, y, 5, **instances)
    indices = check_exact(dev, "bfloat16", x, y, 40, **instances, **domains)
    assert (indices[domains["x_domain"] == 3] == -1).all()
    assert (indices[:, 0] >= 0).any()


@pytest.mark.parametrize(("sm_count", "q", "k"), [(8, 1100, 3), (8, 1600, 6), (8, 1100, 150)])
def test_columns_split_over_blocks(simulate, sm_count, q, k):
    """Two and three shares; two blocks of rows; lists longer than a share's tile."""
    rng = np.random.default_rng(4)
    dev = simulate(*SOURCES, seed=5, sm_count=sm_count)
    x = integers(rng, {3: 130, 6: 40, 150: 3}[k], 5)
    check_exact(dev, "bfloat16", x, integers(rng, q, 5), k)
    combines = sum("combine_kernel" in name for name in dev.launches)
    assert combines == 1


def test_few_columns_are_not_split(simulate):
    dev = simulate(*SOURCES, seed=5, sm_count=100)
    x = integers(np.random.default_rng(5), 70, 5)
    check_exact(dev, "bfloat16", x, None, 2, exclude_self=1)
    assert not any("combine_kernel" in name for name in dev.launches)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_equal_rows_rank_by_index(simulate, value):
    """Every pair ties; -0 ties with 0."""
    dev = simulate(*SOURCES, seed=6, sm_count=1)
    x = prepare(dev, np.full((140, 3), value), "float32")
    values, indices = search(dev, x, None, 3, exclude_self=1)
    assert indices[:4].tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    assert (indices[4:] == np.arange(3)).all()
    assert np.abs(values - abs(value)).max() < TOLERANCE


@pytest.mark.parametrize(("kind", "broken"), [("bfloat16", np.nan), ("float32", np.inf)])
def test_broken_rows_rank_first(simulate, kind, broken):
    rng = np.random.default_rng(7)
    rows = rng.standard_normal((150, 5))
    rows[[7, 120], 2] = broken
    dev = simulate(*SOURCES, seed=7, sm_count=1)
    x = prepare(dev, rows, kind)
    values, indices = search(dev, x, None, 4, exclude_self=1)
    x.rows[[7, 120]] = np.nan
    want, want_indices, _ = expected(x, None, 4, exclude_self=1)
    assert np.array_equal(np.isnan(values), np.isnan(want))
    assert np.isnan(want).sum() == 148 * 2 + 2 * 4
    assert np.array_equal(indices, want_indices)


def test_norms_far_from_one(simulate):
    """Products of 1e30 leave float32, and so do the product of the rows' scales: orthogonal rows still give 0."""
    dev = simulate(*SOURCES, seed=8, sm_count=1)
    rows = np.zeros((4, 2))
    rows[[0, 2], 0], rows[[1, 3], 1] = 1e30, 1e30
    x = prepare(dev, rows, "float32", normalize=False)
    values, indices = search(dev, x, None, 3, exclude_self=1)
    assert indices.tolist() == [[2, 1, 3], [3, 0, 2], [0, 1, 3], [1, 0, 2]]
    assert (values[:, 0] == np.inf).all()
    assert (values[:, 1:] == 0).all()


def test_schedule_does_not_matter(simulate):
    rng = np.random.default_rng(9)
    rows = rng.standard_normal((150, 20))
    results = []
    for seed, sm_count in ((1, 1), (2, 1)):
        dev = simulate(*SOURCES, seed=seed, sm_count=sm_count)
        results.append(search(dev, prepare(dev, rows), None, 6, exclude_self=1))
    for values, indices in results[1:]:
        assert np.array_equal(values, results[0][0])
        assert np.array_equal(indices, results[0][1])

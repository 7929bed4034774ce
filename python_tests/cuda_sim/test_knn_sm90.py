"""The Hopper top-k kernel, executed: tests of test_knn.py that are about rules and odd values, and its own shapes."""

import numpy as np
import pytest

from python_tests.cuda_sim.structs import prepare
from python_tests.cuda_sim.test_knn import (
    SOURCES,
    TOLERANCE,
    check_exact,
    expected,
    integers,
    search,
    test_broken_rows_rank_first,
    test_equal_rows_rank_by_index,
    test_instances_and_domains,
    test_norms_far_from_one,
    test_rows_that_search_themselves,
)

__all__ = [
    "test_broken_rows_rank_first",
    "test_equal_rows_rank_by_index",
    "test_instances_and_domains",
    "test_norms_far_from_one",
    "test_rows_that_search_themselves",
]


@pytest.fixture
def simulate(simulate, monkeypatch):
    monkeypatch.setenv("LTOOD_CUDA_PATH", "sm90")
    return lambda *sources, **options: simulate(*sources, arch="90a", defines={"LTOOD_SM90A": "1"}, **options)


def is_hopper(dev):
    return any("sm90" in name for name in dev.launches)


@pytest.mark.parametrize(
    ("kind", "n", "q", "d", "k"),
    [
        ("bfloat16", 530, 400, 100, 5),  # three row blocks, four column tiles, two k_tiles
        ("bfloat16", 260, 650, 220, 3),  # four k_tiles: a tile is as long as the ring
        ("float16", 150, 390, 64, 7),
        ("float32", 300, 400, 17, 5),  # two splits
        ("float32", 129, 300, 128, 10),  # six steps a tile: no turns
    ],
)
def test_random_rows(simulate, kind, n, q, d, k):
    rng = np.random.default_rng(0)
    dev = simulate(*SOURCES, seed=1, sm_count=1)
    x, y = (prepare(dev, rng.standard_normal((rows, d)) * 3, kind, half=kind == "float32") for rows in (n, q))
    values, indices = search(dev, x, y, k)
    want, want_indices, s = expected(x, y, k)
    assert is_hopper(dev)
    assert np.abs(values - want).max() <= TOLERANCE
    assert np.abs(np.take_along_axis(s, indices, 1) - want).max() <= TOLERANCE
    assert (np.diff(values, axis=1) <= 0).all()
    assert (indices == want_indices).mean() > 0.99


@pytest.mark.parametrize("seed", [5, 6])
def test_columns_split_over_blocks(simulate, seed):
    dev = simulate(*SOURCES, seed=seed, sm_count=4)
    rng = np.random.default_rng(4)
    check_exact(dev, "bfloat16", integers(rng, 270, 5), integers(rng, 2100, 5), 3)
    assert is_hopper(dev)
    assert any("combine_kernel" in name for name in dev.launches)


def test_wide_rows_go_to_the_other_path(simulate):
    dev = simulate(*SOURCES, seed=1, sm_count=1)
    check_exact(dev, "bfloat16", integers(np.random.default_rng(5), 70, 300), None, 2, exclude_self=1)
    assert not is_hopper(dev)

"""The partial ops of the guided family on the simulated device, glue and all, against their dense definition."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from python_tests.cuda_sim.guided_run import SOURCES, GuidedRun, Problem
from python_tests.ops.test_guided_partial import (
    Dense,
    PartialProblem,
    check,
    check_not_a_number,
    check_the_square,
    close_where_finite,
    cut,
    square,
)
from python_tests.tolerances import assert_gradient_close

# (dtype, N, D, Dg, rows, columns, options) of a square and the part that is cut from it. Blocks of 128 rows and tiles
# of 64 columns, full in one case alone; both parts and each by itself, every type, two groups of output features.
CASES = {
    "both parts, two blocks of rows": (torch.bfloat16, 190, 20, 24, (30, 160), (0, 60), {"distill": True}),
    "contrast alone, no row is a column": (torch.float32, 150, 17, 9, (0, 70), (70, 130), {"gamma": 0.5}),
    "distillation alone": (torch.float16, 90, 150, 20, (20, 90), (0, 70), {"alone": True, "distill": True}),
    "no forces": (torch.float16, 70, 20, 70, (0, 40), (10, 70), {"weighted": False, "teacher_temperature": 0.15}),
    "rows as they are": (
        torch.float32, 70, 12, 16, (3, 60), (10, 70),
        {"normalize": False, "temperature": torch.tensor(2.0), "distill": True},
    ),
    "whole blocks of columns": (torch.float16, 140, 4, 4, (120, 140), (0, 128), {"distill": True}),
    "one row, fewer columns than neighbours": (torch.bfloat16, 20, 3, 2, (11, 12), (10, 13), {"distill": True}),
}  # fmt: skip


def numbered(columns: torch.Tensor, rows: torch.Tensor) -> np.ndarray:
    """Columns, nothing up to the first row, rows."""
    between = columns.new_zeros(-len(columns) % 128, *columns.shape[1:])
    return torch.cat([columns, between, rows]).numpy()


def launched(simulate, p: PartialProblem) -> GuidedRun:
    keys = numbered(p.y_clusters, p.x_clusters), p.far.numpy(), numbered(p.y_instance, p.x_instance)
    rows = (numbered(of_y.float(), of_x.float()) for of_y, of_x in ((p.y, p.x), (p.y_guide, p.x_guide)))
    none = np.zeros((-len(p.y) % 128 + len(p.y) + len(p.x), 0), np.int64)
    options = {"temperature": p.temperature, "kind": "float16", "columns": len(p.y), "diagonal": p.diagonal}
    return GuidedRun(simulate(*SOURCES, seed=1), Problem(*rows, *keys, none, **options))


def case(name: str) -> PartialProblem:
    dtype, n, d, dg, rows, columns, options = CASES[name]
    return cut(square(n, d, dg, dtype, **options), slice(*rows), slice(*columns))


@pytest.mark.parametrize("name", CASES)
def test_against_the_dense_definition(served, name):
    check(case(name))


def test_the_hopper_path(served, monkeypatch):
    monkeypatch.setenv("LTOOD_CUDA_PATH", "sm90")
    check(cut(square(90, 20, 70, torch.float16, distill=True), slice(20, 90), slice(0, 70)))
    for kernel in ("guided_forward_sm90", "guided_backward_sm90"):
        assert any(kernel in launched for launched in served.launches), kernel


@pytest.mark.parametrize(("dtype", "shards"), [(torch.float16, (0,)), (torch.bfloat16, (0, 31))])
def test_shards_merge_to_the_square(served, dtype, shards):
    check_the_square(square(68, 20, 24, dtype, distill=True), shards=shards)


def test_a_row_without_a_column(served):
    p = cut(square(30, 4, 4, torch.float32, distill=True), slice(9, 10), slice(9, 10))
    found = check(replace(p, every=torch.tensor([True])))
    assert found.lse.item() == found.lse_every.item() == found.student_lse.item() == -torch.inf


def test_what_is_out_of_range_belongs_to_no_cluster(simulate):
    """Without the glue, which refuses it where it can read it. A block of rows without a mark reads no tile."""
    p = cut(square(200, 20, 9, torch.float16), slice(60, 200), slice(0, 70))
    p.x_clusters[::7], p.y_clusters[3::5], p.far = -1, 10**12, torch.tensor([1, 2, 4, 1])
    dense, run = Dense(p), launched(simulate, p)
    for name, rows in run.forward().items():
        close_where_finite(torch.from_numpy(rows), dense.forward()[name], torch.float16, name)
    first, every = run.params.first, torch.zeros(140, dtype=torch.bool)
    every[torch.from_numpy(run.order[first + 131 :]) - first] = True
    found, expected = run.forward_every(every.numpy()), Dense(replace(p, every=every)).forward()["lse_every"]
    close_where_finite(torch.from_numpy(found), expected, torch.float16, "lse_every")
    assert run.get("tiles").any(axis=1).tolist() == [False, True]
    of_rows, of_columns, *_ = dense.states()
    grad_unit = run.lse_bwd(numbered(of_columns, of_rows))
    assert_gradient_close(torch.from_numpy(grad_unit), dense.lse_bwd([of_rows, of_columns, None, None]), torch.float16)


def test_not_a_number_reaches_the_sums(served):
    check_not_a_number(cut(square(90, 8, 8, torch.float16, distill=True), slice(20, 90), slice(0, 70)))


def test_the_schedule_changes_no_bit(served, monkeypatch):
    p = cut(square(60, 4, 4, torch.bfloat16, distill=True), slice(20, 60), slice(0, 50))
    state, results = 4 + torch.arange(200.0).double().view(50, 4) / 99, []
    for seed in (11, 12):
        monkeypatch.setattr(served, "seed", seed)
        results.append((*p.forward(), p.lse_bwd((state[:40], state) * 2)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

"""The partial contrastive kernels, executed: row log-sum-exp, columns found, and the lse_bwd, against float64."""

import numpy as np
import pytest
import torch
from cuda_sim.contrastive_sim import (
    ContrastiveLseBwd,
    ContrastiveLseBwdCombine,
    ContrastivePartialSums,
    Exponents,
    launch_factors,
    launch_lse_bwd,
    run,
)
from cuda_sim.structs import prepare
from tolerances import GRADIENT, LOSS, relative_error

SOURCES = (
    "csrc/ops/contrastive/cuda/partial_launch.cu", "csrc/ops/contrastive/cuda/launch.cu",
    "csrc/ops/contrastive/cuda/sm90/launch.cu", "csrc/cuda/operand.cu",
)  # fmt: skip
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture
def device(simulate):
    return lambda **options: simulate(*SOURCES, **{"seed": 1, "sm_count": 2, **options})


class PartialProblem:
    """x [n, D] against y [M, D] on the device, and s [n, M] in float64 of the rows as they were rounded."""

    def __init__(self, dev, x, y, temperature, kind, diagonal, normalize=True, online=None):
        self.dev, self.kind, self.diagonal, self.d = dev, kind, diagonal, x.shape[1]
        half = kind == "float32" and normalize
        self.x, self.y = (prepare(dev, rows, kind, normalize, half=half) for rows in (x, y))
        online = not normalize or temperature < 0.0229 if online is None else online
        self.exponents = Exponents(1 / temperature, None, online)
        self.temperature = temperature
        u, self.v = (unit(p.rows) if normalize else p.rows for p in (self.x, self.y))
        self.s = u @ self.v.T / temperature
        same = np.arange(len(x))[:, None] + diagonal == np.arange(len(y))
        self.s[same] = -np.inf

    def plan_only(self):
        p = ContrastivePartialSums(self.x.operand, self.y.operand, self.exponents, self.diagonal)
        assert self.dev.call("ltood_plan_contrastive_partial", p) == 0, self.dev.complaint
        return p

    def lse(self, **plan):
        dev, n, p = self.dev, len(self.s), self.plan_only()
        for name, value in plan.items():
            setattr(p, name, value)
        sums, maxima, lse = dev.empty((p.k_splits, n)), dev.empty((p.k_splits, n)), dev.empty(n, np.float64)
        p.sums, p.maxima, p.lse = sums.ptr, maxima.ptr if p.exponents.online else None, lse.ptr
        run(dev, "ltood_launch_contrastive_partial", p)
        self.plan = p
        return dev.get(lse)

    def lse_bwd(self, x_lse, x_weight, y_lse=None, y_weight=None, **plan):
        dev, largest = self.dev, None
        weights = [np.asarray(w, np.float32) for w in (x_weight, y_weight) if w is not None]
        if self.x.operand.is_half:
            largest = dev.put(np.abs(np.concatenate(weights)).max(keepdims=True))
        factors = []
        for operand, lse, weight in ((self.x.operand, x_lse, x_weight), (self.y.operand, y_lse, y_weight)):
            arrays = [
                None if a is None else dev.put(np.asarray(a, t)) for a, t in ((lse, np.float64), (weight, np.float32))
            ]
            pointers = [a.ptr if a else None for a in arrays]
            factors.append((arrays, launch_factors(dev, operand, self.exponents, *pointers, largest and largest.ptr)))
        p = ContrastiveLseBwd(self.x.operand, self.y.operand, self.exponents, self.diagonal)
        splits = launch_lse_bwd(dev, p, *(f for _, f in factors), **plan)
        out = dev.empty((len(self.s), self.d))
        run(
            dev,
            "ltood_launch_contrastive_lse_bwd_combine",
            ContrastiveLseBwdCombine(p, self.d, largest and largest.ptr, out.ptr),
        )
        self.lse_bwd_launch = p, splits
        return dev.get(out)


def unit(rows):
    with np.errstate(invalid="ignore"):
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def log_sum_exp(s, axis):
    return torch.from_numpy(s).logsumexp(axis).numpy()


def assert_close(actual, expected, tolerance):
    error = relative_error(torch.from_numpy(actual), torch.from_numpy(expected))
    assert error <= tolerance, f"off by {error:.1e}"


def check(problem, rng, sums_plan=None, **lse_bwd_plan):
    """lse, then the lse_bwd with both sides' weights and with the rows' alone; log-sum-exps are over more columns."""
    kind, s = TYPES[problem.kind], problem.s
    lse = problem.lse(**sums_plan or {})
    assert_close(lse, log_sum_exp(s, 1), LOSS[kind])
    x_lse, y_lse = np.logaddexp(log_sum_exp(s, 1), 1.0), np.logaddexp(log_sum_exp(s, 0), 1.0)
    x_weight, y_weight = rng.standard_normal(s.shape[0]), rng.standard_normal(s.shape[1])
    x_weight[::5], y_weight[::7] = 0, 0
    of_rows, of_cols = np.exp(s - x_lse[:, None]) * x_weight[:, None], np.exp(s - y_lse) * y_weight
    lse_bwd = problem.lse_bwd(x_lse, x_weight, y_lse, y_weight, **lse_bwd_plan)
    assert_close(lse_bwd, (of_rows + of_cols) @ problem.v / problem.temperature, GRADIENT[kind])


def draw(rng, n, m, d):
    return (rng.standard_normal((rows, d)).astype(np.float32) / np.float32(d**0.5) for rows in (n, m))


STREAMED = {"resident": 0, "shared_bytes": 3 * (64 + 128) * 128}

# (kind, n, M, D, diagonal, options). Three tiles of rows (128) and of columns (32 or 64), none of them full; D of one
# k_tile, of two, and rows that are streamed; every type in both forms where both are shipped.
CASES = {
    "bfloat16, one k_tile": ("bfloat16", 270, 140, 40, 30, {}),
    "bfloat16, two k_tiles, online": ("bfloat16", 130, 200, 100, 69, {"online": True}),
    "bfloat16, streamed": ("bfloat16", 130, 140, 150, -60, {}),
    "bfloat16 as it is": ("bfloat16", 130, 140, 40, 9, {"normalize": False}),
    "float16, one k_tile": ("float16", 130, 140, 64, -20, {}),
    "float16, streamed, online": ("float16", 40, 140, 80, 5, {"online": True}),
    "float16 as it is": ("float16", 130, 140, 30, 139, {"normalize": False}),
    "float32, one k_tile": ("float32", 140, 200, 20, 100, {}),
    "float32, online": ("float32", 130, 140, 24, 4, {"online": True}),
    "float32, streamed": ("float32", 258, 140, 160, -129, {}),
    "float32, as it is, streamed": ("float32", 130, 140, 136, 2, {"normalize": False}),
}


@pytest.mark.parametrize(("name", "case"), CASES.items(), ids=CASES.keys())
def test_against_float64(device, name, case):
    kind, n, m, d, diagonal, options = case
    rng, plan = np.random.default_rng(0), STREAMED if "streamed" in name else {}
    problem = PartialProblem(device(), *draw(rng, n, m, d), 0.2, kind, diagonal, **options)
    check(problem, rng, plan, **plan)


def test_long_rows_and_a_cold_temperature(device):
    rng = np.random.default_rng(1)
    x, y = draw(rng, 130, 70, 30)
    long = y * rng.uniform(0.1, 9, (70, 1)).astype(np.float32)
    check(PartialProblem(device(), x * 9, long, 0.3, "bfloat16", 7, normalize=False), rng)
    check(PartialProblem(device(), x, y, 0.01, "bfloat16", 7), rng)


@pytest.mark.parametrize("online", [False, True])
def test_ranges_of_columns(device, online):
    """Six tiles of columns, for the sums in three ranges, for the lse_bwd in four, the last of them empty."""
    rng = np.random.default_rng(2)
    problem = PartialProblem(device(), *draw(rng, 130, 330, 20), 0.2, "bfloat16", 200, online=online)
    assert_close(problem.lse(k_splits=3, k_split_tiles=2), log_sum_exp(problem.s, 1), LOSS[torch.bfloat16] / 1000)
    check(problem, rng, k_splits=4)


def test_the_plan_cuts_columns_for_few_rows(device):
    rng = np.random.default_rng(3)
    problem = PartialProblem(device(sm_count=8), *draw(rng, 20, 1100, 8), 0.2, "bfloat16", 500)
    check(problem, rng)
    assert (problem.plan.k_splits, problem.plan.k_split_tiles) == (2, 9)
    assert problem.lse_bwd_launch[0].k_splits == 16
    wide = PartialProblem(device(), *draw(rng, 2, 3, 700), 0.2, "float32", 0)
    assert wide.plan_only().resident == 0  # 352 KiB of rows


def test_columns_without_a_gradient(device):
    """No weights of the columns: the rows' term alone. Far log-sum-exps and rows without a column give zeros."""
    rng = np.random.default_rng(4)
    problem = PartialProblem(device(), *draw(rng, 130, 70, 20), 0.2, "float16", -40)
    x_lse, x_weight = np.full(130, 4.0), np.ones(130)
    x_lse[3], x_lse[5], x_weight[3] = -np.inf, 900, 0
    lse_bwd = problem.lse_bwd(x_lse, x_weight)
    weights = np.exp(problem.s - np.where(x_lse == -np.inf, 0, x_lse)[:, None]) * x_weight[:, None]
    assert_close(lse_bwd, weights @ problem.v / 0.2, GRADIENT[torch.float16])
    assert not lse_bwd[[3, 5]].any()


@pytest.mark.parametrize("online", [False, True])
def test_a_row_without_a_column(device, online):
    x = np.ones((1, 8), np.float32)
    problem = PartialProblem(device(), x, x, 0.2, "float32", 0, online=online)
    assert problem.lse().tolist() == [-np.inf]
    lse_bwd = problem.lse_bwd(np.full(1, -np.inf), np.zeros(1), np.full(1, -np.inf), np.zeros(1))
    assert not lse_bwd.any()


def test_rows_that_are_not_finite(device):
    rng = np.random.default_rng(5)
    x, y = draw(rng, 130, 70, 8)
    x[7, 2], y[40, 3] = np.nan, np.inf
    lse = PartialProblem(device(), x, y[:40], 0.2, "float32", 30).lse()
    assert np.array_equal(np.isnan(lse), np.arange(130) == 7)
    lse = PartialProblem(device(), x, y, 0.2, "float32", 30).lse()
    assert np.array_equal(np.isnan(lse), np.arange(130) != 10)  # column 40 is row 10 itself


def test_the_square_is_its_own_partial(device):
    """The same bits for rows 0 to n against themselves and against a copy: nothing else depends on the operand."""
    rng = np.random.default_rng(6)
    x, _ = draw(rng, 140, 1, 20)
    whole = PartialProblem(device(), x, x, 0.2, "bfloat16", 0)
    lse, weight = whole.lse(), rng.standard_normal(140)
    lse_bwd = whole.lse_bwd(lse, weight, lse, weight)
    part = PartialProblem(device(seed=2), x[100:], x, 0.2, "bfloat16", 100)
    assert np.array_equal(part.lse(), lse[100:])
    assert_close(part.lse_bwd(lse[100:], weight[100:], lse, weight), lse_bwd[100:].astype(np.float64), 1e-6)

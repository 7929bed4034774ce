"""The harness tells wrong, slow, failing and missing implementations; what it times agrees with the reference."""

import time

import pytest
import torch

from benchmarks import harness, ops, timing
from benchmarks.cases import BOTH, FORWARD, Case, suite
from benchmarks.implementations import IMPLEMENTATIONS, Implementation, of_case, plain, triton_kernels

CASE = Case("nt_xent", 64, D=16)
OPTIONS = harness.Options(seconds=0.01, sets=2)
RATES = {"product_flop_per_s": 1e11, "copy_bytes_per_s": 1e10, "exp_per_s": 1e9}
EAGER = IMPLEMENTATIONS["eager"]


def made(name, function, kind="rival"):
    return Implementation(name, {"nt_xent": function}, "for a test", kind=kind)


def measured(*implementations, case=CASE):
    rows = harness.run_case(case, OPTIONS, RATES, {i.name: i for i in (EAGER, *implementations)})
    return {row["implementation"]: row for row in rows}


def nt_xent(z, temperature):
    return ops.OPS["nt_xent"].definition(z, temperature)


def test_a_right_implementation_is_timed_and_compared():
    rows = measured(made("same", lambda: nt_xent), made("mine", lambda: nt_xent, kind="ours"))
    row = rows["mine"]
    assert list(rows) == ["eager", "same", "mine"]
    assert row["status"] == "ok"
    assert row["error"] <= 1e-5
    assert row["min_ms"] <= row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
    others = [rows[name]["median_ms"] for name in ("eager", "same")]
    assert row["vs_best_rival"] == pytest.approx(min(others) / row["median_ms"])
    assert row["vs_eager"] == pytest.approx(others[0] / row["median_ms"])
    assert row["of_floor"] == pytest.approx(row["floor_ms"] / row["median_ms"])


def test_ours_is_compared_with_others_not_with_itself():
    rows = [
        {"implementation": name, "kind": kind, "status": "ok", "median_ms": ms}
        for name, kind, ms in (("eager", "baseline", 8.0), ("ours", "ours", 2.0), ("ours-cudagraph", "ours", 1.0))
    ]
    compared = harness.with_ratios([*rows, {**rows[0], "implementation": "wrong", "status": "wrong"}], CASE, RATES)
    assert [row.get("vs_best_rival") for row in compared] == [None, 4, 8, None]


def test_a_wrong_loss_is_listed_with_its_error_and_not_timed():
    row = measured(made("wrong", lambda: lambda z, temperature: 1.001 * nt_xent(z, temperature)))["wrong"]
    assert row["status"] == "wrong"
    assert row["message"] == "loss off by 1.0e-03, allowed 1e-05"
    assert "median_ms" not in row


def test_a_wrong_gradient_is_wrong_too():
    def loss(z, temperature):
        right = nt_xent(z, temperature)
        return right + 0.01 * (right - right.detach())

    row = measured(made("wrong", lambda: loss))["wrong"]
    assert row["status"] == "wrong"
    assert row["message"].startswith("gradient off by 1.0e-02")


def test_a_nan_is_wrong():
    row = measured(made("nan", lambda: lambda z, temperature: nt_xent(z, temperature) * torch.nan))["nan"]
    assert row["status"] == "wrong"


def test_a_slow_implementation_is_slow():
    def slow(z, temperature):
        time.sleep(0.05)
        return nt_xent(z, temperature)

    row = measured(made("slow", lambda: slow))["slow"]
    assert row["status"] == "ok"
    assert row["median_ms"] > 50
    assert row["vs_eager"] < 0.5
    assert row["vs_best_rival"] < 0.5


def test_a_failure_is_a_row_with_its_message():
    def fails(z, temperature):
        raise RuntimeError("no such kernel\nand a traceback")

    row = measured(made("fails", lambda: fails))["fails"]
    assert (row["status"], row["message"]) == ("failed", "RuntimeError: no such kernel")


def test_a_missing_rival_is_reported():
    def load():
        import a_library_that_does_not_exist  # noqa: F401

    row = measured(made("absent", load))["absent"]
    assert row["status"] == "missing"
    assert "a_library_that_does_not_exist" in row["message"]


def test_too_much_memory_is_a_failure_not_the_end_of_the_run():
    def hungry(z, temperature):
        return nt_xent(z, temperature) + torch.ones(1 << 28).sum() * 0

    options = harness.Options(seconds=0.01, sets=1, memory_mib=256)
    row = harness.measure(CASE, made("hungry", lambda: hungry), options)
    assert row["status"] == "failed"
    assert "memory" in row["message"]


def test_peak_memory_is_of_the_call():
    torch.ones(1 << 26)  # a higher peak before it
    assert timing.peak_mib_cpu(lambda: torch.ones(1 << 24)) == pytest.approx(64, abs=8)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [True, False])
def test_every_case_has_a_baseline_and_a_work(device, quick):
    for case in suite(device, quick):
        names = [i.name for i in of_case(case)]
        assert "eager" in names
        assert all(amount >= 0 for amount in ops.OPS[case.op].work.amounts(case))
        assert harness.floor_ms(case, RATES) > 0


@pytest.mark.parametrize("op", [name for name in ops.OPS if hasattr(plain, name)])
def test_plain_losses_are_the_reference(op):
    """The fair baseline computes the same, loss and gradient, in float64."""
    case = Case(op, 64, D=16, K=4)
    inputs = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in leaves(case).items()}
    for value in inputs.values():
        if torch.is_tensor(value) and value.is_floating_point():
            value.requires_grad_()
    if "guide" in inputs:
        inputs["guide"].requires_grad_(False)
    found = harness.outcome(case, getattr(plain, op), inputs)
    truth = harness.outcome(case, ops.OPS[op].definition, inputs)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def leaves(case):
    return {k: v.detach() if torch.is_tensor(v) else v for k, v in ops.make_inputs(case, 0).items()}


def test_knn_is_the_reference_of_the_package():
    from ltood_fast.reference import neighbors as definition

    x = torch.randn(3000, 8, dtype=torch.float64)
    cosines, columns = ops.knn(x, 5)
    expected, rows = definition.knn(x, 5)
    torch.testing.assert_close(cosines, expected)
    assert torch.equal(columns, rows)


def test_nt_xent_from_a_log_sum_exp_with_the_diagonal():
    """What the adapters of kernels that cannot leave the diagonal out do with their rows."""

    def rows(x, y, targets, temperature):
        return torch.nn.functional.cross_entropy(x @ y.T / temperature, targets, reduction="none")

    case = Case("nt_xent", 64, D=16)
    found = harness.errors(case, triton_kernels._nt_xent_from(rows))
    assert harness.wrongness(case, found) is None


def test_clip_adapters_average_both_directions():
    def rows(x, y, targets, temperature):
        return torch.nn.functional.cross_entropy(x @ y.T / temperature, targets)

    case = Case("clip", 32, D=16)
    assert harness.wrongness(case, harness.errors(case, triton_kernels._clip_from(rows))) is None


def test_directions_time_the_gradient_or_not():
    assert len(harness.call(nt_xent, ops.make_inputs(CASE, 0), BOTH)) == 2
    assert len(harness.call(nt_xent, ops.make_inputs(CASE, 0), FORWARD)) == 1


@pytest.mark.parametrize(
    "case", [c for c in suite("cpu", True) if "ours" in [i.name for i in of_case(c)]], ids=lambda c: c.name
)
def test_ours_passes_the_check(case):
    function = IMPLEMENTATIONS["ours"].loaders[case.op]()
    assert harness.wrongness(case, harness.errors(case, function)) is None

"""A short run of the fuzz with a fixed seed, and that the fuzz can see what it looks for."""

import pytest
import torch

from python_tests.fuzz import cases
from python_tests.fuzz.__main__ import fuzz
from python_tests.fuzz.cases import make_case
from python_tests.ops.op_table import OPS

CASES = 300


def test_random_calls_agree_with_oracle():
    report = fuzz(seed=0, cases=CASES)
    assert sum(report.counts.values()) == CASES
    assert not report.kinds, str(report)


def test_case_is_the_same_every_time():
    for number in range(20):
        one, other = make_case(3, number), make_case(3, number)
        assert str(one) == str(other)
        for name, value in one.sample.tensors.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other.sample.tensors[name])) or not one.finite


def test_cases_reach_every_op_dtype_and_special_row():
    made = [make_case(0, number) for number in range(600)]
    assert {case.op.name for case in made} == set(OPS)
    words = {word for case in made for word in case.words}
    assert {*cases.SPECIAL, *cases.BROKEN, "float16", "bfloat16", "float32", "float64", "as given"} <= words
    assert {len(case.sample.tensors[case.op.rows[0]]) for case in made} >= {1, 2}


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.differentiable])
def test_fuzz_sees_an_error_of_one_percent(name, monkeypatch):
    """The judge's rule excuses what rounding explains and no more: most calls off by 1 % are found."""
    right = cases.disagreement
    monkeypatch.setattr(cases, "disagreement", lambda op, case: right(_off_by_one_percent(op), case))
    outcomes = [cases.verdict(case)[0] for number in range(40) if (case := make_case(1, number, name)).finite]
    assert outcomes.count("wrong") > 0.3 * len(outcomes)


def _off_by_one_percent(op):
    def oracle(**given):
        return {key: value * 1.01 for key, value in op.oracle(**given).items()}

    return cases.Op(**{**vars(op), "oracle": oracle})

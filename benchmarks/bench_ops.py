"""The quick cases under pytest-benchmark: pytest benchmarks --benchmark-only [--benchmark-json=FILE]

A group is a case, a benchmark an implementation of it: checked against the float64 reference first, failed when it is
wrong, skipped with its message when it cannot be imported. `python -m benchmarks run` measures larger sizes.
"""

import pytest
import torch

from benchmarks import harness, timing
from benchmarks.cases import suite
from benchmarks.implementations import of_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TIMED = [(case, who) for case in suite(DEVICE, quick=True) for who in of_case(case)]


@pytest.fixture(scope="module", autouse=True)
def _fixed_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 2))
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("case", "who"), TIMED, ids=lambda value: value.name)
def test_time(benchmark, case, who):
    try:
        function = who.loaders[case.op]()
    except ImportError as error:
        pytest.skip(harness.message_of(error))
    found = harness.errors(case.checked, function)
    wrong = harness.wrongness(case, found)
    assert wrong is None, wrong
    inputs = harness.make_inputs(case, harness.SEED)

    def call():
        result = harness.call(function, inputs, case.direction)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    call()
    benchmark.group = case.name
    benchmark.extra_info.update(
        case.labels(), implementation=who.name, error=max(found), peak_mib=timing.peak_mib(call, case.device)
    )
    benchmark(call)

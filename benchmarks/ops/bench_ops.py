"""Every op of the registry against its rivals, in one process on the same threads.

pytest benchmarks --benchmark-only --benchmark-json=results.json && python -m benchmarks table results.json
"""

import pytest
import torch

from benchmarks.harness import DIRECTIONS, measure
from benchmarks.registry import CASES, implementations

TIMED = [(c, d, i) for c in CASES for d in c.directions for i in (*c.rivals, "ours")]


@pytest.fixture(scope="module", autouse=True)
def _fixed_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 2))
    yield
    torch.set_num_threads(before)


def first_result(function, inputs):
    result = function(**inputs)
    return (result[0] if isinstance(result, tuple) else result).detach()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_implementations_agree(case):
    """What is timed below computes the same thing: a wrong implementation is not worth timing."""
    inputs = case.make(torch.Generator().manual_seed(0))
    results = {name: first_result(f, inputs) for name, f in implementations(case).items()}
    for name, result in results.items():
        torch.testing.assert_close(result, results["ours"], rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("case", "direction", "implementation"), TIMED, ids=lambda p: getattr(p, "name", p))
def test_time(benchmark, case, direction, implementation):
    benchmark.group = f"{case.name} {direction}"
    call = DIRECTIONS[direction](implementations(case)[implementation], case.make(torch.Generator().manual_seed(0)))
    labels = {"op": case.op, "direction": direction, "implementation": implementation, **case.size}
    measure(benchmark, call, case.rounds, **labels)

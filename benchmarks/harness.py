"""The one harness: check an implementation against the float64 reference, then time it, then compare the rows.

A wrong implementation is a row with its error and no time, one that raises is a row with its message, one that cannot
be imported is a row that says so. Nothing is dropped in silence.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from . import timing
from .cases import BOTH, Case
from .implementations import Implementation, of_case
from .ops import OPS, make_inputs

OK, WRONG, FAILED, MISSING = "ok", "wrong", "failed", "missing"
SEED = 0
# ||a - reference|| / ||reference|| against the float64 reference fed the same rounded inputs: (loss, each gradient).
ALLOWED = {"float32": (1e-5, 1e-4), "bfloat16": (1e-2, 1e-2), "float16": (1e-2, 1e-2)}
ALLOWED_INERTIA = 1e-3  # k-means: rows between two centroids may go to either


@dataclass(frozen=True)
class Options:
    seconds: float = 0.6
    """Spent on the rounds of a row."""
    sets: int = 4
    """Input sets taken in turn."""
    memory_mib: float = 0.0
    """CPU: what a row may allocate; 0 = nine tenths of what the machine has left."""


def call(function: Callable, inputs: dict, direction: str) -> tuple[Tensor, ...] | object:
    """What is timed: (loss, gradients...), the loss without a graph, or what a search returns."""
    leaves = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
    if not leaves:
        return function(**inputs)
    with torch.set_grad_enabled(direction == BOTH):
        result = function(**inputs)
        loss = result[0] if isinstance(result, tuple) else result
        return (loss.detach(), *torch.autograd.grad(loss, leaves)) if direction == BOTH else (loss,)


def outcome(case: Case, function: Callable, inputs: dict) -> tuple[Tensor, ...]:
    """What of a call is compared with the reference."""
    result = call(function, inputs, case.direction)
    select = OPS[case.op].outcome
    return result if select is None else (select(result, inputs),)


@lru_cache(maxsize=1)  # a case's implementations come one after another
def expected(case: Case) -> tuple[Tensor, ...]:
    """The float64 reference on the inputs that the implementations get, rounded as theirs are."""
    inputs = {}
    for name, value in make_inputs(case, SEED).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.detach().double().requires_grad_(value.requires_grad)
        inputs[name] = value
    return outcome(case, OPS[case.op].definition, inputs)


def errors(case: Case, function: Callable) -> list[float]:
    """Relative errors of the loss and of each gradient, or of what a search found."""
    found = outcome(case, function, make_inputs(case, SEED))
    pairs = zip(found, expected(case), strict=True)
    return [((a.double() - b).norm() / b.norm().clamp(min=1e-300)).item() for a, b in pairs]


def allowed(case: Case) -> tuple[float, float]:
    return (ALLOWED_INERTIA,) * 2 if case.op == "kmeans" else ALLOWED[case.dtype]


def wrongness(case: Case, found: list[float]) -> str | None:
    """What is wrong in words, None if nothing is. A NaN is wrong."""
    loss, gradient = allowed(case)
    for i, error in enumerate(found):
        limit = gradient if i else loss
        if not error <= limit:
            what = "gradient" if i else ("loss" if OPS[case.op].outcome is None else "result")
            return f"{what} off by {error:.1e}, allowed {limit:.0e}"
    return None


def message_of(failure: Exception) -> str:
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0][:200] if lines else 'without a message'}"


def _timed(case: Case, implementation: Implementation, function: Callable, options: Options) -> dict:
    sets = [make_inputs(case, SEED + i) for i in range(options.sets)]
    calls = [lambda inputs=inputs: call(function, inputs, case.direction) for inputs in sets]
    if case.checked != case:
        calls[0]()  # else the check was the first call: compilation and thread pools are not the op's cost
    peak = timing.peak_mib(calls[0], case.device)
    if implementation.graphed:
        calls = [timing.graphed(each) for each in calls]
    times = timing.measure(calls, case.device, options.seconds)
    return {**times.columns(), "peak_mib": round(peak, 2)}


def measure(case: Case, implementation: Implementation, options: Options) -> dict:
    """One row: the case, who computed it, and its times or the reason why there are none."""
    row = {**case.labels(), "implementation": implementation.name, "kind": implementation.kind}
    row |= {"tested_on": implementation.tested_on, "checked_N": case.checked.N}
    limit = options.memory_mib or 0.9 * timing.available_mib()
    try:
        function = implementation.loaders[case.op]()
    except Exception as failure:
        return {**row, "status": MISSING, "message": message_of(failure)}
    try:
        expected(case.checked)  # the reference's memory is not the implementation's
        with timing.memory_limit(limit) if case.device == "cpu" else nullcontext():
            found = errors(case.checked, function)
            row["error"] = max(found)
            if wrong := wrongness(case, found):
                return {**row, "status": WRONG, "message": wrong}
            return {**row, "status": OK, **_timed(case, implementation, function, options)}
    except Exception as failure:
        return {**row, "status": FAILED, "message": message_of(failure)}
    finally:
        gc.collect()
        if case.device == "cuda":
            torch.cuda.empty_cache()


def floor_ms(case: Case, rates: dict[str, float]) -> float:
    """The roofline: the least time that the op's products, exponentials or bytes take at the measured rates.

    float32 rows on a GPU are multiplied in 16-bit parts, three passes, where float32's precision is to be kept.
    """
    flop, exps, moved = OPS[case.op].work.amounts(case)
    passes = 3 if case.device == "cuda" and case.dtype == "float32" else 1
    product_rate = rates.get(f"product_{case.dtype}_flop_per_s", rates["product_flop_per_s"])
    seconds = (
        passes * flop / product_rate,
        exps / rates["exp_per_s"],
        moved / rates["copy_bytes_per_s"],
    )
    return 1e3 * max(seconds)


def with_ratios(rows: list[dict], case: Case, rates: dict[str, float]) -> list[dict]:
    """The rows of a case, each with the floor and its part of the time, its speed-up over eager, and the speed-up over
    the best of the others: baselines and rivals for ours, everybody else's best for a rival."""
    floor = floor_ms(case, rates)
    flop, _, moved = OPS[case.op].work.amounts(case)
    times = {row["implementation"]: row["median_ms"] for row in rows if row["status"] == OK}
    kinds = {row["implementation"]: row["kind"] for row in rows}
    compared = []
    for row in rows:
        row = {**row, "floor_ms": floor, "floor_flop": flop, "floor_bytes": moved}
        if row["status"] == OK:
            mine = row["median_ms"]
            others = [t for name, t in times.items() if name != row["implementation"] and kinds[name] != "ours"]
            row["of_floor"] = floor / mine
            row["vs_eager"] = times["eager"] / mine if "eager" in times else None
            row["vs_best_rival"] = min(others) / mine if others else None
        compared.append(row)
    return compared


def run_case(
    case: Case, options: Options, rates: dict[str, float], registry: dict[str, Implementation] | None = None
) -> list[dict]:
    """Every implementation of a case, measured and compared."""
    return with_ratios([measure(case, each, options) for each in of_case(case, registry)], case, rates)

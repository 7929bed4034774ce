"""One run: the machine and its rates, the cases of a suite, training and re-sampling."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from . import harness, resampling, tables, training
from .cases import suite
from .implementations import IMPLEMENTATIONS, of_case
from .machine import machine, provenance, rates


def _fixed_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return
    threadpool_limits(threads)  # OpenMP and BLAS of NumPy, FAISS and scikit-learn


def _implementations(rows: list[dict]) -> dict[str, dict]:
    """Who took part: version, settings, and where the adapter has run."""
    named = {row["implementation"]: IMPLEMENTATIONS[row["implementation"]] for row in rows}
    return {
        name: {"kind": i.kind, "version": i.version(), "settings": i.settings, "tested_on": i.tested_on}
        for name, i in named.items()
    }


def run(
    device: str = "cpu",
    *,
    quick: bool = False,
    parts: tuple[str, ...] = ("ops", "training", "resampling"),
    threads: int = 2,
    seconds: float | None = None,
    only: str | None = None,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Everything that `results_file` describes. Prints the rows of a case as they come, and saves what there is so
    far after each: a run that is ended early has not been for nothing.

    Raises:
        ValueError: no such device here, or no such case.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA device, torch.cuda.is_available() is False")
    cases = [case for case in suite(device, quick) if only is None or only in case.name]
    if not cases:
        raise ValueError(f"--only {only}: no case of this suite has that in its name")
    start = time.perf_counter()
    _fixed_threads(threads)
    options = harness.Options(seconds=seconds or (0.2 if quick else 0.6))
    measured = rates(device)
    result: dict[str, Any] = {
        "machine": machine(device, threads),
        **provenance(),
        "seed": harness.SEED,
        "settings": {"quick": quick, "seconds": options.seconds, "sets": options.sets, "allowed": harness.ALLOWED},
        "rates": measured,
        "implementations": {},
        "rows": [],
    }

    def done() -> dict[str, Any]:
        result["implementations"] = _implementations(result["rows"])
        result["took_s"] = round(time.perf_counter() - start)
        save(result)
        return result

    for case in cases if "ops" in parts else ():
        print(f"\n{case.name}: {len(of_case(case))} implementations", flush=True)
        group = harness.run_case(case, options, measured)
        print("\n".join("  " + "  ".join(filter(None, tables.cells(row))) for row in group), flush=True)
        result["rows"] += group
        done()
    if "training" in parts:
        result["training"] = training.run(device, quick, options, measured)
        done()
    if "resampling" in parts:
        result["resampling"] = resampling.run(quick)
    return done()

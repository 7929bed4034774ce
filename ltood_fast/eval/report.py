"""The report of a run: a table for the terminal, report.json for programs, report.html for people."""

from __future__ import annotations

import json
from pathlib import Path

from .._files import write_atomic
from .results import RunResults, to_json

SCHEMA, SCHEMA_VERSION = "ltood_fast.report", 1


def format_table(results: RunResults) -> str:
    """The stages side by side, in per cent, as plain text."""
    header = ["", "overall", "Many", "Medium", "Few", "std", "kNN"]
    rows = [header]
    for stage in results.stages:
        groups = [stage.probe[key] for key in ("overall", "many", "medium", "few", "std")]
        rows.append([stage.title, *map(_percent, groups), _percent(stage.knn and stage.knn["overall"])])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def write_report(run_dir: str | Path, results: RunResults) -> Path:
    """Writes ``report.json`` and ``report.html`` into the run's folder, each all or nothing.

    Returns:
        The path of ``report.html``.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    data = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **to_json(results)}
    write_atomic(run_dir / "report.json", json.dumps(data, indent=1, allow_nan=False).encode())
    return run_dir / "report.html"


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.2f}"

"""The JSON of a run: written once, read by compare, plot, report and whoever cites it.

schema, version   "ltood_fast.benchmarks", 1: a change that an old reader would misread gets a new number
machine           device, cores, threads, driver, versions of torch and Python
commit, changed, date, seed, settings, rates, implementations (version, settings, where its adapter was tested)
rows              a case, an implementation, status (ok, wrong, failed, missing); if ok: median_ms, p10_ms, p90_ms,
                  min_ms, rounds, peak_mib, error; floor_ms, of_floor, vs_eager, vs_best_rival (speed-ups)
training          share of a step spent in the loss; largest batches that fit
resampling        one OOD re-sampling, exact and by IVF
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCHEMA, VERSION = "ltood_fast.benchmarks", 1
REQUIRED = ("machine", "commit", "date", "seed", "rates", "implementations", "rows")
ROW_REQUIRED = ("case", "op", "N", "dtype", "direction", "device", "implementation", "kind", "status")
KEY = ("op", "N", "D", "K", "k", "temperature", "dtype", "direction", "device", "implementation")


def key(row: dict) -> tuple:
    """What makes two rows of two runs the same measurement."""
    return tuple(row.get(name) for name in KEY)


def _refuse(path: Path, problem: str) -> None:
    raise ValueError(f"benchmarks: {path} {problem}")


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"schema": SCHEMA, "version": VERSION, **result}
    check(path, data)
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")


def read(path: Path) -> dict[str, Any]:
    """The result of a run.

    Raises:
        ValueError: the file is not one, or of another version of the schema; the sentence says which.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        _refuse(path, f"cannot be read: {error.strerror}")
    except ValueError as error:
        _refuse(path, f"is no JSON: {error}")
    check(path, data)
    return data


def check(path: Path, data: Any) -> None:
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        _refuse(path, f"is not a result of `python -m benchmarks run`: its schema is not {SCHEMA!r}")
    if data.get("version") != VERSION:
        _refuse(path, f"has version {data.get('version')} of the schema, this code reads {VERSION}")
    if missing := [name for name in REQUIRED if name not in data]:
        _refuse(path, f"lacks {', '.join(missing)}")
    for i, row in enumerate(data["rows"]):
        if missing := [name for name in ROW_REQUIRED if name not in row]:
            _refuse(path, f"lacks {', '.join(missing)} in row {i}")
        if row["status"] == "ok" and not {"median_ms", "peak_mib", "error"} <= row.keys():
            _refuse(path, f"lacks a time, a memory or an error in row {i}, whose status is ok")

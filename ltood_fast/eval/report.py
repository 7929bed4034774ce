"""The report of a run: a table for the terminal, report.json for programs, report.html for people."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._files import write_atomic
from .plots import Picture, draw_pictures
from .results import RunResults, to_json
from .signatures import Signature, check_signatures, format_signatures

SCHEMA, SCHEMA_VERSION = "ltood_fast.report", 1
COLUMNS = ("overall", "Many", "Medium", "Few", "std", "kNN")


def format_table(results: RunResults) -> str:
    """The stages side by side as plain text: linear probe in groups and kNN overall, in per cent; the last column of
    the probe is the standard deviation of the groups, in points."""
    rows = [["", *COLUMNS], *([title, *cells] for title, cells in _table(results))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def format_findings(results: RunResults) -> str:
    """The failure signatures as plain text, one or two lines each."""
    return format_signatures(check_signatures(results))


def write_report(run_dir: str | Path, results: RunResults) -> Path:
    """Writes ``report.json`` and ``report.html`` into the run's folder, each all or nothing.

    The page holds its pictures and styles itself, so it can be read offline and mailed as one file.

    Returns:
        The path of ``report.html``.

    Raises:
        OSError: a file cannot be written; the old ones stay as they were.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    signatures = check_signatures(results)
    page = render_page(results, signatures, draw_pictures(results))
    data = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **to_json(results), "signatures": to_json(signatures)}
    write_atomic(run_dir / "report.json", json.dumps(data, indent=1, allow_nan=False).encode())
    write_atomic(run_dir / "report.html", page.encode())
    return run_dir / "report.html"


def read_report(path: str | Path) -> dict[str, Any]:
    """The content of a ``report.json`` as plain values.

    Raises:
        ValueError: the file is not such a report, or one of another version.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"read_report: path must be a report.json, got {path}, which is no JSON: {error}") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"read_report: path must be a report.json of {SCHEMA}, got {path}, which says {schema!r}")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"read_report: schema_version must be {SCHEMA_VERSION}, got {data.get('schema_version')} in {path}"
        )
    return data


def render_page(results: RunResults, signatures: list[Signature], pictures: list[Picture]) -> str:
    """The page as one string of HTML."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ltood_fast.eval", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        results=results,
        columns=COLUMNS,
        table=_table(results),
        confusions=_confusions(results),
        signatures=signatures,
        warnings=sum(signature.state == "warning" for signature in signatures),
        pictures=pictures,
        base64=lambda png: base64.b64encode(png).decode(),
        config=_flat(to_json(results.config)),
        build=_flat({key: value for key, value in to_json(results.build).items() if key != "kernels"}),
        kernels=_kernels(results),
    )


def _table(results: RunResults) -> list[tuple[str, list[str]]]:
    """(title, the cells of COLUMNS) of each stage."""
    rows = []
    for stage in results.stages:
        values = [stage.probe[key] for key in ("overall", "many", "medium", "few", "std")]
        values.append(stage.knn["overall"] if stage.knn else None)
        rows.append((stage.title, ["-" if value is None else f"{100 * value:.2f}" for value in values]))
    return rows


def _confusions(results: RunResults, at_most: int = 8) -> list[tuple[str, str]]:
    """(stage, its most frequent mistakes in words)."""
    lines = []
    for stage in results.stages:
        mistakes = [
            (n, results.class_names[true], results.class_names[answer], sum(row))
            for true, row in enumerate(stage.confusion)
            for answer, n in enumerate(row)
            if n > 0 and true != answer
        ]
        worst = sorted(mistakes, key=lambda mistake: -mistake[0])[:at_most]
        lines.append((stage.title, ", ".join(f"{a} → {b} ({n} of {total})" for n, a, b, total in worst) or "none"))
    return lines


def _kernels(results: RunResults) -> list[tuple[str, list[str]]]:
    """(device, the functions that had a kernel there)."""
    kernels = results.build.get("kernels", {})
    devices = dict.fromkeys(device for by_device in kernels.values() for device in by_device)
    return [
        (device, [name for name, served in kernels.items() if served.get(device) == "kernel"]) for device in devices
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """[("section.key", "value")] of nested dicts."""
    pairs = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{key}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            pairs.append((f"{prefix}{key}", text or "none"))
    return pairs

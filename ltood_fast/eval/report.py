"""The report of a run: a table for the terminal, report.json for programs, report.html for people."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._files import write_atomic
from .._keys import flatten
from .plots import Picture, draw_pictures
from .results import MEASURES, STAGE_TITLES, RunResults, measures_of, to_json
from .runs import SCHEMA, SCHEMA_VERSION
from .signatures import Signature, check_signatures, format_signatures

ALWAYS = ("overall", "many", "medium", "few", "std", "knn")  # columns also where no stage knows a value


def format_table(results: RunResults) -> str:
    """The stages side by side as plain text: linear probe in groups and kNN overall, in per cent; std is the standard
    deviation of the groups, in points; then what else is known, see `results.MEASURES`."""
    columns, table = _table(results)
    rows = [["", *columns], *([title, *cells] for title, cells in table)]
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
    text = json.dumps(report_data(results, signatures), indent=1, allow_nan=False)
    write_atomic(run_dir / "report.json", text.encode())
    write_atomic(run_dir / "report.html", page.encode())
    return run_dir / "report.html"


def report_data(results: RunResults, signatures: list[Signature]) -> dict[str, Any]:
    """The content of report.json; `runs.read_report` reads it."""
    return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **to_json(results), "signatures": to_json(signatures)}


def render_page(results: RunResults, signatures: list[Signature], pictures: list[Picture]) -> str:
    """The page as one string of HTML."""
    columns, table = _table(results)
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            results=results,
            columns=columns,
            table=table,
            confusions=_confusions(results),
            signatures=signatures,
            warnings=sum(signature.state == "warning" for signature in signatures),
            pictures=pictures,
            base64=lambda png: base64.b64encode(png).decode(),
            config=_pairs(to_json(results.config)),
            build=_pairs({key: value for key, value in to_json(results.build).items() if key != "kernels"}),
            kernels=_kernels(results),
        )
    )


def render_live(
    results: RunResults, picture: Picture, stage: str, epoch: int, epochs: int, left: float | None, every: float
) -> str:
    """The page of a run that trains.

    Args:
        results: its stages with nothing but their histories.
        picture: of the histories.
        stage, epoch, epochs: what trains, and how far it is.
        left: seconds that the stage has left, None where that is not known.
        every: seconds after which the page loads anew.
    """
    return _environment().get_template("live.html.jinja").render(
        results=results, picture=picture, png=base64.b64encode(picture.png).decode(), stage=STAGE_TITLES[stage],
        epoch=epoch, epochs=epochs, left=None if left is None else _duration(left), every=every,
    )  # fmt: skip


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{max(minutes, 1)} min"


def _environment() -> Any:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("ltood_fast.eval", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _table(results: RunResults) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The titles of the columns, and (title, cells) of each stage."""
    values = [(stage.title, measures_of(to_json(stage))) for stage in results.stages]
    always = ALWAYS if results.has_labels else ()
    columns = [m for m in MEASURES if m.key in always or any(known[m.key] is not None for _, known in values)]
    rows = [(title, [column.text(known[column.key]) for column in columns]) for title, known in values]
    return [column.title for column in columns], rows


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


def _pairs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """[("section.key", "value")] of nested dicts."""
    texts = {
        key: ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for key, value in flatten(values).items()
    }
    return [(key, text or "none") for key, text in texts.items()]

"""One HTML page with a run's tables and pictures: no other file, no network."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from . import plots, tables

TEMPLATE = Path(__file__).with_name("report.html.jinja")


def page(result: dict[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["inline"] = lambda png: "data:image/png;base64," + base64.b64encode(png).decode()
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        result=result,
        summary=tables.summary(result),
        full=tables.full(result),
        problems=tables.problems(result),
        training=tables.training(result),
        resampling=tables.resampling(result),
        pictures=plots.draw(result),
    )

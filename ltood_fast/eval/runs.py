"""Many runs in one table: each `report.json` below a folder, and mean ± sample standard deviation over seeds.

    runs = find_runs(folder)                     # [Run], one a report.json, at any depth
    runs[0].variant, runs[0].seed                # "tailness", 0 of folder/runs/tailness/seed0/report.json
    runs[0].measures("stage1")["few"]            # 0.41933, or None where that run does not know it
    runs[0].report["resamplings"]                # everything else, as the file has it
    rows = summarize(runs)                       # [Row], one a variant and stage, over its seeds
    rows[0].measures["overall"]                  # Spread(mean=0.4715, std=0.0063, n=3), fractions
    print(format_markdown(rows))

What a measure is called and how it prints is in `results.MEASURES`. Folders named `seed0`, `seed1`, `split2`, ... are
repetitions of the variant that holds them; any other folder is a variant of its own.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .._files import write_atomic
from .._keys import flatten
from .results import MEASURES, STAGE_TITLES, Measure, measures_of

SCHEMA, SCHEMA_VERSION = "ltood_fast.report", 1
TABLE_SCHEMA = "ltood_fast.runs"
REPETITION = re.compile(r"(?:seed|split)[-_]?\d+")
# Keys in which repetitions of one variant may differ: the seed, the split, where files lie and where it ran.
FREE_KEYS = re.compile(
    r"seed|data\.(seed|split|root|ood_root|cache_dir|\w+_list)|stage1\.init_from|stage2\.guide|run\..*"
)


def read_report(path: str | Path) -> dict[str, Any]:
    """The content of a ``report.json`` as plain values.

    Raises:
        ValueError: the file is not such a report, or one of another version.
    """
    if not Path(path).is_file():
        raise ValueError(f"read_report: path must be a report.json, got {path}, which is no regular file")
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"read_report: path must be a report.json, got {path}, which is no JSON: {error}") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"read_report: path must be a report.json of {SCHEMA}, got {path}, which says {schema!r}")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"read_report: schema_version must be {SCHEMA_VERSION}, got {data.get('schema_version')} in {path}"
        )
    if wrong := _misfit(data):
        raise ValueError(f"read_report: path must be a whole report.json, got {path}, in which {wrong}")
    return data


def _misfit(data: dict[str, Any]) -> str | None:
    """The fault in the parts of a report that tables and experiments read."""
    if not isinstance(data.get("config"), dict):
        return "config is no object"
    stages = data.get("stages")
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        return "stages is no list of objects"
    for number, stage in enumerate(stages):
        if not isinstance(stage.get("name"), str):
            return f"stages[{number}] has no name"
        for key, value in measures_of(stage).items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                return f"{key} of {stage['name']} is no number"
    return None


@dataclass(frozen=True)
class Run:
    """One report.json."""

    variant: str
    """Folders between the one that was searched and the run, without repetitions and folders that all runs share."""
    folder: Path
    report: dict[str, Any] = field(repr=False)

    @property
    def seed(self) -> int | None:
        return self.report["config"].get("seed")

    @property
    def stages(self) -> list[str]:
        return [stage["name"] for stage in self.report["stages"]]

    def stage(self, name: str | None = None) -> dict[str, Any]:
        """A stage of the report, by default the last one.

        Raises:
            ValueError: the run has no such stage.
        """
        stages = [stage for stage in self.report["stages"] if name in (None, stage["name"])]
        if not stages:
            raise ValueError(f"runs: stage must be one of {', '.join(self.stages)} in {self.folder}, got {name}")
        return stages[-1]

    def measures(self, stage: str | None = None) -> dict[str, float | None]:
        """`results.measures_of` a stage, by default of the last one."""
        return measures_of(self.stage(stage))


class Spread(NamedTuple):
    mean: float
    std: float | None
    """Sample standard deviation (n - 1); None for a single value."""
    n: int

    def text(self, measure: Measure) -> str:
        mean = measure.text(self.mean)
        return mean if self.std is None else f"{mean} ± {measure.text(self.std)}"


def spread(values: Iterable[float | None]) -> Spread | None:
    """Mean and sample standard deviation of the values that are known and finite; None when there are none."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return None
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


@dataclass(frozen=True)
class Row:
    """A stage of a variant over its repetitions."""

    variant: str
    stage: str
    runs: list[Run]
    measures: dict[str, Spread | None]
    """By `Measure.key`."""

    @property
    def title(self) -> str:
        return STAGE_TITLES.get(self.stage, self.stage)


def find_runs(folder: str | Path) -> list[Run]:
    """Every run below a folder, in the order of the paths (of their numbers where they have some).

    Raises:
        ValueError: there is none, or a report.json is not ltood_fast's.
    """
    folder = Path(folder)
    paths = sorted(folder.rglob("report.json"), key=_natural)
    if not paths:
        raise ValueError(f"runs: folder must hold a report.json at some depth, got none below {folder}")
    parts = [_variant_parts(path.parent.relative_to(folder)) for path in paths]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    name = folder.resolve().name
    return [
        Run("/".join(p[shared:]) or name, path.parent, read_report(path)) for p, path in zip(parts, paths, strict=True)
    ]


def _variant_parts(folder: Path) -> tuple[str, ...]:
    parts = folder.parts
    while parts and REPETITION.fullmatch(parts[-1]):
        parts = parts[:-1]
    return parts


def _natural(path: Path) -> list[Any]:
    """`seed10` after `seed2`."""
    return [[(not text.isdigit(), int(text) if text.isdigit() else text) for text in re.split(r"(\d+)", part)]
            for part in path.parts]  # fmt: skip


def summarize(runs: Iterable[Run]) -> list[Row]:
    """A row for each stage of each variant, in the order of the runs."""
    grouped: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        for stage in run.stages:
            grouped.setdefault((run.variant, stage), []).append(run)
    return [
        Row(variant, stage, members, {m.key: spread(run.measures(stage)[m.key] for run in members) for m in MEASURES})
        for (variant, stage), members in grouped.items()
    ]


def mixed_settings(runs: Iterable[Run]) -> dict[str, list[str]]:
    """Variants whose repetitions are not repetitions: by variant, the keys of the configuration that differ, seeds,
    splits, paths and `run.*` aside."""
    grouped: dict[str, list[dict[str, str]]] = {}
    for run in runs:
        grouped.setdefault(run.variant, []).append(
            {key: json.dumps(value) for key, value in flatten(run.report["config"]).items()}
        )
    mixed = {}
    for variant, configs in grouped.items():
        keys = {key for config in configs for key in config if not FREE_KEYS.fullmatch(key)}
        # A key that an older run lacks stands for its default, which is not known here.
        different = [k for k in sorted(keys) if len({config[k] for config in configs if k in config}) > 1]
        if different:
            mixed[variant] = different
    return mixed


def known_measures(rows: Sequence[Row]) -> list[Measure]:
    """Those that at least one row knows."""
    return [measure for measure in MEASURES if any(row.measures[measure.key] for row in rows)]


def format_markdown(rows: Sequence[Row]) -> str:
    """One table: mean ± sample standard deviation; a value that fewer runs know than the row has says how many."""
    measures = known_measures(rows)
    table = [["run", "stage", "n", *(m.title for m in measures)], ["---", "---", *["---:"] * (len(measures) + 1)]]
    for row in rows:
        cells = [_cell(row.measures[m.key], m, len(row.runs)) for m in measures]
        table.append([row.variant.replace("|", "\\|"), row.title, str(len(row.runs)), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def _cell(value: Spread | None, measure: Measure, n: int) -> str:
    if value is None:
        return "-"
    return value.text(measure) + (f" (n = {value.n})" if value.n < n else "")


def format_csv(rows: Sequence[Row]) -> str:
    """Fractions, not per cent; an empty field for what is not known."""
    measures, text = known_measures(rows), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "stage", "n", *(f"{m.key}_{part}" for m in measures for part in ("mean", "std"))])
    for row in rows:
        values = [(None, None) if (v := row.measures[m.key]) is None else v[:2] for m in measures]
        writer.writerow(
            [row.variant, row.stage, len(row.runs), *("" if v is None else v for pair in values for v in pair)]
        )
    return text.getvalue()


def format_json(rows: Sequence[Row]) -> str:
    """Fractions, with the folders and seeds behind each row."""
    lines = [
        {
            "run": row.variant,
            "stage": row.stage,
            "n": len(row.runs),
            "seeds": [run.seed for run in row.runs],
            "folders": [str(run.folder) for run in row.runs],
            "measures": {key: None if value is None else value._asdict() for key, value in row.measures.items()},
        }
        for row in rows
    ]
    return json.dumps({"schema": TABLE_SCHEMA, "schema_version": 1, "rows": lines}, indent=1, allow_nan=False)


FORMATS = {".md": format_markdown, ".json": format_json, ".csv": format_csv}


def write_table(path: str | Path, rows: Sequence[Row]) -> None:
    """In the format that the name's ending says.

    Raises:
        ValueError: an ending that is none of FORMATS.
        OSError: the file cannot be written; an old one stays as it was.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"report: output must end in {', '.join(FORMATS)}, got {path}")
    write_atomic(path, FORMATS[path.suffix](rows).rstrip("\n").encode() + b"\n")

"""`ltood experiment`: train what is missing, then write the table, the numbers, the picture and the verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import _files
from .._keys import did_you_mean
from ..eval.results import to_json
from .grid import GridResult, Run, collect, plan_runs, train_grid
from .outcomes import Outcome, Outcomes, read_outcomes
from .pictures import to_png
from .provenance import provenance
from .registry import EXPERIMENTS
from .spec import Experiment, ExperimentError, Setting, Summary, Variant
from .summaries import control_table, under_control, values_of
from .tables import ACCURACY_TITLE, CONTROL_TITLE, DIFFERENCES_TITLE, to_markdown
from .verdict import RULE

SCHEMA, SCHEMA_VERSION = "ltood_fast.experiment", 2
JUDGED = (CONTROL_TITLE, ACCURACY_TITLE, DIFFERENCES_TITLE)  # tables that follow from the runs' measures alone
FOLDERS = ("data.root", "data.ood_root", "data.cache_dir")


def find_experiment(name: str) -> Experiment:
    if name in EXPERIMENTS:
        return EXPERIMENTS[name]
    hint = did_you_mean(name, EXPERIMENTS)
    raise ExperimentError(f"experiment: name must be one of {', '.join(EXPERIMENTS)}, got {name!r}{hint}")


def list_experiments() -> str:
    width = max(map(len, EXPERIMENTS))
    return "\n".join(f"{name:{width}}  {experiment.question}" for name, experiment in EXPERIMENTS.items())


def run_experiment(name: str, setting: Setting, *, train: bool = True) -> str:
    """Runs an experiment, or takes the runs that are done, and writes `<output>/<name>/`.

    Returns:
        Its tables and its verdict.

    Raises:
        ExperimentError: an unknown name, a foreign run in the folder, no run that ended; after everything is written,
            runs that failed.
        ConfigError, DataError: of a variant's configuration.
    """
    experiment = find_experiment(name)
    if setting.jobs < 1:
        raise ExperimentError(f"experiment: jobs must be at least 1, got {setting.jobs}")
    if setting.output.exists() and not setting.output.is_dir():
        raise ExperimentError(f"experiment: output must be a folder, got the file {setting.output}")
    listed = experiment.variants(setting)
    variants = experiment.with_control(listed)
    runs = plan_runs(setting, variants)
    result = train_grid(setting, runs) if train else collect(runs)
    if runs and not result.reports:
        first = next(iter(result.failures.values()))
        raise ExperimentError(f"experiment: at least one run must end, got none of {len(runs)} ({first})")
    outcomes = read_outcomes(variants, result.reports)
    summary = summarise(experiment, setting, outcomes, listed)
    folder = setting.output / name
    write_results(folder, Findings(experiment, setting, runs, result, outcomes, summary))
    if train and result.failures:
        failed = "; ".join(f"{v}/seed{seed}: {why}" for (v, seed), why in result.failures.items())
        raise ExperimentError(f"experiment: every run must end, got {len(result.failures)} that did not ({failed})")
    tables = "\n\n".join(to_markdown(table) for table in summary.tables)
    return f"{tables}\n\n{summary.verdict.sentence}\n\nwritten: {folder}"


def summarise(experiment: Experiment, setting: Setting, outcomes: Outcomes, listed: list[Variant]) -> Summary:
    """The findings on the variants of a table; the verdict is bound to the positive control."""
    summary = experiment.summarise(setting, Outcomes(listed, outcomes.by_run))
    if isinstance(experiment.control, str):
        return replace(summary, values={**summary.values, "control": experiment.control})
    [control] = outcomes.judged([experiment.control.comparison])
    return replace(
        summary,
        tables=[control_table(control), *summary.tables],
        verdict=under_control(summary.verdict, control),
        values={**summary.values, "control": values_of(control)},
    )


@dataclass(frozen=True)
class Findings:
    """What the files of an experiment are written from."""

    experiment: Experiment
    setting: Setting
    runs: list[Run]
    result: GridResult
    outcomes: Outcomes
    summary: Summary


def write_results(folder: Path, found: Findings) -> None:
    origin = provenance()
    folder.mkdir(parents=True, exist_ok=True)
    data = numbers_of(found, origin)
    missing = [f"{name} seed {seed}" for name, seed in sorted(found.result.failures)]
    write_files(folder, data, page_of(found.experiment, found.setting, found.summary, missing, origin), found.summary)


def write_files(folder: Path, data: dict[str, Any], page: str, summary: Summary) -> None:
    _files.write_atomic(folder / "results.json", json.dumps(to_json(data), indent=1, allow_nan=False).encode())
    _files.write_atomic(folder / "picture.png", to_png(summary.draw))
    _files.write_atomic(folder / "table.md", page.encode())


def page_of(
    experiment: Experiment, setting: Setting, summary: Summary, missing: list[str], origin: Mapping[str, Any]
) -> str:
    options = " ".join(f"`--{key} {value}`" for key, value in without_folders(setting.overrides).items())
    parts = [
        f"# {experiment.name}: {experiment.question}",
        f"Claim: {experiment.claim}",
        f"**{summary.verdict.sentence}**",
        *(to_markdown(table) for table in summary.tables),
        "![picture](picture.png)",
        f"Preset `{setting.preset_name}`{', ' + options if options else ''}; seeds "
        f"{', '.join(map(str, setting.seeds))}; {origin['cpu']}{', ' + origin['gpu'] if origin['gpu'] else ''}, torch "
        f"{origin['versions']['torch']}, {origin['date']}.",
    ]
    if missing:
        parts.append(f"Missing: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def numbers_of(found: Findings, origin: dict[str, Any] | None = None) -> dict[str, Any]:
    """The content of results.json."""
    experiment, setting, outcomes, summary = found.experiment, found.setting, found.outcomes, found.summary
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "experiment": experiment.name,
        "claim": experiment.claim,
        "verdict": {**vars(summary.verdict), "rule": RULE},
        "preset": setting.preset_name,
        "overrides": without_folders(setting.overrides),
        "seeds": setting.seeds,
        "variants": {
            variant.name: {
                "stages": variant.stages,
                "overrides": without_folders(variant.overrides),
                "guide": variant.guide or None,
                "trunk": variant.trunk or None,
                "measures": {m.key: _spread(outcomes, variant, m.key) for m in outcomes.known},
            }
            for variant in outcomes.variants
        },
        "runs": [
            {
                "variant": outcome.variant,
                "seed": outcome.seed,
                "stage": outcome.stage,
                **outcome.measures,
                "per_class": outcome.per_class,
                "right": _packed(outcome),
                "seconds": outcome.seconds,
            }
            for outcome in outcomes.by_run.values()
        ],
        "test_images": _test_images(outcomes),
        "tables": [vars(table) for table in summary.tables if table.title not in JUDGED],
        "missing": [run.name for run in found.runs if run.key in found.result.failures],
        **summary.values,
        **(provenance() if origin is None else origin),
    }


def _test_images(outcomes: Outcomes) -> dict[str, Any] | None:
    """The test images of each class, and the classes of each group: alike in all runs of an experiment."""
    known = [run.answers for run in outcomes.by_run.values() if run.answers is not None]
    return {"counts": known[0].test_counts, "groups": known[0].groups} if known else None


def _packed(outcome: Outcome) -> dict[str, Any] | None:
    """The test images as a report holds them, from which a difference can be judged again."""
    stage = next(s for s in outcome.report["stages"] if s["name"] == outcome.stage)
    return stage.get("right")


def _spread(outcomes: Outcomes, variant: Variant, measure: str) -> dict[str, Any] | None:
    found = outcomes.spread(variant.name, measure)
    return None if found is None else found._asdict()


def without_folders(overrides: dict[str, str]) -> dict[str, str]:
    """Without the roots, and files by their names: where they lie on a machine is private."""
    kept = {key: value for key, value in overrides.items() if key not in FOLDERS}
    return {key: Path(value).name if Path(value).is_absolute() else value for key, value in kept.items()}

"""`ltood experiment`: train what is missing, then write the table, the numbers, the picture and the verdict."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import _files
from .._keys import did_you_mean
from ..eval.results import to_json
from .grid import GridResult, Run, collect, plan_runs, train_grid
from .outcomes import Outcomes, read_outcomes
from .pictures import to_png
from .provenance import provenance
from .registry import EXPERIMENTS
from .spec import Experiment, ExperimentError, Setting, Summary, Variant
from .tables import to_markdown
from .verdict import RULE

SCHEMA, SCHEMA_VERSION = "ltood_fast.experiment", 1
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
    variants = experiment.variants(setting)
    runs = plan_runs(setting, variants)
    result = train_grid(setting, runs) if train else collect(runs)
    if runs and not result.reports:
        first = next(iter(result.failures.values()))
        raise ExperimentError(f"experiment: at least one run must end, got none of {len(runs)} ({first})")
    outcomes = read_outcomes(variants, result.reports)
    summary = experiment.summarise(setting, outcomes)
    folder = setting.output / name
    write_results(folder, Findings(experiment, setting, runs, result, outcomes, summary))
    if train and result.failures:
        failed = "; ".join(f"{v}/seed{seed}: {why}" for (v, seed), why in result.failures.items())
        raise ExperimentError(f"experiment: every run must end, got {len(result.failures)} that did not ({failed})")
    tables = "\n\n".join(to_markdown(table) for table in summary.tables)
    return f"{tables}\n\n{summary.verdict.sentence}\n\nwritten: {folder}"


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
    page, data = _page(found, origin), _numbers(found, origin)
    _files.write_atomic(folder / "results.json", json.dumps(to_json(data), indent=1, allow_nan=False).encode())
    _files.write_atomic(folder / "picture.png", to_png(found.summary.draw))
    _files.write_atomic(folder / "table.md", page.encode())


def _page(found: Findings, origin: dict[str, Any]) -> str:
    experiment, setting, summary, failures = found.experiment, found.setting, found.summary, found.result.failures
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
    if failures:
        parts.append("Missing: " + ", ".join(f"{name} seed {seed}" for name, seed in sorted(failures)) + ".")
    return "\n\n".join(parts) + "\n"


def _numbers(found: Findings, origin: dict[str, Any]) -> dict[str, Any]:
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
                "seconds": outcome.seconds,
            }
            for outcome in outcomes.by_run.values()
        ],
        "missing": [run.name for run in found.runs if run.key in found.result.failures],
        **summary.values,
        **origin,
    }


def _spread(outcomes: Outcomes, variant: Variant, measure: str) -> dict[str, Any] | None:
    found = outcomes.spread(variant.name, measure)
    return None if found is None else found._asdict()


def without_folders(overrides: dict[str, str]) -> dict[str, str]:
    """Without the roots, and files by their names: where they lie on a machine is nobody else's business."""
    kept = {key: value for key, value in overrides.items() if key not in FOLDERS}
    return {key: Path(value).name if Path(value).is_absolute() else value for key, value in kept.items()}

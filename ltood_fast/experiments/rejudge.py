"""Results that are there judged again by today's rule, from their numbers alone: nothing is trained.

    python -m ltood_fast.experiments.rejudge benchmarks/results/experiments

rewrites table.md, picture.png and the verdict of every results.json below the folder, and the table over all of them,
`rejudged.md`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..cli import Parser, some_path
from ..eval.results import MEASURES
from ..eval.scores import unpack_right
from .command import SCHEMA, SCHEMA_VERSION, find_experiment, page_of, summarise, write_files
from .image_noise import Answers
from .outcomes import Outcome, Outcomes
from .spec import ExperimentError, Setting, Summary, Table, Variant
from .tables import to_markdown
from .verdict import RULE, Estimate, holm, points


def stored_outcomes(data: dict[str, Any]) -> Outcomes:
    """The runs of a results.json."""
    images = data.get("test_images")
    variants = [
        Variant(name, saved["overrides"], tuple(saved["stages"]), saved["guide"] or "", saved.get("trunk") or "")
        for name, saved in data["variants"].items()
    ]
    by_run = {}
    for run in data["runs"]:
        answers = None
        if images is not None:
            right = {name: unpack_right(bits, images["counts"]) for name, bits in (run.get("right") or {}).items()}
            answers = Answers(images["counts"], images["groups"], right)
        measures = {measure.key: run.get(measure.key) for measure in MEASURES}
        stage = {"name": run["stage"], "right": run.get("right")}
        report = {"stages": [stage], "scheme": "rank"}
        by_run[run["variant"], run["seed"]] = Outcome(
            run["variant"], run["seed"], run["stage"], measures, run["per_class"], run["seconds"], [], report, answers
        )
    return Outcomes(variants, by_run)


def rejudge(path: Path) -> Summary:
    """Rewrites table.md, picture.png and the verdict of a results.json.

    Raises:
        ExperimentError: the file is none of an experiment.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    if data.get("schema") != SCHEMA:
        raise ExperimentError(f"rejudge: {path} must be a results.json of {SCHEMA}, got {data.get('schema')!r}")
    experiment, folder = find_experiment(data["experiment"]), path.parent
    setting = Setting(data["preset"], folder, tuple(data["seeds"]), overrides=data["overrides"])
    outcomes = stored_outcomes(data)
    control = () if isinstance(experiment.control, str) else experiment.control.variants
    listed = [v for v in outcomes.variants if v.name not in {c.name for c in control} - _compared(data)]
    summary = summarise(experiment, setting, outcomes, listed)
    # Other tables come from the runs themselves, which are not here.
    kept = [Table(**table) for table in data.get("tables", ())]
    summary = replace(summary, tables=[*(t for t in summary.tables if t.title not in {k.title for k in kept}), *kept])
    found = {key: summary.values[key] for key in ("comparisons", "control")}
    data.setdefault("first_decisions", {_key(one): one["decision"] for one in data["comparisons"]})
    data |= {"schema_version": SCHEMA_VERSION, "verdict": {**vars(summary.verdict), "rule": RULE}, **found}
    missing = [name.replace("/seed", " seed ") for name in sorted(data["missing"])]
    write_files(folder, data, page_of(experiment, setting, summary, missing, data), summary)
    return replace(summary, values={**summary.values, "first_decisions": data["first_decisions"]})


def _compared(data: dict[str, Any]) -> set[str]:
    """Variants that the experiment itself compares."""
    return {one[side] for one in data.get("comparisons", ()) for side in ("better", "worse")}


def overview(found: dict[str, Summary]) -> str:
    """One table of the comparisons of all experiments, with the decision that each had at first."""
    lines = []
    for name, summary in found.items():
        comparisons, before = summary.values["comparisons"], summary.values["first_decisions"]
        ps = holm([_over_seeds(one).p for one in comparisons])
        for one, p in zip(comparisons, ps, strict=True):
            pair = f"{one['better']} − {one['worse']}"
            interval = "-" if one["low"] is None else f"[{points(one['low'])}, {points(one['high'])}]"
            alone = _over_seeds(one).interval
            lines.append([
                name, pair, one["measure"], str(one["n"]), "-" if one["mean"] is None else points(one["mean"]),
                "-" if alone is None else f"[{points(alone[0])}, {points(alone[1])}]", _text(p),
                interval, _text(one["p_holm"]), before.get(_key(one), "-"), one["decision"],
            ])  # fmt: skip
    header = [
        "experiment", "difference", "of", "seeds", "mean", "95 % over seeds alone", "p (Holm)",
        "95 % with test images", "p (Holm)", "at first", "now",
    ]  # fmt: skip
    note = (
        f"{RULE} Differences in points; a lower std is the better one. At first: by two standard errors, without a "
        "correction. Over seeds alone, an interval speaks of the test images at hand. Where runs do not say which test "
        "images they got right, the test images' part is the bound for unpaired answers, wider than the truth."
    )
    if not any(summary.values["control"]["n"] for summary in found.values()):
        note += " None of the experiments had a positive control."
    return to_markdown(Table("Committed differences, judged again", header, lines, note)) + "\n"


def _over_seeds(one: dict[str, Any]) -> Estimate:
    """Without the test images' part."""
    return Estimate(one["mean"], one["standard_error"], one["n"])


def _text(p: float | None) -> str:
    return "-" if p is None else f"{p:.3f}"


def _key(one: dict[str, Any]) -> str:
    return f"{one['better']} {one['worse']} {one['measure']}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m ltood_fast.experiments.rejudge", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=some_path, help="with the results.json of an experiment in each subfolder")
    try:
        folder = parser.parse_args(argv).folder
        found = {path.parent.name: rejudge(path) for path in sorted(folder.glob("*/results.json"))}
        if not found:
            raise ExperimentError(f"rejudge: folder must hold results.json files in subfolders, got none in {folder}")
    except (ExperimentError, ValueError, OSError) as error:
        print(f"ltood: error: {error}", file=sys.stderr)
        return 2
    for name, summary in found.items():
        print(f"{name}: {summary.verdict.sentence}")
    (folder / "rejudged.md").write_text(overview(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

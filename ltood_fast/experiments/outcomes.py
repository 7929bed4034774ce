"""What the runs of a grid measured: numbers out of their reports, paired by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..eval.groups import GROUPS, group_report
from ..eval.results import MEASURES, Measure, measures_of
from ..eval.runs import Spread, spread
from .spec import Comparison, ExperimentError, Variant
from .verdict import Estimate, decide, estimate

TITLES = {measure.key: measure.title for measure in MEASURES}


@dataclass(frozen=True)
class Outcome:
    """Of one run: its last stage, evaluated."""

    variant: str
    seed: int
    stage: str
    measures: dict[str, float | None]
    """By `Measure.key`, fractions where they are accuracies."""
    per_class: list[float | None]
    seconds: float | None
    """Of the stage's epochs, re-sampling included."""
    history: list[dict[str, Any]]
    report: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Outcomes:
    """Of all runs that ended, by variant and seed; `variants` are those of the table, in its order."""

    variants: list[Variant]
    by_run: dict[tuple[str, int], Outcome]

    @property
    def known(self) -> list[Measure]:
        """What at least one run measured."""
        return [m for m in MEASURES if any(run.measures[m.key] is not None for run in self.by_run.values())]

    def of(self, variant: str) -> list[Outcome]:
        """In the order of the seeds."""
        return [self.by_run[key] for key in sorted(self.by_run) if key[0] == variant]

    def values(self, variant: str, measure: str) -> list[float]:
        found = [outcome.measures[measure] for outcome in self.of(variant)]
        return [value for value in found if value is not None]

    def spread(self, variant: str, measure: str) -> Spread | None:
        """Mean and sample standard deviation over the seeds."""
        return spread(self.values(variant, measure))

    def differences(self, comparison: Comparison) -> list[float]:
        """better - worse, one a seed that both variants have."""
        pairs = []
        for outcome in self.of(comparison.better):
            other = self.by_run.get((comparison.worse, outcome.seed))
            if other is not None:
                pairs.append((outcome.measures[comparison.measure], other.measures[comparison.measure]))
        return [a - b for a, b in pairs if a is not None and b is not None]

    def compared(self, comparison: Comparison) -> Estimate:
        return estimate(self.differences(comparison))

    def decided(self, comparison: Comparison) -> str:
        """Whether the better one is better."""
        return decide([comparison.sign * difference for difference in self.differences(comparison)])


def read_outcome(
    variant: Variant, seed: int, report: dict[str, Any], class_counts: Sequence[int] | None = None
) -> Outcome:
    """An `Outcome` of the content of a report.json.

    Args:
        class_counts: given, the training images of each class that decide Many, Medium and Few in place of the run's
            own: those of the long-tailed set for a run that was trained on a balanced one.
    """
    stage = next(s for s in report["stages"] if s["name"] == variant.stages[-1])
    measures = measures_of(stage)
    per_class = stage["probe"]["per_class"]
    if class_counts is not None:
        groups = group_report(
            [math.nan if accuracy is None else accuracy for accuracy in per_class],
            class_counts,
            report["scheme"],
            test_counts=[sum(row) for row in stage["confusion"]],
        )
        measures |= {key: groups[key] for key in (*GROUPS, "std")}
    times = [line["seconds"] for line in stage["history"] if line.get("seconds") is not None]
    seconds = sum(times) if times else None
    return Outcome(variant.name, seed, stage["name"], measures, per_class, seconds, stage["history"], report)


def read_outcomes(variants: list[Variant], reports: dict[tuple[str, int], dict[str, Any]]) -> Outcomes:
    """Of the reports of the runs that ended. A run whose groups depend on a run that is missing is left out."""
    counts_of = {name: report.get("class_counts") for (name, _), report in reports.items()}
    by_run = {}
    for variant in variants:
        if variant.counts_of and variant.counts_of not in counts_of:
            continue
        for (name, seed), report in reports.items():
            if name == variant.name:
                try:
                    by_run[name, seed] = read_outcome(variant, seed, report, counts_of.get(variant.counts_of))
                except (AttributeError, LookupError, TypeError, ValueError, StopIteration) as error:
                    raise ExperimentError(
                        f"experiment: report.json of {name}/seed{seed} must be whole, got one that does not fit "
                        f"({type(error).__name__}: {error}); ltood eval writes it again"
                    ) from error
    return Outcomes(variants, by_run)

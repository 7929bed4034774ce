"""What the runs of a grid measured: numbers out of their reports, paired by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..eval.groups import GROUPS, group_report, split_groups
from ..eval.results import MEASURES, Measure, measures_of
from ..eval.runs import Spread, spread
from ..eval.scores import unpack_right
from .image_noise import Answers, standard_error
from .spec import Comparison, ExperimentError, Variant
from .verdict import Estimate, decide, estimate, holm

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
    answers: Answers | None = field(default=None, repr=False)
    """None where nothing is known of the test images."""


@dataclass(frozen=True)
class Judged:
    """A comparison, what was found of it, and the decision among all comparisons of its table."""

    comparison: Comparison
    differences: list[float]
    """better - worse, one a seed."""
    found: Estimate
    paired_images: bool
    """Whether the test images' part of the error is from paired answers; otherwise it is a bound."""
    p: float | None
    """Corrected for the number of comparisons."""
    decision: str

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation of the differences over the seeds."""
        return None if self.found.error is None else self.found.error * math.sqrt(self.found.n)


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

    def pairs(self, comparison: Comparison) -> list[tuple[Outcome, Outcome]]:
        """Runs of both variants, one pair a seed that both have and know the measure of."""
        found = []
        for outcome in self.of(comparison.better):
            other = self.by_run.get((comparison.worse, outcome.seed))
            if other is not None and None not in (o.measures[comparison.measure] for o in (outcome, other)):
                found.append((outcome, other))
        return found

    def differences(self, comparison: Comparison) -> list[float]:
        """better - worse, one a seed that both variants have."""
        return [a.measures[comparison.measure] - b.measures[comparison.measure] for a, b in self.pairs(comparison)]

    def compared(self, comparison: Comparison) -> tuple[Estimate, bool]:
        """The difference, and whether the test images' part of its error is from paired answers."""
        pairs, differences = self.pairs(comparison), self.differences(comparison)
        if any(run.answers is None for pair in pairs for run in pair):
            return estimate(differences), False
        sides = [tuple((run.answers, run.measures) for run in pair) for pair in pairs]
        error, paired = standard_error(sides, comparison.measure)
        return estimate(differences, error), paired

    def judged(self, comparisons: Sequence[Comparison]) -> list[Judged]:
        """Each of them, the p-values corrected for their number."""
        found = [self.compared(comparison) for comparison in comparisons]
        ps = holm([one.p for one, _ in found])
        return [
            Judged(c, self.differences(c), one, paired, p, decide(replace(one, mean=c.sign * one.mean), p))
            for c, (one, paired), p in zip(comparisons, found, ps, strict=True)
        ]


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
    test_counts = [sum(row) for row in stage["confusion"]]
    groups = split_groups(class_counts or report["class_counts"], report["scheme"])
    right = {name: unpack_right(bits, test_counts) for name, bits in (stage.get("right") or {}).items()}
    answers = Answers(test_counts, groups, right)
    times = [line["seconds"] for line in stage["history"] if line.get("seconds") is not None]
    seconds = sum(times) if times else None
    history = stage["history"]
    return Outcome(variant.name, seed, stage["name"], measures, per_class, seconds, history, report, answers)


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

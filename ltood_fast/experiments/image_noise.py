"""How much of a difference between two ways to train is chance of the test images, which all seeds share.

Accuracies are sums of answers over images, `std` is linear in those of the groups for small changes. Where runs say
which images they got right, the answers of both ways are paired image by image: with D_si the difference of run pair s
on image i, times its weight, the images' part of the variance of the mean is

    sum over classes of (MS_images - MS_residual) / (n T_c),

the estimate of a two-way layout without repetition (seeds by images, within the classes, as the test set holds a fixed
number of each); the residual is in the spread over the seeds. Where they do not say it, the answers count as
independent, p (1 - p) / T for each way: an upper bound, as two networks are right on much the same images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..eval.groups import GROUPS

SOURCES = {"overall": "probe", **dict.fromkeys((*GROUPS, "std"), "probe"), "knn": "knn"}  # measure -> whose answers


@dataclass(frozen=True)
class Answers:
    """The answers of a run on the test set."""

    test_counts: list[int]
    """Test images of each class."""
    groups: dict[str, list[int]]
    """The classes of Many, Medium and Few."""
    right: Mapping[str, list[np.ndarray]]
    """By `probe` and `knn`, bool [T_c] of each class; empty where the report does not say."""

    def images(self, measure: str) -> int:
        """Test images that a measure is taken over."""
        return sum(self.test_counts[c] for c in self.groups.get(measure, range(len(self.test_counts))))


Pair = tuple[tuple[Answers, Mapping[str, float | None]], tuple[Answers, Mapping[str, float | None]]]
"""The answers and the measures of two runs of one seed."""


def standard_error(pairs: Sequence[Pair], measure: str) -> tuple[float, bool]:
    """Standard error of the mean difference that the test images cause; and whether it is from paired answers.

    Without answers to pair, it is the bound for unpaired ones.

    0 and False of a measure that is no sum over test images.
    """
    if not pairs or measure not in SOURCES:
        return 0.0, False
    source = SOURCES[measure]
    if all(source in side[0].right for pair in pairs for side in pair):
        return math.sqrt(max(_paired(pairs, measure, source), 0.0)), True
    bound = sum(_unpaired([pair[side] for pair in pairs], measure) for side in (0, 1))
    return math.sqrt(bound), False


def _shares(measures: Mapping[str, float | None], measure: str) -> dict[str, float]:
    """The change of a measure with the accuracy of each group; an accuracy changes with itself."""
    if measure != "std":
        return {measure: 1.0}
    known = {group: measures[group] for group in GROUPS if measures[group] is not None}
    centre, std = sum(known.values()) / len(known), measures["std"]
    return {group: (value - centre) / (len(known) * std) if std else 0.0 for group, value in known.items()}


def _class_weights(answers: Answers, measures: Mapping[str, float | None], measure: str) -> np.ndarray:
    """[C]: the measure changes by this with the accuracy of a class."""
    counts = np.asarray(answers.test_counts, dtype=float)
    weights = np.zeros(len(counts))
    for name, share in _shares(measures, measure).items():
        if name in answers.groups:
            classes = [c for c in answers.groups[name] if counts[c]]
            weights[classes] += share / max(len(classes), 1)
        else:
            weights += share * counts / counts.sum()
    return weights


def _paired(pairs: Sequence[Pair], measure: str, source: str) -> float:
    n, total = len(pairs), 0.0
    weights = [[_class_weights(answers, measures, measure) for answers, measures in pair] for pair in pairs]
    for c, count in enumerate(pairs[0][0][0].test_counts):
        if count < 2:
            continue
        D = np.stack([
            mine[c] * first.right[source][c] - theirs[c] * second.right[source][c]
            for ((first, _), (second, _)), (mine, theirs) in zip(pairs, weights, strict=True)
        ])  # [n, T_c]  # fmt: skip
        of_image = D.mean(axis=0)
        ms_images = n * of_image.var(ddof=1)
        ms_residual = 0.0
        if n > 1:
            residual = D - of_image - D.mean(axis=1, keepdims=True) + D.mean()
            ms_residual = (residual**2).sum() / ((n - 1) * (count - 1))
        total += (ms_images - ms_residual) / (n * count)
    return total


def _unpaired(runs: Sequence[tuple[Answers, Mapping[str, float | None]]], measure: str) -> float:
    """Variance of the mean over the seeds of one way, as if all of them got the same images right."""
    answers = runs[0][0]
    known = [measures for _, measures in runs if measures[measure] is not None]
    if not known:
        return 0.0
    mean = {key: sum(m[key] for m in known) / len(known) for key in known[0] if all(m[key] is not None for m in known)}
    shares = _shares({**dict.fromkeys(GROUPS), **mean}, measure)
    return sum(share**2 * mean[name] * (1 - mean[name]) / answers.images(name) for name, share in shares.items())

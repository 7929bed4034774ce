"""Many, Medium and Few: the groups of classes in which long-tail results are reported, and their spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

from ..ops import _check

GROUPS = ("many", "medium", "few")
SCHEMES = ("rank", "count")
MANY_ABOVE, FEW_BELOW = 100, 20  # images in the training set, scheme "count"


class GroupReport(TypedDict):
    """Accuracies as fractions in [0, 1]; None where there is nothing to average."""

    overall: float | None
    many: float | None
    medium: float | None
    few: float | None
    std: float | None
    per_class: list[float | None]


def split_groups(class_counts: Sequence[int], scheme: str = "rank") -> dict[str, list[int]]:
    """The classes of each group, in ascending order.

    Args:
        class_counts: images of each class in the long-tailed training set, one number a class.
        scheme: ``"rank"`` [source, CIFAR]: by rank of class frequency, 4/3/3 of 10 classes and 34/33/33 of 100. For C
            classes, few and medium get ``C // 3`` each, many gets the rest [ltood_fast]; of two classes of one size the
            lower index counts as the more frequent one [ltood_fast].
            ``"count"`` [source, ImageNet]: many > 100 images, medium 20 to 100, few < 20. A group may be empty.

    Returns:
        ``{"many": [...], "medium": [...], "few": [...]}``, every class in exactly one group.

    Raises:
        ValueError: no class at all, a negative count, an unknown scheme.
    """
    counts = _as_counts("split_groups", class_counts)
    _check.choice("split_groups", "scheme", scheme, SCHEMES)
    if scheme == "count":
        sizes = {
            "many": [n > MANY_ABOVE for n in counts],
            "medium": [FEW_BELOW <= n <= MANY_ABOVE for n in counts],
            "few": [n < FEW_BELOW for n in counts],
        }
        return {group: [c for c, inside in enumerate(sizes[group]) if inside] for group in GROUPS}
    ranked = sorted(range(len(counts)), key=lambda c: -counts[c])
    third = len(counts) // 3
    n_many = len(counts) - 2 * third
    return {
        "many": sorted(ranked[:n_many]),
        "medium": sorted(ranked[n_many : n_many + third]),
        "few": sorted(ranked[n_many + third :]),
    }


def group_report(
    per_class_accuracy: Sequence[float],
    class_counts: Sequence[int],
    scheme: str = "rank",
    *,
    test_counts: Sequence[int] | None = None,
) -> GroupReport:
    """Overall, Many, Medium and Few accuracy and their spread.

    A group's accuracy is the mean over its classes; ``std`` is the population standard deviation of the means of the
    groups (of those that are not empty) [paper]. A class without test images (NaN) counts nowhere.

    Args:
        per_class_accuracy: fraction right of each class, in [0, 1]; NaN for a class without test images.
        class_counts: images of each class in the long-tailed training set; they decide the groups.
        scheme: see `split_groups`.
        test_counts: test images of each class. Given, ``overall`` is the accuracy over test images; by default it is
            the mean over classes, which is the same on a balanced test set.

    Raises:
        ValueError: lengths that differ, an accuracy outside [0, 1], an unknown scheme.
    """
    op = "group_report"
    counts = _as_counts(op, class_counts)
    accuracy = [float(value) for value in per_class_accuracy]
    _check.require(len(accuracy) == len(counts), op, "per_class_accuracy", f"{len(counts)} long", f"{len(accuracy)}")
    strange = [a for a in accuracy if not (math.isnan(a) or 0.0 <= a <= 1.0)]
    _check.require(not strange, op, "per_class_accuracy", "in [0, 1] or NaN", strange[:3])
    weights = [1] * len(counts) if test_counts is None else _as_counts(op, test_counts, "test_counts")
    _check.require(len(weights) == len(counts), op, "test_counts", f"{len(counts)} long", f"{len(weights)}")

    groups = split_groups(counts, scheme)
    means = {group: _mean([accuracy[c] for c in groups[group]]) for group in GROUPS}
    present = [mean for mean in means.values() if mean is not None]
    centre = _mean(present)
    return GroupReport(
        overall=_mean(accuracy, weights),
        **means,
        std=None if centre is None else math.sqrt(sum((m - centre) ** 2 for m in present) / len(present)),
        per_class=[None if math.isnan(a) else a for a in accuracy],
    )


def _as_counts(op: str, counts: Sequence[int], argument: str = "class_counts") -> list[int]:
    numbers = [int(n) for n in counts]
    _check.require(len(numbers) > 0, op, argument, "at least one class long", "none")
    _check.require(min(numbers) >= 0, op, argument, "non-negative", min(numbers))
    return numbers


def _mean(values: Sequence[float], weights: Sequence[int] | None = None) -> float | None:
    """Weighted mean of the values that are not NaN; None where there are none."""
    pairs = [(v, w) for v, w in zip(values, weights or [1] * len(values), strict=True) if not math.isnan(v)]
    total = sum(w for _, w in pairs)
    return sum(v * w for v, w in pairs) / total if total else None

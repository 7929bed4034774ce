"""The score of a classifier of features, and the checks that the classifiers share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import _check


@dataclass(frozen=True)
class Scores:
    """Answers of a classifier on a test set."""

    confusion: Tensor
    """int64 [C, C]: test images by true class (row) and answer (column)."""

    @property
    def accuracy(self) -> float:
        """Fraction of test images that are right."""
        return int(self.confusion.diagonal().sum()) / int(self.confusion.sum())

    @property
    def per_class_accuracy(self) -> Tensor:
        """float64 [C]; NaN for a class without test images."""
        return self.confusion.diagonal().double() / self.confusion.sum(dim=1)

    @classmethod
    def of(cls, labels: Tensor, answers: Tensor, n_classes: int) -> Scores:
        cells = labels.cpu() * n_classes + answers.cpu()
        return cls(torch.bincount(cells, minlength=n_classes**2).view(n_classes, n_classes))


def check_classification(
    op: str, train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor, n_classes: int
) -> None:
    """Non-empty, finite features of one width, one label in [0, n_classes) a row."""
    _check.count(op, "n_classes", n_classes, 2)
    _check.embeddings(op, "train_features", train_features)
    _check.same_width(op, "test_features", test_features, "train_features", train_features)
    sets = (("train", train_features, train_labels), ("test", test_features, test_labels))
    for name, features, labels in sets:
        _check.integers(op, f"{name}_labels", labels, len(features), features)
        smallest, largest = labels.aminmax()
        inside = bool(smallest >= 0 and largest < n_classes)
        got = f"[{int(smallest)}, {int(largest)}]"
        _check.require(inside, op, f"{name}_labels", f"in [0, {n_classes})", got)
        bad = int((~features.isfinite()).any(dim=1).sum())
        _check.require(bad == 0, op, f"{name}_features", "finite", f"NaN or infinity in {bad} of {len(features)} rows")

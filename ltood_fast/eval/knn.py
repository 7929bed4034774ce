"""Weighted k-nearest-neighbour classifier on frozen features [Wu 2018, section 3.4]."""

from __future__ import annotations

import torch
from torch import Tensor

import ltood_fast

from ..ops import _check
from .scores import Scores, check_classification


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    n_classes: int,
    *,
    k: int = 20,
    temperature: float = 0.07,
    backend: str = "auto",
) -> Scores:
    """Each of the k nearest training rows (cosine) votes for its class with weight ``exp(cos / temperature)``.

    The class with the largest sum wins, ties go to the lower class. Neighbours come from `ltood_fast.knn`, so no T x N
    matrix is built.

        cosines = F.normalize(test_features) @ F.normalize(train_features).T     # [T, N]
        best, index = cosines.topk(k)
        votes = torch.zeros(T, n_classes).scatter_add(1, train_labels[index], (best / temperature).exp())
        answers = votes.argmax(dim=1)

    Args:
        train_features: float [N, F]. train_labels: int64 [N] in [0, n_classes).
        test_features: float [T, F]. test_labels: int64 [T] in [0, n_classes).
        n_classes: C.
        k: neighbours, 1 <= k <= N. Default 20 [ltood_fast]; 200 is usual on 50,000 images.
        temperature: 0.07 as in the source of the protocol.
        backend: of `ltood_fast.knn`.

    Returns:
        `Scores`: ``accuracy``, ``per_class_accuracy`` [C], ``confusion`` [C, C].

    Raises:
        ValueError, TypeError: empty sets, lengths or widths that differ, labels out of range, features that are not
            finite, k larger than N.
    """
    op = "knn_accuracy"
    check_classification(op, train_features, train_labels, test_features, test_labels, n_classes)
    _check.count(op, "k", k, 1, len(train_features))
    _check.positive_number(op, "temperature", temperature)
    with torch.no_grad():
        cosines, indices = ltood_fast.knn(test_features, k, y=train_features, backend=backend)
        weights = ((cosines.double() - 1.0) / temperature).exp()  # cos <= 1: the shift keeps exp from overflowing
        votes = weights.new_zeros(len(test_features), n_classes)
        votes.scatter_add_(1, train_labels[indices], weights)
    return Scores.of(test_labels, votes.argmax(dim=1), n_classes)

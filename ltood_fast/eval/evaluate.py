"""Frozen features in, a `StageResult` out: linear probes and weighted kNN in groups, clusters, geometry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .clustering import cluster_quality
from .geometry import alignment, uniformity
from .groups import group_report
from .knn import knn_accuracy
from .probe import linear_probe
from .results import StageResult

FEW_SHOT_SGD = {"epochs": 100, "milestones": (40, 60)}  # [paper], the schedule of SDCLR's few-shot probe


def evaluate_features(
    name: str,
    probe_features: Tensor,
    probe_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    class_counts: Sequence[int],
    *,
    scheme: str = "rank",
    probe: str = "logistic",
    knn_k: int = 20,
    knn_temperature: float = 0.07,
    few_shot: tuple[Tensor, Tensor] | None = None,
    views: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
    history: list[dict[str, Any]] | None = None,
) -> StageResult:
    """Evaluates one network on its frozen features.

    Args:
        name: ``simclr``, ``stage1`` or ``stage2``.
        probe_features, probe_labels: float [N, F] and int64 [N] of the balanced labelled images that probe and kNN use.
        test_features, test_labels: float [T, F] and int64 [T] of the test images.
        class_counts: images of each class in the long-tailed training set; C numbers.
        scheme: grouping, see `groups.split_groups`.
        probe: ``logistic`` (fast) or ``sgd`` (the source's protocol), see `probe.linear_probe`.
        knn_k, knn_temperature: see `knn.knn_accuracy`; `knn_k` is cut to N on smaller sets.
        few_shot: features [n, F] and labels [n] of a few images a class, for a second linear probe: 100 epochs and
            the rate divided by 10 after 40 and 60 with ``sgd`` [paper], the same fit with ``logistic``.
        views: features [V, F] of two random views of the same images, for the alignment.
        seed: of the SGD probe and of k-means.
        history: lines of the stage's history.jsonl, kept for the report.

    Raises:
        ValueError, TypeError: as `linear_probe`, `knn_accuracy`, `group_report`, `cluster_quality` and `alignment`.
    """
    C = len(class_counts)
    arrays = (probe_features, probe_labels, test_features, test_labels)
    fit = linear_probe(*arrays, C, method=probe, seed=seed)
    neighbors = knn_accuracy(*arrays, C, k=min(knn_k, len(probe_features)), temperature=knn_temperature)
    few = None
    if few_shot is not None:
        options = FEW_SHOT_SGD if probe == "sgd" else {}
        few = linear_probe(*few_shot, test_features, test_labels, C, method=probe, seed=seed, **options)
    test_counts = fit.confusion.sum(dim=1).tolist()

    def grouped(per_class_accuracy: Tensor):
        return group_report(per_class_accuracy.tolist(), class_counts, scheme, test_counts=test_counts)

    return StageResult(
        name=name,
        probe=grouped(fit.per_class_accuracy),
        confusion=fit.confusion.tolist(),
        knn=grouped(neighbors.per_class_accuracy),
        few_shot=None if few is None else grouped(few.per_class_accuracy),
        clustering=cluster_quality(test_features, test_labels, seed=seed),
        uniformity=uniformity(test_features),
        alignment=None if views is None else alignment(*views),
        history=history or [],
        test_features=test_features.detach().float().cpu(),
        test_labels=test_labels.cpu(),
    )

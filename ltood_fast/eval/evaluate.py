"""Frozen features in, a `StageResult` out: linear probes and weighted kNN in groups, clusters, geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .clustering import cluster_quality
from .geometry import alignment, uniformity
from .groups import group_report
from .knn import knn_accuracy
from .probe import EpochwiseProbe, Probe, linear_probe
from .results import StageResult
from .scores import pack_right

FEW_SHOT_SGD = {"epochs": 100, "milestones": (40, 60)}  # [paper], the schedule of SDCLR's few-shot probe
Labelled = tuple[Tensor, Tensor]
"""Features float [N, F] of images and their labels int64 [N]."""


@dataclass(frozen=True)
class EvalProtocol:
    """How features are evaluated."""

    scheme: str = "rank"
    """Grouping, see `groups.split_groups`."""
    probe: str = "logistic"
    """``logistic`` (fast) or ``sgd`` (the source's protocol), see `probe.linear_probe`."""
    knn_k: int = 20
    """See `knn.knn_accuracy`; cut to N on smaller sets."""
    knn_temperature: float = 0.07
    seed: int = 0
    """Seed of the SGD probe and of k-means."""
    probe_batch: int = 128
    """Batch size of the SGD probe."""
    epochwise: EpochwiseProbe | None = None
    """How the SGD probe sees images anew each epoch and which epoch counts; None: the features of the probe set."""


def evaluate_features(
    name: str,
    probe_set: Labelled,
    test_set: Labelled,
    class_counts: Sequence[int],
    protocol: EvalProtocol = EvalProtocol(),
    *,
    few_shot: Labelled | None = None,
    views: tuple[Tensor, Tensor] | None = None,
    history: list[dict[str, Any]] | None = None,
) -> StageResult:
    """Evaluates one network on its frozen features.

    Args:
        name: ``simclr``, ``stage1`` or ``stage2``.
        probe_set: the balanced labelled images that probe and kNN learn from.
        test_set: the test images.
        class_counts: images of each class in the long-tailed training set; C numbers.
        protocol: how they are evaluated.
        few_shot: a few images a class, for a second linear probe: 100 epochs and the rate divided by 10 after 40 and
            60 with ``sgd`` [paper], the same fit with ``logistic``.
        views: features [V, F] of two random views of the same images, for the alignment.
        history: lines of the stage's history.jsonl, kept for the report.

    Raises:
        ValueError, TypeError: as `linear_probe`, `knn_accuracy`, `group_report`, `cluster_quality` and `alignment`.
    """
    C, seed = len(class_counts), protocol.seed
    test_features, test_labels = test_set
    probe = Probe(protocol.probe, seed=seed, batch_size=protocol.probe_batch)
    fit = linear_probe(*probe_set, *test_set, C, probe, protocol.epochwise)
    k = min(protocol.knn_k, len(probe_set[0]))
    neighbors = knn_accuracy(*probe_set, *test_set, C, k=k, temperature=protocol.knn_temperature)
    few = None
    if few_shot is not None:
        options = FEW_SHOT_SGD if protocol.probe == "sgd" else {}
        few = linear_probe(*few_shot, *test_set, C, Probe(protocol.probe, seed=seed, **options))
    test_counts = fit.confusion.sum(dim=1).tolist()

    def grouped(per_class_accuracy: Tensor):
        return group_report(per_class_accuracy.tolist(), class_counts, protocol.scheme, test_counts=test_counts)

    return StageResult(
        name=name,
        probe=grouped(fit.per_class_accuracy),
        confusion=fit.confusion.tolist(),
        knn=grouped(neighbors.per_class_accuracy),
        right={"probe": pack_right(fit.right), "knn": pack_right(neighbors.right)},
        few_shot=None if few is None else grouped(few.per_class_accuracy),
        clustering=cluster_quality(test_features, test_labels, seed=seed),
        uniformity=uniformity(test_features),
        alignment=None if views is None else alignment(*views),
        history=history or [],
        test_features=test_features.detach().float().cpu(),
        test_labels=test_labels.cpu(),
    )

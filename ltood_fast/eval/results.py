"""The results of a run in one value: the trainer fills it, signatures, pictures and report read it.

    RunResults
      stages       one StageResult for each of simclr, stage1, stage2 that ran, in that order
      resamplings  one Resampling for each time that stage 1 chose OOD images, in that order

Accuracies and shares are fractions in [0, 1] everywhere; only tables and pictures print per cent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..ops import _check
from .clustering import Agreement, agreement
from .groups import GroupReport
from .without_labels import PICTURE_ONLY, WithoutLabels

if TYPE_CHECKING:
    from ..data.image_set import ImageSet

STAGE_TITLES = {"simclr": "SimCLR", "stage1": "Stage 1", "stage2": "Stage 2", "joint": "Joint"}


class Measure(NamedTuple):
    """A number of a stage: where report.json keeps it and how tables print it."""

    key: str
    title: str
    place: tuple[str, ...]
    """Keys below the stage."""
    scale: int = 100
    """Fractions print as per cent, their spread in points."""
    digits: int = 2

    def text(self, value: float | None) -> str:
        return "-" if value is None else f"{self.scale * value:.{self.digits}f}"


MEASURES = (
    Measure("overall", "overall", ("probe", "overall")),
    Measure("many", "Many", ("probe", "many")),
    Measure("medium", "Medium", ("probe", "medium")),
    Measure("few", "Few", ("probe", "few")),
    Measure("std", "std", ("probe", "std")),
    Measure("knn", "kNN", ("knn", "overall")),
    Measure("few_shot", "few-shot", ("few_shot", "overall")),
    Measure("nmi", "NMI", ("clustering", "nmi"), scale=1, digits=3),
    Measure("ari", "ARI", ("clustering", "ari"), scale=1, digits=3),
    Measure("uniformity", "uniformity", ("uniformity",), scale=1, digits=3),
    Measure("silhouette", "silhouette", ("without_labels", "silhouette"), scale=1, digits=3),
    Measure("view_recall", "views found", ("without_labels", "view_recall")),
    Measure("alignment", "alignment", ("alignment",), scale=1, digits=3),
)


def measures_of(stage: Mapping[str, Any]) -> dict[str, float | None]:
    """Every measure of a stage as report.json holds it; None for what that run does not know."""
    values = {}
    for measure in MEASURES:
        value: Any = stage
        for key in measure.place:
            value = value.get(key) if isinstance(value, Mapping) else None
        values[measure.key] = value
    return values


@dataclass(frozen=True)
class StageResult:
    """One trained network and how its frozen features do on the balanced test set."""

    name: str
    """``simclr``, ``stage1`` or ``stage2``."""
    probe: GroupReport | None = None
    """Linear probe, in groups; None where no image has a label."""
    confusion: list[list[int]] = field(default_factory=list)
    """[C, C] test images by true class (row) and the linear probe's answer (column)."""
    knn: GroupReport | None = None
    """Weighted kNN, in groups."""
    right: dict[str, list[str]] | None = None
    """The test images of each class that ``probe`` and ``knn`` have right, see `scores.pack_right`. Paired over two
    runs it says how much of a difference in accuracy is chance of the test images."""
    few_shot: GroupReport | None = None
    """Linear probe that learnt from a few images a class, in groups."""
    clustering: Agreement | None = None
    """Agreement of k-means clusters of the test features with the classes."""
    uniformity: float | None = None
    """See `geometry.uniformity`, of the test features."""
    alignment: float | None = None
    """See `geometry.alignment`, of two random views of test images."""
    without_labels: WithoutLabels | None = None
    """Takes the place of all accuracies where no image has a label."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """The lines of history.jsonl, one an epoch: ``epoch``, ``loss``, ``images_per_second`` and, where known, ``parts``
    (loss terms by name), ``seconds`` (of the epoch, re-sampling included), ``resample_seconds``, ``neighbor_purity``
    and ``neighbor_purity_few`` (share of pseudo-positives of the row's own class, over all rows and over rows of few
    classes; only where training labels are at hand)."""
    test_features: Tensor | None = field(default=None, metadata=PICTURE_ONLY)
    """[T, F] for the embedding map."""
    test_labels: Tensor | None = field(default=None, metadata=PICTURE_ONLY)
    """int64 [T], the classes, or without labels the clusters."""

    @property
    def title(self) -> str:
        return STAGE_TITLES[self.name]

    def seconds(self, key: str = "seconds") -> float | None:
        """A time summed over the epochs; None when no epoch logged it."""
        times = [line[key] for line in self.history if line.get(key) is not None]
        return float(sum(times)) if times else None


@dataclass(frozen=True)
class Resampling:
    """One choice of OOD images: the clusters of the ID images, how sparse they are, and what was taken for them."""

    stage: str
    epoch: int
    tailness: list[float]
    """[K]; NaN for an empty cluster."""
    cluster_sizes: list[int]
    """[K] ID images."""
    budget: list[int]
    """[K] OOD images taken for the cluster."""
    cluster_classes: list[list[int]] | None = None
    """[K, C] ID images of each class in each cluster, where labels are at hand."""
    ood_classes: list[dict[str, int]] | None = None
    """Per cluster, OOD class name -> images taken, most frequent first, where the OOD set has labels."""
    seconds: float | None = None
    clustering: Agreement | None = None
    """Agreement of the clusters with the classes of the ID images, where labels are at hand."""
    thumbnails: list[Tensor] | None = field(default=None, metadata=PICTURE_ONLY)
    """Per cluster uint8 [up to n, C, H, W]: the first OOD images taken, nearest first."""


@dataclass(frozen=True)
class RunResults:
    """Everything that a report shows."""

    name: str
    class_names: Sequence[str]
    class_counts: Sequence[int]
    """Images of each class in the long-tailed training set."""
    scheme: str
    """How classes are grouped: ``rank`` or ``count`` (see `groups.split_groups`)."""
    stages: Sequence[StageResult]
    resamplings: Sequence[Resampling] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    build: Mapping[str, Any] = field(default_factory=dict)
    """`ltood_fast.build_info()` of the run."""

    @property
    def has_labels(self) -> bool:
        return len(self.class_names) > 0

    def stage(self, name: str) -> StageResult | None:
        return next((stage for stage in self.stages if stage.name == name), None)


@dataclass(frozen=True)
class SampleTensors:
    """The choice of a re-sampling of N ID images in K clusters."""

    assignments: Tensor
    """int64 [N], the cluster of each ID training image."""
    tailness: Tensor
    """[K], NaN for an empty cluster."""
    ood_indices: Tensor
    """int64 [budget], as `sample_ood` returned it, like `ood_clusters`."""
    ood_clusters: Tensor
    """int64 [budget], -1 = taken for no cluster."""


def resampling_result(
    stage: str,
    epoch: int,
    sample: SampleTensors,
    *,
    ood: ImageSet | None = None,
    labels: Tensor | None = None,
    n_classes: int | None = None,
    seconds: float | None = None,
    n_thumbnails: int = 8,
) -> Resampling:
    """A `Resampling` from the tensors of one re-sampling.

    Args:
        stage, epoch: where it happened.
        sample: what it chose.
        ood: the OOD images, for thumbnails and (where labelled) the classes that were taken.
        labels: int64 [N] true classes of the ID training images (-1 = unknown), with `n_classes`; never used in
            training, only to report whether the sampling reaches tail classes.
        seconds: wall time of the re-sampling.
        n_thumbnails: OOD images kept for each cluster.

    Raises:
        ValueError: lengths that differ, a cluster or an OOD index out of range.
    """
    op, K = "resampling_result", len(sample.tailness)
    assignments, tailness = sample.assignments.cpu(), sample.tailness.double().cpu()
    ood_indices, ood_clusters = sample.ood_indices.cpu(), sample.ood_clusters.cpu()
    _check.integers(op, "ood_clusters", ood_clusters, len(ood_indices), ood_indices)
    _check.index_range(op, "assignments", assignments, 0, K)
    _check.index_range(op, "ood_clusters", ood_clusters, -1, K)
    if ood is not None:
        _check.index_range(op, "ood_indices", ood_indices, 0, len(ood))
    taken = [ood_indices[ood_clusters == c] for c in range(K)]
    return Resampling(
        stage=stage,
        epoch=epoch,
        tailness=tailness.tolist(),
        cluster_sizes=torch.bincount(assignments, minlength=K).tolist(),
        budget=[len(indices) for indices in taken],
        cluster_classes=_cluster_classes(op, assignments, labels, K, n_classes),
        ood_classes=None if ood is None else _taken_classes(ood, taken),
        seconds=seconds,
        clustering=None if labels is None else agreement(assignments, labels.cpu()),
        thumbnails=None if ood is None else [ood.images[indices[:n_thumbnails]].cpu() for indices in taken],
    )


def _cluster_classes(
    op: str, assignments: Tensor, labels: Tensor | None, K: int, n_classes: int | None
) -> list[list[int]] | None:
    if labels is None or n_classes is None or bool((labels < 0).all()):
        return None
    labels = labels.cpu()
    _check.integers(op, "labels", labels, len(assignments), assignments)
    _check.index_range(op, "labels", labels, -1, n_classes)
    known = labels >= 0
    cells = assignments[known] * n_classes + labels[known]
    return torch.bincount(cells, minlength=K * n_classes).view(K, n_classes).tolist()


def _taken_classes(ood: ImageSet, taken: list[Tensor]) -> list[dict[str, int]] | None:
    if not ood.class_names or bool((ood.labels < 0).all()):
        return None
    result = []
    for indices in taken:
        counts = torch.bincount(ood.labels[indices].clamp(min=0), minlength=len(ood.class_names))
        order = counts.argsort(descending=True, stable=True).tolist()
        result.append({ood.class_names[c]: int(counts[c]) for c in order if counts[c] > 0})
    return result


def to_json(value: Any) -> Any:
    """Plain JSON values: dataclasses become dicts (without the fields that only feed pictures), tensors lists, NaN and
    infinities null, paths and other objects their text."""
    if is_dataclass(value) and not isinstance(value, type):
        kept = [f.name for f in fields(value) if not f.metadata.get("picture_only")]
        return {name: to_json(getattr(value, name)) for name in kept}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, Tensor):
        return to_json(value.tolist())
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # NumPy scalars
        return to_json(value.item())
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)

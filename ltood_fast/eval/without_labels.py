"""Evaluation where no image has a label: clusters, views that find each other, and the nearest images to look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import ltood_fast

from ..sampling.kmeans import kmeans
from .geometry import alignment, uniformity

if TYPE_CHECKING:
    from ..data import ImageFiles

SHOWN_QUERIES, SHOWN_NEIGHBORS, SHOWN_OF_CLUSTER = 10, 8, 10  # thumbnails, chosen for the width of the page
SILHOUETTE_IMAGES = 2048  # the silhouette compares every pair of them
PICTURE_ONLY = {"picture_only": True}  # fields that feed pictures and stay out of report.json


class Embedded(NamedTuple):
    """Images and their features."""

    images: Tensor | ImageFiles
    """uint8 [N, C, H, W]"""
    features: Tensor
    """float [N, F]"""


@dataclass(frozen=True)
class WithoutLabels:
    """Measures of a network that need no labels."""

    silhouette: float | None
    """Mean silhouette by cosine of the k-means clusters of the training features, in [-1, 1]; None where there is one
    cluster or one image a cluster."""
    cluster_sizes: list[int]
    """[K] training images, largest first."""
    view_recall: float | None
    """Share of test images one view of which has the other as its nearest among the other views of all of them."""
    cluster_images: list[Tensor] = field(default_factory=list, metadata=PICTURE_ONLY)
    """Per cluster uint8 [up to n, C, H, W], nearest to the centroid first."""
    retrieved: list[Tensor] = field(default_factory=list, metadata=PICTURE_ONLY)
    """Per query uint8 [1 + k, C, H, W]: a test image and the training images nearest to it."""


def evaluate_without_labels(
    train: Embedded, test: Embedded, views: tuple[Tensor, Tensor], n_clusters: int, *, seed: int = 0
) -> dict[str, Any]:
    """The fields of a `StageResult` that need no label.

    Args:
        train: the training images, which are clustered and searched.
        test: the test images, which search.
        views: features [V, F] of two random views of the same test images.
        n_clusters: cut to the number of training images.
        seed: of k-means and of the silhouette's sample.
    """
    k = min(n_clusters, len(train.features))
    unit = F.normalize(train.features.float(), dim=1)
    centroids, assignments = kmeans(unit, k, seed=seed)
    sizes = torch.bincount(assignments, minlength=k)
    order = sizes.argsort(descending=True, stable=True).tolist()
    to_centroid = (unit * centroids[assignments]).sum(dim=1)
    test_unit = F.normalize(test.features.float(), dim=1)
    return {
        "without_labels": WithoutLabels(
            _silhouette(unit, assignments, seed),
            sizes[order].tolist(),
            view_recall(*views),
            [_nearest_of_cluster(train.images, to_centroid, assignments == c) for c in order],
            _retrieved(train, test),
        ),
        "uniformity": uniformity(test.features),
        "alignment": alignment(*views),
        "test_features": test.features.detach().float().cpu(),
        "test_labels": (test_unit @ centroids.T).argmax(dim=1).cpu(),  # the cluster, for the colours of the map
    }


@torch.no_grad()
def view_recall(first: Tensor, second: Tensor) -> float:
    """Share of rows of `first` whose nearest row of `second`, by cosine, is that of the same number."""
    _, nearest = ltood_fast.knn(first.float(), 1, y=second.float())
    own = torch.arange(len(first), device=nearest.device)
    return (nearest.flatten() == own).double().mean().item()


def _silhouette(unit: Tensor, assignments: Tensor, seed: int) -> float | None:
    from sklearn.metrics import silhouette_score

    rows = torch.randperm(len(unit), generator=torch.Generator().manual_seed(seed))[:SILHOUETTE_IMAGES]
    labels = assignments.cpu()[rows]
    if not 2 <= len(labels.unique()) < len(rows):
        return None
    return float(silhouette_score(unit.cpu()[rows].numpy(), labels.numpy(), metric="cosine"))


def _nearest_of_cluster(images: Tensor | ImageFiles, to_centroid: Tensor, inside: Tensor) -> Tensor:
    rows = inside.nonzero().flatten()
    best = rows[to_centroid[rows].argsort(descending=True)[:SHOWN_OF_CLUSTER]]
    return images[best.cpu()].cpu()


def _retrieved(train: Embedded, test: Embedded) -> list[Tensor]:
    n, k = min(SHOWN_QUERIES, len(test.features)), min(SHOWN_NEIGHBORS, len(train.features))
    queries = torch.arange(n) * len(test.features) // n  # all over the test set
    _, nearest = ltood_fast.knn(test.features.float()[queries.to(test.features.device)], k, y=train.features.float())
    return [
        torch.cat([test.images[query[None]].cpu(), train.images[found.cpu()].cpu()])
        for query, found in zip(queries, nearest, strict=True)
    ]

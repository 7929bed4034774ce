"""NTXentLoss and SupConLoss of pytorch-metric-learning."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import NTXentLoss as PeerNTXent
from pytorch_metric_learning.losses import SupConLoss as PeerSupCon
from torch import Tensor

from ..ops.contrastive import supcon
from ..ops.info_nce import info_nce
from ..reference.options import Denominator, Exclude
from ._calls import CountsCalls, unusual


def _unserved(loss: Any, embeddings: Tensor, labels: Tensor | None, indices_tuple: Any, ref_emb: Tensor) -> str:
    distance = loss.distance
    if type(distance) is not CosineSimilarity or distance.p != 2 or distance.power != 1:
        return "a distance other than the cosine"
    if indices_tuple is not None:
        return "pairs of a miner (indices_tuple)"
    if labels is None or labels.dim() != 1 or labels.dtype.is_floating_point:
        return "labels that are no integers"
    if not loss.temperature > 0:
        return "a temperature that is not positive"
    return unusual(embeddings, ref_emb)


def _positive_pairs(labels: Tensor, ref_labels: Tensor, same: bool) -> tuple[Tensor, Tensor]:
    """(anchors, positives) in the order of torch.where, from sorted labels: no N×M mask."""
    order = ref_labels.argsort(stable=True)
    first, last = (torch.searchsorted(ref_labels[order], labels, right=right) for right in (False, True))
    counts = last - first
    anchors = torch.arange(len(labels), device=labels.device).repeat_interleave(counts)
    start = counts.cumsum(0) - counts
    positives = order[first[anchors] + torch.arange(len(anchors), device=labels.device) - start[anchors]]
    if not same:
        return anchors, positives
    others = anchors != positives
    return anchors[others], positives[others]


class NTXentLoss(CountsCalls, PeerNTXent):
    """``pytorch_metric_learning.losses.NTXentLoss`` without the N×M similarities: several positives, ``ref_emb``, and
    reducers; pairs of a miner and other distances are the library's."""

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> dict[str, Any]:
        reason = _unserved(self, embeddings, labels, indices_tuple, ref_emb)
        anchors = positives = labels
        if not reason:
            anchors, positives = _positive_pairs(labels, ref_labels, ref_labels is labels)
            if len(anchors) * embeddings.shape[1] > len(embeddings) * len(ref_emb):
                reason = "more numbers in positive pairs than in the similarities"
        if not self.count(reason):
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if len(anchors) == 0 or not (ref_labels != labels[:1]).any() and not (labels != labels[:1]).any():
            return self.zero_losses()
        return self._losses_of_pairs(embeddings, ref_emb, (labels, ref_labels), (anchors, positives))

    def _losses_of_pairs(
        self, embeddings: Tensor, ref_emb: Tensor, labels: tuple[Tensor, Tensor], pairs: tuple[Tensor, Tensor]
    ) -> dict[str, Any]:
        """A loss for each pair: its similarity against the negatives of its anchor."""
        rows, refs = (self.distance.maybe_normalize(x) for x in (embeddings, ref_emb))
        options = {"exclude": Exclude(*labels), "denominator": Denominator(decoupled=True), "normalize": False}
        _, negatives = info_nce(rows, rows, refs, float(self.temperature), return_lse=True, **options)
        anchors, positives = pairs
        similarity = (rows[anchors] * refs[positives]).sum(dim=1) / self.temperature
        alone = negatives == -torch.inf
        gap = negatives.masked_fill(alone, 0)[anchors] - similarity
        losses = torch.logaddexp(gap, torch.zeros_like(gap)).masked_fill(alone[anchors], 0)
        losses = losses.to(embeddings.dtype)
        return {"loss": {"losses": losses, "indices": pairs, "reduction_type": "pos_pair"}}


class SupConLoss(CountsCalls, PeerSupCon):
    """``pytorch_metric_learning.losses.SupConLoss`` without the N×N similarities, within a batch. With ``ref_emb``,
    pairs of a miner or other distances it is the library's."""

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> dict[str, Any]:
        reason = _unserved(self, embeddings, labels, indices_tuple, ref_emb)
        if not reason and ref_emb is not embeddings:
            reason = "another set of embeddings (ref_emb)"
        if not self.count(reason):
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        classes = labels.unique()
        if len(classes) in (1, len(labels)):  # no negatives, or no positives
            return self.zero_losses()
        losses = supcon(embeddings, labels, float(self.temperature), reduction="none").to(embeddings.dtype)
        indices = torch.arange(len(labels), device=labels.device)
        return {"loss": {"losses": losses, "indices": indices, "reduction_type": "element"}}

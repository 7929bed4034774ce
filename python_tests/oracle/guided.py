"""guided_contrastive, relational_distill, feature_distill, stage2_loss and farthest_cluster in closed form."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from .arithmetic import (
    EXACT,
    Array,
    Exact,
    Rows,
    best_first,
    log_softmax,
    lse_weights,
    products,
    reduce_rows,
    same_instance,
    wide,
)
from .contrastive import Batch, Truth, _masked_sum


def _positives(guide: Rows, k: int, pos_idx: Tensor | None, instance_ids: Tensor | None) -> Array:
    n = len(guide.given)
    same = same_instance(n, instance_ids)
    found = best_first(guide, guide, ~same, k) if pos_idx is None else pos_idx.cpu().numpy()
    positive = same.copy()
    for i, row in enumerate(found):
        positive[i, row[row >= 0]] = True
    return positive & ~np.eye(n, dtype=bool)


def _negatives(positive: Array, clusters: Tensor, far: Tensor) -> Array:
    c, free = clusters.cpu().numpy(), ~positive & ~np.eye(len(positive), dtype=bool)
    negative = free & (c[None, :] == far.cpu().numpy()[c][:, None])
    return np.where(negative.any(1)[:, None], negative, free)


def _force(cosines: Array, sign: int, gamma: float, weighted: bool) -> Array:
    if not weighted:
        return np.ones_like(cosines)
    half = (1 + sign * cosines) / 2
    return np.where(np.isnan(half), half, np.clip(half, 0, 1)) ** wide(gamma)


class _Student(Batch):
    """A batch whose rows are guided."""

    def guided(self, guide: Rows, clusters, far, reduction, *, k, pos_idx, weighted, gamma, instance_ids, return_lse):
        cosines = self.noise.near(guide.unit @ guide.unit.T)
        positive = _positives(guide, k, pos_idx, instance_ids)
        negative = _negatives(positive, clusters, far)
        attract = np.where(positive, _force(cosines, 1, gamma, weighted), 0)
        repel = np.where(negative, _force(cosines, -1, gamma, weighted), 0)
        with np.errstate(divide="ignore"):
            logits = self.s + np.where(negative, np.log(np.where(negative, repel, 1)), 0)
        lse, p = log_softmax(logits, positive | (negative & (repel != 0)), self.noise)
        if pos_idx is None:  # a cosine that is NaN leaves open who is near
            unknown = (np.isnan(cosines) & ~same_instance(self.n, instance_ids)).any(1)
            lse, attract = np.where(unknown, np.nan, lse), np.where(unknown[:, None], np.nan, attract)
        total = attract.sum(1)
        counted = ~(total <= 0)
        share = attract / np.where(counted, total, 1)[:, None]
        loss, w = reduce_rows(lse - _masked_sum(share, self.s), counted, reduction)
        self.g += np.where(w[:, None] != 0, w[:, None] * (p - share), 0)
        if return_lse:
            self.g += lse_weights(self.n)[:, None] * p
        return loss, lse

    def relational(self, guide: Rows, teacher, reduction, scale=1.0):
        t = products(guide, guide, teacher)
        lse, target = log_softmax(t, self.others, self.noise)
        log_ratio = np.where(self.others, (t - lse[:, None]) - (self.s - self.lse[:, None]), 0)
        losses = np.where(self.others & (target != 0), target * log_ratio, 0).sum(1)
        loss, w = reduce_rows(losses, np.ones(self.n, dtype=bool), reduction)
        w = wide(scale) * w[:, None]
        self.g += np.where(w != 0, w * (self.p - target), 0)
        return loss


def guided_contrastive(
    z: Tensor, guide: Tensor, clusters: Tensor, far: Tensor, temperature=0.2, *, k=5, pos_idx=None, weighted=True,
    gamma=1.0, instance_ids=None, normalize=True, reduction="mean", return_lse=False, noise=EXACT,
) -> Truth:  # fmt: skip
    batch = _Student(z, temperature, normalize, noise)
    options = {"k": k, "pos_idx": pos_idx, "weighted": weighted, "gamma": gamma, "instance_ids": instance_ids}
    guide = Rows.of(guide, True, noise)
    loss, lse = batch.guided(guide, clusters, far, reduction, return_lse=return_lse, **options)
    return batch.finish({"loss": loss, **({"lse": lse} if return_lse else {})}, False)


def relational_distill(
    z: Tensor, guide: Tensor, temperature=0.2, *, teacher_temperature=None, normalize=True, reduction="mean",
    return_lse=False, noise=EXACT,
) -> Truth:  # fmt: skip
    batch = _Student(z, temperature, normalize, noise)
    teacher = temperature if teacher_temperature is None else teacher_temperature
    loss = batch.relational(Rows.of(guide, True, noise), teacher, reduction)
    return batch.finish({"loss": loss}, return_lse)


def _feature(z: Tensor, guide: Tensor, reduction: str, noise: Exact) -> tuple[Array, Array]:
    rows, target = Rows.of(z, True, noise), Rows.of(guide, True, noise)
    losses = 1 - noise.near((rows.unit * target.unit).sum(1))
    loss, w = reduce_rows(losses, np.ones(len(losses), dtype=bool), reduction)
    return loss, rows.back(-w[:, None] * target.unit)


def feature_distill(z: Tensor, guide: Tensor, *, reduction="mean", noise=EXACT) -> Truth:
    loss, grad = _feature(z, guide, reduction, noise)
    return {"loss": loss, "grad z": grad}


def stage2_loss(
    z: Tensor, guide: Tensor, clusters: Tensor, far: Tensor, temperature=0.2, *, beta=0.4, distill="relational",
    teacher_temperature=None, k=5, pos_idx=None, weighted=True, gamma=1.0, instance_ids=None, normalize=True,
    reduction="mean", return_lse=False, noise=EXACT,
) -> Truth:  # fmt: skip
    batch = _Student(z, temperature, normalize, noise)
    options = {"k": k, "pos_idx": pos_idx, "weighted": weighted, "gamma": gamma, "instance_ids": instance_ids}
    rows = Rows.of(guide, True, noise)
    guided, lse = batch.guided(rows, clusters, far, reduction, return_lse=return_lse, **options)
    extra = wide(0.0)
    if distill == "relational":
        teacher = temperature if teacher_temperature is None else teacher_temperature
        part = batch.relational(rows, teacher, reduction, beta)
    else:
        part, extra = _feature(z, guide, reduction, noise)
    truth = {"loss": guided + wide(beta) * part, "guided": guided, "distill": part}
    truth = batch.finish({**truth, **({"lse": lse} if return_lse else {})}, False)
    truth["grad z"] = truth["grad z"] + wide(beta) * extra
    return truth


def farthest_cluster(centroids: Tensor, noise=EXACT) -> Truth:
    """The least similar other cluster: the most similar one to the row turned round."""
    rows = Rows.of(centroids, True, noise)
    n = len(rows.given)
    turned = Rows(-rows.given, True, noise)
    found = best_first(turned, rows, ~np.eye(n, dtype=bool), 1)[:, 0]
    return {"far": np.where(found < 0, 0, found)}

"""The losses as a careful user would write them in PyTorch: each similarity matrix once, in float32, topk instead of a
sort, no general masks. The reference is written to be obvious; these are the fairer baseline."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import partners

ALPHA, BETA = 0.3, 0.4  # the defaults of stage1_loss and stage2_loss


def _wide_unit(x: Tensor) -> Tensor:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=1)


def _similarities(z: Tensor, temperature: float) -> Tensor:
    """[N, N], -inf on the diagonal."""
    u = _wide_unit(z)
    eye = torch.eye(len(z), dtype=torch.bool, device=z.device)
    return (u @ u.T / temperature).masked_fill(eye, -torch.inf)


def _at(s: Tensor, columns: Tensor) -> Tensor:
    """[N] one entry of each row."""
    return s.gather(1, columns[:, None])[:, 0]


def _other_images(s: Tensor) -> Tensor:
    """A copy of s without the row itself and its other view."""
    return s.detach().scatter(1, partners(s)[:, None], -torch.inf)


def nt_xent(z: Tensor, temperature: float) -> Tensor:
    return F.cross_entropy(_similarities(z, temperature), partners(z))


def _supcon(s: Tensor, labels: Tensor) -> Tensor:
    same = labels[:, None] == labels
    same.fill_diagonal_(False)
    log_p = s.log_softmax(1)
    count = same.sum(1)
    rows = -torch.where(same, log_p, 0).sum(1) / count.clamp(min=1)
    return rows.sum() / (count > 0).sum().clamp(min=1)


def supcon(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    return _supcon(_similarities(z, temperature), labels)


def _psd(s: Tensor, domain: Tensor | None) -> Tensor:
    candidates = _other_images(s)
    if domain is not None:
        candidates = candidates.masked_fill(domain[:, None] != domain, -torch.inf)
    nearest = candidates.argmax(1)
    return (s.logsumexp(1) - (_at(s, partners(s)) + _at(s, nearest)) / 2).mean()


def psd_loss(z: Tensor, temperature: float) -> Tensor:
    return _psd(_similarities(z, temperature), None)


def stage1_loss(z: Tensor, domain: Tensor, temperature: float) -> Tensor:
    s = _similarities(z, temperature)
    return _psd(s, domain) + ALPHA * _supcon(s, domain)


def _guided(s: Tensor, cosines: Tensor, clusters: Tensor, far: Tensor, k: int) -> Tensor:
    """s, cosines [N, N] with -inf on their diagonals."""
    nearest = _other_images(cosines).topk(k, dim=1).indices
    positive = torch.zeros_like(s, dtype=torch.bool).scatter_(1, nearest, True).scatter_(1, partners(s)[:, None], True)
    negative = (clusters == far[clusters][:, None]) & ~positive
    attract = torch.where(positive, (1 + cosines) / 2, 0)
    repel = torch.where(negative, (1 - cosines) / 2, 1).log()
    terms = (s + repel).masked_fill(~(positive | negative), -torch.inf)
    mean_positive = (attract * torch.where(positive, s, 0)).sum(1) / attract.sum(1)
    return (terms.logsumexp(1) - mean_positive).mean()


def _distill(s: Tensor, cosines: Tensor, temperature: float) -> Tensor:
    p, log_p = (cosines / temperature).softmax(1), (cosines / temperature).log_softmax(1)
    difference = torch.where(p > 0, log_p - s.log_softmax(1), 0)
    return (p * difference).sum(1).mean()


def guided_contrastive(z: Tensor, guide: Tensor, clusters: Tensor, far: Tensor, temperature: float, k: int) -> Tensor:
    return _guided(_similarities(z, temperature), _similarities(guide, 1.0), clusters, far, k)


def relational_distill(z: Tensor, guide: Tensor, temperature: float) -> Tensor:
    return _distill(_similarities(z, temperature), _similarities(guide, 1.0), temperature)


def stage2_loss(z: Tensor, guide: Tensor, clusters: Tensor, far: Tensor, temperature: float, k: int) -> Tensor:
    s, cosines = _similarities(z, temperature), _similarities(guide, 1.0)
    return _guided(s, cosines, clusters, far, k) + BETA * _distill(s, cosines, temperature)

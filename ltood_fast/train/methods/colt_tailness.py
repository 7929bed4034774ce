"""COLT's momentum tailness score of an ID image [Bai 2023], as the published code has it.

With p_ij = exp(s_ij) / sum_{l != i} exp(s_il) of the batch and both views i, i' of an image, its score in an epoch is
the sum of the k largest (p_ij + p_i'j) / 2 over the other images' rows j: an image of a dense place has neighbours that
compete with its other view, so the score of the head is high. Over the epochs

    m_1 = score_1,   m_t = momentum m_(t-1) + (1 - momentum) score_t,   tailness = -m.

The published code takes the z-scores of the clusters with the standard deviation of a sample, gives what rounding
leaves to the last cluster and lets clusters choose by number. Here budgets and order are those of `sample_ood`: the
deviation of the population, the largest remainders, the highest tailness first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGES = 256  # at a time: their probabilities over the batch are in memory


@torch.no_grad()
def head_scores(z: Tensor, temperature: float, k: int, first: int, images: int) -> Tensor:
    """[images] in [0, 1]: the scores of the images whose views are rows first + i and first + images + i of z.

    Args:
        z: [N, D], the rows of the batch of all ranks.
        temperature, k: tau, and how many probabilities are summed, cut to N - 2.
        first, images: this rank's rows begin there, the first views of its images before the second ones.
    """
    z = F.normalize(z, dim=1)
    columns = torch.arange(len(z), device=z.device)

    def probabilities(own: Tensor, other: Tensor) -> Tensor:
        """[n, N] of rows `own`, those of themselves and of their other views 0."""
        s = (z[own] @ z.T / temperature).masked_fill(columns == own[:, None], -torch.inf)
        return s.softmax(dim=1).masked_fill(columns == other[:, None], 0.0)

    scores = []
    for block in torch.arange(first, first + images, device=z.device).split(IMAGES):
        both = probabilities(block, block + images) + probabilities(block + images, block)
        scores.append(both.topk(min(k, len(z) - 2), dim=1).values.sum(dim=1) / 2)
    return torch.cat(scores)


class ColtTailness:
    """m of every ID image, NaN for one that no batch has held yet."""

    def __init__(self, n: int, momentum: float, device: torch.device):
        self.momentum = momentum
        self._scores = torch.full((n + 1,), torch.nan, device=device)  # the last one is of all OOD images, and no score

    def update(self, rows: Tensor, scores: Tensor) -> None:
        """rows [B], each once an epoch, those from n on OOD images, and their scores of this epoch [B]."""
        rows = rows.clamp(max=len(self._scores) - 1)  # rather than a selection, for whose size a GPU is waited for
        before = self._scores[rows]
        moved = self.momentum * before + (1.0 - self.momentum) * scores
        self._scores[rows] = torch.where(before.isnan(), scores, moved)

    def state(self) -> Tensor:
        """m [n]"""
        return self._scores[:-1]

    def load(self, scores: Tensor) -> None:
        self._scores[:-1] = scores.to(self._scores.device)

    def tailness(self) -> Tensor:
        """[n], high = tail; an image without a score counts as the mean of the others [ltood_fast]."""
        scores = self.state()
        return -torch.where(scores.isnan(), scores.nanmean(), scores)

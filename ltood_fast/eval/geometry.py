"""How features lie on the unit sphere: uniformity and alignment [Wang & Isola 2020]."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import ltood_fast

from ..ops import _check


@torch.no_grad()
def uniformity(features: Tensor, *, t: float = 2.0, backend: str = "auto") -> float:
    """``log mean_{i != j} exp(-t |u_i - u_j|^2)``, u the normalised rows; the lower, the more evenly they cover the
    sphere. 0 when all rows are one point.

    As ``|u_i - u_j|^2 = 2 - 2 <u_i, u_j>``, the sum over j is the log-sum-exp of NT-Xent at temperature ``1 / 2t``: one
    pass over tiles, no N x N matrix. Replaces ``torch.pdist(F.normalize(features)).pow(2).mul(-t).exp().mean().log()``.

    Args:
        features: float [N, F], N >= 2. t: positive, 2 as in the paper.
        backend: of `ltood_fast.nt_xent`.

    Returns:
        The number; NaN where a row is zero, which has no place on the sphere, or not finite.

    Raises:
        ValueError, TypeError: fewer than two rows, t <= 0.
    """
    op = "uniformity"
    _check.embeddings(op, "features", features)
    _check.positive_number(op, "t", t)
    n = len(features)
    _check.require(n >= 2, op, "features", "at least two rows", n)
    if not _on_sphere(features):
        return math.nan
    own = torch.arange(n, device=features.device)  # every row an image of its own: no positives, N - 1 others
    _, lse = ltood_fast.nt_xent(features, 1.0 / (2.0 * t), instance_ids=own, return_lse=True, backend=backend)
    return lse.double().logsumexp(dim=0).item() - math.log(n) - math.log(n - 1) - 2.0 * t


@torch.no_grad()
def alignment(first: Tensor, second: Tensor) -> float:
    """``mean_i |u_i - v_i|^2`` of two views of each image, normalised; 0 when views coincide. The exponent is the
    paper's 2.

    Args:
        first, second: float [N, F], row i of both the same image.

    Returns:
        The number; NaN where a row is zero or not finite.

    Raises:
        ValueError, TypeError: shapes that differ.
    """
    op = "alignment"
    _check.embeddings(op, "first", first)
    _check.same_width(op, "second", second, "first", first)
    _check.require(len(second) == len(first), op, "second", f"{len(first)} rows as first has", len(second))
    if not (_on_sphere(first) and _on_sphere(second)):
        return math.nan
    u, v = (F.normalize(x.double(), dim=1) for x in (first, second))
    return (u - v).square().sum(dim=1).mean().item()


def _on_sphere(features: Tensor) -> bool:
    norms = features.float().norm(dim=1)
    return bool(((norms > 0) & norms.isfinite()).all())

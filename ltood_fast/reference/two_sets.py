"""Contrastive losses between two sets of embeddings, straight from their formulas: N×M, slow and obvious.

Notation: u_i = rows of query, k_j = rows of the keys (L2-normalised on request), s_ij = <u_i, k_j> / tau, p(i) the
positive of row i. rest_i = log-sum-exp over the columns of row i without p(i); l_i = log(1 + exp(rest_i - s_ip)).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._common import common_dtype, full_precision, reduce_rows, unit_rows
from .options import Denominator, Exclude


class Direction(NamedTuple):
    """One direction of the loss, a number a row."""

    loss: Tensor
    lse: Tensor
    counted: Tensor  # bool


def _rest(s: Tensor, negative: Tensor) -> Tensor:
    """log sum exp of the negatives; -inf, without gradient, where a row has none."""
    empty = ~negative.any(dim=1)
    lse = s.masked_fill(~negative, -torch.inf).masked_fill(empty[:, None], 0).logsumexp(dim=1)
    return lse.masked_fill(empty, -torch.inf)


def _direction(s: Tensor, negative: Tensor, s_positive: Tensor, smoothing: float, decoupled: bool) -> Direction:
    """s, negative: [N, C], the similarities and which of them are negatives; s_positive: [N]."""
    rest, empty = _rest(s, negative), ~negative.any(dim=1)
    gap = (rest.masked_fill(empty, 0) - s_positive).masked_fill(empty, 0)
    if decoupled:
        return Direction(gap, rest, ~empty)
    # lse - s_positive would round a small loss away.
    loss = torch.logaddexp(gap, torch.zeros_like(gap)).masked_fill(empty, 0)
    loss = loss + (s_positive - s_positive).detach()  # 0, or NaN where a similarity is not finite
    lse = loss + s_positive
    if smoothing:
        mean = (s_positive + s.masked_fill(~negative, 0).sum(dim=1)) / (1 + negative.sum(dim=1))
        loss = (1 - smoothing) * loss + smoothing * (lse - mean)
    return Direction(loss, lse, torch.ones_like(empty))


def weighted_rows(sides: list[Direction], weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """(weighted losses [N] of one direction, or of the mean of two; the weight that each of them counts with), for
    `reduce_rows`."""
    rows = sum(side.loss for side in sides) / len(sides)
    counted = sum(side.counted.to(rows.dtype) for side in sides) / len(sides)
    if weight is None:
        return rows, counted
    weight = weight.detach().to(rows.dtype)
    return rows * weight, counted * weight


def directions(
    query: Tensor,
    keys: tuple[Tensor, Tensor | None],  # positive_key, negative_keys
    temperature: float | Tensor,
    *,
    target: Tensor | None,
    symmetric: bool,
    exclude: Exclude | None,
    decoupled: bool,
    label_smoothing: float,
    normalize: bool,
) -> list[Direction]:
    """Queries over keys and, if symmetric, keys over queries."""
    given = [x for x in (query, *keys) if x is not None]
    u, k, *queue = (unit_rows(x, normalize).to(common_dtype(*given)) for x in given)
    target = torch.arange(len(u), device=u.device) if target is None else target.long()
    if queue:
        s = u @ queue[0].T / temperature
        negative, s_positive = torch.ones_like(s, dtype=torch.bool), (u * k[target]).sum(dim=1) / temperature
    else:
        s = u @ k.T / temperature
        negative = torch.arange(len(k), device=u.device)[None, :] != target[:, None]
        s_positive = s.gather(1, target[:, None])[:, 0]
    if exclude is not None:
        negative = negative & (exclude.query_ids[:, None] != exclude.key_ids[None, :])
    sides = [_direction(s, negative, s_positive, label_smoothing, decoupled)]
    if symmetric:
        sides.append(_direction(s.T, negative.T, s_positive, label_smoothing, decoupled))
    return sides


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    target: Tensor | None = None,
    symmetric: bool = False,
    exclude: Exclude | None = None,
    denominator: Denominator | None = None,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """l_i = log sum exp of s_ij over p(i) and the negatives, minus s_ip: InfoNCE (van den Oord 2018)."""
    with full_precision(query):
        sides = directions(
            query,
            (positive_key, negative_keys),
            temperature,
            target=target,
            symmetric=symmetric,
            exclude=exclude,
            decoupled=denominator is not None and denominator.decoupled,
            label_smoothing=label_smoothing,
            normalize=normalize,
        )
        loss = reduce_rows(*weighted_rows(sides, weight), reduction)
    if not return_lse:
        return loss
    return loss, torch.stack([side.lse for side in sides]) if symmetric else sides[0].lse


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    normalize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """`info_nce` in both directions at the temperature 1 / logit_scale (CLIP, Radford 2021); the bias cancels."""
    options = {"normalize": normalize, "reduction": reduction, "symmetric": True}
    loss = info_nce(image_features, text_features, temperature=1 / logit_scale, **options)
    return loss if logit_bias is None else loss + torch.as_tensor(0 * logit_bias).to(loss)


def sigmoid_rows(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    target: Tensor | None,
    normalize: bool,
) -> Tensor:
    """Each image over all texts, target its own: -sum_j log sigmoid(t_ij (scale <x_i, y_j> + bias))."""
    dtype = common_dtype(image_features, text_features)
    x, y = (unit_rows(rows, normalize).to(dtype) for rows in (image_features, text_features))
    target = torch.arange(len(x), device=x.device) if target is None else target
    logits = logit_scale * (x @ y.T) + logit_bias
    own = torch.arange(len(y), device=x.device)[None, :] == target[:, None]
    return torch.logaddexp(torch.where(own, -logits, logits), torch.zeros_like(logits)).sum(dim=1).to(dtype)


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    normalize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """-(1/N) sum_ij log sigmoid(t_ij (scale <x_i, y_j> + bias)), t = 1 for j = i, else -1 (Zhai 2023)."""
    with full_precision(image_features):
        pair = image_features, text_features
        rows = sigmoid_rows(*pair, logit_scale, logit_bias, target=None, normalize=normalize)
        return reduce_rows(rows, torch.ones_like(rows, dtype=torch.bool), reduction)

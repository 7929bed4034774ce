"""info_nce: loss, log-sum-exp and gradients in closed form.

One matrix G = d objective / d s over all keys gives all gradients: ``grad_u = G k / tau``, ``grad_k = G^T u / tau``,
``grad_tau = -sum(G s) / tau``. The keys are the rows of positive_key, then those of negative_keys.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from .arithmetic import EXACT, Array, Exact, Rows, log_softmax, lse_weights, products, row_weights, wide
from .contrastive import Truth


class Pairs:
    """Similarities of all queries with all keys, and the gradients that collect in G."""

    def __init__(self, query: Rows, keys: dict[str, Rows], temperature: Tensor | float) -> None:
        self.query, self.keys, self.tau = query, keys, wide(temperature)
        self.s = np.concatenate([products(query, key, self.tau) for key in keys.values()], axis=1)
        self.g = np.zeros_like(self.s)

    def gradients(self) -> Truth:
        k = np.concatenate([key.unit for key in self.keys.values()])
        truth = {"grad query": self.query.back(_product(self.g, k) / self.tau)}
        grad_keys = _product(self.g.T, self.query.unit) / self.tau
        start = 0
        for name, key in self.keys.items():
            truth[f"grad {name}"] = key.back(grad_keys[start : start + len(key.given)])
            start += len(key.given)
        return {**truth, "grad temperature": -(self.g * np.where(self.g != 0, self.s, 0)).sum() / self.tau}


def _product(g: Array, rows: Array) -> Array:
    """g @ rows; a broken row reaches those alone that give it a weight."""
    broken = ~np.isfinite(rows).all(1)
    out = g[:, ~broken] @ rows[~broken]
    for j in np.flatnonzero(broken):
        out = out + np.where(g[:, j : j + 1] != 0, g[:, j : j + 1] * rows[j], 0)
    return out


class Direction(NamedTuple):
    """Losses and log-sum-exp [N], their slopes d / d s [N, C], and which rows count [N]."""

    loss: Array
    slope: Array
    lse: Array
    lse_slope: Array
    counted: Array


def direction(s: Array, others: Array, positive: Array, smoothing: Array, decoupled: bool, noise: Exact) -> Direction:
    """`positive`: one of each row; `others`: its negatives."""
    rest, share = log_softmax(s, others, noise)
    some, own = others.any(1), np.where(positive, s, 0).sum(1)
    if decoupled:
        loss = np.where(some, np.where(some, rest, 0) - own, 0)
        share = np.where(others, share, 0)
        return Direction(loss, np.where(some[:, None], share - positive, 0), rest, share, some)
    columns = others | positive
    lse, p = log_softmax(s, columns, noise)
    target = positive * (1 - smoothing) + smoothing * columns / (1 + others.sum(1, keepdims=True))
    loss = np.where(some, np.logaddexp(wide(0.0), np.where(some, rest, 0) - own), 0 * own)
    if smoothing > 0:
        loss = lse - np.where(target != 0, target * np.where(target != 0, s, 0), 0).sum(1)
    p = np.where(columns, p, 0)
    return Direction(loss, p - target, lse, p, np.ones(len(s), dtype=bool))


def _pair_masks(
    n: int, m: int, q: int | None, target: Tensor | None, ids: tuple[Tensor | None, Tensor | None]
) -> tuple[Array, Array]:
    """(positive [N, M + Q], negatives [N, M + Q])"""
    columns = np.arange(m + (q or 0))
    positive = columns[None, :] == (np.arange(n) if target is None else target.cpu().numpy())[:, None]
    others = ~positive & (columns >= (0 if q is None else m))
    if ids[0] is not None:
        queries, keys = (x.cpu().numpy() for x in ids)
        same = queries[:, None] == keys[None, :]
        others[:, len(columns) - same.shape[1] :] &= ~same
    return positive, others


def info_nce(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None, temperature=0.1, *, target=None,
    symmetric=False, query_ids=None, key_ids=None, decoupled=False, label_smoothing=0.0, row_weight=None,
    normalize=True, reduction="mean", return_lse=False, noise=EXACT,
) -> Truth:  # fmt: skip
    keys = {"positive_key": positive_key} | ({} if negative_keys is None else {"negative_keys": negative_keys})
    rows = {name: Rows.of(x, normalize, noise) for name, x in keys.items()}
    pairs = Pairs(Rows.of(query, normalize, noise), rows, temperature)
    n, q = len(query), None if negative_keys is None else len(negative_keys)
    positive, others = _pair_masks(n, len(positive_key), q, target, (query_ids, key_ids))
    options = wide(label_smoothing), decoupled, noise
    sides = [direction(pairs.s, others, positive, *options)]
    if symmetric:
        sides.append(direction(pairs.s.T, others.T, positive.T, *options))
    weight = np.ones(n, dtype=np.longdouble) if row_weight is None else wide(row_weight)
    total = sum((weight * side.counted).sum() for side in sides) / len(sides)
    share = weight / len(sides) / ((total if total > 0 else 1) if reduction == "mean" else 1)
    losses = sum(np.where(share != 0, share * side.loss, 0 * side.loss) for side in sides)
    truth = {"loss": losses if reduction == "none" else losses.sum()}
    for number, side in enumerate(sides):
        w = (share * (row_weights(n) if reduction == "none" else 1))[:, None]
        g = w * side.slope
        g = g + lse_weights(n)[:, None] * side.lse_slope if return_lse else g
        pairs.g += g.T if number else g
    if return_lse:
        truth["lse"] = np.stack([side.lse for side in sides]) if symmetric else sides[0].lse
    return {**truth, **pairs.gradients()}


def clip_loss(
    image_features: Tensor, text_features: Tensor, logit_scale, logit_bias, *, normalize=False, reduction="mean",
    noise=EXACT,
) -> Truth:  # fmt: skip
    """The temperature is 1 / logit_scale, whose slope is -1 / logit_scale^2."""
    tau = 1 / wide(logit_scale)
    options = {"symmetric": True, "normalize": normalize, "reduction": reduction, "noise": noise}
    truth = info_nce(image_features, text_features, None, tau, **options)
    return {
        "loss": truth["loss"],
        "grad image_features": truth["grad query"],
        "grad text_features": truth["grad positive_key"],
        "grad logit_scale": -truth["grad temperature"] * tau**2,
        "grad logit_bias": wide(0.0),
    }


def sigmoid_loss(
    image_features: Tensor, text_features: Tensor, logit_scale, logit_bias, *, normalize=False, reduction="mean",
    noise=EXACT,
) -> Truth:  # fmt: skip
    x, y = (Rows.of(rows, normalize, noise) for rows in (image_features, text_features))
    scale, n = wide(logit_scale), len(x.given)
    v = products(x, y)
    sign = 2 * np.eye(n, dtype=np.longdouble) - 1
    logits = -sign * noise.near(noise.near(scale * v) + wide(logit_bias))
    losses = noise.near(np.logaddexp(wide(0.0), logits)).sum(1)
    w = np.full(n, wide(1.0) / (n if reduction == "mean" else 1))
    loss = (w * losses).sum() if reduction != "none" else losses
    if reduction == "none":
        w = w * row_weights(n)
    g = -sign * w[:, None] * noise.near(np.exp(-np.logaddexp(wide(0.0), -logits)))
    return {
        "loss": loss,
        "grad image_features": x.back(_product(g, y.unit) * scale),
        "grad text_features": y.back(_product(g.T, x.unit) * scale),
        "grad logit_scale": (g * v).sum(),
        "grad logit_bias": g.sum(),
    }

"""nt_xent, supcon, psd_loss, domain_loss and stage1_loss: loss, log-sum-exp and gradients in closed form.

Every loss is a sum over pairs, so that one matrix G = d objective / d s gives all gradients:
``grad_u = (G + G^T) u / tau`` (and ``G_bank b / tau``) and ``grad_tau = -sum(G s) / tau``.
"""

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

Truth = dict[str, Array]


class Batch:
    """Unit rows, similarities, their log-sum-exp over all other rows, and the gradients that collect in G."""

    def __init__(self, z: Tensor, temperature: Tensor | float, normalize: bool, noise: Exact) -> None:
        self.rows = Rows.of(z, normalize, noise)
        self.tau, self.noise, self.n = wide(temperature), noise, len(z)
        self.s = products(self.rows, self.rows, self.tau)
        self.others = ~np.eye(self.n, dtype=bool)
        self.lse, self.p = log_softmax(self.s, self.others, noise)
        self.g = np.zeros_like(self.s)
        self.grad_unit, self.grad_tau = np.zeros_like(self.rows.unit), wide(0.0)

    def losses(self, positive: Array, reduction: str, scale: float = 1.0, bank: tuple | None = None) -> Array:
        """Row losses lse - sum y s with y the positives' weights, rows of which sum to 1; adds to the gradient.

        `bank`: its rows and the weights of its positives."""
        attraction, weight = _masked_sum(positive, self.s), positive.sum(1)
        if bank is not None:
            s_bank = products(self.rows, bank[0], self.tau)
            attraction, weight = attraction + _masked_sum(bank[1], s_bank), weight + bank[1].sum(1)
        counted = weight > 0
        share = np.where(counted, weight, 1)
        reduced, w = reduce_rows(self.lse - attraction / share, counted, reduction)
        w = (scale * w)[:, None]
        self.g += np.where(w != 0, w * (self.p - positive / share[:, None]), 0)
        if bank is not None:
            g = -w * bank[1] / share[:, None]
            self.grad_unit += np.where(w != 0, g @ np.where(g.any(0)[:, None], bank[0].unit, 0), 0) / self.tau
            self.grad_tau -= _masked_sum(g, s_bank).sum() / self.tau
        return reduced

    def decoupled_losses(self, positive: Array, reduction: str) -> Array:
        """`losses` with a denominator of negatives alone; a row that has none has no loss."""
        negative = self.others & (positive == 0)
        self.lse, self.p = log_softmax(self.s, negative, self.noise)
        return self.losses(np.where(negative.any(1)[:, None], positive, 0), reduction)

    def finish(self, truth: Truth, return_lse: bool) -> Truth:
        if return_lse:
            truth["lse"] = self.lse
            self.g += lse_weights(self.n)[:, None] * self.p
        g = np.where(self.others, self.g, 0)
        grad_unit = self.grad_unit + (g + g.T) @ self.rows.unit / self.tau
        truth["grad z"] = self.rows.back(grad_unit)
        truth["grad temperature"] = self.grad_tau - _masked_sum(g, self.s).sum() / self.tau
        return truth


def _masked_sum(weights: Array, values: Array) -> Array:
    return np.where(weights != 0, weights * np.where(weights != 0, values, 0), 0).sum(1)


def views(n: int, instance_ids: Tensor | None) -> Array:
    return (same_instance(n, instance_ids) & ~np.eye(n, dtype=bool)).astype(np.longdouble)


def classes(labels: Tensor) -> Array:
    y = labels.cpu().numpy()
    return ((y[:, None] == y[None, :]) & ~np.eye(len(y), dtype=bool)).astype(np.longdouble)


def nt_xent(
    z: Tensor, temperature=0.5, *, instance_ids=None, decoupled=False, normalize=True, reduction="mean",
    return_lse=False, noise=EXACT,
) -> Truth:  # fmt: skip
    batch = Batch(z, temperature, normalize, noise)
    loss = (batch.decoupled_losses if decoupled else batch.losses)(views(len(z), instance_ids), reduction)
    return batch.finish({"loss": loss}, return_lse)


def supcon(
    z: Tensor, labels: Tensor, temperature=0.5, *, decoupled=False, normalize=True, reduction="mean",
    return_lse=False, noise=EXACT,
) -> Truth:  # fmt: skip
    batch = Batch(z, temperature, normalize, noise)
    loss = (batch.decoupled_losses if decoupled else batch.losses)(classes(labels), reduction)
    return batch.finish({"loss": loss}, return_lse)


class Search:
    """Who may be a neighbour of whom, in the batch or in a bank."""

    def __init__(
        self, rows: Rows, *, domain=None, bank=None, bank_ids=None, bank_domain=None, instance_ids=None
    ) -> None:
        n = len(rows.given)
        self.rows, self.bank = rows, None if bank is None else Rows.of(bank, rows.normalize, rows.noise)
        columns = n if bank is None else len(bank)
        self.allowed = np.ones((n, columns), dtype=bool)
        if bank is None:
            self.allowed &= ~same_instance(n, instance_ids)
        elif bank_ids is not None:
            self.allowed &= instance_ids.cpu().numpy()[:, None] != bank_ids.cpu().numpy()[None, :]
        other = domain if bank is None else bank_domain
        if domain is not None and other is not None:
            self.allowed &= domain.cpu().numpy()[:, None] == other.cpu().numpy()[None, :]

    @property
    def searched(self) -> Rows:
        return self.rows if self.bank is None else self.bank

    def neighbors(self, k: int) -> Array:
        return best_first(self.rows, self.searched, self.allowed, k)

    def weights(self, neighbors: Array, lam: Tensor | float) -> Array:
        """lam_i at the neighbours of row i."""
        chosen = np.zeros(self.allowed.shape, dtype=np.longdouble)
        lam = np.broadcast_to(wide(lam), len(chosen))
        for i, found in enumerate(neighbors):
            chosen[i, found[found >= 0]] = lam[i]
        return chosen


def _psd(
    batch: Batch, search: Search, reduction: str, *, k=1, neighbor_weight=1.0, pairing="same", instance_ids=None,
    neighbors=None, targets=None,
) -> Array:  # fmt: skip
    """`neighbors`: those of the implementation, where the choice itself is judged elsewhere; `targets`: the rows of the
    batch in their place as neighbours across views, for differences, which would see them move."""
    found = search.neighbors(k) if neighbors is None else neighbors
    if pairing == "cross":  # a row's own pair are the others' neighbours, which do not move
        found = _handed_over(found, same_instance(batch.n, instance_ids))
        weights, positive = search.weights(found, neighbor_weight), views(batch.n, instance_ids)
        rows = search.searched if targets is None else Rows.of(targets, search.rows.normalize, search.rows.noise)
        return batch.losses(positive, reduction, bank=(rows, weights))
    weights, positive = search.weights(found, neighbor_weight), views(batch.n, instance_ids)
    if search.bank is None:
        return batch.losses(positive + weights, reduction)
    return batch.losses(positive, reduction, bank=(search.bank, weights))


def _handed_over(found: Array, same: Array) -> Array:
    """Each row's neighbours given to the row of its instance that comes before it, the first's to the last."""
    handed = np.full_like(np.asarray(found), -1)
    for i in range(len(found)):
        rows = np.flatnonzero(same[i])
        if len(rows) > 1:
            handed[rows[list(rows).index(i) - 1]] = found[i]
    return handed


def psd_loss(
    z: Tensor, temperature=0.2, *, k=1, neighbor_weight=1.0, pairing="same", instance_ids=None, normalize=True,
    reduction="mean", return_lse=False, neighbors=None, targets=None, noise=EXACT, **search,
) -> Truth:  # fmt: skip
    batch = Batch(z, temperature, normalize, noise)
    who = Search(batch.rows, instance_ids=instance_ids, **search)
    options = {"k": k, "neighbor_weight": neighbor_weight, "instance_ids": instance_ids, "neighbors": neighbors}
    options |= {"pairing": pairing, "targets": targets}
    return batch.finish({"loss": _psd(batch, who, reduction, **options)}, return_lse)


def stage1_loss(
    z: Tensor, domain: Tensor, temperature=0.2, *, alpha=0.3, k=1, neighbor_weight=1.0, pairing="same",
    same_domain=True, instance_ids=None, normalize=True, reduction="mean", return_lse=False, neighbors=None,
    targets=None, noise=EXACT, **search,
) -> Truth:  # fmt: skip
    batch = Batch(z, temperature, normalize, noise)
    who = Search(batch.rows, domain=domain if same_domain else None, instance_ids=instance_ids, **search)
    options = {"k": k, "neighbor_weight": neighbor_weight, "instance_ids": instance_ids, "neighbors": neighbors}
    options |= {"pairing": pairing, "targets": targets}
    psd = _psd(batch, who, reduction, **options)
    separation = batch.losses(classes(domain), reduction, scale=alpha)
    truth = {"loss": psd + wide(alpha) * separation, "psd": psd, "domain": separation}
    return batch.finish(truth, return_lse)


def domain_loss(
    z: Tensor, domain: Tensor, temperature=0.2, *, kind="supcon", weight=None, bias=None, normalize=True,
    reduction="mean", return_lse=False, noise=EXACT,
) -> Truth:  # fmt: skip
    if kind == "supcon":
        options = {"normalize": normalize, "reduction": reduction, "return_lse": return_lse, "noise": noise}
        return supcon(z, domain, temperature, **options)
    rows, head = Rows.of(z, normalize, noise), noise.near(wide(weight))
    logit = noise.near(rows.unit @ head) + noise.near(wide(bias))
    y = wide(domain)
    signed = np.where(y == 1, -logit, logit)
    soft = np.fmax(signed, 0) + np.log1p(np.exp(-abs(signed)))
    losses = noise.near(np.where(np.isnan(signed), signed, soft))
    loss, w = reduce_rows(losses, np.ones(len(y), dtype=bool), reduction)
    sigmoid = np.exp(-np.logaddexp(wide(0.0), -logit))
    g = w * (noise.near(sigmoid) - y)
    return {
        "loss": loss,
        "grad z": rows.back(g[:, None] * head[None, :]),
        "grad weight": g @ rows.unit,
        "grad bias": g.sum(),
    }

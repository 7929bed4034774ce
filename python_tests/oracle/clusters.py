"""cluster_kl, one step of refine_centroids, knn and what follows from it, sample_ood."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from .arithmetic import EXACT, Array, Exact, Rows, best_first, reduce_rows, wide
from .contrastive import Truth


def _assignment(rows: Rows, centers: Rows, nu: Array, noise: Exact) -> tuple[Array, Array, Array]:
    """(log q [N, K], differences z - mu [N, K, D], nu + squared distances)."""
    difference = noise.near(rows.unit[:, None, :] - centers.unit[None, :, :])
    spread = nu + noise.near((difference**2).sum(2))
    # (1 + d/nu)^-((nu+1)/2), in logarithms and relative to the nearest centroid
    log_q = -(nu + 1) / 2 * np.log(noise.near(spread / spread.min(1, keepdims=True)))
    log_q = log_q - np.log(np.exp(log_q).sum(1, keepdims=True))
    return log_q, difference, spread


def _sharpened(log_q: Array) -> Array:
    """log p [N, K]: q squared over the mass of the cluster, rows that sum to 1."""
    mass = np.exp(log_q).sum(0)
    raw = 2 * log_q - np.log(np.where(mass == 0, 1, mass))
    raw = raw - raw.max(1, keepdims=True)
    return raw - np.log(np.exp(raw).sum(1, keepdims=True))


def target(z: Tensor, centroids: Tensor, *, nu=1.0, normalize=False) -> Array:
    """log p, which the gradient of `cluster_kl` takes as given."""
    rows, centers = Rows.of(z, normalize, EXACT), Rows.of(centroids, normalize, EXACT)
    return _sharpened(_assignment(rows, centers, wide(nu), EXACT)[0])


def cluster_kl(
    z: Tensor, centroids: Tensor, *, nu=1.0, normalize=False, reduction="mean", return_q=False, target=None, noise=EXACT
) -> Truth:
    rows, centers, nu = Rows.of(z, normalize, noise), Rows.of(centroids, normalize, noise), wide(nu)
    log_q, difference, spread = _assignment(rows, centers, nu, noise)
    log_p = _sharpened(log_q) if target is None else target
    p, q = np.exp(log_p), np.exp(log_q)
    losses = np.where(p == 0, 0, p * noise.shifted(log_p - log_q)).sum(1)
    loss, w = reduce_rows(losses, np.ones(len(losses), dtype=bool), reduction)
    pull = w[:, None] * (noise.near(p) - noise.near(q)) * (nu + 1) / spread
    step = pull[:, :, None] * difference
    truth = {"loss": loss, "grad z": rows.back(step.sum(1)), "grad centroids": centers.back(-step.sum(0))}
    return {**truth, "q": noise.near(q)} if return_q else truth


def refine_centroids(
    z: Tensor, centroids: Tensor, *, nu=1.0, normalize=False, lr=0.1, steps=1, tol=0.0, noise=EXACT
) -> Truth:
    """One step. "moved": by how much the centroids moved, so that a small step is judged by its own size."""
    assert steps == 1
    assert tol == 0
    start = noise.rows(wide(centroids))
    gradient = cluster_kl(z, centroids, nu=nu, normalize=normalize, noise=noise)["grad centroids"]
    end = start - wide(lr) * gradient
    rows, centers = Rows.of(z, normalize, noise), Rows(end, normalize, noise)
    return {"moved": end - wide(centroids), "assignments": _assignment(rows, centers, wide(nu), noise)[0].argmax(1)}


def knn(x: Tensor, k: int = 10, *, y: Tensor | None = None, normalize=True, noise=EXACT) -> Truth:
    rows = Rows.of(x, normalize, noise)
    searched = rows if y is None else Rows.of(y, normalize, noise)
    allowed = ~np.eye(len(x), dtype=bool) if y is None else np.ones((len(x), len(y)), dtype=bool)
    found = best_first(rows, searched, allowed, k)
    return {"cosines": noise.near(np.take_along_axis(rows.unit @ searched.unit.T, found, 1)), "indices": found}


def knn_density(x: Tensor, k: int = 10, *, noise=EXACT) -> Truth:
    return {"rho": (1 - knn(x, k, noise=noise)["cosines"]).mean(1)}


def cluster_tailness(x: Tensor, assignments: Tensor, n_clusters: int, *, k: int = 10, noise=EXACT) -> Truth:
    rho, of = knn_density(x, k, noise=noise)["rho"], assignments.cpu().numpy()
    return {"tailness": np.array([rho[of == c].mean() if (of == c).any() else np.nan for c in range(n_clusters)])}


def budgets(tailness: Array, budget: int, temperature: float) -> tuple[Array, Array]:
    """(rows of each cluster, how far the remainders that decide are from a tie)."""
    known = ~np.isnan(tailness)
    t = tailness[known]
    spread = np.sqrt(((t - t.mean()) ** 2).mean())
    score = (t - t.mean()) / spread / wide(temperature) if spread > 0 else np.zeros_like(t)
    e = np.exp(score - score.max())
    share = budget * e / e.sum()
    whole = np.floor(share)
    rest = budget - int(whole.sum())
    order = np.argsort(-(share - whole), kind="stable")
    whole[order[:rest]] += 1
    counts = np.zeros(len(tailness), dtype=int)
    counts[known] = whole.astype(int)
    return counts, share - np.floor(share)


def sample_ood(
    candidates: Tensor, centroids: Tensor, tailness: Tensor, budget: int, *, temperature=1.0, noise=EXACT
) -> Truth:
    t = wide(tailness)
    counts, _ = budgets(t, budget, temperature)
    order = np.argsort(np.where(np.isnan(t), np.inf, -t), kind="stable")
    rows, centers = Rows.of(candidates, True, noise), Rows.of(centroids, True, noise)
    free, indices, clusters = np.ones((len(centroids), len(candidates)), dtype=bool), [], []
    for c in order:
        one = Rows(centers.given[c : c + 1], True, noise)
        taken = best_first(one, rows, free[c : c + 1], counts[c])[0] if counts[c] else []
        free[:, taken] = False
        indices.extend(taken)
        clusters.extend([c] * len(taken))
    return {"indices": np.array(indices, dtype=int), "cluster": np.array(clusters, dtype=int)}

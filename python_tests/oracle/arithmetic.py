"""Numbers of the oracle: 80-bit floats, rows and their unit rows, exact ranking, reductions.

The oracle is written from the formulas alone and imports nothing from ltood_fast. An 80-bit float has 64 bits of
mantissa and exponents up to 10^4932: squares of the largest float64 do not overflow, and nothing has to be scaled.

`Exact` evaluates the formulas; `Rounded` evaluates them with every intermediate result disturbed by a relative eps. The
difference of the two is how far the rounding errors of an honest implementation may carry (see `judge`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

import numpy as np
from torch import Tensor

EPS = np.longdouble("1e-12")  # of the normalisation
Array = np.ndarray

assert np.finfo(np.longdouble).eps < 2e-19, "the oracle needs 80-bit long doubles (x86)"


def wide(x: Tensor | Array | float) -> Array:
    """Exactly the same numbers, in 80 bits."""
    if isinstance(x, Tensor):
        x = x.detach().cpu().double().numpy()
    return np.asarray(x, dtype=np.longdouble)


class Exact:
    """Arithmetic without disturbance."""

    def near(self, x: Array) -> Array:
        return x

    def rows(self, x: Array) -> Array:
        return x

    def shifted(self, x: Array) -> Array:
        return x


class Rounded(Exact):
    """Arithmetic with every result off by up to a relative eps. Equal rows stay equal, so that ties remain ties."""

    def __init__(self, eps: float, seed: int) -> None:
        self.eps, self.random = eps, np.random.default_rng(seed)

    def _noise(self, shape: tuple[int, ...]) -> Array:
        return wide(self.random.uniform(-self.eps, self.eps, shape))

    def near(self, x: Array) -> Array:
        return x * (1 + self._noise(np.shape(x)))

    def rows(self, x: Array) -> Array:
        _, first, inverse = np.unique(x.astype(np.float64), axis=0, return_index=True, return_inverse=True)
        return x * (1 + self._noise((len(first), x.shape[1]))[inverse.reshape(-1)])

    def shifted(self, x: Array) -> Array:
        """A logarithm of a sum that is off by a relative eps."""
        return x + self._noise(np.shape(x))


EXACT = Exact()


@dataclass
class Rows:
    """Rows as given and as the similarities see them, with the way back for gradients."""

    given: Array
    normalize: bool = True
    noise: Exact = field(default_factory=Exact)

    @staticmethod
    def of(x: Tensor, normalize: bool, noise: Exact) -> Rows:
        return Rows(noise.rows(wide(x)), normalize, noise)

    def __post_init__(self) -> None:
        norm = np.sqrt((self.given**2).sum(1, keepdims=True))
        self.norm, self.long = np.fmax(norm, EPS), norm > EPS
        self.unit = self.given / self.norm if self.normalize else self.given

    def back(self, grad_unit: Array) -> Array:
        """The gradient of the rows as given: x / max(|x|, eps) is a projection above eps, a plain factor below."""
        if not self.normalize:
            return grad_unit
        along = self.noise.near((self.unit * grad_unit).sum(1, keepdims=True))
        return (grad_unit - np.where(self.long, self.unit * along, 0)) / self.norm


def products(x: Rows, y: Rows, temperature: Array | float = 1.0) -> Array:
    return x.noise.near(x.unit @ y.unit.T / wide(temperature))


def log_softmax(logits: Array, allowed: Array, noise: Exact) -> tuple[Array, Array]:
    """(log-sum-exp [N], probabilities [N, M]) of the allowed columns; -inf and 0 where a row has none."""
    some = allowed.any(1)
    top = np.where(allowed, logits, -np.inf).max(1, initial=-np.inf)
    top = np.where(some, top, 0)
    e = np.where(allowed, np.exp(np.where(allowed, logits, 0) - top[:, None]), 0)
    total = e.sum(1)
    safe = np.where(some, total, 1)
    lse = np.where(some, noise.shifted(top + np.log(safe)), -np.inf)
    return lse, noise.near(e / safe[:, None])


def row_weights(n: int) -> Array:
    """What a test multiplies the losses of rows with: every row counts, none like another."""
    return wide(np.linspace(0.5, 1.5, n) if n > 1 else [1.0])


def lse_weights(n: int) -> Array:
    return wide(0.3) * row_weights(n)[::-1]


def reduce_rows(losses: Array, counted: Array, reduction: str) -> tuple[Array, Array]:
    """(the reduced loss, weight of each row in the objective of the test). Rows that do not count have loss 0."""
    losses, weight = np.where(counted, losses, 0), counted.astype(np.longdouble)
    if reduction == "mean":
        weight = weight / max(int(counted.sum()), 1)
    if reduction == "none":
        return losses, weight * row_weights(len(losses))
    return np.where(counted, weight * losses, 0).sum(), weight


def same_instance(n: int, instance_ids: Tensor | None) -> Array:
    ids = np.arange(n) % max(n // 2, 1) if instance_ids is None else instance_ids.cpu().numpy()
    return ids[:, None] == ids[None, :]


def best_first(x: Rows, y: Rows, allowed: Array, k: int) -> Array:
    """Indices [N, k] of the most similar allowed rows of y, equal ones in the order of their index, -1 for none.

    Long doubles decide where they can; values that agree to 17 digits are compared as exact fractions."""
    similarity = x.unit @ y.unit.T
    _, kind = np.unique(y.given.astype(np.float64), axis=0, return_inverse=True)
    kind = kind.reshape(-1)
    found = np.full((len(similarity), k), -1)
    size = np.sqrt((x.unit**2).sum(1)) * np.sqrt((y.unit**2).sum(1).max())
    for i, values in enumerate(similarity):
        candidates = np.flatnonzero(allowed[i])
        order = candidates[np.argsort(-values[candidates], kind="stable")]
        if type(x.noise) is Exact:
            order = _ties_exactly(order, values, kind, 1e-17 * size[i], lambda j, i=i: _exact_key(x, y, i, j), k)
        found[i, : min(k, len(order))] = order[:k]
    return found


def _ties_exactly(order: Array, values: Array, kind: Array, margin: float, key, k: int) -> Array:
    runs, start = [], 0
    for p, (a, b) in enumerate(pairwise(order), 1):
        if not values[a] - values[b] <= margin:
            runs.append((start, p))
            start = p
            if p >= k:
                break
    else:
        runs.append((start, len(order)))
    order = order.copy()
    for first, end in runs:
        run = order[first:end]
        if len(set(kind[run])) > 1 and np.isfinite(values[run]).all():
            keys = {kind[j]: key(j) for j in run}
            order[first:end] = sorted(run, key=lambda j: (-keys[kind[j]], j))
    return order


def _exact_key(x: Rows, y: Rows, i: int, j: int) -> Fraction:
    """Increases with the similarity of x_i to the rows of y: the signed square of it, without the length of x_i."""
    a = [Fraction(float(v)) for v in x.given[i]]
    b = [Fraction(float(v)) for v in y.given[j]]
    dot = sum((p * q for p, q in zip(a, b, strict=True)), Fraction(0))
    if not y.normalize:
        return dot
    square = max(sum(q * q for q in b), Fraction(1, 10**24))
    return dot * abs(dot) / square

"""When a result counts as wrong.

A result is right if ``|result - truth| <= tolerance * max(1, kappa) * |truth|`` in the Euclidean norm over an output,
with the tolerances of `python_tests/tolerances.py`. kappa says how much the computation magnifies errors of relative
size eps: ``kappa = max_r |f_r - f| / (eps |f|)``, over three evaluations f_r of the oracle in which inputs,
similarities, sums and probabilities are off by up to a relative eps (that of the input's dtype), each in its own way.
A float32 loss may thus be off by 84 times the effect of one rounding in each of these places, and by 1e-5 in any case.

Gradients of rows that are normalised are compared in units of 1/norm of the row, so that the gradients of long rows
count as much as those of short ones. Numbers within a factor of 1024 of the largest that the result's dtype can hold
are not compared; those that it cannot tell from 0 may be 0. Where the truth is NaN or Inf, a finite result is wrong;
from finite inputs also the reverse, unless the logits of rows as given are larger than their dtype can hold.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from python_tests.tolerances import GRADIENT, LOSS

from .arithmetic import EPS, Array, Rows, wide

HEADROOM = 1024  # a logit may be this much larger than the loss, and must be held too
DISTURBED = 3  # evaluations of the oracle with disturbed arithmetic


def allowed_error(name: str, truth: Array, disturbed: list[Array], dtype: torch.dtype) -> Array:
    tolerance = wide((GRADIENT if name.startswith("grad") else LOSS)[dtype])
    eps = wide(torch.finfo(dtype).eps)
    carried = [_norm(np.where(np.isfinite(t), t - truth, 0)) / eps for t in disturbed]
    return tolerance * max([_norm(truth), *carried])


def _norm(x: Array) -> Array:
    return np.sqrt((np.asarray(x) ** 2).sum())


def compare(name: str, result: Tensor, truths: list[Array], dtype: torch.dtype, *, unit: Array, finite: bool) -> str:
    """ "" or one sentence that says what is wrong. `truths`: the exact one, then the disturbed ones; `unit`: what a
    result counts in; `finite`: no input is NaN or Inf."""
    actual, truth = wide(result), np.asarray(truths[0])
    if actual.shape != truth.shape:
        return f"{name}: shape {actual.shape} instead of {truth.shape}"
    limits = torch.finfo(result.dtype)
    known = np.isfinite(truth)
    if (np.isfinite(actual) & ~known).any():
        where = tuple(int(i) for i in np.argwhere(np.isfinite(actual) & ~known)[0])
        return f"{name}{list(where)}: finite {float(actual[where]):.6g}, truth {float(truth[where])}"
    carrier = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)  # what sums are carried in
    held = known & (abs(truth) <= wide(min(limits.max, carrier.max)) / HEADROOM)
    lost = held & ~np.isfinite(actual)
    if finite and lost.any():
        where = tuple(int(i) for i in np.argwhere(lost)[0])
        return f"{name}{list(where)}: {float(actual[where])}, truth {float(truth[where]):.6g}"
    use = held & np.isfinite(actual)
    unit = np.broadcast_to(unit, truth.shape)
    of_truth, *of_disturbed = (np.where(use & np.isfinite(t), np.where(use, t, 0) * unit, 0) for t in truths)
    error = _norm(np.where(use, np.where(use, actual, 0) * unit - of_truth, 0))
    vanishing = wide(max(limits.smallest_normal, carrier.smallest_normal)) * _norm(np.where(use, unit, 0))
    allowed = allowed_error(name, of_truth, of_disturbed, dtype)
    if error <= allowed + vanishing:
        return ""
    size = _norm(of_truth)
    relative = f"relative error {float(error / size):.2e}" if size else f"error {float(error):.2e} of a truth that is 0"
    return f"{name}: {relative}, allowed {float(allowed / size if size else allowed):.2e}"


def row_unit(rows: Tensor) -> Array:
    """The norms [N, 1] of rows that are normalised."""
    norm = np.sqrt((wide(rows) ** 2).sum(1, keepdims=True))
    return np.where(np.isfinite(norm), np.fmax(norm, EPS), 1)


def without_degenerate_rows(gradient: Array, rows: Tensor, found: Tensor) -> Array:
    """A 16-bit row gets a zero gradient if its dtype cannot hold 1/norm. bfloat16 holds 1/eps: there a row that short
    may also have the gradient that the eps of the normalisation gives it."""
    limit = 1 / wide(torch.finfo(rows.dtype).max)
    zero = np.sqrt((wide(rows) ** 2).sum(1, keepdims=True)) < limit
    zero &= rows.element_size() == 2
    if rows.dtype == torch.bfloat16:
        zero &= (wide(found) == 0).all(1, keepdims=True)
    return np.where(zero, 0, gradient)


def wrong_choice(x: Rows, y: Rows, allowed: Array, found: Tensor, dtype: torch.dtype) -> str:
    """ "" if `found` [N, k] (-1: none) are the most similar allowed rows of y, best first, to rounding; among rows
    of y that are equal in every bit the lower index comes first, without exception."""
    found, similarity = found.cpu().numpy(), x.unit @ y.unit.T
    _, kind = np.unique(y.given.astype(np.float64), axis=0, return_inverse=True)
    kind = kind.reshape(-1)
    size = np.sqrt((x.unit**2).sum(1)) * np.sqrt((y.unit**2).sum(1).max())
    slack = LOSS[dtype] * (1 if dtype.itemsize == 2 else wide("0.1"))
    for i, chosen in enumerate(found):
        free = np.flatnonzero(allowed[i])
        some = chosen[chosen >= 0]
        if len(some) != min(len(chosen), len(free)) or len(set(some)) < len(some) or not set(some) <= set(free):
            return f"indices[{i}]: {chosen.tolist()[:8]} of {len(free)} candidates"
        best = np.sort(similarity[i, free])[::-1][: len(some)]
        if not (abs(similarity[i, some] - best) <= slack * size[i]).all():
            return f"indices[{i}]: {some.tolist()[:8]} are not the most similar rows"
        for of in set(kind[some]):
            equal = some[kind[some] == of]
            if not np.array_equal(equal, free[kind[free] == of][: len(equal)]):
                return f"indices[{i}]: tie between equal rows: {equal.tolist()[:8]} chosen before lower indices"
    return ""

"""Contrastive losses between two sets of embeddings: info_nce."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from ..reference.options import Denominator, Exclude
from ..reference.two_sets import weighted_rows
from . import _check as check
from ._backend import use_kernel
from ._group import GroupContext, reduce_parts
from ._info_nce_group import gathered_directions
from ._info_nce_op import Options, Pairs
from .contrastive import check_common

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from ._typing import InfoNCEOptions

__all__ = ["info_nce"]

GATHER = ("gather",)  # the exchange of the losses between two sets


def _check_keys(op: str, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None) -> None:
    check.same_width(op, "positive_key", positive_key, "query", query)
    if negative_keys is not None:
        check.same_width(op, "negative_keys", negative_keys, "query", query, allow_empty=True)


def _check_pairs(op: str, query: Tensor, keys: tuple[Tensor, Tensor | None], target: Tensor | None, both: bool) -> None:
    """Which row of positive_key belongs to which query."""
    n, m = query.shape[0], keys[0].shape[0]
    if target is not None:
        check.integers(op, "target", target, n, query)
        check.index_range(op, "target", target, 0, m)
    else:
        allowed = "of at least one row for each query (or pass target, the rows of positive_key)"
        check.require(m >= n, op, "positive_key", allowed, lambda: f"{m} rows for {n} queries")
    if both:
        alone = target is None and keys[1] is None
        check.require(alone, op, "symmetric", "False with target or negative_keys, which have one direction", True)
        check.require(m == n, op, "positive_key", "of one row for each query, for symmetric=True", lambda: f"{m} rows")


def _check_exclude(op: str, exclude: Exclude | None, query: Tensor, columns: Tensor) -> None:
    if exclude is None:
        return
    check.require_type(isinstance(exclude, Exclude), op, "exclude", "an Exclude or None", type(exclude).__name__)
    check.integers(op, "exclude.query_ids", exclude.query_ids, query.shape[0], query)
    check.integers(op, "exclude.key_ids", exclude.key_ids, columns.shape[0], query)


def check_options(op: str, label_smoothing: float, denominator: Denominator | None) -> tuple[float, bool]:
    """(label smoothing, decoupled)"""
    label_smoothing = check.number(op, "label_smoothing", label_smoothing)
    check.require(0 <= label_smoothing < 1, op, "label_smoothing", "in [0, 1)", lambda: label_smoothing)
    if denominator is None:
        return label_smoothing, False
    right = isinstance(denominator, Denominator)
    check.require_type(right, op, "denominator", "a Denominator or None", type(denominator).__name__)
    check.flag(op, "denominator.decoupled", denominator.decoupled)
    if denominator.decoupled:
        allowed = "0 with denominator.decoupled, where the positive is no class to smooth"
        check.require(label_smoothing == 0, op, "label_smoothing", allowed, lambda: label_smoothing)
    return label_smoothing, denominator.decoupled


def _check_weight(op: str, weight: Tensor | None, query: Tensor) -> None:
    if weight is not None:
        check.require_type(isinstance(weight, Tensor), op, "weight", "a tensor or None", type(weight).__name__)
        check.row_weights(op, "weight", weight, query.shape[0], query)


@overload
def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[InfoNCEOptions],
) -> Tensor: ...
@overload
def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    return_lse: Literal[True],
    **options: Unpack[InfoNCEOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    return_lse: bool,
    **options: Unpack[InfoNCEOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
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
    group: ProcessGroup | None = None,
    exchange: str = "gather",
    backend: str = "auto",
) -> Any:
    r"""Contrast between two sets of embeddings: row ``i`` of ``query`` belongs to row ``i`` of ``positive_key``.

    ``l_i = log sum_{j in C(i)} exp(s_ij) - s_ip`` with ``s_ij = <u_i, k_j> / temperature``, ``u`` and ``k`` the
    (normalised) queries and keys, ``p`` the row's positive, and ``C(i)`` all rows of ``positive_key``; with
    ``negative_keys`` these and ``p``. InfoNCE [van den Oord et al. 2018, eq. 4]. Replaces, in O((N + M + Q)·D) memory::

        u, k = F.normalize(query, dim=1), F.normalize(positive_key, dim=1)
        loss = F.cross_entropy(u @ k.T / temperature, torch.arange(N))

    or, with a queue ``q`` of normalised negatives::

        logits = torch.cat([(u * k).sum(1, keepdim=True), u @ q.T], dim=1) / temperature
        loss = F.cross_entropy(logits, torch.zeros(N, dtype=torch.int64))

    Args:
        query, positive_key: ``[N, D]`` and ``[M, D]``, ``M >= N``, float64, float32, bfloat16 or float16.
        negative_keys: ``[Q, D]``, a queue or hard negatives for all rows; it may be empty. A side that requires no
            gradient costs no product in the backward.
        temperature: tau > 0, a number or a 0-d tensor; a tensor that requires grad gets its gradient.
        target: ``[N]`` integers: the row of ``positive_key`` that is each query's positive (any M). None: row ``i``.
        symmetric: the mean of the two directions, queries over keys and keys over queries, in one pass (CLIP).
        exclude: who is no negative, see :class:`ltood_fast.Exclude`.
        denominator: what the positive is compared with, see :class:`ltood_fast.Denominator`.
        label_smoothing: in ``[0, 1)``, as in ``F.cross_entropy``, over the row's columns.
        weight: ``[N]`` non-negative weights of the rows' losses, without gradient; ``"mean"`` divides by their sum.
        normalize: L2-normalise all rows first (eps 1e-12); the gradient goes through it. ``False``: rows as given.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` (``[N]``).
        return_lse: also return ``lse [N]``, differentiable; with ``symmetric`` ``[2, N]``, of the queries and the keys.
        group: as :func:`nt_xent`: the keys of all ranks are columns, the positives are on the row's own rank, and
            ``negative_keys`` are the same on all ranks. ``exchange`` must be ``"gather"``.
        backend: ``"auto"``, ``"reference"`` or ``"cpu"``. There is no CUDA kernel yet: tensors on a GPU are served by
            the reference, which builds the N×M matrix.

    Returns:
        The loss, 0-d (or ``[N]``), float32 (float64 if an input is); with ``return_lse``, ``(loss, lse)``.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`nt_xent`.
    """
    op, keys = "info_nce", (positive_key, negative_keys)
    with GroupContext(op, group, reduction, exchange, GATHER) as context:
        temperature = check_common(op, query, temperature, reduction, normalize, "query")
        _check_keys(op, query, *keys)
        check.flag(op, "symmetric", symmetric)
        check.flag(op, "return_lse", return_lse)
        _check_pairs(op, query, keys, target, symmetric)
        _check_exclude(op, exclude, query, positive_key if negative_keys is None else negative_keys)
        options = Options(temperature, *check_options(op, label_smoothing, denominator), normalize)
        _check_weight(op, weight, query)
        kernel = use_kernel(op, backend, query, *keys)
    named = {**options._asdict(), "symmetric": symmetric, "reduction": reduction}
    sides = gathered_directions(context, kernel, query, keys, options, Pairs(target, exclude, symmetric), named)
    (loss,) = reduce_parts([weighted_rows(sides, weight)], reduction, context)
    if not return_lse:
        return loss
    return loss, torch.stack([side.lse for side in sides]) if symmetric else sides[0].lse

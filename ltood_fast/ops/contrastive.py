"""Contrastive losses of one set of embeddings: nt_xent, supcon, psd_loss, domain_loss, stage1_loss.

All five are one computation: the row log-sum-exp over all other rows, minus the (weighted) mean similarity to the
positives of the row. They differ in who the positives are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from .._ext import has_kernel
from ..reference import contrastive as reference
from ..reference.contrastive import Stage1Result
from ..reference.options import Bank
from . import _check as check
from . import _contrastive_group  # noqa: F401  (registers the operator of many ranks)
from ._backend import use_kernel
from ._contrastive_op import ContrastiveRows, contrastive
from ._cross_pairing import check_pairing, instance_rows
from ._group import GroupContext, all_of, reduce_parts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from ._typing import DomainOptions, NTXentOptions, PSDOptions, Stage1Options, SupConOptions

__all__ = ["Stage1Result", "domain_loss", "nt_xent", "psd_loss", "stage1_loss", "supcon"]

DOMAIN_KINDS = ("supcon", "bce")


def check_common(
    op: str, z: Tensor, temperature: float | Tensor, reduction: str, normalize: bool, argument: str = "z"
) -> float | Tensor:
    """Returns the temperature as a float or a 0-d tensor. `argument`: what the function calls z."""
    check.embeddings(op, argument, z)
    temperature = check.temperature(op, temperature)
    if isinstance(temperature, Tensor):
        check.same_device(op, "temperature", temperature, argument, z)
    check.choice(op, "reduction", reduction, check.REDUCTIONS)
    check.flag(op, "normalize", normalize)
    return temperature


def check_views(op: str, z: Tensor, instance_ids: Tensor | None, kernel: bool) -> None:
    """In a graph the kernel refuses odd numbers of rows itself: a guard would exclude a plain Dim in torch.export."""
    n = z.shape[0]
    if instance_ids is not None:
        check.integers(op, "instance_ids", instance_ids, n, z)
    elif not (kernel and torch.compiler.is_compiling()):
        allowed = "given when the number of rows is odd (without it, rows i and i + N/2 are the two views of an image)"
        check.require(n % 2 == 0, op, "instance_ids", allowed, lambda: f"None for {n} rows")


def _check_neighbor_weight(op: str, value: float | Tensor, z: Tensor) -> float | Tensor:
    if not isinstance(value, Tensor):
        return check.nonnegative_number(op, "neighbor_weight", value)
    check.row_weights(op, "neighbor_weight", value, z.shape[0], z, also="a number or ")
    return value


def _check_bank(op: str, z: Tensor, bank: Bank, domain: Tensor | None, instance_ids: Tensor | None) -> None:
    check.same_width(op, "bank", bank.z, "z", z)
    rows = bank.z.shape[0]
    if bank.ids is not None:
        check.integers(op, "bank.ids", bank.ids, rows, z)
        allowed = "given with bank.ids, which are compared with them"
        check.require(instance_ids is not None, op, "instance_ids", allowed, None)
    if bank.domain is not None:
        check.integers(op, "bank.domain", bank.domain, rows, z, mask=True)
        allowed = "None unless neighbours are restricted to the row's domain"
        check.require(domain is not None, op, "bank.domain", allowed, "a tensor")


def _check_neighbors(
    op: str,
    z: Tensor,
    k: int,
    neighbor_weight: float | Tensor,
    domain: Tensor | None,
    bank: Bank | None,
    instance_ids: Tensor | None,
    context: GroupContext,
) -> float | Tensor:
    """Returns the weight as a float or a tensor."""
    if domain is not None:
        check.integers(op, "domain", domain, z.shape[0], z, mask=True)
    if bank is not None:
        _check_bank(op, z, bank, domain, instance_ids)
        check.count(op, "k", k, 1, bank.z.shape[0])
    elif context.many:  # the rows of all ranks are counted when they are known
        check.count(op, "k", k, 1)
    else:
        allowed = "at least 2 rows, to find neighbours in the batch"
        check.require(z.shape[0] > 1, op, "z", allowed, lambda: f"{z.shape[0]} row")
        check.count(op, "k", k, 1, z.shape[0] - 1)
    return _check_neighbor_weight(op, neighbor_weight, z)


def _kernel(op: str, backend: str, context: GroupContext, *inputs: Tensor | None, decoupled: bool = False) -> bool:
    """Whether the kernel runs: over a process group that of rows against other columns."""
    kernel = use_kernel(op, backend, *inputs)
    if decoupled and inputs[0].device.type == "cuda":
        allowed = "False with backend='cuda', whose kernels leave no positives out; use backend='auto' or 'reference'"
        check.require(backend != "cuda", op, "decoupled", allowed, decoupled)
        return False
    return kernel and (not context.many or has_kernel("contrastive_partial", inputs[0].device.type))


def _with_extras(loss: Any, rows: ContrastiveRows, return_lse: bool, return_neighbors: bool = False) -> Any:
    extras = rows.extras(return_lse, return_neighbors)
    return (loss, *extras) if extras else loss


@overload
def nt_xent(
    z: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[NTXentOptions],
) -> Tensor: ...
@overload
def nt_xent(
    z: Tensor, temperature: float | Tensor = 0.5, *, return_lse: Literal[True], **options: Unpack[NTXentOptions]
) -> tuple[Tensor, Tensor]: ...
@overload
def nt_xent(
    z: Tensor, temperature: float | Tensor = 0.5, *, return_lse: bool, **options: Unpack[NTXentOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...
def nt_xent(
    z: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    instance_ids: Tensor | None = None,
    decoupled: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
    return_lse: bool = False,
    group: ProcessGroup | None = None,
    exchange: str = "gather",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Instance discrimination: the other views of a row's image are its positives, all other rows its negatives.

    ``l_i = lse_i - mean_{v in V(i)} s_iv`` with ``s_ij = <u_i, u_j> / temperature``, ``u`` the (normalised) rows of z,
    and ``lse_i = log sum_{j != i} exp(s_ij)``. NT-Xent of SimCLR [Chen et al. 2020, eq. 1], for any number of views.
    Replaces, in O(N·D) memory::

        u = F.normalize(z, dim=1)
        s = (u @ u.T / temperature).fill_diagonal_(-torch.inf)
        loss = F.cross_entropy(s, torch.arange(N).roll(N // 2))

    Args:
        z: ``[N, D]`` float64, float32, bfloat16 or float16: one embedding a row. By default ``N = 2B`` and rows ``i``
            and ``i + B`` are the two views of an image.
        temperature: tau > 0, a number or a 0-d tensor; a tensor that requires grad gets its gradient.
        instance_ids: ``[N]`` integers: rows with one id are views of one image (multi-crop). A row may have no other
            view: it is a negative for the others, its own loss is 0.
        decoupled: leave the positives out of the denominator: ``lse_i`` is over the negatives alone (DCL
            [Yeh et al. 2022], without its weights). The loss may be negative; a row without negatives has loss 0.
        normalize: L2-normalise the rows first (eps 1e-12); the gradient goes through it. ``False``: use them as given.
            A float16 row of norm below 1 / 65504 has no finite gradient: it gets 0. Rows as given are refused on the
            CPU at norm^2 / temperature above 3.4e10, where float64 cannot represent the softmax.
        reduction: ``"mean"`` (over the rows that have a positive), ``"sum"``, or ``"none"`` (``[N]``).
        return_lse: also return ``lse [N]``, differentiable. With ``decoupled``, that of the negatives.
        group: a ``torch.distributed.ProcessGroup`` whose ranks call this together: the batch is the concatenation of
            their rows in the order of the ranks, which may hold different numbers. See docs/many_gpus.md.
        exchange: with a group, ``"gather"`` (all rows at once) or ``"ring"`` (one rank's rows at a time, less memory).
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"cuda"`` (no float64), see ``ltood_fast.build_info()``.

    Returns:
        The loss, 0-d (or ``[N]``), float32 (float64 for float64 input); with ``return_lse``, ``(loss, lse)``.

    Raises:
        ValueError: shapes, ranges or devices that do not fit (an odd N without ``instance_ids``, N = 0, tau <= 0, ...).
        TypeError: a dtype that is not allowed.
        RuntimeError: a second derivative of a kernel, or ``backend`` names a kernel this build lacks.
    """
    op = "nt_xent"
    with GroupContext(op, group, reduction, exchange) as context:
        temperature = check_common(op, z, temperature, reduction, normalize)
        check.flag(op, "decoupled", decoupled)
        check.flag(op, "return_lse", return_lse)
        kernel = _kernel(op, backend, context, z, decoupled=decoupled)
        check_views(op, z, instance_ids, kernel and not context.many)
    options = {"instance_ids": instance_ids, "decoupled": decoupled, "normalize": normalize}
    if kernel or context.many:
        rows = contrastive(z, temperature, context=context, kernel=kernel, **options)
        (loss,) = reduce_parts([rows.instance], reduction, context)
        return _with_extras(loss, rows, return_lse)
    return reference.nt_xent(z, temperature, reduction=reduction, return_lse=return_lse, **options)


@overload
def supcon(
    z: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[SupConOptions],
) -> Tensor: ...
@overload
def supcon(
    z: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    return_lse: Literal[True],
    **options: Unpack[SupConOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def supcon(
    z: Tensor, labels: Tensor, temperature: float | Tensor = 0.5, *, return_lse: bool, **options: Unpack[SupConOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...
def supcon(
    z: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    decoupled: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
    return_lse: bool = False,
    group: ProcessGroup | None = None,
    exchange: str = "gather",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Supervised contrastive loss: all other rows of a row's label are its positives.

    ``l_i = lse_i - mean_{j != i, y_j = y_i} s_ij``, terms as in :func:`nt_xent`: the "out" form of
    [Khosla et al. 2020, eq. 2]. The kernel takes the positives from class sums, linear in N. Replaces::

        u = F.normalize(z, dim=1)
        s = u @ u.T / temperature
        others = ~torch.eye(N, dtype=torch.bool)
        same = (labels[:, None] == labels) & others
        rows = s.masked_fill(~others, -torch.inf).logsumexp(1) - s.where(same, 0).sum(1) / same.sum(1).clamp(min=1)
        loss = rows[same.any(1)].mean()

    Args:
        z: ``[N, D]`` float64, float32, bfloat16 or float16: one embedding a row, any N >= 1.
        labels: ``[N]`` integers of any value. A row that is alone in its class has loss 0.
        temperature: tau > 0, a number or a 0-d tensor, which gets its gradient.
        decoupled: leave the positives out of the denominator, as in :func:`nt_xent`.
        normalize: L2-normalise the rows first (eps 1e-12); the gradient goes through it. ``False``: use them as given.
        reduction: ``"mean"`` (over the rows that have a positive), ``"sum"``, or ``"none"`` (``[N]``).
        return_lse: also return ``lse [N]``, differentiable.
        group, exchange, backend: as :func:`nt_xent`.

    Returns:
        The loss, 0-d (or ``[N]``), float32 (float64 for float64 input); with ``return_lse``, ``(loss, lse)``.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`nt_xent`.
    """
    op = "supcon"
    with GroupContext(op, group, reduction, exchange) as context:
        temperature = check_common(op, z, temperature, reduction, normalize)
        check.integers(op, "labels", labels, z.shape[0], z, mask=True)
        check.flag(op, "decoupled", decoupled)
        check.flag(op, "return_lse", return_lse)
        kernel = _kernel(op, backend, context, z, decoupled=decoupled)
    options = {"decoupled": decoupled, "normalize": normalize}
    if kernel or context.many:
        rows = contrastive(z, temperature, views=False, labels=labels, context=context, kernel=kernel, **options)
        (loss,) = reduce_parts([rows.classes], reduction, context)
        return _with_extras(loss, rows, return_lse)
    return reference.supcon(z, labels, temperature, reduction=reduction, return_lse=return_lse, **options)


@overload
def psd_loss(
    z: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    return_lse: Literal[False] = False,
    return_neighbors: Literal[False] = False,
    **options: Unpack[PSDOptions],
) -> Tensor: ...
@overload
def psd_loss(
    z: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    return_lse: bool = False,
    return_neighbors: bool = False,
    **options: Unpack[PSDOptions],
) -> Tensor | tuple[Tensor, ...]: ...
def psd_loss(
    z: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    k: int = 1,
    neighbor_weight: float | Tensor = 1.0,
    pairing: str = "same",
    bank: Bank | Tensor | None = None,
    domain: Tensor | None = None,
    instance_ids: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_lse: bool = False,
    return_neighbors: bool = False,
    group: ProcessGroup | None = None,
    exchange: str = "gather",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    r"""Pseudo semantic discrimination: a row's nearest neighbours are positives, as are its other views.

    ``l_i = lse_i - (sum_{V(i)} s_iv + lam_i sum_{M_k(i)} s_im) / (|V(i)| + lam_i |M_k(i)|)``, terms as in
    :func:`nt_xent`; ``M_k(i)`` are the k most similar rows outside i's own instance, of the batch or of ``bank``, ties
    to the lower index. Nearest neighbours as positives without labels: **[paper]** [Hoang et al. 2025]; the form of
    the mean and its weights: **[ltood_fast]**. The choice of neighbours carries no gradient, the similarity to them
    does, to z and never to the bank. Replaces, for k = 1 in the batch::

        u = F.normalize(z, dim=1)
        s = (u @ u.T / temperature).fill_diagonal_(-torch.inf)
        rows, view = torch.arange(N), torch.arange(N).roll(N // 2)
        outside = s.detach().clone()
        outside[rows, view] = -torch.inf
        near = outside.argmax(1)
        loss = (s.logsumexp(1) - (s[rows, view] + lam * s[rows, near]) / (1 + lam)).mean()

    Args:
        z: ``[N, D]`` float64, float32, bfloat16 or float16: one embedding a row.
        temperature: tau > 0, a number or a 0-d tensor, which gets its gradient.
        k: neighbours of a row, ``1 <= k < N`` (``<= Q`` with a bank). A row with fewer candidates uses what it has.
        neighbor_weight: lam >= 0, a number or one weight a row ``[N]`` (no gradient).
        pairing: ``"same"``, a row's own neighbours, or ``"cross"`` (NNCLR), those of its other view, detached.
        bank: rows to search for neighbours instead of the batch: a ``[Q, D]`` tensor, or a :class:`ltood_fast.Bank`
            with ids (needs ``instance_ids``) or domains (needs ``domain``). Detached, no negatives, normalised as z is.
        domain: ``[N]`` integers (0 = in-distribution, 1 = OOD): neighbours come from the row's own domain only.
        instance_ids: ``[N]`` integers: rows with one id are views of one image; None: rows i and i + N/2 are.
        normalize: L2-normalise the rows first (eps 1e-12); the gradient goes through it. ``False``: use them as given.
        reduction: ``"mean"`` (over the rows that have a positive), ``"sum"``, or ``"none"`` (``[N]``).
        return_lse: also return ``lse [N]``, differentiable.
        return_neighbors: also return ``cosines [N, k]`` (inner products when ``normalize=False``; no gradient) and
            ``indices [N, k]`` int64, best first; -inf and -1 where a row ran out of candidates.
        group, exchange, backend: as :func:`nt_xent`.

    Returns:
        The loss, 0-d (or ``[N]``), float32 (float64 for float64 input); with extras
        ``(loss[, lse][, cosines, indices])``.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`nt_xent`; also k larger than the candidates, ids or domains of
        a bank without those of the batch, a negative weight.
    """
    op, bank = "psd_loss", Bank.of(bank)
    with GroupContext(op, group, reduction, exchange) as context:
        temperature = check_common(op, z, temperature, reduction, normalize)
        neighbor_weight = _check_neighbors(op, z, k, neighbor_weight, domain, bank, instance_ids, context)
        check_pairing(op, pairing, context)
        check.flag(op, "return_lse", return_lse)
        check.flag(op, "return_neighbors", return_neighbors)
        kernel = _kernel(op, backend, context, z, bank and bank.z)
        check_views(op, z, instance_ids, kernel and not context.many)
    options = {
        "k": k,
        "neighbor_weight": neighbor_weight,
        "bank": bank,
        "domain": domain,
        "instance_ids": instance_ids,
        "normalize": normalize,
    }
    if kernel or context.many:
        rows, instance = instance_rows(z, temperature, pairing, context, kernel, **options)
        (loss,) = reduce_parts([instance], reduction, context)
        return _with_extras(loss, rows, return_lse, return_neighbors)
    options |= {"reduction": reduction, "return_lse": return_lse, "return_neighbors": return_neighbors}
    return reference.psd_loss(z, temperature, pairing=pairing, **options)


@overload
def domain_loss(
    z: Tensor,
    domain: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[DomainOptions],
) -> Tensor: ...
@overload
def domain_loss(
    z: Tensor,
    domain: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    return_lse: Literal[True],
    **options: Unpack[DomainOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def domain_loss(
    z: Tensor, domain: Tensor, temperature: float | Tensor = 0.2, *, return_lse: bool, **options: Unpack[DomainOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...
def domain_loss(
    z: Tensor,
    domain: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    kind: str = "supcon",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_lse: bool = False,
    group: ProcessGroup | None = None,
    exchange: str = "gather",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Domain discrimination: tells in-distribution from OOD embeddings.

    ``kind="supcon"``: :func:`supcon` with the domains as labels **[ltood_fast; COLT does the same]**. ``kind="bce"``: a
    linear head and binary cross-entropy, the alternative, the same plain PyTorch on every device::

        loss = F.binary_cross_entropy_with_logits(F.normalize(z, dim=1) @ weight + bias, domain.float())

    Args:
        z: ``[N, D]`` float64, float32, bfloat16 or float16: one embedding a row.
        domain: ``[N]`` integers, 0 = in-distribution, 1 = OOD (any values for "supcon").
        temperature: tau > 0, a number or a 0-d tensor that may require grad. "bce" has no temperature and ignores it.
        kind: ``"supcon"`` or ``"bce"``.
        weight: ``[D]`` float, the head of "bce".
        bias: 0-d float, the head of "bce".
        normalize: L2-normalise the rows first (eps 1e-12); the gradient goes through it. ``False``: use them as given.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        return_lse: ("supcon" only) also return ``lse [N]``, differentiable.
        group, exchange, backend: as :func:`nt_xent`; "bce" has no kernel of its own.

    Returns:
        The loss, 0-d (or ``[N]``), float32 (float64 for float64 input); with ``return_lse``, ``(loss, lse)``.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`nt_xent`; also a head that is missing, misshapen or unused.
    """
    op = "domain_loss"
    with GroupContext(op, group, reduction, exchange) as context:
        temperature = check_common(op, z, 1.0 if kind == "bce" else temperature, reduction, normalize)
        check.integers(op, "domain", domain, z.shape[0], z, mask=True)
        check.choice(op, "kind", kind, DOMAIN_KINDS)
        check.flag(op, "return_lse", return_lse)
        if kind == "bce":
            _check_head(z, domain, weight, bias, return_lse, backend)
        for name, value in (("weight", weight), ("bias", bias)):
            check.require(kind == "bce" or value is None, op, name, "None for kind='supcon'", "a tensor")
        kernel = kind == "supcon" and _kernel(op, backend, context, z)
    if kernel or (context.many and kind == "supcon"):
        rows = contrastive(
            z, temperature, normalize=normalize, views=False, labels=domain, context=context, kernel=kernel
        )
        (loss,) = reduce_parts([rows.classes], reduction, context)
        return _with_extras(loss, rows, return_lse)
    if context.many:
        losses = reference.domain_loss(
            z, domain, kind=kind, weight=weight, bias=bias, normalize=normalize, reduction="none"
        )
        return reduce_parts([all_of(losses)], reduction, context, f"bce, {reduction}")[0]
    return reference.domain_loss(
        z,
        domain,
        temperature,
        kind=kind,
        weight=weight,
        bias=bias,
        normalize=normalize,
        reduction=reduction,
        return_lse=return_lse,
    )


def _check_head(
    z: Tensor, domain: Tensor, weight: Tensor | None, bias: Tensor | None, return_lse: bool, backend: str
) -> None:
    op = "domain_loss"
    for name, value, shape in (("weight", weight, (z.shape[1],)), ("bias", bias, ())):

        def allowed(shape: tuple[int, ...] = shape) -> str:
            return f"a float tensor of shape {list(shape)} for kind='bce'"

        check.require_type(isinstance(value, Tensor), op, name, allowed, type(value).__name__)
        check.require_type(value.dtype in check.FLOAT_DTYPES, op, name, allowed, value.dtype)
        check.require(value.shape == shape, op, name, allowed, lambda value=value: check.shape_of(value))
        check.same_device(op, name, value, "z", z)
    check.index_range(op, "domain", domain, 0, 2)
    check.require(not return_lse, op, "return_lse", "False for kind='bce', which has no log-sum-exp", return_lse)
    check.choice(op, "backend", backend, ("auto", "reference"))


@overload
def stage1_loss(
    z: Tensor,
    domain: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    return_lse: Literal[False] = False,
    return_neighbors: Literal[False] = False,
    **options: Unpack[Stage1Options],
) -> Stage1Result: ...
@overload
def stage1_loss(
    z: Tensor,
    domain: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    return_lse: bool = False,
    return_neighbors: bool = False,
    **options: Unpack[Stage1Options],
) -> Stage1Result | tuple[Any, ...]: ...
def stage1_loss(
    z: Tensor,
    domain: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    alpha: float = 0.3,
    k: int = 1,
    neighbor_weight: float | Tensor = 1.0,
    pairing: str = "same",
    same_domain: bool = True,
    bank: Bank | Tensor | None = None,
    instance_ids: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_lse: bool = False,
    return_neighbors: bool = False,
    group: ProcessGroup | None = None,
    exchange: str = "gather",
    backend: str = "auto",
) -> Stage1Result | tuple[Any, ...]:
    r"""The loss of stage 1, ``psd_loss + alpha * domain_loss``, in one pass forward and one backward.

    Both parts have the same similarities, log-sum-exp and temperature: see :func:`psd_loss` and :func:`supcon` for
    the formulas. Sum and alpha = 0.3: **[paper]** [Hoang et al. 2025]. Replaces::

        psd = ltood_fast.psd_loss(z, temperature, k=k, neighbor_weight=neighbor_weight, domain=domain)
        separation = ltood_fast.domain_loss(z, domain, temperature)
        total = psd + alpha * separation

    Args:
        z: ``[N, D]`` float64, float32, bfloat16 or float16: one embedding a row.
        domain: ``[N]`` integers, 0 = in-distribution, 1 = OOD.
        temperature: tau > 0, a number or a 0-d tensor, which gets its gradient.
        alpha: weight >= 0 of the domain loss.
        k: neighbours of a row, ``1 <= k < N`` (``<= Q`` with a bank). A row with fewer candidates uses what it has.
        neighbor_weight: lam >= 0, a number or one weight a row ``[N]`` (no gradient).
        pairing: ``"same"`` or ``"cross"``, as :func:`psd_loss`.
        same_domain: neighbours come from the row's own domain only (of a bank's rows: only where it has domains).
        bank: rows to search for neighbours instead of the batch, as :func:`psd_loss`; domains need ``same_domain``.
        instance_ids: ``[N]`` integers: rows with one id are views of one image; None: rows i and i + N/2 are.
        normalize: L2-normalise the rows first (eps 1e-12); the gradient goes through it. ``False``: use them as given.
        reduction: ``"mean"`` (each part over its own rows that have a positive), ``"sum"``, or ``"none"`` (``[N]``).
        return_lse: also return ``lse [N]``, differentiable.
        return_neighbors: also return ``cosines [N, k]`` (no gradient) and ``indices [N, k]``, as :func:`psd_loss`.
        group, exchange, backend: as :func:`nt_xent`.

    Returns:
        ``Stage1Result(total, psd, domain)``, each 0-d (or ``[N]``), float32 (float64 for float64 input); with extras
        ``(result[, lse][, cosines, indices])``.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`psd_loss`.
    """
    op, bank = "stage1_loss", Bank.of(bank)
    own_domain = domain if same_domain else None
    with GroupContext(op, group, reduction, exchange) as context:
        temperature = check_common(op, z, temperature, reduction, normalize)
        check.integers(op, "domain", domain, z.shape[0], z, mask=True)
        check.flag(op, "same_domain", same_domain)
        alpha = check.nonnegative_number(op, "alpha", alpha)
        neighbor_weight = _check_neighbors(op, z, k, neighbor_weight, own_domain, bank, instance_ids, context)
        check_pairing(op, pairing, context)
        check.flag(op, "return_lse", return_lse)
        check.flag(op, "return_neighbors", return_neighbors)
        kernel = _kernel(op, backend, context, z, bank and bank.z)
        check_views(op, z, instance_ids, kernel and not context.many)
    options = {
        "k": k,
        "neighbor_weight": neighbor_weight,
        "bank": bank,
        "instance_ids": instance_ids,
        "normalize": normalize,
    }
    if kernel or context.many:
        options |= {"labels": domain, "domain": own_domain}
        rows, instance = instance_rows(z, temperature, pairing, context, kernel, **options)
        psd, separation = reduce_parts([instance, rows.classes], reduction, context)
        result = Stage1Result(psd + alpha * separation, psd, separation)
        return _with_extras(result, rows, return_lse, return_neighbors)
    options |= {"reduction": reduction, "return_lse": return_lse, "return_neighbors": return_neighbors}
    options |= {"pairing": pairing, "same_domain": same_domain}
    return reference.stage1_loss(z, domain, temperature, alpha=alpha, **options)

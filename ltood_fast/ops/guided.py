"""Stage 2: a frozen guide chooses positives, negatives and forces, and its geometry is distilled into the student.

Legend: N rows, D and Dg features, K clusters. z student [N, D], e guide [N, Dg], s_ij = <z_i, z_j> / temperature.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from ..reference import guided as reference
from ..reference.guided import Stage2Result
from ..reference.options import Distill
from . import _check as check
from . import _guided_group  # noqa: F401  (defines the operator)
from ._backend import use_kernel
from ._group import GroupContext, all_of, reduce_parts
from ._guided_batch import Batch, batch_of
from ._guided_op import guided
from .contrastive import check_common, check_views

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from ._typing import GuidedOptions, RelationalOptions, Stage2Options

DISTILLATIONS = ("relational", "feature")


@overload
def guided_contrastive(
    z: Tensor,
    guide: Tensor,
    clusters: Tensor,
    far: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[GuidedOptions],
) -> Tensor: ...
@overload
def guided_contrastive(
    z: Tensor,
    guide: Tensor,
    clusters: Tensor,
    far: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    return_lse: Literal[True],
    **options: Unpack[GuidedOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def guided_contrastive(
    z: Tensor,
    guide: Tensor,
    clusters: Tensor,
    far: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    return_lse: bool,
    **options: Unpack[GuidedOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
def guided_contrastive(
    z: Tensor,
    guide: Tensor,
    clusters: Tensor,
    far: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    k: int = 5,
    pos_idx: Tensor | None = None,
    weighted: bool = True,
    gamma: float = 1.0,
    instance_ids: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_lse: bool = False,
    group: ProcessGroup | None = None,
    exchange: str = "gather",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Contrastive loss whose positives, negatives and forces come from a frozen guide.

    **[paper: arXiv 2506.12698, stage 2: the guide's nearest rows attract, its farthest cluster repels, its
    similarities set the forces]**. With ``P(i)`` the other views of row i and its ``k`` nearest rows by guide cosine,
    and ``N(i)`` the rows of the cluster farthest from its own, except ``P(i)`` and i (special cases: docs/numerics.md):

        l_i = lse_i - sum_{p in P(i)} w+_ip s_ip / sum_{p in P(i)} w+_ip
        lse_i = log( sum_{q in P(i)} exp(s_iq) + sum_{n in N(i)} w-_in exp(s_in) )

    It replaces, without ever holding an N×N matrix::

        e = F.normalize(guide)
        s = F.normalize(z) @ F.normalize(z).T / temperature
        nearest = rank_of((e @ e.T).masked_fill(views | eye, -inf)) < k
        P = (views | nearest) & ~eye                                   # [N, N] bool
        negative = (clusters[None, :] == far[clusters][:, None]) & ~P & ~eye
        w_pos, w_neg = ((1 + e @ e.T) / 2) ** gamma, ((1 - e @ e.T) / 2) ** gamma
        lse = torch.where(P, s, s + w_neg.log()).masked_fill(~(P | negative), -inf).logsumexp(1)
        loss = (lse - (w_pos * P * s).sum(1) / (w_pos * P).sum(1)).mean()

    Args:
        z: float ``[N, D]``, the student's embeddings, un-normalised.
        guide: float ``[N, Dg]``, the frozen guide's embeddings of the same rows, always L2-normalised; no gradient.
        clusters: int ``[N]``, the guide's cluster of each row, in [0, K).
        far: int ``[K]``, the farthest cluster of each cluster (:func:`farthest_cluster`); a cluster may be its own.
        temperature: tau > 0, a float or a 0-d tensor, which gets its gradient.
        k: how many guide neighbours outside the row's own instance are positives, 1 <= k < N; unused with ``pos_idx``.
        pos_idx: int ``[N, k]``, the neighbours instead, e.g. of a search over the data set; -1 means none.
        weighted: False sets all forces w+ and w- to 1 (the paper's ablation).
        gamma: exponent g >= 0 of the forces ``w± = ((1 ± cos) / 2) ** g``.
        instance_ids: int ``[N]``, rows with one id are views of one image; None: rows i and i + N/2 are.
        normalize: L2-normalise the rows of ``z`` (eps 1e-12); the gradient goes through it.
        reduction: ``"mean"`` over the rows with positives, ``"sum"``, or ``"none"`` (``[N]``, row order).
        return_lse: also return ``lse`` ``[N]`` (-inf for a row with neither positives nor negatives).
        group, exchange, backend: as :func:`ltood_fast.nt_xent`. All ranks number clusters and the batch's rows alike.

    Returns:
        The loss, 0-d or ``[N]``, float32 (float64 for float64 ``z``); with ``return_lse`` the tuple ``(loss, lse)``.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`ltood_fast.nt_xent`.
    """
    op = "guided_contrastive"
    with GroupContext(op, group, reduction, exchange) as context:
        temperature = _check_pair(op, z, guide, temperature, reduction, normalize)
        gamma = _check_selection(op, Batch(z, guide, clusters, instance_ids, pos_idx), far, k, gamma, context)
        check.flag(op, "weighted", weighted)
        check.flag(op, "return_lse", return_lse)
        kernel = use_kernel(op, backend, z, guide)
        check_views(op, z, instance_ids, kernel and not context.many)
    options = {"k": k if pos_idx is None else 0, "weighted": weighted, "gamma": gamma, "normalize": normalize}
    batch = Batch(z, guide, clusters, instance_ids, pos_idx)
    batch = batch_of(batch, far, context, kernel, {"temperature": temperature, **options})
    options |= {"pos_idx": batch.pos_idx, "instance_ids": batch.instance_ids}
    if kernel:
        rows = guided(batch.z, batch.guide, temperature, **options, **batch.clusters_and(far), **batch.ranks)
        (loss,) = reduce_parts([rows.contrast], reduction, batch.context)
        lse = rows.lse.to(rows.loss.dtype)
    else:
        options |= {"reduction": reduction, "return_lse": True}
        loss, lse = reference.guided_contrastive(batch.z, batch.guide, batch.clusters, far, temperature, **options)
    return (batch.local(loss), batch.local(lse)) if return_lse else batch.local(loss)


@overload
def relational_distill(
    z: Tensor,
    guide: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[RelationalOptions],
) -> Tensor: ...
@overload
def relational_distill(
    z: Tensor,
    guide: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    return_lse: Literal[True],
    **options: Unpack[RelationalOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def relational_distill(
    z: Tensor,
    guide: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    return_lse: bool,
    **options: Unpack[RelationalOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
def relational_distill(
    z: Tensor,
    guide: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    teacher_temperature: float | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_lse: bool = False,
    group: ProcessGroup | None = None,
    exchange: str = "gather",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Distillation of the guide's geometry: each row's softmax over all other rows, student against guide.

    **[paper: arXiv 2506.12698, keeps the geometry of the guide; the form: ltood_fast]**

        l_i = KL( softmax_{j != i}(<e_i, e_j> / teacher_temperature) || softmax_{j != i}(<z_i, z_j> / temperature) )

    It replaces, without ever holding an N×N matrix::

        off_diagonal = ~torch.eye(N, dtype=torch.bool)
        s = (F.normalize(z) @ F.normalize(z).T / temperature)[off_diagonal].view(N, N - 1)
        t = (F.normalize(guide) @ F.normalize(guide).T / teacher_temperature)[off_diagonal].view(N, N - 1)
        loss = F.kl_div(s.log_softmax(1), t.log_softmax(1), log_target=True, reduction="batchmean")

    The gradient goes to ``z`` and ``temperature`` only; the guide's side is a constant **[ltood_fast]**, also where it
    shares a temperature that is a tensor. N = 1 has loss 0.

    Args:
        z: float ``[N, D]``, the student's embeddings, un-normalised.
        guide: float ``[N, Dg]``, the frozen guide's embeddings of the same rows, always L2-normalised **[ltood_fast]**.
        temperature: tau_s > 0 of the student, a float or a 0-d tensor, which gets its gradient.
        teacher_temperature: tau_t > 0 of the guide; None: the same value as ``temperature``.
        normalize: L2-normalise the rows of ``z`` (eps 1e-12); the gradient goes through it.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` (``[N]``, row order).
        return_lse: also return the student's ``log sum_{j != i} exp(s_ij)``, ``[N]`` (-inf for N = 1).
        group, exchange, backend: as :func:`ltood_fast.nt_xent`.

    Returns:
        The loss in nats, 0-d or ``[N]``, float32 (float64 for float64 ``z``); with ``return_lse`` ``(loss, lse)``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range, named in the message.
        RuntimeError: ``backend`` names a kernel that this build lacks; double backward.
    """
    op = "relational_distill"
    with GroupContext(op, group, reduction, exchange) as context:
        temperature = _check_pair(op, z, guide, temperature, reduction, normalize)
        teacher_temperature = check_teacher(op, teacher_temperature)
        check.flag(op, "return_lse", return_lse)
        kernel = use_kernel(op, backend, z, guide)
    options = {"normalize": normalize, "teacher_temperature": teacher_temperature}
    batch = batch_of(Batch(z, guide), None, context, kernel, {"temperature": temperature, **options})
    if kernel:
        rows = guided(batch.z, batch.guide, temperature, distill=True, **options, **batch.ranks)
        (loss,) = reduce_parts([rows.divergence], reduction, batch.context)
        lse = rows.student_lse.to(rows.kl.dtype)
    else:
        options |= {"reduction": reduction, "return_lse": True}
        loss, lse = reference.relational_distill(batch.z, batch.guide, temperature, **options)
    return (batch.local(loss), batch.local(lse)) if return_lse else batch.local(loss)


def feature_distill(
    z: Tensor,
    guide: Tensor,
    *,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Distillation row by row: ``(1 - F.cosine_similarity(z, guide)).mean()``, the alternative to
    :func:`relational_distill` **[ltood_fast]**. It reads 2·N·D numbers once; there is nothing to fuse.

    Args:
        z: float ``[N, D]``, the student's embeddings, un-normalised.
        guide: float ``[N, D]``, the frozen guide's embeddings of the same rows. No gradient.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` (``[N]``, row order).
        group: the process group over whose ranks' rows the mean or sum is taken.
        backend: ``"auto"`` or ``"reference"``; no build has a kernel of its own for it.

    Returns:
        The loss in [0, 2], 0-d or ``[N]``, float32 (float64 for float64 ``z``).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range, named in the message.
        RuntimeError: ``backend`` asks for a kernel.
    """
    op = "feature_distill"
    with GroupContext(op, group, reduction) as context:
        _check_pair(op, z, guide, 1.0, reduction, True)
        check.same_width(op, "guide", guide, "z", z)
        use_kernel(op, backend, z, guide)
    rows = reference.feature_distill(z, guide, reduction="none")
    return reduce_parts([all_of(rows)], reduction, context, reduction)[0]


@overload
def stage2_loss(
    z: Tensor,
    guide: Tensor,
    clusters: Tensor,
    far: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[Stage2Options],
) -> Stage2Result: ...
@overload
def stage2_loss(
    z: Tensor,
    guide: Tensor,
    clusters: Tensor,
    far: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    return_lse: Literal[True],
    **options: Unpack[Stage2Options],
) -> tuple[Stage2Result, Tensor]: ...
@overload
def stage2_loss(
    z: Tensor,
    guide: Tensor,
    clusters: Tensor,
    far: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    return_lse: bool,
    **options: Unpack[Stage2Options],
) -> Stage2Result | tuple[Stage2Result, Tensor]: ...
def stage2_loss(
    z: Tensor,
    guide: Tensor,
    clusters: Tensor,
    far: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    beta: float = 0.4,
    distill: Distill | str = "relational",
    k: int = 5,
    pos_idx: Tensor | None = None,
    weighted: bool = True,
    gamma: float = 1.0,
    instance_ids: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_lse: bool = False,
    group: ProcessGroup | None = None,
    exchange: str = "gather",
    backend: str = "auto",
) -> Stage2Result | tuple[Stage2Result, Tensor]:
    """The loss of stage 2: ``guided_contrastive + beta * distillation``, beta = 0.4 **[paper: arXiv 2506.12698]**.

    It replaces::

        guided = guided_contrastive(z, guide, clusters, far, temperature, ...)
        distill = relational_distill(z, guide, temperature)
        total = guided + beta * distill

    Args:
        z, guide, clusters, far, temperature, k, pos_idx, weighted, gamma, instance_ids, normalize: as in
            :func:`guided_contrastive`.
        beta: weight >= 0 of the distillation.
        distill: ``"relational"`` (:func:`relational_distill`) or ``"feature"`` (:func:`feature_distill`, for which the
            guide must be as wide as ``z``), or :class:`ltood_fast.Distill` with a temperature of the teacher's own.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` (``[N]`` each), applied to each part.
        return_lse: also return the guided loss's ``lse`` ``[N]``.
        group, exchange, backend: as :func:`ltood_fast.nt_xent`.

    Returns:
        ``Stage2Result(total, guided, distill)``, float32 (float64 for float64 ``z``); with ``return_lse`` the tuple
        ``(losses, lse)``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range, named in the message.
        RuntimeError: ``backend`` names a kernel that this build lacks; double backward.
    """
    op, distill = "stage2_loss", Distill.of(distill)
    with GroupContext(op, group, reduction, exchange) as context:
        temperature = _check_pair(op, z, guide, temperature, reduction, normalize)
        gamma = _check_selection(op, Batch(z, guide, clusters, instance_ids, pos_idx), far, k, gamma, context)
        check.flag(op, "weighted", weighted)
        check.flag(op, "return_lse", return_lse)
        distill = replace(
            distill, teacher_temperature=check_teacher(op, distill.teacher_temperature, "distill.teacher_temperature")
        )
        beta = check.nonnegative_number(op, "beta", beta)
        check.choice(op, "distill", distill.kind, DISTILLATIONS)
        if distill.kind == "feature":
            check.same_width(op, "guide", guide, "z", z)
        kernel = use_kernel(op, backend, z, guide)
        check_views(op, z, instance_ids, kernel and not context.many)
    relational = distill.kind == "relational"
    options = {"k": k if pos_idx is None else 0, "weighted": weighted, "gamma": gamma, "normalize": normalize}
    same = {"temperature": temperature, "beta": beta, **vars(distill), **options}
    batch = batch_of(Batch(z, guide, clusters, instance_ids, pos_idx), far, context, kernel, same)
    options |= {"pos_idx": batch.pos_idx, "instance_ids": batch.instance_ids}
    if kernel:
        options |= {"distill": relational, "teacher_temperature": distill.teacher_temperature}
        rows = guided(batch.z, batch.guide, temperature, **options, **batch.clusters_and(far), **batch.ranks)
        features = None if relational else reference.feature_distill(batch.z, batch.guide, reduction="none")
        second = rows.divergence if relational else all_of(features)
        contrast, distilled = reduce_parts([rows.contrast, second], reduction, batch.context)
        losses = Stage2Result(contrast + beta * distilled, contrast, distilled)
        lse = rows.lse.to(rows.loss.dtype)
    else:
        options |= {"beta": beta, "distill": distill, "reduction": reduction, "return_lse": True}
        losses, lse = reference.stage2_loss(batch.z, batch.guide, batch.clusters, far, temperature, **options)
    losses = Stage2Result(*(batch.local(loss) for loss in losses))
    return (losses, batch.local(lse)) if return_lse else losses


def farthest_cluster(centroids: Tensor) -> Tensor:
    """The farthest other cluster of each cluster, by centroid cosine **[ltood_fast]**; ties go to the lower index.

    It replaces::

        c = F.normalize(centroids)
        far = (c @ c.T).fill_diagonal_(inf).argmin(1)

    Args:
        centroids: float ``[K, D]``, un-normalised, finite.

    Returns:
        int64 ``[K]``. No cluster is its own farthest one, but for K = 1, where ``far = [0]``: all rows are then each
        other's negatives in :func:`guided_contrastive`.

    Raises:
        TypeError, ValueError: ``centroids`` is no float matrix, is empty, or holds NaN or Inf.
    """
    check.embeddings("farthest_cluster", "centroids", centroids)
    if check.concrete(centroids):
        finite = bool(centroids.isfinite().all())
        check.require(finite, "farthest_cluster", "centroids", "finite", "NaN or Inf (an empty cluster?)")
    return reference.farthest_cluster(centroids)


def _check_pair(
    op: str, z: Tensor, guide: Tensor, temperature: float | Tensor, reduction: str, normalize: bool
) -> float | Tensor:
    """Returns the temperature as `check_common` does."""
    temperature = check_common(op, z, temperature, reduction, normalize)
    check.embeddings(op, "guide", guide)
    n = z.shape[0]
    check.require(guide.shape[0] == n, op, "guide", lambda: f"of {n} rows as z is", lambda: check.shape_of(guide))
    check.same_device(op, "guide", guide, "z", z)
    return temperature


def check_teacher(op: str, value: float | None, argument: str = "teacher_temperature") -> float | None:
    return None if value is None else check.positive_number(op, argument, value)


def _check_selection(op: str, batch: Batch, far: Tensor, k: int, gamma: float, context: GroupContext) -> float:
    """Positives, negatives and forces; returns gamma as a float."""
    z, pos_idx, n = batch.z, batch.pos_idx, batch.z.shape[0]
    check.integer_tensor(op, "far", far, z)
    vector = far.dim() == 1 and far.shape[0] > 0
    check.require(vector, op, "far", "of shape [K], K > 0", lambda: check.shape_of(far))
    check.index_range(op, "far", far, 0, far.shape[0])
    check.integers(op, "clusters", batch.clusters, n, z)
    check.index_range(op, "clusters", batch.clusters, 0, far.shape[0], classes=True)
    gamma = check.nonnegative_number(op, "gamma", gamma)
    if pos_idx is None:  # over a process group, k and pos_idx are compared with the rows of all ranks later
        check.count(op, "k", k, 1, None if context.many else n - 1)
    else:
        check.integer_tensor(op, "pos_idx", pos_idx, z)
        matrix = pos_idx.dim() == 2 and pos_idx.shape[0] == n
        check.require(matrix, op, "pos_idx", lambda: f"of shape [{n}, k]", lambda: check.shape_of(pos_idx))
        if not context.many:
            check.index_range(op, "pos_idx", pos_idx, -1, n)
    return gamma

"""Stage 2: a frozen guide chooses positives, negatives and forces, and its geometry is distilled into the student.

Legend: N rows, D and Dg features, K clusters. z student [N, D], e guide [N, Dg], s_ij = <z_i, z_j> / temperature.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..reference import guided as reference
from ..reference.guided import Stage2Result
from . import _check as check
from . import _guided_group  # noqa: F401  (defines the operator)
from ._backend import use_kernel
from ._group import GroupContext, reduce_parts
from ._guided_batch import batch_of
from ._guided_op import all_of, guided
from .contrastive import _check_common, _check_views

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DISTILLATIONS = ("relational", "feature")


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
    and ``N(i)`` the rows of the cluster farthest from its own, less ``P(i)`` and i:

        l_i = lse_i - sum_{p in P(i)} w+_ip s_ip / sum_{p in P(i)} w+_ip
        lse_i = log( sum_{q in P(i)} exp(s_iq) + sum_{n in N(i)} w-_in exp(s_in) )

    It replaces, without ever holding an N×N matrix::

        e = F.normalize(guide)
        s = F.normalize(z) @ F.normalize(z).T / temperature
        P = (views | (rank_of(e @ e.T) < k)) & ~eye                    # [N, N] bool
        negative = (clusters[None, :] == far[clusters][:, None]) & ~P & ~eye
        w_pos, w_neg = ((1 + e @ e.T) / 2) ** gamma, ((1 - e @ e.T) / 2) ** gamma
        lse = torch.where(P, s, s + w_neg.log()).masked_fill(~(P | negative), -inf).logsumexp(1)
        loss = (lse - (w_pos * P * s).sum(1) / (w_pos * P).sum(1)).mean()

    Where the paper is silent **[ltood_fast]**: where ``N(i)`` is empty, all rows but ``P(i)`` and i take its
    place; ``P(i)`` is a set, so a neighbour that is also a view, or is listed twice, counts once; the guide is always
    L2-normalised, its products are cosines, whatever ``normalize`` says; a row without positives (or whose positives
    have weights that sum to 0) has loss 0 and is left out of the mean's count.

    Args:
        z: float ``[N, D]``, the student's embeddings, un-normalised.
        guide: float ``[N, Dg]``, the frozen guide's embeddings of the same rows; taken to the dtype the sums are
            carried in (float64 for float64 ``z``, else float32). No gradient.
        clusters: int ``[N]``, the guide's cluster of each row, in [0, K).
        far: int ``[K]``, the farthest cluster of each cluster (:func:`farthest_cluster`); a cluster may be its own.
        temperature: tau > 0, a float or a 0-d tensor, which gets its gradient.
        k: how many guide neighbours are positives, 1 <= k < N, outside the row's own instance; ties go to the lower
            index. A row with fewer candidates takes what there is. Not read when ``pos_idx`` is given.
        pos_idx: int ``[N, k]``, the neighbours instead, e.g. of a search over the data set; -1 means none, and a
            row's own index is ignored.
        weighted: False sets all forces w+ and w- to 1 (the source's ablation).
        gamma: exponent g >= 0 of the forces ``w± = ((1 ± cos) / 2) ** g``.
        instance_ids: int ``[N]``, rows with one id are views of one image; None: rows i and i + N/2 are.
        normalize: L2-normalise the rows of ``z`` (eps 1e-12); the gradient goes through it.
        reduction: ``"mean"`` over the rows with positives, ``"sum"``, or ``"none"`` (``[N]``, row order).
        return_lse: also return ``lse`` ``[N]`` (-inf for a row with neither positives nor negatives).
        group: a ``torch.distributed.ProcessGroup`` whose ranks call this together: the batch is the concatenation of
            their rows in the order of the ranks, whose numbers may differ; see below.
        exchange: with a group, ``"gather"`` (all rows at once, kept for the backward) or ``"ring"`` (one rank's rows at
            a time, the next on their way meanwhile; sent again by the backward).
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"cuda"`` (not yet verified on hardware; no float64).

    Returns:
        The loss, 0-d or ``[N]``, float32 (float64 for float64 ``z``); with ``return_lse`` the tuple ``(loss, lse)``.

    **Many ranks.** Values, rows and gradients are as :func:`ltood_fast.nt_xent` says; ``clusters`` and ``far`` number
    the same clusters on all ranks, ``pos_idx`` the rows of the whole batch. A rank computes its own rows against all
    ranks' columns. For W ranks of N rows (M in all) with b and bg bytes an element of z and of the guide, w = 4 (8 for
    float64), k neighbours, p losses with a mean or sum, c and r = 1 for the contrastive part and for relational
    distillation, else 0, in bytes a rank and step (the peaks are the CPU's; CUDA's are not yet measured)::

        received, gather:  (W - 1) (N (D b + Dg bg + 8 (8 c + 4 r + 2 k)) + 16 + 32 p)
        received, ring:    (W - 1) N (D b + Dg bg) more
        peak, gather:      M (D b + Dg bg) + (M + N) (D + Dg) w + N D (2 w + 8) + 8 M (12 c + 8 r + 4 k)
        peak, ring:        2 N (D b + Dg bg) + 2 N (D + Dg) w + N D (3 w + 8) + 8 M (12 c + 8 r + 4 k)
        work:              2 N M (3 D + 2 Dg) FLOP with relational distillation, else 2 N M (Dg + (5 D + 3 Dg) / K)

    Where there is no kernel for it (float64 on CUDA, the reference), every rank gathers all rows, whatever ``exchange``
    says, and computes the whole loss: the work is that of one process, the memory O(M·(D + Dg)), and a rank receives
    ``(W - 1) (16 + N (D b + Dg bg + 16 + 8 k'))`` bytes forward (k' the width of ``pos_idx``) and ``(W - 1) N D b``
    backward.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range, named in the message.
        RuntimeError: ``backend`` names a kernel that this build lacks; double backward.
    """
    op = "guided_contrastive"
    with GroupContext(op, group, reduction, exchange) as context:
        _check_pair(op, z, guide, temperature, reduction)
        _check_selection(op, z, clusters, far, k, pos_idx, gamma, instance_ids, context)
        kernel = use_kernel(op, backend, z, guide)
    options = {"k": k, "weighted": weighted, "gamma": gamma, "normalize": normalize}
    same = {"temperature": temperature, **options}
    batch = batch_of(context, kernel, z, guide, far, clusters, instance_ids, pos_idx, **same)
    options |= {"pos_idx": batch.pos_idx, "instance_ids": batch.instance_ids}
    embeddings = batch.z, batch.guide, batch.clusters, far, temperature
    if kernel:
        rows = guided(*embeddings, **options, context=batch.context, must_match=batch.must_match)
        (loss,) = reduce_parts([rows.contrast], reduction, batch.context)
        lse = rows.lse.to(rows.loss.dtype)
    else:
        loss, lse = reference.guided_contrastive(*embeddings, **options, reduction=reduction, return_lse=True)
    return (batch.local(loss), batch.local(lse)) if return_lse else batch.local(loss)


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
        group, exchange: the process group whose ranks' rows are one batch, and how they travel: see
            :func:`guided_contrastive`.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"cuda"`` (not yet verified on hardware; no float64).

    Returns:
        The loss in nats, 0-d or ``[N]``, float32 (float64 for float64 ``z``); with ``return_lse`` ``(loss, lse)``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range, named in the message.
        RuntimeError: ``backend`` names a kernel that this build lacks; double backward.
    """
    op = "relational_distill"
    with GroupContext(op, group, reduction, exchange) as context:
        _check_pair(op, z, guide, temperature, reduction)
        _check_teacher(op, teacher_temperature)
        kernel = use_kernel(op, backend, z, guide)
    options = {"normalize": normalize, "teacher_temperature": teacher_temperature}
    batch = batch_of(context, kernel, z, guide, temperature=temperature, **options)
    if kernel:
        ranks = {"context": batch.context, "must_match": batch.must_match}
        rows = guided(batch.z, batch.guide, None, None, temperature, distill=True, **options, **ranks)
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
        _check_pair(op, z, guide, 1.0, reduction)
        check.same_width(op, "guide", guide, "z", z)
        use_kernel(op, backend, z, guide)
    rows = reference.feature_distill(z, guide, reduction="none")
    return reduce_parts([all_of(rows)], reduction, context, reduction)[0]


def stage2_loss(
    z: Tensor,
    guide: Tensor,
    clusters: Tensor,
    far: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    beta: float = 0.4,
    distill: str = "relational",
    teacher_temperature: float | None = None,
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
        distill = relational_distill(z, guide, temperature, teacher_temperature=teacher_temperature)
        total = guided + beta * distill

    Args:
        z, guide, clusters, far, temperature, k, pos_idx, weighted, gamma, instance_ids, normalize: as in
            :func:`guided_contrastive`.
        beta: weight >= 0 of the distillation.
        distill: ``"relational"`` (:func:`relational_distill`) or ``"feature"`` (:func:`feature_distill`, for which the
            guide must be as wide as ``z``).
        teacher_temperature: of the guide in relational distillation; None: the same value as ``temperature``.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` (``[N]`` each), applied to each part.
        return_lse: also return the guided loss's ``lse`` ``[N]``.
        group, exchange: the process group whose ranks' rows are one batch, and how they travel: see
            :func:`guided_contrastive`.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"cuda"`` (not yet verified on hardware; no float64).

    Returns:
        ``Stage2Result(total, guided, distill)``, float32 (float64 for float64 ``z``); with ``return_lse`` the tuple
        ``(losses, lse)``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range, named in the message.
        RuntimeError: ``backend`` names a kernel that this build lacks; double backward.
    """
    op = "stage2_loss"
    with GroupContext(op, group, reduction, exchange) as context:
        _check_pair(op, z, guide, temperature, reduction)
        _check_selection(op, z, clusters, far, k, pos_idx, gamma, instance_ids, context)
        _check_teacher(op, teacher_temperature)
        check.nonnegative_number(op, "beta", beta)
        check.choice(op, "distill", distill, DISTILLATIONS)
        if distill == "feature":
            check.same_width(op, "guide", guide, "z", z)
        kernel = use_kernel(op, backend, z, guide)
    relational = distill == "relational"
    options = {
        "k": k,
        "weighted": weighted,
        "gamma": gamma,
        "normalize": normalize,
        "teacher_temperature": teacher_temperature,
    }
    same = {"temperature": temperature, "beta": beta, "distill": distill, **options}
    batch = batch_of(context, kernel, z, guide, far, clusters, instance_ids, pos_idx, **same)
    options |= {"pos_idx": batch.pos_idx, "instance_ids": batch.instance_ids}
    embeddings = batch.z, batch.guide, batch.clusters, far, temperature
    if kernel:
        rows = guided(*embeddings, distill=relational, **options, context=batch.context, must_match=batch.must_match)
        features = None if relational else reference.feature_distill(batch.z, batch.guide, reduction="none")
        second = rows.divergence if relational else all_of(features)
        contrast, distilled = reduce_parts([rows.contrast, second], reduction, batch.context)
        losses = Stage2Result(contrast + beta * distilled, contrast, distilled)
        lse = rows.lse.to(rows.loss.dtype)
    else:
        options |= {"beta": beta, "distill": distill, "reduction": reduction, "return_lse": True}
        losses, lse = reference.stage2_loss(*embeddings, **options)
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
    if not torch.compiler.is_compiling():
        finite = bool(centroids.isfinite().all())
        check.require(finite, "farthest_cluster", "centroids", "finite", "NaN or Inf (an empty cluster?)")
    return reference.farthest_cluster(centroids)


def _check_pair(op: str, z: Tensor, guide: Tensor, temperature: float | Tensor, reduction: str) -> None:
    _check_common(op, z, temperature, reduction)
    check.embeddings(op, "guide", guide)
    n = z.shape[0]
    check.require(guide.shape[0] == n, op, "guide", f"of {n} rows as z is", f"shape {tuple(guide.shape)}")
    check.same_device(op, "guide", guide, "z", z)


def _check_teacher(op: str, teacher_temperature: float | None) -> None:
    if teacher_temperature is not None:
        check.positive_number(op, "teacher_temperature", teacher_temperature)


def _check_selection(
    op: str,
    z: Tensor,
    clusters: Tensor,
    far: Tensor,
    k: int,
    pos_idx: Tensor | None,
    gamma: float,
    instance_ids: Tensor | None,
    context: GroupContext,
) -> None:
    """What decides positives, negatives and forces."""
    n = z.shape[0]
    check.integer_tensor(op, "far", far, z)
    check.require(far.dim() == 1 and far.shape[0] > 0, op, "far", "of shape [K], K > 0", f"shape {tuple(far.shape)}")
    check.index_range(op, "far", far, 0, far.shape[0])
    check.integers(op, "clusters", clusters, n, z)
    check.index_range(op, "clusters", clusters, 0, far.shape[0])
    check.nonnegative_number(op, "gamma", gamma)
    _check_views(op, z, instance_ids)
    if pos_idx is None:  # across ranks, k and pos_idx are held against the rows of all ranks when these are known
        check.count(op, "k", k, 1, None if context.many else n - 1)
    else:
        check.integer_tensor(op, "pos_idx", pos_idx, z)
        matrix = pos_idx.dim() == 2 and pos_idx.shape[0] == n
        check.require(matrix, op, "pos_idx", f"of shape [{n}, k]", f"shape {tuple(pos_idx.shape)}")
        if not context.many:
            check.index_range(op, "pos_idx", pos_idx, -1, n)

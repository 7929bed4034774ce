"""Arguments that travel together, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Bank:
    """Rows that are searched for neighbours instead of the batch: a queue, or the features of a data set.

    A plain tensor ``[Q, D]`` is a bank without ids and domains.

    Args:
        z: ``[Q, D]`` float, as wide as the batch. The rows are detached, and are no negatives.
        ids: ``[Q]`` integers; a row with the id of a batch row (see ``instance_ids``) is never its neighbour.
        domain: ``[Q]`` integers, 0 = in-distribution, 1 = OOD; neighbours then come from the batch row's own domain.
    """

    z: Tensor
    ids: Tensor | None = None
    domain: Tensor | None = None

    @staticmethod
    def of(bank: Bank | Tensor | None) -> Bank | None:
        return bank if bank is None or isinstance(bank, Bank) else Bank(bank)


@dataclass(frozen=True)
class Distill:
    """How a student is distilled in stage 2. The name of the kind alone means its defaults.

    Args:
        kind: ``"relational"`` (:func:`ltood_fast.relational_distill`) or ``"feature"``
            (:func:`ltood_fast.feature_distill`, for which the guide must be as wide as the student).
        teacher_temperature: tau_t > 0 of the guide in relational distillation; None: the same as the student's.
    """

    kind: str = "relational"
    teacher_temperature: float | None = None

    @staticmethod
    def of(distill: Distill | str) -> Distill:
        return distill if isinstance(distill, Distill) else Distill(distill)


@dataclass(frozen=True, eq=False)
class Exclude:
    """Who is no negative of a row of :func:`ltood_fast.info_nce`, in addition to its positive.

    Args:
        query_ids, key_ids: ``[N]`` and one integer for each row of ``positive_key``, or of ``negative_keys`` where they
            are given: keys with the row's id are left out (duplicates, rows of a cross-batch memory).
    """

    query_ids: Tensor
    key_ids: Tensor


@dataclass(frozen=True)
class Denominator:
    """The sum that a positive is compared with in :func:`ltood_fast.info_nce`.

    Args:
        decoupled: leave the positive out of it (DCL, Yeh et al. 2022). Losses can then be negative, and a row without
            negatives has loss 0 and does not count.
    """

    decoupled: bool = False

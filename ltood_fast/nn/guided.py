"""The losses of stage 2 as modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..ops import _check as check
from ..ops.guided import DISTILLATIONS, check_teacher, guided_contrastive, relational_distill, stage2_loss
from ..reference.options import Distill
from ._loss import Loss

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._loss import LossOptions


def _check_guided(name: str, k: int, weighted: bool, gamma: float) -> None:
    check.flag(name, "weighted", weighted)
    check.count(name, "k", k, 1)
    check.nonnegative_number(name, "gamma", gamma)


class GuidedContrastiveLoss(Loss):
    """Module of :func:`ltood_fast.guided_contrastive`."""

    def __init__(
        self,
        temperature: float | Tensor = 0.2,
        *,
        k: int = 5,
        weighted: bool = True,
        gamma: float = 1.0,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(temperature, options, k=k, weighted=weighted, gamma=gamma)
        _check_guided("GuidedContrastiveLoss", k, weighted, gamma)

    def forward(self, z: Tensor, guide: Tensor, clusters: Tensor, far: Tensor, **batch: Tensor | None) -> Any:
        """``z`` [N, D] under ``guide`` [N, Dg], its ``clusters`` [N] and their ``far`` clusters [K]; batch:
        ``pos_idx`` and ``instance_ids``."""
        return guided_contrastive(z, guide, clusters, far, self.temperature, **batch, **self.hyper_parameters)


class RelationalDistillLoss(Loss):
    """Module of :func:`ltood_fast.relational_distill`."""

    def __init__(
        self,
        temperature: float | Tensor = 0.2,
        *,
        teacher_temperature: float | None = None,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(temperature, options, teacher_temperature=teacher_temperature)
        check_teacher("RelationalDistillLoss", teacher_temperature)

    def forward(self, z: Tensor, guide: Tensor) -> Any:
        """``z`` [N, D] under ``guide`` [N, Dg]."""
        return relational_distill(z, guide, self.temperature, **self.hyper_parameters)


class Stage2Loss(Loss):
    """Module of :func:`ltood_fast.stage2_loss`."""

    def __init__(
        self,
        temperature: float | Tensor = 0.2,
        *,
        beta: float = 0.4,
        distill: Distill | str = "relational",
        k: int = 5,
        weighted: bool = True,
        gamma: float = 1.0,
        **options: Unpack[LossOptions],
    ) -> None:
        distill = Distill.of(distill)
        super().__init__(temperature, options, beta=beta, distill=distill, k=k, weighted=weighted, gamma=gamma)
        check.nonnegative_number("Stage2Loss", "beta", beta)
        check.choice("Stage2Loss", "distill", distill.kind, DISTILLATIONS)
        check_teacher("Stage2Loss", distill.teacher_temperature, "distill.teacher_temperature")
        _check_guided("Stage2Loss", k, weighted, gamma)

    def forward(self, z: Tensor, guide: Tensor, clusters: Tensor, far: Tensor, **batch: Tensor | None) -> Any:
        """As :class:`GuidedContrastiveLoss`."""
        return stage2_loss(z, guide, clusters, far, self.temperature, **batch, **self.hyper_parameters)

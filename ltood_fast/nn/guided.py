"""The losses of stage 2 as Modules: hyper-parameters in the constructor, one call in forward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..ops import _check as check
from ..ops._backend import BACKENDS
from ..ops._group import GroupContext
from ..ops.guided import DISTILLATIONS, Stage2Result, guided_contrastive, relational_distill, stage2_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _Stage2Term(nn.Module):
    """A temperature (an ``nn.Parameter`` is learnt) and the keyword arguments that every call gets."""

    def __init__(self, temperature: float | Tensor, **options):
        super().__init__()
        name = type(self).__name__
        check.temperature(name, temperature)
        check.choice(name, "reduction", options["reduction"], check.REDUCTIONS)
        check.choice(name, "backend", options["backend"], BACKENDS)
        GroupContext(name, options["group"], options["reduction"], options["exchange"])  # checks them
        if "k" in options:
            check.count(name, "k", options["k"], 1)
            check.nonnegative_number(name, "gamma", options["gamma"])
        if options.get("teacher_temperature") is not None:
            check.positive_number(name, "teacher_temperature", options["teacher_temperature"])
        self.temperature = temperature
        self.options = options

    def extra_repr(self) -> str:
        group = self.options["group"]
        shown = {"temperature": self.temperature, **self.options, "group": group and group.group_name}
        return ", ".join(f"{key}={value}" for key, value in shown.items())


class GuidedContrastiveLoss(_Stage2Term):
    """:func:`ltood_fast.guided_contrastive` with fixed hyper-parameters, which are described there."""

    def __init__(
        self,
        temperature: float | Tensor = 0.2,
        *,
        k: int = 5,
        weighted: bool = True,
        gamma: float = 1.0,
        normalize: bool = True,
        reduction: str = "mean",
        return_lse: bool = False,
        group: ProcessGroup | None = None,
        exchange: str = "gather",
        backend: str = "auto",
    ):
        super().__init__(
            temperature,
            k=k,
            weighted=weighted,
            gamma=gamma,
            normalize=normalize,
            reduction=reduction,
            return_lse=return_lse,
            group=group,
            exchange=exchange,
            backend=backend,
        )

    def forward(
        self,
        z: Tensor,
        guide: Tensor,
        clusters: Tensor,
        far: Tensor,
        *,
        pos_idx: Tensor | None = None,
        instance_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss of ``z`` [N, D] under ``guide`` [N, Dg], its ``clusters`` [N] and their ``far`` clusters [K]."""
        given = {"pos_idx": pos_idx, "instance_ids": instance_ids}
        return guided_contrastive(z, guide, clusters, far, self.temperature, **given, **self.options)


class RelationalDistillLoss(_Stage2Term):
    """:func:`ltood_fast.relational_distill` with fixed hyper-parameters, which are described there."""

    def __init__(
        self,
        temperature: float | Tensor = 0.2,
        *,
        teacher_temperature: float | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        return_lse: bool = False,
        group: ProcessGroup | None = None,
        exchange: str = "gather",
        backend: str = "auto",
    ):
        super().__init__(
            temperature,
            teacher_temperature=teacher_temperature,
            normalize=normalize,
            reduction=reduction,
            return_lse=return_lse,
            group=group,
            exchange=exchange,
            backend=backend,
        )

    def forward(self, z: Tensor, guide: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The loss of ``z`` [N, D] under ``guide`` [N, Dg]."""
        return relational_distill(z, guide, self.temperature, **self.options)


class Stage2Loss(_Stage2Term):
    """:func:`ltood_fast.stage2_loss` with fixed hyper-parameters, which are described there."""

    def __init__(
        self,
        temperature: float | Tensor = 0.2,
        *,
        beta: float = 0.4,
        distill: str = "relational",
        teacher_temperature: float | None = None,
        k: int = 5,
        weighted: bool = True,
        gamma: float = 1.0,
        normalize: bool = True,
        reduction: str = "mean",
        return_lse: bool = False,
        group: ProcessGroup | None = None,
        exchange: str = "gather",
        backend: str = "auto",
    ):
        super().__init__(
            temperature,
            beta=beta,
            distill=distill,
            teacher_temperature=teacher_temperature,
            k=k,
            weighted=weighted,
            gamma=gamma,
            normalize=normalize,
            reduction=reduction,
            return_lse=return_lse,
            group=group,
            exchange=exchange,
            backend=backend,
        )
        check.nonnegative_number("Stage2Loss", "beta", beta)
        check.choice("Stage2Loss", "distill", distill, DISTILLATIONS)

    def forward(
        self,
        z: Tensor,
        guide: Tensor,
        clusters: Tensor,
        far: Tensor,
        *,
        pos_idx: Tensor | None = None,
        instance_ids: Tensor | None = None,
    ) -> Stage2Result | tuple[Stage2Result, Tensor]:
        """The losses of ``z`` [N, D] under ``guide`` [N, Dg], its ``clusters`` [N] and their ``far`` clusters [K]."""
        given = {"pos_idx": pos_idx, "instance_ids": instance_ids}
        return stage2_loss(z, guide, clusters, far, self.temperature, **given, **self.options)

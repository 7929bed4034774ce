"""Modules of the contrastive losses: hyper-parameters, checked when the module is made, and one call."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..ops import _check as check
from ..ops import contrastive as ops
from ..ops._backend import BACKENDS
from ..ops._group import GroupContext

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _ContrastiveLoss(nn.Module):
    """Holds the keywords that all losses of the family share; an `nn.Parameter` as temperature is learned."""

    def __init__(
        self,
        temperature: float | Tensor,
        *,
        normalize: bool,
        reduction: str,
        return_lse: bool,
        group: ProcessGroup | None,
        exchange: str,
        backend: str,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        GroupContext(name, group, reduction, exchange)  # checks them
        check.temperature(name, temperature)
        check.choice(name, "reduction", reduction, check.REDUCTIONS)
        check.choice(name, "backend", backend, BACKENDS)
        self.temperature = temperature
        self.shared = {
            "normalize": normalize,
            "reduction": reduction,
            "return_lse": return_lse,
            "group": group,
            "exchange": exchange,
            "backend": backend,
        }

    def hyper_parameters(self) -> dict[str, object]:
        """The keywords of the function this module calls, less the tensors of a batch."""
        return self.shared

    def extra_repr(self) -> str:
        temperature = self.temperature
        shown = f"parameter {temperature.item():.4g}" if isinstance(temperature, Tensor) else temperature
        named = {**self.hyper_parameters(), "group": self.shared["group"] and self.shared["group"].group_name}
        return ", ".join([f"temperature={shown}", *(f"{k}={v!r}" for k, v in named.items())])


class NTXentLoss(_ContrastiveLoss):
    """Module of :func:`ltood_fast.nt_xent`."""

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        return_lse: bool = False,
        group: ProcessGroup | None = None,
        exchange: str = "gather",
        backend: str = "auto",
    ) -> None:
        super().__init__(
            temperature,
            normalize=normalize,
            reduction=reduction,
            return_lse=return_lse,
            group=group,
            exchange=exchange,
            backend=backend,
        )

    def forward(self, z: Tensor, instance_ids: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return ops.nt_xent(z, self.temperature, instance_ids=instance_ids, **self.hyper_parameters())


class SupConLoss(_ContrastiveLoss):
    """Module of :func:`ltood_fast.supcon`."""

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        return_lse: bool = False,
        group: ProcessGroup | None = None,
        exchange: str = "gather",
        backend: str = "auto",
    ) -> None:
        super().__init__(
            temperature,
            normalize=normalize,
            reduction=reduction,
            return_lse=return_lse,
            group=group,
            exchange=exchange,
            backend=backend,
        )

    def forward(self, z: Tensor, labels: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return ops.supcon(z, labels, self.temperature, **self.hyper_parameters())


class DomainLoss(_ContrastiveLoss):
    """Module of :func:`ltood_fast.domain_loss`. With ``kind="bce"`` it owns the linear head, ``dim`` features wide."""

    def __init__(
        self,
        temperature: float | Tensor = 0.2,
        *,
        kind: str = "supcon",
        dim: int | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        return_lse: bool = False,
        group: ProcessGroup | None = None,
        exchange: str = "gather",
        backend: str = "auto",
    ) -> None:
        super().__init__(
            temperature,
            normalize=normalize,
            reduction=reduction,
            return_lse=return_lse,
            group=group,
            exchange=exchange,
            backend=backend,
        )
        check.choice("DomainLoss", "kind", kind, ops.DOMAIN_KINDS)
        self.kind = kind
        self.weight = self.bias = None
        if kind == "bce":
            check.require(dim is not None, "DomainLoss", "dim", "given for kind='bce', whose head it sizes", dim)
            check.count("DomainLoss", "dim", dim, 1)
            bound = 1 / math.sqrt(dim)  # as nn.Linear starts
            self.weight = nn.Parameter(torch.empty(dim).uniform_(-bound, bound))
            self.bias = nn.Parameter(torch.empty(()).uniform_(-bound, bound))
        else:
            check.require(dim is None, "DomainLoss", "dim", "None for kind='supcon', which has no head", dim)

    def hyper_parameters(self) -> dict[str, object]:
        return {"kind": self.kind, **self.shared}

    def forward(self, z: Tensor, domain: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        head = {"weight": self.weight, "bias": self.bias}
        return ops.domain_loss(z, domain, self.temperature, **head, **self.hyper_parameters())


class PSDLoss(_ContrastiveLoss):
    """Module of :func:`ltood_fast.psd_loss`. ``neighbor_weight`` of a call overrides the one of the module."""

    def __init__(
        self,
        temperature: float | Tensor = 0.2,
        *,
        k: int = 1,
        neighbor_weight: float = 1.0,
        normalize: bool = True,
        reduction: str = "mean",
        return_lse: bool = False,
        return_neighbors: bool = False,
        group: ProcessGroup | None = None,
        exchange: str = "gather",
        backend: str = "auto",
    ) -> None:
        super().__init__(
            temperature,
            normalize=normalize,
            reduction=reduction,
            return_lse=return_lse,
            group=group,
            exchange=exchange,
            backend=backend,
        )
        check.count(type(self).__name__, "k", k, 1)
        check.nonnegative_number(type(self).__name__, "neighbor_weight", neighbor_weight)
        self.neighbor_weight = neighbor_weight
        self.shared |= {"k": k, "return_neighbors": return_neighbors}

    def hyper_parameters(self) -> dict[str, object]:
        return {"neighbor_weight": self.neighbor_weight, **self.shared}

    def forward(
        self,
        z: Tensor,
        *,
        neighbor_weight: Tensor | None = None,
        bank: Tensor | None = None,
        domain: Tensor | None = None,
        instance_ids: Tensor | None = None,
        bank_ids: Tensor | None = None,
        bank_domain: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        return ops.psd_loss(
            z,
            self.temperature,
            neighbor_weight=self.neighbor_weight if neighbor_weight is None else neighbor_weight,
            bank=bank,
            domain=domain,
            instance_ids=instance_ids,
            bank_ids=bank_ids,
            bank_domain=bank_domain,
            **self.shared,
        )


class Stage1Loss(PSDLoss):
    """Module of :func:`ltood_fast.stage1_loss`. ``neighbor_weight`` of a call overrides the one of the module."""

    def __init__(
        self,
        temperature: float | Tensor = 0.2,
        *,
        alpha: float = 0.3,
        k: int = 1,
        neighbor_weight: float = 1.0,
        same_domain: bool = True,
        normalize: bool = True,
        reduction: str = "mean",
        return_lse: bool = False,
        return_neighbors: bool = False,
        group: ProcessGroup | None = None,
        exchange: str = "gather",
        backend: str = "auto",
    ) -> None:
        super().__init__(
            temperature,
            k=k,
            neighbor_weight=neighbor_weight,
            normalize=normalize,
            reduction=reduction,
            return_lse=return_lse,
            return_neighbors=return_neighbors,
            group=group,
            exchange=exchange,
            backend=backend,
        )
        check.nonnegative_number("Stage1Loss", "alpha", alpha)
        self.shared |= {"alpha": alpha, "same_domain": same_domain}

    def forward(
        self,
        z: Tensor,
        domain: Tensor,
        *,
        neighbor_weight: Tensor | None = None,
        bank: Tensor | None = None,
        instance_ids: Tensor | None = None,
        bank_ids: Tensor | None = None,
        bank_domain: Tensor | None = None,
    ) -> ops.Stage1Result | tuple:
        return ops.stage1_loss(
            z,
            domain,
            self.temperature,
            neighbor_weight=self.neighbor_weight if neighbor_weight is None else neighbor_weight,
            bank=bank,
            instance_ids=instance_ids,
            bank_ids=bank_ids,
            bank_domain=bank_domain,
            **self.shared,
        )

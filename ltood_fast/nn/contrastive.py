"""The contrastive losses as modules."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops import _check as check
from ..ops import contrastive as ops
from ..ops._cross_pairing import PAIRINGS
from ._loss import Loss

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._loss import LossOptions


class NTXentLoss(Loss):
    """Module of :func:`ltood_fast.nt_xent`."""

    def __init__(
        self, temperature: float | Tensor = 0.5, *, decoupled: bool = False, **options: Unpack[LossOptions]
    ) -> None:
        super().__init__(temperature, options, decoupled=decoupled)
        check.flag("NTXentLoss", "decoupled", decoupled)

    def forward(self, z: Tensor, instance_ids: Tensor | None = None) -> Any:
        return ops.nt_xent(z, self.temperature, instance_ids=instance_ids, **self.hyper_parameters)


class SupConLoss(Loss):
    """Module of :func:`ltood_fast.supcon`."""

    def __init__(
        self, temperature: float | Tensor = 0.5, *, decoupled: bool = False, **options: Unpack[LossOptions]
    ) -> None:
        super().__init__(temperature, options, decoupled=decoupled)
        check.flag("SupConLoss", "decoupled", decoupled)

    def forward(self, z: Tensor, labels: Tensor) -> Any:
        return ops.supcon(z, labels, self.temperature, **self.hyper_parameters)


class DomainLoss(Loss):
    """Module of :func:`ltood_fast.domain_loss`. With ``kind="bce"`` it owns the linear head, ``dim`` features wide."""

    def __init__(
        self,
        temperature: float | Tensor = 0.2,
        *,
        kind: str = "supcon",
        dim: int | None = None,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(temperature, options, kind=kind)
        check.choice("DomainLoss", "kind", kind, ops.DOMAIN_KINDS)
        self.weight = self.bias = None
        if kind == "bce":
            check.require(dim is not None, "DomainLoss", "dim", "given for kind='bce', whose head it sizes", dim)
            check.count("DomainLoss", "dim", dim, 1)
            bound = 1 / math.sqrt(dim)  # as nn.Linear starts
            self.weight = nn.Parameter(torch.empty(dim).uniform_(-bound, bound))
            self.bias = nn.Parameter(torch.empty(()).uniform_(-bound, bound))
        else:
            check.require(dim is None, "DomainLoss", "dim", "None for kind='supcon', which has no head", dim)

    def forward(self, z: Tensor, domain: Tensor) -> Any:
        head = {"weight": self.weight, "bias": self.bias}
        return ops.domain_loss(z, domain, self.temperature, **head, **self.hyper_parameters)


def _check_neighbors(name: str, k: int, neighbor_weight: float, return_neighbors: bool) -> None:
    check.count(name, "k", k, 1)
    check.nonnegative_number(name, "neighbor_weight", neighbor_weight)
    check.flag(name, "return_neighbors", return_neighbors)


class PSDLoss(Loss):
    """Module of :func:`ltood_fast.psd_loss`. ``neighbor_weight`` of a call overrides the one of the module."""

    def __init__(
        self,
        temperature: float | Tensor = 0.2,
        *,
        k: int = 1,
        neighbor_weight: float = 1.0,
        pairing: str = "same",
        return_neighbors: bool = False,
        **options: Unpack[LossOptions],
    ) -> None:
        more = {"k": k, "neighbor_weight": neighbor_weight, "return_neighbors": return_neighbors}
        super().__init__(temperature, options, pairing=pairing, **more)
        _check_neighbors("PSDLoss", **more)
        check.choice("PSDLoss", "pairing", pairing, PAIRINGS)

    def forward(self, z: Tensor, instance_ids: Tensor | None = None, **batch: Any) -> Any:
        """batch: keywords of :func:`ltood_fast.psd_loss` that belong to a batch, such as ``bank`` or ``domain``."""
        options = {**self.hyper_parameters, **batch}
        return ops.psd_loss(z, self.temperature, instance_ids=instance_ids, **options)


class Stage1Loss(Loss):
    """Module of :func:`ltood_fast.stage1_loss`. ``neighbor_weight`` of a call overrides the one of the module."""

    def __init__(
        self,
        temperature: float | Tensor = 0.2,
        *,
        alpha: float = 0.3,
        same_domain: bool = True,
        k: int = 1,
        neighbor_weight: float = 1.0,
        pairing: str = "same",
        return_neighbors: bool = False,
        **options: Unpack[LossOptions],
    ) -> None:
        more = {"k": k, "neighbor_weight": neighbor_weight, "return_neighbors": return_neighbors}
        super().__init__(temperature, options, alpha=alpha, same_domain=same_domain, pairing=pairing, **more)
        _check_neighbors("Stage1Loss", **more)
        check.choice("Stage1Loss", "pairing", pairing, PAIRINGS)
        check.nonnegative_number("Stage1Loss", "alpha", alpha)
        check.flag("Stage1Loss", "same_domain", same_domain)

    def forward(self, z: Tensor, domain: Tensor, **batch: Any) -> Any:
        """batch: keywords of :func:`ltood_fast.stage1_loss` that belong to a batch, such as ``bank``."""
        return ops.stage1_loss(z, domain, self.temperature, **{**self.hyper_parameters, **batch})

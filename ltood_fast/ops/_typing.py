"""Keywords of the losses, for the overloads that say which return type a flag gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..reference.options import Bank, Denominator, Distill, Exclude


class SharedOptions(TypedDict, total=False):
    """Keywords of every loss; :func:`ltood_fast.nt_xent` describes them."""

    normalize: bool
    reduction: str
    group: ProcessGroup | None
    exchange: str
    backend: str


class SupConOptions(SharedOptions, total=False):
    decoupled: bool


class NTXentOptions(SupConOptions, total=False):
    instance_ids: Tensor | None


class DomainOptions(SharedOptions, total=False):
    kind: str
    weight: Tensor | None
    bias: Tensor | None


class ClusterOptions(TypedDict, total=False):
    nu: float
    normalize: bool
    reduction: str
    backend: str


class NeighborOptions(SharedOptions, total=False):
    k: int
    neighbor_weight: float | Tensor
    pairing: str
    bank: Bank | Tensor | None
    instance_ids: Tensor | None


class PSDOptions(NeighborOptions, total=False):
    domain: Tensor | None


class Stage1Options(NeighborOptions, total=False):
    alpha: float
    same_domain: bool


class GuidedOptions(SharedOptions, total=False):
    k: int
    pos_idx: Tensor | None
    weighted: bool
    gamma: float
    instance_ids: Tensor | None


class RelationalOptions(SharedOptions, total=False):
    teacher_temperature: float | None


class Stage2Options(GuidedOptions, total=False):
    beta: float
    distill: Distill | str


class InfoNCEOptions(SharedOptions, total=False):
    target: Tensor | None
    symmetric: bool
    exclude: Exclude | None
    denominator: Denominator | None
    label_smoothing: float
    weight: Tensor | None

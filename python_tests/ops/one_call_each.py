"""One plain call of every op and of every Module, of a given number of rows: for what must hold of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ltood_fast as lt

D, GUIDE_D, K = 6, 5, 3


class Call(NamedTuple):
    function: Callable[..., Any]
    others: Callable[[int, torch.device], tuple[Tensor, ...]]  # the tensors that follow z, of n rows
    learned: bool = True  # whether its result has a gradient
    temperature: bool = True  # whether it takes one


def _none(n: int, device: torch.device) -> tuple[Tensor, ...]:
    return ()


def _labels(n: int, device: torch.device) -> tuple[Tensor, ...]:
    return (torch.arange(n, device=device) % 2,)


def _guide(n: int, device: torch.device) -> tuple[Tensor, ...]:
    return (torch.linspace(-1, 1, n * GUIDE_D, device=device).cos().view(n, GUIDE_D),)


def _keys(n: int, device: torch.device) -> tuple[Tensor, ...]:
    return (torch.linspace(-1, 2, n * D, device=device).sin().view(n, D),)


def _clusters(n: int, device: torch.device) -> tuple[Tensor, ...]:
    return *_guide(n, device), torch.arange(n, device=device) % K, torch.tensor([1, 2, 0], device=device)


def _centroids(n: int, device: torch.device) -> tuple[Tensor, ...]:
    return (torch.linspace(-1, 1, K * D, device=device).sin().view(K, D),)


OPS = {
    "nt_xent": Call(lt.nt_xent, _none),
    "supcon": Call(lt.supcon, _labels),
    "psd_loss": Call(lt.psd_loss, _none),
    "domain_loss": Call(lt.domain_loss, _labels),
    "stage1_loss": Call(lambda *a, **kw: lt.stage1_loss(*a, **kw).total, _labels),
    "guided_contrastive": Call(lambda *a, **kw: lt.guided_contrastive(*a, **{"k": 2, **kw}), _clusters),
    "relational_distill": Call(lt.relational_distill, _guide),
    "stage2_loss": Call(lambda *a, **kw: lt.stage2_loss(*a, **{"k": 2, **kw}).total, _clusters),
    "feature_distill": Call(
        lambda z, guide, **kw: lt.feature_distill(z[:, :GUIDE_D], guide, **kw), _guide, temperature=False
    ),
    "info_nce": Call(lt.info_nce, _keys),
    "clip_loss": Call(lambda *a, **kw: lt.clip_loss(*a, 2.0, **kw), _keys, temperature=False),
    "sigmoid_loss": Call(lambda *a, **kw: lt.sigmoid_loss(*a, 2.0, -1.0, **kw), _keys, temperature=False),
    "cluster_kl": Call(lt.cluster_kl, _centroids, temperature=False),
    "knn": Call(lambda z, **kw: lt.knn(z, 2, **kw)[0], _none, learned=False, temperature=False),
    "knn_density": Call(lambda z, **kw: lt.knn_density(z, 2, **kw), _none, learned=False, temperature=False),
    "cluster_tailness": Call(
        lambda z, labels, **kw: lt.cluster_tailness(z, labels, 2, k=2, **kw), _labels, learned=False, temperature=False
    ),
}


class ClusterKL(lt.nn.ClusterKL):
    """Takes the centroids of the call for its own, so that all Modules are made without arguments."""

    def __init__(self, **options: Any) -> None:
        super().__init__(_centroids(0, torch.device("cpu"))[0], **options)


MODULES = {
    "NTXentLoss": (lt.nn.NTXentLoss, _none),
    "SupConLoss": (lt.nn.SupConLoss, _labels),
    "DomainLoss": (lt.nn.DomainLoss, _labels),
    "DomainLoss bce": (lambda **kw: lt.nn.DomainLoss(kind="bce", dim=D, **kw), _labels),
    "PSDLoss": (lt.nn.PSDLoss, _none),
    "Stage1Loss": (lt.nn.Stage1Loss, _labels),
    "GuidedContrastiveLoss": (lambda **kw: lt.nn.GuidedContrastiveLoss(k=2, **kw), _clusters),
    "RelationalDistillLoss": (lt.nn.RelationalDistillLoss, _guide),
    "Stage2Loss": (lambda **kw: lt.nn.Stage2Loss(k=2, **kw), _clusters),
    "InfoNCELoss": (lambda **kw: lt.nn.InfoNCELoss(symmetric=True, **kw), _keys),
    "ClusterKL": (ClusterKL, _none),
}


def rows(n: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    if device == "meta":
        return torch.empty(n, D, dtype=dtype, device="meta")
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).to(device, dtype)

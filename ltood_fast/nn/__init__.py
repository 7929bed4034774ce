"""The losses as modules."""

from .cluster_kl import ClusterKL
from .contrastive import DomainLoss, NTXentLoss, PSDLoss, Stage1Loss, SupConLoss
from .guided import GuidedContrastiveLoss, RelationalDistillLoss, Stage2Loss

__all__ = [
    "ClusterKL",
    "DomainLoss",
    "GuidedContrastiveLoss",
    "NTXentLoss",
    "PSDLoss",
    "RelationalDistillLoss",
    "Stage1Loss",
    "Stage2Loss",
    "SupConLoss",
]

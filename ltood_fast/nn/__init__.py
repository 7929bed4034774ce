"""The losses as modules."""

from .cluster_kl import ClusterKL
from .contrastive import DomainLoss, NTXentLoss, PSDLoss, Stage1Loss, SupConLoss
from .guided import GuidedContrastiveLoss, RelationalDistillLoss, Stage2Loss
from .info_nce import InfoNCELoss

__all__ = [
    "ClusterKL",
    "DomainLoss",
    "GuidedContrastiveLoss",
    "InfoNCELoss",
    "NTXentLoss",
    "PSDLoss",
    "RelationalDistillLoss",
    "Stage1Loss",
    "Stage2Loss",
    "SupConLoss",
]

"""The losses as modules."""

from .contrastive import DomainLoss, NTXentLoss, PSDLoss, Stage1Loss, SupConLoss
from .guided import GuidedContrastiveLoss, RelationalDistillLoss, Stage2Loss

__all__ = [
    "DomainLoss",
    "GuidedContrastiveLoss",
    "NTXentLoss",
    "PSDLoss",
    "RelationalDistillLoss",
    "Stage1Loss",
    "Stage2Loss",
    "SupConLoss",
]

"""The losses as modules."""

from .contrastive import DomainLoss, NTXentLoss, PSDLoss, Stage1Loss, SupConLoss

__all__ = ["DomainLoss", "NTXentLoss", "PSDLoss", "Stage1Loss", "SupConLoss"]

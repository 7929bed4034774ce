"""Fused ops for long-tailed self-supervised learning with out-of-distribution data."""

from . import nn
from ._ext import build_info
from .ops.contrastive import Stage1Result, domain_loss, nt_xent, psd_loss, stage1_loss, supcon
from .ops.guided import (
    Stage2Result,
    farthest_cluster,
    feature_distill,
    guided_contrastive,
    relational_distill,
    stage2_loss,
)

__all__ = [
    "Stage1Result",
    "Stage2Result",
    "build_info",
    "domain_loss",
    "farthest_cluster",
    "feature_distill",
    "guided_contrastive",
    "nn",
    "nt_xent",
    "psd_loss",
    "relational_distill",
    "stage1_loss",
    "stage2_loss",
    "supcon",
]

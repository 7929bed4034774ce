"""Fused ops for long-tailed self-supervised learning with out-of-distribution data."""

from . import nn, reference
from ._ext import build_info
from .ops.cluster_kl import cluster_kl, refine_centroids
from .ops.contrastive import Stage1Result, domain_loss, nt_xent, psd_loss, stage1_loss, supcon
from .ops.guided import (
    Stage2Result,
    farthest_cluster,
    feature_distill,
    guided_contrastive,
    relational_distill,
    stage2_loss,
)
from .ops.info_nce import info_nce
from .ops.knn import cluster_tailness, knn, knn_density
from .ops.two_towers import clip_loss, sigmoid_loss
from .reference.options import Bank, Denominator, Distill, Exclude
from .sampling.ood import sample_ood

__all__ = [
    "Bank",
    "Denominator",
    "Distill",
    "Exclude",
    "Stage1Result",
    "Stage2Result",
    "build_info",
    "clip_loss",
    "cluster_kl",
    "cluster_tailness",
    "domain_loss",
    "farthest_cluster",
    "feature_distill",
    "guided_contrastive",
    "info_nce",
    "knn",
    "knn_density",
    "nn",
    "nt_xent",
    "psd_loss",
    "reference",
    "refine_centroids",
    "relational_distill",
    "sample_ood",
    "sigmoid_loss",
    "stage1_loss",
    "stage2_loss",
    "supcon",
]

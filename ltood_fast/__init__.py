"""Fused ops for long-tailed self-supervised learning with out-of-distribution data."""

from ._ext import build_info
from .ops.contrastive import Stage1Result, domain_loss, nt_xent, psd_loss, stage1_loss, supcon

__all__ = ["Stage1Result", "build_info", "domain_loss", "nt_xent", "psd_loss", "stage1_loss", "supcon"]

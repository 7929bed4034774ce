"""Fused ops for long-tailed self-supervised learning with out-of-distribution data."""

from ._ext import build_info

__all__ = ["build_info"]

"""Fused losses in Triton, for CUDA alone. None of these adapters has run on a GPU yet. Loss and gradients agree with
the reference in Triton's interpreter on the CPU, checks for CUDA tensors and inline PTX taken out for that.

Rows are normalised outside, where a training loop would do it, in the dtype of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .base import SIXTEEN_BITS, Implementation, partners, unit, views


def without_self(nll: Tensor, u: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """NT-Xent from rows -s_ip + log sum_j exp(s_ij) whose sum still holds j = i: that term is taken out of the
    log-sum-exp, log(e^a - e^b) = a + log(1 - e^(b - a)). u unit rows, positive = s_ip."""
    own = u.float().square().sum(1) / temperature
    return (nll + torch.log1p(-torch.exp(own - (nll + positive)))).mean()


def _positive(u: Tensor, targets: Tensor, temperature: float) -> Tensor:
    return (u.float() * u[targets].float()).sum(1) / temperature


def _memeff() -> Callable:
    from memeff import MemoryEfficientQwen3Loss

    def nt_xent(z: Tensor, temperature: float) -> Tensor:
        options = {"use_qq_negatives": True, "margin": 4, "stable": False, "normalized_inputs": True}
        loss = MemoryEfficientQwen3Loss(temperature, **options)
        first, second = views(unit(z))
        return (loss(first, second) + loss(second, first)) / 2

    return nt_xent


def _memeff_clip() -> Callable:
    from memeff import MemoryEfficientCLIPLoss

    def clip(x: Tensor, y: Tensor, temperature: float) -> Tensor:
        return MemoryEfficientCLIPLoss(temperature, normalized_inputs=True, stable=False)(unit(x), unit(y))

    return clip


def _inf_cl_rows() -> Callable:
    from inf_cl import cal_flash_loss

    def rows(x: Tensor, y: Tensor, targets: Tensor, temperature: float) -> Tensor:
        return cal_flash_loss(x, y, targets, scale=1 / temperature, head_dim=min(256, x.shape[1]))

    return rows


def _cut_rows() -> Callable:
    from cut_cross_entropy import linear_cross_entropy

    def rows(x: Tensor, y: Tensor, targets: Tensor, temperature: float) -> Tensor:
        return linear_cross_entropy(x / temperature, y, targets, reduction="none", filter_eps=None)

    return rows


def _liger_rows() -> Callable:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def rows(x: Tensor, y: Tensor, targets: Tensor, temperature: float) -> Tensor:
        return liger_fused_linear_cross_entropy(x / temperature, y, targets, accum_dtype=torch.float32)

    return rows


def _clip_from(rows: Callable) -> Callable:
    """Both directions of the cross-entropy of x Yᵀ, one call each."""

    def clip(x: Tensor, y: Tensor, temperature: float) -> Tensor:
        x, y = unit(x), unit(y)
        targets = torch.arange(len(x), device=x.device)
        return (rows(x, y, targets, temperature).mean() + rows(y, x, targets, temperature).mean()) / 2

    return clip


def _nt_xent_from(rows: Callable) -> Callable:
    """The cross-entropy of u uᵀ without its diagonal, which these kernels cannot leave out."""

    def nt_xent(z: Tensor, temperature: float) -> Tensor:
        u, targets = unit(z), partners(z)
        return without_self(rows(u, u, targets, temperature), u, _positive(u, targets, temperature), temperature)

    return nt_xent


CUDA = {"devices": ("cuda",), "tested_on": "interpreter"}
IMPLEMENTATIONS = (
    Implementation(
        "memeff",
        {"nt_xent": _memeff, "clip": _memeff_clip},
        "1/2 [Qwen3(z1, z2) + Qwen3(z2, z1)] with use_qq_negatives=True, margin=4 (masks nothing), stable=False (the "
        "loss's own gradient), normalized_inputs=True: exact NT-Xent. clip: MemoryEfficientCLIPLoss(stable=False)",
        package="memeff",
        **CUDA,
    ),
    Implementation(
        "inf-cl",
        {"nt_xent": lambda: _nt_xent_from(_inf_cl_rows()), "clip": lambda: _clip_from(_inf_cl_rows())},
        "cal_flash_loss(scale=1/tau, head_dim=min(256, D)); it computes in TF32 whatever the input, so it is compared "
        "on 16-bit inputs. nt_xent: the diagonal taken out of its log-sum-exp afterwards",
        package="inf_cl",
        dtypes=SIXTEEN_BITS,
        **CUDA,
    ),
    Implementation(
        "cut-cross-entropy",
        {"nt_xent": lambda: _nt_xent_from(_cut_rows()), "clip": lambda: _clip_from(_cut_rows())},
        "linear_cross_entropy(filter_eps=None): its default filter deletes contrastive gradients. 16-bit inputs only. "
        "nt_xent: the diagonal taken out of its log-sum-exp afterwards",
        package="cut-cross-entropy",
        dtypes=SIXTEEN_BITS,
        **CUDA,
    ),
    Implementation(
        "liger",
        {"clip": lambda: _clip_from(_liger_rows())},
        "liger_fused_linear_cross_entropy(accum_dtype=float32), mean over each direction. It computes gradients in the "
        "forward pass and cannot leave the diagonal out: no nt_xent",
        package="liger-kernel",
        **CUDA,
    ),
)

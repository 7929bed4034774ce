"""NTXentLoss, DCLLoss and DCLWLoss of lightly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightly.loss import DCLLoss as PeerDCL
from lightly.loss import NTXentLoss as PeerNTXent
from lightly.loss.dcl_loss import negative_mises_fisher_weights
from torch import Tensor

from ..ops.contrastive import nt_xent
from ..ops.info_nce import info_nce
from ._calls import CountsCalls, unusual


def _unserved(loss: PeerNTXent | PeerDCL, out0: Tensor, out1: Tensor) -> str:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if loss.gather_distributed and distributed and torch.distributed.get_world_size() > 1:
        return "several ranks"
    if not loss.temperature > 0:
        return "a temperature that is not positive"
    return unusual(out0, out1) or ("" if out0.shape == out1.shape else "views that do not pair up")


class NTXentLoss(CountsCalls, PeerNTXent):
    """``lightly.loss.NTXentLoss`` without the N×N and N×K logits, with and without a memory bank, on one rank."""

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        if not self.count(_unserved(self, out0, out1)):
            return super().forward(out0, out1)
        if self.memory_bank.size[0] == 0:
            return nt_xent(torch.cat([out0, out1]), float(self.temperature)).to(out0.dtype)
        # The bank keeps unit rows, as columns [D, K].
        out1, negatives = self.memory_bank.forward(F.normalize(out1, dim=1), update=out0.requires_grad)
        queue = negatives.to(out0.device).T
        return info_nce(out0, out1, queue, float(self.temperature)).to(out0.dtype)


class DCLLoss(CountsCalls, PeerDCL):
    """``lightly.loss.DCLLoss`` without the N×N logits, on one rank; ``weight_fn`` runs as it does there."""

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        if not self.count(_unserved(self, out0, out1) or ("one image" if len(out0) < 2 else "")):
            return super().forward(out0, out1)
        view0, view1 = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        options = {"decoupled": True, "normalize": False, "return_lse": True}
        loss, lse = nt_xent(torch.cat([view0, view1]), float(self.temperature), **options)
        if not self.weight_fn:
            return loss.to(out0.dtype)
        similarity = (view0 * view1).sum(dim=1) / self.temperature
        weight = self.weight_fn(view0, view1) + self.weight_fn(view1, view0)
        return (lse.mean() - (weight * similarity).mean() / 2).to(out0.dtype)


class DCLWLoss(DCLLoss):
    """``lightly.loss.DCLWLoss``."""

    def __init__(self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False) -> None:
        def weights(out0: Tensor, out1: Tensor) -> Tensor:
            return negative_mises_fisher_weights(out0, out1, sigma)

        super().__init__(temperature=temperature, weight_fn=weights, gather_distributed=gather_distributed)

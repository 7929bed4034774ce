"""SDCLR's pruned competitor, which gives the second view [Jiang 2021, Self-Damaging Contrastive Learning].

The competitor is the network with its smallest weights left out: images that the network remembers badly, those of the
tail, are the first that it forgets, and their loss grows. The mask is taken over all convolutions of the network
together, by magnitude, and taken anew when an epoch starts. The two share the weights and have BatchNorm layers of
their own. Both learn, as in the published code (which goes back through one branch at a time with the embeddings of the
other held; the sum of the two is the gradient of the loss): a weight that is pruned gets its gradient from the dense
branch alone. Nothing but training sees the competitor, so that its running statistics, which move once a step here and
twice there, change nothing.
"""

from __future__ import annotations

import copy
import math
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .model import ContrastiveModel

STAGES = ("simclr", "stage1", "joint")  # those that `base.name` is about: the student of stage 2 has a guide


class Competitor(nn.Module):
    """The parts of the pruned branch alone: a mask of each convolution's weight, and the BatchNorm layers."""

    def __init__(self, dense: nn.Module):
        super().__init__()
        modules = dict(dense.named_modules())
        self.convolutions = [name for name, module in modules.items() if isinstance(module, nn.Conv2d)]
        self.norm_names = [name for name, module in modules.items() if isinstance(module, _BatchNorm)]
        self.norms = nn.ModuleList(copy.deepcopy(modules[name]) for name in self.norm_names)
        self.masks: dict[str, Tensor] = {}  # bool; no buffers: DDP would send them to all ranks at every step

    def tensors_for(self, dense: nn.Module) -> dict[str, Tensor]:
        """The tensors that replace the dense branch's parameters and buffers, by name."""
        tensors = {f"{name}.weight": dense.get_parameter(f"{name}.weight") * mask for name, mask in self.masks.items()}
        for name, norm in zip(self.norm_names, self.norms, strict=True):
            own = chain(norm.named_parameters(), norm.named_buffers())
            tensors.update({f"{name}.{key}": value for key, value in own})
        return tensors

    def get_extra_state(self) -> dict[str, Tensor]:
        return dict(self.masks)

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        self.masks = dict(state)  # of the epoch before; the next one renews them


class SDCLR(nn.Module):
    """views [2n, C, H, W], the first views before the second ones -> z [2n, D]: dense, then pruned.

    Args:
        dense: the network, whose parameters stay what they are.
        prune: share of the convolutions' weights that the competitor lacks.
    """

    def __init__(self, dense: ContrastiveModel, prune: float):
        super().__init__()
        self.dense, self.prune = dense, prune
        self.competitor = Competitor(dense)

    @torch.no_grad()
    def renew_masks(self) -> None:
        """Prunes ceil(prune * weights), the smallest magnitudes of all convolutions; ties go to the earlier weight.

        One weight stays at least, as in the published code. The same weights give the same masks on every rank.
        """
        weights = {name: self.dense.get_parameter(f"{name}.weight") for name in self.competitor.convolutions}
        magnitudes = torch.cat([weight.abs().flatten() for weight in weights.values()])
        pruned = min(math.ceil(self.prune * len(magnitudes)), len(magnitudes) - 1)
        kept = torch.ones_like(magnitudes, dtype=torch.bool)
        kept[magnitudes.sort(stable=True).indices[:pruned]] = False
        parts = kept.split([weight.numel() for weight in weights.values()])
        self.competitor.masks = {
            name: part.view(weight.shape) for (name, weight), part in zip(weights.items(), parts, strict=True)
        }

    def forward(self, views: Tensor) -> Tensor:
        if len(views) < 4:  # BatchNorm of one image is no normalisation
            raise ValueError(
                "train: base.name sdclr must see two images of a rank or more at a time, got 1 "
                "(optim.batch_size, optim.micro_batch)"
            )
        first, second = views.chunk(2)
        tensors = self.competitor.tensors_for(self.dense)
        return torch.cat([self.dense(first), torch.func.functional_call(self.dense, tensors, (second,))])

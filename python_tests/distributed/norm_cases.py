"""BatchNorm over two ranks' rows, for test_train.py."""

import torch
import torch.distributed as dist
from torch import nn

from ltood_fast.train.sync_batchnorm import synchronised

CUT = [3, 5]


def network(images: bool) -> nn.Module:
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(4) if images else nn.BatchNorm1d(4)
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    return nn.Sequential(norm, nn.ReLU())


def rows(images: bool) -> torch.Tensor:
    x = 10 + torch.randn(8, 4, *([3, 3] if images else []), generator=torch.Generator().manual_seed(2))
    return x.requires_grad_()


def outcome(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradients and statistics after two steps and one look in eval mode."""
    for _ in range(2):
        y = model(x)
        loss = (y.pow(3) * torch.arange(1.0, 5).view(1, 4, *[1] * (x.dim() - 2))).sum()
        gradients = torch.autograd.grad(loss, [x, model[0].weight, model[0].bias])
    names = ("x", "weight", "bias")
    found = {"y": y.detach(), **dict(zip(names, gradients, strict=True)), "eval": model.eval()(x).detach()}
    return {**found, **{name: buffer.clone() for name, buffer in model[0].named_buffers()}}


def on_ranks(rank: int, world: int, images: bool) -> dict[str, torch.Tensor]:
    own = rows(images).detach().split(CUT)[rank].requires_grad_()
    found = outcome(synchronised(network(images), torch.device("cpu")), own)
    for name in ("weight", "bias"):
        dist.all_reduce(found[name])
    return found

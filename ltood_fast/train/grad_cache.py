"""The loss of a whole batch with the activations of a part of it in memory [Gao et al. 2021, GradCache].

Embeddings of all parts without a graph; the loss and its gradient at the embeddings; then each part again, with a
graph, which carries its share of that gradient on to the weights. The gradient is that of the whole batch, for a second
forward pass. What BatchNorm does is not the same: a part is normalised by its own statistics, and the running ones move
once a part, in the second pass only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def parts_of(images: int, micro_batch: int, device: torch.device) -> list[Tensor]:
    """Rows of the 2B views, both views of `micro_batch` images a part."""
    both = torch.arange(2 * images, device=device).view(2, images)
    return [part.flatten() for part in both.split(micro_batch, dim=1)]


def cached_backward(
    fabric: Fabric,
    network: nn.Module,
    loss_of: Callable[[nn.Module | Callable[[Tensor], Tensor]], tuple[Tensor, dict[str, Any]]],
    views: Tensor,
    micro_batch: int,
) -> tuple[Tensor, dict[str, Any]]:
    """Adds the gradient of the loss to the parameters of `network`.

    Args:
        fabric: of the network, whose gradients it averages over the ranks after the last part.
        network: views [n, C, H, W] -> embeddings [n, D], as Fabric wraps it.
        loss_of: (network) -> (loss, parts for the log); it is given a network that looks its embeddings up.
        views: [2B, C, H, W]; rows i and i + B are two views of one image.
        micro_batch: images a part.

    Returns:
        The value of `loss_of`, without a graph.
    """
    parts = parts_of(len(views) // 2, micro_batch, views.device)
    states, embeddings = [], []
    with torch.no_grad(), _running_statistics_kept(network):
        for rows in parts:
            states.append(_RandomState())
            embeddings.append(network(views[rows]))
    after = _RandomState()
    z = torch.cat(embeddings)[torch.cat(parts).argsort()].requires_grad_()
    loss, log = loss_of(lambda _: z)
    (gradient,) = torch.autograd.grad(loss, z)
    for place, (rows, state) in enumerate(zip(parts, states, strict=True)):
        state.restore()
        with fabric.no_backward_sync(network, enabled=place + 1 < len(parts)):
            fabric.backward(network(views[rows]), gradient[rows])
    after.restore()
    return loss.detach(), log


class _RandomState:
    """The state of torch's generators, so that the second pass of a part draws what its first pass drew (dropout)."""

    def __init__(self):
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


@contextmanager
def _running_statistics_kept(network: nn.Module) -> Iterator[None]:
    """BatchNorm in training mode that normalises by its batch and learns nothing from it."""
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True

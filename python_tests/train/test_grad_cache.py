"""The embedding cache on one process; two ranks train with it in distributed/test_train.py."""

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

import ltood_fast
from ltood_fast.train.grad_cache import cached_backward, parts_of


class Recorder(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers, self.outputs, self.inputs = nn.Sequential(*layers), [], []

    def forward(self, x):
        self.inputs.append(len(x))
        self.outputs.append(self.layers(x))
        return self.outputs[-1]


def cached(network, views, micro_batch):
    fabric = Fabric(accelerator="cpu", devices=1)
    loss, parts = cached_backward(
        fabric, fabric.setup(network), lambda n: (ltood_fast.nt_xent(n(views)), {}), views, micro_batch
    )
    assert parts == {}
    assert not loss.requires_grad
    return loss


def test_parts_hold_both_views_of_their_images():
    assert [part.tolist() for part in parts_of(5, 2, torch.device("cpu"))] == [[0, 1, 5, 6], [2, 3, 7, 8], [4, 9]]


@pytest.mark.parametrize("micro_batch", [1, 3, 6])
def test_the_gradient_is_that_of_the_whole_batch(micro_batch):
    network, views = Recorder(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4)).double(), torch.randn(12, 5).double()
    expected = ltood_fast.nt_xent(network(views))
    gradients = torch.autograd.grad(expected, list(network.parameters()))
    network.inputs.clear()
    loss = cached(network, views, micro_batch)
    assert torch.allclose(loss, expected, rtol=1e-12)
    assert max(network.inputs) == 2 * micro_batch
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-10, atol=1e-14)


def test_the_second_pass_repeats_the_dropout_of_the_first():
    network, views = Recorder(nn.Linear(5, 8), nn.Dropout(0.5)), torch.randn(12, 5)
    torch.manual_seed(7)
    cached(network, views, 2)
    after = torch.rand(3)
    first, second = network.outputs[:3], network.outputs[3:]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.manual_seed(7)
    for part in parts_of(6, 2, views.device):
        network(views[part])
    assert torch.equal(torch.rand(3), after)


def test_running_statistics_move_once_a_part():
    network, views = Recorder(nn.BatchNorm1d(5)), torch.randn(12, 5)
    norm, alone = network.layers[0], nn.BatchNorm1d(5)
    cached(network, views, 2)
    for part in parts_of(6, 2, views.device):
        alone(views[part])
    assert norm.num_batches_tracked == 3
    assert torch.allclose(norm.running_mean, alone.running_mean)
    assert torch.allclose(norm.running_var, alone.running_var)
    assert norm.track_running_stats

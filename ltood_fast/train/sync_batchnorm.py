"""BatchNorm whose statistics are those of the batch of all ranks, on any device.

torch.nn.SyncBatchNorm computes the same and runs on accelerators only; there it is taken, as it has kernels of its own.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class SyncBatchNorm(_BatchNorm):
    """As nn.BatchNorm1d or 2d, of which it takes parameters, buffers and their names; a rank's batch is not empty."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass  # of 1d and 2d alike

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        y, mean, var, count = _Normalise.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            unbiased = var * (count / (count - 1))
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
        return y


def synchronised(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with every BatchNorm in it replaced; the parameters are the same objects."""
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            norm = SyncBatchNorm(child.num_features, child.eps, child.momentum)
            norm.__dict__.update(_parameters=child._parameters, _buffers=child._buffers, training=child.training)
            setattr(module, name, norm)
        else:
            synchronised(child, device)
    return module


class _Normalise(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, by channel; (y, mean, biased var, values a channel).

    Forward: means and variances of the ranks, weighed by their counts, give those of the batch [Chan 1979]:
    var = sum_r n_r (var_r + (mean_r - mean)^2) / n. Backward, with u = (x - mean) / sqrt(var + eps) and g = dL/du:
    dL/dx = (g - mean(g) - u mean(g u)) / sqrt(var + eps), whose means are of all ranks; weight and bias get the sums of
    this rank, which the gradient averaging of DDP brings together.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        dims = [dim for dim in range(x.dim()) if dim != 1]
        var, mean = torch.var_mean(x.float(), dims, correction=0)
        own = torch.cat([mean.double(), var.double(), mean.new_full((1,), x.numel() / x.shape[1], dtype=torch.float64)])
        of_ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(of_ranks, own)
        of_ranks = torch.stack(of_ranks)
        means, variances, counts = of_ranks.split([len(mean), len(mean), 1], dim=1)
        ctx.count = float(counts.sum())
        mean = (counts * means).sum(0) / ctx.count
        var = (counts * (variances + (means - mean).square())).sum(0) / ctx.count
        scale = (var + eps).rsqrt().float()
        mean, var = mean.float(), var.float()
        u = (x.float() - _by_channel(mean, x)) * _by_channel(scale, x)
        ctx.save_for_backward(u, weight, scale)
        ctx.mark_non_differentiable(mean, var)
        return (u * _by_channel(weight, x) + _by_channel(bias, x)).to(x.dtype), mean, var, ctx.count

    @staticmethod
    def backward(ctx, grad_y, *_):
        u, weight, scale = ctx.saved_tensors
        dims = [dim for dim in range(u.dim()) if dim != 1]
        grad = grad_y.float()
        sums = torch.stack([grad.sum(dims), (grad * u).sum(dims)])
        total = sums.double()
        dist.all_reduce(total)
        mean_grad, mean_grad_u = (total / ctx.count).float()
        inner = grad - _by_channel(mean_grad, u) - u * _by_channel(mean_grad_u, u)
        grad_x = inner * _by_channel(weight.float() * scale, u)
        return grad_x.to(grad_y.dtype), sums[1].to(weight.dtype), sums[0].to(weight.dtype), None


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))

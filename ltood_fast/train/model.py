"""Networks: an encoder from the registry and SimCLR's projection head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .config import ModelConfig


class ContrastiveModel(nn.Module):
    """`embed(images [N, C, H, W])` gives the features [N, F] to evaluate, a call the projections z [N, D] to train."""

    def __init__(self, encoder: nn.Module, n_features: int, hidden: int, out: int, channels_last: bool = False):
        super().__init__()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.encoder = encoder
        # Two linear layers with BatchNorm after each, 512-512-128 for ResNet-18 [paper].
        self.head = nn.Sequential(
            nn.Linear(n_features, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, out, bias=False),
            nn.BatchNorm1d(out),
        )
        self.to(memory_format=self.memory_format)

    def embed(self, images: Tensor) -> Tensor:
        return self.encoder(images.contiguous(memory_format=self.memory_format))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.embed(images))


def _torchvision():
    try:
        import torchvision
    except (ImportError, RuntimeError, OSError) as error:  # a build for another torch fails in any of these ways
        reason = str(error).splitlines()[0]
        raise ImportError(
            f"model: this encoder needs torchvision, which cannot be imported ({reason}): install the torchvision "
            f"built for torch {torch.__version__} or choose --model.encoder tiny_conv"
        ) from error
    return torchvision


def _resnet(name: str, config: ModelConfig, channels: int) -> tuple[nn.Module, int]:
    encoder = getattr(_torchvision().models, name)(weights=None)
    if config.stem == "cifar":
        encoder.conv1 = nn.Conv2d(channels, 64, kernel_size=3, stride=1, padding=1, bias=False)
        encoder.maxpool = nn.Identity()
    elif channels != 3:
        encoder.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
    n_features = encoder.fc.in_features
    encoder.fc = nn.Identity()
    return encoder, n_features


def _small_resnet(config: ModelConfig, channels: int) -> tuple[nn.Module, int]:
    """Four stages of one basic block, widths w, 2w, 4w, 8w, each but the first at half the size."""
    block = _torchvision().models.resnet.BasicBlock
    widths = [config.width << stage for stage in range(4)]
    layers = _conv(channels, widths[0], stride=1)
    before = widths[0]
    for width in widths:
        stride = 1 if width == widths[0] else 2
        shortcut = None
        if width != before:
            shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        layers.append(block(before, width, stride, shortcut))
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), before


def _tiny_conv(config: ModelConfig, channels: int) -> tuple[nn.Module, int]:
    """Three convolutions, widths w, 2w, 4w: the smallest network that learns digits; needs torch alone."""
    w = config.width
    layers = _conv(channels, w, 2) + _conv(w, 2 * w, 2) + _conv(2 * w, 4 * w, 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 4 * w


def _conv(before: int, width: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]


# name -> function of (ModelConfig, channels of an image) that returns (encoder, features)
ENCODERS: dict[str, Callable[[ModelConfig, int], tuple[nn.Module, int]]] = {
    "resnet18": lambda config, channels: _resnet("resnet18", config, channels),
    "resnet50": lambda config, channels: _resnet("resnet50", config, channels),
    "small_resnet": _small_resnet,
    "tiny_conv": _tiny_conv,
}


def make_model(config: ModelConfig, channels: int) -> ContrastiveModel:
    """The network of a configuration for images of `channels` channels, its weights from torch's global RNG.

    Raises:
        ImportError: the encoder comes from torchvision and torchvision cannot be imported.
    """
    encoder, n_features = ENCODERS[config.encoder](config, channels)
    return ContrastiveModel(encoder, n_features, config.hidden, config.out, config.channels_last)

"""The network that is trained: an encoder and SimCLR's projection head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import ModelConfig
from .encoders import make_encoder

ANY_SIZE = 32  # of an encoder that takes images of any size


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


def make_model(config: ModelConfig, channels: int, image_size: int = ANY_SIZE) -> ContrastiveModel:
    """The network of a configuration for images of `channels` channels, its weights from torch's global RNG.

    Raises:
        ConfigError, ImportError: as `encoders.make_encoder`.
    """
    encoder, n_features = make_encoder(config, channels, image_size)
    return ContrastiveModel(encoder, n_features, config.hidden, config.out, config.channels_last)

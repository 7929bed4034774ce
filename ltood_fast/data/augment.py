"""SimCLR's augmentation of whole batches on their device.

kornia rather than torchvision's transforms: it draws other random numbers for every image of a batch, on any device,
where torchvision draws once for the batch or needs a loop over images. All randomness comes from torch's global RNG, so
the RNG state in a checkpoint is enough to repeat it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..train.config import AugmentConfig

MEAN, STD = 0.5, 0.25  # [ours] one pair for every set: BatchNorm follows


def _scaled(images: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1]."""
    return images.float() / 255


class EvalTransform(nn.Module):
    """uint8 [B, C, H, W] -> float [B, C, H, W] as evaluation sees it."""

    def forward(self, images: Tensor) -> Tensor:
        return (_scaled(images) - MEAN) / STD


class Augment(nn.Module):
    """uint8 [B, C, H, W] -> one random view of each image, float [B, C, H, W].

    Random resized crop, flip, and, by their options, colour jitter, grey, blur [Chen 2020, appendix A]. Images of one
    channel get brightness and contrast jitter instead of colour jitter and grey.
    """

    def __init__(self, config: AugmentConfig, image_size: int):
        super().__init__()
        import kornia.augmentation as K

        size, strength = (image_size, image_size), config.jitter
        self.crop = K.RandomResizedCrop(size, scale=(config.crop_min, config.crop_max))
        self.flip = K.RandomHorizontalFlip(p=config.flip)
        near_one = (max(0.0, 1 - strength), 1 + strength)
        self.grey_jitter = nn.Sequential(
            K.RandomBrightness(near_one, p=config.jitter_p), K.RandomContrast(near_one, p=config.jitter_p)
        )
        self.color_jitter = nn.Sequential(
            K.ColorJitter(strength, strength, strength, strength / 4, p=config.jitter_p),
            K.RandomGrayscale(p=config.gray_p),
        )
        kernel = max(3, image_size // 10 | 1)
        self.blur = K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=config.blur_p) if config.blur_p else None

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        x = self.flip(self.crop(_scaled(images)))
        x = (self.grey_jitter if x.shape[1] == 1 else self.color_jitter)(x)
        if self.blur is not None:
            x = self.blur(x)
        return (x.clamp(0, 1) - MEAN) / STD


def make_augment(config: AugmentConfig, image_size: int) -> nn.Module:
    return Augment(config, image_size)


def make_eval_transform(image_size: int) -> nn.Module:
    return EvalTransform()

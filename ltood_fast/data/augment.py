"""SimCLR's augmentation of whole batches on their device.

kornia rather than torchvision's transforms: it draws other random numbers for every image of a batch, on any device,
where torchvision draws once for the batch or needs a loop over images. The numbers come from torch's global CPU
generator, also when the images are on a GPU, so that one RNG state in a checkpoint repeats them. (Only the order of the
four colour jitters is drawn once a batch, not once an image.) Where a batch lies on several ranks, each draws the
numbers of the whole batch and takes its images' ones: the views do not depend on how many ranks there are. The crop
warps the whole batch at once: kornia's default, one slice and one resize an image, takes half as long again at 32x32.

Views a second of CPU time, one thread of a Zen 4 core (`python -m benchmarks input` measures the same): at 32 pixels
this module 5,200 to 5,900, torchvision's v2 transforms image by image 930 to 1,400; at 224 pixels both about 105.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..train.config import AugmentConfig

MEAN, STD = 0.5, 0.25  # [ltood_fast] one pair for every set: BatchNorm follows


def _scaled(images: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1]."""
    return images.float() / 255


def _normalized(images: Tensor) -> Tensor:
    return (images - MEAN) / STD


class EvalTransform(nn.Module):
    """uint8 [B, C, H, W] -> float [B, C, size, size] as evaluation sees it: the middle."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        top, left = ((side - self.size) // 2 for side in images.shape[-2:])
        images = images[..., top : top + self.size, left : left + self.size]
        return _normalized(_scaled(images))


class ProbeAugment(nn.Module):
    """uint8 [B, C, H, W] -> float [B, C, size, size]: what a linear probe learns from in the baselines' code.

    At up to 64 pixels a shift by up to an eighth of the side over black borders, above that a random resized crop; and
    a flip.
    """

    def __init__(self, size: int):
        super().__init__()
        import kornia.augmentation as K

        if size <= 64:
            self.crop = K.RandomCrop((size, size), padding=size // 8, cropping_mode="resample")
        else:
            self.crop = K.RandomResizedCrop((size, size), scale=(0.08, 1.0), cropping_mode="resample")
        self.flip = K.RandomHorizontalFlip(p=0.5)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return _normalized(self.flip(self.crop(_scaled(images))))


class Color(nn.Module):
    """Colour jitter (brightness, contrast, saturation, hue as torchvision defines them) and grey [Chen 2020].

    Images of one channel pass as grey RGB ones and get brightness and contrast only.
    """

    def __init__(self, strength: float, jitter_p: float, gray_p: float):
        super().__init__()
        import kornia.augmentation as K

        self.rgb = nn.ModuleList(
            [K.ColorJitter(strength, strength, strength, strength / 4, p=jitter_p), K.RandomGrayscale(p=gray_p)]
        )
        self.grey = K.ColorJitter(strength, strength, p=jitter_p)

    def forward(self, images: Tensor, first: int, batch: int) -> Tensor:
        if images.shape[1] == 1:
            return _augment(self.grey, images.expand(-1, 3, -1, -1), first, batch)[:, :1]
        for step in self.rgb:
            images = _augment(step, images, first, batch)
        return images


OF_THE_BATCH = ("order", "forward_input_shape")  # kornia's parameters that are not one row an image


def _augment(step: nn.Module, images: Tensor, first: int, batch: int) -> Tensor:
    """One of kornia's steps on the images first, first + 1, ... of a batch, with the random numbers of all of it."""
    drawn = step.forward_parameters(torch.Size((batch, *images.shape[1:])))
    if len(images) < batch:
        for name in drawn.keys() - set(OF_THE_BATCH):
            if len(drawn[name]) != batch:
                raise RuntimeError(
                    f"augment: {name} of kornia's {type(step).__name__} must be drawn for each of {batch} images, got "
                    f"{len(drawn[name])} numbers: this version of kornia cannot augment a part of a batch"
                )
            drawn[name] = drawn[name][first : first + len(images)]
    return step(images, params=drawn)


class Augment(nn.Module):
    """uint8 [B, C, H, W] -> one random view of each image, float [B, C, H, W].

    Random resized crop, flip, and, by their options, rotation and shift, colour jitter, grey, blur. The blur is
    SimCLR's: sigma 0.1 to 2, a kernel of a tenth of the image.
    """

    def __init__(self, config: AugmentConfig, image_size: int):
        super().__init__()
        import kornia.augmentation as K

        size, shift = (image_size, image_size), config.shift
        steps = [K.RandomResizedCrop(size, scale=(config.crop_min, config.crop_max), cropping_mode="resample")]
        if config.flip:
            steps.append(K.RandomHorizontalFlip(p=config.flip))
        if config.rotate or shift:
            steps.append(K.RandomAffine(config.rotate, translate=(shift, shift) if shift else None, p=1.0))
        if config.jitter_p or config.gray_p:
            steps.append(Color(config.jitter, config.jitter_p, config.gray_p))
        if config.blur_p:
            kernel = max(3, image_size // 10 | 1)
            steps.append(K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=config.blur_p))
        self.steps = nn.ModuleList(steps)

    @torch.no_grad()
    def forward(self, images: Tensor, first: int = 0, batch: int | None = None) -> Tensor:
        """The images may be those from number `first` on of a batch of `batch`, the rest of which is elsewhere."""
        views, batch = _scaled(images), len(images) if batch is None else batch
        for step in self.steps:
            views = step(views, first, batch) if isinstance(step, Color) else _augment(step, views, first, batch)
        return _normalized(views)


def make_augment(config: AugmentConfig, image_size: int) -> nn.Module:
    """The training transform: see `Augment`. Its randomness comes from torch's global RNG."""
    return Augment(config, image_size)


def make_eval_transform(image_size: int) -> nn.Module:
    """The transform of evaluation: the middle of `image_size` pixels, scaled and normalised, nothing random."""
    return EvalTransform(image_size)


def make_probe_augment(image_size: int) -> nn.Module:
    """See `ProbeAugment`. Its randomness comes from torch's global RNG."""
    return ProbeAugment(image_size)

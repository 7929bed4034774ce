"""What all stages of a run share: configuration, device, data, and how images become batches and features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .config import Config, RunConfig
from .model import ContrastiveModel, make_model

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from ..data import DataBundle


def make_fabric(run: RunConfig) -> Fabric:
    """Device and precision through Lightning Fabric.

    Fabric rather than Accelerate or code of our own: it owns precision, device and (later) the launch of several ranks
    and nothing else, so the loop and the state of a run stay visible here, which a bit-exact resume needs.

    Raises:
        RuntimeError: a CUDA device was asked for and there is none.
    """
    from lightning_fabric import Fabric

    if run.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            "train: run.device must be a device of this machine, got cuda, and torch finds no CUDA device"
        )
    if run.threads:
        torch.set_num_threads(run.threads)
    cuda = run.device != "cpu" and torch.cuda.is_available()
    fabric = Fabric(accelerator="cuda" if cuda else "cpu", devices=1, precision=run.precision)
    fabric.launch()
    return fabric


EMBED_BATCH = 512  # images at a time in eval mode


@dataclass(frozen=True)
class Session:
    config: Config
    run_dir: Path
    fabric: Fabric
    data: DataBundle
    augment: nn.Module
    """uint8 [B, C, H, W] -> a random view, float [B, C, H, W]"""
    transform: nn.Module
    """uint8 [B, C, H, W] -> the image as evaluation sees it"""

    @classmethod
    def open(cls, config: Config, run_dir: Path) -> Session:
        from ..data import load_data, make_augment, make_eval_transform

        fabric = make_fabric(config.run)
        data = load_data(config.data)
        size = config.data.image_size
        return cls(
            config,
            run_dir,
            fabric,
            data,
            fabric.to_device(make_augment(config.augment, size)),
            fabric.to_device(make_eval_transform(size)),
        )

    @property
    def device(self) -> torch.device:
        return self.fabric.device

    @property
    def channels(self) -> int:
        return self.data.train.images.shape[1]

    def new_model(self) -> ContrastiveModel:
        return self.fabric.to_device(make_model(self.config.model, self.channels))

    def images(self, rows: Tensor) -> Tensor:
        """uint8 [B, C, H, W] on the device, of rows in [0, N_id) = ID images, [N_id, N_id + N_ood) = the OOD pool."""
        train, ood = self.data.train.images, self.data.ood
        is_ood = rows >= len(train)
        batch = torch.empty(len(rows), *train.shape[1:], dtype=train.dtype)
        batch[~is_ood] = train[rows[~is_ood]]
        if ood is not None:
            batch[is_ood] = ood.images[rows[is_ood] - len(train)]
        return self.fabric.to_device(batch)

    def two_views(self, rows: Tensor) -> Tensor:
        """float [2B, C, H, W]: row i and row i + B are two random views of one image."""
        images = self.images(rows)
        return torch.cat([self.augment(images), self.augment(images)])

    def embed(self, model: ContrastiveModel, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and projections, see `embed`."""
        return embed(model, images, self.fabric, self.transform)


@torch.no_grad()
def embed(model: ContrastiveModel, images: Tensor, fabric: Fabric, transform: nn.Module) -> tuple[Tensor, Tensor]:
    """Features [N, F] and projections [N, D], float32 on the device, of uint8 images [N, C, H, W], in eval mode."""

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in images.split(EMBED_BATCH):
            views = transform(fabric.to_device(batch))
            with fabric.autocast():
                features = model.embed(views)
                yield features.float(), model.head(features).float()

    was_training = model.training
    model.eval()
    features, projections = zip(*batches(), strict=True)
    model.train(was_training)
    return torch.cat(features), torch.cat(projections)

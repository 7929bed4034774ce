"""The state that all stages of a run share: configuration, device, data, and how images become batches and features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._progress import progress_bar, progress_shown
from ..ops._group import RankLayout
from ..ops._shards import fetch, shards_of
from .config import Config, RunConfig
from .model import ContrastiveModel, make_model
from .ranks import launched_ranks, own_part

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from ..data import DataBundle, ImageFiles, Reader


def make_fabric(run: RunConfig) -> Fabric:
    """Device, precision and ranks through Lightning Fabric.

    Fabric rather than Accelerate or code of our own: it owns precision, device and the joining of the ranks that
    torchrun started (DDP; NCCL on GPUs, else gloo) and nothing else, so the loop and the state of a run stay visible
    here, which a bit-exact resume needs.

    Raises:
        RuntimeError: run.device is cuda and there is no CUDA device.
    """
    from lightning_fabric import Fabric

    if run.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            "train: run.device must be a device of this machine, got cuda, and torch finds no CUDA device"
        )
    if run.threads:
        torch.set_num_threads(run.threads)
    cuda = run.device != "cpu" and torch.cuda.is_available()
    _, ranks, on_machine = launched_ranks()
    options: dict[str, object] = {}
    if ranks > 1:
        from lightning_fabric.strategies import DDPStrategy

        # Every rank's BatchNorm moves by the same statistics, or (model.sync_batchnorm off) rank 0's are taken.
        options["strategy"] = DDPStrategy(
            process_group_backend="nccl" if cuda else "gloo", timeout=timedelta(seconds=run.timeout)
        )
        options["num_nodes"] = ranks // on_machine
    precision = resolve_precision(run.precision, cuda)
    fabric = Fabric(accelerator="cuda" if cuda else "cpu", devices=on_machine, precision=precision, **options)
    fabric.launch()
    return fabric


def resolve_precision(precision: str, cuda: bool) -> str:
    """`auto` as what the device computes in hardware."""
    if precision != "auto":
        return precision
    if cuda:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))
    return "bf16-mixed" if fast else "32-true"


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
        from ..data import load_data, make_augment, make_eval_transform, put_on_device

        fabric = make_fabric(config.run)
        with progress_shown(config.run.progress and fabric.global_rank == 0):
            data = put_on_device(load_data(config.data), fabric.device, config.data.on_device)
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
    def rank(self) -> int:
        return self.fabric.global_rank

    @property
    def ranks(self) -> int:
        return self.fabric.world_size

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The argument `group` of the losses and the sampler."""
        return dist.group.WORLD if self.ranks > 1 else None

    @property
    def channels(self) -> int:
        return self.data.train.images.shape[1]

    @property
    def n_id(self) -> int:
        return len(self.data.train)

    @property
    def n_ood(self) -> int:
        """0 without an OOD set."""
        return 0 if self.data.ood is None else len(self.data.ood)

    def new_model(self) -> ContrastiveModel:
        return self.fabric.to_device(make_model(self.config.model, self.channels, self.config.data.image_size))

    def images(self, rows: Tensor) -> Tensor:
        """uint8 [B, C, H, W] on the device, of rows in [0, N_id) = ID images, [N_id, N_id + N_ood) = the OOD pool."""
        if self.data.pool is not None:
            return self.data.pool[rows.to(self.device)]
        return self.fabric.to_device(self._reader[rows])

    def expect(self, batches: list[Tensor]) -> None:
        """The rows of an epoch's batches, in order, for workers to decode before `images` reads them."""
        if self.data.pool is None:
            self._reader.expect(batches)

    @cached_property
    def _reader(self) -> Reader:
        from ..data import Reader

        sets = (self.data.train, self.data.ood)
        return Reader([part.images for part in sets if part is not None])

    def two_views(self, rows: Tensor, first: int = 0, batch: int | None = None) -> Tensor:
        """float [2B, C, H, W]: row i and row i + B are two random views of one image.

        The rows may be those from number `first` on of a batch of `batch`, whose others are on other ranks.
        """
        images = self.images(rows)
        return torch.cat([self.augment(images, first, batch), self.augment(images, first, batch)])

    def embed(self, model: ContrastiveModel, images: Tensor | ImageFiles) -> tuple[Tensor, Tensor]:
        """Features and projections of all images, see `embed`."""
        with progress_shown(self.config.run.progress and self.rank == 0):
            return embed(model, images, self.fabric, self.transform)

    def embed_part(self, model: ContrastiveModel, images: Tensor | ImageFiles) -> tuple[Tensor, Tensor]:
        """The same of this rank's part of the images, which `gather` and `fetch` bring together."""
        return self.embed(model, images[own_part(len(images))])

    def gather(self, part: Tensor) -> Tensor:
        """All rows of what lies on the ranks in parts."""
        return part if self.group is None else self._layout(part).gather(part)

    def fetch(self, part: Tensor, rows: Tensor) -> Tensor:
        """Some rows of it, on every rank."""
        return part[rows] if self.group is None else fetch(self._layout(part), part, rows)

    def _layout(self, part: Tensor) -> RankLayout:
        return shards_of("session", self.group, part)


@torch.no_grad()
def embed(
    model: ContrastiveModel, images: Tensor | ImageFiles, fabric: Fabric, transform: nn.Module
) -> tuple[Tensor, Tensor]:
    """Features [N, F] and projections [N, D], float32 on the device, of uint8 images [N, C, H, W], in eval mode."""

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in images.split(EMBED_BATCH):
            views = transform(fabric.to_device(batch))
            with fabric.autocast():
                features = model.embed(views)
                yield features.float(), model.head(features).float()

    was_training = model.training
    model.eval()
    features, projections = [], []
    with progress_bar(len(images), "embed") as bar:
        for part, part_projections in batches():
            features.append(part)
            projections.append(part_projections)
            bar.update(len(part))
    model.train(was_training)
    return torch.cat(features), torch.cat(projections)

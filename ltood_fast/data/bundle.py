"""From a configuration to the four sets of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .image_set import DataBundle, DataError, ImageSet
from .longtail import make_long_tailed, read_split
from .sources import open_set

if TYPE_CHECKING:
    from ..train.config import DataConfig


def load_data(config: DataConfig) -> DataBundle:
    """The sets that `config` names.

    ID sets: `digits` (its training, probe and test parts share no image), `cifar10`, `cifar100` and `folder:PATH`
    (`PATH/train`, and `PATH/test` or `PATH/val`, one folder a class), whose probe learns from the whole balanced
    training part [source], and `list` (the `*_list` files). The long tail comes from `split` or `imbalance`, or from
    the list itself. OOD sets: all of these, and `letters` and `npy:PATH`.

    Raises:
        DataError: one sentence on what is missing, broken or does not fit.
    """
    train, probe, test = _lists(config) if config.id == "list" else _parts(config)
    for name, images in (("train", train), ("probe", probe), ("test", test)):
        if bool((images.labels < 0).any()):
            raise DataError(f"data: {name} set must be labelled (labels are for evaluation only), got {images.name}")
    n_classes = max(len(s.class_names) for s in (train, probe, test))
    names = next(s.class_names for s in (probe, train, test) if len(s.class_names) == n_classes)
    train, probe, test = (replace(s, class_names=names) for s in (train, probe, test))
    for name, images in (("probe", probe), ("test", test)):
        if missing := [names[c] for c in (images.class_counts() == 0).nonzero().flatten()]:
            raise DataError(f"data: {name} set must hold every class, got none of {', '.join(missing[:5])}")
    return DataBundle(train, _ood(config, train.images.shape[1]), probe, test)


def _open(config: DataConfig, spec: str, part: str = "train", root: str | None = None) -> ImageSet:
    return open_set(
        spec,
        root=config.root if root is None else root,
        part=part,
        image_size=config.image_size,
        cache_dir=config.cache_dir,
        limit=config.ood_size,
        seed=config.seed,
    )


def _lists(config: DataConfig) -> tuple[ImageSet, ImageSet, ImageSet]:
    for key in ("id_list", "probe_list", "test_list"):
        if not getattr(config, key):
            raise DataError(f"data: data.{key} must be the path of a list when data.id is list, got none")
    train = _long_tail(config, _open(config, f"list:{config.id_list}"))
    return train, _open(config, f"list:{config.probe_list}"), _open(config, f"list:{config.test_list}")


def _parts(config: DataConfig) -> tuple[ImageSet, ImageSet, ImageSet]:
    kind, _, path = config.id.partition(":")
    if kind in ("letters", "npy"):
        raise DataError(f"data: data.id must be a set with a training and a test part, got {config.id!r}")
    if kind != "folder":
        train, probe, test = (_open(config, config.id, part) for part in ("train", "probe", "test"))
        return _long_tail(config, train), probe, test
    folder = Path(config.root) / path
    held_out = next((p for p in ("test", "val") if (folder / p).is_dir()), None)
    if held_out is None or not (folder / "train").is_dir():
        raise DataError(f"data: {config.id} must hold the folders train, and test or val, got {folder}")
    whole = _open(config, f"folder:{path}/train")
    return _long_tail(config, whole), whole, _open(config, f"folder:{path}/{held_out}")


def _long_tail(config: DataConfig, whole: ImageSet) -> ImageSet:
    if config.split:
        return whole.subset(read_split(Path(config.root) / config.split, len(whole)))
    if config.imbalance in (0, 1):
        return whole
    return make_long_tailed(whole, config.imbalance, config.seed, config.class_order)


def _ood(config: DataConfig, channels: int) -> ImageSet | None:
    if not config.ood:
        return None
    spec = config.ood
    if spec == "list":
        if not config.ood_list:
            raise DataError("data: data.ood_list must be the path of a list when data.ood is list, got none")
        spec = f"list:{config.ood_list}"
    pool = _open(config, spec, root=config.ood_root or config.root)
    if config.ood_size and len(pool) > config.ood_size:
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(config.seed))
        pool = pool.subset(order[: config.ood_size].sort().values)
    return replace(pool, images=with_channels(pool.images, channels))


def with_channels(images: torch.Tensor, channels: int) -> torch.Tensor:
    """The OOD images in the colours of the ID ones: grey repeated to RGB, or RGB to luma (ITU-R 601)."""
    if images.shape[1] == channels:
        return images
    if images.shape[1] == 1:
        return images.expand(-1, channels, -1, -1)
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return torch.cat([(p * luma).sum(1, keepdim=True).round().to(torch.uint8) for p in images.split(4096)])

"""From a configuration to the four sets of a run."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .image_files import ImageFiles
from .image_set import DataBundle, DataError, ImageSet, user_path
from .longtail import make_long_tailed, read_split
from .sources import POOLS, image_files, labels_by_class_folder, open_set, read_list

if TYPE_CHECKING:
    from ..train.config import DataConfig


def load_data(config: DataConfig) -> DataBundle:
    """The sets that `config` names.

    ID sets: `digits` (its training, probe and test parts share no image), `cifar10`, `cifar100` and `folder:PATH`
    (`PATH/train`, and `PATH/test` or `PATH/val`, one folder a class), whose probe learns from the whole balanced
    training part [paper] or from the rows of `probe_split`, and `list` (the `*_list` files). Any other folder gets a
    test part by `drawn_parts`. The long tail comes from
    `split` or `imbalance`, or from the list itself. OOD sets: all of these, `letters`, `noise`, `npy:PATH` and
    the pools known by name (`random_images`, `imagenet_r`, `places_extra69`). A list's own path is relative to the
    working folder, every other one to the root.

    Raises:
        DataError: one sentence on what is missing, broken or does not fit.
    """
    if (folder := _folder_without_test(config)) is not None:
        train, labelled, test = _drawn(config, folder)
        probe = _rows(config, labelled, config.probe_split) if config.probe_split else labelled
        return DataBundle(train, _ood(config, train.images.shape[1]), probe, test, labelled)
    train, probe, test = _lists(config) if config.id == "list" else _parts(config)
    n_classes = max(len(s.class_names) for s in (train, probe, test))
    names = next(s.class_names for s in (probe, train, test) if len(s.class_names) == n_classes)
    train, labelled, test = (replace(s, class_names=names) for s in (train, probe, test))
    probe = _rows(config, labelled, config.probe_split) if config.probe_split else labelled
    for name, images in (("probe", probe), ("test", test)):
        if missing := [names[c] for c in (images.class_counts() == 0).nonzero().flatten()]:
            raise DataError(f"data: {name} set must hold every class, got none of {', '.join(missing[:5])}")
    return DataBundle(train, _ood(config, train.images.shape[1]), probe, test, labelled)


def _open(config: DataConfig, spec: str, part: str = "train", root: str | None = None) -> ImageSet:
    return open_set(
        spec,
        root=config.root if root is None else root,
        part=part,
        image_size=config.decode_size or config.image_size,
        cache_dir=config.cache_dir,
        workers=config.workers,
        limit=config.ood_size,
        seed=config.seed,
    )


def _lists(config: DataConfig) -> tuple[ImageSet, ImageSet, ImageSet]:
    paths = [_list_path(config, "id", key) for key in ("id_list", "probe_list", "test_list")]
    for path in paths:
        # Classes by folder, the resort of a list without labels, could mean another class in each list.
        if path.is_file() and min(read_list(path)[1]) < 0:
            raise DataError(f"data: list must label every image (for evaluation only), got some without in {path}")
    whole, probe, test = (_open(config, f"list:{path}") for path in paths)
    return _long_tail(config, whole), probe, test


def _list_path(config: DataConfig, user: str, key: str) -> Path:
    if not (path := getattr(config, key)):
        raise DataError(f"data: data.{key} must be the path of a list when data.{user} is list, got none")
    return user_path(path)


def _parts(config: DataConfig) -> tuple[ImageSet, ImageSet, ImageSet]:
    kind, _, path = config.id.partition(":")
    if kind in POOLS:
        hint = " (plain `list` reads data.id_list, data.probe_list, data.test_list)" if kind == "list" else ""
        raise DataError(f"data: data.id must be a set with a training and a test part, got {config.id!r}{hint}")
    if kind != "folder":
        train, probe, test = (_open(config, config.id, part) for part in ("train", "probe", "test"))
        return _long_tail(config, train), probe, test
    folder = _id_folder(config, path)
    held_out = _held_out(folder)
    if not (folder / "train").is_dir():
        raise DataError(f"data: {folder} must hold the folder train in addition to {held_out}, got {held_out} alone")
    whole, test = (_open(config, f"folder:{folder / part}") for part in ("train", held_out))
    for images in (whole, test):
        if bool((images.labels < 0).any()):
            raise DataError(f"data: images of {folder / images.name} must lie in class folders, got some outside")
    if alone := sorted(set(whole.class_names) ^ set(test.class_names)):
        names = ", ".join(alone[:5])
        raise DataError(f"data: train and {held_out} in {folder} must hold the same classes, got {names} in one only")
    return _long_tail(config, whole), whole, test


def _id_folder(config: DataConfig, path: str) -> Path:
    if not path:
        raise DataError(f"data: data.id must be folder:PATH, got {config.id!r}")
    return (user_path(config.root) / user_path(path)).absolute()


def _held_out(folder: Path) -> str | None:
    return next((part for part in ("test", "val") if (folder / part).is_dir()), None)


def _folder_without_test(config: DataConfig) -> Path | None:
    """The folder of training images, where `data.id` is one that holds no test part."""
    kind, _, path = config.id.partition(":")
    if kind != "folder":
        return None
    folder = _id_folder(config, path)
    if _held_out(folder) is not None:
        return None
    return folder / "train" if (folder / "train").is_dir() else folder


def training_files(folder: Path, fraction: float, seed: int) -> list[Path]:
    """The training images of `folder:FOLDER`, before any imbalance.

    Raises:
        DataError: no such folder, or no image in it.
    """
    root = folder / "train" if (folder / "train").is_dir() else folder
    files = image_files(root)
    if _held_out(folder) is not None:
        return files
    labels, names = labels_by_class_folder(root, files)
    is_test = draw_test(labels if len(names) > 1 else torch.full_like(labels, -1), fraction, seed)
    return [file for file, test in zip(files, is_test.tolist(), strict=True) if not test]


def _drawn(config: DataConfig, folder: Path) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Training, probe and test images of a folder without a test part. Where it tells fewer than two classes apart, the
    three have no labels, and the probe set is the training set."""
    whole = _open(config, f"folder:{folder}")
    if len(whole.class_names) < 2:
        whole = whole.without_labels()
    is_test = draw_test(whole.labels, config.test_fraction, config.seed)
    parts = int((~is_test).sum()), int(is_test.sum())
    if min(parts) < 2:
        raise DataError(
            f"data: {folder} must leave two images to train on and two to test with data.test_fraction "
            f"{config.test_fraction}, got {parts[0]} and {parts[1]}"
        )
    train, test = (whole.subset(rows.nonzero().flatten()) for rows in (~is_test, is_test))
    if not whole.class_names:
        return _long_tail(config, train), train, test
    labelled = (train.labels >= 0).nonzero().flatten()
    if len(labelled) < len(train):
        warnings.warn(
            f"data: {len(train) - len(labelled)} images in {folder} lie in no class folder; they are trained on, and "
            "take no part in the evaluation",
            stacklevel=3,
        )
    probe = train.subset(labelled) if len(labelled) < len(train) else train
    if untested := [whole.class_names[c] for c in (test.class_counts() == 0).nonzero().flatten()]:
        warnings.warn(
            f"data: a class of one image has none to test and counts in no accuracy: {', '.join(untested[:5])} "
            f"({len(untested)} in all)",
            stacklevel=3,
        )
    return _long_tail(config, train), probe, test


def draw_test(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """bool [N], the rows of the test set: of each class the fraction, rounded, but at least one image and not all.

    A class of one image is not tested. Rows without a label are drawn from only where no row has one.
    """
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    classes = labels.unique()
    for c in classes[classes >= 0] if bool((labels >= 0).any()) else classes:
        rows = (labels == c).nonzero().flatten()
        n = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
        is_test[rows[torch.randperm(len(rows), generator=generator)[:n]]] = True
    return is_test


def _rows(config: DataConfig, whole: ImageSet, split: str) -> ImageSet:
    """Those of an official split."""
    return whole.subset(read_split(user_path(config.root) / split, len(whole)))


def _long_tail(config: DataConfig, whole: ImageSet) -> ImageSet:
    if config.split:
        return _rows(config, whole, config.split)
    if config.imbalance in (0, 1):
        return whole
    return make_long_tailed(whole, config.imbalance, config.seed, config.class_order)


def _ood(config: DataConfig, channels: int) -> ImageSet | None:
    if not config.ood:
        return None
    spec = config.ood
    if spec == "list":
        spec = f"list:{_list_path(config, 'ood', 'ood_list')}"
    pool = _open(config, spec, root=config.ood_root or config.root)
    if config.ood_size and len(pool) > config.ood_size:
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(config.seed))
        pool = pool.subset(order[: config.ood_size].sort().values)
    return replace(pool, images=with_channels(pool.images, channels))


def with_channels(images: torch.Tensor | ImageFiles, channels: int) -> torch.Tensor | ImageFiles:
    """The OOD images in the colours of the ID ones: grey repeated to RGB, or RGB to luma (ITU-R 601).

    Raises:
        DataError: colour files that workers decode, for grey ID images.
    """
    if images.shape[1] == channels:
        return images
    if isinstance(images, ImageFiles):
        raise DataError("data: data.workers must be 0 for a large OOD set in colour with grey ID images")
    if images.shape[1] == 1:
        return images.expand(-1, channels, -1, -1)
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return torch.cat([(p * luma).sum(1, keepdim=True).round().to(torch.uint8) for p in images.split(4096)])

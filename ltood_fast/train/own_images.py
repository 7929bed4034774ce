"""One's own folder of images as a run: what a preset cannot know is set by rules from the images, all [ltood_fast].

    image size    the largest of SIZES that the median image's shorter side reaches; at most 64 without a GPU
    encoder       resnet18 on a GPU, small_resnet without one; 3x3 stem up to 64 pixels
    batch         a power of two, at most 256 and a quarter of the images; rate 0.5 for 512, in proportion [paper]
    budget        min(N_b, pool), N_b the number of ID images, at most 10,000 [paper]
    clusters      sqrt(N / 2), at most 10 [COLT] and at least 2
    stages        the two of the method with a pool, SimCLR without one

Keys that are given stand, but a budget above the pool is cut to it.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import DataConfig, parse_key

PRESET = "own_images"
SIZES = (32, 48, 64, 96, 128, 160, 224)
SMALLEST_SIZE, LARGEST_ON_CPU = 8, 64
MEASURED_IMAGES = 200  # spread over the folder; reads their headers alone
MOST_BUDGET, MOST_CLUSTERS, MOST_BATCH = 10_000, 10, 256
BLUR_FROM = 96  # pixels; blur helps large images and is left out on CIFAR [Chen 2020]


@dataclass(frozen=True)
class OwnImages:
    """The facts about the folders that the rules go by."""

    n_train: int
    n_pool: int
    """0: no pool."""
    side: int
    """Median of the shorter sides, in pixels."""
    on_gpu: bool


def own_overrides(images: Path, ood: Path | None, given: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """(overrides of the configuration, one line that says what was chosen) for a folder and a pool.

    Args:
        given: keys of the configuration that the user has set, with values as in YAML or as strings.

    Raises:
        DataError: a folder does not exist or holds no image, or an image cannot be read.
    """
    import torch

    from ..data.bundle import training_files
    from ..data.sources import image_files

    given = {key: parse_key(key, value) for key, value in given.items()}
    fraction, seed = (given.get(f"data.{key}", getattr(DataConfig, key)) for key in ("test_fraction", "seed"))
    train = training_files(images.absolute(), fraction, seed)
    pool = image_files(ood.absolute()) if ood else []
    on_gpu = given.get("run.device", "auto") != "cpu" and torch.cuda.is_available()
    own = OwnImages(len(train), len(pool), _median_side(train), on_gpu)
    folders = {"data.id": f"folder:{images.absolute()}", "data.ood": f"folder:{ood.absolute()}" if ood else ""}
    values = {**folders, **rules(own, given), **given}
    if ood is not None:
        values["stage1.budget"] = _budget(own, values["stage1.budget"])
    named = ("data.image_size", "model.encoder", "optim.batch_size", "stage1.clusters", "stage1.budget", "stages")
    shown = {
        key: ",".join(value) if isinstance(value := values[key], tuple) else value for key in named if key in values
    }
    said = ", ".join(f"{key} {value}" for key, value in shown.items())
    return values, f"{len(train)} training images, {len(pool) or 'no'} OOD images: {said} (any key can be set)"


def rules(own: OwnImages, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that follow from the images; those that are given decide those that depend on them."""
    size = given.get("data.image_size", image_size(own))
    batch = given.get("optim.batch_size", batch_size(own.n_train))
    clusters = clusters_for(own.n_train)
    values = {
        "data.image_size": size,
        "augment.blur_p": 0.5 if size >= BLUR_FROM else 0.0,
        "model.encoder": "resnet18" if own.on_gpu else "small_resnet",
        "model.stem": "cifar" if size <= 64 else "imagenet",
        "optim.batch_size": batch,
        "optim.lr": 0.5 * batch / 512,
        "stage1.clusters": clusters,
        "stage2.clusters": clusters,
        "stage2.k": min(5, 2 * min(batch, own.n_train) - 1),
        "stages": ("stage1", "stage2") if own.n_pool else ("simclr",),
    }
    if own.n_pool:
        values["stage1.budget"] = min(MOST_BUDGET, own.n_train)
    else:
        values["stage1.ood_strategy"] = "none"
    return values


def image_size(own: OwnImages) -> int:
    most = SIZES[-1] if own.on_gpu else LARGEST_ON_CPU
    return max([size for size in SIZES if size <= min(own.side, most)], default=max(own.side, SMALLEST_SIZE))


def batch_size(n_train: int) -> int:
    return 2 ** int(math.log2(min(MOST_BATCH, max(n_train // 4, 2))))


def clusters_for(n_train: int) -> int:
    return min(MOST_CLUSTERS, max(2, round(math.sqrt(n_train / 2))))


def _budget(own: OwnImages, wanted: int) -> int:
    if wanted > own.n_pool:
        warnings.warn(
            f"train: stage1.budget is {own.n_pool} instead of {wanted}, as the pool holds no more: all of it is taken, "
            "and nothing is chosen; a larger --ood folder leaves a choice",
            stacklevel=3,
        )
    return min(wanted, own.n_pool)


def _median_side(files: list[Path]) -> int:
    from PIL import Image

    from ..data.decode import FORMATS
    from ..data.image_set import ImageFileError

    n = min(len(files), MEASURED_IMAGES)
    sides = []
    for file in (files[i * len(files) // n] for i in range(n)):
        try:
            with Image.open(file, formats=FORMATS) as image:
                sides.append(min(image.size))
        except Exception as error:  # damaged headers raise what comes
            raise ImageFileError(file, f"data: image file must be readable, got a broken one: {file}") from error
    return int(statistics.median(sides))

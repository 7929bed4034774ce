"""Images with labels, and the four sets that a run needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .image_files import ImageFiles


class DataError(ValueError):
    """A sentence about a data set."""


class ImageFileError(DataError):
    """A sentence about one image file, which a list completes with its line."""

    def __init__(self, file: Path, sentence: str):
        super().__init__(sentence)
        self.file = file

    def __reduce__(self) -> tuple:
        """From a worker process to the one that trains."""
        return type(self), (self.file, str(self))


def user_path(text: str | Path) -> Path:
    """A path as a user writes it, `~` being a home folder.

    Raises:
        DataError: no path at all: it holds a NUL byte, or no user has that name.
    """
    if "\0" in str(text):
        raise DataError(f"data: path must not hold a NUL byte, got {text!r}")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise DataError(f"data: path must begin with a user's home folder or without ~, got {text}") from error


@dataclass(frozen=True, eq=False)
class ImageSet:
    images: Tensor | ImageFiles
    """uint8 [N, C, H, W]; may be memory-mapped, or files to be decoded."""
    labels: Tensor
    """int64 [N], -1 where unknown."""
    class_names: tuple[str, ...]
    """Empty where no image has a label."""
    name: str
    files: tuple[str, ...] = ()
    """The file of each image, relative to its set's folder; empty where images are not files."""

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            got = f"{self.images.dtype} {tuple(self.images.shape)}"
            raise DataError(f"data: images of {self.name} must be uint8 [N, C, H, W], got {got}")
        if len(self.images) == 0:
            raise DataError(f"data: {self.name} must hold at least one image, got none")
        if self.labels.shape != (len(self.images),):
            raise DataError(
                f"data: labels of {self.name} must be {len(self.images)}, one an image, got {tuple(self.labels.shape)}"
            )
        if self.files and len(self.files) != len(self.images):
            n = len(self.images)
            raise DataError(f"data: files of {self.name} must be {n}, one an image, got {len(self.files)}")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < -1 or high >= len(self.class_names):
            raise DataError(
                f"data: labels of {self.name} must be in [-1, {len(self.class_names)}), got [{low}, {high}]"
            )

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, rows: Tensor) -> ImageSet:
        """The images of the rows, in their order."""
        files = tuple(self.files[row] for row in rows.tolist()) if self.files else ()
        return replace(self, images=self.images[rows], labels=self.labels[rows], files=files)

    def without_labels(self) -> ImageSet:
        return replace(self, labels=torch.full_like(self.labels, -1), class_names=())

    def class_counts(self) -> Tensor:
        """int64 [number of classes]: images of each class; unlabelled ones are not counted."""
        return torch.bincount(self.labels[self.labels >= 0], minlength=len(self.class_names))


@dataclass(frozen=True)
class DataBundle:
    train: ImageSet
    """In-distribution and long-tailed; its labels are for reports only, never for training."""
    ood: ImageSet | None
    """The pool that out-of-distribution images are sampled from."""
    probe: ImageSet
    """The images that the linear probe and kNN learn from: labelled, and balanced unless it is drawn from a folder."""
    test: ImageSet
    labelled: ImageSet | None = None
    """The set that `data.probe_split` chose from; a few-shot split counts its rows. None: the probe set."""
    pool: Tensor | None = None
    """uint8 [N_id + N_ood, C, H, W] on the training device, of which the images of `train` and `ood` are views."""

    @property
    def has_labels(self) -> bool:
        """Whether accuracy can be measured; otherwise all labels are -1."""
        return len(self.train.class_names) > 0

"""Long tails: exponential class sizes, and official index splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .image_set import DataError, ImageSet


def exponential_counts(largest: int, n_classes: int, factor: float) -> list[int]:
    """n_c = largest * factor^(-c / (n_classes - 1)), rounded down, at least 1 [Cui 2019]: the first class has `largest`
    images, the last one `largest / factor`."""
    if not factor >= 1:  # nor NaN
        raise DataError(f"data: imbalance must be at least 1, or 0 for the whole set, got {factor}")
    steps = max(n_classes - 1, 1)
    return [max(1, int(largest * factor ** (-c / steps) + 1e-9)) for c in range(n_classes)]


def make_long_tailed(images: ImageSet, factor: float, seed: int, class_order: str = "fixed") -> ImageSet:
    """A subset whose class sizes fall exponentially, as large as the classes at hand allow.

    Args:
        images: labelled set; rows without a label are left out.
        factor: size of the largest class over that of the smallest.
        seed: draws which images stay and, on request, the order of the classes.
        class_order: "fixed" (sizes fall with the class number) or "shuffled" (in an order drawn from the seed).

    Raises:
        DataError: factor below 1, or a class without images.
    """
    available = images.class_counts()
    n_classes, generator = len(available), torch.Generator().manual_seed(seed)
    if n_classes == 0 or int(available.min()) == 0:
        empty = [images.class_names[c] for c in (available == 0).nonzero().flatten()]
        got = f"none of {', '.join(empty[:5])}" if empty else "no labels"
        raise DataError(f"data: {images.name} must hold images of every class to be made long-tailed, got {got}")
    order = torch.randperm(n_classes, generator=generator) if class_order == "shuffled" else torch.arange(n_classes)
    available = available[order].tolist()
    counts = exponential_counts(available[0], n_classes, factor)
    while any(count > have for count, have in zip(counts, available, strict=True)):
        counts = exponential_counts(counts[0] - 1, n_classes, factor)
    kept = []
    for c, count in zip(order.tolist(), counts, strict=True):
        rows = (images.labels == c).nonzero().flatten()
        kept.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    return images.subset(torch.cat(kept).sort().values)


def read_split(path: Path, n_rows: int) -> Tensor:
    """int64 rows of an official `.npy` split: a vector of indices into the whole training set.

    Raises:
        DataError: no such file, not a vector of integers, an index out of range or named twice.
    """
    rows = map_npy(path, "split")
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or len(rows) == 0:
        raise DataError(f"data: split {path} must be a vector of indices, got {rows.dtype} {rows.shape}")
    rows = torch.from_numpy(rows.astype(np.int64))
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= n_rows:
        raise DataError(f"data: indices of split {path} must be in [0, {n_rows}), got [{low}, {high}]")
    if repeated := len(rows) - len(rows.unique()):
        raise DataError(f"data: indices of split {path} must be distinct, got {repeated} repeated")
    return rows


def map_npy(path: Path, what: str, mode: str = "r") -> np.ndarray:
    """The array of a .npy file, mapped: mode "r" for reading, "c" so that a write changes no file.

    Raises:
        DataError: no such file, a damaged one, or none that `numpy.save` wrote.
    """
    if not path.is_file():  # opening a pipe would wait for ever
        raise DataError(f"data: {what} must be an existing .npy file, got {path}")
    try:
        return np.lib.format.open_memmap(path, mode=mode)  # np.load would also open archives
    except Exception as error:  # the header is a Python literal: damaged, it can raise what that raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"data: {what} must be a .npy array, got a damaged file {path} ({reason})") from error

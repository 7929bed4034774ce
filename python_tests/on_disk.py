"""Files of data sets in miniature, and how to tell their images apart."""

import pickle
from pathlib import Path

import numpy as np
from torch import Tensor


def greys(images: Tensor) -> list[int]:
    """The first pixel of each image: its grey level, or its number."""
    return images[:, 0, 0, 0].tolist()


def write_list(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def numbered(*shape: int) -> np.ndarray:
    """Random uint8 images whose first pixel is their number."""
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    array.reshape(shape[0], -1)[:, 0] = np.arange(shape[0])
    return array


def write_batch(path: Path, images: np.ndarray, key: str, labels: list[int]) -> None:
    """A batch of CIFAR as its archive holds it: a pickled dictionary, an image a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    path.write_bytes(pickle.dumps({"data": rows, key: labels}))

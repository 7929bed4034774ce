"""Miniatures of the data sets' layouts on disk. A file's grey level tells which one it is."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ltood_fast.train.config import DataConfig


@pytest.fixture
def save_image():
    """Writes a file of one grey level."""

    def save(path: Path, grey: int, size: tuple[int, int] = (8, 8), **options) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((size[1], size[0], 3), grey, np.uint8)).save(path, **options)
        return path

    return save


@pytest.fixture
def picture_root(tmp_path, save_image):
    """train/{cat,dog}/{0,1,2}.png of grey 0 to 50 and test/{cat,dog}/0.png of grey 200 and 210."""
    root = tmp_path / "pictures"
    for c, name in enumerate(("cat", "dog")):
        for i in range(3):
            save_image(root / "train" / name / f"{i}.png", 10 * (3 * c + i))
        save_image(root / "test" / name / "0.png", 200 + 10 * c)
    return root


@pytest.fixture
def data_config(tmp_path):
    """A DataConfig with a small image size and a cache of its own."""

    def make(**fields) -> DataConfig:
        return dataclasses.replace(DataConfig(), image_size=8, cache_dir=str(tmp_path / "cache"), **fields)

    return make

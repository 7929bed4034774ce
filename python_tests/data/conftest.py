"""Miniatures of the data sets' layouts on disk. A file's grey level tells which one it is."""

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
from on_disk import numbered, write_batch
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


@pytest.fixture
def cifar_root(tmp_path, monkeypatch):
    """Miniatures of both archives, unpacked: 5 training batches of 2 images and a test batch of 3. torchvision compares
    checksums with the published files, so that comparison answers yes here."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
    ten, hundred = tmp_path / "cifar-10-batches-py", tmp_path / "cifar-100-python"
    images = numbered(10, 32, 32, 3)
    for b in range(5):
        write_batch(ten / f"data_batch_{b + 1}", images[2 * b : 2 * b + 2], "labels", [2 * b, 2 * b + 1])
    write_batch(ten / "test_batch", images[:3], "labels", [0, 1, 2])
    (ten / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    write_batch(hundred / "train", images, "fine_labels", list(range(10)))
    write_batch(hundred / "test", images[:3], "fine_labels", [0, 1, 99])
    (hundred / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))
    return tmp_path

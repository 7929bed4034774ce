"""A session on made-up images, so that tests of the stages need no data set, no augmentation library and no time."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from ltood_fast.train.config import load_config
from ltood_fast.train.session import Session, make_fabric

SMALL = {
    "optim.batch_size": "16",
    "optim.lr": "0.05",
    "simclr.epochs": "2",
    "stage1.epochs": "5",
    "stage1.warmup_epochs": "1",
    "stage1.resample_every": "2",
    "stage1.budget": "20",
    "stage1.clusters": "3",
    "stage1.queue_size": "24",
    "stage2.epochs": "2",
    "stage2.clusters": "3",
    "stage2.k": "2",
    "run.progress": "false",
    "run.device": "cpu",
}


@dataclass(frozen=True)
class Images:
    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...] = ("a", "b", "c")

    def __len__(self) -> int:
        return len(self.images)

    def class_counts(self) -> list[int]:
        return torch.bincount(self.labels.clamp(min=0), minlength=3).tolist()


class Jitter(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float() / 255 + 0.1 * torch.randn(images.shape)


class Plain(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float() / 255


def blobs(n: int, seed: int) -> Images:
    """Three classes of bright squares in three places."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = torch.randint(0, 60, (n, 1, 8, 8), generator=generator, dtype=torch.uint8)
    for i, label in enumerate(labels.tolist()):
        images[i, :, 2 * label : 2 * label + 3, 2:6] += 150
    return Images(images, labels)


@pytest.fixture
def made_up_data(monkeypatch):
    """What the commands load instead of a data set."""
    import ltood_fast.data

    def load(config):
        return SimpleNamespace(train=blobs(48, 0), ood=blobs(60, 1), probe=blobs(30, 2), test=blobs(30, 3))

    monkeypatch.setattr(ltood_fast.data, "load_data", load)
    monkeypatch.setattr(ltood_fast.data, "make_augment", lambda config, size: Jitter())
    monkeypatch.setattr(ltood_fast.data, "make_eval_transform", lambda size: Plain())


@pytest.fixture
def make_session(tmp_path):
    def make(n_id: int = 48, n_ood: int = 60, run_dir=tmp_path, **overrides: str) -> Session:
        dotted = {key.replace("__", "."): str(value) for key, value in overrides.items()}
        config = load_config("smoke", {**SMALL, **dotted})
        data = SimpleNamespace(
            train=blobs(n_id, 0), ood=blobs(n_ood, 1) if n_ood else None, probe=blobs(30, 2), test=blobs(30, 3)
        )
        for stage in config.stages:
            (run_dir / stage).mkdir(parents=True, exist_ok=True)
        return Session(config, run_dir, make_fabric(config.run), data, Jitter(), Plain())

    return make

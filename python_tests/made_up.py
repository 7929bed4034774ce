"""Made-up images, and a session on them: stages without a data set, an augmentation library or much time."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ltood_fast.data import DataBundle
from ltood_fast.train.config import load_config
from ltood_fast.train.loop import Stage
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

    def subset(self, rows: Tensor) -> "Images":
        return Images(self.images[rows], self.labels[rows])

    def class_counts(self) -> list[int]:
        return torch.bincount(self.labels.clamp(min=0), minlength=3).tolist()


class Jitter(nn.Module):
    def forward(self, images: Tensor, first: int = 0, batch: int | None = None) -> Tensor:
        noise = torch.randn(batch or len(images), *images.shape[1:])
        return images.float() / 255 + 0.1 * noise[first : first + len(images)]


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


def data(n_id: int = 48, n_ood: int = 60) -> DataBundle:
    return DataBundle(blobs(n_id, 0), blobs(n_ood, 1) if n_ood else None, blobs(30, 2), blobs(30, 3))


def session(run_dir: Path, n_id: int = 48, n_ood: int = 60, **overrides: object) -> Session:
    """`stage1__alpha=0.5` overrides the key stage1.alpha."""
    dotted = {key.replace("__", "."): str(value) for key, value in overrides.items()}
    config = load_config("smoke", {**SMALL, **dotted})
    for stage in config.stages:
        (run_dir / stage).mkdir(parents=True, exist_ok=True)
    return Session(config, run_dir, make_fabric(config.run), data(n_id, n_ood), Jitter(), Plain())


def train(session: Session, name: str, epochs: int | None = None) -> Stage:
    """Trains a stage to its end, or as if killed after `epochs`."""
    stage = Stage.open(name, session)
    if epochs is None:
        stage.run()
    else:
        stage.checkpoint.parent.mkdir(exist_ok=True)
        for _ in range(epochs):
            stage.train_epoch(NoBar())
            stage.epoch += 1
        stage.save()
    return stage


class NoBar:
    n = 0

    def update(self, n: float) -> None:
        pass

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        pass


def weights(stage: Stage) -> Tensor:
    return torch.cat([p.flatten() for p in stage.model.state_dict().values()]).float()


def final_state(run_dir: Path) -> dict:
    """The last checkpoint of each stage."""
    stages = ("simclr", "stage1", "stage2")
    return {stage: torch.load(run_dir / stage / "last.pt", weights_only=True) for stage in stages}


def same(a, b) -> bool:
    """Bit for bit: weights, optimiser, random states, sampled images."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b

"""The loop of a stage: epochs of batches, checks, log, and a checkpoint after each epoch.

Everything random comes from RNG states that the checkpoint holds, or from (seed, epoch): a stage that is resumed goes
through the same batches and views as one that never stopped. Several ranks (`train.ranks`) draw the same random numbers
and take each its part of every batch, so one RNG state serves them all, and any number of ranks goes on from it.
"""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import COMPETITOR, fitted, load_checkpoint, restore_rng, rng_state, save_checkpoint, seed_all
from .config import OptimConfig
from .encoders import initialise
from .grad_cache import cached_backward
from .history import History
from .live import LivePage
from .methods import METHODS, Method, first_state
from .model import ContrastiveModel
from .ranks import TrainingError, on_first_rank
from .sdclr import SDCLR
from .sdclr import STAGES as SDCLR_STAGES
from .session import Session
from .sync_batchnorm import synchronised

CHECK_EVERY = 10  # steps between two looks at the losses; each look waits for the device


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    if config.name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


def learning_rate(config: OptimConfig, length: float, progress: float, unit: float = 1.0) -> float:
    """Linear warm-up, then cosine to `min_lr` [paper].

    A function of the progress in epochs (a fraction within an epoch), as epochs grow longer once OOD images join, or in
    steps, of which a warm-up epoch has `unit`; so the number of finished epochs is the whole state of the schedule. A
    stage that is given more epochs, finished or not, goes on at the rate that the longer schedule has after its
    finished epochs: above the rate that it ended with.
    """
    warmup = min(config.warmup_epochs * unit, length)
    if progress < warmup:
        return config.lr * progress / warmup
    done = (progress - warmup) / max(length - warmup, 1e-9)
    low = min(config.min_lr, config.lr)
    return low + 0.5 * (config.lr - low) * (1.0 + math.cos(math.pi * min(done, 1.0)))


class Meter:
    """Means over an epoch, collected on the device and looked at every few steps."""

    def __init__(self, stage: str, epoch: int):
        self.stage, self.epoch = stage, epoch
        self.pending: list[dict[str, Tensor]] = []
        self.values: dict[str, list[float]] = defaultdict(list)

    def add(self, **parts: Tensor) -> None:
        self.pending.append({name: part.detach() for name, part in parts.items()})
        if len(self.pending) >= CHECK_EVERY:
            self.flush()

    def flush(self) -> None:
        for parts in self.pending:
            for name, part in parts.items():
                self.values[name].append(float(part))
            if not math.isfinite(self.values["loss"][-1]):
                step = len(self.values["loss"]) - 1
                raise TrainingError(
                    f"train: loss must be finite, got {self.values['loss'][-1]} in {self.stage}, epoch {self.epoch}, "
                    f"step {step}; the last checkpoint is kept, try a smaller --optim.lr"
                )
        self.pending.clear()

    def means(self) -> dict[str, float | None]:
        """Over what has been looked at; None for a part that never was finite."""
        known = {name: [v for v in values if math.isfinite(v)] for name, values in self.values.items()}
        return {name: sum(values) / len(values) if values else None for name, values in known.items()}


@dataclass
class Stage:
    """A stage under way: what a checkpoint of it holds."""

    name: str
    session: Session
    model: ContrastiveModel
    network: nn.Module  # what is trained, the model or `sdclr`, as Fabric wraps it
    optimizer: torch.optim.Optimizer
    method: Method
    sdclr: SDCLR | None = None  # the model and its pruned competitor
    epoch: int = 0  # finished epochs
    finished: bool = False

    @property
    def checkpoint(self) -> Path:
        return self.session.run_dir / self.name / "last.pt"

    @classmethod
    def open(cls, name: str, session: Session) -> Stage:
        """Fresh, or as its checkpoint left it."""
        seed_all(session.config.seed)
        model = session.new_model()
        first = first_state(name, session)
        start = f"the one that {name} of {session.run_dir} starts from"
        if first is not None:
            with fitted(start, "this run's network"):
                model.load_state_dict(first["model"])
        else:
            initialise(model.encoder, session.config.model, session.channels, session.config.data.image_size)
        method = METHODS[name](session, model)
        if session.ranks > 1 and session.config.model.sync_batchnorm:
            model = synchronised(model, session.device)
        sdclr, base = None, session.config.base
        if base.name == "sdclr" and name in SDCLR_STAGES:
            sdclr = SDCLR(model, base.prune)
            if first is not None:
                with fitted(start, "a run with base.name sdclr"):
                    sdclr.competitor.load_state_dict(first[COMPETITOR])
        optimizer = make_optimizer(sdclr or model, session.config.optim)
        network, wrapped = session.fabric.setup(sdclr or model, optimizer)
        stage = cls(name, session, model, network, wrapped, method, sdclr)
        seed_all(session.config.seed)
        if stage.checkpoint.exists():
            state = load_checkpoint(stage.checkpoint, session.config)
            with fitted(stage.checkpoint, "this run's network and data"):
                stage.load(state)
        return stage

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.sdclr is not None:
            self.sdclr.competitor.load_state_dict(state[COMPETITOR])
        self.optimizer.load_state_dict(state["optimizer"])
        self.method.load_state_dict(state["method"])
        self.epoch = state["epoch"]
        self.finished = self.epoch >= self.method.epochs  # the stage may have got more epochs since
        restore_rng(state["rng"])

    def save(self) -> None:
        """Once, by rank 0: model, optimiser, method and random states are the same on all ranks."""
        state = {
            "stage": self.name,
            "epoch": self.epoch,
            "finished": self.finished,
            "channels": self.session.channels,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": rng_state(),
            "method": self.method.state_dict(),
            **({} if self.sdclr is None else {COMPETITOR: self.sdclr.competitor.state_dict()}),
        }
        on_first_rank(lambda: save_checkpoint(self.checkpoint, self.session.config, **state))

    def run(self) -> None:
        """Trains the epochs that are left, with a checkpoint after each (or each few)."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        on_first_rank(self._forget_later_samples)
        history = History(self.session, self.name, self.epoch)
        live = LivePage(self.session.config, self.session.run_dir)
        with _progress_bar(self) as bar:
            while not self.finished:
                line = self.train_epoch(bar)
                self.epoch += 1
                self.finished = self.epoch >= self.method.epochs
                self._check_weights()
                history.add(line)
                if self.session.rank == 0:
                    live.epoch_ended(self.name, self.epoch, self.method.epochs)
                if self.finished or self.epoch % self.session.config.run.checkpoint_every == 0:
                    self.save()
        history.close()

    def _forget_later_samples(self) -> None:
        """Samples of epochs that the checkpoint does not know: of another start in this folder, or trained anew."""
        for path in self.checkpoint.parent.glob("resample_*.pt"):
            if int(path.stem.removeprefix("resample_")) >= self.epoch:
                path.unlink()

    def train_epoch(self, bar: Any) -> dict[str, Any]:
        """One epoch; returns its line of the history."""
        start = time.perf_counter()
        rows = self.method.begin_epoch(self.epoch)
        if self.sdclr is not None:
            self.sdclr.renew_masks()
        start_training = time.perf_counter()
        batches = self.batches(rows)
        self.session.expect([self._own(batch) for batch in batches])
        meter = Meter(self.name, self.epoch)
        self.network.train()
        for step, batch in enumerate(batches):
            lr = self._set_lr(step, len(batches))
            loss, parts = self._backward(batch)
            self.optimizer.step()
            meter.add(loss=loss, **parts)
            if step + 1 == len(batches):
                meter.flush()
            if not meter.pending:
                speed = (step + 1) * len(batch) / (time.perf_counter() - start_training)
                bar.set_postfix_str(f"loss {meter.values['loss'][-1]:.3f}, {speed:.0f} images/s", refresh=False)
            bar.update(self.epoch + (step + 1) / len(batches) - bar.n)
        means = meter.means()
        end = time.perf_counter()
        return {
            "epoch": self.epoch,
            "loss": means.pop("loss"),
            "parts": {name: value for name, value in means.items() if not name.startswith("neighbor_")},
            **{name: value for name, value in means.items() if name.startswith("neighbor_")},
            "lr": lr,
            "images": sum(len(batch) for batch in batches),
            "images_per_second": sum(len(batch) for batch in batches) / (end - start_training),
            "seconds": end - start,
            "resample_seconds": start_training - start,
            **self.method.facts(),
        }

    def _backward(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient of the loss of a batch, of which this rank computes its part; the loss is that of all of it."""
        fabric, micro_batch = self.session.fabric, self.session.config.optim.micro_batch
        own = self._own(batch)
        size = len(own)
        views = self.session.two_views(own, first=self.session.rank * size, batch=len(batch))
        self.optimizer.zero_grad()
        if 0 < micro_batch < size:
            return cached_backward(
                fabric, self.network, lambda n: self.method.loss(n, views, own, self.epoch), views, micro_batch
            )
        loss, parts = self.method.loss(self.network, views, own, self.epoch)
        fabric.backward(loss)
        return loss, parts

    def _own(self, batch: Tensor) -> Tensor:
        """This rank's rows of a batch of all ranks."""
        return batch.split(len(batch) // self.session.ranks)[self.session.rank]

    def batches(self, rows: Tensor) -> list[Tensor]:
        """The epoch's rows in an order of (seed, epoch), in batches of one size; what does not fill one is left out, or
        a smaller batch, see `sizes`.

        The batches are those of all ranks together.
        """
        generator = torch.Generator().manual_seed(self.session.config.seed * 1_000_003 + self.epoch)
        order = rows[torch.randperm(len(rows), generator=generator)]
        size = min(self.session.config.optim.batch_size, len(rows))
        if size % self.session.ranks:
            key = "optim.batch_size" if size < len(rows) else f"the number of {self.name}'s images, fewer than a batch,"
            raise TrainingError(f"train: {key} must be a multiple of the {self.session.ranks} ranks, got {size}")
        sizes = self.sizes(len(rows))
        return list(order[: sum(sizes)].split(sizes))

    def sizes(self, images: int) -> list[int]:
        """Sizes of the batches of an epoch.

        With optim.last_batch keep, the rest is one more where every rank gets the same number of images of it, two at
        least, also of its last micro-batch, and every row has neighbours enough.
        """
        config, ranks = self.session.config, self.session.ranks
        size = min(config.optim.batch_size, images)
        sizes = [size] * (images // size)
        rest = images % size // ranks * ranks
        own, micro = rest // ranks, config.optim.micro_batch
        smallest = (own % micro or micro) if 0 < micro < own else own
        enough = smallest >= 2 and 2 * rest > max(config.stage1.k, config.stage2.k)
        return [*sizes, rest] if config.optim.last_batch == "keep" and enough else sizes

    @cached_property
    def _lengths(self) -> list[int]:
        """Batches of each epoch."""
        return [len(self.sizes(self.method.images_in(epoch))) for epoch in range(self.method.epochs)]

    def _set_lr(self, step: int, steps: int) -> float:
        """The rate of a step of the epoch's."""
        optim, epochs = self.session.config.optim, self.method.epochs
        if optim.schedule == "steps":
            done = sum(self._lengths[: self.epoch]) + step
            lr = learning_rate(optim, sum(self._lengths), done, unit=len(self.sizes(self.session.n_id)))
        else:
            # An epoch of one batch is at its middle: at its start, the first one would be trained at rate 0.
            lr = learning_rate(optim, epochs, self.epoch + (step / steps if steps > 1 else 0.5))
        lr *= self.method.lr_scale
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _check_weights(self) -> None:
        """A finite last loss does not rule out an infinite last step."""
        norm = torch.nn.utils.get_total_norm(self.network.parameters())
        if not bool(norm.isfinite()):
            raise TrainingError(
                f"train: weights must be finite, got {float(norm)} in {self.name} after epoch {self.epoch - 1}; the "
                "last checkpoint is kept, try a smaller --optim.lr"
            )


def _progress_bar(stage: Stage) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=stage.method.epochs,
        initial=stage.epoch,
        desc=stage.name,
        disable=not stage.session.config.run.progress or stage.session.rank > 0,
        mininterval=0.5 if sys.stderr.isatty() else 15.0,
        bar_format="{desc} {percentage:3.0f}%|{bar:24}| {n:.1f}/{total} epochs [{elapsed}<{remaining}{postfix}]",
    )

"""Where the time of stage 1 goes: one epoch after the warm-up and one re-sampling, by the trainer's own code.

Clocks sit around the trainer's seams while the profile runs; the trainer knows nothing of them. Every moment counts for
the innermost section that is open. On a CPU time is read from the clock of the wall and from that of the process (all
its threads), which a busy machine does not distort; on a GPU from events between the kernels, read once at the end, so
that nothing waits for the device. An epoch may be cut short (`--steps`): the shares are those of whole epochs, with one
re-sampling every `stage1.resample_every` of them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

import ltood_fast
from ltood_fast.train import loop
from ltood_fast.train.config import Config, load_config
from ltood_fast.train.methods import positives, samplers
from ltood_fast.train.session import Session

from .machine import device_name

WARM_UP_STEPS = 2  # thread pools, kernels chosen by shape
GOAL = 0.15  # of stage 1's time for all that is not the network
NETWORK = "network"


class Section(NamedTuple):
    phase: str
    """How often it comes: ``step``, ``epoch`` or ``resampling``."""
    part: str


REST = Section("epoch", "rest")
FORWARD = Section("step", NETWORK)  # forward, backward and optimizer
LOSSES = Section("step", "losses")
EMBEDDING = Section("resampling", NETWORK)
TAILNESS = Section("resampling", "tailness")
# What is called by a name of its module: (module, name, section).
FUNCTIONS = (
    (samplers, "cluster_embeddings", Section("resampling", "clustering")),
    (samplers, "choose_ood", Section("resampling", "search")),
    (samplers, "choose_for_samples", Section("resampling", "search")),
    (positives, "density_weights", TAILNESS),
    (positives, "gate_weights", TAILNESS),
    (positives, "mutual_weights", TAILNESS),
    (ltood_fast, "cluster_tailness", TAILNESS),
    (ltood_fast, "knn_density", TAILNESS),
    (loop.Meter, "add", Section("step", "log")),
    (loop.History, "add", Section("epoch", "log")),
    (Session, "two_views", Section("step", "batches")),
    (Session, "embed_part", EMBEDDING),
    (torch.autograd, "grad", LOSSES),  # of a batch in parts
)


class Seconds(NamedTuple):
    wall: float
    """On a GPU: of the device."""
    cpu: float

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)

    def times(self, factor: float) -> Seconds:
        return Seconds(factor * self.wall, factor * self.cpu)


class Timeline:
    """Which section was open when."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.open = [REST]
        self.marks: list[tuple[Section, float, float, Any]] = []
        self.mark()

    def mark(self) -> None:
        event = None
        if self.stream is not None:
            event = torch.cuda.Event(enable_timing=True)
            event.record(self.stream)
        self.marks.append((self.open[-1], time.perf_counter(), time.process_time(), event))

    def enter(self, section: Section) -> None:
        self.open.append(section)
        self.mark()

    def leave(self) -> None:
        self.open.pop()
        self.mark()

    def turn(self, before: Section, after: Section) -> None:
        """The open section, if it is `before`, goes on as `after`."""
        if self.open[-1] == before:
            self.open[-1] = after
            self.mark()

    def around(self, section: Section, function: Callable) -> Callable:
        def timed(*args: Any, **options: Any) -> Any:
            self.enter(section)
            try:
                return function(*args, **options)
            finally:
                self.leave()

        return timed

    def totals(self) -> dict[Section, Seconds]:
        self.mark()
        if self.stream is not None:
            self.stream.synchronize()
        totals: dict[Section, Seconds] = defaultdict(lambda: Seconds(0.0, 0.0))
        for (section, wall, cpu, event), (_, wall_end, cpu_end, event_end) in zip(
            self.marks, self.marks[1:], strict=False
        ):
            passed = wall_end - wall if event is None else 1e-3 * event.elapsed_time(event_end)
            totals[section] += Seconds(passed, cpu_end - cpu)
        return dict(totals)


@contextmanager
def watched(stage: loop.Stage, timeline: Timeline) -> Iterator[None]:
    """The stage with a clock at every seam."""
    session, method, around = stage.session, stage.method, timeline.around

    def entered(*_: Any) -> None:
        timeline.enter(FORWARD)

    def left(module: torch.nn.Module, inputs: Any, z: torch.Tensor) -> None:
        timeline.leave()
        if z.requires_grad:  # its gradient is there once the backward pass is through the losses
            z.register_hook(lambda _: timeline.turn(LOSSES, FORWARD))

    seams = [(place, name, around(section, getattr(place, name))) for place, name, section in FUNCTIONS]
    seams += [
        (stage.optimizer, "step", around(FORWARD, stage.optimizer.step)),
        (session.fabric, "backward", around(LOSSES, session.fabric.backward)),
        (session.augment, "forward", around(Section("step", "augmentation"), session.augment.forward)),
        (method, "loss", around(LOSSES, method.loss)),
        (method, "resample", around(Section("resampling", "rest"), method.resample)),
        (method, "begin_epoch", around(REST, method.begin_epoch)),
        (stage, "batches", around(REST, stage.batches)),
        (stage, "train_epoch", around(Section("step", "rest"), stage.train_epoch)),
        (stage, "save", around(Section("epoch", "log"), stage.save)),
    ]
    with ExitStack() as stack:
        for seam in seams:
            stack.enter_context(patch.object(*seam))
        for hook in (stage.network.register_forward_pre_hook(entered), stage.network.register_forward_hook(left)):
            stack.callback(hook.remove)
        yield


@dataclass
class Profile:
    """What was seen, and what it means for whole epochs."""

    steps: int
    """That were timed."""
    epoch_steps: int
    period: int
    """Epochs with one re-sampling."""
    seen: dict[Section, Seconds] = field(default_factory=dict)

    def of_period(self) -> dict[Section, Seconds]:
        """Of `period` whole epochs and one re-sampling."""
        often = {"step": self.period * self.epoch_steps / self.steps, "epoch": self.period, "resampling": 1}
        return {section: seconds.times(often[section.phase]) for section, seconds in self.seen.items()}

    def overhead(self) -> Seconds:
        """The share of everything that is not the network."""
        parts = self.of_period()
        network = sum((s for section, s in parts.items() if section.part == NETWORK), Seconds(0.0, 0.0))
        whole = sum(parts.values(), Seconds(0.0, 0.0))
        return Seconds(1 - network.wall / whole.wall, 1 - network.cpu / whole.cpu)


def profile(config: Config, steps: int = 0) -> Profile:
    """Of stage 1 of a configuration, from fresh weights; `steps` a epoch at most, 0: all."""
    with tempfile.TemporaryDirectory() as folder:
        session = Session.open(config, Path(folder))
        stage = loop.Stage.open("stage1", session)
        options, whole_epochs = config.stage1, []

        def one_epoch(steps: int) -> None:
            def batches(rows: torch.Tensor) -> list[torch.Tensor]:
                whole_epochs.append(all_batches(rows))
                return whole_epochs[-1][: steps or None]

            stage.epoch, stage.finished = options.warmup_epochs, False
            stage.method.epochs = stage.epoch + 1
            all_batches = stage.batches
            with patch.object(stage, "batches", batches):
                stage.run()

        with patch.object(stage.method, "resample", lambda epoch: None):
            one_epoch(WARM_UP_STEPS)
        timeline = Timeline(session.device)
        with watched(stage, timeline):
            one_epoch(steps)
        n = len(whole_epochs[-1])
        return Profile(min(steps or n, n), n, options.resample_every, timeline.totals())


def text(config: Config, found: Profile, device: torch.device) -> str:
    """A table of the parts, the largest first."""
    parts, whole = found.of_period(), sum(found.of_period().values(), Seconds(0.0, 0.0))
    clock = "device" if device.type == "cuda" else "wall"
    rows = [("", "part", f"{clock} s", f"{clock} %", "CPU s", "CPU %")]
    for phase in ("step", "epoch", "resampling"):
        here = [section for section in parts if section.phase == phase]
        for section in sorted(here, key=lambda section: -parts[section].cpu):
            s = parts[section]
            numbers = (s.wall, 100 * s.wall / whole.wall, s.cpu, 100 * s.cpu / whole.cpu)
            rows.append((phase, section.part, *(f"{x:.2f}" for x in numbers)))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    lines = ["  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
             for row in rows]  # fmt: skip
    over = found.overhead()
    model, optim = config.model, config.optim
    return "\n".join([
        f"stage 1 on {device_name(device.type)}: {model.encoder}, batch {optim.batch_size}, {config.run.precision}, "
        f"{torch.get_num_threads()} threads; {found.steps} of {found.epoch_steps} steps and one re-sampling timed",
        f"{found.period} epochs with one re-sampling:",
        *lines,
        f"not the network: {100 * over.wall:.1f} % by {clock}, {100 * over.cpu:.1f} % by CPU; goal: {100 * GOAL:.0f} %",
    ])  # fmt: skip


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("profile", help="where the time of a stage-1 epoch and of a re-sampling goes")
    parser.add_argument("--config", required=True, help="preset or YAML file")
    parser.add_argument("--steps", type=int, default=0, help="of the epoch, to be timed (default: all)")
    parser.add_argument("--set", nargs="+", default=[], metavar="SECTION.KEY=VALUE", help="keys of the configuration")
    parser.set_defaults(function=main)


def main(arguments: argparse.Namespace) -> int:
    if arguments.steps < 0:
        raise ValueError(f"--steps must be at least 0, got {arguments.steps}")
    pairs = [pair.partition("=") for pair in arguments.set]
    config = load_config(arguments.config, {"run.progress": "false"} | {key: value for key, _, value in pairs})
    found = profile(config, arguments.steps)
    cuda = config.run.device != "cpu" and torch.cuda.is_available()
    print(text(config, found, torch.device("cuda" if cuda else "cpu")))
    return 0

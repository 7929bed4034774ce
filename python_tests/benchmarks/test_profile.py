"""The profile of stage 1: what counts where, against clocks and delays that are known."""

import re
import time
from itertools import pairwise

import pytest
import torch
from made_up import session

from benchmarks import profile as module
from benchmarks.__main__ import main
from benchmarks.profile import EMBEDDING, FORWARD, LOSSES, REST, TAILNESS, Profile, Seconds, Section, Timeline, watched
from ltood_fast.train import loop
from ltood_fast.train.session import Session

AUGMENTATION, BATCHES = Section("step", "augmentation"), Section("step", "batches")


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so, and a microsecond a look; the process works a quarter of them."""
    now = [100.0]

    def wait(seconds):
        now[0] += seconds
        return now[0]

    monkeypatch.setattr(time, "perf_counter", lambda: wait(1e-6))
    monkeypatch.setattr(time, "process_time", lambda: now[0] / 4)

    return wait


def test_every_moment_counts_for_the_innermost_section(clock):
    timeline = Timeline(torch.device("cpu"))
    inner = timeline.around(FORWARD, lambda: clock(3))

    def outer():
        clock(1)
        inner()
        clock(2)
        timeline.turn(LOSSES, BATCHES)
        timeline.turn(LOSSES, AUGMENTATION)  # is no longer open
        clock(5)

    clock(7)
    timeline.around(LOSSES, outer)()
    clock(4)
    seen = {REST: 11, LOSSES: 3, FORWARD: 3, BATCHES: 5}
    totals = {section: (round(s.wall, 3), round(s.cpu, 3)) for section, s in timeline.totals().items()}
    assert totals == {section: (s, s / 4) for section, s in seen.items()}


def test_a_section_ends_with_an_error_too(clock):
    timeline = Timeline(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError):
        timeline.around(LOSSES, lambda: 1 / 0)()
    clock(1)
    assert timeline.totals()[REST].wall == pytest.approx(1, abs=1e-3)


def test_shares_are_those_of_whole_epochs():
    seen = {FORWARD: Seconds(6, 3), LOSSES: Seconds(2, 1), REST: Seconds(5, 1), EMBEDDING: Seconds(40, 9),
            TAILNESS: Seconds(20, 11)}  # fmt: skip
    found = Profile(steps=2, epoch_steps=10, period=3, seen=seen)
    assert found.of_period() == {
        FORWARD: Seconds(90, 45), LOSSES: Seconds(30, 15), REST: Seconds(15, 3), EMBEDDING: Seconds(40, 9),
        TAILNESS: Seconds(20, 11),
    }  # fmt: skip
    assert found.overhead() == (pytest.approx(65 / 195), pytest.approx(29 / 83))


class Slow(torch.autograd.Function):
    """Takes a second on the way back."""

    @staticmethod
    def forward(ctx, x, wait):
        ctx.wait = wait
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.wait(1)
        return gradient, None


def slowed(function, place, wait):
    """The function with a second in front, or in the backward of its result."""

    def slow(*args, **options):
        if place == "front":
            wait(1)
            return function(*args, **options)
        result = function(*args, **options)
        return (Slow.apply(result[0], wait), *result[1:]) if isinstance(result, tuple) else Slow.apply(result, wait)

    return slow


@pytest.mark.parametrize(
    ("where", "place", "expected"),
    [
        ("network", "front", {FORWARD: 4, EMBEDDING: 2}),
        ("network", "back", {FORWARD: 4}),
        ("loss", "front", {LOSSES: 4}),
        ("loss", "back", {LOSSES: 4}),
        ("step", "front", {FORWARD: 4}),
        ("augment", "front", {AUGMENTATION: 8}),
        ("images", "front", {BATCHES: 4}),
        ("embed", "front", {EMBEDDING: 2}),
        ("tailness", "front", {TAILNESS: 1}),
        ("clusters", "front", {Section("resampling", "clustering"): 1}),
        ("candidates", "front", {Section("resampling", "search"): 1}),
        ("meter", "front", {Section("step", "log"): 4}),
        ("checkpoint", "front", {Section("epoch", "log"): 1}),
    ],
)
def test_a_delay_is_found_where_it_is(where, place, expected, tmp_path, monkeypatch, clock):
    made = session(tmp_path, stages="stage1")
    stage = loop.Stage.open("stage1", made)
    targets = {
        "network": (stage.model.head[4], "forward"), "loss": (stage.method, "loss"), "step": (stage.optimizer, "step"),
        "augment": (made.augment, "forward"), "images": (Session, "images"), "embed": (Session, "embed_part"),
        "tailness": (module.ltood_fast, "cluster_tailness"), "clusters": (module.stage1, "cluster_embeddings"),
        "candidates": (module.ltood_fast, "sample_ood"), "meter": (loop.Meter, "add"), "checkpoint": (stage, "save"),
    }  # fmt: skip
    holder, name = targets[where]
    monkeypatch.setattr(holder, name, slowed(getattr(holder, name), place, clock))
    stage.epoch, stage.method.epochs = 1, 2  # the first after the warm-up: a re-sampling, then 68 images in 4 batches
    timeline = Timeline(torch.device("cpu"))
    with watched(stage, timeline):
        stage.run()
    assert {section: seconds for section, s in timeline.totals().items() if (seconds := round(s.wall, 2))} == expected


def test_the_profile_is_of_real_steps_and_leaves_no_trace(tmp_path):
    """Watched or not, the weights are the same, bit for bit."""
    weights = []
    for name in ("watched", "alone"):
        stage = loop.Stage.open("stage1", session(tmp_path / name, stages="stage1"))
        before = {key: vars(stage.method).get(key) for key in ("loss", "resample")}
        stage.method.epochs = 3
        if name == "watched":
            timeline = Timeline(torch.device("cpu"))
            with watched(stage, timeline):
                stage.run()
            forward = [mark for mark, following in pairwise(timeline.marks) if following[0] == FORWARD]
            assert len(forward) == 3 * (3 + 4 + 4)  # forward, backward, optimizer; the steps of three epochs
            assert {key: vars(stage.method).get(key) for key in before} == before
        else:
            stage.run()
        weights.append(stage.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))


def test_the_command(monkeypatch, capsys):
    def opened(config, run_dir):
        opened.config = config
        return session(run_dir, stages="stage1")

    monkeypatch.setattr(Session, "open", opened)
    keys = ["stage1.warmup_epochs=1", "stage1.epochs=5", "stage1.resample_every=2", "run.device=cpu"]
    assert main(["profile", "--config", "smoke", "--steps", "3", "--set", *keys]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "3 of 4 steps and one re-sampling timed" in lines[0]
    assert lines[1] == "2 epochs with one re-sampling:"
    parts = {tuple(line.split()[:2]) for line in lines[3:-1]}
    assert parts == {
        *(("step", part) for part in ("network", "losses", "augmentation", "batches", "log", "rest")),
        *(("epoch", part) for part in ("log", "rest")),
        *(("resampling", part) for part in ("network", "clustering", "tailness", "search", "rest")),
    }
    shares = [float(line.split()[-1]) for line in lines[3:-1]]
    assert sum(shares) == pytest.approx(100, abs=0.1)
    network = sum(share for share, line in zip(shares, lines[3:-1], strict=True) if line.split()[1] == "network")
    overhead = float(re.fullmatch(r"not the network: .+ % by wall, (.+) % by CPU; goal: 15 %", lines[-1])[1])
    assert overhead == pytest.approx(100 - network, abs=0.1)
    assert opened.config.stage1.resample_every == 2


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--steps", "-1"], "--steps must be at least 0, got -1"),
        (["--set", "stage1.alfa=1"], "config: key must be a known one, got 'stage1.alfa', did you mean stage1.alpha?"),
    ],
)
def test_what_cannot_be_profiled(argv, sentence, capsys):
    assert main(["profile", "--config", "smoke", *argv]) == 2
    assert capsys.readouterr().err == f"python -m benchmarks profile: {sentence}\n"

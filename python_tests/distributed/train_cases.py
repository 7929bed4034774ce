"""What one rank trains, for test_train.py: whole stages on made-up images, and what they end in."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import made_up
import torch
import torch.distributed as dist

from ltood_fast import cli, data
from ltood_fast.train import loop, session
from ltood_fast.train.checkpoint import CheckpointError
from ltood_fast.train.history import read_history
from ltood_fast.train.loop import Stage

# Name -> (options, stages, one network without BatchNorm). What the methods can do with other ranks' rows: neighbours
# in the batch, in a queue and in the data set, weights of all kinds, samples of all kinds, scores, both guides.
RUNS = {
    "in batch": ({"stage1__init": "simclr"}, ("simclr", "stage1", "stage2"), False),
    "queue": ({"stage1__neighbors": "queue", "stage1__neighbor_weighting": "density"}, ("stage1",), False),
    "data set": (
        {"stage1__neighbors": "dataset", "stage1__cluster_space": "projection", "stage2__guide_views": "clean"},
        ("stage1", "stage2"),
        False,
    ),
    "sdclr": (
        {"base__name": "sdclr", "stage1__init": "simclr", "stage1__tailness": "momentum"},
        ("simclr", "stage1"),
        False,
    ),
    "joint": ({"stages": "joint", "stage1__neighbor_weighting": "gate"}, ("joint",), False),
    "samples": ({"stage1__targets": "samples", "stage1__neighbor_weighting": "mutual"}, ("stage1",), False),
    "random": ({"stage1__ood_strategy": "random", "stage2__distill": "feature"}, ("stage1", "stage2"), False),
    "micro": ({"optim__micro_batch": 3, "simclr__epochs": 3}, ("simclr", "stage1", "stage2"), True),
}

# A noise of 1e-7 in the first weights of one process ends as 1e-7 with this rate and as up to 1e-2 with that of the
# other tests: BatchNorm over 16 images. With this seed no neighbour or cluster is so near a tie that noise decides.
CALM = {"optim__lr": 0.001, "seed": 4}


def as_torchrun(rank: int, world: int) -> None:
    """This process is a rank of a run on this machine."""
    for names, value in ((("RANK", "LOCAL_RANK"), rank), (("WORLD_SIZE", "LOCAL_WORLD_SIZE"), world)):
        os.environ.update(dict.fromkeys(names, str(value)))
    os.environ.update(TORCHELASTIC_RUN_ID="test", GROUP_RANK="0")


def without_batch_norm(model: torch.nn.Module) -> torch.nn.Module:
    """In place: an image's embedding then does not depend on the other images."""
    for name, child in model.named_children():
        if isinstance(child, torch.nn.modules.batchnorm._BatchNorm):
            setattr(model, name, torch.nn.Identity())
        without_batch_norm(child)
    return model


def train(run_dir: Path, name: str, epochs: int | None = None, **more: object) -> dict[str, tuple]:
    """Stage -> (weights and statistics, history) of a run trained to its end, or for some epochs of its first stage."""
    options, stages, plain = RUNS[name]
    make = session.make_model
    if plain:
        session.make_model = lambda *arguments: without_batch_norm(make(*arguments))
    try:
        run = made_up.session(run_dir, **{**CALM, **options, **more})
        found = {}
        for stage_name in stages if epochs is None else stages[:1]:
            stage = Stage.open(stage_name, run)
            if epochs is None:
                stage.run()
            else:
                for _ in range(epochs):
                    stage.train_epoch(made_up.NoBar())
                    stage.epoch += 1
                stage.save()
            weights = {key: value.clone() for key, value in stage.model.state_dict().items()}
            found[stage_name] = weights, read_history(run_dir / stage_name / "history.jsonl")
        return found
    finally:
        session.make_model = make


def train_rank(rank: int, world: int, run_dir: Path, name: str, epochs: int | None = None) -> dict[str, tuple]:
    as_torchrun(rank, world)
    return train(run_dir, name, epochs)


def turn_to_nan(stage: Stage, rank: int) -> None:
    stage.save()
    if rank == 1:
        with torch.no_grad():
            stage.model.head[0].weight.fill_(torch.nan)


def fill_disk(stage: Stage, rank: int) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise CheckpointError(f"checkpoint: {path.name} cannot be written, on rank {rank}")

    loop.save_checkpoint = refuse


# Name -> (options, what is done to a rank's stage before it runs).
FAILURES = {
    "NaN": ({}, turn_to_nan),
    "full disk": ({}, fill_disk),
    "odd batch": ({"optim__batch_size": 15}, lambda stage, rank: None),
    "few images": ({"n_id": 13}, lambda stage, rank: None),
}


def fail(rank: int, world: int, run_dir: Path, name: str) -> None:
    as_torchrun(rank, world)
    options, spoil = FAILURES[name]
    save = loop.save_checkpoint
    stage = Stage.open("simclr", made_up.session(run_dir, **options))
    spoil(stage, rank)
    try:
        stage.run()
    finally:
        loop.save_checkpoint = save


def lose_a_rank(rank: int, world: int, run_dir: Path, port: int, deadly: int, timeout: float) -> tuple[int, str]:
    """`ltood train`, whose rank 1 sends itself a signal in its second epoch: exit code and standard error."""
    dist.destroy_process_group()  # for the one that the command makes, with its time-out
    as_torchrun(rank, world)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    real, calls = session.Session.two_views, []

    def two_views(self: session.Session, *rows: object, **part: object) -> torch.Tensor:
        calls.append(rows)
        if len(calls) == 5 and rank == 1:  # three batches an epoch
            os.kill(os.getpid(), deadly)
        return real(self, *rows, **part)

    session.Session.two_views = two_views
    data.load_data = lambda config: made_up.data()
    data.make_augment = lambda config, size: made_up.Jitter()
    options = [item for key, value in made_up.SMALL.items() for item in (f"--{key}", value)]
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = cli.main(
            ["train", "--config", "smoke", "--run-dir", str(run_dir), *options, "--run.timeout", str(timeout)]
        )
    return code, errors.getvalue()

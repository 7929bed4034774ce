"""What the trainer costs a rank: memory, and bytes sent in a step and in a re-sampling, against the formulas of the
docstring of ltood_fast.train.ranks."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import made_up
import pytest
import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from ltood_fast.train.grad_cache import parts_of
from ltood_fast.train.loop import Stage

from .test_group_costs import WITHIN, assert_peaks, peak
from .train_cases import as_torchrun

pytest.importorskip("faiss")  # the processes that it starts train
WORLD = 2
BATCH, D, WIDTH, HIDDEN = 512, 128, 32, 256  # images of all ranks; sizes that outweigh the headers of messages
N = 2 * BATCH // WORLD  # views of a rank
CLUSTERS, BUDGET, ID, OOD, PIXELS = 8, 200, 600, 600, 64
MICRO, PARTS = 64, BATCH // WORLD // 64
OPTIONS = {
    "n_id": ID, "n_ood": OOD, "optim__batch_size": BATCH, "model__out": D, "model__width": WIDTH,
    "model__hidden": HIDDEN, "stage1__budget": BUDGET, "stage1__clusters": CLUSTERS, "stage1__warmup_epochs": 0,
    "stage1__refine_steps": 1,
}  # fmt: skip


def opened(rank: int, world: int, run_dir: Path, name: str, micro_batch: int = 0, **more) -> tuple[Stage, torch.Tensor]:
    """A stage two steps after its beginning, when DDP has its buckets, and a batch."""
    as_torchrun(rank, world)
    run = made_up.session(run_dir, **{**OPTIONS, **more}, optim__micro_batch=micro_batch)
    if name == "stage2":
        Stage.open("stage1", run).save()
    stage = Stage.open(name, run)
    batch = stage.batches(stage.method.begin_epoch(0))[0]
    stage.network.train()
    for _ in range(2):
        stage._backward(batch)
        stage.optimizer.step()
    return stage, batch


def sent(call: Callable[[], object]) -> int:
    """Bytes that this process writes to files and sockets, those of gloo."""

    def so_far() -> int:
        return int(re.search(r"^wchar: (\d+)$", Path("/proc/self/io").read_text(), re.MULTILINE)[1])

    dist.barrier()
    before = so_far()
    call()
    dist.barrier()
    return so_far() - before


def parameters_of(stage: Stage) -> int:
    return sum(p.numel() for p in stage.model.parameters())


def bytes_of_a_step(rank: int, world: int, run_dir: Path, name: str, micro_batch: int) -> tuple[int, float]:
    stage, batch = opened(rank, world, run_dir, name, micro_batch)
    return sent(lambda: stage._backward(batch)), step_by_formula(stage, micro_batch)


def step_by_formula(stage: Stage, micro_batch: int) -> float:
    norms = [m.num_features for m in stage.model.modules() if isinstance(m, _BatchNorm)]
    channels, layers, share = sum(norms), len(norms), (WORLD - 1) / WORLD
    forwards, backwards = (2 * PARTS, PARTS) if micro_batch else (1, 1)
    of_norms = (WORLD - 1) * forwards * (16 * channels + 8 * layers) + share * (32 * backwards * channels)
    rows = {"simclr": 4 * D + 24, "stage1": 4 * D + 8 * (4 + 2 + 2 + 1 + 1) + 8, "stage2": 8 * D + 8 * (12 + 4)}
    buffers = 8 * (channels + layers)  # of DDP, from rank 0
    return share * (8 * parameters_of(stage) + buffers) + of_norms + (WORLD - 1) * N * rows[stage.name]


def assert_close(results: list[tuple[float, float]]) -> None:
    """The mean of the ranks: the first alone sends DDP's buffers."""
    measured, expected = (sum(column) / WORLD for column in zip(*results, strict=True))
    assert abs(measured / expected - 1) <= WITHIN, (measured, expected)


def test_bytes_of_a_step(groups, tmp_path):
    for name, micro_batch in (("simclr", MICRO), ("stage1", 0), ("stage2", MICRO)):
        assert_close(groups(WORLD).results(bytes_of_a_step, tmp_path / name, name, micro_batch))


def bytes_of_a_sample(rank: int, world: int, run_dir: Path) -> tuple[int, float]:
    stage, _ = opened(rank, world, run_dir, "stage1")
    measured = sent(lambda: stage.method.resample(2))
    file = run_dir / "stage1" / "resample_0002.pt"
    measured -= file.stat().st_size if rank == 0 else 0
    features, share, iterations, steps = 4 * WIDTH, (WORLD - 1) / WORLD, 20, 1
    centroids = CLUSTERS * (4 * features + iterations * 8 * (features + 1) + steps * 8 * features)
    kept = torch.load(file)["index_clusters"].unique_consecutive(return_counts=True)[1].cumsum(0).sum()
    expected = 2 * share * (centroids + 4 * BUDGET * (features + D)) + share * ID * (4 * features + 8)
    return measured, expected + (WORLD - 1) * (16 * int(kept) + (steps + 1) * 8 * CLUSTERS)


def test_bytes_of_a_sample(groups, tmp_path):
    assert_close(groups(WORLD).results(bytes_of_a_sample, tmp_path))


def memory_of_a_step(rank: int, world: int, run_dir: Path, name: str) -> float:
    """The peak over its formula, with views enough to outweigh the rows that a loss widens to float64 at a time."""
    n, m = 2048, 2048 * WORLD
    stage, batch = opened(rank, world, run_dir, name, MICRO, n_id=m // 2, optim__batch_size=m // 2)
    stage.optimizer.zero_grad()
    images = torch.randn(n, 1, 8, 8)
    rows = parts_of(n // 2, MICRO, images.device)[0]
    part = peak(lambda: stage.network(images[rows]).sum().backward())
    stage.optimizer.zero_grad()
    measured = peak(lambda: stage._backward(batch))
    guide = 4 * n * D if name == "stage2" else 0
    loss = {"simclr": 12 * m * D + 28 * n * D, "stage2": 8 * m * D + 8 * (m + n) * D + 16 * n * D + 8 * m * 28}[name]
    return measured / (4 * PIXELS * n + guide + max(8 * n * D + loss, 12 * n * D + part))


@pytest.mark.parametrize("name", ["simclr", "stage2"])
def test_memory_of_a_step(groups, tmp_path, name):
    assert_peaks(lambda: torch.tensor(groups(WORLD).results(memory_of_a_step, tmp_path, name)))

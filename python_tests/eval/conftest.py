"""A made-up run whose every number is known: ten digit classes, three stages, three re-samplings."""

import dataclasses

import pytest
import torch

from ltood_fast.eval.groups import group_report
from ltood_fast.eval.results import Resampling, RunResults, StageResult

CLASS_COUNTS = [100, 60, 36, 22, 13, 8, 5, 3, 2, 1]
N_TEST = 50  # images a class


def make_stage(name, accuracy, loss=5.0, **changes):
    """A stage whose class c has accuracy[c] of its test images right and the rest taken for the next class."""
    C = len(accuracy)
    confusion = torch.zeros(C, C, dtype=torch.long)
    for c, a in enumerate(accuracy):
        right = round(a * N_TEST)
        confusion[c, c] = right
        confusion[c, (c + 1) % C] = N_TEST - right
    per_class = confusion.diagonal() / N_TEST
    generator = torch.Generator().manual_seed(len(name))
    labels = torch.arange(C).repeat_interleave(12)
    centres = torch.randn(C, 16, generator=generator)
    features = centres[labels] + 0.7 * torch.randn(len(labels), 16, generator=generator)
    history = [
        {"epoch": e, "loss": loss / (1 + 0.2 * e), "parts": {"psd": 0.8 * loss / (1 + 0.2 * e), "domain": 1 / (1 + e)},
         "images_per_second": 900.0 + 10 * (e % 3), "seconds": 10.0}
        for e in range(1, 11)
    ]  # fmt: skip
    stage = StageResult(
        name=name,
        probe=group_report(per_class.tolist(), CLASS_COUNTS),
        confusion=confusion.tolist(),
        knn=group_report((0.98 * per_class).tolist(), CLASS_COUNTS),
        history=history,
        test_features=features,
        test_labels=labels,
    )
    return dataclasses.replace(stage, **changes)


def make_resampling(epoch=7, **changes):
    """Five clusters: the sparser, the smaller, the richer in few classes, and the larger the budget."""
    members = [[60, 20, 6, 0, 0, 0, 0, 0, 0, 0], [30, 30, 10, 2, 1, 0, 0, 0, 0, 0], [10, 10, 18, 15, 3, 1, 0, 0, 0, 0],
               [0, 0, 2, 5, 7, 5, 2, 1, 0, 0], [0, 0, 0, 0, 2, 2, 3, 2, 2, 1]]  # fmt: skip
    budget = [10, 20, 40, 80, 150]
    generator = torch.Generator().manual_seed(epoch)
    resampling = Resampling(
        stage="stage1",
        epoch=epoch,
        tailness=[0.10, 0.13, 0.18, 0.26, 0.35],
        cluster_sizes=[sum(row) for row in members],
        budget=budget,
        cluster_classes=members,
        ood_classes=[{"A": b // 2, "B": b - b // 2} for b in budget],
        seconds=2.0,
        clustering={"nmi": 0.25, "ari": 0.125},
        thumbnails=[torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8, generator=generator) for _ in budget],
    )
    return dataclasses.replace(resampling, **changes)


def make_results(**changes):
    """A healthy run: balanced enough, stage 2 above stage 1, budgets that follow the tail."""
    base = [0.98, 0.96, 0.96, 0.94, 0.92, 0.90, 0.88, 0.80, 0.78, 0.76]
    first = [0.98, 0.96, 0.96, 0.94, 0.94, 0.92, 0.90, 0.90, 0.88, 0.86]
    second = [0.98, 0.98, 0.96, 0.96, 0.94, 0.94, 0.92, 0.92, 0.90, 0.90]
    results = RunResults(
        name="made-up",
        class_names=[str(d) for d in range(10)],
        class_counts=CLASS_COUNTS,
        scheme="rank",
        stages=[make_stage("simclr", base, 5.0), make_stage("stage1", first, 6.0), make_stage("stage2", second, 4.0)],
        resamplings=[make_resampling(3), make_resampling(5), make_resampling(7)],
        config={"stage1": {"budget": 300}, "data": {"id": "digits"}},
        build={"version": "0.1.0", "torch": "2.14.1", "cuda": False, "kernels": {"knn": {"cpu": "reference"}}},
    )
    return dataclasses.replace(results, **changes)


@pytest.fixture
def results():
    return make_results()

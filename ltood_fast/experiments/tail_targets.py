"""What tailness OOD images must be near to: centroids of clusters, of more clusters, or the sparsest images."""

from __future__ import annotations

from typing import Any

import torch

from ..data import load_data
from ..eval.groups import split_groups
from ..eval.runs import spread
from ..train.checkpoint import fitted, load_tensors
from .grid import run_folder
from .outcomes import Outcome, Outcomes
from .spec import Comparison, Experiment, Setting, Summary, Table, Variant
from .summaries import summary_of
from .variants import ORACLE_GAINS, RANDOM, TAILNESS

MANY_CLUSTERS = 100
OVER_CLUSTERED = Variant(f"clusters-{MANY_CLUSTERS}", {**TAILNESS.overrides, "stage1.clusters": str(MANY_CLUSTERS)})
SAMPLES = Variant("samples", {**TAILNESS.overrides, "stage1.targets": "samples"})


def reached_few(outcome: Outcome) -> tuple[float, float] | None:
    """Of the last re-sampling: the share of few-class images in the clusters that OOD images were taken for, each
    cluster weighted by what was taken for it; and their share of all ID images, which taking blindly reaches."""
    report = outcome.report
    samplings = [sample for sample in report.get("resamplings", ()) if sample.get("cluster_classes")]
    if not samplings:
        return None
    few = split_groups(report["class_counts"], report["scheme"])["few"]
    last = samplings[-1]
    shares = [sum(row[c] for c in few) / max(sum(row), 1) for row in last["cluster_classes"]]
    taken = sum(last["budget"])
    reached = sum(share * n for share, n in zip(shares, last["budget"], strict=True)) / max(taken, 1)
    return reached, sum(report["class_counts"][c] for c in few) / sum(report["class_counts"])


def targets_that_are_few(setting: Setting, seed: int) -> tuple[float, float] | None:
    """The same where the targets are images: their own labels count, and no report knows them."""
    saved = sorted((run_folder(setting, SAMPLES.name, seed) / "stage1").glob("resample_*.pt"))
    if not saved:
        return None
    sample, _ = load_tensors(saved[-1])
    train = load_data(setting.config.data).train
    few = split_groups(train.class_counts().tolist(), setting.config.eval.groups)["few"]
    is_few = torch.isin(train.labels, torch.tensor(few))
    with fitted(saved[-1], "a re-sampling for samples"):
        reached = float(is_few[sample["targets"]][sample["index_clusters"]].float().mean())
    return reached, float(is_few.float().mean())


def reach_table(setting: Setting, outcomes: Outcomes) -> tuple[Table, dict[str, Any]]:
    rows, values = [], {}
    for variant in outcomes.variants:
        pairs = [reached_few(run) or (targets_that_are_few(setting, run.seed) if variant == SAMPLES else None)
                 for run in outcomes.of(variant.name)]  # fmt: skip
        found = [pair for pair in pairs if pair]
        reached, blind = (spread(column) for column in zip(*found, strict=True)) if found else (None, None)
        values[variant.name] = {"reached": reached and reached._asdict(), "blind": blind and blind.mean}
        cells = [f"{100 * reached.mean:.2f}", f"{100 * blind.mean:.2f}"] if reached and blind else ["-", "-"]
        rows.append([variant.name, *cells])
    note = (
        "Share of few-class images in what OOD images are taken for (the clusters, or the sparsest images), weighted "
        "by how many are taken, and in the whole ID set; in per cent, of the last re-sampling."
    )
    return Table("Does the sampling reach the few classes?", ["variant", "reached", "blindly"], rows, note), values


def summarise(setting: Setting, outcomes: Outcomes) -> Summary:
    table, values = reach_table(setting, outcomes)
    finer = (OVER_CLUSTERED.name, SAMPLES.name)
    return summary_of(
        outcomes,
        [Comparison(TAILNESS.name, other, "few") for other in finer],
        [Comparison(TAILNESS.name, other, measure) for other in finer for measure in ("overall", "std")]
        + [Comparison(name, RANDOM.name, "few") for name in (TAILNESS.name, *finer)],
        tables=[table],
        values={"few_reached": values},
    )


TAIL_TARGETS = Experiment(
    "tail-targets",
    "do OOD images near clusters, near many clusters, or near the sparsest images serve the tail best?",
    "Clusters of the ID images tell where the tail is [paper]; so finer targets than the source's "
    "ten clusters should not serve Few better [ltood_fast].",
    lambda setting: [RANDOM, TAILNESS, OVER_CLUSTERED, SAMPLES],
    summarise,
    ORACLE_GAINS,
)

"""The three experiments of the source: balance, sampling, ablation; and the variants that all experiments share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

import numpy as np
import torch

from .._files import write_atomic
from ..train.config import to_dict
from .outcomes import TITLES, Outcomes
from .pictures import variants_figure
from .spec import Comparison, Experiment, ExperimentError, Setting, Summary, Variant
from .tables import comparisons_table, variants_table
from .verdict import Verdict, all_of, in_points, say

SIMCLR = Variant("simclr", stages=("simclr",))
NONE = Variant("none", {"stage1.ood_strategy": "none"})
RANDOM = Variant("random", {"stage1.ood_strategy": "random"})
TAILNESS = Variant("tailness", {"stage1.ood_strategy": "tailness"})  # the source's stage 1
NO_DOMAIN = Variant("no-domain", {"stage1.alpha": "0"})
NO_NEIGHBORS = Variant("no-neighbors", {"stage1.neighbor_weight": "0"})


def guided(name: str, guide: Variant = TAILNESS, **overrides: str) -> Variant:
    """A stage 2; `beta="0"` overrides stage2.beta."""
    return Variant(name, {f"stage2.{key}": value for key, value in overrides.items()}, ("stage2",), guide.name)


FULL = guided("full")  # the source's two stages
NO_DISTILLATION = guided("no-distillation", beta="0")
UNIT_WEIGHTS = guided("unit-weights", weighted="false")
FULL_NO_DOMAIN = guided("full-no-domain", NO_DOMAIN)
FULL_NO_NEIGHBORS = guided("full-no-neighbors", NO_NEIGHBORS)


def compare(deciding: Sequence[Comparison], also: Sequence[Comparison] = ()) -> Callable[[Setting, Outcomes], Summary]:
    """A summary of accuracies whose verdict comes from some paired differences; the others are shown beside them."""

    def summarise(setting: Setting, outcomes: Outcomes) -> Summary:
        return Summary(
            tables=[variants_table(outcomes), comparisons_table(outcomes, [*deciding, *also])],
            draw=lambda: variants_figure(outcomes),
            verdict=judge(outcomes, deciding),
            values={"comparisons": [_values(outcomes, comparison) for comparison in (*deciding, *also)]},
        )

    return summarise


def judge(outcomes: Outcomes, comparisons: Sequence[Comparison]) -> Verdict:
    """Of a claim that says each of them; the sentence gives them all."""
    found = [outcomes.compared(comparison) for comparison in comparisons]
    facts = "; ".join(
        f"{comparison.better} − {comparison.worse} ({TITLES[comparison.measure]}) is {in_points(difference)} points"
        for comparison, difference in zip(comparisons, found, strict=True)
    )
    n = max(difference.n for difference in found)
    decision = all_of([outcomes.decided(comparison) for comparison in comparisons])
    return say(decision, n, f"{facts} (mean ± standard error, {n} seed{'s' * (n != 1)})")


def _values(outcomes: Outcomes, comparison: Comparison) -> dict[str, object]:
    found = outcomes.compared(comparison)
    return {
        **vars(comparison),
        "mean": found.mean if found.n else None,
        "standard_error": found.error,
        "n": found.n,
        "decision": outcomes.decided(comparison),
    }


def balanced(setting: Setting) -> Variant:
    """SimCLR on as many images as the long-tailed set holds, evenly many a class: a list, or a split made here."""
    overrides = {"data.imbalance": "0", "data.split": "", "data.id_list": setting.balanced_list}
    if not setting.balanced_list:
        if setting.config.data.id == "list":
            raise ExperimentError(
                "experiment: balanced-list must be the list of a balanced set where data.id is list, got none"
            )
        overrides = {"data.imbalance": "0", "data.split": str(make_balanced_split(setting))}
    return Variant("balanced", overrides, SIMCLR.stages, counts_of=SIMCLR.name)


def make_balanced_split(setting: Setting):
    """`<output>/balanced_<hash of the data section>.npy`: rows of the whole training set, drawn by data.seed.

    Raises:
        ExperimentError: a class has too few images.
        DataError: as `load_data`.
    """
    from ..data import load_data
    from ..train.config import DataConfig

    data = to_dict(setting.config)["data"]
    name = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:8]
    path = (setting.output / f"balanced_{name}.npy").resolve()
    if path.exists():
        return path
    size = len(load_data(setting.config.data).train)
    whole = load_data(DataConfig(**{**data, "imbalance": 0.0, "split": "", "ood": ""})).train
    n_classes, generator = len(whole.class_names), torch.Generator().manual_seed(setting.config.data.seed)
    rows = []
    for c in range(n_classes):
        wanted = size // n_classes + (c < size % n_classes)
        have = (whole.labels == c).nonzero().flatten()
        if len(have) < wanted:
            raise ExperimentError(
                f"experiment: a balanced set of {size} images needs {wanted} of each class, got {len(have)} of "
                f"{whole.class_names[c]} (--balanced-list names another set)"
            )
        rows.append(have[torch.randperm(len(have), generator=generator)[:wanted]])
    split = torch.cat(rows).sort().values.numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: np.save(file, split))
    return path


SIMCLR_BALANCE = Experiment(
    "simclr-balance",
    "what does a long tail cost SimCLR?",
    "SimCLR loses accuracy on a long-tailed set against a balanced one of the same size: 75.34 against 84.62 % on "
    "CIFAR-10 (first of METHOD.md's first three experiments).",
    lambda setting: [SIMCLR, balanced(setting)],
    compare(
        [Comparison("balanced", "simclr")],
        [Comparison("balanced", "simclr", "few"), Comparison("balanced", "simclr", "std")],
    ),
)

OOD_SAMPLING = Experiment(
    "ood-sampling",
    "do OOD images help, and does it matter which?",
    "OOD images sampled by the tailness of clusters beat random ones by about 3 to 5 % (key results of METHOD.md).",
    lambda setting: [SIMCLR, NONE, RANDOM, TAILNESS],
    compare(
        [Comparison("tailness", "random")],
        [
            Comparison("tailness", "random", "few"),
            Comparison("tailness", "random", "std"),
            Comparison("tailness", "none"),
            Comparison("random", "none"),
            Comparison("tailness", "simclr"),
            Comparison("tailness", "simclr", "std"),
        ],
    ),
)

ABLATION = Experiment(
    "ablation",
    "what does each part of the method add?",
    "Every part helps: without distillation, without forces from similarity, without the domain loss or without "
    "pseudo-positives the full method loses about 1 to 2 % (mechanisms 2 and 3, first experiments of METHOD.md).",
    lambda setting: [
        SIMCLR,
        TAILNESS,
        NO_DOMAIN,
        NO_NEIGHBORS,
        FULL,
        NO_DISTILLATION,
        UNIT_WEIGHTS,
        FULL_NO_DOMAIN,
        FULL_NO_NEIGHBORS,
    ],  # fmt: skip
    compare(
        [
            Comparison("full", other)
            for other in ("no-distillation", "unit-weights", "full-no-domain", "full-no-neighbors")
        ],
        [
            Comparison("full", "tailness"),
            Comparison("full", "simclr"),
            Comparison("full", "simclr", "std"),
        ],
    ),
)

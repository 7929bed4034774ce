"""The three experiments of the source: balance, sampling, ablation."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from .._files import write_atomic
from ..train.config import DataConfig, to_dict
from .spec import Comparison, Experiment, ExperimentError, Setting, Variant
from .summaries import compare
from .variants import (
    FULL,
    FULL_NO_DOMAIN,
    FULL_NO_NEIGHBORS,
    NO_DISTILLATION,
    NO_DOMAIN,
    NO_NEIGHBORS,
    NONE,
    ORACLE_GAINS,
    RANDOM,
    SIMCLR,
    TAILNESS,
    UNIT_WEIGHTS,
)


def balanced(setting: Setting) -> Variant:
    """SimCLR on as many images as the long-tailed set holds, evenly many a class: a list, or a split made here."""
    overrides = balanced_source(setting)
    if not setting.balanced_list:
        overrides["data.split"] = str(make_balanced_split(setting))
    return Variant("balanced", overrides, SIMCLR.stages, counts_of=SIMCLR.name)


def balanced_source(setting: Setting) -> dict[str, str]:
    """Overrides that take the whole set without a long tail: the balanced list, or all of a set that needs none.

    Raises:
        ExperimentError: the set is a list, and there is no balanced one.
    """
    if setting.balanced_list:
        if Path(setting.balanced_list) == Path(setting.config.data.probe_list):
            raise ExperimentError(
                "experiment: data.probe_list must be another list than balanced-list, a larger one for all runs, got "
                f"{setting.balanced_list} twice: the probe of the balanced run would learn from that run's own images"
            )
        return {"data.imbalance": "0", "data.split": "", "data.id_list": setting.balanced_list}
    if setting.config.data.id == "list":
        raise ExperimentError(
            "experiment: balanced-list must be the list of a balanced set where data.id is list, got none"
        )
    return {"data.imbalance": "0", "data.split": ""}


def make_balanced_split(setting: Setting) -> Path:
    """`<output>/balanced_<hash of the data section>.npy`: rows of the whole training set, drawn by data.seed.

    Raises:
        ExperimentError: a class has too few images.
        DataError: as `load_data`.
    """
    from ..data import load_data

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
    "CIFAR-10 [paper].",
    lambda setting: [SIMCLR, balanced(setting)],
    compare(
        [Comparison("balanced", "simclr")],
        [Comparison("balanced", "simclr", "few"), Comparison("balanced", "simclr", "std")],
    ),
    ORACLE_GAINS,
)

OOD_SAMPLING = Experiment(
    "ood-sampling",
    "do OOD images help, and does it matter which?",
    "OOD images sampled by the tailness of clusters beat random ones by about 3 to 5 % [paper].",
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
    ORACLE_GAINS,
)

ABLATION = Experiment(
    "ablation",
    "what does each part of the method add?",
    "Every part helps: without distillation, without forces from similarity, without the domain loss or without "
    "pseudo-positives the full method loses about 1 to 2 % [paper].",
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
    ORACLE_GAINS,
)

"""The baselines and the method by name, each as changes of a configuration.

`ltood train --recipe NAME --config PRESET`: the preset says how large (network, epochs, batch, budget, T), the recipe
which method, and `--section.key value` stands over both. Figures are the papers': [paper] arXiv 2506.12698, SDCLR
[Jiang 2021, Self-Damaging Contrastive Learning], COLT [Bai 2023, On the Effectiveness of Out-of-Distribution Data in
Self-Supervised Long-Tail Learning], the latter two as their published code has them. The defaults of the
configuration hold the figures that all share: budget 10,000, from epoch 100 on every 25, tau 0.2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .._keys import did_you_mean
from .config import ConfigError

Overrides = dict[str, Any]  # "section.key" -> value

_STAGE1: Overrides = {
    "stages": ["stage1"],
    "base.name": "simclr",
    "stage1.init": "scratch",
    "stage1.ood_strategy": "tailness",
    "stage1.tailness": "sparsity",
    "stage1.targets": "clusters",
    "stage1.alpha": 0.3,  # [paper]
    "stage1.neighbor_weight": 1.0,  # [paper] names no weight
    "stage1.neighbor_weighting": "none",
}
_STAGE2: Overrides = {
    "stage2.guide": "",
    "stage2.beta": 0.4,  # [paper]
    "stage2.weighted": True,  # [paper]
}
_SDCLR: Overrides = {"stages": ["simclr"], "base.name": "sdclr"}
_COLT: Overrides = {
    **_STAGE1,
    "stage1.tailness": "momentum",
    "stage1.tailness_momentum": 0.97,  # COLT
    "stage1.tailness_k": 10,  # COLT
    "stage1.clusters": 10,  # COLT, k-means without refinement, of the projections
    "stage1.refine_steps": 0,
    "stage1.cluster_space": "projection",
    "stage1.budget_temperature": 1.0,  # COLT
    "stage1.neighbor_weight": 0.0,  # no pseudo-positives
}


class Recipe(NamedTuple):
    summary: str
    overrides: Overrides


RECIPES: dict[str, Recipe] = {
    "simclr": Recipe(
        "instance discrimination on the ID images alone [Chen 2020]", {"stages": ["simclr"], "base.name": "simclr"}
    ),
    "sdclr": Recipe("the same against a pruned competitor, SDCLR's figures for CIFAR", {**_SDCLR, "base.prune": 0.9}),
    "sdclr-imagenet100": Recipe(
        "SDCLR with its figures for ImageNet-100", {**_SDCLR, "base.prune": 0.3, "simclr.temperature": 0.3}
    ),
    # OOD images for the clusters of low momentum score, SimCLR's loss on all images and that of the domains; COLT's
    # weights of the latter for CIFAR-10 (none), CIFAR-100 and ImageNet-100.
    "colt": Recipe("OOD images by COLT's momentum score, its figures for CIFAR-10", {**_COLT, "stage1.alpha": 0.0}),
    "colt-cifar100": Recipe("COLT with its figures for CIFAR-100", {**_COLT, "stage1.alpha": 0.2}),
    # COLT's script has one interval, the 25 epochs of CIFAR, for ImageNet-100 too.
    "colt-imagenet100": Recipe("COLT with its figures for ImageNet-100", {**_COLT, "stage1.alpha": 0.01}),
    "random-ood": Recipe(
        "stage 1 with OOD images drawn at random, the baseline of the sampling [paper]",
        {**_STAGE1, "stage1.ood_strategy": "random"},
    ),
    "stage1": Recipe("stage 1: OOD images for the clusters of high tailness, L_PSD + alpha L_DD", _STAGE1),
    "two-stage": Recipe("the full method, on SimCLR", {**_STAGE1, **_STAGE2, "stages": ["stage1", "stage2"]}),
    "two-stage-sdclr": Recipe(
        "the full method, its stage 1 on SDCLR (the student of stage 2 has a guide)",
        {**_STAGE1, **_STAGE2, "stages": ["stage1", "stage2"], "base.name": "sdclr", "base.prune": 0.9},
    ),
    "joint": Recipe("all losses in one stage on ID and OOD images", {**_STAGE1, **_STAGE2, "stages": ["joint"]}),
}


def recipe(name: str) -> Overrides:
    """The overrides of a recipe.

    Raises:
        ConfigError: no such recipe; the sentence lists them.
    """
    if name not in RECIPES:
        hint = did_you_mean(name, RECIPES)
        raise ConfigError(f"config: recipe must be one of {', '.join(RECIPES)}, got {name!r}{hint}")
    return dict(RECIPES[name].overrides)

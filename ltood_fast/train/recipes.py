"""The baselines and the method by name: what each changes in a configuration.

`ltood train --recipe NAME --config PRESET`: the preset says how large (network, epochs, batch, budget, T), the recipe
which method, and `--section.key value` stands over both. Figures are the papers': [source] arXiv 2506.12698, SDCLR
[Jiang 2021, Self-Damaging Contrastive Learning], COLT [Bai 2023, On the Effectiveness of Out-of-Distribution Data in
Self-Supervised Long-Tail Learning], the latter two as their published code has them. What they share with the defaults
of the configuration stands there: budget 10,000, from epoch 100 on every 25, 10 clusters, k = 10, tau 0.2.
"""

from __future__ import annotations

import difflib
from typing import Any

from .config import ConfigError

Overrides = dict[str, Any]  # "section.key" -> value

_STAGE1: Overrides = {
    "stages": ["stage1"],
    "stage1.init": "scratch",
    "stage1.ood_strategy": "tailness",
    "stage1.alpha": 0.3,  # [source]
    "stage1.neighbor_weight": 1.0,  # [source] names no weight
    "stage1.neighbor_weighting": "none",
}
_STAGE2: Overrides = {
    "stages": ["stage1", "stage2"],
    "stage2.beta": 0.4,  # [source]
    "stage2.weighted": True,  # [source]
}

RECIPES: dict[str, Overrides] = {
    # Instance discrimination on the ID images alone [Chen 2020].
    "simclr": {"stages": ["simclr"]},
    # Stage 1 with OOD images that are drawn at random: the [source]'s baseline of the sampling.
    "random-ood": {**_STAGE1, "stage1.ood_strategy": "random"},
    # Stage 1 as it stands: OOD images for the clusters of high tailness, L_PSD + alpha L_DD.
    "stage1": _STAGE1,
    # The full method.
    "two-stage": {**_STAGE1, **_STAGE2},
}


def recipe(name: str) -> Overrides:
    """The overrides of a recipe.

    Raises:
        ConfigError: no such recipe; the sentence lists them.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise ConfigError(f"config: recipe must be one of {', '.join(RECIPES)}, got {name!r}{hint}")
    return dict(RECIPES[name])

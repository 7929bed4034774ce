"""The variants that experiments share: one name, one configuration."""

from __future__ import annotations

from ..train.config import load_config
from .spec import Comparison, Control, Setting, Variant

SIMCLR = Variant("simclr", stages=("simclr",))
NONE = Variant("none", {"stage1.ood_strategy": "none"})
RANDOM = Variant("random", {"stage1.ood_strategy": "random"})
TAILNESS = Variant("tailness", {"stage1.ood_strategy": "tailness"})  # the source's stage 1
NO_DOMAIN = Variant("no-domain", {"stage1.alpha": "0"})
NO_NEIGHBORS = Variant("no-neighbors", {"stage1.neighbor_weight": "0"})

# The control: what the method could gain if every pseudo-positive were right. ID images alone, so that no pool matters.
WITHOUT_POSITIVES = Variant(
    "control-off", {"stage1.ood_strategy": "none", "stage1.neighbors": "in_batch", "stage1.neighbor_weight": "0"}
)
TRUE_POSITIVES = Variant(
    "control-oracle",
    {
        "stage1.ood_strategy": "none",
        "stage1.neighbors": "oracle",
        "stage1.neighbor_weight": "1",
        "stage1.neighbor_weighting": "none",
    },
)
ORACLE_GAINS = Control(Comparison(TRUE_POSITIVES.name, WITHOUT_POSITIVES.name), (WITHOUT_POSITIVES, TRUE_POSITIVES))


def guided(name: str, guide: Variant = TAILNESS, **overrides: str) -> Variant:
    """A stage 2; `beta="0"` overrides stage2.beta."""
    return Variant(name, {f"stage2.{key}": value for key, value in overrides.items()}, ("stage2",), guide.name)


FULL = guided("full")  # the source's two stages
NO_DISTILLATION = guided("no-distillation", beta="0")
UNIT_WEIGHTS = guided("unit-weights", weighted="false")
FULL_NO_DOMAIN = guided("full-no-domain", NO_DOMAIN)
FULL_NO_NEIGHBORS = guided("full-no-neighbors", NO_NEIGHBORS)


def unless_same(setting: Setting, variant: Variant, known: Variant) -> Variant:
    """`known` where the preset makes `variant` the same training, so that it is trained once."""

    def config(of: Variant):
        return load_config(setting.preset, {**setting.overrides, **of.overrides, "stages": ",".join(of.stages)})

    same_start = (variant.guide, variant.trunk) == (known.guide, known.trunk)
    return known if same_start and config(variant) == config(known) else variant

"""One stage with all losses against the source's two stages."""

from __future__ import annotations

from .spec import Comparison, Experiment, Setting, Variant
from .summaries import compare
from .variants import FULL, ORACLE_GAINS, SIMCLR, TAILNESS

JOINT = Variant("joint", TAILNESS.overrides, ("joint",))


def variants(setting: Setting) -> list[Variant]:
    """The joint stage for the epochs of stage 1, and for those of both stages."""
    epochs = setting.config.stage1.epochs + setting.config.stage2.epochs
    longer = Variant("joint-long", {**JOINT.overrides, "stage1.epochs": str(epochs)}, JOINT.stages)
    return [SIMCLR, TAILNESS, FULL, JOINT, longer]


JOINT_VS_TWO_STAGE = Experiment(
    "joint-vs-two-stage",
    "are two stages better than one with all losses?",
    "Training on ID and OOD images in a single stage with all losses degrades accuracy against two stages (the "
    "source's hypothesis); the joint stage gets the epochs of both.",
    variants,
    compare(
        [Comparison("full", "joint-long")],
        [
            Comparison("full", "joint-long", "few"),
            Comparison("full", "joint-long", "std"),
            Comparison("full", "joint"),
            Comparison("full", "tailness"),
            Comparison("joint", "tailness"),
        ],
    ),
    ORACLE_GAINS,
)

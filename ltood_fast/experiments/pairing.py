"""Branches from one trunk: who is attracted to whom, and which OOD images join, at the same weights and epochs.

Every seed trains one network of SimCLR, the trunk; the branches go on from its weights and differ in one thing each. A
difference between branches has no spread from the trunk, so that fewer seeds find it.
"""

from __future__ import annotations

from .spec import Comparison, Control, Experiment, Setting, Variant
from .summaries import compare
from .variants import guided

TRUNK = Variant("trunk", stages=("simclr",))
PLAIN = {
    "stage1.ood_strategy": "none",
    "stage1.warmup_epochs": "0",
    "stage1.neighbors": "in_batch",
    "stage1.neighbor_weighting": "none",
    "stage1.neighbor_weight": "0",
}


def branch(name: str, **overrides: str) -> Variant:
    """`pairing="cross"` overrides stage1.pairing."""
    keys = {f"stage1.{key}": value for key, value in overrides.items()}
    return Variant(f"branch-{name}", {**PLAIN, **keys}, trunk=TRUNK.name)


OFF = branch("off")
SAME = branch("same", neighbor_weight="1", pairing="same")
CROSS = branch("cross", neighbor_weight="1", pairing="cross")
RANDOM_OOD = branch("random", ood_strategy="random")
TAILNESS_OOD = branch("tailness", ood_strategy="tailness")
BOTH = branch("tailness-cross", ood_strategy="tailness", neighbor_weight="1", pairing="cross")
ORACLE = branch("oracle", neighbors="oracle", neighbor_weight="1")
STUDENT = guided("branch-student", TAILNESS_OOD)
CLEAN_STUDENT = guided("branch-student-clean", TAILNESS_OOD, guide_views="clean")


def variants(setting: Setting) -> list[Variant]:
    return [TRUNK, OFF, SAME, CROSS, RANDOM_OOD, TAILNESS_OOD, BOTH, STUDENT, CLEAN_STUDENT]


PAIRING = Experiment(
    "pairing",
    "which pairs of pseudo-positives, which OOD images, as branches from one trunk?",
    "A row's own nearest neighbour is as good a positive as that of its other view [paper names no pairing; NNCLR has "
    "the other view's].",
    variants,
    compare(
        [Comparison(SAME.name, CROSS.name)],
        [
            Comparison(SAME.name, OFF.name),
            Comparison(CROSS.name, OFF.name),
            Comparison(RANDOM_OOD.name, OFF.name),
            Comparison(TAILNESS_OOD.name, RANDOM_OOD.name),
            Comparison(TAILNESS_OOD.name, RANDOM_OOD.name, "few"),
            Comparison(BOTH.name, TAILNESS_OOD.name),
            Comparison(STUDENT.name, TAILNESS_OOD.name),
            Comparison(CLEAN_STUDENT.name, STUDENT.name),
        ],
    ),
    Control(Comparison(ORACLE.name, OFF.name), (OFF, ORACLE)),
)

"""Every experiment by name."""

from __future__ import annotations

from .baselines import BASELINES
from .imbalance import EXTREME_IMBALANCE
from .joint import JOINT_VS_TWO_STAGE
from .pairing import PAIRING
from .paper_claims import ABLATION, OOD_SAMPLING, SIMCLR_BALANCE
from .pseudo_positives import PSEUDO_POSITIVES
from .relevance import OOD_RELEVANCE
from .sampler_scaling import SAMPLER_SCALING
from .sensitivity import SENSITIVITY
from .spec import Experiment
from .tail_targets import TAIL_TARGETS

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        SIMCLR_BALANCE,
        OOD_SAMPLING,
        ABLATION,
        BASELINES,
        OOD_RELEVANCE,
        JOINT_VS_TWO_STAGE,
        EXTREME_IMBALANCE,
        SAMPLER_SCALING,
        SENSITIVITY,
        PSEUDO_POSITIVES,
        TAIL_TARGETS,
        PAIRING,
    )
}

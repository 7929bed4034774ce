"""Every experiment by name."""

from __future__ import annotations

from .core import ABLATION, OOD_SAMPLING, SIMCLR_BALANCE
from .spec import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment for experiment in (SIMCLR_BALANCE, OOD_SAMPLING, ABLATION)
}

"""The method's claims, each tested by one command: `ltood experiment NAME`."""

from .command import list_experiments, run_experiment
from .spec import ExperimentError, Setting

__all__ = ["ExperimentError", "Setting", "list_experiments", "run_experiment"]

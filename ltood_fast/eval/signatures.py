"""Failure signatures of the method, checked on a run's results and spoken in plain sentences.

METHOD: a high spread over Many, Medium and Few says that the OOD images do not reach the tail classes; stage 2 below
stage 1 says that distillation holds the student back; re-sampling that takes ever more of the time says that the search
for neighbours has outgrown its method [source]. The thresholds, and the checks of purity and of the loss, are [ours].
"""

from __future__ import annotations

from dataclasses import dataclass

from .results import RunResults


@dataclass(frozen=True)
class Signature:
    """One check: what was seen, and what to do about it."""

    name: str
    state: str
    """``ok``, ``warning`` or ``unknown`` (the run holds nothing to judge by)."""
    sentence: str
    remedy: str
    """What to try; empty unless the state is ``warning``."""


def check_signatures(results: RunResults) -> list[Signature]:
    """Every signature, in the order of this file."""
    return [check(results) for check in CHECKS]


CHECKS = ()

"""The stages as methods: which images an epoch shows, and the loss of a batch.

A method holds its hyper-parameters and its own state; the loop (`train.loop`) knows nothing of either. `METHODS` is the
registry: stage name -> class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint import CheckpointError, load_checkpoint
from ..config import start_of, to_dict
from ..session import Session
from .base import Loss, Method
from .joint import Joint
from .simclr import SimCLR
from .stage1 import Stage1
from .stage2 import Stage2

__all__ = ["METHODS", "Joint", "Loss", "Method", "SimCLR", "Stage1", "Stage2", "first_state"]

METHODS: dict[str, type[Method]] = {"simclr": SimCLR, "stage1": Stage1, "stage2": Stage2, "joint": Joint}


def first_state(stage: str, session: Session) -> dict[str, Any] | None:
    """The checkpoint whose weights a stage starts from, of a stage before it or of another run; None: fresh weights.

    Raises:
        CheckpointError: no such checkpoint, or one of another network.
    """
    config = session.config
    given = {"stage1": config.stage1.init_from, "joint": config.stage1.init_from, "stage2": config.stage2.guide}
    if path := given.get(stage, ""):
        state = load_checkpoint(Path(path))
        mine, theirs = ({**part["model"], "channels": n} for part, n in
                        ((to_dict(config), session.channels), (state["config"], state["channels"])))  # fmt: skip
        free = ("channels_last", "sync_batchnorm", "init")  # how it is computed and where it began, not what it is
        if other := [key for key in mine if key not in free and key in theirs and mine[key] != theirs[key]]:
            raise CheckpointError(f"checkpoint: {path} must be of this run's network, got another {', '.join(other)}")
        return state
    before = start_of(stage, config)
    return None if before is None else load_checkpoint(session.run_dir / before / "last.pt", config)

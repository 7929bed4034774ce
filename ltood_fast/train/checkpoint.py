"""Checkpoints: whole or not there, plain tensors and values only, checked before anything is taken from them.

One file of rank 0, not torch.distributed.checkpoint: under DDP every rank holds the same state, which any number of
ranks, or one process, then reads.
"""

from __future__ import annotations

import io
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._files import write_atomic
from .config import Config, differing_keys, to_dict

FORMAT = "ltood_fast checkpoint"
VERSION = 1
FIELDS = frozenset({"stage", "epoch", "finished", "channels", "config", "model", "optimizer", "rng", "method"})
COMPETITOR = "competitor"  # one more field, of a stage that is trained with base.name sdclr


class CheckpointError(RuntimeError):
    """A sentence about one checkpoint."""


def rng_state() -> dict[str, Any]:
    """Of torch (CPU and, where there is one, CUDA), NumPy and Python, as values that `weights_only` loading allows."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        "python": random.getstate(),
    }


def restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    random.setstate(state["python"])


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def save_tensors(path: Path, state: dict[str, Any]) -> None:
    """Writes what `torch.load(path, weights_only=True)` reads, atomically.

    Raises:
        CheckpointError: the file cannot be written; one of that name that was there before is kept.
    """
    buffer = io.BytesIO()  # torch's zip writer turns an error of the disk into one of its own: write in one go instead
    torch.save(state, buffer)
    try:
        write_atomic(path, lambda file: file.write(buffer.getbuffer()))
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(
            f"checkpoint: {path} cannot be written ({reason}); what was saved before is kept"
        ) from error


def save_checkpoint(path: Path, config: Config, **state: Any) -> None:
    """Saves the state of a stage (the names in FIELDS) with the configuration it belongs to."""
    state = {
        "format": FORMAT,
        "version": VERSION,
        "config": to_dict(config),
        **state,
    }
    assert state.keys() - {COMPETITOR} == FIELDS | {"format", "version"}
    save_tensors(path, state)


def load_checkpoint(path: Path, config: Config | None = None) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU.

    Args:
        path: what `save_checkpoint` wrote.
        config: given, the configuration that the checkpoint must have been trained with, in what its stage reads.

    Raises:
        CheckpointError: no such file; truncated or damaged; not ours or of another version; another configuration.
    """

    def refuse(allowed: str, got: object) -> CheckpointError:
        return CheckpointError(f"checkpoint: {path} must be {allowed}, got {got}")

    if not Path(path).is_file():
        raise refuse("a checkpoint file", "a folder" if Path(path).is_dir() else "no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise refuse("a whole checkpoint of ltood_fast", f"a truncated or foreign file ({reason})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise refuse("a checkpoint of ltood_fast", "a file of something else")
    if state.get("version") != VERSION:
        raise refuse(f"of format version {VERSION}", state.get("version"))
    if missing := FIELDS - state.keys():
        raise refuse("complete", f"no {', '.join(sorted(missing))}")
    if config is not None and (keys := differing_keys(config, state["config"], state["stage"])):
        raise refuse("of this run's configuration", f"one that differs in {', '.join(keys)}")
    return state

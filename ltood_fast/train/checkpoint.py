"""Checkpoints: whole or not there, plain tensors and values only, checked before anything is taken from them.

One file of rank 0, not torch.distributed.checkpoint: under DDP every rank holds the same state, which any number of
ranks, or one process, then reads.

A file is what `torch.save` writes, a zip archive, whose comment is the SHA-256 of everything before it: torch looks at
no checksum of its own, and 307 of 375 single bit flips loaded as other weights. `torch.load` and `unzip` read the file
as any other archive. The checkpoint before is kept next to `last.pt` as `previous.pt`.
"""

from __future__ import annotations

import hashlib
import io
import random
import re
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._files import write_atomic
from .config import Config, differing_keys, to_dict
from .ranks import launched_ranks

FORMAT = "ltood_fast checkpoint"
VERSION = 2
UNSEALED = 1  # the version without a checksum, otherwise the same
FIELDS = {
    "stage": str,
    "epoch": int,
    "finished": bool,
    "channels": int,
    "config": dict,
    "model": dict,
    "optimizer": dict,
    "rng": dict,
    "method": dict,
}
COMPETITOR = "competitor"  # one more field, of a stage that is trained with base.name sdclr
PREVIOUS = "previous.pt"
SEAL = re.compile(rb"ltood_fast sha256 ([0-9a-f]{64})")
SEAL_BYTES = 18 + 64
# Errors that torch and the trainer raise at unexpected values; Ctrl-C and their own bugs raise others.
MISFITS = (AttributeError, LookupError, TypeError, ValueError, RuntimeError, OverflowError)


class CheckpointError(RuntimeError):
    """A sentence about one checkpoint."""


def rng_state() -> dict[str, Any]:
    """Random states of torch (CPU, and CUDA if any), NumPy and Python, as values that `weights_only` loading allows."""
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


def save_tensors(path: Path, state: dict[str, Any], keep: Path | None = None) -> None:
    """Writes what `load_tensors` and `torch.load(path, weights_only=True)` read, atomically; see `write_atomic`.

    Raises:
        CheckpointError: the file cannot be written; one of that name that was there before is kept.
    """
    buffer = io.BytesIO()  # torch's zip writer turns an error of the disk into one of its own: write in one go instead
    torch.save(state, buffer)
    archive = buffer.getbuffer()
    archive[-2:] = SEAL_BYTES.to_bytes(2, "little")  # the length of the archive's comment, its last field
    seal = b"ltood_fast sha256 " + hashlib.sha256(archive).hexdigest().encode()
    try:
        write_atomic(path, lambda file: (file.write(archive), file.write(seal)), keep)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(
            f"checkpoint: {path} cannot be written ({reason}); what was saved before is kept"
        ) from error


def load_tensors(path: Path) -> tuple[dict[str, Any], bool]:
    """Reads onto the CPU what `save_tensors` wrote; (the values, whether the file carries a checksum).

    Raises:
        CheckpointError: no such file; truncated, damaged or foreign.
    """
    path = Path(path)
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no regular file" if path.exists() else "no such file"
        raise _refused(path, "a checkpoint file", got)
    whole = "a whole checkpoint of ltood_fast"
    try:
        content = path.read_bytes()
    except (OSError, MemoryError) as error:
        raise _refused(path, whole, f"one that cannot be read ({_reason(error)})") from error
    seal = SEAL.fullmatch(content[-SEAL_BYTES:])
    if seal and hashlib.sha256(memoryview(content)[:-SEAL_BYTES]).hexdigest().encode() != seal[1]:
        raise _refused(path, whole, "a damaged one (its content is not that of its checksum)")
    if not content.startswith(b"PK"):
        raise _refused(path, whole, "an empty file" if not content else "a file of another kind")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that torch did not write can raise anything in its reader
        raise _refused(path, whole, f"a truncated or foreign file ({_reason(error)})") from error
    if not isinstance(state, dict):
        raise _refused(path, "a checkpoint of ltood_fast", "a file of something else")
    return state, seal is not None


def save_checkpoint(path: Path, config: Config, **state: Any) -> None:
    """Saves the state of a stage (the names in FIELDS) with the configuration it belongs to; keeps the one before."""
    state = {
        "format": FORMAT,
        "version": VERSION,
        "config": to_dict(config),
        **state,
    }
    assert state.keys() - {COMPETITOR} == FIELDS.keys() | {"format", "version"}
    save_tensors(path, state, keep=path.with_name(PREVIOUS))


def load_checkpoint(path: Path, config: Config | None = None) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU.

    Args:
        path: what `save_checkpoint` wrote.
        config: given, the configuration that the checkpoint must have been trained with, in what its stage reads.

    Raises:
        CheckpointError: no such file; truncated or damaged, with the checkpoint before it where that one is whole; not
            ltood_fast's or of another version; another configuration.
    """
    path = Path(path)
    try:
        state = _load_whole(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_offer(path)}") from error
    if config is not None and (keys := differing_keys(config, state["config"], state["stage"])):
        raise _refused(path, "of this run's configuration", f"one that differs in {', '.join(keys)}")
    return state


def _load_whole(path: Path) -> dict[str, Any]:
    state, sealed = load_tensors(path)
    version = state.get("version")
    if state.get("format") != FORMAT:
        raise _refused(path, "a checkpoint of ltood_fast", "a file of something else")
    if version not in (UNSEALED, VERSION):
        raise _refused(path, f"of format version {VERSION}", version)
    if missing := FIELDS.keys() - state.keys():
        raise _refused(path, "complete", f"no {', '.join(sorted(missing))}")
    if wrong := [name for name, kind in FIELDS.items() if not isinstance(state[name], kind)]:
        raise _refused(path, "whole", f"values of another type in {', '.join(wrong)}")
    if version == VERSION and not sealed:
        raise _refused(path, "whole", "one without the checksum that version 2 carries at its end")
    if not sealed and launched_ranks()[0] == 0:
        warnings.warn(
            f"checkpoint: {path} carries no checksum, as an earlier version wrote it; it is used unchecked",
            stacklevel=4,
        )
    return state


def _offer(path: Path) -> str:
    """A clause about the checkpoint before, where there is a whole one."""
    previous = path.with_name(PREVIOUS)
    if path.name == PREVIOUS or not path.is_file():
        return ""
    try:
        epoch = _load_whole(previous)["epoch"]
    except CheckpointError:
        return ""
    move = shlex.join(["mv", str(previous), str(path)])
    return f"; the one before it is whole: to go on from {epoch} finished epochs, {move}"


@contextmanager
def fitted(path: Path | str, to: str) -> Iterator[None]:
    """Turns what is raised while values of a file are put to use into one sentence that names the file.

    Raises:
        CheckpointError: for anything but a CheckpointError itself.
    """
    try:
        yield
    except (CheckpointError, torch.OutOfMemoryError):
        raise
    except MISFITS as error:
        raise _refused(path, f"of {to}", f"one that does not fit ({_reason(error)})") from error


def _refused(path: Path | str, allowed: str, got: object) -> CheckpointError:
    return CheckpointError(f"checkpoint: {path} must be {allowed}, got {got}")


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).strip().splitlines()]
    text = f"{lines[0]} {lines[1]}" if len(lines) > 1 and lines[0].endswith(":") else lines[0] if lines else ""
    return text.split(". ")[0] or type(error).__name__

"""Files that are either whole or not there: written next to their place, flushed to disk, then renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def partial_of(path: Path) -> Path:
    """A name for an unfinished `path` that no other writer takes: process id and 32 random bits."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


def remove_partials(folder: Path) -> None:
    """Removes what writers that were killed have left; for a folder that nobody writes into."""
    for path in folder.glob(".*.partial"):
        with contextlib.suppress(OSError):
            path.unlink()


def write_atomic(path: Path, write: bytes | Callable[[BinaryIO], object], keep: Path | None = None) -> None:
    """Replaces `path` with what `write` writes; whatever fails or dies on the way, `path` is the old or the new file.

    Args:
        path: the file; its folder must exist.
        write: the content, or a function that writes it to an open file.
        keep: where the old file goes, in the same folder; None: nowhere.

    Raises:
        OSError: the file cannot be written (full disk, permissions); it names `path`, and nothing is left behind.
    """
    path = Path(path)
    temporary = partial_of(path)
    try:
        with open(temporary, "xb") as file:
            if isinstance(write, bytes):
                file.write(write)
            else:
                write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            _keep(path, keep)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            error.filename, error.filename2 = str(path), None
        raise


def _keep(path: Path, keep: Path) -> None:
    """Gives the file a second name, so that at no moment `path` is missing."""
    temporary = partial_of(keep)
    try:
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links, or a full one, on which the copy fails as well
            write_atomic(keep, path.read_bytes())
            return
        os.replace(temporary, keep)
    finally:
        temporary.unlink(missing_ok=True)  # a rename between two names of one file does nothing


def _sync_folder(folder: Path) -> None:
    """The rename itself must survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

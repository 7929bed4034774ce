"""One process trains in a run's folder: a lock that the system lets go of with the process, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .._files import remove_partials
from .ranks import launched_ranks

NAME = ".lock"
_held: set[IO[str]] = set()


class LockedError(RuntimeError):
    """A sentence about a folder that another process trains in."""


def _let_go_after_fork() -> None:
    """A forked child (a worker that decodes) would hold the lock of a parent that was killed; closing lets go of
    nothing while the parent lives."""
    while _held:
        _held.pop().close()


os.register_at_fork(after_in_child=_let_go_after_fork)


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Makes the folder and holds `<run_dir>/.lock`; of several ranks rank 0 alone.

    Unfinished files of writers that were killed are removed. A folder that is made here and stays empty, as the run was
    refused, is taken away again.

    `fcntl.flock` as in `data.decode` and `experiments.grid`, without another dependency: the kernel releases it with
    the process, after `kill -9` too. Where the file system knows no locks, a warning says so and the run goes on.

    Raises:
        LockedError: another process holds it; the folder cannot be made.
        OSError: the folder cannot be written.
    """
    if launched_ranks()[0] > 0:
        yield
        return
    file = next((path for path in (run_dir, *run_dir.parents) if path.exists()), run_dir)
    if not file.is_dir():
        raise LockedError(f"train: run-dir must be a folder, got {run_dir}, where {file} is a file")
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LockedError(
            f"train: run-dir must be a folder that can be made, got {run_dir} ({error.strerror})"
        ) from None
    try:
        with _locked(run_dir / NAME):
            for folder in (run_dir, *(path for path in run_dir.iterdir() if path.is_dir())):
                remove_partials(folder)
            try:
                yield
            finally:
                if made and [path.name for path in run_dir.iterdir()] == [NAME]:
                    (run_dir / NAME).unlink()
    finally:
        with contextlib.suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    file = _open_locked(path)
    _held.add(file)
    try:
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
    finally:
        _held.discard(file)
        with contextlib.suppress(OSError):
            file.truncate(0)
        file.close()


def _open_locked(path: Path) -> IO[str]:
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  closed by `_locked`
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200) or "another process"
            file.close()
            raise LockedError(
                f"train: run-dir must be free, got {path.parent}, in which {holder} trains; wait for its end, or take "
                "another folder"
            ) from None
        except OSError as error:
            warnings.warn(f"train: {path.parent} cannot be locked ({error.strerror}); let no other process train in it",
                          stacklevel=2)  # fmt: skip
            return file
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)  # of the name that a killed process left
            return file
        file.close()  # its holder has taken the file away meanwhile

"""Trains the smoke preset on made-up images while every operation of every write fails in turn: see test_faults.py.

Each attempt is a forked child of this process, which has imported everything and runs one thread. An attempt goes on
with the folder of the one before and fails at the first operation that has not failed yet: with "error" by ENOSPC, with
"stop" by ending the process at once, before the operation and, for a write, after half of it. Prints one JSON object:
how many operations of each kind failed.
"""

from __future__ import annotations

import builtins
import errno
import os
import re
import sys
from collections import Counter
from pathlib import Path

import torch
from made_up import SMALL, Jitter, Plain, data

import ltood_fast._files as files
from ltood_fast import data as data_sets
from ltood_fast.cli import main
from ltood_fast.train import run

STOPPED, FAILED = 77, 2


class Faults:
    """What has failed, as "operation file epoch number"; one fails an attempt.

    The epoch is that of the stage's checkpoint, so that a repeated epoch is known again; the number counts the same
    operation on the same file before the epoch is saved.
    """

    def __init__(self, kind: str, journal: Path, only: str):
        self.kind, self.journal, self.only = kind, journal, only
        self.failed = set(journal.read_text().splitlines()) if journal.exists() else set()
        self.seen: Counter[str] = Counter()
        self.armed = True

    def at(self, operation: str, path: object) -> bool:
        """Whether the operation fails now; with "stop" it does not come back."""
        if not self.armed:
            return False
        name = re.sub(r"^\.|\.\d+-[0-9a-f]{8}\.partial$", "", Path(str(path)).name)
        folder = Path(str(path)).parent
        epoch = torch.load(folder / "last.pt", weights_only=True)["epoch"] if (folder / "last.pt").exists() else 0
        key = f"{operation} {folder.name}/{name} {epoch}"
        self.seen[key] += 1
        key = f"{key} {self.seen[key]}"
        if key in self.failed or not re.search(self.only, key):
            return False
        self.armed = (
            self.kind == "none" or operation == "link" and self.kind == "error"
        )  # a copy takes its place: the attempt goes on
        with builtins.open(self.journal, "a") as file:
            file.write(key + "\n")
        return self.kind != "none"

    def hit(self, operation: str, path: object) -> None:
        if self.at(operation, path):
            if self.kind == "stop":
                os._exit(STOPPED)
            raise OSError(errno.ENOSPC, "No space left on device", str(path))


class File:
    def __init__(self, faults: Faults, path: Path, mode: str):
        faults.hit("open", path)
        self.faults, self.path, self.file = faults, path, builtins.open(path, mode)  # noqa: SIM115

    def write(self, data: bytes) -> int:
        half = bytes(data)[: len(data) // 2]
        if self.faults.at("write", self.path):
            self.file.write(half)
            self.file.flush()
            if self.faults.kind == "stop":
                os._exit(STOPPED)
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def flush(self) -> None:
        self.faults.hit("flush", self.path)
        self.file.flush()

    def fileno(self) -> int:
        return self.file.fileno()

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


class System:
    """The functions of `os` that `_files` calls."""

    def __init__(self, faults: Faults):
        self.faults, self.folders = faults, {}

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    def fsync(self, descriptor: int) -> None:
        if descriptor in self.folders:
            self.faults.hit("fsync folder", self.folders[descriptor])
        else:
            self.faults.hit("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        os.fsync(descriptor)

    def link(self, path: Path, to: Path) -> None:
        self.faults.hit("link", to)
        os.link(path, to)

    def replace(self, path: Path, to: Path) -> None:
        self.faults.hit("replace", to)
        os.replace(path, to)

    def open(self, folder: Path, flags: int) -> int:
        self.faults.hit("open folder", folder / "last.pt")
        descriptor = os.open(folder, flags)
        self.folders[descriptor] = folder / "last.pt"
        return descriptor

    def close(self, descriptor: int) -> None:
        self.folders.pop(descriptor, None)
        os.close(descriptor)


def attempt(kind: str, run_dir: Path, journal: Path, only: str) -> int:
    """Exit code of a child that trains on."""
    if (child := os.fork()) > 0:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 99
    try:
        faults = Faults(kind, journal, only)
        files.os, files.open = System(faults), lambda path, mode: File(faults, path, mode)
        keys = [text for key, value in SMALL.items() for text in (f"--{key}", value)]
        code = main(["train", "--config", "smoke", "--run-dir", str(run_dir), "--resume", *keys])
    finally:
        sys.stderr.flush()
        os._exit(code)
    return code


def train_through(kind: str, run_dir: Path, only: str) -> None:
    journal = run_dir.with_name(f"{run_dir.name}.faults")
    expected = STOPPED if kind == "stop" else FAILED
    failed = 0
    while (code := attempt(kind, run_dir, journal, only)) != 0:
        before, failed = failed, len(journal.read_text().splitlines()) if journal.exists() else 0
        if code != expected or failed == before:
            raise SystemExit(f"attempt ended with {code}, expected {expected}, after {failed - before} faults")


def prepare() -> None:
    """Once, for all attempts: one thread, as a fork has no others; data; slow imports."""
    torch.set_num_threads(1)
    import faiss  # noqa: F401
    import lightning_fabric  # noqa: F401
    from torch.utils import tensorboard  # noqa: F401

    sets = data()
    data_sets.load_data = lambda config: sets
    data_sets.make_augment = lambda config, size: Jitter()
    data_sets.make_eval_transform = lambda size: Plain()
    run.report_run = lambda session: "trained"


if __name__ == "__main__":
    prepare()
    train_through(sys.argv[1], Path(sys.argv[2]), sys.argv[3])

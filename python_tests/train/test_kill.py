"""`kill -9` at any moment, then `--resume`: the weights end bit for bit as those of a run that nobody touched."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from made_up import final_state, same

pytest.importorskip("faiss")  # the processes that it starts train
ROOT = Path(__file__).resolve().parents[2]

# Runs `ltood` and kills its own process at the n-th call of a function: before it, or halfway through a write.
DRIVER = """
import os, signal, sys
import ltood_fast._files as files
from ltood_fast.cli import main
from ltood_fast.train import loop, run, session

run.report_run = lambda session: "trained"

point, n = sys.argv[1], int(sys.argv[2])
calls = 0

def deadly(function, after=False):
    def wrapper(*args, **options):
        global calls
        calls += 1
        result = function(*args, **options) if after or calls != n else None
        if calls == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapper

if point == "batch":
    session.Session.two_views = deadly(session.Session.two_views)
elif point == "half-written":
    class HalfFile:
        def __init__(self, path, mode): self.file = real_open(path, mode)
        def __enter__(self): return self
        def __exit__(self, *error): self.file.close()
        def __getattr__(self, name): return getattr(self.file, name)
        def write(self, data):
            half = bytes(data)[: len(data) // 2]
            deadly(lambda: (self.file.write(half), self.file.flush()), after=True)()
            return self.file.write(bytes(data)[len(half):])
    real_open = open
    files.open = HalfFile
elif point == "before rename":
    files.os.replace = deadly(os.replace)
elif point == "logged":
    loop.History.add = deadly(loop.History.add, after=True)
sys.exit(main(sys.argv[3:]))
"""


def ltood(point: str, n: int, *argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", DRIVER, point, str(n), *argv]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def test_killed_at_many_points_and_resumed(tmp_path):
    new = ("train", "--config", "smoke", "--run-dir")
    whole = ltood("never", 0, *new, str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    broken = str(tmp_path / "broken")
    kills = [
        ("batch", 8),  # in the second epoch of SimCLR
        ("half-written", 2),  # SimCLR's last checkpoint (the first write is the history)
        ("logged", 1),  # SimCLR's second epoch is in the history, not in the checkpoint
        ("batch", 9),  # in stage 1, after a re-sampling
        ("before rename", 6),  # stage 1's last checkpoint but one is written, not yet in its place
        ("logged", 3),  # stage 2's first epoch
    ]
    for i, (point, n) in enumerate(kills):
        killed = ltood(point, n, *(new if i == 0 else ("train", "--resume", "--run-dir")), broken)
        assert killed.returncode == -signal.SIGKILL, f"{point} {n}: {killed.returncode} {killed.stderr}"
    resumed = ltood("never", 0, "train", "--resume", "--run-dir", broken)
    assert resumed.returncode == 0, resumed.stderr
    expected, got = final_state(tmp_path / "whole"), final_state(tmp_path / "broken")
    for stage in expected:
        assert same(got[stage], expected[stage]), stage  # weights, optimiser, RNG, sampled images: everything

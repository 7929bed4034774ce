"""Every operation of every write fails once, or the process ends there; the run goes on to the same weights."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from made_up import final_state, same

pytest.importorskip("faiss")  # the processes that it starts train
DRIVER = Path(__file__).with_name("faults.py")
ROOT = DRIVER.parents[2]
# Which operations: a pattern of "operation folder/file epoch number". `make faults` takes them all, 322 in 3 minutes.
ONLY = os.environ.get("LTOOD_FAULTS", r" (run|simclr)/")


def train_through(kind: str, run_dir: Path, only: str) -> tuple[list[str], str]:
    """(what failed, stderr)"""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python_tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, str(DRIVER), kind, str(run_dir), only]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return run_dir.with_name(f"{run_dir.name}.faults").read_text().splitlines(), ended.stderr


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(the last checkpoints, the operations of a run in which nothing fails)"""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    operations, _ = train_through("none", run_dir, ONLY)
    return final_state(run_dir), operations


@pytest.mark.parametrize("kind", ["error", "stop"])
def test_a_fault_at_every_write_changes_no_weight(kind, undisturbed, tmp_path):
    expected, operations = undisturbed
    failed = []
    # After the rename the folder is opened and flushed; if the one fails, the run goes on behind the other: two runs.
    for name, part in (("first", "(?!fsync folder)"), ("second", "fsync folder")):
        run_dir = tmp_path / name / "run"
        run_dir.parent.mkdir()
        found, said = train_through(kind, run_dir, f"^{part}.*(?:{ONLY})")
        failed += found
        got = final_state(run_dir)
        for stage in expected:
            assert same(got[stage], expected[stage]), stage
        assert not list(run_dir.rglob("*.partial"))
        errors = [line for line in said.splitlines() if line.startswith("ltood: error: ")]
        links = sum(key.startswith("link") for key in found)  # replaced by a copy: nothing to say
        assert len(errors) == (len(found) - links if kind == "error" else 0)
        assert all("No space left on device" in line and str(run_dir) in line for line in errors)
    print(f"{kind}: {len(failed)} faults")
    assert not set(operations) - set(failed)


def test_the_operations_are_those_that_a_write_has(undisturbed):
    kinds = {re.match(r"(\D+?) \w+/", key)[1] for key in undisturbed[1]}
    assert kinds == {"open", "write", "flush", "fsync", "link", "replace", "open folder", "fsync folder"}
    archive_and_seal = {"write simclr/last.pt 1 1", "write simclr/last.pt 1 2"}
    assert archive_and_seal <= set(undisturbed[1])

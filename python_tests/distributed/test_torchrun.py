"""`torchrun -m ltood_fast train`, from its command line to its report."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("faiss")  # the processes that it starts train
ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--config", "smoke", "--run.progress", "false", "--run.threads", "1")


def test_torchrun_trains_and_rank_0_reports(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "ltood_fast"]
    command += ["train", *SMALL, "--stages", "simclr", "--run-dir", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("report: ") == 1
    assert (tmp_path / "report.html").exists()
    assert torch.load(tmp_path / "simclr" / "last.pt", weights_only=True)["finished"]
    assert len((tmp_path / "simclr" / "history.jsonl").read_text().splitlines()) == 2

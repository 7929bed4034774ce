import json
import sys

import pytest
from made_up_runs import make_report

from ltood_fast.experiments import grid
from ltood_fast.experiments.spec import Setting
from ltood_fast.train.config import save_config

# Stands for `ltood train`: notes that it ran, then leaves the report that lies ready for it, or fails as told.
TRAIN = """
import os, shutil, sys
run_dir, ready, journal, fail = sys.argv[1:]
with open(journal, "a") as file:
    file.write(run_dir + "\\n")
if fail:
    print("a line before")
    print("ltood: error: " + fail)
    sys.exit(2)
os.rename(ready, os.path.join(run_dir, "report.json"))
"""


@pytest.fixture
def setting(tmp_path):
    return Setting("smoke", tmp_path / "out", seeds=(0, 1))


@pytest.fixture
def quick_training(monkeypatch, tmp_path):
    """Runs end at once. Returns what has been started, in order, and the runs that shall fail, by name."""
    journal, failing = tmp_path / "journal", {}

    def started():
        lines = journal.read_text().splitlines() if journal.exists() else []
        return ["/".join(line.split("/")[-2:]) for line in lines]

    def command(setting, run):
        run.run_dir.mkdir(parents=True, exist_ok=True)
        save_config(run.config, run.run_dir / "config.yaml")
        ready = run.run_dir / "ready.json"
        ready.write_text(json.dumps(make_report(run.config, [0.5, 0.4, 0.3 + run.seed / 10], [60, 30, 10])))
        arguments = [str(run.run_dir), str(ready), str(journal), failing.get(run.name, "")]
        return [sys.executable, "-S", "-c", TRAIN, *arguments]

    monkeypatch.setattr(grid, "_command", command)
    monkeypatch.setattr(grid, "POLL_SECONDS", 0.01)
    return started, failing

import json

import pytest
from made_up_runs import finish

from ltood_fast.cli import main
from ltood_fast.experiments.grid import plan_runs
from ltood_fast.experiments.paper_claims import balanced
from ltood_fast.experiments.spec import Setting
from ltood_fast.experiments.variants import ORACLE_GAINS

ARGUMENTS = ["--config", "smoke", "--seeds", "0,1"]


def run(tmp_path, *argv):
    return main(["experiment", *argv, "--output", str(tmp_path / "out")])


def test_from_the_command_to_the_table(tmp_path, quick_training, capsys):
    started, _ = quick_training
    options = ["--stage1.alpha", "0.2", "--data.test_list", "/some/where/c", "--data.root", "/my/d"]
    assert run(tmp_path, "ood-sampling", *ARGUMENTS, *options) == 0
    out = capsys.readouterr().out
    assert "This page concludes nothing, as its positive control (control-oracle − control-off) is +0.00 [" in out
    assert "Found: tailness − random (overall) is +0.00 [" in out
    folder = tmp_path / "out" / "ood-sampling"
    page = (folder / "table.md").read_text()
    assert "| tailness | 2 | 41.67 ± 2.36 |" in page
    assert "`--stage1.alpha 0.2`" in page
    assert "/some/where" not in page
    assert "/my" not in page
    numbers = json.loads((folder / "results.json").read_text())
    assert numbers["verdict"]["decision"] == "not decided"
    assert numbers["overrides"] == {"stage1.alpha": "0.2", "data.test_list": "c"}
    assert numbers["seeds"] == [0, 1]
    assert len(numbers["runs"]) == 12
    assert numbers["control"]["better"] == "control-oracle"
    assert numbers["runs"][0]["per_class"] == [0.5, 0.4, 0.3]
    assert numbers["cpu"]
    assert numbers["versions"]["torch"]
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")

    assert run(tmp_path, "ablation", *ARGUMENTS, *options) == 0
    assert len(started()) == 12 + 2 * 7  # simclr, tailness and the control are there


def test_a_failed_run_is_named_after_the_table_is_written(tmp_path, quick_training, capsys):
    _, failing = quick_training
    failing["random/seed1"] = "train: the disk is full"
    assert run(tmp_path, "ood-sampling", *ARGUMENTS) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("ltood: error: experiment: every run must end, got 1 that did not (random/seed1: train: the")
    page = (tmp_path / "out/ood-sampling/table.md").read_text()
    assert "Missing: random seed 1." in page
    assert "| random | 1 |" in page


def test_the_table_of_what_is_there(tmp_path, quick_training, capsys):
    started, _ = quick_training
    assert run(tmp_path, "ood-sampling", *ARGUMENTS, "--no-train") == 2
    assert "at least one run must end, got none of 12 (not trained)" in capsys.readouterr().err
    assert run(tmp_path, "simclr-balance", *ARGUMENTS) == 0
    assert run(tmp_path, "ood-sampling", *ARGUMENTS, "--no-train") == 0
    assert "Missing: none seed 0, none seed 1, random seed 0" in (tmp_path / "out/ood-sampling/table.md").read_text()
    assert len(started()) == 8


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["what", *ARGUMENTS], "name must be one of simclr-balance, "),
        (["ablation", "--config", "smoke", "--seeds", "0,0"], "must be distinct numbers with commas"),
        (["ablation", "--config", "smoke", "--seeds", "a"], "must be distinct numbers with commas"),
        (["ablation", *ARGUMENTS, "--jobs", "0"], "--jobs: must be an integer in [1, 1000000000], got 0"),
        (["ablation", *ARGUMENTS, "--stage1.alfa", "1"], "did you mean stage1.alpha"),
        (["ablation", *ARGUMENTS, "--seed", "3"], "seed must be left to the experiment, got '3'"),
        (["ablation"], "--config"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, capsys, argv, sentence):
    assert run(tmp_path, *argv) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert sentence in line
    assert not (tmp_path / "out").exists()


def test_the_list_needs_nothing_else(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["experiment", "--list"])
    assert ended.value.code == 0
    assert "ood-sampling" in capsys.readouterr().out


def test_a_real_run_of_seconds(tmp_path, capsys):
    """The whole way once: a process that trains on digits, its report, a table; the other variant is there."""
    keys = {"simclr.epochs": "1", "run.device": "cpu"}
    setting = Setting("smoke", tmp_path / "out", seeds=(0,), overrides=keys)
    for other in plan_runs(setting, [balanced(setting), *ORACLE_GAINS.variants]):
        finish(other, per_class=[0.5] * 10)
    arguments = ["simclr-balance", "--config", "smoke", "--seeds", "0", *(f"--{k}={v}" for k, v in keys.items())]
    assert run(tmp_path, *arguments) == 0, capsys.readouterr().err
    assert "Found: balanced − simclr" in capsys.readouterr().out
    report = tmp_path / "out/runs/simclr/seed0/report.json"
    written = report.stat().st_mtime_ns
    assert run(tmp_path, *arguments) == 0
    assert report.stat().st_mtime_ns == written

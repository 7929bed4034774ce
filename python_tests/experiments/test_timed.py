import json
import time
from dataclasses import replace

import pytest

from ltood_fast.experiments import timed
from ltood_fast.experiments.command import SCHEMA
from ltood_fast.experiments.grid import TimeOverError, plan_runs, train_grid
from ltood_fast.experiments.pairing import OFF, ORACLE, PAIRING, RANDOM_OOD, STUDENT, TRUNK
from ltood_fast.experiments.spec import ExperimentError, Setting
from ltood_fast.experiments.timed import EPOCHS, Plan, load_plan, main, make_plan, merge, run_part

LISTED = [TRUNK, OFF, RANDOM_OOD, STUDENT]
PLAN = Plan(100.0, {"simclr": 3, "stage1": 4, "stage2": 2}, 0.02, {"trunk": 1.0})


def test_a_plan_is_images_over_the_rate():
    """1,000 ID images and a budget of 200 at 1,000 images a second."""
    plan = make_plan(1000.0, 1e9, 1000, 200, LISTED)
    assert plan.epochs == EPOCHS
    expected = {"trunk": 150, "branch-off": 100, "branch-random": 120, "branch-student": 1.35 * 40}
    assert plan.seconds == pytest.approx({name: 1.1 * seconds for name, seconds in expected.items()})
    assert plan.overrides == {
        "simclr.epochs": "150", "stage1.epochs": "100", "stage2.epochs": "40", "stage1.resample_every": "25",
        "stage1.warmup_epochs": "0",
    }  # fmt: skip
    assert "rate: 1,000 images/s (measured)" in str(plan)
    assert str(plan).splitlines()[-1].endswith(f"{sum(plan.seconds.values()):.0f} s (predicted)")


def test_all_epochs_shrink_by_one_factor():
    whole = make_plan(1000.0, 1e9, 1000, 200, LISTED)
    half = make_plan(1000.0, sum(whole.seconds.values()) / 2, 1000, 200, LISTED)
    assert half.share == pytest.approx(0.5)
    assert half.epochs == {"simclr": 75, "stage1": 50, "stage2": 20}
    assert sum(half.seconds.values()) <= sum(whole.seconds.values()) / 2
    assert make_plan(1000.0, 1.0, 1000, 200, LISTED).epochs == {"simclr": 1, "stage1": 1, "stage2": 1}


def test_a_plan_that_shrinks_fits_the_preset(tmp_path):
    """The trunk and the students keep the preset except for the epochs: no warm-up may be longer than a stage."""
    setting = Setting("cifar10_lt", tmp_path, (0,))
    listed = PAIRING.with_control(PAIRING.variants(setting))
    plan = make_plan(3000.0, 1800, 12406, 4000, listed)
    assert plan.share < 1
    assert plan_runs(replace(setting, overrides=plan.overrides), listed)


def test_the_plan_of_the_first_call_stays(setting, monkeypatch):
    monkeypatch.setattr(timed, "measure_rate", lambda config, seconds: (500.0, 300))
    first = load_plan(setting, 1000.0, 20.0)
    monkeypatch.setattr(timed, "measure_rate", lambda config, seconds: pytest.fail("measured again"))
    assert load_plan(setting, 1.0, 20.0) == first


def test_a_part_ends_in_time_and_the_next_goes_on(setting, quick_training):
    started, _ = quick_training
    runs = plan_runs(setting, [TRUNK, OFF])
    with pytest.raises(TimeOverError, match="of 4 runs are not done yet"):
        train_grid(setting, runs, until=time.monotonic())
    train_grid(setting, runs)
    before = len(started())
    assert train_grid(setting, runs, until=0.0).reports.keys() == {run.key for run in runs}  # nothing is left to do
    assert len(started()) == before
    assert run_part(replace(setting, output=setting.output / "other"), PLAN, -1.0) is False


def test_each_seed_leaves_a_file_and_files_add_up(setting, quick_training, tmp_path):
    assert run_part(replace(setting, seeds=(0,)), PLAN, 1e9) is True
    assert run_part(replace(setting, seeds=(3,)), PLAN, 1e9) is True
    paths = [setting.output / f"pairing_seed{seed}.json" for seed in (3, 0)]
    one = json.loads(paths[1].read_text())
    assert one["seeds"] == [0]
    assert one["overrides"]["stage1.epochs"] == "4"
    assert {run["variant"] for run in one["runs"]} >= {"trunk", "branch-cross", "branch-student", ORACLE.name}
    assert "concludes nothing" in merge(paths, tmp_path / "merged")
    merged = json.loads((tmp_path / "merged/results.json").read_text())
    assert merged["seeds"] == [0, 3]
    assert len(merged["runs"]) == 2 * len(one["runs"])
    assert merged["comparisons"][0]["n"] == 2
    assert "| branch-same − branch-cross | overall | 2 |" in (tmp_path / "merged/table.md").read_text()
    with pytest.raises(ExperimentError, match=r"each seed must come once, got \[0, 0\]"):
        merge([paths[1], paths[1]], tmp_path / "twice")
    one["overrides"]["stage1.epochs"] = "5"
    paths[1].write_text(json.dumps(one))
    with pytest.raises(ExperimentError, match="all files must have one overrides, got another in"):
        merge(paths, tmp_path / "mixed")


def test_a_failed_run_is_named(setting, quick_training, capsys, monkeypatch):
    _, failing = quick_training
    failing["branch-off/seed0"] = "train: the disk is full"
    monkeypatch.setattr(timed, "load_plan", lambda *a: PLAN)
    assert main(["--config", "smoke", "--output", str(setting.output)]) == 2
    assert "got 1 that did not (branch-off/seed0: train: the disk is full" in capsys.readouterr().err


WRONG_FILES = {
    "a list": ("[1]", "must be a file of ltood_fast.experiment with all keys of a seed, got 'list'"),
    "no JSON": ("{", "must be JSON of a seed, got another file"),
    "schema alone": (json.dumps({"schema": SCHEMA}), "with all keys of a seed"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_another_file_is_not_merged(name, tmp_path, capsys):
    text, sentence = WRONG_FILES[name]
    (tmp_path / "a.json").write_text(text)
    assert main(["--merge", str(tmp_path / "a.json"), "--output", str(tmp_path / "merged")]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--seeds", "a"], ["--part", "0"], ["--jobs", "x"], ["--output", __file__]])
def test_a_wrong_option_is_one_sentence(argv, tmp_path, capsys):
    assert main([*(["--output", str(tmp_path)] if "--output" not in argv else []), *argv]) == 2
    assert capsys.readouterr().err.startswith("ltood: error: ")


def test_another_plan_is_refused(setting):
    setting.output.mkdir(parents=True, exist_ok=True)
    (setting.output / "plan.json").write_text('{"a": 1}')
    with pytest.raises(ExperimentError, match="must be a plan of this command, got another file"):
        load_plan(setting, 1.0, 1.0)


def test_branches_change_only_the_keys_of_their_names():
    for variant in PAIRING.variants(None):
        changed = {key for key in variant.overrides if variant.overrides[key] != OFF.overrides.get(key)}
        allowed = {"branch-same": 1, "branch-cross": 2, "branch-tailness-cross": 3}  # a weight, a pairing, a sampler
        changed -= {"stage1.pairing"} if variant.name == "branch-same" else set()
        if variant.trunk:
            assert len(changed) == {"branch-off": 0, **allowed}.get(variant.name, 1)

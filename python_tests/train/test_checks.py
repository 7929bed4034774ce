"""What is judged before the first step of a run, what a resumed run may change, and what a failed start leaves."""

import warnings
from dataclasses import replace

import pytest
import torch
import yaml
from made_up import SMALL, data

import ltood_fast.data
from ltood_fast.cli import main
from ltood_fast.train import loop
from ltood_fast.train.history import read_history

KEYS = [text for key, value in SMALL.items() for text in (f"--{key}", value)]


def ltood(run_dir, *argv):
    return main(["train", "--run-dir", str(run_dir), *map(str, argv)])


def start(run_dir, *argv):
    return ltood(run_dir, "--config", "smoke", *KEYS, *argv)


def resume(run_dir, *argv):
    return ltood(run_dir, "--resume", *argv)


@pytest.fixture
def steps(monkeypatch):
    """The stages whose epochs were trained, an entry an epoch."""
    trained, real = [], loop.Stage.train_epoch
    monkeypatch.setattr(loop.Stage, "train_epoch", lambda self, bar: (trained.append(self.name), real(self, bar))[1])
    return trained


@pytest.fixture
def no_report(monkeypatch):
    from ltood_fast.train import run

    monkeypatch.setattr(run, "report_run", lambda session: "trained")


def error(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ltood: error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("ltood: error: ")


REFUSED = {
    "budget": (["--stage1.budget", "61"], "stage1.budget must be at most the 60 images of the OOD set, got 61"),
    "clusters": (["--stage1.clusters", "49"], "stage1.clusters must be at most the 48 ID images, got 49"),
    "guide's clusters": (["--stage2.clusters", "49"], "stage2.clusters must be at most the 48 ID images, got 49"),
    "guide": (["--stage2.guide", "none.pt"], "none.pt must be a checkpoint file, got no such file"),
    "guide's k": (["--stage2.k", "32"], "stage2.k must be less than the 32 views of a batch of stage2, got 32"),
    "neighbours": (["--stage1.k", "32"], "stage1.k must be less than the 32 views of a batch of stage1, got 32"),
    "few-shot list": (["--data.few_shot_list", "none.npy"], "must be an existing .npy file, got none.npy"),
    "few-shot images": (
        ["--eval.few_shot", "11"],
        "eval.few_shot must be at most 10, the images of the smallest class",
    ),
    "a part of one image": (
        ["--base.name", "sdclr", "--optim.micro_batch", "5"],
        "base.name sdclr must see two images of a rank or more at a time, got 1 in simclr",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_later_stages_are_checked_before_the_first_step(name, made_up_data, steps, tmp_path, capsys):
    options, sentence = REFUSED[name]
    assert start(tmp_path / "run", *options) == 2
    assert sentence in error(capsys)
    assert steps == []
    assert not (tmp_path / "run").exists()


def test_one_class_of_probe_images_is_told_at_the_start(made_up_data, monkeypatch, steps, tmp_path, capsys):
    made = data()
    one = replace(made, probe=made.probe.subset((made.probe.labels == 1).nonzero().flatten()))
    monkeypatch.setattr(ltood_fast.data, "load_data", lambda config: one)
    assert start(tmp_path / "run") == 2
    assert "the probe set must hold at least two classes for the evaluation, got class 1 only" in error(capsys)
    assert steps == []


def test_faiss_is_looked_for_before_the_first_step(made_up_data, monkeypatch, steps, tmp_path, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "faiss", None)
    assert start(tmp_path / "run") == 2
    assert "train: FAISS cannot be imported" in error(capsys)
    assert steps == []


def test_a_damaged_checkpoint_of_a_later_stage_is_found_first(made_up_data, no_report, steps, tmp_path, capsys):
    assert start(tmp_path, "--stages", "simclr") == 0
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "last.pt").write_bytes(b"PK\x03\x04")
    steps.clear()
    assert resume(tmp_path, "--stages", "simclr,stage1", "--simclr.epochs", "3") == 2
    assert "stage1/last.pt must be a whole checkpoint" in error(capsys)
    assert steps == []


def test_a_failed_start_leaves_a_folder_that_is_new(made_up_data, no_report, steps, tmp_path, capsys):
    """A folder of an older version, which wrote config.yaml first, is new as well."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"stage1": {"budget": 61}}))
    assert start(tmp_path, "--stages", "simclr") == 0
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["stage1"]["budget"] == 20


def test_a_run_killed_before_its_first_checkpoint_starts_anew(made_up_data, no_report, monkeypatch, tmp_path):
    real = loop.Stage.save
    monkeypatch.setattr(loop.Stage, "save", lambda self: 1 / 0)
    assert start(tmp_path, "--stages", "stage1", "--stage1.warmup_epochs", "0") != 0
    assert (tmp_path / "stage1" / "resample_0000.pt").exists()
    monkeypatch.setattr(loop.Stage, "save", real)
    assert start(tmp_path, "--stages", "stage1", "--stage1.warmup_epochs", "2") == 0
    assert [p.name for p in sorted((tmp_path / "stage1").glob("resample_*"))] == [
        "resample_0002.pt",
        "resample_0004.pt",
    ]


def test_keys_of_stages_that_have_not_begun_may_change(made_up_data, no_report, steps, tmp_path):
    assert start(tmp_path, "--stages", "simclr") == 0
    steps.clear()
    changes = ["--stages", "simclr,stage1,stage2", "--stage1.budget", "12", "--stage2.beta", "0.2"]
    assert resume(tmp_path, *changes, "--data.ood_size", "50") == 0
    assert steps == ["stage1"] * 5 + ["stage2"] * 2
    sample = torch.load(tmp_path / "stage1" / "resample_0001.pt", weights_only=True)
    assert len(sample["indices"]) == 12
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (saved["stage1"]["budget"], saved["stage2"]["beta"]) == (12, 0.2)
    assert resume(tmp_path) == 0  # the checkpoint of simclr, with its old configuration, still counts
    assert main(["eval", "--run-dir", str(tmp_path)]) == 0


@pytest.mark.parametrize(("option", "value", "keys"), [
    ("--optim.lr", "3", "optim.lr"),
    ("--seed", "4", "seed"),
    ("--simclr.temperature", "0.3", "simclr.temperature"),
    ("--base.name", "sdclr", "base.name"),
])  # fmt: skip
def test_what_a_stage_that_has_begun_reads_stays(option, value, keys, made_up_data, no_report, tmp_path, capsys):
    assert start(tmp_path, "--stages", "simclr") == 0
    before = (tmp_path / "config.yaml").read_bytes()
    assert resume(tmp_path, option, value) == 2
    assert error(capsys).endswith(f"stage simclr has begun and must keep its configuration, got another {keys}")
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_a_stage_reads_its_own_keys_and_those_of_its_guide(made_up_data, no_report, tmp_path, capsys):
    assert start(tmp_path, "--stages", "stage1,stage2") == 0
    for option, value, stage in (("alpha", "0.1", "stage1"), ("refine_steps", "3", "stage1")):
        assert resume(tmp_path, f"--stage1.{option}", value) == 2
        assert f"stage {stage} has begun and must keep its configuration" in error(capsys)
    (tmp_path / "stage1" / "last.pt").rename(tmp_path / "guide.pt")
    assert resume(tmp_path, "--stage1.alpha", "0.1", "--stage1.refine_steps", "3") == 2
    assert "stage stage2 has begun and must keep its configuration, got another stage1.refine_steps" in error(capsys)


def test_a_stage_that_has_begun_stays_among_the_stages(made_up_data, no_report, tmp_path, capsys):
    assert start(tmp_path, "--stages", "simclr") == 0
    assert resume(tmp_path, "--stages", "stage1") == 2
    assert "stages must hold simclr, which has begun, got stage1" in error(capsys)


def test_a_finished_stage_may_get_more_epochs(made_up_data, no_report, steps, tmp_path):
    """From its third epoch on the rate is that of a schedule of four."""
    assert start(tmp_path / "run", "--stages", "simclr") == 0
    assert start(tmp_path / "whole", "--stages", "simclr", "--simclr.epochs", "4") == 0
    steps.clear()
    assert resume(tmp_path / "run", "--simclr.epochs", "4") == 0
    assert steps == ["simclr"] * 2
    lines, whole = (read_history(tmp_path / run / "simclr" / "history.jsonl") for run in ("run", "whole"))
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    assert [line["lr"] for line in lines[2:]] == [line["lr"] for line in whole[2:]]
    assert lines[1]["lr"] < lines[2]["lr"]
    steps.clear()
    assert resume(tmp_path / "run") == 0
    assert steps == []


def test_epochs_that_are_trained_cannot_be_taken_back(made_up_data, no_report, tmp_path, capsys):
    assert start(tmp_path, "--stages", "simclr") == 0
    assert resume(tmp_path, "--simclr.epochs", "1") == 2
    assert "simclr.epochs must be at least the 2 epochs of simclr that are trained, got 1" in error(capsys)


def test_a_stage_that_another_started_from_gets_no_more(made_up_data, no_report, tmp_path, capsys):
    assert start(tmp_path, "--stages", "stage1,stage2") == 0
    assert resume(tmp_path, "--stage1.epochs", "9") == 2
    assert "stage1.epochs must stay, as stage2 has begun from its weights" in error(capsys)
    assert resume(tmp_path, "--stage2.epochs", "3") == 0


def test_a_batch_larger_than_the_set_is_said(made_up_data, no_report, tmp_path, capsys):
    assert start(tmp_path / "large", "--stages", "simclr,stage1", "--optim.batch_size", "64") == 0
    assert (
        "ltood: warning: train: optim.batch_size is 64, more than the images of an epoch (48 of simclr, 48 of stage1): "
        "such an epoch is one batch of them all"
    ) in capsys.readouterr().err.splitlines()
    assert start(tmp_path / "fits", "--stages", "simclr", "--optim.batch_size", "48") == 0
    assert "batch_size" not in capsys.readouterr().err


@pytest.mark.parametrize("batch_size", ["48", "64"])
def test_no_whole_epoch_is_trained_at_rate_0(batch_size, made_up_data, no_report, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert start(tmp_path, "--stages", "simclr", "--optim.batch_size", batch_size, "--optim.lr", "0.1") == 0
    lines = read_history(tmp_path / "simclr" / "history.jsonl")
    assert lines[0]["lr"] == pytest.approx(0.05)  # the middle of a warm-up of one epoch

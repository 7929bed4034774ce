import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from made_up import SMALL

from ltood_fast import cli
from ltood_fast.cli import main, parse_overrides
from ltood_fast.train import loop
from ltood_fast.train.session import Session

ROOT = Path(__file__).resolve().parents[2]
KEYS = [text for key, value in SMALL.items() for text in (f"--{key}", value)]


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail; returns its one line on stderr."""

    def run(*argv):
        capsys.readouterr()
        assert main(list(map(str, argv))) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("ltood: error: ")
        return lines[0].removeprefix("ltood: error: ")

    return run


def train(run_dir, *argv):
    return main(["train", "--config", "smoke", "--run-dir", str(run_dir), *KEYS, *argv])


def test_a_run_from_start_to_report(made_up_data, tmp_path, capsys):
    assert train(tmp_path / "run") == 0
    table = capsys.readouterr().out.splitlines()
    new = ["NMI", "ARI", "uniformity", "alignment"]
    assert table[0].split() == ["overall", "Many", "Medium", "Few", "std", "kNN", *new]
    assert [line.split("  ")[0] for line in table[1:4]] == ["SimCLR", "Stage 1", "Stage 2"]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["simclr", "stage1", "stage2"]
    assert [sample["epoch"] for sample in report["resamplings"]] == [1, 3]
    assert all(sum(sample["budget"]) == 20 for sample in report["resamplings"])
    assert report["config"]["stage1"]["budget"] == 20
    assert "nt_xent" in report["build"]["kernels"]
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000

    (tmp_path / "run" / "report.json").unlink()
    assert main(["eval", "--run-dir", str(tmp_path / "run"), "--eval.knn_k", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == table[0]
    assert (tmp_path / "run" / "report.json").exists()


def test_an_old_run_gets_new_numbers_without_training(made_up_data, tmp_path, capsys, monkeypatch):
    assert train(tmp_path, "--stages", "stage1") == 0
    checkpoint, saved = tmp_path / "stage1" / "last.pt", yaml.safe_load((tmp_path / "config.yaml").read_text())
    del saved["eval"]["few_shot"], saved["data"]["few_shot_list"]  # as written before there were such keys
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    state = torch.load(checkpoint, weights_only=True)
    del state["config"]["eval"]["few_shot"], state["config"]["data"]["few_shot_list"]
    state["version"] = 1
    torch.save(state, checkpoint)
    before, old = checkpoint.read_bytes(), json.loads((tmp_path / "report.json").read_text())
    monkeypatch.setattr(loop.Stage, "train_epoch", None)
    capsys.readouterr()

    assert main(["eval", "--run-dir", str(tmp_path), "--eval.few_shot", "4"]) == 0
    assert "few-shot" in capsys.readouterr().out.splitlines()[0]
    new = json.loads((tmp_path / "report.json").read_text())
    assert checkpoint.read_bytes() == before
    (stage,), (old_stage,) = new["stages"], old["stages"]
    assert old_stage["few_shot"] is None
    assert len(stage["few_shot"]["per_class"]) == 3
    assert {**stage, "few_shot": None} == old_stage  # the others are the same, drawn from the run's seed

    np.save(tmp_path / "few.npy", np.array([0, 1, 2, 3, 4, 8]))
    assert main(["eval", "--run-dir", str(tmp_path), "--data.few_shot_list", str(tmp_path / "few.npy")]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["config"]["data"]["few_shot_list"]


def test_finished_stages_are_not_trained_again(made_up_data, tmp_path, capsys, monkeypatch):
    assert train(tmp_path, "--stages", "simclr") == 0
    before = (tmp_path / "simclr" / "last.pt").read_bytes()
    monkeypatch.setattr(loop.Stage, "train_epoch", None)
    assert main(["train", "--run-dir", str(tmp_path), "--resume"]) == 0
    assert "simclr: finished before, 2 epochs" in capsys.readouterr().err
    assert (tmp_path / "simclr" / "last.pt").read_bytes() == before


def test_ctrl_c_leaves_a_run_that_goes_on(made_up_data, tmp_path, capsys, monkeypatch):
    real, calls = Session.two_views, []

    def interrupted(self, rows, **part):
        calls.append(rows)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, rows, **part)

    monkeypatch.setattr(Session, "two_views", interrupted)
    with pytest.raises(SystemExit) as ended:
        train(tmp_path)
    assert ended.value.code == 130
    assert f"go on with: ltood train --run-dir {tmp_path} --resume" in capsys.readouterr().err
    assert torch.load(tmp_path / "simclr" / "last.pt", weights_only=True)["epoch"] == 1
    assert main(["train", "--run-dir", str(tmp_path), "--resume"]) == 0


def test_a_folder_with_a_run_is_refused(made_up_data, tmp_path, refused):
    assert train(tmp_path, "--stages", "simclr") == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert "which holds a run (--resume goes on with it)" in refused(
        "train", "--config", "smoke", "--run-dir", tmp_path
    )
    assert {path: path.read_bytes() for path in before} == before


def test_a_resumed_run_keeps_its_configuration(made_up_data, tmp_path, refused):
    assert train(tmp_path, "--stages", "simclr") == 0
    resume = ("train", "--run-dir", tmp_path, "--resume")
    assert refused(*resume, "--optim.lr", "3").endswith("must keep its configuration, got another optim.lr")
    assert "got another data.image_size" in refused(*resume, "--config", "smoke", "--data.image_size", "9", *KEYS)
    assert main([*map(str, resume), "--run.threads", "1", "--eval.knn_k", "3"]) == 0


def test_resume_starts_a_run_that_never_was(made_up_data, tmp_path, refused):
    assert "config must be given" in refused("train", "--run-dir", tmp_path / "new", "--resume")
    assert train(tmp_path / "new", "--stages", "simclr", "--resume") == 0


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
def test_a_damaged_checkpoint_is_named_and_kept(damage, made_up_data, tmp_path, refused):
    assert train(tmp_path, "--stages", "simclr") == 0
    path = tmp_path / "simclr" / "last.pt"
    content = path.read_bytes()
    damaged = {"truncated": content[: len(content) // 2], "foreign": b"PK\x03\x04 something", "empty": b""}[damage]
    path.write_bytes(damaged)
    assert str(path) in refused("train", "--run-dir", tmp_path, "--resume")
    assert str(path) in refused("eval", "--run-dir", tmp_path)
    assert str(path) in refused("embed", "--checkpoint", path, "--data", "letters", "--output", tmp_path / "x.npy")
    assert path.read_bytes() == damaged
    assert not (tmp_path / "x.npy").exists()


def test_a_full_disk_ends_the_run_and_it_goes_on_later(made_up_data, tmp_path, refused, monkeypatch):
    from ltood_fast.train import checkpoint

    real, calls = checkpoint.write_atomic, []

    def full(path, write, keep=None):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", str(path))
        real(path, write, keep)

    monkeypatch.setattr(checkpoint, "write_atomic", full)
    argv = ["train", "--config", "smoke", "--run-dir", str(tmp_path), *KEYS]
    assert "cannot be written (No space left on device); what was saved before is kept" in refused(*argv)
    assert torch.load(tmp_path / "simclr" / "last.pt", weights_only=True)["epoch"] == 1
    assert main(["train", "--run-dir", str(tmp_path), "--resume"]) == 0


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (
            (),
            "required: train|eval|report|embed|export|sample-ood|experiment|config|doctor|info (ltood --help ",
        ),
        (("trian",), "invalid choice: 'trian'"),
        (("train",), "the following arguments are required: --run-dir"),
        (("train", "--run-dir", "{new}"), "train: config must be given for a new run, got none"),
        (("train", "--run-dir", "{new}", "--config", "demos"), "did you mean demo?"),
        (("train", "--run-dir", "{new}", "--config", "smoke", "--optim.lrr", "1"), "did you mean optim.lr?"),
        (("train", "--run-dir", "{new}", "--config", "smoke", "--optim.lr"), "--optim.lr must have a value, got none"),
        (("train", "--run-dir", "{new}", "--config", "smoke", "stray"), "must be --section.key value, got 'stray'"),
        (("eval", "--run-dir", "{new}"), "holds no config.yaml"),
        (("train", "--run-dir", "", "--config", "smoke"), "argument --run-dir: must be a path, got ''"),
        (("train", "--run-dir", "{new}", "--config", "smoke", "--config", "demo"), "--config: must be given once"),
        (("train", "--run-dir", "{new}", "--config", "smoke", "--optim", "1"), "must be one of the section optim"),
        (("eval", "--run-dir", "{new}", "--stages", "stage1"), "got stages, which the run has been trained with"),
        (("eval", "--run-dir", "{new}", "--evall", "1"), "holds no config.yaml"),
        (("report", "{new}"), "report: runs must be an existing folder, got "),
        (
            ("embed", "--checkpoint", "{new}", "--data", "letters", "--output", "x.npy", "--optim.lr", "1"),
            "embed: key must be one of data.root, ",
        ),
        (("info", "--optim.lr", "1"), "argument --optim.lr is unknown to ltood info"),
        (("info", "extra"), "argument extra is unknown to ltood info"),
        (("embed", "--checkpoint", "{new}", "--data", "letters", "--output", "x.npy"), "got no such file"),
    ],
)
def test_what_a_user_gets_wrong(argv, sentence, refused, tmp_path):
    new = tmp_path / "new"
    assert sentence in refused(*(part.replace("{new}", str(new)) for part in argv))
    assert not new.exists()


def test_the_traceback_may_be_anywhere_on_the_line(tmp_path, capsys):
    assert main(["eval", "--traceback", "--run-dir", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.endswith("which holds no config.yaml\n")


def test_a_run_dir_below_a_file_is_refused(tmp_path, refused):
    (tmp_path / "file").write_text("")
    sentence = refused("train", "--config", "smoke", "--run-dir", tmp_path / "file" / "run")
    assert sentence == f"train: run-dir must be a folder, got {tmp_path}/file/run, where {tmp_path}/file is a file"


def test_the_config_of_another_version_is_named(made_up_data, tmp_path, refused):
    assert train(tmp_path, "--stages", "simclr") == 0
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    saved["optim"]["nesterov"] = True
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    sentence = refused("eval", "--run-dir", tmp_path)
    assert "got 'optim.nesterov'" in sentence
    assert sentence.endswith(f"(in {tmp_path}/config.yaml)")


def test_a_run_without_checkpoints_is_not_evaluated(made_up_data, tmp_path, refused):
    assert train(tmp_path, "--stages", "simclr") == 0
    (tmp_path / "simclr" / "last.pt").unlink()
    assert "must hold a trained stage, got none" in refused("eval", "--run-dir", tmp_path)


def test_exit_codes_of_the_process(tmp_path):
    def ltood(*argv):
        command = [sys.executable, "-m", "ltood_fast", *argv]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))

    info = ltood("info")
    assert info.returncode == 0
    assert "stage1_loss" in info.stdout
    wrong = ltood("train", "--config", "smoke", "--run-dir", str(tmp_path / "new"), "--seed", "x")
    assert wrong.returncode == 2
    assert wrong.stderr == "ltood: error: config: seed must be an integer, got 'x'\n"
    traced = ltood("--traceback", "train", "--config", "smoke", "--run-dir", str(tmp_path / "new"), "--seed", "x")
    assert traced.returncode == 2
    assert "Traceback" in traced.stderr


def test_a_warning_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "info", lambda *_: warnings.warn("data: set is not cached", stacklevel=1))
    assert main(["info"]) == 0
    assert capsys.readouterr().err == "ltood: warning: data: set is not cached\n"


def test_overrides_are_read_in_both_spellings():
    assert parse_overrides(["--a.b", "1", "--c.d=x=y", "--e", "-3"]) == {"a.b": "1", "c.d": "x=y", "e": "-3"}


@pytest.fixture
def arrays(tmp_path):
    generator = np.random.default_rng(0)
    centres = 3 * generator.standard_normal((3, 8))
    np.save(tmp_path / "id.npy", (centres[np.arange(60) % 3] + generator.standard_normal((60, 8))).astype(np.float32))
    np.save(tmp_path / "ood.npy", generator.standard_normal((90, 8)).astype(np.float32))
    return tmp_path


def sample_argv(folder, *more):
    return ["sample-ood", "--candidates", str(folder / "ood.npy"), "--id", str(folder / "id.npy"), "--clusters", "3",
            "--output", str(folder / "chosen.npy"), *more]  # fmt: skip


@pytest.mark.parametrize("strategy", ["tailness", "random"])
def test_sample_ood_writes_distinct_indices(strategy, arrays, capsys):
    assert main(sample_argv(arrays, "--budget", "30", "--strategy", strategy)) == 0
    chosen = np.load(arrays / "chosen.npy")
    assert chosen.shape == (30,)
    assert chosen.dtype == np.int64
    assert len(set(chosen.tolist())) == 30
    assert chosen.min() >= 0
    assert chosen.max() < 90
    assert "30 of 90 rows" in capsys.readouterr().out


def test_sample_ood_prints_what_each_cluster_took(arrays, capsys):
    assert main(sample_argv(arrays, "--budget", "30")) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:4]]
    assert sum(int(row[1]) for row in rows) == 60
    assert sum(int(row[3]) for row in rows) == 30


def test_sample_ood_refuses_what_it_cannot_use(arrays, refused):
    assert "--budget must be at most the 90 rows of --candidates, got 91" in refused(
        *sample_argv(arrays, "--budget", "91")
    )
    for option, value, allowed in [
        ("budget", "x", "an integer in [1, 1000000000], got 'x'"),
        ("budget", "0", "an integer in [1, 1000000000], got 0"),
        ("seed", "99999999999999999999", "an integer in [0, 1000000000], got 99999999999999999999"),
        ("temperature", "nan", "a positive number, got 'nan'"),
    ]:
        refusal = refused(*sample_argv(arrays, f"--{option}", value))
        assert refusal.startswith(f"argument --{option}: must be {allowed}")
    few = [text if text != "3" else "61" for text in sample_argv(arrays, "--budget", "2")]
    assert refused(*few) == "sample-ood: --clusters must be at most the 60 rows of --id, got 61"
    ids = np.load(arrays / "id.npy")
    np.save(arrays / "id.npy", ids[:, :5])
    assert "must be embeddings of 5 features, as those of --id, got 8" in refused(*sample_argv(arrays, "--budget", "3"))
    np.save(arrays / "id.npy", ids)
    over = [text.replace("chosen.npy", "ood.npy") for text in sample_argv(arrays, "--budget", "3")]
    assert "--output must be another file than --candidates" in refused(*over)
    np.save(arrays / "ood.npy", np.zeros((5, 8), dtype=np.int64))
    assert "must hold a float matrix [N, F], got int64 (5, 8)" in refused(*sample_argv(arrays, "--budget", "3"))
    (arrays / "ood.npy").write_bytes(b"no array")
    assert "ood.npy must be a .npy array" in refused(*sample_argv(arrays, "--budget", "3"))
    (arrays / "ood.npy").unlink()
    assert refused(*sample_argv(arrays, "--budget", "3")) == f"No such file or directory: {arrays / 'ood.npy'}"
    assert not (arrays / "chosen.npy").exists()

"""Every file that a command reads, damaged in every way: one line that names the file, and exit code 2."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from made_up import SMALL

from ltood_fast import cli
from ltood_fast.cli import main
from ltood_fast.train.checkpoint import save_tensors
from ltood_fast.train.history import read_history

KEYS = [text for key, value in SMALL.items() for text in (f"--{key}", value)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of all stages, to be copied."""
    from made_up import Jitter, Plain, data

    import ltood_fast.data

    run_dir = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ltood_fast.data, "load_data", lambda config: data())
        patch.setattr(ltood_fast.data, "make_augment", lambda config, size: Jitter())
        patch.setattr(ltood_fast.data, "make_eval_transform", lambda size: Plain())
        assert main(["train", "--config", "smoke", "--run-dir", str(run_dir), *KEYS]) == 0
    return run_dir


@pytest.fixture
def copied(run, tmp_path, made_up_data):
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture
def refused(capsys):
    def check(*argv, names):
        capsys.readouterr()
        assert main(list(map(str, argv))) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "finished before" not in line]
        assert str(names) in line, line
        assert "unexpected" not in line, line
        return line

    return check


def folder(path):
    path.unlink()
    path.mkdir()


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"hello\n"),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 40),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "deep": lambda path: path.write_bytes(b"[" * 100_000),
    "folder": folder,
    "pipe": pipe,
    "flip": flip,
}
damages = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)


@damages
def test_a_damaged_checkpoint(damage, copied, refused, tmp_path):
    path = copied / "stage1" / "last.pt"
    damage(path)
    refused("train", "--run-dir", copied, "--resume", names=path)
    refused("eval", "--run-dir", copied, names=path)
    refused("embed", "--checkpoint", path, "--data", "letters", "--output", tmp_path / "x.npy", names=path)
    guided = ("--stages", "stage2", "--stage2.guide", path)
    refused("train", "--config", "smoke", "--run-dir", tmp_path / "new", *KEYS, *guided, names=path)


@damages
def test_a_damaged_resampling(damage, copied, refused):
    path = copied / "stage1" / "resample_0001.pt"
    damage(path)
    refused("eval", "--run-dir", copied, names=path)


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "flip"])
def test_a_damaged_report(damage, copied, refused):
    path = copied / "report.json"
    DAMAGES[damage](path)
    refused("report", copied, names=path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stages", None),
        ("stages", [1]),
        ("stages", [{}]),
        ("stages", [{"name": "simclr", "knn": {"overall": "x"}}]),
        ("config", []),
    ],
)
def test_a_report_with_parts_of_another_type(key, value, copied, refused):
    path = copied / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    refused("report", copied, names=path)


@pytest.mark.parametrize("part", ["model", "optimizer", "rng", "method"])
def test_a_checkpoint_whose_values_do_not_fit(part, copied, refused):
    path = copied / "stage1" / "last.pt"
    state = torch.load(path, weights_only=True)
    save_tensors(path, {**state, "finished": False, "epoch": 1, part: {"other": torch.zeros(2)}})
    refused("train", "--run-dir", copied, "--resume", names=path)


@pytest.mark.parametrize("value", [None, torch.zeros(3), torch.full((48,), 99)])
def test_a_resampling_whose_values_do_not_fit(value, copied, refused):
    path = copied / "stage1" / "resample_0001.pt"
    save_tensors(path, torch.load(path, weights_only=True) | {"assignments": value})
    refused("eval", "--run-dir", copied, names=path)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe{}", b"a: [1", b"? [1]\n: 2", b"a: 2024-99-99", b"[" * 5000, b"- 1", b"\x00"]
)
def test_a_damaged_config(content, copied, refused):
    path = copied / "config.yaml"
    path.write_bytes(content)
    refused("train", "--run-dir", copied, "--resume", names=path)
    refused("eval", "--run-dir", copied, names=path)
    refused("train", "--run-dir", copied.with_name("new"), "--config", path, names=path)


@pytest.mark.parametrize("content", [b"{}\n{}\n", b"\xff\xff\n{}\n", b"[" * 9999 + b"\n{}\n", b'{"epoch": "x"}\n{}\n'])
def test_a_damaged_history_is_named(content, tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_bytes(b'{"epoch": 0}\n' + content)
    with pytest.warns(UserWarning, match=f"line 2 of {path} is damaged"):
        assert read_history(path) == [{"epoch": 0}]


def test_a_run_with_a_damaged_history_is_evaluated(copied, capsys):
    (copied / "stage1" / "history.jsonl").write_bytes(b"{}\n{}\n")
    assert main(["eval", "--run-dir", str(copied)]) == 0
    assert "ltood: warning: train: line 1 of " in capsys.readouterr().err


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "flip"])
@pytest.mark.parametrize("which", ["id", "candidates"])
def test_damaged_embeddings(damage, which, tmp_path, refused):
    for name in ("id", "candidates"):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32))
    argv = ("sample-ood", "--id", tmp_path / "id.npy", "--candidates", tmp_path / "candidates.npy", "--budget", "3")
    path = tmp_path / f"{which}.npy"
    DAMAGES[damage](path)
    refused(*argv, "--output", tmp_path / "out.npy", names=path)


@pytest.mark.parametrize("dtype", [">f4", np.longdouble, np.complex64, bool])
def test_embeddings_of_another_type(dtype, tmp_path, refused):
    np.save(tmp_path / "a.npy", np.zeros((40, 8), dtype))
    argv = ("sample-ood", "--id", tmp_path / "a.npy", "--candidates", tmp_path / "a.npy", "--budget", "3")
    refused(*argv, "--output", tmp_path / "out.npy", names=tmp_path / "a.npy")


def test_an_output_that_cannot_be_is_named_before_the_work(copied, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("ltood_fast.train.run.embed_set", None)
    embed = ("embed", "--checkpoint", copied / "simclr" / "last.pt", "--data", "letters", "--output")
    refused(*embed, tmp_path, names=tmp_path)
    refused(*embed, tmp_path / "none" / "x.npy", names=tmp_path / "none" / "x.npy")
    refused("report", copied, "--output", tmp_path / "none" / "x.md", names=tmp_path / "none" / "x.md")


def test_any_other_error_says_with_which_command_it_came(monkeypatch, capsys):
    for error, text in ((KeyError("x"), "unexpected KeyError ('x')"), (MemoryError("1 PiB"), "out of memory (1 PiB)")):

        def fail(*_, error=error):
            raise error

        monkeypatch.setitem(cli.COMMANDS, "report", fail)
        assert main(["report", "some folder"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{text} in: ltood report 'some folder'" in line

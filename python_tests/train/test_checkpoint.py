import builtins
import errno
import io
import random

import numpy as np
import pytest
import torch

from ltood_fast import _files
from ltood_fast.train import checkpoint
from ltood_fast.train.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ltood_fast.train.config import load_config

CONFIG = load_config("smoke")


def state(epoch=1):
    tensors = {"weight": torch.arange(3.0) + epoch}
    return {
        "stage": "simclr",
        "epoch": epoch,
        "finished": False,
        "channels": 1,
        "model": tensors,
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "rng": checkpoint.rng_state(),
        "method": {"chosen": torch.tensor([3, 1])},
    }


class FullDisk(io.FileIO):
    """A disk that takes 100 bytes."""

    def write(self, data):
        super().write(bytes(data)[:100])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_what_is_saved_is_loaded(tmp_path):
    save_checkpoint(tmp_path / "last.pt", CONFIG, **state())
    loaded = load_checkpoint(tmp_path / "last.pt", CONFIG)
    assert loaded["epoch"] == 1
    assert torch.equal(loaded["model"]["weight"], torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(loaded["method"]["chosen"], torch.tensor([3, 1]))


def test_rng_states_go_round(tmp_path):
    save_checkpoint(tmp_path / "last.pt", CONFIG, **state())
    expected = torch.rand(3), np.random.rand(3), random.random()
    checkpoint.restore_rng(load_checkpoint(tmp_path / "last.pt")["rng"])
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])
    assert random.random() == expected[2]


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, CONFIG, **state(epoch=1))
    before = path.read_bytes()
    monkeypatch.setattr(builtins, "open", lambda file, mode: FullDisk(file, mode))
    with pytest.raises(CheckpointError) as error:
        save_checkpoint(path, CONFIG, **state(epoch=2))
    monkeypatch.undo()
    assert "cannot be written (No space left on device); what was saved before is kept" in str(error.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_nothing_replaces_the_file_before_it_is_on_disk(failing, tmp_path, monkeypatch):
    path = tmp_path / "file"
    _files.write_atomic(path, b"old")

    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(_files.os, failing, fail)
    with pytest.raises(OSError, match="Input/output error"):
        _files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_bytes_are_flushed_to_disk_before_the_rename(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(_files.os, name)
        monkeypatch.setattr(_files.os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args)))
    _files.write_atomic(tmp_path / "file", b"content")
    assert calls == ["fsync", "replace", "fsync"]


def bytes_of_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "good.pt", CONFIG, **state())
    return (tmp_path / "good.pt").read_bytes()


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            lambda good: good[: len(good) // 2],
            "must be a whole checkpoint of ltood_fast, got a truncated or foreign file",
        ),
        (lambda good: b"", "must be a whole checkpoint of ltood_fast, got a truncated or foreign file"),
        (lambda good: b"hello, I am a text file", "must be a whole checkpoint of ltood_fast"),
        (lambda good: saved(CONFIG), "must be a whole checkpoint of ltood_fast"),  # a pickled object: not loaded
        (lambda good: saved({"state_dict": {}}), "must be a checkpoint of ltood_fast, got a file of something else"),
        (lambda good: saved([1, 2]), "must be a checkpoint of ltood_fast, got a file of something else"),
        (lambda good: saved({"format": checkpoint.FORMAT, "version": 99}), "must be of format version 2, got 99"),
        (lambda good: saved({"format": checkpoint.FORMAT, "version": 1}), "must be complete, got no channels, config"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_one_sentence(content, sentence, tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes(content(bytes_of_checkpoint(tmp_path)))
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, CONFIG)
    assert sentence in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(CheckpointError, match="got no such file"):
        load_checkpoint(tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="got a folder"):
        load_checkpoint(tmp_path)


def test_another_configuration_is_named(tmp_path):
    save_checkpoint(tmp_path / "last.pt", CONFIG, **state())
    other = load_config("smoke", {"stage1.alpha": "0.5", "run.threads": "1"})
    with pytest.raises(CheckpointError, match=r"one that differs in stage1\.alpha$"):
        load_checkpoint(tmp_path / "last.pt", other)

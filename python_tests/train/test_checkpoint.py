import builtins
import errno
import io
import random
import zipfile

import made_up
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
        (lambda good: b"", "must be a whole checkpoint of ltood_fast, got an empty file"),
        (
            lambda good: b"hello, I am a text file",
            "must be a whole checkpoint of ltood_fast, got a file of another kind",
        ),
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
    other = load_config("smoke", {"simclr.temperature": "0.5", "stage1.alpha": "0.5", "run.threads": "1"})
    with pytest.raises(CheckpointError, match=r"one that differs in simclr\.temperature$"):
        load_checkpoint(tmp_path / "last.pt", other)


@pytest.fixture
def trained(make_session, tmp_path):
    """Two epochs of SimCLR: last.pt and previous.pt of a real stage."""
    made_up.train(make_session(), "simclr")
    return tmp_path / "simclr" / "last.pt"


def flipped(content: bytes, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_no_single_bit_flip_loads(trained):
    content = trained.read_bytes()
    bits = np.random.default_rng(0).integers(0, 8 * len(content), 400).tolist()
    last = 8 * len(content) - 1  # the seal's own bytes, and the length of the comment that it is
    for bit in [*bits, *range(last - 8 * 90, last, 7)]:
        trained.write_bytes(flipped(content, bit))
        with pytest.raises(CheckpointError, match="must be") as error:
            load_checkpoint(trained)
        assert str(trained) in str(error.value)


def test_a_cut_off_checkpoint_never_loads(trained):
    content = trained.read_bytes()
    for length in (0, 1, 100, len(content) // 2, *range(len(content) - 110, len(content))):
        trained.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="must be"):
            load_checkpoint(trained)


def test_torch_and_zip_tools_read_a_sealed_file(trained):
    assert torch.load(trained, weights_only=True)["epoch"] == 2
    with zipfile.ZipFile(trained) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"ltood_fast sha256 ")


def test_the_checkpoint_before_is_kept_and_offered(trained):
    previous = trained.with_name("previous.pt")
    assert load_checkpoint(previous)["epoch"] == 1
    content = trained.read_bytes()
    trained.write_bytes(flipped(content, 4 * len(content)))
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(trained)
    assert str(error.value).endswith(
        f"; the one before it is whole: to go on from 1 finished epochs, mv {previous} {trained}"
    )
    previous.write_bytes(b"")
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(trained)
    assert "the one before" not in str(error.value)


def test_an_old_checkpoint_loads_and_says_so(tmp_path):
    save_checkpoint(tmp_path / "last.pt", CONFIG, **state())
    old = torch.load(tmp_path / "last.pt", weights_only=True)
    torch.save({**old, "version": 1}, tmp_path / "last.pt")
    with pytest.warns(UserWarning, match="last.pt carries no checksum"):
        assert load_checkpoint(tmp_path / "last.pt", CONFIG)["epoch"] == 1
    torch.save(old, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="without the checksum that version 2 carries"):
        load_checkpoint(tmp_path / "last.pt", CONFIG)


def test_a_file_system_without_links_keeps_a_copy(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "last.pt", CONFIG, **state(epoch=1))

    def link(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(_files.os, "link", link)
    save_checkpoint(tmp_path / "last.pt", CONFIG, **state(epoch=2))
    assert load_checkpoint(tmp_path / "previous.pt")["epoch"] == 1
    assert load_checkpoint(tmp_path / "last.pt")["epoch"] == 2


@pytest.mark.parametrize("field", list(checkpoint.FIELDS))
def test_a_field_of_another_type_is_named(field, tmp_path):
    save_checkpoint(tmp_path / "last.pt", CONFIG, **state())
    damaged = torch.load(tmp_path / "last.pt", weights_only=True) | {field: 1.5}
    checkpoint.save_tensors(tmp_path / "last.pt", damaged)
    with pytest.raises(CheckpointError, match=f"last.pt must be whole, got values of another type in {field}"):
        load_checkpoint(tmp_path / "last.pt")


def test_two_writers_of_one_file_do_not_collide(tmp_path):
    def write(content):
        def into(file):
            file.write(content)
            if content == b"first":
                _files.write_atomic(tmp_path / "file", write(b"second"))

        return into

    _files.write_atomic(tmp_path / "file", write(b"first"))
    assert (tmp_path / "file").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

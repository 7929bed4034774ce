"""The commands and the code of docs/own_images.md and docs/export.md, run in their order as a reader would."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import resnet34

from ltood_fast.cli import main

DOCS = Path(__file__).resolve().parents[2] / "docs"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHORT = ["--simclr.epochs", "1", "--stage1.epochs", "2", "--stage1.warmup_epochs", "1", "--stage2.epochs", "1",
         "--run.progress", "false", "--run.device", "cpu"]  # fmt: skip


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """The working folder of a reader, with photographs and a pool."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    generator = np.random.default_rng(0)
    for folder, n in (("my_photos/cat", 12), ("my_photos/lynx", 8), ("my_pool", 30)):
        Path(folder).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(generator.integers(0, 256, (40, 36, 3), np.uint8)).save(f"{folder}/{i}.png")
    network = resnet34()
    network.fc = torch.nn.Identity()
    torch.save(network.state_dict(), "resnet34.pt")
    return tmp_path


def run_page(name):
    """Runs the blocks of a page; commands that need a package which is not here are parsed and refused by its name."""
    for language, text in FENCE.findall((DOCS / name).read_text()):
        if language == "python":
            exec(compile(text, name, "exec"), {"__name__": "page"})
            continue
        for line in text.splitlines():
            _, *words = shlex.split(line)
            needs_timm = any(word.startswith("timm:") for word in words)
            if needs_timm:
                continue  # downloads weights; the encoder itself is tested in test_export
            if words[0] == "train":
                words += SHORT
            assert main(words) == 0, line


def test_own_images_from_its_first_command_to_its_last(reader):
    run_page("own_images.md")
    run = reader / "runs" / "mine"
    described = re.findall(r"^\| `([\w.]+/?)`(?:, `([\w.]+)`)? \|", (DOCS / "own_images.md").read_text(), re.MULTILINE)
    files = {
        name for pair in described for name in pair if name.endswith((".npy", ".csv", ".html", ".json", ".yaml", "/"))
    }
    assert len(files) == 7
    assert [name for name in sorted(files) if not (run / name).exists()] == []
    assert np.load(reader / "pool.npy").shape[0] == 30


def test_export_from_its_first_command_to_its_last(reader, capsys):
    assert main(["train", "--images", "my_photos", "--run-dir", "runs/mine", *SHORT]) == 0
    run_page("export.md")
    assert "torch.Size([1, 128])" in capsys.readouterr().out
    assert (reader / "runs" / "second" / "report.html").exists()


def test_the_rules_are_those_of_the_page():
    """The sizes in the table are the ones of the code."""
    from ltood_fast.train.own_images import LARGEST_ON_CPU, MOST_BUDGET, SIZES

    page = (DOCS / "own_images.md").read_text()
    listed = ", ".join(map(str, SIZES[:-1])) + f" and {SIZES[-1]}"
    assert f"the largest of {listed}" in page
    assert f"at most {LARGEST_ON_CPU} without a GPU" in page
    assert f"at most {MOST_BUDGET:,} and" in page

"""The input benchmark: a quick run's rows, and that torchvision's transforms do what ours do."""

import json

import pytest
import torch

from benchmarks import pipeline
from benchmarks.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores


def test_a_quick_run_times_every_part(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "QUICK", pipeline.Setup({32: 4, 224: 1}, files=2, pool=8, workers=(1,), rounds=1))
    output, threads = tmp_path / "results/input.json", torch.get_num_threads()
    assert main(["input", "--quick", "--threads", str(threads), "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert {"machine", "commit", "rows"} <= result.keys()
    names = [(row["part"], row["pixels"], row["implementation"]) for row in result["rows"]]
    assert len(names) == len(set(names)) == 2 * 3 + 2 * 2 + 3
    assert all(row["images_per_s"] > 0 and row["cpu_us_per_image"] > 0 for row in result["rows"])
    printed = capsys.readouterr().out
    for row in result["rows"]:
        assert row["images_per_s"] == pytest.approx(1e6 / row["wall_us_per_image"])
        assert pipeline.line(row) in printed


@pytest.mark.parametrize("size", [32, 224])
def test_both_augmentations_take_and_give_the_same(size):
    images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)
    for augment in pipeline.augmentations(size, "cpu").values():
        views = augment(images)
        assert (views.shape, views.dtype) == (images.shape, torch.float32)
        assert -2 <= float(views.min()) < float(views.max()) <= 2


def test_a_gpu_that_is_not_there_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["input", "--device", "cuda"]) == 2
    assert "--device cuda needs a CUDA device" in capsys.readouterr().err

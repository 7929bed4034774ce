"""`ltood train --images`: a folder of one's own from the command to the files at the end."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from ltood_fast.cli import main
from ltood_fast.data import load_data
from ltood_fast.data.bundle import draw_test
from ltood_fast.train.config import DataConfig, load_config
from ltood_fast.train.own_images import OwnImages, batch_size, clusters_for, image_size, own_overrides, rules

SHORT = ["--simclr.epochs", "1", "--stage1.epochs", "2", "--stage1.warmup_epochs", "1", "--stage2.epochs", "1",
         "--model.encoder", "tiny_conv", "--model.width", "4", "--model.hidden", "8", "--model.out", "4",
         "--run.progress", "false", "--run.device", "cpu"]  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path):
    """Folders of small photographs: photos("a/x", n) writes n of them below a/x."""
    generator = np.random.default_rng(0)

    def write(folder, n, size=(24, 20)):
        path = tmp_path / folder
        path.mkdir(parents=True, exist_ok=True)
        tint = generator.integers(0, 200, 3)
        for i in range(n):
            pixels = tint + generator.integers(0, 56, (size[1], size[0], 3))
            Image.fromarray(pixels.astype(np.uint8)).save(path / f"{i}.png")
        return tmp_path / folder.split("/")[0]

    return write


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_from_two_folders_to_the_files_at_the_end(photos, tmp_path, capsys):
    images, pool, run = photos("mine/cat", 15), photos("pool", 12), tmp_path / "run"
    photos("mine/dog", 9)
    photos("mine/owl", 1)
    assert main(["train", "--images", str(images), "--ood", str(pool), "--run-dir", str(run), *SHORT]) == 0
    said = capsys.readouterr()
    assert "20 training images, 12 OOD images: data.image_size 20" in said.err
    assert "stage1.budget is 12 instead of 20, as the pool holds no more" in said.err
    assert "has none to test and counts in no accuracy: owl (1 in all)" in said.err
    assert said.out.splitlines()[0].split()[0] == "overall"
    report = json.loads((run / "report.json").read_text())
    assert report["class_counts"] == [12, 7, 1]
    assert [stage["name"] for stage in report["stages"]] == ["stage1", "stage2"]
    features, rows = np.load(run / "embeddings.npy"), rows_of(run / "embeddings.csv")
    assert features.shape == (25, 16)
    assert [row["part"] for row in rows] == ["train"] * 20 + ["test"] * 5
    assert {(row["file"].split("/")[0], row["class"]) for row in rows} == {(c, c) for c in ("cat", "dog", "owl")}
    assert sorted(row["file"] for row in rows_of(run / "chosen_ood.csv")) == sorted(f"{i}.png" for i in range(12))
    assert {path.name for path in (run / "network").iterdir()} == {"backbone.pt", "preprocessing.json", "README.md"}
    assert main(["train", "--run-dir", str(run), "--resume"]) == 0  # the rules are in config.yaml
    (run / "embeddings.npy").unlink()
    assert main(["train", "--images", str(images), "--run-dir", str(run), "--resume", "--stage2.epochs", "2"]) == 0
    assert np.load(run / "embeddings.npy").shape == (25, 16)
    capsys.readouterr()
    assert main(["train", "--images", str(pool), "--run-dir", str(run), "--resume"]) == 2
    assert "argument --images must be the folder of the run in " in capsys.readouterr().err
    argv = ["train", "--images", str(images), "--ood", str(images), "--run-dir", str(run), "--resume"]
    assert main(argv) == 2
    assert "argument --ood must be the folder of the run in " in capsys.readouterr().err


def test_images_without_classes_get_pages_to_look_at(photos, tmp_path, capsys):
    images, run = photos("mine", 20), tmp_path / "run"
    assert main(["train", "--images", str(images), "--run-dir", str(run), *SHORT]) == 0
    columns = capsys.readouterr().out.splitlines()[0].split()
    assert columns == ["uniformity", "silhouette", "views", "found", "alignment"]
    (stage,) = json.loads((run / "report.json").read_text())["stages"]
    assert (stage["name"], stage["probe"], stage["confusion"]) == ("simclr", None, [])
    assert sum(stage["without_labels"]["cluster_sizes"]) == 16
    assert 0 <= stage["without_labels"]["view_recall"] <= 1
    page = (run / "report.html").read_text()
    assert "Nearest training images of test images" in page
    assert "Clusters of the training images" in page
    assert "Accuracy" not in page
    assert main(["report", str(run)]) == 0


def test_one_class_folder_tells_nothing_apart(photos):
    images = photos("mine/2024", 10)
    data = load_data(DataConfig(id=f"folder:{images}", ood="", image_size=8))
    assert not data.has_labels
    assert (len(data.train), len(data.test), data.train.class_names) == (8, 2, ())
    assert data.train.labels.unique().tolist() == [-1]


def test_loose_images_outside_class_folders_are_trained_on_only(photos):
    photos("mine", 5)
    photos("mine/a", 5)
    images = photos("mine/b", 5)
    with pytest.warns(UserWarning, match="5 images in .* lie in no class folder"):
        data = load_data(DataConfig(id=f"folder:{images}", ood="", image_size=8))
    assert data.train.class_counts().tolist() == data.probe.class_counts().tolist() == [4, 4]
    assert (len(data.train), len(data.probe), len(data.test)) == (13, 8, 2)


def test_too_few_images_are_refused(photos, tmp_path, capsys):
    images = photos("mine", 3)
    assert main(["train", "--images", str(images), "--run-dir", str(tmp_path / "run"), *SHORT]) == 2
    assert (
        "must leave two images to train on and two to test with data.test_fraction 0.2, got 2 and 1"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


def test_the_drawn_test_set_is_a_share_of_each_class():
    labels = torch.tensor([0] * 100 + [1] * 10 + [2] * 2 + [3] + [-1] * 50)
    chosen = draw_test(labels, 0.2, 0)
    assert [int(chosen[labels == c].sum()) for c in (0, 1, 2, 3, -1)] == [20, 2, 1, 0, 0]
    assert torch.equal(chosen, draw_test(labels, 0.2, 0))
    assert not torch.equal(chosen, draw_test(labels, 0.2, 1))
    assert int(draw_test(torch.full((10,), -1), 0.3, 0).sum()) == 3


@pytest.mark.parametrize(
    ("side", "on_gpu", "size"),
    [(500, True, 224), (500, False, 64), (100, True, 96), (32, False, 32), (20, True, 20), (3, True, 8)],
)
def test_the_image_size_follows_the_images(side, on_gpu, size):
    assert image_size(OwnImages(100, 0, side, on_gpu)) == size


def test_batches_and_clusters_follow_the_number_of_images():
    assert [batch_size(n) for n in (2, 20, 100, 5000)] == [2, 4, 16, 256]
    assert [clusters_for(n) for n in (4, 50, 5000)] == [2, 5, 10]
    chosen = rules(OwnImages(5000, 100, 300, True), {"optim.batch_size": 64})
    assert (chosen["optim.lr"], chosen["model.stem"], chosen["augment.blur_p"]) == (0.0625, "imagenet", 0.5)
    assert rules(OwnImages(50_000, 10**6, 300, True), {})["stage1.budget"] == 10_000


def test_what_is_given_stands(photos, tmp_path):
    images, pool = photos("mine", 12), photos("pool", 30)
    (tmp_path / "own.yaml").write_text("data:\n  image_size: 12\nstage1:\n  clusters: 2\n")
    argv = ["train", "--images", str(images), "--ood", str(pool), "--config", str(tmp_path / "own.yaml"), "--run-dir",
            str(tmp_path / "run"), *SHORT, "--stage1.budget", "7", "--recipe", "random-ood"]  # fmt: skip
    assert main(argv) == 0
    config = load_config(str(tmp_path / "run" / "config.yaml"))
    assert (config.data.image_size, config.stage1.clusters, config.stage1.budget) == (12, 2, 7)
    assert (config.stages, config.stage1.ood_strategy) == (("stage1",), "random")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--ood", "pool"], "argument --ood must come with --images, got it alone"),
        (["--images", "none"], "data: folder must exist, got "),
        (["--images", "mine", "--data.id", "digits"], "data.id must be left out with --images, got digits"),
        (["--images", "mine", "--config", "demo"], "data.id must be left out with --images, got digits"),
        (["--images", "mine", "--data.image_size", "x"], "data.image_size must be an integer, got 'x'"),
        (["--images", "mine", "--ood", "empty"], "folder must hold images (.bmp, .gif, "),
        (["--images", "mine", "--recipe", "stage1"], "stage1.ood_strategy must be none without an OOD set"),
        (["--images", "broken"], "image file must be readable, got a broken one: "),
    ],
)
def test_what_a_user_gets_wrong_with_folders(argv, sentence, photos, tmp_path, monkeypatch, capsys):
    photos("mine", 12)
    (tmp_path / "empty").mkdir()
    (photos("broken", 4) / "2.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--run-dir", "run", *argv]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_with_its_own_test_part_keeps_it(photos):
    for part in ("train", "val"):
        images = photos(f"mine/{part}/a", 6)
    values, said = own_overrides(images, None, {})
    assert said.startswith("6 training images, no OOD images: ")
    assert values["stages"] == ("simclr",)

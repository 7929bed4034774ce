"""The trained network as files: each format loads by the code of its model card, in a process of its own."""

import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ltood_fast.cli import main
from ltood_fast.data import make_eval_transform
from ltood_fast.data.decode import decode_file
from ltood_fast.train.checkpoint import save_checkpoint
from ltood_fast.train.config import ConfigError, load_config
from ltood_fast.train.encoders import initialise, library_encoder, make_encoder
from ltood_fast.train.export import ExportError, export_network, last_checkpoint
from ltood_fast.train.model import make_model

SMALL = {"model.width": "4", "model.hidden": "8", "model.out": "4", "data.image_size": "32"}


@pytest.fixture
def checkpoint(tmp_path):
    """A run's checkpoint of random weights: checkpoint(encoder) writes it and returns (path, model)."""

    def make(encoder="resnet18", channels=3, **options):
        config = load_config("smoke", {**SMALL, "model.encoder": encoder, **options})
        model = make_model(config.model, channels, config.data.image_size).train()
        model(torch.randn(4, channels, 32, 32))  # running statistics that are not the first ones
        path = tmp_path / "run" / "simclr" / "last.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {"stage": "simclr", "epoch": 1, "finished": True, "channels": channels, "model": model.state_dict()}
        save_checkpoint(path, config, **state, optimizer={}, rng={}, method={})
        return path, model.eval()

    return make


def code_of(folder):
    """The blocks of the model card: loading and preprocessing."""
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize(
    ("encoder", "resized"), [("resnet18", 32), ("torchvision:mobilenet_v3_small", 32), ("tiny_conv", 38)]
)
def test_the_card_loads_the_network_elsewhere(encoder, resized, checkpoint, tmp_path):
    path, model = checkpoint(encoder, **{"data.decode_size": str(resized)})
    folder = export_network(path, "torch", tmp_path / "network")
    picture = tmp_path / "a.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(picture)
    load, prepare = code_of(folder)
    assert ("ltood_fast" in load) == (encoder == "tiny_conv")
    script = f"{load}\n{prepare}\nprint(features(prepare({str(picture)!r}))[0].tolist())"
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    images = make_eval_transform(32)(torch.from_numpy(decode_file(picture, resized).copy())[None])
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), model.embed(images)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("stem", "channels"), [("cifar", 1), ("imagenet", 1), ("imagenet", 3)])
def test_every_stem_of_a_resnet_is_in_the_card(stem, channels, checkpoint, tmp_path):
    path, _ = checkpoint("resnet18", channels, **{"model.stem": stem})
    export_network(path, "torch", tmp_path / "network")  # checks what it wrote
    assert json.loads((tmp_path / "network" / "preprocessing.json").read_text())["mean"] == [0.5] * channels


def test_a_network_that_loads_otherwise_is_not_written(checkpoint, tmp_path, monkeypatch):
    path, _ = checkpoint("tiny_conv")
    from ltood_fast.train import export

    halved = lambda encoder: {name: value / 2 for name, value in encoder.state_dict().items()}  # noqa: E731
    monkeypatch.setattr(export, "_weights", halved)
    with pytest.raises(ExportError, match="loaded features must be within 1e-05 of the trained network's"):
        export_network(path, "torch", tmp_path / "network")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("kind", ["safetensors", "onnx"])
def test_formats_of_other_packages_load_or_name_them(kind, checkpoint, tmp_path, capsys):
    """Where the packages are missing, a sentence says which; where they are there, the export checks itself."""
    checkpoint("resnet18")
    needed = {"safetensors": ["safetensors"], "onnx": ["onnx", "onnxscript", "onnxruntime"]}[kind]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    argv = ["export", "--run-dir", str(tmp_path / "run"), "--format", kind, "--output", str(tmp_path / "network")]
    assert main(argv) == (2 if missing else 0)
    if missing:
        assert f"export: format {kind} needs {missing[0]}, which cannot be imported" in capsys.readouterr().err
        assert not (tmp_path / "network").exists()
    else:
        assert (tmp_path / "network" / f"backbone.{kind}").stat().st_size > 10_000_000


def test_the_last_stage_is_exported_unless_another_is_named(checkpoint, tmp_path):
    path, _ = checkpoint("tiny_conv")
    (tmp_path / "run" / "stage1").mkdir()
    (tmp_path / "run" / "stage1" / "last.pt").write_bytes(path.read_bytes())
    assert last_checkpoint(tmp_path / "run").parent.name == "stage1"
    assert last_checkpoint(tmp_path / "run", "simclr") == path
    with pytest.raises(ExportError, match="must hold the checkpoint of stage2, got those of simclr, stage1"):
        last_checkpoint(tmp_path / "run", "stage2")


def test_an_export_replaces_nothing_but_an_export(checkpoint, tmp_path, capsys):
    checkpoint("tiny_conv")
    (tmp_path / "photos").mkdir()
    argv = ["export", "--run-dir", str(tmp_path / "run"), "--output"]
    assert main([*argv, str(tmp_path / "photos")]) == 2
    assert "export: output must be a new folder or that of an earlier export, got " in capsys.readouterr().err
    assert main([*argv, str(tmp_path / "none" / "network")]) == 2
    assert "export: output must be in an existing folder" in capsys.readouterr().err
    assert main([*argv, str(tmp_path / "network")]) == 0
    assert main([*argv, str(tmp_path / "network")]) == 0
    (tmp_path / "network" / "notes.txt").write_text("mine")
    assert main([*argv, str(tmp_path / "network")]) == 2
    assert (tmp_path / "network" / "notes.txt").read_text() == "mine"
    assert main(["export", "--run-dir", str(tmp_path / "photos"), "--output", str(tmp_path / "x")]) == 2
    assert "export: run-dir must hold a trained stage, got none" in capsys.readouterr().err


def test_a_folder_is_embedded_with_its_files(checkpoint, tmp_path, capsys):
    path, model = checkpoint("tiny_conv")
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 40), (80 * i, 0, 0)).save(tmp_path / "photos" / f"{i}.png")
    argv = ["embed", "--run-dir", str(tmp_path / "run"), "--images", str(tmp_path / "photos"), "--output",
            str(tmp_path / "x.npy"), "--data.cache_dir", str(tmp_path / "cache")]  # fmt: skip
    assert main(argv) == 0
    assert (tmp_path / "x.csv").read_text() == "row,file\n0,0.png\n1,1.png\n2,2.png\n"
    images = torch.stack([torch.from_numpy(decode_file(tmp_path / "photos" / f"{i}.png", 32).copy()) for i in range(3)])
    with torch.no_grad():
        expected = model.embed(make_eval_transform(32)(images))
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "x.npy")), expected)
    capsys.readouterr()
    assert main([*argv, "--data", "letters"]) == 2
    assert "must be one of --images, --data, got --images and --data" in capsys.readouterr().err
    assert main(["embed", "--data", "letters", "--output", str(tmp_path / "y.npy")]) == 2
    assert "must be one of --checkpoint, --run-dir, got none" in capsys.readouterr().err
    assert main(["embed", "--run-dir", str(tmp_path), "--data", "letters", "--output", str(tmp_path / "y.npy")]) == 2
    assert "embed: run-dir must hold a trained stage, got none" in capsys.readouterr().err
    assert main([text.replace("x.npy", "x.csv") for text in argv]) == 2  # where the list of the files goes
    assert "embed: output must end in .npy, got " in capsys.readouterr().err


# ---- networks of libraries, and weights to start from


def encoder_of(name, **options):
    return load_config("smoke", {**SMALL, "model.encoder": name, **options}).model


@pytest.mark.parametrize(
    ("name", "features"),
    [("torchvision:resnet34", 512), ("torchvision:convnext_tiny", 768), ("torchvision:vit_b_32", 768)],
)
def test_any_network_of_torchvision_gives_features(name, features):
    encoder, n = make_encoder(encoder_of(name), 3, 32)
    assert n == features
    assert encoder.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, features)


@pytest.mark.parametrize(
    ("name", "channels", "size", "sentence"),
    [
        ("torchvision:resnt34", 3, 32, "must name a network that torchvision can make for images of 3 channels and 32"),
        ("torchvision:resnet34", 1, 32, "must be one for 1 channels, got torchvision:resnet34, which is for colour"),
        (
            "torchvision:squeezenet1_0",
            3,
            32,
            "must be a network with a linear classifier, got torchvision:squeezenet1_0",
        ),
        (
            "torchvision:vit_b_32",
            3,
            20,
            "must name a network that torchvision can make for images of 3 channels and 20",
        ),
    ],
)
def test_a_network_that_cannot_be_made_is_named(name, channels, size, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        make_encoder(encoder_of(name), channels, size)


def test_timm_is_used_or_named():
    if importlib.util.find_spec("timm") is None:
        with pytest.raises(ImportError, match=r"model: model.encoder timm:NAME needs timm, .* its extra \[models\]"):
            library_encoder("timm:vit_tiny_patch16_224", 1, 32)
    else:
        made = library_encoder("timm:vit_tiny_patch16_224", 1, 32)
        assert made.options["img_size"] == 32
        assert make_encoder(encoder_of("timm:resnet18"), 1, 32)[1] == 512


@pytest.mark.parametrize("suffix", ["checkpoint", "export"])
def test_training_starts_from_given_weights(suffix, checkpoint, tmp_path):
    path, model = checkpoint("tiny_conv")
    if suffix == "export":
        path = export_network(path, "torch", tmp_path / "network") / "backbone.pt"
    options = encoder_of("tiny_conv", **{"model.init": str(path)})
    encoder, _ = make_encoder(options, 3, 32)
    initialise(encoder, options, 3, 32)
    assert all(torch.equal(value, model.encoder.state_dict()[name]) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("init", "sentence"),
    [
        ("none.pt", "model.init must be an existing .pt, .pth or .safetensors file of weights, or timm, got none.pt"),
        ("text.pt", "got text.pt ("),
        ("other.pt", "which lack 0.weight, "),
        ("list.pt", "must hold tensors by name, got something else in list.pt"),
    ],
)
def test_weights_that_do_not_fit_are_named(init, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pt").write_text("weights")
    torch.save({"fc.weight": torch.zeros(2)}, "other.pt")
    torch.save([1, 2], "list.pt")
    options = encoder_of("tiny_conv", **{"model.init": init})
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        initialise(make_encoder(options, 3, 32)[0], options, 3, 32)


def test_timm_weights_need_an_encoder_of_timm():
    with pytest.raises(ConfigError, match="model.init must be a file for an encoder that is not timm:NAME, got timm"):
        encoder_of("resnet18", **{"model.init": "timm"})

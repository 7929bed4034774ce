"""The trained network as files: weights, preprocessing and a model card.

    backbone.pt | .safetensors | .onnx    the encoder, without the projection head, which only training needs
    preprocessing.json                    how an image becomes the network's input
    README.md                             the model card; its code loads the network

The card's code is run before the folder is written, and its features are compared with those of the trained network.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._keys import flatten
from ..data.augment import MEAN, STD
from .checkpoint import fitted, load_checkpoint
from .config import LIBRARIES, STAGES, Config, ModelConfig, from_dict
from .encoders import library_encoder
from .extras import import_extra
from .model import make_model

FORMATS = ("torch", "safetensors", "onnx")
FILES = {"torch": "backbone.pt", "safetensors": "backbone.safetensors", "onnx": "backbone.onnx"}
TOLERANCE = {"torch": 1e-5, "safetensors": 1e-5, "onnx": 1e-3}  # relative to the largest feature; ONNX fuses BatchNorm
OWN_ENCODERS = ("small_resnet", "tiny_conv")  # those of no library
CHECKED_IMAGES = 4


class ExportError(RuntimeError):
    """A sentence about an export."""


def last_checkpoint(run_dir: Path, stage: str | None = None, op: str = "export") -> Path:
    """The checkpoint of a stage, by default of the last one that has one.

    Raises:
        ExportError: there is none.
    """
    there = [name for name in STAGES if (run_dir / name / "last.pt").is_file()]
    if not there or (stage is not None and stage not in there):
        got = f"those of {', '.join(there)}" if there else "none"
        wanted = f"the checkpoint of {stage}" if stage else "a trained stage"
        raise ExportError(f"{op}: run-dir must hold {wanted}, got {got} in {run_dir}")
    return run_dir / (stage or there[-1]) / "last.pt"


def export_network(checkpoint: Path, kind: str, output: Path) -> Path:
    """Writes the folder `output`, all of it or nothing.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        ExportError: `output` is something else than a new or an exported folder; what was written does not load, or
            gives other features.
        ImportError: a format needs a package that is not installed.
    """
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    exported = "preprocessing.json" in names and names <= {*FILES.values(), "preprocessing.json", "README.md"}
    if output.exists() and not exported:
        raise ExportError(f"export: output must be a new folder or that of an earlier export, got {output}")
    if not output.absolute().parent.is_dir():
        raise ExportError(f"export: output must be in an existing folder, got {output}")
    state = load_checkpoint(checkpoint)
    with fitted(checkpoint, "the network that its configuration names"):
        config = from_dict(flatten(state["config"]))
        model = make_model(config.model, state["channels"], config.data.image_size).eval()
        model.load_state_dict(state["model"])
    size = (state["channels"], config.data.image_size, config.data.image_size)
    images = torch.rand(CHECKED_IMAGES, *size, generator=torch.Generator().manual_seed(0)).sub(MEAN).div(STD)
    with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=f".{output.name}.") as folder:
        written = Path(folder) / "written"
        written.mkdir()
        WRITERS[kind](model.encoder, images, written / FILES[kind])
        code = loading_code(config.model, kind, size)
        card = model_card(state, config, kind, code, size)
        resized = config.data.decode_size or config.data.image_size
        (written / "preprocessing.json").write_text(json.dumps(preprocessing(size, resized), indent=1) + "\n")
        (written / "README.md").write_text(card, encoding="utf-8")
        _check_loads(code, written, images, model.encoder, kind)
        if output.exists():
            shutil.rmtree(output)
        written.rename(output)
    return output


def _write_torch(encoder: nn.Module, images: Tensor, path: Path) -> None:
    torch.save(_weights(encoder), path)


def _write_safetensors(encoder: nn.Module, images: Tensor, path: Path) -> None:
    import_extra("safetensors.torch", "export", "format safetensors", "export").save_file(_weights(encoder), path)


def _write_onnx(encoder: nn.Module, images: Tensor, path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        import_extra(package, "export", "format onnx", "export")
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        encoder, (images,), path, input_names=["images"], output_names=["features"], dynamo=True, external_data=False,
        dynamic_shapes=({0: batch},), verbose=False,
    )  # fmt: skip


def _weights(encoder: nn.Module) -> dict[str, Tensor]:
    return {name: value.contiguous().clone() for name, value in encoder.state_dict().items()}


WRITERS = {"torch": _write_torch, "safetensors": _write_safetensors, "onnx": _write_onnx}


def preprocessing(size: tuple[int, int, int], resized: int) -> dict[str, Any]:
    """How a file becomes the network's input, as `data.decode` and `data.augment` do it; resized: the shorter side."""
    channels, side, _ = size
    return {
        "color": "RGB" if channels == 3 else "grey",
        "resize": f"shorter side to {resized}, bicubic with antialiasing",
        "crop": "centre, to image_size",
        "image_size": side,
        "range": [0, 1],
        "mean": [MEAN] * channels,
        "std": [STD] * channels,
    }


def loading_code(model: ModelConfig, kind: str, size: tuple[int, int, int]) -> str:
    """Python that makes `features`, a function of images [N, C, H, W], from the files in `folder`."""
    channels, side, _ = size
    if kind == "onnx":
        return (
            'import onnxruntime\n\nfolder = "."\n'
            'session = onnxruntime.InferenceSession(f"{folder}/backbone.onnx")\n\n\n'
            "def features(images):\n"
            '    return session.run(None, {"images": images.numpy()})[0]\n'
        )
    read = {
        "torch": ("import torch\n", 'torch.load(f"{folder}/backbone.pt", weights_only=True)'),
        "safetensors": ("from safetensors.torch import load_file\n", 'load_file(f"{folder}/backbone.safetensors")'),
    }[kind]
    imports, make = _making_code(model, channels, side)
    return (
        f'{read[0]}{imports}\nfolder = "."\n{make}network.load_state_dict({read[1]})\n'
        "network.eval()\nfeatures = network\n"
    )


def _making_code(model: ModelConfig, channels: int, side: int) -> tuple[str, str]:
    """(imports, lines that make `network`) of an encoder."""
    name, identity = model.encoder, "torch.nn.Identity()"
    if name.startswith(LIBRARIES):
        made = library_encoder(name, channels, side)
        library, _, name = name.partition(":")
        options = "".join(f", {key}={value}" for key, value in made.options.items())
        if library == "timm":
            return "import timm\n", f'network = timm.create_model("{name}"{options})\n'
        make = f'network = torchvision.models.get_model("{name}"{options})\n'
        return "import torch\nimport torchvision\n", f'{make}network.set_submodule("{made.head}", {identity})\n'
    if name in ("resnet18", "resnet50"):
        make = f"network = torchvision.models.{name}()\nnetwork.fc = {identity}\n"
        if model.stem == "cifar":
            make += f"network.conv1 = torch.nn.Conv2d({channels}, 64, 3, padding=1, bias=False)\n"
            make += f"network.maxpool = {identity}\n"
        elif channels != 3:
            make += f"network.conv1 = torch.nn.Conv2d({channels}, 64, 7, stride=2, padding=3, bias=False)\n"
        return "import torch\nimport torchvision\n", make
    return (
        "from ltood_fast.train.config import ModelConfig\nfrom ltood_fast.train.model import make_model\n",
        f'network = make_model(ModelConfig(encoder="{name}", width={model.width}), {channels}).encoder\n',
    )


def model_card(state: dict[str, Any], config: Config, kind: str, code: str, size: tuple[int, int, int]) -> str:
    """README.md of an exported network."""
    import jinja2

    resized = config.data.decode_size or config.data.image_size
    template = Path(__file__).with_name("model_card.md.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    return environment.from_string(template).render(
        encoder=config.model.encoder,
        own=config.model.encoder in OWN_ENCODERS and kind != "onnx",
        stage=state["stage"],
        epoch=state["epoch"],
        finished=state["finished"],
        data=config.data,
        seed=config.seed,
        channels=size[0],
        side=size[1],
        resized=resized,
        margin=(resized - size[1]) // 2,
        tolerance=TOLERANCE[kind],
        code=code,
        mean=MEAN,
        std=STD,
    )


def _check_loads(code: str, folder: Path, images: Tensor, encoder: nn.Module, kind: str) -> None:
    """Runs the code of the model card on the files and compares features."""
    names: dict[str, Any] = {}
    with torch.no_grad():
        expected = encoder(images)
        exec(code.replace('folder = "."', f"folder = {str(folder)!r}"), names)  # noqa: S102  written above
        got = torch.as_tensor(names["features"](images))
    worst = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    if not worst <= TOLERANCE[kind]:
        raise ExportError(
            f"export: loaded features must be within {TOLERANCE[kind]:g} of the trained network's, got {worst:.2g}"
        )

"""Encoders: ltood_fast's own small ones, torchvision's ResNets, and any network of torchvision or timm by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from .config import LIBRARIES, ConfigError, ModelConfig
from .extras import import_extra


def _torchvision() -> ModuleType:
    try:
        import torchvision
    except (ImportError, RuntimeError, OSError) as error:  # a build for another torch fails in any of these ways
        reason = str(error).splitlines()[0]
        raise ImportError(
            f"model: this encoder needs torchvision, which cannot be imported ({reason}): install the torchvision "
            f"built for torch {torch.__version__} or choose --model.encoder tiny_conv"
        ) from error
    return torchvision


def _resnet(name: str, config: ModelConfig, channels: int) -> nn.Module:
    encoder = getattr(_torchvision().models, name)(weights=None)
    if config.stem == "cifar":
        encoder.conv1 = nn.Conv2d(channels, 64, kernel_size=3, stride=1, padding=1, bias=False)
        encoder.maxpool = nn.Identity()
    elif channels != 3:
        encoder.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
    encoder.fc = nn.Identity()
    return encoder


def _small_resnet(config: ModelConfig, channels: int) -> nn.Module:
    """Four stages of one basic block, widths w, 2w, 4w, 8w, each but the first at half the size."""
    block = _torchvision().models.resnet.BasicBlock
    widths = [config.width << stage for stage in range(4)]
    layers = _conv(channels, widths[0], stride=1)
    before = widths[0]
    for width in widths:
        stride = 1 if width == widths[0] else 2
        shortcut = None
        if width != before:
            shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        layers.append(block(before, width, stride, shortcut))
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _tiny_conv(config: ModelConfig, channels: int) -> nn.Module:
    """Three convolutions, widths w, 2w, 4w: the smallest network that learns digits; needs torch alone."""
    w = config.width
    layers = _conv(channels, w, 2) + _conv(w, 2 * w, 2) + _conv(2 * w, 4 * w, 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _conv(before: int, width: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]


# name -> function of (ModelConfig, channels of an image) that returns the encoder
ENCODERS: dict[str, Callable[[ModelConfig, int], nn.Module]] = {
    "resnet18": lambda config, channels: _resnet("resnet18", config, channels),
    "resnet50": lambda config, channels: _resnet("resnet50", config, channels),
    "small_resnet": _small_resnet,
    "tiny_conv": _tiny_conv,
}


class LibraryEncoder(NamedTuple):
    """A network of a library without its classifier, and how it was made."""

    network: nn.Module
    options: dict[str, Any]
    """Arguments of `timm.create_model` or `torchvision.models.get_model`, in addition to the name."""
    head: str = ""
    """The layer that an identity has taken the place of."""


def library_encoder(encoder: str, channels: int, image_size: int, *, pretrained: bool = False) -> LibraryEncoder:
    """The network of `timm:NAME` or `torchvision:NAME`; a ViT for images of this size.

    Raises:
        ConfigError: the library knows no such name, or cannot make it for these images.
        ImportError: the library cannot be imported.
    """
    library, _, name = encoder.partition(":")
    make = {"timm": _timm, "torchvision": _of_torchvision}[library]
    try:
        return make(name, channels, image_size, pretrained)
    except (ImportError, ConfigError):
        raise
    except Exception as error:  # the libraries raise what comes: unknown names, sizes, no network to load from
        reason = " ".join(str(error).split())[:200]
        wanted = "pretrained weights of " if pretrained else ""
        raise ConfigError(
            f"config: model.encoder must name {wanted}a network that {library} can make for images of {channels} "
            f"channels and {image_size} pixels, got {encoder} ({reason})"
        ) from error


def _timm(name: str, channels: int, image_size: int, pretrained: bool) -> LibraryEncoder:
    timm = import_extra("timm", "model", "model.encoder timm:NAME", "models")
    options = {"num_classes": 0, "in_chans": channels, "img_size": image_size}
    try:
        return LibraryEncoder(timm.create_model(name, pretrained=pretrained, **options), options)
    except TypeError:  # a network for any size takes no size
        del options["img_size"]
        return LibraryEncoder(timm.create_model(name, pretrained=pretrained, **options), options)


def _of_torchvision(name: str, channels: int, image_size: int, pretrained: bool) -> LibraryEncoder:
    if channels != 3:
        raise ConfigError(
            f"config: model.encoder must be one for {channels} channels, got torchvision:{name}, which is for colour "
            "images (resnet18, resnet50 and timm:NAME take grey ones)"
        )
    models = _torchvision().models
    options = {"image_size": image_size} if name.startswith("vit_") else {}
    network = models.get_model(name, weights=None, **options)
    linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ConfigError(f"config: model.encoder must be a network with a linear classifier, got torchvision:{name}")
    network.set_submodule(linear[-1], nn.Identity())
    return LibraryEncoder(network, options, linear[-1])


def make_encoder(config: ModelConfig, channels: int, image_size: int) -> tuple[nn.Module, int]:
    """(encoder, number of features) for images of `channels` channels, its weights from torch's global RNG.

    Raises:
        ConfigError: as `library_encoder`, or an encoder that does not give one vector an image.
        ImportError: its library cannot be imported.
    """
    if config.encoder.startswith(LIBRARIES):
        encoder = library_encoder(config.encoder, channels, image_size).network
    else:
        encoder = ENCODERS[config.encoder](config, channels)
    was_training = encoder.training
    try:
        with torch.no_grad():
            shape = tuple(encoder.eval()(torch.zeros(1, channels, image_size, image_size)).shape)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        allowed = f"one that model.encoder {config.encoder} takes"
        raise ConfigError(f"config: data.image_size must be {allowed}, got {image_size} ({reason})") from error
    if len(shape) != 2:
        raise ConfigError(
            f"config: model.encoder must give one vector an image, got {config.encoder}, which gives shape {shape}"
        )
    encoder.train(was_training)
    return encoder, shape[1]


def initialise(encoder: nn.Module, config: ModelConfig, channels: int, image_size: int) -> None:
    """Gives a fresh encoder the weights of `model.init`; nothing where that is empty.

    Raises:
        ConfigError: no such file, or weights of another network; `timm` without an encoder of timm, or timm cannot
            fetch them.
    """
    if not config.init:
        return
    if config.init == "timm":
        state = library_encoder(config.encoder, channels, image_size, pretrained=True).network.state_dict()
    else:
        state = read_weights(Path(config.init).expanduser())
    own = encoder.state_dict()
    missing, other = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    for names, what in ((missing, "lack"), (shapes, "have another shape of"), (other, "have in addition")):
        if names:
            raise ConfigError(
                f"config: model.init must hold the weights of model.encoder {config.encoder}, got {config.init}, which "
                f"{what} {', '.join(names[:3])} ({len(names)} in all)"
            )
    encoder.load_state_dict(state)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The encoder's weights in a checkpoint of ltood_fast, in a file of torch or of safetensors.

    Raises:
        ConfigError: no such file, or none of these.
    """
    allowed = "an existing .pt, .pth or .safetensors file of weights"
    if not path.is_file():
        raise ConfigError(f"config: model.init must be {allowed}, or timm, got {path}")
    if path.suffix == ".safetensors":
        load_file = import_extra("safetensors.torch", "model", "model.init .safetensors", "export").load_file
    else:
        load_file = _load_torch
    try:
        state = load_file(path)
    except Exception as error:  # bytes that are no weights can raise anything in a reader
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"config: model.init must be {allowed}, got {path} ({reason})") from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):  # last.pt of a run
        state = {
            name.removeprefix("encoder."): value
            for name, value in state["model"].items()
            if name.startswith("encoder.")
        }
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ConfigError(f"config: model.init must hold tensors by name, got something else in {path}")
    return state


def _load_torch(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)

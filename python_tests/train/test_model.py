import builtins

import pytest
import torch

from ltood_fast.train.config import ModelConfig
from ltood_fast.train.encoders import ENCODERS
from ltood_fast.train.model import make_model


@pytest.mark.parametrize(
    ("encoder", "stem", "n_features"),
    [
        ("tiny_conv", "cifar", 32),
        ("small_resnet", "cifar", 64),
        ("resnet18", "cifar", 512),
        ("resnet18", "imagenet", 512),
        ("resnet50", "imagenet", 2048),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(encoder, stem, n_features, channels):
    model = make_model(ModelConfig(encoder=encoder, stem=stem, width=8, hidden=16, out=12), channels).eval()
    images = torch.randn(2, channels, 32, 32)
    assert model.embed(images).shape == (2, n_features)
    assert model(images).shape == (2, 12)


def test_the_cifar_stem_keeps_the_resolution():
    """3x3 stride 1 without pooling: ResNet-18 sees 32x32 in its first stage where ImageNet's stem leaves 8x8."""
    sizes = {}
    for stem in ("cifar", "imagenet"):
        model = make_model(ModelConfig(stem=stem), 3).eval()
        model.encoder.layer1.register_forward_hook(lambda m, i, out, stem=stem: sizes.update({stem: out.shape[2]}))
        model.embed(torch.randn(1, 3, 32, 32))
    assert sizes == {"cifar": 32, "imagenet": 8}


def test_head_has_batch_norm_after_each_layer():
    names = [type(layer).__name__ for layer in make_model(ModelConfig(encoder="tiny_conv"), 3).head]
    assert names == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]


def test_channels_last_changes_the_layout_alone():
    torch.manual_seed(0)
    plain = make_model(ModelConfig(encoder="small_resnet", width=8), 3).eval()
    torch.manual_seed(0)
    last = make_model(ModelConfig(encoder="small_resnet", width=8, channels_last=True), 3).eval()
    assert last.encoder[0].weight.is_contiguous(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(last(images), plain(images), rtol=1e-4, atol=1e-5)


def test_registry_and_configuration_name_the_same_encoders():
    field = ModelConfig.__dataclass_fields__["encoder"]
    assert set(ENCODERS) == set(field.metadata["choices"])


@pytest.mark.parametrize(
    "failure", [ImportError("no module"), RuntimeError("operator torchvision::nms does not exist")]
)
def test_without_torchvision_one_sentence(failure, monkeypatch):
    real = builtins.__import__

    def fail(name, *args, **options):
        if name == "torchvision":
            raise failure
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ImportError, match="needs torchvision, which cannot be imported") as error:
        make_model(ModelConfig(encoder="resnet18"), 3)
    assert "\n" not in str(error.value)
    make_model(ModelConfig(encoder="tiny_conv"), 3)  # needs torch alone

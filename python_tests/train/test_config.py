import dataclasses

import pytest
import torch

from ltood_fast.train.config import (
    Config,
    ConfigError,
    differing_keys,
    from_dict,
    known_keys,
    load_config,
    presets,
    save_config,
    to_dict,
)
from ltood_fast.train.session import resolve_precision


@pytest.mark.parametrize("name", presets())
def test_presets_load_and_survive_saving(name, tmp_path):
    config = load_config(name)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(str(tmp_path / "config.yaml")) == config


def test_the_presets_are_those_documented():
    assert presets() == [
        "cifar100_lt", "cifar10_lt", "cifar10_lt_cpu", "cifar10_lt_small", "demo", "imagenet100_lt", "imagenet_lt",
        "own_images", "places_lt", "smoke",
    ]  # fmt: skip


def test_cifar10_lt_is_the_sources_recipe():
    config = load_config("cifar10_lt")
    assert (config.model.encoder, config.optim.batch_size, config.simclr.epochs) == ("resnet18", 512, 2000)
    assert (config.stage1.alpha, config.stage2.beta, config.stage1.budget) == (0.3, 0.4, 10000)
    assert (config.stage1.resample_every, config.stage2.epochs, config.stage1.temperature) == (25, 500, 0.2)
    assert (config.optim.lr, config.optim.weight_decay, config.optim.warmup_epochs) == (0.5, 1e-4, 10)


def test_overrides_are_typed():
    config = load_config("smoke", {"optim.lr": "1e-2", "stages": "simclr, stage1", "model.channels_last": "true"})
    assert config.optim.lr == 0.01
    assert config.stages == ("simclr", "stage1")
    assert config.model.channels_last is True


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().optim.lr = 1.0


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("optim.lrr", "1", "config: key must be a known one, got 'optim.lrr', did you mean optim.lr?"),
        ("stage1.alhpa", "1", "config: key must be a known one, got 'stage1.alhpa', did you mean stage1.alpha?"),
        ("zzzz", "1", "config: key must be a known one, got 'zzzz'"),
        ("optim.lr", "fast", "config: optim.lr must be a number, got 'fast'"),
        ("optim.lr", None, "config: optim.lr must be a number, got None"),
        ("optim.lr", True, "config: optim.lr must be a number, got True"),
        ("optim.lr", "inf", "config: optim.lr must be finite, got inf"),
        ("optim.lr", "nan", "config: optim.lr must be at least 0, got nan"),
        ("optim.lr", "-1", "config: optim.lr must be at least 0, got -1.0"),
        ("optim.momentum", "1.5", "config: optim.momentum must be in [0, 1], got 1.5"),
        ("optim.batch_size", "1.5", "config: optim.batch_size must be an integer, got '1.5'"),
        ("optim.batch_size", 64.0, "config: optim.batch_size must be an integer, got 64.0"),
        ("model.channels_last", "yes", "config: model.channels_last must be true or false, got 'yes'"),
        ("model.encoder", "vgg", "config: model.encoder must be one of resnet18, resnet50, small_resnet, tiny_conv, "
         "torchvision:NAME, timm:NAME, got 'vgg'"),
        ("data.id", 3, "config: data.id must be a string, got 3"),
        ("stages", "stage2", "config: stages must hold stage1, the guide of stage2, unless stage2.guide names a "
         "checkpoint, got stage2"),
        ("stages", "stage1,simclr", "config: stages must be some of simclr, stage1, stage2, joint in that order, got "
         "stage1,simclr"),
        ("stages", "", "config: stages must be some of simclr, stage1, stage2, joint in that order, got none"),
        ("seed", "99999999999999999999", "config: seed must be in [0, 1000000000], got 99999999999999999999"),
        ("run.threads", "100000", "config: run.threads must be in [0, 1024], got 100000"),
        ("stage1.budget", "3000000000", "config: stage1.budget must be in [1, 2147483647], got 3000000000"),
        ("run", "3", "config: key must be one of the section run (run.device, run.precision, run.threads, "
         "run.checkpoint_every, run.timeout, run.progress, run.loggers, run.report_every), got 'run' itself"),
        ("stages", [1], "config: stages must be a list of names, got [1]"),
        ("stage1.warmup_epochs", "99", "config: stage1.warmup_epochs must be at most stage1.epochs = 4, got 99"),
        ("augment.crop_max", "0.1", "config: augment.crop_min must be at most augment.crop_max = 0.1, got 0.5"),
    ],
)  # fmt: skip
def test_a_wrong_key_or_value_is_one_sentence(key, value, sentence):
    with pytest.raises(ConfigError) as error:
        load_config("smoke", {key: value})
    assert str(error.value) == sentence


def test_stage1_from_simclr_needs_that_stage():
    with pytest.raises(ConfigError, match="stage1.init must be scratch"):
        load_config("smoke", {"stage1.init": "simclr", "stages": "stage1"})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"optim: [", "must be YAML"),
        (b"\xff\xfe\x00", "must be YAML"),
        (b"- 1\n- 2\n", "must hold sections of keys, got a list"),
        (b"optim:\n  lrr: 1\n", "did you mean optim.lr?"),
        (b"optim: 3\n", "must be one of the section optim (optim.name, "),
        (b"optim:\n  lr: x\n", "config: optim.lr must be a number, got 'x' (in "),
        (b"seed: 2020-01-01\n", "config: seed must be an integer, got 2020-01-01 (in "),
        (b"seed: 1\nseed: 2\n", "must name a key once, got 'seed' twice"),
        (b"optim:\n  lr: 1\n  lr: 2\n", "must name a key once, got 'lr' twice"),
        (b"words", "must hold sections of keys, got plain text"),
    ],
)
def test_a_broken_file_is_one_sentence(content, sentence, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_config(str(path))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_section_without_keys_has_its_defaults(tmp_path):
    (tmp_path / "null.yaml").write_text("optim:\n  # lr: 1\nseed: 3\n")
    assert load_config(str(tmp_path / "null.yaml")) == from_dict({"seed": 3})


def test_a_missing_file_names_the_presets():
    with pytest.raises(ConfigError, match="did you mean demo"):
        load_config("dmeo")


def test_a_preset_is_found_by_its_old_name():
    assert load_config("cifar10_lt_hour") == load_config("cifar10_lt_small")


def test_only_free_keys_may_differ():
    base = load_config("smoke")
    for key, value in {
        "run.threads": "1",
        "run.progress": "false",
        "eval.knn_k": "3",
        "data.few_shot_list": "x",
    }.items():
        other = load_config("smoke", {key: value})
        assert differing_keys(other, to_dict(base)) == []
    for key, value in {"seed": "1", "stage1.k": "2", "run.precision": "bf16-mixed"}.items():
        other = load_config("smoke", {key: value})
        assert differing_keys(other, to_dict(base)) == [key]


def test_a_key_missing_in_a_saved_run_has_its_default():
    saved = to_dict(load_config("smoke"))
    del saved["optim"]["micro_batch"]
    assert differing_keys(load_config("smoke"), saved) == []
    assert differing_keys(load_config("smoke", {"optim.micro_batch": "8"}), saved) == ["optim.micro_batch"]


def test_every_default_is_in_its_own_range():
    defaults = {key: f.default for key, (f, _) in known_keys().items()}
    assert from_dict(defaults) == Config()


def test_integers_fit_where_they_are_used():
    """Each goes into a 32-bit field somewhere: a seed plus an epoch into FAISS's."""
    highest = {key: f.metadata["high"] for key, (f, kind) in known_keys().items() if kind is int}
    assert max(highest.values()) <= 2**31 - 1
    assert highest["seed"] + highest["stage1.epochs"] < 2**31


@pytest.mark.parametrize(("capabilities", "precision"), [
    ({"avx512_bf16": True}, "bf16-mixed"),
    ({"amx_bf16": True}, "bf16-mixed"),
    ({"avx512_f": True, "avx512_bf16": False}, "32-true"),
    ({}, "32-true"),
])  # fmt: skip
def test_precision_auto_asks_the_processor(capabilities, precision, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_precision("auto", cuda=False) == precision
    assert resolve_precision("32-true", cuda=False) == "32-true"
    assert resolve_precision("bf16-mixed", cuda=False) == "bf16-mixed"


@pytest.mark.parametrize(("has", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_precision_auto_asks_the_gpu(has, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    assert resolve_precision("auto", cuda=True) == precision

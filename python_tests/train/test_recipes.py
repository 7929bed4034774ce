import json

import pytest
from made_up import SMALL

from ltood_fast.cli import main
from ltood_fast.train.config import ConfigError, load_config, presets
from ltood_fast.train.recipes import RECIPES, recipe


@pytest.mark.parametrize("preset", presets())
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_every_preset_and_its_sizes(name, preset):
    plain, config = load_config(preset), load_config(preset, recipe(name))
    for section, keys in {
        "data": None,
        "model": None,
        "optim": None,
        "eval": None,
        "run": None,
        "stage1": ("epochs", "warmup_epochs", "resample_every", "budget"),
        "stage2": ("epochs",),
    }.items():
        mine, theirs = getattr(config, section), getattr(plain, section)
        assert mine == theirs if keys is None else all(getattr(mine, key) == getattr(theirs, key) for key in keys)


def test_what_is_asked_for_stands_over_the_recipe(made_up_data, tmp_path):
    argv = ["train", "--config", "smoke", "--recipe", "joint", "--stage1.alpha", "0.5", "--stage1.epochs", "2"]
    options = [item for key, value in SMALL.items() if key != "stage1.epochs" for item in (f"--{key}", value)]
    assert main([*argv, "--run-dir", str(tmp_path / "run"), *options]) == 0
    config = load_config(str(tmp_path / "run" / "config.yaml"))
    assert config.stages == ("joint",)
    assert (config.stage1.neighbor_weight, config.stage1.alpha, config.stage1.epochs) == (1.0, 0.5, 2)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["joint"]
    assert [(sample["stage"], sample["epoch"]) for sample in report["resamplings"]] == [("joint", 1)]
    assert (tmp_path / "run" / "report.html").exists()


def test_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(ConfigError) as error:
        recipe("two-stages")
    assert str(error.value) == (
        f"config: recipe must be one of {', '.join(RECIPES)}, got 'two-stages', did you mean two-stage?"
    )


def test_a_recipe_is_ones_own_copy():
    recipe("simclr")["stages"] = []
    assert recipe("simclr")["stages"] == ["simclr"]

"""Pages that list things list all of them."""

import inspect
import re

import pytest

import ltood_fast
from ltood_fast.cli import COMMANDS
from ltood_fast.experiments.registry import EXPERIMENTS
from ltood_fast.train.config import PRESETS
from ltood_fast.train.recipes import RECIPES

from .pages import ROOT

RESULTS = {"Stage1Result", "Stage2Result"}  # described with the functions that return them
PUBLIC = {name for name in ltood_fast.__all__ if not inspect.ismodule(getattr(ltood_fast, name))} - RESULTS
OPS = {name for name in PUBLIC if inspect.isfunction(getattr(ltood_fast, name))} - {"build_info"}
LISTS = {
    "docs/api.md": {f"ltood_fast.{name}" for name in PUBLIC} | {f"ltood_fast.nn.{n}" for n in ltood_fast.nn.__all__},
    "docs/cli.md": set(COMMANDS),
    "docs/presets.md": {path.stem for path in PRESETS.glob("*.yaml")} | RECIPES.keys(),
    "docs/experiments.md": EXPERIMENTS.keys(),
    "README.md": OPS,
}


@pytest.mark.parametrize("page", LISTS)
def test_everything_is_listed(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert not {
        name for name in LISTS[page] if not re.search(rf"(?:`|::: ){re.escape(name)}(?:`|$)", text, re.MULTILINE)
    }

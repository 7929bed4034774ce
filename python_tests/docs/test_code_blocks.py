"""Every Python block of README.md and docs/ runs, every command line names what exists."""

import re
import shlex

import pytest
import torch

from benchmarks.__main__ import parser as benchmarks_parser
from ltood_fast.cli import build_parser, parse_overrides
from ltood_fast.train.config import known_keys, load_config
from ltood_fast.train.recipes import recipe

from .pages import PAGES, ROOT, blocks, name

TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
COMMANDS = ("ltood ", "make ", "python ", "torchrun ", "pytest ")


def with_language(language: str) -> list:
    """Pages with such blocks, except those that a test_..._page.py runs with the files and libraries that they need."""
    elsewhere = re.findall(
        r"\w+\.md", "".join(test.read_text() for test in (ROOT / "python_tests").rglob("test_*_page*.py"))
    )
    found = [page for page in PAGES if any(block.language == language for block in blocks(page))]
    return [page for page in found if page.name not in elsewhere]


def command_lines() -> list:
    return [
        pytest.param(line, id=f"{name(page)}:{block.line + i}")
        for page in PAGES
        for block in blocks(page)
        if not block.language
        for i, line in enumerate(block.text.replace("\\\n", "").splitlines())
        if line.startswith(COMMANDS)
    ]


@pytest.mark.parametrize("page", with_language("python"), ids=name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """The blocks of a page run in order and share their names, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": "page"}
    for block in blocks(page):
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, name(page), "exec"), names)


def check_ltood(words: list[str]) -> None:
    if "--list" in words:
        with pytest.raises(SystemExit, match="^0$"):
            build_parser().parse_known_args(words)
        return
    arguments, rest = build_parser().parse_known_args(words)
    overrides = parse_overrides(rest)
    assert overrides.keys() <= known_keys().keys()
    if arguments.command in ("train", "experiment") and arguments.config:
        chosen = recipe(arguments.recipe) if getattr(arguments, "recipe", None) else {}
        load_config(arguments.config, {**chosen, **overrides})


@pytest.mark.parametrize("line", command_lines())
def test_command_lines_name_what_exists(line):
    program, *words = shlex.split(line, comments=True)
    if program == "ltood":
        check_ltood(words)
    elif program == "make":
        assert words[0] in TARGETS, f"the Makefile has no target {words[0]}"
    elif words[:2] == ["-m", "benchmarks"]:
        benchmarks_parser().parse_args(words[2:])
    elif "ltood_fast" in words:  # torchrun -m ltood_fast
        check_ltood(words[words.index("ltood_fast") + 1 :])
    else:
        files = [word for word in words if not word.startswith("-") and "/" in word]
        assert all((ROOT / file).exists() for file in files), files

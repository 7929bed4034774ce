"""Every script of examples/ runs and prints the lines that docs/examples.md shows."""

import os
import re
import subprocess
import sys

import pytest

from .pages import ROOT, blocks

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGE = ROOT / "docs/examples.md"
SHOWN = dict(
    zip(
        re.findall(r"\]\(\.\./examples/(\w+)\.py\)", PAGE.read_text()),
        [block.text for block in blocks(PAGE) if block.language == "text"],
        strict=True,
    )
)
MOST_LINES = 60


def masked(line: str) -> str:
    """Words without numbers: those differ in their last digits, and so in width, from machine to machine."""
    return " ".join(re.sub(r"-?\d[\d,.]*", "#", line).split())


def test_every_example_is_shown():
    assert sorted(SHOWN) == [example.stem for example in EXAMPLES]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_prints_what_the_page_shows(example, tmp_path):
    assert len(example.read_text().splitlines()) < MOST_LINES
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(example)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    printed, shown = [[masked(line) for line in text.splitlines()] for text in (done.stdout, SHOWN[example.stem])]
    at = 0
    for line in (line for line in shown if line != "..."):
        assert line in printed[at:], f"{line} is not among\n{done.stdout}"
        at = printed.index(line, at) + 1

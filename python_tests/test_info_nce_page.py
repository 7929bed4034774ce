"""The code of docs/info_nce.md runs, in the order of the page."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs/info_nce.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_every_block_runs():
    """Those that import open_clip where it is installed: python_tests/integrations has them all."""
    names: dict[str, object] = {}
    ran = 0
    for block in BLOCKS:
        if "integrations" in block and find_spec("open_clip") is None:
            continue
        exec(compile(block, str(PAGE), "exec"), names)
        ran += 1
    assert ran >= len(BLOCKS) - 1 >= 6


@pytest.mark.parametrize("package", ["open_clip", "lightly", "pytorch_metric_learning", "info_nce_pytorch"])
def test_the_table_names_every_adapter(package):
    source = (PAGE.parent.parent / f"ltood_fast/integrations/{package}.py").read_text()
    for name in re.findall(r"^class (\w+)\(", source, re.MULTILINE):
        assert f"`{name}`" in PAGE.read_text(), name

"""The house keeps its shape: names at the top, sizes of files and functions, one loader, one list of sources."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOP_LEVEL = {
    "benchmarks", "csrc", "ltood_fast", "python_tests",
    "CMakeLists.txt", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "pyproject.toml", "setup.py",
}  # fmt: skip
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).exists()]


def code_files() -> list[Path]:
    return [f for f in tracked_files() if f.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}]


def test_top_level_holds_only_what_the_house_names():
    found = {f.relative_to(ROOT).parts[0] for f in tracked_files()}
    assert {name for name in found if not name.startswith(".")} <= TOP_LEVEL


def test_files_stay_short():
    long_files = {
        str(f.relative_to(ROOT)): n for f in code_files() if (n := len(f.read_text().splitlines())) > MAX_FILE_LINES
    }
    assert not long_files


def test_functions_stay_short():
    long_functions = []
    for file in (f for f in code_files() if f.suffix == ".py" and "ltood_fast" in f.relative_to(ROOT).parts[0]):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                docstring = ast.get_docstring(node, clean=False) or ""
                lines = node.end_lineno - node.lineno + 1 - len(docstring.splitlines())
                if lines > MAX_FUNCTION_LINES:
                    long_functions.append(f"{file.relative_to(ROOT)}:{node.name} has {lines} lines")
    assert not long_functions


def test_every_source_is_listed_once():
    lines = [line.split("#")[0].split() for line in (ROOT / "csrc/sources.txt").read_text().splitlines()]
    listed = [fields[1] for fields in lines if fields]
    on_disk = [str(f.relative_to(ROOT)) for f in (ROOT / "csrc").rglob("*") if f.suffix in {".cpp", ".cu"}]
    tests = [f for f in on_disk if "/tests/" in f]
    assert sorted(listed) == sorted(set(on_disk) - set(tests))


def test_only_one_file_loads_the_extension():
    loaders = [f for f in (ROOT / "ltood_fast").rglob("*.py") if re.search(r"import _C\b|\._C\b import", f.read_text())]
    assert [f.name for f in loaders] == ["_ext.py"]


def test_references_stand_alone():
    for file in (ROOT / "ltood_fast/reference").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("ltood_fast")):
                assert node.level == 1, f"{file.name} imports {node.module} from outside the references"


def test_torch_free_sources_do_not_see_torch():
    lines = [line.split("#")[0].split() for line in (ROOT / "csrc/sources.txt").read_text().splitlines()]
    for kind, path in (fields for fields in lines if fields):
        if kind in ("cpu", "cuda"):
            assert not re.search(r'#include [<"](torch|ATen|c10)/', (ROOT / path).read_text()), path

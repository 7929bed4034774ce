"""The house keeps its shape: names at the top, sizes of files and functions, one loader, one list of sources."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

import ltood_fast

ROOT = Path(__file__).resolve().parent.parent
REQUIRED = {"benchmarks", "csrc", "ltood_fast", "python_tests", "setup.py", "CMakeLists.txt", "README.md"}
TOP_LEVEL = REQUIRED | {
    "docs", "examples", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md",
    "LICENSE", "MANIFEST.in", "Makefile", "pyproject.toml", "ltood_command.py",
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
    assert REQUIRED <= {name for name in found if not name.startswith(".")} <= TOP_LEVEL


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


SHARED_KEYWORDS = {"normalize", "reduction", "return_lse", "group", "exchange", "backend"}
MOST_PUBLIC, MOST_INNER = 12, 8


def test_functions_take_few_parameters():
    """A public function has at most 12 beside the keywords that all losses share, any other at most 8."""
    public, many = set(ltood_fast.__all__), []
    for file in (ROOT / "ltood_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            names = {a.arg for a in arguments} - {"self", "cls"} - SHARED_KEYWORDS
            if len(names) > (MOST_PUBLIC if node.name in public else MOST_INNER):
                many.append(f"{file.relative_to(ROOT)}:{node.name} takes {len(names)}")
    assert not many


def includes() -> dict[str, list[str]]:
    """File of csrc -> the files of csrc that it includes, both relative to csrc."""
    found = {}
    for file in (ROOT / "csrc").rglob("*"):
        if file.suffix in {".h", ".cuh", ".cpp", ".cu"}:
            found[str(file.relative_to(ROOT / "csrc"))] = re.findall(r'#include "([^"]+)"', file.read_text())
    return found


def test_includes_go_one_way():
    """common <- cuda <- ops/<family> <- ops/<family>/cpu and ops/<family>/cuda; no family includes another."""
    wrong = []
    for file, included in includes().items():
        family = file.split("/")[1] if file.startswith("ops/") else None
        for target in included:
            if target.startswith("ops/") and target.split("/")[1] != family and file != "bindings.cpp":
                wrong.append(f"{file} includes {target} of another family")
            if file.count("/") == 2 and ("/cpu/" in target or "/cuda/" in target):
                wrong.append(f"{file} includes {target} of one device")
            if file.startswith("common/") and not target.startswith("common/"):
                wrong.append(f"{file} includes {target}, common includes nothing else")
            if file.startswith("cuda/") and target.startswith("ops/"):
                wrong.append(f"{file} includes {target}")
            if "/cpu/" in file and ("/cuda/" in target or target.startswith("cuda/")):
                wrong.append(f"{file} includes {target} of a GPU")
            if "/cuda/" in file and "/cpu/" in target:
                wrong.append(f"{file} includes {target} of the CPU")
    assert not wrong


def test_file_names_differ_by_more_than_a_letter():
    folders: dict[Path, set[str]] = {}
    for file in code_files():
        folders.setdefault(file.parent, set()).add(file.stem)
    pairs = [
        f"{folder.relative_to(ROOT)}: {a}, {b}"
        for folder, stems in folders.items()
        for a in stems
        for b in stems
        if len(b) == len(a) + 1 and any(b[:i] + b[i + 1 :] == a for i in range(len(b)))
    ]
    assert not pairs


def test_no_small_header_serves_one_neighbour():
    """A header of under 40 lines that one file alone includes belongs into that file."""
    users: dict[str, set[str]] = {}
    for file, included in includes().items():
        for target in included:
            users.setdefault(target, set()).add(file)
    lonely = []
    for header, files in users.items():
        path = ROOT / "csrc" / header
        own = {str(Path(header).with_suffix(suffix)) for suffix in (".cpp", ".cu")}
        implemented = any((ROOT / "csrc" / name).exists() for name in own)
        if len(path.read_text().splitlines()) < 40 and len(files) < 2 and not implemented:
            lonely.append(f"{header}, included by {', '.join(files)}")
    assert not lonely


def test_test_names_are_short():
    names = [
        node.name
        for file in code_files()
        if file.suffix == ".py" and file.name.startswith(("test_", "bench_"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert not [name for name in names if len(name) > 60]

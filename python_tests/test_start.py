"""`ltood` answers before torch is imported, and names the extra of a package that is missing."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from ltood_fast.doctor import EXTRAS

ROOT = Path(__file__).resolve().parent.parent


def ltood(*argv: str, without: str) -> subprocess.CompletedProcess:
    """Runs the command where the import of one module fails."""
    start = f"import sys; sys.modules[{without!r}] = None; sys.path.insert(1, 'ltood_fast'); import command; "
    start += "sys.exit(command.main())"  # installed as ltood_command
    return subprocess.run([sys.executable, "-c", start, *argv], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"]])
def test_help_needs_no_torch(argv):
    result = ltood(*argv, without="torch")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: ltood")


def test_a_wrong_argument_needs_no_torch():
    result = ltood("trian", without="torch")
    assert result.returncode == 2
    assert "invalid choice: 'trian'" in result.stderr


def test_the_version_needs_no_torch():
    result = ltood("--version", without="torch")
    assert result.returncode == 0, result.stderr
    assert re.match(r"ltood_fast(, not installed| \d+\.\d+\.\d+)", result.stdout)


def test_a_command_runs_after_a_quick_start():
    result = ltood("info", without="yaml")
    assert result.returncode == 0, result.stderr
    assert "nt_xent" in result.stdout


@pytest.mark.parametrize(
    ("argv", "module"),
    [(["train", "--config", "smoke", "--run-dir", "unused"], "yaml"), (["experiment", "--list"], "matplotlib")],
)
def test_a_missing_package_names_the_extra(argv, module):
    result = ltood(*argv, without=module)
    assert result.returncode == 2
    assert result.stderr == (
        f"ltood: error: {module} is not installed; it comes with the extra [train]: `pip install 'ltood_fast[train]'`\n"
    )
    assert not (ROOT / "unused").exists()


def test_the_modules_of_the_extra_are_all_named():
    listed = re.search(r"^train-without-faiss = \[$(.*?)^\]$", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[1]
    packages = [*re.findall(r'"([\w-]+)', listed), "faiss-cpu"]
    modules_of = {}
    for module, distributions in metadata.packages_distributions().items():
        for name in distributions:
            modules_of.setdefault(name.lower().replace("_", "-"), set()).add(module)
    of_train = {module for module, (_, extra, _) in EXTRAS.items() if extra == "train"}
    for package in packages:
        assert modules_of[package] & of_train, package
    assert len(packages) == len(of_train)

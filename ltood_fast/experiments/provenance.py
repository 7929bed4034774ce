"""Where numbers come from: commit, versions, date, machine."""

from __future__ import annotations

import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import build_info

PACKAGE = Path(__file__).resolve().parents[1]
CPU_INFO = Path("/proc/cpuinfo")


def provenance() -> dict[str, Any]:
    packages = ("numpy", "torchvision", "kornia", "faiss-cpu", "scikit-learn")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "version": build_info()["version"],
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **_installed(packages)},
    }


def commit() -> str | None:
    """Of the checkout that the package lies in, with a "+" where files have changed since; None of an installed one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(PACKAGE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not git("ls-files", "cli.py"):
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_name() -> str:
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _installed(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found

"""Launchers to machine code: nvcc with setup.py's flags, ptxas's report, nvdisasm's listing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = tuple(sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("**/*.cu")))
FLAGS = ("-O3", "-std=c++17", "-lineinfo", "--expt-relaxed-constexpr")
# ptxas's codes for wgmma that it does not run as written: it waits after every product (C7508, C7510, C7514,
# C7515, C7518, C7520) or ignores setmaxnreg. C7519 alone is fine: it adds the fence that the first product needs.
FAULTS = ("C7508", "C7510", "C7514", "C7515", "C7518", "C7520")


@dataclass(frozen=True)
class Resources:
    """Registers and local memory of a kernel, by ptxas."""

    registers: int
    local_bytes: int
    """Stack and spills."""


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))


@cache
def nvcc_version() -> str:
    text = subprocess.run([nvcc() or "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", text)[1]


def nvdisasm() -> str | None:
    """NVDISASM, PATH, the toolkit, the package nvidia-cuda-nvdisasm, or the copy in triton's package."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    for package, inside in (("nvidia", "cu*/bin"), ("nvidia", "cuda_nvdisasm/bin"), ("triton", "backends/nvidia/bin")):
        spec = find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            folders += sorted(Path(place).glob(inside))
    candidates = [os.environ.get("NVDISASM"), shutil.which("nvdisasm"), *(str(f / "nvdisasm") for f in folders)]
    return next((c for c in candidates if c and os.access(c, os.X_OK)), None)


def compile_cubin(launcher: str, arch: str, target: Path) -> str:
    """Writes the machine code of a launcher for sm_<arch> and returns ptxas's report."""
    defines = ["-DLTOOD_SM90A=1"] if arch == "90a" else []
    command = [nvcc(), "-cubin", *FLAGS, *defines, f"-I{ROOT / 'csrc'}", f"-arch=sm_{arch}", "-Xptxas", "-v"]
    result = subprocess.run([*command, str(ROOT / launcher), "-o", str(target)], capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"nvcc failed on {launcher} for sm_{arch}:\n{result.stderr}")
    return result.stderr


def disassemble(cubin: Path) -> str:
    tool = nvdisasm()
    if tool is None:
        raise ValueError("nvdisasm is needed: pip install nvidia-cuda-nvdisasm, or set NVDISASM to the program")
    return subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout


def resources(report: str) -> dict[str, Resources]:
    """Mangled name -> resources, from the output of ``ptxas -v``."""
    found = {}
    for entry in re.split(r"Compiling entry function '", report)[1:]:
        local = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        used = re.search(r"Used (\d+) registers", entry)
        found[entry.split("'")[0]] = Resources(int(used[1]), sum(map(int, local.groups())))
    return found


def faults(report: str) -> list[str]:
    """The lines of a report that say that wgmma or setmaxnreg does not run as it is written."""
    return [line for line in report.splitlines() if any(f"({code})" in line for code in FAULTS) or "setmaxnreg" in line]


def demangle(names: list[str]) -> dict[str, str]:
    """Mangled name -> name with template arguments, without namespaces, return type and parameters."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return {name: name for name in names}
    lines = subprocess.run([tool, *names], capture_output=True, text=True, check=True).stdout.splitlines()
    plain = (line.replace("(anonymous namespace)::", "").split("(")[0].removeprefix("void ") for line in lines)
    return {name: re.sub(r"\b\w+::", "", line) for name, line in zip(names, plain, strict=True)}

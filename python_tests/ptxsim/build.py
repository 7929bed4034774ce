"""Compiles launcher files to PTX, which the simulator executes, and to a host library on the fake runtime.

Results are cached by the contents of everything that went in."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from .errors import SimError

ROOT = Path(__file__).resolve().parents[2]
INCLUDE = ROOT / "csrc"
FAKE_RUNTIME = Path(__file__).parent / "fake_cudart.cpp"


@cache
def nvcc_path() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))


def have_nvcc() -> bool:
    return nvcc_path() is not None


@cache
def _nvcc_version() -> str:
    return _run([nvcc_path(), "--version"]).stdout


def cache_folder() -> Path:
    default = Path(tempfile.gettempdir()) / f"ltood-ptxsim-{os.getuid()}"
    folder = Path(os.environ.get("LTOOD_PTXSIM_CACHE", default))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _run(command: list[str]) -> subprocess.CompletedProcess:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SimError(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    return result


def _digest(sources: list[Path], flags: list[str]) -> str:
    """Covers the sources, every header under csrc and beside the sources, the fake runtime, flags and nvcc."""
    hasher = hashlib.sha256()
    folders = {INCLUDE, *(source.parent for source in sources)}
    headers = {file for folder in folders for suffix in ("*.h", "*.cuh") for file in folder.rglob(suffix)}
    for file in [*sources, FAKE_RUNTIME, Path(__file__), *sorted(headers)]:
        hasher.update(f"{file}\0".encode() + file.read_bytes())
    hasher.update("\0".join([*flags, _nvcc_version()]).encode())
    return hasher.hexdigest()[:24]


def compile_library(sources: list[Path], arch: str, defines: dict[str, str]) -> tuple[list[str], Path]:
    """(PTX text of each source, host library)."""
    if not have_nvcc():
        raise SimError("nvcc is needed to compile the kernels to PTX")
    flags = ["-std=c++17", "-lineinfo", f"-I{INCLUDE}", *(f"-D{name}={value}" for name, value in defines.items())]
    folder = cache_folder() / _digest(sources, [*flags, arch])
    if not (folder / "done").exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as work:
            _compile(sources, arch, flags, Path(work))
            (Path(work) / "done").touch()
            # Another process may have been faster; its result is the same.
            shutil.copytree(work, folder, dirs_exist_ok=True)
    return [(folder / f"{index}.ptx").read_text() for index in range(len(sources))], folder / "host.so"


def _compile(sources, arch, flags, work: Path):
    generate = ["-gencode", f"arch=compute_{arch},code=compute_{arch}"]
    objects = []
    for index, source in enumerate(sources):
        # One compilation gives both: the object embeds the PTX, which --keep leaves behind as a file.
        kept = work / f"kept{index}"
        kept.mkdir()
        objects.append(str(work / f"{index}.o"))
        keep = ["--keep", "--keep-dir", str(kept)]
        _run(
            [nvcc_path(), *flags, *generate, *keep, "-O1", "-Xcompiler", "-fPIC", "-c", str(source), "-o", objects[-1]]
        )
        (ptx,) = kept.glob("*.ptx")
        shutil.move(ptx, work / f"{index}.ptx")
        shutil.rmtree(kept)
    runtime = str(work / "runtime.o")
    _run([nvcc_path(), "-std=c++17", "-O1", "-Xcompiler", "-fPIC", "-c", str(FAKE_RUNTIME), "-o", runtime])
    # --no-undefined: a runtime function that the fake lacks is an error here, by name.
    host = ["-shared", "-Wl,--no-undefined", "-Wl,-Bsymbolic", *objects, runtime, "-o", str(work / "host.so")]
    _run(["g++", *host])


def load_private(path: Path) -> ctypes.CDLL:
    """Loads a copy of its own of a library, so that its state is not shared with another Library of the same file."""
    with tempfile.NamedTemporaryFile(suffix=".so") as copy:
        copy.write(path.read_bytes())
        copy.flush()
        return ctypes.CDLL(copy.name)

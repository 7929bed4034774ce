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
    return run_compiler([nvcc_path(), "--version"]).stdout


def cache_folder() -> Path:
    default = Path(tempfile.gettempdir()) / f"ltood-ptxsim-{os.getuid()}"
    folder = Path(os.environ.get("LTOOD_PTXSIM_CACHE", default))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_compiler(command: list[str]) -> subprocess.CompletedProcess:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SimError(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    return result


def digest(source: Path, flags: list[str]) -> str:
    """Covers the source, every header under csrc and beside the source, this package's compilation, flags and nvcc."""
    hasher = hashlib.sha256()
    headers = {
        file for folder in (INCLUDE, source.parent) for suffix in ("*.h", "*.cuh") for file in folder.rglob(suffix)
    }
    for file in [source, Path(__file__), *sorted(headers)]:
        hasher.update(f"{file}\0".encode() + file.read_bytes())
    hasher.update("\0".join([*flags, _nvcc_version()]).encode())
    return hasher.hexdigest()[:24]


def cached(name: str, make) -> Path:
    """The file of that name in the cache, made by make(path) if it is not there."""
    target = cache_folder() / name
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as work:
            part = Path(work) / name
            make(part)
            part.rename(target)  # another process may have been faster; its result is the same
    return target


def compile_launchers(source: Path, arch: str, defines: dict[str, str]) -> tuple[Path, Path]:
    """(PTX, host object) of one .cu file."""
    flags = ["-std=c++17", "-lineinfo", f"-I{INCLUDE}", *(f"-D{name}={value}" for name, value in defines.items())]
    stem = digest(source, [*flags, arch])

    def make(target: Path):
        # One compilation gives both: the object embeds the PTX, which --keep leaves behind as a file.
        keep = ["--keep", "--keep-dir", str(target.parent)]
        generate = ["-gencode", f"arch=compute_{arch},code=compute_{arch}"]
        host = ["-O1", "-Xcompiler", "-fPIC", "-c", str(source), "-o", str(target)]
        run_compiler([nvcc_path(), *flags, *generate, *keep, *host])
        (ptx,) = target.parent.glob("*.ptx")
        ptx.rename(cache_folder() / f"{stem}.ptx")

    compiled = cached(f"{stem}.o", make)
    return compiled.with_suffix(".ptx"), compiled


def fake_runtime() -> Path:
    flags = ["-std=c++17", "-O1", "-Xcompiler", "-fPIC", "-c", str(FAKE_RUNTIME)]
    name = f"{digest(FAKE_RUNTIME, flags)}.o"
    return cached(name, lambda target: run_compiler([nvcc_path(), *flags, "-o", str(target)]))


def compile_library(sources: list[Path], arch: str, defines: dict[str, str]) -> tuple[list[str], Path]:
    """(PTX text of each source, host library)."""
    if not have_nvcc():
        raise SimError("nvcc is needed to compile the kernels to PTX")
    compiled = [compile_launchers(source, arch, defines) for source in sources]
    objects = [str(file) for _, file in compiled] + [str(fake_runtime())]
    name = hashlib.sha256("\0".join(objects).encode()).hexdigest()[:24] + ".so"
    # --no-undefined: a runtime function that the fake lacks is an error here, by name.
    link = ["g++", "-shared", "-Wl,--no-undefined", "-Wl,-Bsymbolic", *objects]
    host = cached(name, lambda target: run_compiler([*link, "-o", str(target)]))
    return [ptx.read_text() for ptx, _ in compiled], host


def load_private(path: Path) -> ctypes.CDLL:
    """Loads a copy of its own of a library, so that its state is not shared with another Library of the same file."""
    with tempfile.NamedTemporaryFile(suffix=".so") as copy:
        copy.write(path.read_bytes())
        copy.flush()
        return ctypes.CDLL(copy.name)

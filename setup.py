"""Builds ltood_fast._C: torch glue through torch's cpp_extension, torch-free CUDA sources straight through nvcc.

LTOOD_CUDA=0|1|auto     leave the CUDA kernels out | insist on them | build them when torch and nvcc allow it (default)
TORCH_CUDA_ARCH_LIST    architectures, as torch spells them (default "8.0+PTX 9.0a")
LTOOD_CPU_ISA           the best instruction set that loops are compiled for: avx512 (default), avx2 or baseline; each
                        processor runs the best of these that it has
LTOOD_SANITIZE=1        address and undefined-behaviour sanitizers, for the tests
MAX_JOBS                parallel compilations (default: the number of cores)
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools

if sys.platform == "win32":
    raise SystemExit("ltood_fast does not run on Windows: install it in WSL2, the Windows Subsystem for Linux")
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"ltood_fast: setuptools must be 77 or later, got {setuptools.__version__}: pip install 'setuptools>=77'"
    )

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(
        f"ltood_fast builds against the torch it will run on, and this build cannot import torch ({error}). If torch "
        "is installed, pip's build isolation hides it: use `pip install --no-build-isolation .` (uv: `uv pip install "
        "--no-build-isolation .`). Otherwise install torch first."
    ) from error

ROOT = Path(__file__).resolve().parent
VERSION = "0.1.0"
# Code for 8.0 runs on 8.6 and 8.9 as it is; devices after 9.0 compile its PTX, as 9.0a has none that goes forward.
DEFAULT_ARCHS = "8.0+PTX 9.0a"
CPU_ISAS = ("baseline", "avx2", "avx512")  # by their number in csrc/common/simd.h


def read_sources() -> dict[str, list[str]]:
    """csrc/sources.txt as {kind: [path]}."""
    sources: dict[str, list[str]] = {}
    for line in (ROOT / "csrc/sources.txt").read_text().splitlines():
        if fields := line.split("#")[0].split():
            sources.setdefault(fields[0], []).append(fields[1])
    return sources


def find_cuda_home() -> Path | None:
    """The CUDA toolkit: CUDA_HOME, the package cuda-toolkit[nvcc,cccl,cudart], /usr/local/cuda, or nvcc on PATH."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    try:
        import nvidia.cu13

        candidates += list(nvidia.cu13.__path__)
    except ImportError:
        pass
    candidates.append("/usr/local/cuda")
    if on_path := shutil.which("nvcc"):
        candidates.append(os.path.dirname(os.path.dirname(os.path.realpath(on_path))))
    return next((Path(c) for c in candidates if c and (Path(c) / "bin/nvcc").exists()), None)


def decide_cuda() -> tuple[Path | None, str]:
    """(toolkit or None, the reason in one line). A CPU-only torch takes part only when LTOOD_CUDA=1 asks for it."""
    mode = os.environ.get("LTOOD_CUDA", "auto")
    if mode not in ("0", "1", "auto"):
        raise SystemExit(f"LTOOD_CUDA must be 0, 1 or auto, got {mode!r}")
    if mode == "0":
        return None, "left out: LTOOD_CUDA=0"
    if mode == "auto" and torch.version.cuda is None:
        return None, "left out: this torch is a CPU-only build (LTOOD_CUDA=1 builds them all the same)"
    home = find_cuda_home()
    if home is None:
        if mode == "1":
            raise SystemExit("LTOOD_CUDA=1 but no nvcc was found: set CUDA_HOME to a CUDA toolkit")
        return None, "left out: no nvcc was found (set CUDA_HOME to a CUDA toolkit)"
    return home, f"built with {home}/bin/nvcc"


def gencode_flags(arch_list: str) -> list[str]:
    """nvcc flags for an architecture list in torch's spelling: "8.0;9.0a+PTX" -> one -gencode each, and one for PTX."""
    flags = []
    for arch in re.split(r"[;\s]+", arch_list.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", arch)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST must list versions such as '8.0;9.0a+PTX', got {arch!r}")
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def parallel_jobs() -> int:
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not jobs.isdecimal() or int(jobs) < 1:
        raise SystemExit(f"MAX_JOBS must be a positive number of compilations, got {jobs!r}")
    return int(jobs)


def cpu_isa() -> int:
    name = os.environ.get("LTOOD_CPU_ISA") or "avx512"
    if name not in CPU_ISAS:
        raise SystemExit(f"LTOOD_CPU_ISA must be avx512, avx2 or baseline, got {name!r}")
    return CPU_ISAS.index(name)


def openmp_flags() -> tuple[list[str], list[str]]:
    """(the compiler's, the linker's). Apple's Clang has no OpenMP of its own: torch brings the library, Homebrew's
    package libomp the header. Not tried on a Mac."""
    if sys.platform != "darwin":
        return ["-fopenmp"], ["-fopenmp"]
    headers = os.environ.get("LIBOMP_INCLUDE", "/opt/homebrew/opt/libomp/include")
    return ["-Xpreprocessor", "-fopenmp", f"-I{headers}"], [str(Path(torch.__file__).parent / "lib/libomp.dylib")]


TORCH_VERSION = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
SOURCES = read_sources()
CPU_ISA = cpu_isa()
CUDA_HOME, CUDA_REASON = decide_cuda()
ARCH_LIST = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
JOBS = parallel_jobs()
SANITIZE = os.environ.get("LTOOD_SANITIZE") == "1"
print(f"ltood_fast: CUDA kernels {CUDA_REASON}", flush=True)


class BuildExtensionWithNvcc(BuildExtension):
    """Compiles the torch-free .cu files with nvcc directly (1-2 s a file); torch's builder links the objects."""

    def build_extensions(self):
        if CUDA_HOME:
            Path(self.build_temp).mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(JOBS) as pool:
                self.extensions[0].extra_objects += list(pool.map(self._compile_cuda, SOURCES.get("cuda", [])))
        super().build_extensions()

    def _compile_cuda(self, source: str) -> str:
        target = Path(self.build_temp) / (source.replace("/", "_") + ".o")
        flags = ["-O3", "-std=c++17", "-lineinfo", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC", f"-I{ROOT / 'csrc'}"]
        if "9.0a" in ARCH_LIST:
            flags.append("-DLTOOD_SM90A=1")
        command = [CUDA_HOME / "bin/nvcc", *flags, *gencode_flags(ARCH_LIST), "-c", ROOT / source, "-o", target]
        print(" ".join(map(str, command)), flush=True)
        if subprocess.run(list(map(str, command))).returncode:
            raise SystemExit(
                f"ltood_fast: nvcc could not compile {source} (its message is above): check TORCH_CUDA_ARCH_LIST "
                f"({ARCH_LIST!r}) against this nvcc, or leave the CUDA kernels out with LTOOD_CUDA=0"
            )
        return str(target)


def extension() -> CppExtension:
    compile_args, link_args = openmp_flags()
    compile_args += ["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
    compile_args += ["-std=c++20" if TORCH_VERSION >= (2, 12) else "-std=c++17"]
    if SANITIZE:
        sanitizers = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"]
        compile_args, link_args = compile_args + sanitizers, link_args + sanitizers
    elif sys.platform != "darwin":
        link_args.append("-Wl,-s")
    macros = [("LTOOD_TORCH_VERSION", f'"{torch.__version__}"'), ("LTOOD_CUDA_REASON", f'"{CUDA_REASON}"')]
    macros.append(("LTOOD_CPU_ISA", str(CPU_ISA)))
    sources, libraries, library_dirs = SOURCES.get("cpu", []) + SOURCES["torch"], [], []
    if CUDA_HOME:
        sources += SOURCES.get("torch_cuda", [])
        macros += [("LTOOD_WITH_CUDA", "1"), ("LTOOD_CUDA_ARCHS", f'"{ARCH_LIST}"')]
        libraries = ["cudart_static", "rt", "dl", "pthread"]
        library_dirs = [str(d) for d in (CUDA_HOME / "lib64", CUDA_HOME / "lib") if d.is_dir()]
    return CppExtension(
        "ltood_fast._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        define_macros=macros,
        libraries=libraries,
        library_dirs=library_dirs,
        extra_compile_args={"cxx": compile_args},
        extra_link_args=link_args,
    )


def binding() -> dict[str, object]:
    """A wheel names the torch release that it was built for in its version and needs that release; sources take any."""
    if "sdist" in sys.argv:
        return {"version": VERSION, "install_requires": ["torch>=2.11", "numpy"]}
    release = "{}.{}".format(*TORCH_VERSION)
    kernels = ".cuda" if CUDA_HOME else ".cpu"
    return {"version": f"{VERSION}+torch{release}{kernels}", "install_requires": [f"torch=={release}.*", "numpy"]}


# The command is a package of its own, next to ltood_fast, because importing a part of ltood_fast imports torch.
PACKAGES = [*setuptools.find_packages(include=["ltood_fast*"], exclude=["ltood_fast.command"]), "ltood_command"]

setuptools.setup(
    **binding(),
    packages=PACKAGES,
    package_dir={"ltood_command": "ltood_fast/command"},
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtensionWithNvcc},
)

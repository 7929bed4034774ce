"""What ptxas makes of the kernels: nothing may spill, and nothing may be indexed in local memory."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from ptxsim.build import ROOT, compile_launchers, nvcc_path, run_compiler

SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cu"))
HOPPER = [source for source in SOURCES if "/sm90/" in source]


def assemble(ptx: str, arch: str, output: str) -> str:
    """ptxas's report."""
    command = [nvcc_path(), "-cubin", "-Xptxas", "-v", f"-arch={arch}", ptx, "-o", output]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def local_bytes(report: str) -> dict[str, int]:
    """Kernel -> bytes of stack and spills."""
    found = {}
    for entry in re.split(r"Compiling entry function '", report)[1:]:
        local = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        found[entry.split("'")[0]] = sum(map(int, local.groups()))
    return found


def disassembler() -> str | None:
    """cuobjdump of the toolkit, or the one that Triton carries."""
    folders = [os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    try:
        import triton

        folders.append(str(Path(triton.__file__).parent / "backends/nvidia/bin"))
    except ImportError:
        pass
    return shutil.which("cuobjdump") or next(filter(None, (shutil.which("cuobjdump", path=f) for f in folders)), None)


@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("source", [source for source in SOURCES if source not in HOPPER])
def test_no_kernel_spills(source, arch):
    defines = {"LTOOD_SM90A": "1"} if arch == "90a" else {}
    ptx = str(compile_launchers(ROOT / source, arch, defines)[0])
    kernels = local_bytes(assemble(ptx, f"sm_{arch}", "/dev/null"))
    assert kernels
    assert not {name: local for name, local in kernels.items() if local}


def test_the_autotuners_program_compiles(tmp_path):
    flags = ["-std=c++17", "-DLTOOD_SM90A=1", f"-I{ROOT / 'csrc'}", "-gencode=arch=compute_90a,code=sm_90a"]
    run_compiler([nvcc_path(), *flags, "-c", str(ROOT / "benchmarks/autotune.cu"), "-o", str(tmp_path / "autotune.o")])


@pytest.mark.parametrize("source", HOPPER)
def test_hopper_kernels_use_wgmma_as_it_is_meant(source, tmp_path):
    """No spills, no warning that wgmma was serialised or setmaxnreg ignored, and HGMMA in every kernel's code."""
    cubin = str(tmp_path / "kernels.cubin")
    report = assemble(str(compile_launchers(ROOT / source, "90a", {"LTOOD_SM90A": "1"})[0]), "sm_90a", cubin)
    assert "warning" not in report.lower(), report
    kernels = {name: local for name, local in local_bytes(report).items() if "_sm90_" in name}
    assert kernels
    assert not any(kernels.values()), kernels
    tool = disassembler()
    if tool is None:
        pytest.skip("cuobjdump is needed to look at the machine code")
    environment = {**os.environ, "PATH": f"{Path(tool).parent}{os.pathsep}{os.environ['PATH']}"}  # it calls nvdisasm
    sass = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True, env=environment).stdout
    functions = re.split(r"Function : ", sass)[1:]
    with_wgmma = {function.split()[0] for function in functions if "HGMMA" in function}
    assert kernels.keys() <= with_wgmma

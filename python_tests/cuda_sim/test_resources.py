"""The kernels as ptxas compiles them: registers, local memory, wgmma in flight, and its order in the machine code."""

import subprocess
from functools import cache
from pathlib import Path

import pytest
from ptxsim.build import ROOT, compile_launchers, nvcc_path, run_compiler

from benchmarks.static_cost import report, sass, toolchain, wgmma_order

HOPPER = [launcher for launcher in toolchain.LAUNCHERS if "/sm90/" in launcher]
MOST_REGISTERS = 239
# Kernels of the sm_80 code that take more, and why they may: as many blocks fit at 255 registers as at 239.
MORE_REGISTERS = {
    "contrastive_lse_bwd_kernel": "128 threads: two blocks",
    "contrastive_tiles_kernel": "256 threads: one block where it searches neighbours",
    "guided_forward_kernel": "128 threads: two blocks",
    "guided_backward_kernel": "256 threads: one block",
    "pass_kernel": "128 threads: two blocks",
}
RECORDED = report.read()


@cache
def assembled(launcher: str, arch: str) -> tuple[str, str]:
    """ptxas's report and the machine code's listing, from the PTX that the simulator executes."""
    defines = {"LTOOD_SM90A": "1"} if arch == "90a" else {}
    ptx, _ = compile_launchers(ROOT / launcher, arch, defines)
    cubin = Path(ptx).with_suffix(".cubin")
    command = [nvcc_path(), "-cubin", "-Xptxas", "-v", f"-arch=sm_{arch}", str(ptx), "-o", str(cubin)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    listing = toolchain.disassemble(cubin) if toolchain.nvdisasm() else ""
    cubin.unlink()
    return said, listing


@cache
def kernels(launcher: str, arch: str) -> dict:
    said, listing = assembled(launcher, arch)
    if not listing:
        pytest.skip("nvdisasm is needed to look at the machine code: pip install nvidia-cuda-nvdisasm")
    return report.describe(said, listing)


@pytest.mark.parametrize(
    ("launcher", "arch"),
    [(file, arch) for file in toolchain.LAUNCHERS for arch in ("80", "90a") if arch == "90a" or file not in HOPPER],
)
def test_no_kernel_spills(launcher, arch):
    """No stack, no spill, no message that wgmma or setmaxnreg is not used as written; registers within the limit."""
    said, _ = assembled(launcher, arch)
    assert "warning" not in said.lower(), said
    assert not toolchain.faults(said)
    found = toolchain.resources(said)
    names = toolchain.demangle(list(found))
    assert found
    for mangled, used in found.items():
        assert used.local_bytes == 0, names[mangled]
        if names[mangled].split("<")[0] not in MORE_REGISTERS:
            assert used.registers <= MOST_REGISTERS, names[mangled]


def test_the_autotuners_program_compiles(tmp_path):
    flags = ["-std=c++17", "-DLTOOD_SM90A=1", f"-I{ROOT / 'csrc'}", "-gencode=arch=compute_90a,code=sm_90a"]
    run_compiler([nvcc_path(), *flags, "-c", str(ROOT / "benchmarks/autotune.cu"), "-o", str(tmp_path / "autotune.o")])


@pytest.mark.parametrize("launcher", HOPPER)
def test_hopper_kernels_keep_products_in_flight(launcher):
    """Three products or more for every wait of a k-step: serialised code has one."""
    found = {name: kernel for name, kernel in kernels(launcher, "90a").items() if "_sm90_" in name}
    assert found
    for name, kernel in found.items():
        assert kernel["k_steps"][0]["tensor"] >= 3 * kernel["waits"], name


@pytest.mark.parametrize("launcher", HOPPER)
def test_registers_of_unfinished_wgmma_stay_untouched(launcher):
    _, listing = assembled(launcher, "90a")
    if not listing:
        pytest.skip("nvdisasm is needed to look at the machine code: pip install nvidia-cuda-nvdisasm")
    functions = [f for f in sass.parse(listing) if any(x.name == "HGMMA" for x in f.instructions)]
    assert functions
    for function in functions:
        assert not wgmma_order.faults(function), function.name


def loops(kernel: dict) -> list[int]:
    """Instructions of a kernel's hot loops, or of all of it."""
    found = [*kernel.get("k_steps", ()), *([kernel["tile"]] if "tile" in kernel else [])]
    return [sum(loop.values()) for loop in found] or [kernel["instructions"]]


@pytest.mark.parametrize("launcher", sorted({key.split()[0] for key in RECORDED["kernels"]}))
def test_counts_are_those_recorded(launcher):
    """Within 5 % on the compiler that made benchmarks/results/static_cost.json: python -m benchmarks static-cost."""
    if toolchain.nvcc_version() != RECORDED["nvcc"]:
        pytest.skip(f"the counts were recorded with nvcc {RECORDED['nvcc']}")
    for arch in ("80", "90a"):
        recorded = RECORDED["kernels"].get(f"{launcher} sm_{arch}")
        if recorded is None:
            continue
        now = kernels(launcher, arch)
        assert now.keys() == recorded.keys()
        for name, kernel in recorded.items():
            for before, after in zip(loops(kernel), loops(now[name]), strict=True):
                assert after == pytest.approx(before, rel=0.05, abs=3), name

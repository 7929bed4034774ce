"""What ptxas makes of the kernels: nothing may spill, and nothing may be indexed in local memory."""

import re
import subprocess

import pytest
from ptxsim.build import ROOT, compile_launchers, nvcc_path

LAUNCHERS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/ops/*/*_launch.cu"))


def resources(ptx: str, arch: str) -> dict[str, tuple[int, int]]:
    """Kernel -> (bytes of stack and spills, registers)."""
    command = [nvcc_path(), "-cubin", "-Xptxas", "-v", f"-arch={arch}", ptx, "-o", "/dev/null"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    entries = re.split(r"Compiling entry function '", report)[1:]
    found = {}
    for entry in entries:
        local = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        found[entry.split("'")[0]] = sum(map(int, local.groups())), int(re.search(r"Used (\d+) registers", entry)[1])
    return found


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_no_kernel_spills(launcher, arch):
    kernels = resources(str(compile_launchers(ROOT / launcher, "80", {})[0]), arch)
    assert kernels
    assert not {name: local for name, (local, _) in kernels.items() if local}

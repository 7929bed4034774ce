"""Time and peak memory of one call, for pytest-benchmark; and the machine that they were taken on.

Time comes from pytest-benchmark (pedantic: fixed rounds, one warm-up). Memory is the growth of the process's resident
set during one extra call: the kernel's high-water mark is reset before it, and malloc gives its free pages back first,
so that a buffer kept by an earlier call does not hide the cost of this one. Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch


def _status_mib(field: str) -> float:
    """A field of /proc/self/status, in MiB: VmRSS (resident now) or VmHWM (resident at most since the last reset)."""
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1]) / 1024


def peak_mib(call: Callable[[], object]) -> float:
    """Peak growth of the resident set during `call`, in MiB. Its result counts as its cost."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_mib("VmRSS")
    call()
    return _status_mib("VmHWM") - before


def machine() -> dict[str, object]:
    """What a row of results must say about where it was measured."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def forward(function: Callable, inputs: dict) -> Callable[[], object]:
    """The call without a graph."""

    def call():
        with torch.no_grad():
            return function(**inputs)

    return call


def forward_backward(function: Callable, inputs: dict) -> Callable[[], object]:
    """The call and the gradient of its first result with respect to every input that requires one."""
    leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]

    def call():
        result = function(**inputs)
        loss = result[0] if isinstance(result, tuple) else result
        return torch.autograd.grad(loss, leaves)

    return call


@cache
def rates() -> dict[str, float]:
    """What this machine reaches, measured once: float32 products, bytes copied (read and written), exponentials."""

    def best(call: Callable[[], object]) -> float:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    a, out = torch.randn(2, 2048, 2048)
    source, target = torch.randn(2, 1 << 26)
    return {
        "sgemm_gflop_per_s": 2e-9 * 2048**3 / best(lambda: torch.mm(a, a, out=out)),
        "copy_gb_per_s": 8e-9 * source.numel() / best(lambda: target.copy_(source)),
        "gexp_per_s": 1e-9 * a.numel() / best(lambda: torch.exp(a, out=out)),
    }


DIRECTIONS = {"forward": forward, "forward+backward": forward_backward}


def measure(benchmark, call: Callable[[], object], rounds: int, **labels: object) -> None:
    """Times `call` under pytest-benchmark and stores labels and peak memory beside the time."""
    call()  # compilation, page faults and thread pools are not the op's cost
    benchmark.extra_info.update(labels, peak_mib=round(peak_mib(call), 1), **machine(), **rates())
    benchmark.pedantic(call, rounds=rounds, iterations=1, warmup_rounds=0)

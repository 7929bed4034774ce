"""How much memory a call takes on the CPU, from Linux's own counters."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path


def status_mib(field: str) -> float:
    """A field of /proc/self/status in MiB, e.g. VmRSS (resident now) or VmHWM (resident at most since the reset)."""
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1]) / 1024


def peak_mib_cpu(call: Callable[[], object]) -> float:
    """Peak growth of the process's resident set during the call, its result included. Linux only: the kernel's
    high-water mark is reset first, and malloc gives its free pages back, so that a buffer kept by an earlier call does
    not hide the cost of this one."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_mib("VmRSS")
    call()
    return max(0.0, status_mib("VmHWM") - before)

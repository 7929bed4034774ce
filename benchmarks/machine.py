"""What a result must say about where it comes from, and the rates that its floors are computed from."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .timing import measure

ROOT = Path(__file__).resolve().parent.parent
# A product's rate depends on its shape: the best of these is the limit. The last is a tile of a similarity matrix.
CPU_PRODUCTS = ((2048, 2048, 2048), (512, 512, 512), (1024, 128, 1024))
CUDA_PRODUCTS = ((8192, 8192, 8192), (16384, 128, 16384))


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpu_name() -> str:
    match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return match[1] if match else platform.processor()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else _cpu_name()


def machine(device: str, threads: int) -> dict[str, object]:
    """The device, its driver and what runs on it."""
    described = {
        "device": device_name(device),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device == "cuda":
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
        described |= {"driver": driver, "cuda": torch.version.cuda}
    return described


def provenance() -> dict[str, object]:
    """The commit that is measured and the date."""
    return {
        "commit": _output("git", "rev-parse", "HEAD") or "unknown",
        "changed": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%d"),
    }


def rates(device: str, seconds: float = 0.3) -> dict[str, float]:
    """What the device reaches: multiply-adds × 2 a second, in float32 and bfloat16 on a CPU, bfloat16 on a GPU, at the
    best of several shapes; bytes copied a second, read and written; exponentials a second."""
    cuda = device == "cuda"

    def best_seconds(call: Callable[[], object]) -> float:
        return 1e-3 * measure([call], device, seconds).min_ms

    def product(m: int, k: int, n: int, dtype: torch.dtype = torch.bfloat16) -> float:
        a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
        out = torch.empty(m, n, device=device, dtype=dtype)
        return 2 * m * k * n / best_seconds(lambda: torch.mm(a, b, out=out))

    source, target = torch.randn(2, (1 << 28) if cuda else (1 << 25), device=device)
    x = torch.randn(1 << 26 if cuda else 1 << 18, device=device)
    out = torch.empty_like(x)
    if cuda:
        products = {"product_flop_per_s": max(product(*shape) for shape in CUDA_PRODUCTS)}
    else:
        products = {
            "product_flop_per_s": max(product(*shape, torch.float32) for shape in CPU_PRODUCTS),
            "product_bfloat16_flop_per_s": max(product(*shape) for shape in CPU_PRODUCTS),
        }
    return {
        **products,
        "copy_bytes_per_s": 2 * source.nbytes / best_seconds(lambda: target.copy_(source)),
        "exp_per_s": x.numel() / best_seconds(lambda: torch.exp(x, out=out)),
    }

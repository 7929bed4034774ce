"""Clocks and memory: how one call is timed on a CPU and on a GPU.

CPU: calibrated as pytest-benchmark does, so many calls a round that the clock costs nothing and rounds until a time is
spent, with the threads fixed. GPU: events around single calls, warmed up, with the L2 cache overwritten before each.
Both take their inputs in turn from several sets: none finds in a cache what it just wrote.
"""

from __future__ import annotations

import gc
import math
import re
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

import torch

from ltood_fast._memory import peak_mib_cpu, status_mib

ROUND_S = 1e-3  # of a round at least: a clock reading and a loop of Python are a thousandth of it
MOST_ROUNDS = 200
L2_BYTES = 256 << 20  # several times the largest L2 of any GPU


@dataclass(frozen=True)
class Times:
    median_ms: float
    p10_ms: float
    p90_ms: float
    min_ms: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        ms = 1e3 * torch.tensor(seconds, dtype=torch.float64)
        p10, median, p90 = ms.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
        return cls(median, p10, p90, ms.min().item(), len(ms))

    def columns(self) -> dict[str, float]:
        return asdict(self)


def time_cpu(calls: Sequence[Callable[[], object]], seconds: float) -> Times:
    """Quantiles over rounds of the time of one call, the calls taken in turn.

    A round has as many calls as last ROUND_S, and there are as many rounds as fit into `seconds`, but at least five;
    three of a call that takes longer than `seconds`, one of a call that takes five times as long.
    """
    turn = cycle(calls)

    def one_round(loops: int) -> float:
        start = time.perf_counter()
        for _ in range(loops):
            next(turn)()
        return (time.perf_counter() - start) / loops

    once = one_round(1)
    if once > seconds:
        return Times.of([once] + [one_round(1) for _ in range(2 if once < 5 * seconds else 0)])
    if once < ROUND_S:  # the first may have been slow
        once = min(once, one_round(4))
    loops = math.ceil(ROUND_S / once)
    rounds = min(MOST_ROUNDS, max(5, int(seconds / (loops * once))))
    return Times.of([one_round(loops) for _ in range(rounds)])


def time_once(call: Callable[[], object]) -> Times:
    """A single call on a CPU, for what takes seconds."""
    start = time.perf_counter()
    call()
    return Times.of([time.perf_counter() - start])


def time_cuda(calls: Sequence[Callable[[], object]], seconds: float) -> Times:
    """Quantiles of single calls, by events, with a cold L2 and the calls taken in turn."""
    scratch = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")

    def once(call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        scratch.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)

    warm = max(once(call) for _ in range(3) for call in calls)
    turn = cycle(calls)
    rounds = min(MOST_ROUNDS, max(10, int(seconds / max(warm, 1e-5))))
    return Times.of([once(next(turn)) for _ in range(rounds)])


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """The call captured in a CUDA graph: a replay, without the host's part."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_mib_cuda(call: Callable[[], object]) -> float:
    """Peak growth of what torch's allocator has given out during the call, its result included."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def peak_mib(call: Callable[[], object], device: str) -> float:
    return (peak_mib_cuda if device == "cuda" else peak_mib_cpu)(call)


def measure(calls: Sequence[Callable[[], object]], device: str, seconds: float) -> Times:
    return (time_cuda if device == "cuda" else time_cpu)(calls, seconds)


@contextmanager
def memory_limit(mib: float):
    """An allocation beyond what the process holds now and `mib` fails with an error instead of waking the kernel's
    killer: what an implementation needs too much of becomes its message. CPU only."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int((status_mib("VmData") + mib) * 2**20), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def available_mib() -> float:
    """What the machine can still give, in MiB."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(match[1]) / 1024

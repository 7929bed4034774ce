"""What the kernels buy in training: the share of a step spent in the loss, and the largest batch whose loss fits.

A network's step is timed per batch: forward, backward from a random gradient at the embeddings, optimizer. The loss is
timed by the harness on as many embeddings and checked like any other row; share = loss / (network + loss). Images are
random. On a CPU, where a step takes seconds, it is timed once.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from ltood_fast.train.config import ModelConfig
from ltood_fast.train.model import make_model

from . import harness, timing
from .cases import Case
from .implementations import IMPLEMENTATIONS

OP = "stage1_loss"
LOSSES = ("eager", "plain", "compile-plain", "ours")
LARGEST = ("eager", "plain", "ours")


@dataclass(frozen=True)
class Setup:
    network: str
    stem: str
    pixels: int
    embeddings: tuple[int, ...]
    """N, two views an image: a batch of N/2 images."""

    @property
    def name(self) -> str:
        return f"{self.network} {self.pixels}x{self.pixels}"


SETUPS = {
    ("cpu", True): [Setup("small_resnet", "cifar", 32, (512,))],
    ("cpu", False): [
        Setup("small_resnet", "cifar", 32, (1024, 2048, 4096)),
        Setup("resnet18", "cifar", 32, (256, 512, 1024)),
    ],
    ("cuda", True): [Setup("resnet18", "cifar", 32, (1024, 4096))],
    ("cuda", False): [
        Setup("resnet18", "cifar", 32, (1024, 2048, 4096, 8192, 16384, 32768, 65536)),
        Setup("resnet50", "imagenet", 224, (512, 1024, 2048)),
    ],
}
# The memory that a loss may take beside a network, and the sizes tried: (GiB, first N, last N).
ROOM = {
    ("cpu", True): (0.5, 2048, 8192),
    ("cpu", False): (8.0, 8192, 65536),
    ("cuda", True): (8.0, 8192, 65536),
    ("cuda", False): (16.0, 16384, 262_144),
}


def network_step(setup: Setup, n: int, device: str) -> Callable[[], None]:
    """One step without the loss, on N images; bfloat16 autocast and channels-last on a GPU, float32 on a CPU."""
    cuda = device == "cuda"
    torch.manual_seed(harness.SEED)
    config = ModelConfig(encoder=setup.network, stem=setup.stem, channels_last=cuda)
    model = make_model(config, channels=3).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images = torch.randn(n, 3, setup.pixels, setup.pixels, device=device)
    gradient = torch.randn(n, config.out, device=device) / n

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():
            z = model(images)
        z.backward(gradient.to(z.dtype))
        optimizer.step()

    return step


def _network_row(setup: Setup, n: int, options: harness.Options, device: str) -> dict:
    row = {"network": setup.name, "N": n}
    try:
        network_step(setup, 16, device)()  # thread pools, cuDNN
        step = network_step(setup, n, device)
        if device == "cuda":
            return {
                **row,
                "network_mib": timing.peak_mib(step, device),
                "network_ms": timing.time_cuda([step], options.seconds).median_ms,
            }
        spent: list[timing.Times] = []
        peak = timing.peak_mib(lambda: spent.append(timing.time_once(step)), device)
        return {**row, "network_mib": peak, "network_ms": spent[0].median_ms}
    except (RuntimeError, ImportError) as failure:  # out of memory, no torchvision
        return {**row, "status": harness.FAILED, "message": harness.message_of(failure)}
    finally:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def _steps(setup: Setup, n: int, options: harness.Options, device: str, rates: dict) -> list[dict]:
    network = _network_row(setup, n, options, device)
    if "message" in network:
        return [network]
    case = Case(OP, n, dtype="bfloat16" if device == "cuda" else "float32", device=device)
    registry = {name: IMPLEMENTATIONS[name] for name in LOSSES}
    steps = []
    for row in harness.run_case(case, options, rates, registry):
        step = {**network, **{name: row[name] for name in ("op", "implementation", "kind", "status")}}
        if row["status"] == harness.OK:
            loss = row["median_ms"]
            step |= {"loss_ms": loss, "loss_mib": row["peak_mib"], "share": loss / (loss + network["network_ms"])}
        else:
            step["message"] = row["message"]
        steps.append(step)
    return steps


def largest_batch(name: str, device: str, room: tuple[float, int, int]) -> dict:
    """The largest N, by doubling, whose nt_xent forward and backward stay within the room."""
    gib, n, last = room
    row = {"op": "nt_xent", "implementation": name, "limit_gib": gib, "N": 0, "peak_mib": 0.0}
    function = IMPLEMENTATIONS[name].loaders["nt_xent"]()
    while n <= last:
        case = Case("nt_xent", n, device=device)
        inputs = harness.make_inputs(case, harness.SEED)
        try:
            with timing.memory_limit(1024 * gib) if device == "cpu" else nullcontext():
                peak = timing.peak_mib(lambda: harness.call(function, inputs, case.direction), device)  # noqa: B023
        except RuntimeError:
            peak = float("inf")
        if peak > 1024 * gib:
            return {**row, "beyond": f"N = {n:,} does not"}
        row |= {"N": n, "peak_mib": peak}
        n *= 2
    return {**row, "beyond": "more was not tried"}


def run(device: str, quick: bool, options: harness.Options, rates: dict) -> dict:
    """Shares of a step and largest batches of one device."""
    steps = [
        step
        for setup in SETUPS[device, quick]
        for n in setup.embeddings
        for step in _steps(setup, n, options, device, rates)
    ]
    return {"steps": steps, "largest": [largest_batch(name, device, ROOM[device, quick]) for name in LARGEST]}

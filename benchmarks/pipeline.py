"""python -m benchmarks input: what it takes to bring images to the network, in images a second.

Decoding JPEGs, augmentation at 32 and 224 pixels, putting batches together. The augmentation is SimCLR's with the
presets' figures, each image with random numbers of its own: by this package (kornia on the whole batch), and by
torchvision's v2 transforms image by image (what SDCLR and COLT do in their workers). The same transforms once for the
whole batch draw once for all of its images: no substitute, a lower bound.

Beside the wall time stands the time that this process's threads spent on a CPU, which a busy machine does not lengthen.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from ltood_fast.data import ImageFiles, Reader, make_augment
from ltood_fast.data.decode import decode_file
from ltood_fast.train.config import AugmentConfig

from .harness import SEED, message_of
from .machine import machine, provenance

RESULTS = Path(__file__).resolve().parent / "results"
AUGMENT = {32: AugmentConfig(), 224: AugmentConfig(crop_min=0.08, blur_p=0.5)}  # the source's
MEAN, STD = [0.5] * 3, [0.25] * 3


@dataclass(frozen=True)
class Setup:
    batches: dict[int, int]  # pixels -> images of a batch
    files: int
    pool: int  # images that a batch is put together from
    workers: tuple[int, ...]
    rounds: int


QUICK = Setup({32: 32, 224: 4}, files=4, pool=2_000, workers=(1,), rounds=3)
FULL = Setup({32: 256, 224: 32}, files=64, pool=50_000, workers=(1, 2, 4), rounds=15)


def v2_transform(size: int) -> nn.Module:
    """The same augmentation in torchvision's transforms, float [..., C, H, W] of uint8."""
    from torchvision.transforms import v2

    config, kernel = AUGMENT[size], max(3, size // 10 | 1)
    strength = config.jitter
    steps = [
        v2.RandomResizedCrop(size, scale=(config.crop_min, config.crop_max), antialias=False),
        v2.RandomHorizontalFlip(config.flip),
        v2.RandomApply([v2.ColorJitter(strength, strength, strength, strength / 4)], config.jitter_p),
        v2.RandomGrayscale(config.gray_p),
        *([v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], config.blur_p)] if config.blur_p else []),
        v2.Normalize(MEAN, STD),
    ]
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), *steps])


def augmentations(size: int, device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """By name: uint8 [B, C, H, W] -> one view of each image."""
    ours, v2 = make_augment(AUGMENT[size], size).to(device), v2_transform(size)
    return {
        "ours": ours,
        "torchvision v2, image by image": lambda images: torch.stack([v2(image) for image in images]),
        "torchvision v2, one draw a batch": v2,
    }


def measure(call: Callable[[], object], images: int, rounds: int, device: str) -> dict[str, float]:
    """Medians over rounds after one that is not counted."""

    def once() -> tuple[float, float]:
        start, start_cpu = time.perf_counter(), time.process_time()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, time.process_time() - start_cpu

    once()
    wall, cpu = (median(times) for times in zip(*(once() for _ in range(rounds)), strict=True))
    return {
        "images_per_s": images / wall,
        "wall_us_per_image": 1e6 * wall / images,
        "cpu_us_per_image": 1e6 * cpu / images,
    }


def _augmentation(setup: Setup, device: str) -> Iterator[dict]:
    for size, batch in setup.batches.items():
        images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8).to(device)
        for name, augment in augmentations(size, device).items():
            row = {"part": "augmentation", "pixels": size, "batch": batch, "implementation": name}
            yield row | measure(lambda a=augment, i=images: a(i), batch, setup.rounds, device)


def _decoding(setup: Setup, folder: Path) -> Iterator[dict]:
    """Pictures of 500 x 375, ImageNet's usual size, as JPEGs of quality 90."""
    from PIL import Image

    generator = np.random.default_rng(SEED)
    files = []
    for i in range(setup.files):
        coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), np.uint8))  # noise would compress badly
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
        files.append(str(folder / f"{i}.jpg"))
    for size in setup.batches:
        row = {"part": "decoding", "pixels": size, "batch": setup.files}
        once = measure(lambda s=size: [decode_file(Path(f), s) for f in files], setup.files, setup.rounds, "cpu")
        yield row | {"implementation": "this process"} | once
        for workers in setup.workers:
            reader = Reader([ImageFiles(files, size, workers)])
            batches = list(torch.arange(setup.files).split(max(1, setup.files // 8)))

            def read(reader: Reader = reader, batches: list[Tensor] = batches) -> None:
                reader.expect(batches)
                for rows in batches:
                    reader[rows]

            yield row | {"implementation": f"{workers} workers"} | measure(read, setup.files, setup.rounds, "cpu")


def _assembly(setup: Setup, folder: Path, device: str) -> Iterator[dict]:
    """A batch of random rows of CIFAR-sized images on the device."""
    size, batch = 32, setup.batches[32]
    pool = torch.randint(0, 256, (setup.pool, 3, size, size), dtype=torch.uint8)
    np.save(folder / "pool.npy", pool.permute(0, 2, 3, 1).numpy())
    mapped = torch.from_numpy(np.load(folder / "pool.npy", mmap_mode="c")).permute(0, 3, 1, 2)
    rows, resident = torch.randperm(setup.pool)[:batch], pool.to(device)
    host, file = Reader([pool]), Reader([mapped])
    ways = {
        "host tensor": lambda: host[rows].to(device),
        "mapped .npy": lambda: file[rows].to(device),
        "tensor on the device": lambda: resident[rows.to(device)],
    }
    for name, call in ways.items():
        row = {"part": "batch", "pixels": size, "batch": batch, "implementation": name}
        yield row | measure(call, batch, 10 * setup.rounds, device)


def run(setup: Setup, device: str, threads: int) -> dict:
    """What `input.json` holds."""
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        parts = (
            lambda: _augmentation(setup, device),
            lambda: _decoding(setup, Path(folder)),
            lambda: _assembly(setup, Path(folder), device),
        )
        for part in parts:
            try:
                for row in part():
                    rows.append(row)
                    print(line(row), flush=True)
            except ImportError as failure:
                print(message_of(failure), flush=True)
    return {"machine": machine(device, threads), **provenance(), "seed": SEED, "rounds": setup.rounds, "rows": rows}


def line(row: dict) -> str:
    """A row of the Markdown table."""
    cells = (row["part"], row["pixels"], row["batch"], row["implementation"], f"{row['images_per_s']:,.0f}",
             f"{row['wall_us_per_image']:,.1f}", f"{row['cpu_us_per_image']:,.1f}")  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


HEAD = "| part | pixels | images | by | images/s | us an image | CPU us an image |\n|---|---|---|---|---|---|---|"


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("input", help="decoding, augmentation and batches, in images a second")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes: seconds")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--output", type=Path, help="the JSON (default: results/input.json, input-cuda.json)")
    parser.set_defaults(function=main)


def main(arguments: argparse.Namespace) -> int:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA device, torch.cuda.is_available() is False")
    print(HEAD)
    result = run(QUICK if arguments.quick else FULL, arguments.device, arguments.threads)
    suffix = ("-cuda" if arguments.device == "cuda" else "") + ("-quick" if arguments.quick else "")
    output = arguments.output or RESULTS / f"input{suffix}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten to {output}")
    return 0

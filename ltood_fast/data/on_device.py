"""The images that training reads, as uint8 on the training device: a batch is one index there, and nothing waits.

CIFAR-10-LT with 300K random images is 0.96 GB, ImageNet-100-LT with ImageNet-R at 224 pixels 6.4 GB.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .image_files import ImageFiles
from .image_set import DataBundle, DataError

FREE_SHARE = 0.25  # [ltood_fast] of the device's free memory; the network's activations need the rest
CHUNK = 4096  # images copied at a time: a set mapped from a file is larger than memory allows


def put_on_device(data: DataBundle, device: torch.device, when: str) -> DataBundle:
    """The bundle with its ID and OOD images in one tensor on the device, or unchanged.

    Args:
        data: of `load_data`.
        device: where training runs.
        when: "always", "never", or "auto": on a CUDA device where they take at most a quarter of the free memory.

    Raises:
        DataError: always, and some of them are files that workers decode.
    """
    parts = [part.images for part in (data.train, data.ood) if part is not None]
    streamed = any(isinstance(images, ImageFiles) for images in parts)
    if streamed and when == "always":
        raise DataError("data: data.on_device must be auto or never for files that data.workers decode, got always")
    size = sum(images.shape.numel() for images in parts)
    if streamed or when == "never" or (when == "auto" and not _fits(size, device)):
        return data
    pool = torch.empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=torch.uint8, device=device)
    first = 0
    for chunk in (chunk for images in parts for chunk in images.split(CHUNK)):
        pool[first : first + len(chunk)] = chunk
        first += len(chunk)
    n_id = len(data.train)
    ood = data.ood and replace(data.ood, images=pool[n_id:])
    return replace(data, train=replace(data.train, images=pool[:n_id]), ood=ood, pool=pool)


def _fits(size: int, device: torch.device) -> bool:
    return device.type == "cuda" and size <= FREE_SHARE * torch.cuda.mem_get_info(device)[0]

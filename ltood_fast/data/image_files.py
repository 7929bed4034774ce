"""Image files that stay files: worker processes decode them ahead of their use, each time they are used.

For sets that the disk has no room for: at 224 pixels a decoded image takes 150 kB, all of Places365 270 GB. Elsewhere
the decoded copy (`data.decode`) is the faster input, as an epoch then decodes nothing. Both give the same pixels, so
the same batches and views: which of them a run reads may change from one resume to the next.

torch's DataLoader rather than NVIDIA DALI: DALI decodes and scales by other filters than Pillow, so a run would see
other images than one from the decoded copy, or one resumed where DALI is not installed; and decoding once a run, what
the copy does, is cheaper than any decoder.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .decode import decode_file, decode_files, regular_file, without_bomb_warnings
from .image_set import DataError

# A decoded set below this size is kept in memory whatever the number of workers [ltood_fast].
STREAMED_BYTES = 2 << 30
AHEAD = 2  # batches that a worker decodes ahead


def open_files(files: Sequence[Path], image_size: int, cache_dir: str, name: str, workers: int) -> Tensor | ImageFiles:
    """The images of the files: decoded, uint8 [N, 3, size, size], or to be decoded by `workers` processes where there
    are any and the set is large.

    Raises:
        DataError: a file is missing, or (decoded now) broken.
    """
    if not workers or 3 * len(files) * image_size**2 <= STREAMED_BYTES:
        return decode_files(files, image_size, cache_dir, name)
    for file in files:
        regular_file(file)
    return ImageFiles([str(file) for file in files], image_size, workers)


class ImageFiles:
    """Stands for a tensor uint8 [N, 3, size, size] of decoded files. A part of it is files again."""

    dtype = torch.uint8

    def __init__(self, files: Sequence[str], image_size: int, workers: int):
        self.files, self.image_size, self.workers = files, image_size, workers

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.files), 3, self.image_size, self.image_size))

    def dim(self) -> int:
        return 4

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rows: slice | Tensor) -> ImageFiles:
        files = self.files[rows] if isinstance(rows, slice) else [self.files[row] for row in rows.tolist()]
        return ImageFiles(files, self.image_size, self.workers)

    def cpu(self) -> Tensor:
        """uint8 [N, 3, H, W], decoded by this process: for a batch of them."""
        images = np.empty(self.shape, np.uint8)
        with without_bomb_warnings():
            for row, file in enumerate(self.files):
                images[row] = decode_file(Path(file), self.image_size)
        return torch.from_numpy(images)

    def split(self, size: int) -> Iterator[Tensor]:
        """uint8 [size, 3, H, W], the last one shorter, decoded by workers."""
        return _read(_loader((self,), self.workers), torch.arange(len(self)).split(size))


class Reader:
    """Batches by row of tensors and files one after the other: those of the ID images, then those of the OOD pool.

    Where there are files, worker processes put the batches together that `expect` has named; they stay until the reader
    goes. Any other batch is put together on demand, of the same images.
    """

    def __init__(self, parts: Sequence[Tensor | ImageFiles]):
        self.rows = _Rows(parts)
        self.expected: deque[Tensor] = deque()
        self.ready: Iterator[Tensor] = iter(())
        workers = max(part.workers if isinstance(part, ImageFiles) else 0 for part in parts)
        self.loader = _loader(parts, workers) if workers else None

    def expect(self, batches: Sequence[Tensor]) -> None:
        """The rows of the batches that will be read, in order; forgets those named before."""
        if self.loader is not None:
            self.expected, self.ready = deque(batches), _read(self.loader, batches)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """uint8 [B, C, H, W]."""
        if self.expected and torch.equal(self.expected[0], rows):
            self.expected.popleft()
            return next(self.ready)
        return self.rows.read(rows)


class _Rows(Dataset):
    """The part of a reader that a worker has."""

    def __init__(self, parts: Sequence[Tensor | ImageFiles]):
        self.parts = parts

    def read(self, rows: Tensor) -> Tensor:
        batch = torch.empty(len(rows), *self.parts[0].shape[1:], dtype=torch.uint8)
        first = 0
        for part in self.parts:
            here = (rows >= first) & (rows < first + len(part))
            batch[here] = part[rows[here] - first].cpu()
            first += len(part)
        return batch

    def __getitems__(self, rows: list[int]) -> Tensor | DataError:
        """An error is returned: the loader would wrap one that is raised."""
        try:
            return self.read(torch.tensor(rows))
        except DataError as error:
            return error


def _unchanged(batch: Tensor | DataError) -> Tensor | DataError:
    return batch


def _loader(parts: Sequence[Tensor | ImageFiles], workers: int) -> DataLoader:
    return DataLoader(
        _Rows(parts),
        batch_sampler=[],  # lists of rows, from `_read`
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=torch.cuda.is_available(),  # so that the copy to the device need not be waited for
        prefetch_factor=AHEAD,
        persistent_workers=True,
        generator=torch.Generator(),  # not torch's own, whose numbers are the views'
    )


def _read(loader: DataLoader, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """uint8 [B, C, H, W] of the rows of each batch, by the loader's workers.

    A function: held by the reader, a method's generator would be a cycle, and workers in one end only when torch has
    waited for each five seconds.

    Raises:
        DataError: a file is broken, or a worker ended (killed for memory, say).
    """
    loader.batch_sampler[:] = [rows.tolist() for rows in batches]
    try:
        for images in loader:
            if isinstance(images, DataError):
                raise images
            yield images
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = " ".join(str(error).split())
        raise DataError(f"data: the processes of data.workers must live as long as the run, got {reason}") from None

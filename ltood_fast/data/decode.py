"""Image files decoded once into one uint8 array, kept in a cache file that later runs map into memory.

Pillow decodes (it reads every common format and lets JPEG skip resolution that is not needed); threads are enough, as
it releases the GIL.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .._progress import progress_bar
from .image_set import ImageFileError, user_path

IN_MEMORY_BYTES = 2 << 30  # a larger array is mapped, not read: sets larger than memory work, random reads cost time
FORMAT = 1
SEAL_BYTES = 64 + 8  # fingerprint (SHA-256) and checksum (CRC-32), in hexadecimal digits
CHUNK = 64  # files a task decodes
# The formats of the suffixes that folders are searched for. Pillow opens a file by its content, whatever its name is,
# and knows formats that start other programs: an EPS file called .jpg would run the first `gs` on PATH.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
# Pixels of one image [ltood_fast]: 268 MB decoded, on each of up to 32 threads; cameras have up to 61 million. Pillow
# alone warns from 89 million on and refuses from 179 million on, at 716 MB.
MAX_PIXELS = 1 << 26
DAMAGED = (ValueError, EOFError, OSError)  # what reading a broken cache file raises


def default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ltood_fast"


def decode_files(files: Sequence[Path], image_size: int, cache_dir: str = "", name: str = "images") -> Tensor:
    """uint8 [N, 3, size, size] of image files: RGB, shorter side scaled to `image_size`, centre cropped.

    The cache file is a .npy array followed by a seal: the fingerprint of the image files (names, sizes, times), and the
    checksum of the array. A file with a wrong seal (damaged, cut off, of other images) is made again. Where
    it cannot be written (full disk, no permission) a warning says so and the array stays in memory. Of several
    processes that want it, the ranks of a run for one, the first makes it and the others wait.

    Args:
        files: the files, in order.
        image_size: pixels.
        cache_dir: where decoded arrays are kept; empty: the user's cache folder.
        name: of the set, for the cache file and the progress bar.

    Raises:
        ImageFileError: a file is missing, or is no image of FORMATS and of at most MAX_PIXELS.
    """
    shape = (len(files), 3, image_size, image_size)
    key = _fingerprint(files, image_size)
    cached = (user_path(cache_dir) if cache_dir else default_cache_dir()) / f"{name}-{key[:16]}.npy"
    if (images := _read_cached(cached, shape, key)) is not None:
        return images
    try:
        with _alone(cached):
            with contextlib.suppress(*DAMAGED):  # made while this process waited
                return _load_sealed(cached, shape, key)
            _decode_into_file(files, shape, cached, key, name)
        return _load(cached, shape)
    except OSError as error:
        reason = error.strerror or error
    warnings.warn(f"data: {name} is decoded but not cached: {reason} ({cached.parent})", stacklevel=2)
    array = np.empty(shape, np.uint8)
    _decode_all(files, image_size, array, name)
    return torch.from_numpy(array)


def _fingerprint(files: Sequence[Path], image_size: int) -> str:
    """A hash of names, sizes and times of the files: a changed file is decoded again."""
    digest = hashlib.sha256(f"{FORMAT} {image_size}\n".encode())
    for file in files:
        status = regular_file(file)
        digest.update(f"{file.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def regular_file(file: Path) -> os.stat_result:
    """Its size and times. Opening anything else could wait for ever (a pipe) or never end (a device).

    Raises:
        ImageFileError: no such file, or none of bytes.
    """
    try:
        status = file.stat()
    except FileNotFoundError:
        raise ImageFileError(file, f"data: image file must exist, got {file}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageFileError(file, f"data: image file must be readable, got {str(file)!r} ({reason})") from None
    if not stat.S_ISREG(status.st_mode):
        kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))
        got = next((name for is_kind, name in kinds if is_kind(status.st_mode)), "a device")
        raise ImageFileError(file, f"data: image file must be a regular file, got {got}: {file}")
    return status


def _seal(key: str, array: np.ndarray) -> bytes:
    """The last bytes of a cache file. A large array is mapped, not read: its seal goes by the fingerprint alone."""
    checksum = zlib.crc32(array.reshape(-1).data) if array.nbytes <= IN_MEMORY_BYTES else 0
    return f"{key}{checksum:08x}".encode()


def _load(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A copy in memory when it is small, else the mapped file (copy-on-write: nothing changes the file)."""
    array = np.lib.format.open_memmap(path, mode="c")
    if array.shape != shape or array.dtype != np.uint8:
        raise ValueError(f"it holds {array.dtype} {array.shape}")
    return torch.from_numpy(array if array.nbytes > IN_MEMORY_BYTES else np.array(array))


def _load_sealed(path: Path, shape: tuple[int, ...], key: str) -> Tensor:
    images = _load(path, shape)
    with open(path, "rb") as file:
        file.seek(-SEAL_BYTES, os.SEEK_END)
        if file.read() != _seal(key, images.numpy()):
            raise ValueError("its seal is wrong")
    return images


def _read_cached(path: Path, shape: tuple[int, ...], key: str) -> Tensor | None:
    if not path.is_file():
        return None
    try:
        return _load_sealed(path, shape, key)
    except DAMAGED as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    warnings.warn(f"data: cache file {path} is damaged ({reason}) and is made again", stacklevel=3)
    return None


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Waits until no other process makes the file. The system lets go of the lock of one that dies. (One that comes
    while the lock's file is taken away may make the file a second time: nothing is lost.)"""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.with_name(f".{path.name}.lock")
    with open(name, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            name.unlink(missing_ok=True)
            fcntl.flock(lock, fcntl.LOCK_UN)  # a process forked meanwhile keeps the file open


def _decode_into_file(files: Sequence[Path], shape: tuple[int, ...], path: Path, key: str, name: str) -> None:
    """Decodes straight into a mapped file, which gets its name when it is whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        with open(partial, "r+b") as file:  # a full disk must be an error here, not a SIGBUS while decoding
            os.posix_fallocate(file.fileno(), 0, partial.stat().st_size + SEAL_BYTES)
            _decode_all(files, shape[-1], array, name)
            array.flush()
            file.seek(-SEAL_BYTES, os.SEEK_END)
            file.write(_seal(key, array))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _decode_all(files: Sequence[Path], image_size: int, out: np.ndarray, name: str) -> None:
    def decode_chunk(start: int) -> int:
        chunk = files[start : start + CHUNK]
        for row, file in enumerate(chunk, start):
            out[row] = decode_file(file, image_size)
        return len(chunk)

    with (
        without_bomb_warnings(),
        ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1))) as pool,
        progress_bar(len(files), f"decode {name}") as bar,
    ):
        try:
            for done in pool.map(decode_chunk, range(0, len(files), CHUNK)):
                bar.update(done)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextlib.contextmanager
def without_bomb_warnings() -> Iterator[None]:
    """Pillow's, which would come with the refusal of `decode_file`. Outside the threads that decode: the filters of
    warnings belong to the process."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def decode_file(file: Path, image_size: int) -> np.ndarray:
    """uint8 [3, size, size] of one file.

    Raises:
        ImageFileError: it is no image of FORMATS, broken, or of more than MAX_PIXELS.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    size = (image_size, image_size)
    try:
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageFileError(
                    file,
                    f"data: image file must have at most {MAX_PIXELS} pixels, got {width} x {height}: {file} (scale it "
                    "down first)",
                )
            image.draft("RGB", size)  # JPEG: decode at the nearest larger scale
            if image.mode in ("I", "F"):
                raise ValueError("32 bits a channel have no known range")
            if image.mode.startswith("I;16"):  # conversion would clip at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            fitted = ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BICUBIC)
    except ImageFileError:
        raise
    except UnidentifiedImageError:
        formats = ", ".join(FORMATS)
        raise ImageFileError(
            file, f"data: image file must be readable, got a broken one: {file} (its content is none of {formats})"
        ) from None
    except Exception as error:  # Pillow's readers raise at damaged bytes what comes (struct.error, KeyError, ...)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageFileError(file, f"data: image file must be readable, got a broken one: {file} ({reason})") from error
    return np.asarray(fitted).transpose(2, 0, 1)

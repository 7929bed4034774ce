"""Data sets by specification string, `kind` or `kind:path`. `SOURCES` is the registry: kind -> function."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from .._keys import did_you_mean
from .embedded import digits, letters
from .image_files import ImageFiles, open_files
from .image_set import DataError, ImageFileError, ImageSet, user_path
from .longtail import map_npy

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp"}
MAX_LABEL = 1_000_000  # [ltood_fast] a larger one is a slip of the pen, no class
SPARSE_CLASSES = 1000  # [ltood_fast] of more, a tenth at least must have an image: tables are classes × classes
CONTAINERS = {"images", "train", "val", "test"}  # folders that hold a class or a part and name no class


@dataclass(frozen=True)
class Source:
    """The path of a source and all options that apply to it."""

    path: str = ""
    root: str = ""
    part: str = "train"  # train, probe or test; the probe of a set without one is its training part
    image_size: int = 32
    cache_dir: str = ""
    workers: int = 0  # processes that decode a large set's files as they are used; 0: decoded once
    limit: int = 0  # images to make (letters, noise); 0: the source's default
    seed: int = 0

    def resolve(self, path: str) -> Path:
        """A relative path is relative to the root."""
        return user_path(self.root) / user_path(path)

    def open_files(self, files: Sequence[Path], name: str) -> torch.Tensor | ImageFiles:
        return open_files(files, self.image_size, self.cache_dir, name, self.workers)


def open_set(spec: str, **options) -> ImageSet:
    """The set that a specification names: `digits`, `letters`, `cifar10`, `cifar100`, `folder:PATH`, `list:PATH`,
    `npy:PATH`, `noise`, and pools by name (`random_images`, `imagenet_r`, `places_extra69`), where they are unpacked
    below the root or at the path."""
    kind, colon, path = spec.partition(":")
    if kind not in SOURCES:
        hint = did_you_mean(kind, SOURCES)
        if user_path(spec).is_dir():
            hint = f", which is a folder: did you mean folder:{spec}?"
        raise DataError(f"data: set must be one of {', '.join(SOURCES)} (kind or kind:path), got {spec!r}{hint}")
    if path and kind in WITHOUT_PATH:
        raise DataError(f"data: set must be {kind} without a path, got {spec!r}")
    if not path and (colon or kind in WITH_PATH):
        raise DataError(f"data: set must be {kind}:PATH, got {spec!r}")
    return SOURCES[kind](Source(path=path, **options))


def _digits(source: Source) -> ImageSet:
    return digits(source.image_size, source.part)


def _letters(source: Source) -> ImageSet:
    return letters(source.image_size, source.limit, source.seed)


def _cifar(source: Source, name: str) -> ImageSet:
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"data: {name} needs torchvision, which cannot be imported with this torch ({reason}): "
            "install the CUDA build of torch and its torchvision, which also run without a GPU"
        ) from error
    make = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    root = source.resolve(source.path)
    try:
        data = make(str(root), train=source.part != "test")
    except Exception as error:  # its archives are pickles: damaged, they can raise anything
        raise DataError(
            f"data: data.root must hold {name} as torchvision stores it, got {root}; download it once with "
            f"python -c \"from torchvision.datasets import {make.__name__} as D; D('{root}', download=True)\""
        ) from error
    images = resized(torch.from_numpy(data.data).permute(0, 3, 1, 2), source.image_size)
    return ImageSet(images, torch.tensor(data.targets), tuple(data.classes), name)


def image_files(root: Path) -> list[Path]:
    """The images below a folder, sorted.

    Raises:
        DataError: no such folder, or no image in it.
    """
    if not root.is_dir():
        raise DataError(f"data: folder must exist, got {root}")
    # os.walk: a class folder may be a link, which Path.rglob passes by
    files = sorted(
        Path(folder, name)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if Path(name).suffix.lower() in IMAGE_SUFFIXES
    )
    if not files:
        allowed = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"data: folder must hold images ({allowed}), got none below {root}")
    return files


def labels_by_class_folder(root: Path, files: Sequence[Path]) -> tuple[torch.Tensor, tuple[str, ...]]:
    """(int64 [N], -1 for an image that lies in no folder below the root; the names of the classes)."""
    folders = [f.relative_to(root).parts[:-1] for f in files]
    classes = [_below_initial(folder) for folder in folders]
    if not all(classes):
        classes = [folder[0] if folder else "" for folder in folders]
    names = tuple(sorted(set(classes) - {""}))
    index = {name: label for label, name in enumerate(names)}
    return torch.tensor([index.get(name, -1) for name in classes]), names


def _folder(source: Source) -> ImageSet:
    """`<class>/**/image`, Places' `<initial>/<class>/**/image`, or images without a class folder (label -1)."""
    root = source.resolve(source.path).absolute()
    files = image_files(root)
    labels, names = labels_by_class_folder(root, files)
    images = source.open_files(files, root.name)
    return ImageSet(images, labels, names, root.name, tuple(str(f.relative_to(root)) for f in files))


def _list(source: Source) -> ImageSet:
    """Lines `path label` or `path`; a path is relative to the root, or to the list's folder where no root is given.

    Places' own lists begin their paths with a slash: a path is absolute only if there is a file where the list's first
    absolute one points.
    """
    path = user_path(source.path)
    if not path.is_file():
        raise DataError(f"data: list must be an existing file, got {path if source.path else 'none'}")
    root = user_path(source.root) if source.root else path.parent
    relative, labels = read_list(path)
    if max(labels) < 0:  # an unlabelled pool: its folders serve the report
        labels, names = _labels_by_folder(relative)
    else:
        names = _names_by_folder(relative, labels)
    words = _read_words(root)
    names = tuple(words.get(name, name) for name in names)
    first = next((p for p in relative if p.is_absolute()), None)
    if first is not None and not first.is_file():
        relative = [p.relative_to(p.anchor) for p in relative]
    files = [root / p for p in relative]
    try:
        _check_inside(root, relative)
        images = source.open_files(files, path.stem)
    except ImageFileError as error:
        raise DataError(f"{error} (line {_line_of(path, files.index(error.file))} of {path})") from error
    return ImageSet(images, torch.tensor(labels), names, path.stem, tuple(map(str, relative)))


def _check_inside(root: Path, paths: Sequence[Path]) -> None:
    """No `..` may lead out of the root; an absolute path is the list's word for where its images are."""
    for path in paths:
        if ".." in path.parts and not path.is_absolute() and os.path.normpath(path).startswith(".."):
            raise ImageFileError(root / path, f"data: image file must lie below the root {root}, got {path}")


def _line_of(path: Path, image: int) -> int:
    """The number of the line in a list that names image number `image`."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [number for number, line in enumerate(lines, 1) if line.strip()][image]


def read_list(path: Path) -> tuple[list[Path], list[int]]:
    """(paths, labels) of the lines; label -1 where a line has none.

    Raises:
        DataError: names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise DataError(f"data: list must be a text of lines `path label` in UTF-8, got {path}") from None
    paths, labels = [], []
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line:
            continue
        if "\0" in line:
            raise DataError(f"data: line {number} of {path} must be a path without a NUL byte, got {line!r}")
        name, label = line, "-1"
        if len(line.split()) > 1 and Path(line).suffix.lower() not in IMAGE_SUFFIXES:
            name, label = line.rsplit(maxsplit=1)
        if not re.fullmatch(r"-1|\d{1,6}", label):
            wanted = f"`path label`, label in [-1, {MAX_LABEL})"
            raise DataError(f"data: line {number} of {path} must be {wanted}, got {line!r}")
        paths.append(Path(name))
        labels.append(int(label))
    if not paths:
        raise DataError(f"data: list must name at least one image, got an empty file {path}")
    found, classes = len({label for label in labels if label >= 0}), max(labels) + 1
    if classes > SPARSE_CLASSES and classes > 10 * found:
        raise DataError(
            f"data: labels of {path} must number the classes from 0, got {found} different ones up to {classes - 1}, "
            f"which would be {classes} classes; renumber them, e.g. by torch.unique(labels, return_inverse=True)[1]"
        )
    return paths, labels


def _read_words(root: Path) -> dict[str, str]:
    """ImageNet's `words.txt` in the folder of the images, where there is one: "n01443537" -> "n01443537 goldfish"."""
    path = root / "words.txt"
    if not path.is_file():
        return {}
    pairs = (line.partition("\t") for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    return {wnid: f"{wnid} {words.partition(',')[0].strip()}" for wnid, _, words in pairs}


def _below_initial(folders: Sequence[str]) -> str:
    """podium/indoor of Places' folders p/podium/indoor, where a class lies below its initial; empty elsewhere."""
    for i in reversed(range(len(folders) - 1)):
        if len(folders[i]) == 1 and folders[i + 1].startswith(folders[i]):
            return "/".join(folders[i + 1 :])
    return ""


def _folder_name(path: Path) -> str:
    folders = path.parent.parts
    return _below_initial(folders) or next((part for part in reversed(folders) if part not in CONTAINERS), "")


def _labels_by_folder(paths: Sequence[Path]) -> tuple[list[int], tuple[str, ...]]:
    folders = [_folder_name(p) for p in paths]
    names = tuple(sorted(set(folders) - {""}))
    index = {name: label for label, name in enumerate(names)}
    return [index.get(folder, -1) for folder in folders], names


def _names_by_folder(paths: Sequence[Path], labels: Sequence[int]) -> tuple[str, ...]:
    """A class is called as the folder of its first image, or by its number where folders do not tell classes apart."""
    first: dict[int, str] = {}
    for path, label in zip(paths, labels, strict=True):
        first.setdefault(label, _folder_name(path))
    names = [first.get(label, "") for label in range(max(labels) + 1)]
    distinct = len(set(names)) == len(names) and "" not in names
    return tuple(names) if distinct else tuple(str(label) for label in range(len(names)))


def _npy(source: Source) -> ImageSet:
    """uint8 [N, H, W, C] or [N, H, W], such as `300K_random_images.npy`; mapped, not read."""
    path = source.resolve(source.path)
    array = map_npy(path, "npy set", "c")
    fits = array.ndim in (3, 4) and array.size > 0 and array.shape[3:] in ((), (1,), (3,))
    if array.dtype != np.uint8 or not fits:
        raise DataError(f"data: {path} must hold uint8 images [N, H, W, C], got {array.dtype} {array.shape}")
    images = torch.from_numpy(array if array.ndim == 4 else array[..., None]).permute(0, 3, 1, 2)
    images = resized(images, source.image_size)
    return ImageSet(images, torch.full((len(images),), -1), (), path.stem)


def _pool(read: Callable[[Source], ImageSet], download: str, *paths: str) -> Callable[[Source], ImageSet]:
    """An OOD set known by name: `paths` is where it may lie below the root, as its archive unpacks."""

    def open_pool(source: Source) -> ImageSet:
        tried = [source.path] if source.path else paths
        for path in tried:
            if source.resolve(path).exists():
                return read(replace(source, path=path))
        places = " or ".join(str(source.resolve(path)) for path in tried)
        raise DataError(f"data: the set must lie in {places}, got nothing there; download it once from {download}")

    return open_pool


DEFAULT_NOISE = 2000


def _noise(source: Source) -> ImageSet:
    """Uniform noise, every pixel by itself: an OOD set that is like nothing [ltood_fast]."""
    shape = (source.limit or DEFAULT_NOISE, 3, source.image_size, source.image_size)
    generator = torch.Generator().manual_seed(source.seed)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.full((len(images),), -1), (), "noise")


def resized(images: torch.Tensor, size: int, chunk: int = 4096) -> torch.Tensor:
    """uint8 [N, C, size, size]: shorter side scaled (bilinear, antialiased) and centre cropped, as `decode_files` does;
    unchanged (not read) where the size is right."""
    height, width = images.shape[2:]
    if height == width == size:
        return images
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2

    def scale(part: torch.Tensor) -> torch.Tensor:
        square = part[..., top : top + side, left : left + side].float()
        scaled = torch.nn.functional.interpolate(square, size=(size, size), mode="bilinear", antialias=True)
        return scaled.round().clamp(0, 255).to(torch.uint8)

    return torch.cat([scale(part) for part in images.split(chunk)])


SOURCES: dict[str, Callable[[Source], ImageSet]] = {
    "digits": _digits,
    "letters": _letters,
    "cifar10": lambda source: _cifar(source, "cifar10"),
    "cifar100": lambda source: _cifar(source, "cifar100"),
    "folder": _folder,
    "list": _list,
    "npy": _npy,
    "noise": _noise,
    "random_images": _pool(
        _npy, "https://people.eecs.berkeley.edu/~hendrycks/300K_random_images.npy", "300K_random_images.npy"
    ),
    "imagenet_r": _pool(_folder, "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar", "imagenet-r"),
    "places_extra69": _pool(
        _folder, "http://places2.csail.mit.edu/download.html", "data_256_extra", "data_large_extra"
    ),
}
WITHOUT_PATH, WITH_PATH = ("digits", "letters", "noise"), ("folder", "list", "npy")
POOLS = ("letters", "npy", "noise", "list", "random_images", "imagenet_r", "places_extra69")  # sets without a test part

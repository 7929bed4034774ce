"""Data sets, long tails, decoding and augmentation."""

from .augment import make_augment, make_eval_transform
from .bundle import load_data
from .image_files import ImageFiles, Reader
from .image_set import DataBundle, DataError, ImageSet
from .on_device import put_on_device
from .sources import open_set

__all__ = [
    "DataBundle",
    "DataError",
    "ImageFiles",
    "ImageSet",
    "Reader",
    "load_data",
    "make_augment",
    "make_eval_transform",
    "open_set",
    "put_on_device",
]

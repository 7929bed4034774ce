"""Data sets, long tails, decoding and augmentation."""

from .augment import make_augment, make_eval_transform
from .bundle import load_data
from .image_set import DataBundle, DataError, ImageSet
from .sources import open_set

__all__ = ["DataBundle", "DataError", "ImageSet", "load_data", "make_augment", "make_eval_transform", "open_set"]

"""Sets that need no download: handwritten digits (in-distribution) and rendered letters (out-of-distribution).

Both are white on black, one channel. The digits are scikit-learn's (UCI optical recognition of handwritten digits,
1,797 images of 8x8 with 17 grey levels, each counted over 4x4 pixels of a scan). The letters are drawn here from the
fonts that matplotlib ships, and go through the same 8x8 pixels and 17 levels, so that the shapes tell the domains apart
and not the sharpness.
"""

from __future__ import annotations

import string
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .image_set import DataError, ImageSet

HELD_OUT_DIGITS = {"test": 40, "probe": 30}  # images a class; the others are for training
ALPHABET = string.ascii_letters
DEFAULT_LETTERS = 2000
SCAN, BLOCK = 32, 4  # pixels of a scan's side; scan pixels that a pixel of an image counts, along each side
LEVELS = 16  # the brightest grey level
FONT_FAMILIES = ("DejaVuSans", "DejaVuSerif", "STIXGeneral", "cmr10", "cmss10", "cmtt10")


def digits(image_size: int, part: str) -> ImageSet:
    """Balanced digits: 104 images a class in the part "train", 30 in "probe", 40 in "test"; no image is in two."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.from_numpy(data.images).float()[:, None], torch.from_numpy(data.target).long()
    by_class = [(labels == c).nonzero().flatten() for c in range(10)]
    n_test, n_probe = HELD_OUT_DIGITS["test"], HELD_OUT_DIGITS["probe"]
    start, stop = {
        "test": (0, n_test),
        "probe": (n_test, n_test + n_probe),
        "train": (n_test + n_probe, min(len(rows) for rows in by_class)),
    }[part]
    rows = torch.cat([rows[start:stop] for rows in by_class])
    return ImageSet(_enlarge(images[rows], image_size), labels[rows], tuple(string.digits), "digits")


def _enlarge(levels: Tensor, image_size: int) -> Tensor:
    """Grey levels 0 to 16 [N, 1, 8, 8] as uint8 [N, 1, image_size, image_size]."""
    size = (image_size, image_size)
    images = F.interpolate(levels * (255 / LEVELS), size=size, mode="bicubic", antialias=True)
    return images.round().clamp(0, 255).to(torch.uint8)


def letters(image_size: int, count: int = 0, seed: int = 0) -> ImageSet:
    """Latin letters in both cases, random fonts and random affine warps; the same ones for the same seed.

    Args:
        image_size: pixels.
        count: how many; 0: 2,000.
        seed: of letters, fonts and warps.
    """
    count = count or DEFAULT_LETTERS
    glyphs = _glyphs()  # [fonts * 52, 1, S, S]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(glyphs), (count,), generator=generator)
    grid = F.affine_grid(_random_affine(count, generator), [count, 1, SCAN, SCAN], align_corners=False)
    scans = F.grid_sample(glyphs[chosen], grid, align_corners=False)
    levels = (F.avg_pool2d(scans, BLOCK) * LEVELS).round()
    return ImageSet(_enlarge(levels, image_size), chosen % len(ALPHABET), tuple(ALPHABET), "letters")


def _random_affine(count: int, generator: torch.Generator) -> Tensor:
    """[count, 2, 3], from the coordinates of an image to those of its glyph: rotation and shear up to 0.2 (11 degrees),
    scale 1 to 1.3, shift up to 5 % of the side."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    angle, scale, shear = uniform(-0.2, 0.2), uniform(1.0, 1.3), uniform(-0.2, 0.2)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    shift_x, shift_y = uniform(-0.1, 0.1), uniform(-0.1, 0.1)
    row_x = torch.stack([cos, shear * cos - sin, shift_x], dim=1)
    row_y = torch.stack([sin, shear * sin + cos, shift_y], dim=1)
    return torch.stack([row_x, row_y], dim=1)


def _glyphs() -> Tensor:
    """float [fonts * 52, 1, S, S] in [0, 1]: each letter of each font, as large as the scan allows and centred;
    fonts in the order of their names."""
    from matplotlib import get_data_path

    folder = Path(get_data_path()) / "fonts/ttf"
    alphabets = [_alphabet(f) for f in sorted(folder.glob("*.ttf")) if f.name.startswith(FONT_FAMILIES)]
    alphabets = [alphabet for alphabet in alphabets if alphabet is not None]
    if not alphabets:
        raise DataError(f"data: letters need the fonts that matplotlib ships, got none in {folder}")
    return torch.cat(alphabets)[:, None] / 255


def _alphabet(file: Path) -> Tensor | None:
    """float [52, S, S] in [0, 255], or None for a font that lacks a letter (display fonts do)."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    font = ImageFont.truetype(str(file), 2 * SCAN)
    drawn = []
    for letter in ALPHABET:
        sheet = Image.new("L", (4 * SCAN, 4 * SCAN))
        ImageDraw.Draw(sheet).text((2 * SCAN, 2 * SCAN), letter, fill=255, font=font, anchor="mm")
        if (box := sheet.getbbox()) is None:
            return None
        drawn.append(np.asarray(ImageOps.pad(sheet.crop(box), (SCAN, SCAN), Image.Resampling.BOX)))
    return torch.from_numpy(np.stack(drawn)).float()

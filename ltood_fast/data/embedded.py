"""Sets that need no download: handwritten digits (in-distribution) and rendered letters (out-of-distribution).

Both are white on black, one channel. The digits are scikit-learn's (UCI optical recognition of handwritten digits,
1,797 images of 8x8); the letters are drawn here from the fonts that matplotlib ships.
"""

from __future__ import annotations

import string
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .image_set import DataError, ImageSet

TEST_DIGITS = 40  # images a class that are held out
DEFAULT_LETTERS = 2000
GLYPH_SIZE = 48  # pixels of a rendered letter before it is warped
FONT_FAMILIES = ("DejaVuSans", "DejaVuSerif", "STIXGeneral", "cmr10", "cmss10", "cmtt10")


def digits(image_size: int, part: str, seed: int) -> ImageSet:
    """Balanced digits, `part` "train" or "test": the same 40 images of each class are held out whatever the seed, which
    only orders the rest."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] * (255 / 16)
    images = F.interpolate(images, size=(image_size, image_size), mode="bicubic", antialias=True)
    images, labels = images.round().clamp(0, 255).to(torch.uint8), torch.from_numpy(data.target).long()
    by_class = [(labels == c).nonzero().flatten() for c in range(10)]
    if part == "test":
        rows = torch.cat([r[:TEST_DIGITS] for r in by_class])
    else:
        smallest = min(len(r) for r in by_class) - TEST_DIGITS
        rows = torch.cat([r[TEST_DIGITS : TEST_DIGITS + smallest] for r in by_class])
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    return ImageSet(images[rows], labels[rows], tuple(string.digits), "digits")


def letters(image_size: int, count: int = 0, seed: int = 0) -> ImageSet:
    """Latin letters in both cases, random fonts and random affine warps; the same ones for the same seed.

    Args:
        image_size: pixels.
        count: how many; 0: 2,000.
        seed: of letters, fonts and warps.
    """
    count = count or DEFAULT_LETTERS
    glyphs = _glyphs()  # [fonts * 52, 1, S, S]
    n_letters = len(string.ascii_letters)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(glyphs), (count,), generator=generator)
    grid = F.affine_grid(_random_affine(count, generator), [count, 1, image_size, image_size], align_corners=False)
    images = F.grid_sample(glyphs[chosen], grid, align_corners=False)
    images = images.round().clamp(0, 255).to(torch.uint8)
    return ImageSet(images, chosen % n_letters, tuple(string.ascii_letters), "letters")


def _random_affine(count: int, generator: torch.Generator) -> Tensor:
    """[count, 2, 3]: rotation up to 17 degrees, scale 0.8 to 1.2, shear and shift up to 15 % of the image."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    angle, scale, shear = uniform(-0.3, 0.3), uniform(0.8, 1.2), uniform(-0.3, 0.3)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    shift_x, shift_y = uniform(-0.3, 0.3), uniform(-0.3, 0.3)
    row_x = torch.stack([cos, shear * cos - sin, shift_x], dim=1)
    row_y = torch.stack([sin, shear * sin + cos, shift_y], dim=1)
    return torch.stack([row_x, row_y], dim=1)


def _glyphs() -> Tensor:
    """float [fonts * 52, 1, S, S] in [0, 255]: each letter of each font, centred; fonts in order of their names."""
    import numpy as np
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(get_data_path()) / "fonts/ttf"
    files = sorted(f for f in folder.glob("*.ttf") if f.name.startswith(FONT_FAMILIES))
    if not files:
        raise DataError(f"data: letters need the fonts that matplotlib ships, got none in {folder}")
    drawn = []
    for file in files:
        font = ImageFont.truetype(str(file), int(0.8 * GLYPH_SIZE))
        alphabet = []
        for letter in string.ascii_letters:
            image = Image.new("L", (GLYPH_SIZE, GLYPH_SIZE))
            centre = GLYPH_SIZE / 2
            ImageDraw.Draw(image).text((centre, centre), letter, fill=255, font=font, anchor="mm")
            alphabet.append(np.asarray(image))
        if all(glyph.any() for glyph in alphabet):  # display fonts lack some letters
            drawn += alphabet
    return torch.from_numpy(np.stack(drawn)).float()[:, None]

"""Shared by all pictures of the benchmarks: colour, marker and label of a name, labels at line ends, small files."""

from __future__ import annotations

import io
import math
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

DPI = 130
SOURCE = "Source"  # PNG text: the digest of the data that a picture was drawn from


class Look(NamedTuple):
    label: str
    color: str
    marker: str
    width: float = 1.4


# Colours of Okabe and Ito. ltood_fast stands out, the baselines in plain PyTorch are grey.
LOOKS = {
    "ours": Look("ltood_fast", "#D55E00", "o", 2.6),
    "eager": Look("eager PyTorch", "#8C8C8C", "s"),
    "plain": Look("careful PyTorch", "#5F5F5F", "D"),
    "compile": Look("torch.compile", "#56B4E9", "^"),
    "compile-plain": Look("torch.compile, careful", "#0072B2", "v", 1.8),
    "lightly": Look("lightly", "#009E73", "P"),
    "solo-learn": Look("solo-learn", "#CC79A7", "X"),
    "pml-supcon": Look("metric-learning SupCon", "#E69F00", "*"),
    "pml-ntxent": Look("metric-learning NTXent", "#B8A400", "<"),
    "open_clip": Look("open_clip", "#7B4FA3", ">"),
    "memeff": Look("memeff", "#3B7DD8", "h"),
    "flex_attention": Look("flex_attention", "#000000", "d"),
    "faiss": Look("FAISS", "#4E8F2F", "p"),
    "scikit-learn": Look("scikit-learn", "#A0522D", "8"),
}


def look(name: str) -> Look:
    return LOOKS.get(name, Look(name, "#444444", "."))


def figure_of(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def headline(figure: Figure, finding: str, setting: str) -> None:
    """The finding in bold, and below it what was measured where."""
    figure.suptitle(finding, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    below = 0.22 / figure.get_figheight()
    figure.get_layout_engine().set(rect=(0, below, 1, 1 - below))
    figure.text(0.01, 0.012, setting, ha="left", va="bottom", fontsize=8.5, color="#555555")


def plain_numbers(axis) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))


def log_sizes(axes: Axes, sizes: list[float], room: float = 4.0) -> None:
    """Logarithmic axes with ticks at the sizes that were measured, and room for labels at the right."""
    axes.set(xscale="log", yscale="log", xlim=(0.9 * sizes[0], room * sizes[-1]))
    axes.set_xticks(sizes)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    plain_numbers(axes.xaxis)
    plain_numbers(axes.yaxis)


def label_ends(axes: Axes, ends: list[tuple[float, float, str, str]], gap: float = 0.062) -> None:
    """Names lines at their right ends (x, y, label, colour), at least `gap` of the logarithmic axes' height apart."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    ends = sorted(ends, key=lambda end: end[1])
    heights: list[float] = []
    for _, y, *_ in ends:
        heights.append(max((math.log(y) - low) / (high - low), heights[-1] + gap if heights else 0.0))
    for i in reversed(range(len(heights))):  # and back where they left the axes at the top
        heights[i] = min(heights[i], heights[i + 1] - gap if i + 1 < len(heights) else 1.0)
    for (x, _, label, color), position in zip(ends, heights, strict=True):
        bold = "bold" if label == LOOKS["ours"].label else None
        axes.annotate(label, (x, math.exp(low + position * (high - low))), (8, 0), textcoords="offset points",
                      va="center", fontsize=8.5, color=color, fontweight=bold, annotation_clip=False)  # fmt: skip


def png(figure: Figure, source: str = "") -> bytes:
    """64 colours are enough for lines and bars, and make the file a third."""
    drawn, small, info = io.BytesIO(), io.BytesIO(), PngInfo()
    figure.savefig(drawn, format="png", dpi=DPI)
    if source:
        info.add_text(SOURCE, source)
    image = Image.open(drawn).convert("RGB").quantize(64)
    image.save(small, format="png", optimize=True, pnginfo=info)
    return small.getvalue()

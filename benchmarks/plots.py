"""Pictures of a run as PNG bytes: time and memory against N, ratios, the roofline, the loss's share of a step."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from PIL import Image

from ltood_fast.eval.plots import STYLE

from . import tables
from .harness import OK

DPI = 110
# Okabe and Ito's colours; ours stands out, the baselines are grey.
COLORS = {
    "ours": "#D55E00", "eager": "#9A9A9A", "plain": "#5F5F5F", "compile": "#9CCBEA", "compile-plain": "#0072B2",
    "lightly": "#009E73", "solo-learn": "#CC79A7", "pml-supcon": "#E69F00", "pml-ntxent": "#B8A400",
    "memeff": "#56B4E9", "flex_attention": "#000000",
}  # fmt: skip
MARKERS = "osD^vPX*<>hd"
LEAST_SIZES = 3  # of an op, to draw it against N


class Picture(NamedTuple):
    name: str
    title: str
    caption: str
    png: bytes


def _png(figure: Figure) -> bytes:
    """64 colours are enough for lines and bars, and make the file a third."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    Image.open(drawn).convert("RGB").quantize(64).save(small, format="png", optimize=True)
    return small.getvalue()


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _plain_numbers(axis) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))


def draw(result: dict[str, Any]) -> list[Picture]:
    """Every picture that the run has rows for."""
    with mpl.rc_context(STYLE):
        drawn = [sizes(result), ratios(result), roofline(result), training(result)]
    return [picture for picture in drawn if picture]


def _series(rows: list[dict]) -> dict[str, list[dict]]:
    """Title -> the timed rows that differ in N and implementation alone, of at least LEAST_SIZES sizes."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        if row["status"] == OK:
            extra = "" if row["dtype"] == "float32" else f", {row['dtype']}"
            clusters = f", K = {row['K']}" if row.get("K") else ""
            found.setdefault(f"{row['op']}, {row['direction']}, D = {row['D']}{clusters}{extra}", []).append(row)
    return {title: group for title, group in found.items() if len({row["N"] for row in group}) >= LEAST_SIZES}


def sizes(result: dict[str, Any]) -> Picture | None:
    series = _series(result["rows"])
    if not series:
        return None
    figure = _figure(9.5, 0.4 + 3.6 * len(series))
    panels = figure.subplots(len(series), 2, squeeze=False)
    for (title, rows), (left, right) in zip(series.items(), panels, strict=True):
        names = sorted({row["implementation"] for row in rows}, key=lambda name: (name == "ours", name))
        for name, marker in zip(names, MARKERS, strict=False):
            mine = sorted((row for row in rows if row["implementation"] == name), key=lambda row: row["N"])
            style = {
                "color": COLORS.get(name),
                "marker": marker,
                "markersize": 5,
                "linewidth": 2.4 if name == "ours" else 1.3,
            }
            n = [row["N"] for row in mine]
            left.plot(n, [row["median_ms"] for row in mine], label=name, **style)
            right.plot(n, [max(row["peak_mib"], 0.1) for row in mine], label=name, **style)
        floors = sorted({(row["N"], row["floor_ms"]) for row in rows})
        left.plot(*zip(*floors, strict=True), color="black", linestyle=":", linewidth=1.2, label="floor")
        for panel, what in ((left, "ms"), (right, "peak MiB")):
            panel.set(xscale="log", yscale="log", xlabel="N", ylabel=what)
            panel.set_xticks(sorted({row["N"] for row in rows}))
            panel.xaxis.set_minor_locator(NullLocator())
            panel.tick_params(axis="x", labelrotation=30)
            _plain_numbers(panel.xaxis)
            _plain_numbers(panel.yaxis)
        left.set_title(title, loc="left")
        left.legend(fontsize=8, ncols=2)
    caption = "Median time and peak extra memory of one call against the number of embeddings. Dotted: the floor."
    return Picture("sizes", "Time and memory against N", caption, _png(figure))


def ratios(result: dict[str, Any]) -> Picture | None:
    groups = tables.grouped(result["rows"])
    bars = []
    for case, rows in groups.items():
        ours, others = tables.timed(rows, "ours"), tables.best_others(rows)
        if ours and others:
            bars.append((case, others[0]["implementation"], ours["vs_best_rival"], ours.get("vs_eager")))
    if not bars:
        return None
    bars.sort(key=lambda bar: bar[2])
    figure = _figure(9.5, 0.9 + 0.34 * len(bars))
    axes = figure.subplots()
    for i, (_, name, ratio, eager) in enumerate(bars):
        if eager:
            axes.barh(i, eager - 1, left=1, height=0.72, color="#E3E3E3", label="over eager" if i == 0 else None)
        axes.barh(
            i, ratio - 1, left=1, height=0.42, color=COLORS["ours"], label="over the best other" if i == 0 else None
        )
        axes.annotate(
            f"{ratio:.2f}x {name}",
            (max(ratio, eager or 0), i),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_ylim(-0.8, len(bars) - 0.2)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    _plain_numbers(axes.xaxis)
    most = max(max(ratio, eager or 0) for _, _, ratio, eager in bars)
    axes.set_xticks([1 << i for i in range(12) if 1 << i <= 2 * most])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(0.9, 0.9 * bars[0][2]), 2.2 * most)
    axes.set_yticks(range(len(bars)), [case for case, *_ in bars], fontsize=8.5)
    axes.set_xlabel("speed-up of ours")
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower right", fontsize=8)
    caption = (
        "How many times as fast ours is: over the best of all others, who is named, and (grey) over eager PyTorch."
    )
    return Picture("ratios", "Ours against the others", caption, _png(figure))


def roofline(result: dict[str, Any]) -> Picture | None:
    rates = result["rates"]
    points = [
        (case, tables.timed(rows, "ours"), tables.best_others(rows)[:1])
        for case, rows in tables.grouped(result["rows"]).items()
        if tables.timed(rows, "ours")
    ]
    if not points:
        return None
    figure = _figure(9.5, max(3.8, 0.9 + 0.3 * len(points)))
    left, right = figure.subplots(1, 2, width_ratios=(1, 0.85))

    def reached(row: dict) -> tuple[float, float]:
        return row["floor_flop"] / row["floor_bytes"], 1e-6 * row["floor_flop"] / row["median_ms"]

    intensities = [reached(ours)[0] for _, ours, _ in points]
    top, slope = 1e-9 * rates["product_flop_per_s"], 1e-9 * rates["copy_bytes_per_s"]
    line = [min(*intensities, top / slope) / 2, top / slope, 2 * max(*intensities, top / slope)]
    left.plot(line, [min(top, slope * x) for x in line], color="black", linewidth=1.3, label="limit")
    for label, color, face, rows in (
        ("best other", "#0072B2", "white", [o[0] for _, _, o in points if o]),
        ("ours", COLORS["ours"], COLORS["ours"], [ours for _, ours, _ in points]),
    ):
        x, y = zip(*(reached(row) for row in rows), strict=True) if rows else ((), ())
        left.scatter(x, y, s=34, edgecolor=color, facecolor=face, label=label, zorder=3)
    left.set(xscale="log", yscale="log", xlabel="FLOP per byte of inputs and gradients", ylabel="useful GFLOP/s")
    left.set_title("Roofline", loc="left")
    for axis in (left.xaxis, left.yaxis):
        _plain_numbers(axis)
    left.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else ""))
    left.legend(fontsize=8, loc="best")

    for i, (_, ours, others) in enumerate(reversed(points)):
        right.barh(i, 100 * ours["of_floor"], height=0.7, color=COLORS["ours"])
        if others:
            right.plot(100 * others[0]["of_floor"], i, "|", color="#0072B2", markersize=11, markeredgewidth=2.5)
        right.annotate(
            f"{100 * ours['of_floor']:.0f}",
            (100 * ours["of_floor"], i),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    right.set_yticks(range(len(points)), [case for case, *_ in reversed(points)], fontsize=8)
    right.axvline(100, color="black", linewidth=1)
    right.set_xlim(0, 1.12 * max(100, *(100 * ours["of_floor"] for _, ours, _ in points)))
    right.set_title("Per cent of the limit", loc="left")
    right.grid(axis="y", visible=False)
    caption = (
        "The arithmetic that the best known scheme needs, a second, against the measured rates of products "
        f"({top:,.0f} GFLOP/s) and copies ({slope:,.0f} GB/s). Right: ours in bars, the best other as a blue stroke."
    )
    return Picture("roofline", "Roofline", caption, _png(figure))


def training(result: dict[str, Any]) -> Picture | None:
    steps = [row for row in (result.get("training") or {}).get("steps", ()) if "share" in row]
    if not steps:
        return None
    networks = list(dict.fromkeys(row["network"] for row in steps))
    figure = _figure(9.5, 3.3)
    for panel, network in zip(figure.subplots(1, len(networks), squeeze=False)[0], networks, strict=True):
        mine = [row for row in steps if row["network"] == network]
        n = sorted({row["N"] for row in mine})
        names = list(dict.fromkeys(row["implementation"] for row in mine))
        for i, name in enumerate(names):
            shares = {row["N"]: 100 * row["share"] for row in mine if row["implementation"] == name}
            at = [n.index(size) + (i - (len(names) - 1) / 2) * 0.2 for size in shares]
            bars = panel.bar(at, shares.values(), width=0.18, color=COLORS.get(name), label=name)
            panel.bar_label(bars, fmt="%.2g", fontsize=7, padding=1)
        panel.set_xticks(range(len(n)), [f"{size:,}" for size in n])
        panel.set(xlabel="embeddings N", ylabel="% of a step in the loss")
        panel.set_title(f"{network}, {mine[0]['op']}", loc="left")
        panel.grid(axis="x", visible=False)
    panel.legend(fontsize=8)
    caption = "Loss, forward and backward, as part of a training step: network forward and backward, optimizer, loss."
    return Picture("training", "What is left of a training step", caption, _png(figure))

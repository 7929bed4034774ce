"""Pictures of a run as PNG bytes: time and memory against N, ratios, the roofline, the loss's share of a step."""

from __future__ import annotations

from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes

from ltood_fast.eval.plots import STYLE

from . import tables
from .harness import OK
from .picture_style import LOOKS, figure_of, headline, label_ends, log_sizes, look, plain_numbers, png

LEAST_SIZES = 3  # of an op, to draw it against N
HERO = ("eager", "lightly", "compile-plain", "ours")
OURS, OTHER = LOOKS["ours"].color, "#0072B2"


class Picture(NamedTuple):
    name: str
    title: str
    caption: str
    png: bytes


def draw(result: dict[str, Any], source: str = "") -> list[Picture]:
    """Every picture that the run has rows for; `source` is written into the files."""
    with mpl.rc_context(STYLE):
        drawn = [picture(result, source) for picture in (sizes, ratios, roofline, training)]
    return [picture for picture in drawn if picture]


def setting(result: dict[str, Any], what: str) -> str:
    machine = result["machine"]
    threads = f"{machine['threads']} threads, " if machine.get("driver") is None else ""
    return f"{what}; {machine['device']}, {threads}torch {machine['torch']}, commit {result['commit'][:7]}"


def _series(rows: list[dict]) -> dict[str, list[dict]]:
    """Title -> the timed rows that differ in N and implementation alone, of at least LEAST_SIZES sizes."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        if row["status"] == OK:
            extra = "" if row["dtype"] == "float32" else f", {row['dtype']}"
            clusters = f", K = {row['K']}" if row.get("K") else ""
            found.setdefault(f"{row['op']}, {row['direction']}, D = {row['D']}{clusters}{extra}", []).append(row)
    return {title: group for title, group in found.items() if len({row["N"] for row in group}) >= LEAST_SIZES}


def _lines(rows: list[dict], names: list[str], time: Axes, memory: Axes) -> None:
    n = sorted({row["N"] for row in rows})
    for axes, value, title in ((time, "median_ms", "time, ms"), (memory, "peak_mib", "peak memory, MiB")):
        ends = []
        for name in names:
            mine = sorted((row for row in rows if row["implementation"] == name), key=lambda row: row["N"])
            x, y, style = [row["N"] for row in mine], [max(row[value], 0.1) for row in mine], look(name)
            axes.plot(x, y, color=style.color, marker=style.marker, markersize=5, linewidth=style.width)
            label = style.label if "compile" in names else style.label.split(",")[0]  # of the two, one alone is drawn
            ends.append((x[-1], y[-1], label, style.color))
        log_sizes(axes, n, room=9 if len(names) > len(HERO) else 5.5)
        label_ends(axes, ends, gap=0.055 if len(names) > len(HERO) else 0.075)
        axes.set_xlabel("batch of N embeddings")
        axes.set_title(title, loc="left")
        axes.tick_params(axis="x", labelrotation=30)


def hero(result: dict[str, Any], source: str = "") -> Picture:
    """nt_xent against eager PyTorch, the best of torch.compile, and a library."""
    rows = [
        row
        for row in _series(result["rows"])["nt_xent, forward+backward, D = 128"]
        if row["implementation"] in HERO and row["N"] >= 1024
    ]
    largest = max(row["N"] for row in rows)
    at = {row["implementation"]: row for row in rows if row["N"] == largest}
    times = at["compile-plain"]["median_ms"] / at["ours"]["median_ms"]
    part = 100 * at["ours"]["peak_mib"] / at["compile-plain"]["peak_mib"]
    finding = f"NT-Xent at N = {largest:,}: {times:.1f} times as fast as torch.compile, in {part:.0f} % of its memory"
    with mpl.rc_context(STYLE):
        figure = figure_of(9.5, 3.9)
        _lines(rows, list(HERO), *figure.subplots(1, 2))
        headline(figure, finding, setting(result, "forward + backward, D = 128, float32, medians"))
        return Picture("hero", finding, "Time and memory of NT-Xent against the batch.", png(figure, source))


def sizes(result: dict[str, Any], source: str) -> Picture | None:
    series = _series(result["rows"])
    if not series:
        return None
    figure = figure_of(9.5, 0.6 + 4.2 * len(series))
    panels = figure.subplots(len(series), 2, squeeze=False)
    for (title, rows), (left, right) in zip(series.items(), panels, strict=True):
        names = sorted({row["implementation"] for row in rows}, key=lambda name: (name == "ours", name))
        _lines(rows, names, left, right)
        left.plot(
            *zip(*sorted({(row["N"], row["floor_ms"]) for row in rows}), strict=True), color="black", linestyle=":"
        )
        left.set_title(f"{title}\ntime, ms (dotted: the floor)", loc="left")
    finding = _least_from([row for rows in series.values() for row in rows])
    headline(figure, finding, setting(result, "one call, medians"))
    caption = "Median time and peak extra memory of one call against the number of embeddings. Dotted: the floor."
    return Picture("sizes", "Time and memory against N", caption, png(figure, source))


def _least_from(rows: list[dict]) -> str:
    """The finding: from which N on ltood_fast is fastest and smallest in all of these rows."""
    least = None
    for n in sorted({row["N"] for row in rows}, reverse=True):
        for op in {row["op"] for row in rows if row["N"] == n}:
            at = [row for row in rows if row["op"] == op and row["N"] == n]
            ours = next((row for row in at if row["implementation"] == "ours"), None)
            if ours is None or any(ours[key] > row[key] for row in at for key in ("median_ms", "peak_mib")):
                return (
                    f"From N = {least:,} on ltood_fast is fastest, in the least memory" if least else "Time and memory"
                )
        least = n
    return "ltood_fast is fastest, in the least memory, at every N"


def ratios(result: dict[str, Any], source: str) -> Picture | None:
    groups = tables.grouped(result["rows"])
    bars = []
    for case, rows in groups.items():
        ours, others = tables.timed(rows, "ours"), tables.best_others(rows)
        if ours and others:
            bars.append((case, look(others[0]["implementation"]).label, ours["vs_best_rival"], ours.get("vs_eager")))
    if not bars:
        return None
    bars.sort(key=lambda bar: bar[2])
    figure = figure_of(9.5, 1.5 + 0.34 * len(bars))
    axes = figure.subplots()
    for i, (_, name, ratio, eager) in enumerate(bars):
        if eager:
            axes.barh(i, eager - 1, left=1, height=0.72, color="#E3E3E3", label="over eager" if i == 0 else None)
        label = "over the best other" if i == 0 else None
        axes.barh(i, ratio - 1, left=1, height=0.42, color=OURS, label=label)
        x = max(ratio, eager or 0)
        axes.annotate(f"{ratio:.2f}x {name}", (x, i), (5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_ylim(-0.8, len(bars) - 0.2)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    plain_numbers(axes.xaxis)
    most = max(max(ratio, eager or 0) for _, _, ratio, eager in bars)
    axes.set_xticks([1 << i for i in range(12) if 1 << i <= 2 * most])
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes.set_xlim(min(0.9, 0.9 * bars[0][2]), 3.2 * most)
    axes.set_yticks(range(len(bars)), [case for case, *_ in bars], fontsize=8.5)
    axes.set_xlabel("times as fast")
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower right", fontsize=8)
    faster = sum(ratio > 1 for _, _, ratio, _ in bars)
    finding = f"ltood_fast is faster than the best other in {faster} of {len(bars)} cases"
    headline(figure, finding, setting(result, "forward + backward unless said"))
    caption = "How many times as fast ltood_fast is: over the best other, who is named, and (grey) over eager PyTorch."
    return Picture("ratios", "ltood_fast against the others", caption, png(figure, source))


def roofline(result: dict[str, Any], source: str) -> Picture | None:
    points = [
        (case, tables.timed(rows, "ours"), (tables.best_others(rows) or [None])[0])
        for case, rows in tables.grouped(result["rows"]).items()
        if tables.timed(rows, "ours")
    ]
    if not points:
        return None
    figure = figure_of(9.5, max(4.2, 1.5 + 0.3 * len(points)))
    left, right = figure.subplots(1, 2, width_ratios=(1, 0.85))
    _roof(left, points, 1e-9 * result["rates"]["product_flop_per_s"], 1e-9 * result["rates"]["copy_bytes_per_s"])
    _shares(right, points)
    half = sum(ours["of_floor"] > 0.5 for _, ours, _ in points)
    others = sum(other is not None and other["of_floor"] > 0.5 for *_, other in points)
    reached = f"ltood_fast in {half} of {len(points)} cases, the best other in {others}"
    finding = f"More than half of the machine's limit: {reached}"
    headline(figure, finding, setting(result, "float32 unless said"))
    caption = (
        "The arithmetic that the best known scheme needs, a second, against the measured rates of products and "
        "copies. Right: ltood_fast in bars, the best other as a blue stroke."
    )
    return Picture("roofline", "Share of the limit", caption, png(figure, source))


def _roof(axes: Axes, points: list[tuple[str, dict, dict | None]], top: float, slope: float) -> None:
    """Useful GFLOP/s against intensity, under the measured limits `top` (GFLOP/s) and `slope` (GB/s)."""

    def reached(row: dict) -> tuple[float, float]:
        return row["floor_flop"] / row["floor_bytes"], 1e-6 * row["floor_flop"] / row["median_ms"]

    intensities = [reached(ours)[0] for _, ours, _ in points]
    line = [min(*intensities, top / slope) / 2, top / slope, 2 * max(*intensities, top / slope)]
    axes.plot(line, [min(top, slope * x) for x in line], color="black", linewidth=1.3)
    roof = f"limit: {top:,.0f} GFLOP/s of products, {slope:,.0f} GB/s of copies"
    axes.annotate(roof, (line[2], top), (0, 5), textcoords="offset points", ha="right", fontsize=8)
    for label, color, face, marker, rows in (
        ("best other", OTHER, "white", "D", [other for *_, other in points if other]),
        ("ltood_fast", OURS, OURS, "o", [ours for _, ours, _ in points]),
    ):
        x, y = zip(*(reached(row) for row in rows), strict=True) if rows else ((), ())
        axes.scatter(x, y, s=34, edgecolor=color, facecolor=face, marker=marker, label=label, zorder=3)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of inputs and gradients")
    axes.set_title("useful GFLOP/s", loc="left")
    axes.set_ylim(top=1.35 * top)
    for axis in (axes.xaxis, axes.yaxis):
        plain_numbers(axis)
    axes.yaxis.set_minor_formatter(
        mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    )
    axes.legend(fontsize=8.5, loc="lower right")


def _shares(axes: Axes, points: list[tuple[str, dict, dict | None]]) -> None:
    for i, (_, ours, other) in enumerate(reversed(points)):
        axes.barh(i, 100 * ours["of_floor"], height=0.7, color=OURS)
        if other:
            axes.plot(100 * other["of_floor"], i, "|", color=OTHER, markersize=11, markeredgewidth=2.5)
        axes.annotate(f"{100 * ours['of_floor']:.0f}", (1.0, i), xycoords=("axes fraction", "data"), xytext=(4, 0),
                      textcoords="offset points", va="center", fontsize=8)  # fmt: skip
    axes.set_yticks(range(len(points)), [case for case, *_ in reversed(points)], fontsize=8)
    axes.axvline(100, color="black", linewidth=1)
    axes.set_xlim(0, 1.02 * max(100, *(100 * ours["of_floor"] for _, ours, _ in points)))
    axes.set_title("% of the limit (stroke: other)", loc="left")
    axes.grid(axis="y", visible=False)


def training(result: dict[str, Any], source: str) -> Picture | None:
    steps = [row for row in (result.get("training") or {}).get("steps", ()) if "share" in row]
    if not steps:
        return None
    networks = list(dict.fromkeys(row["network"] for row in steps))
    figure = figure_of(9.5, 3.9)
    for panel, network in zip(figure.subplots(1, len(networks), squeeze=False)[0], networks, strict=True):
        mine = [row for row in steps if row["network"] == network]
        n = sorted({row["N"] for row in mine})
        for name in dict.fromkeys(row["implementation"] for row in mine):
            line, style = (
                sorted((row for row in mine if row["implementation"] == name), key=lambda r: r["N"]),
                look(name),
            )
            x, y = [row["N"] for row in line], [100 * row["share"] for row in line]
            panel.plot(x, y, color=style.color, marker=style.marker, markersize=5, linewidth=style.width)
        log_sizes(panel, n, room=3.5)
        ends = [(r["N"], 100 * r["share"], look(r["implementation"])) for r in mine if r["N"] == n[-1]]
        label_ends(panel, [(x, y, f"{style.label} {y:.2g}", style.color) for x, y, style in ends], gap=0.075)
        panel.set(xlabel="embeddings N")
        panel.set_title(f"{network}, {mine[0]['op']}: % of a step", loc="left")
    most = max(100 * row["share"] for row in steps if row["implementation"] == steps[-1]["implementation"])
    name = look(steps[-1]["implementation"]).label
    finding = f"The network takes almost the whole step: the loss of {name} at most {most:.2g} %"
    headline(figure, finding, setting(result, "loss, forward and backward, in a training step"))
    caption = "Loss, forward and backward, as part of a training step: network forward and backward, optimizer, loss."
    return Picture("training", "Share of a training step", caption, png(figure, source))

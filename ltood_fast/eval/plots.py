"""Pictures of a run as PNG bytes. Colours are Okabe and Ito's, groups also differ in their markers.

Figures are made without pyplot: no window, no global state, no backend to choose.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor

from .groups import GROUPS, split_groups
from .results import Resampling, RunResults, StageResult

GROUP_COLORS = {"many": "#0072B2", "medium": "#009E73", "few": "#D55E00"}
GROUP_MARKERS = {"many": "o", "medium": "s", "few": "^"}
STAGE_COLORS = {"simclr": "#8C8C8C", "stage1": "#56B4E9", "stage2": "#0072B2", "joint": "#D55E00"}
PART_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MAX_NAMED_CLASSES = 20  # more names than this only cover each other
MAX_CLUSTERS = 16
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.dpi": 130,
}


class Picture(NamedTuple):
    name: str
    title: str
    caption: str
    alt: str
    png: bytes


def draw_pictures(results: RunResults) -> list[Picture]:
    """Every picture that the results have something to show for, in the order of the report."""
    drawn = []
    if results.stages and results.has_labels:
        drawn += [groups_picture(results), class_size_picture(results)]
    if results.resamplings:
        drawn.append(tailness_picture(results, results.resamplings[-1]))
    if any(stage.history for stage in results.stages):
        drawn.append(history_picture(results))
    if any(stage.test_features is not None for stage in results.stages):
        drawn.append(embedding_picture(results))
    for stage in (stage for stage in results.stages[-1:] if stage.without_labels is not None):
        drawn += [clusters_picture(stage), retrieval_picture(stage)]
    return drawn


def groups_picture(results: RunResults) -> Picture:
    """Bars: overall, Many, Medium and Few accuracy of the linear probe, the stages side by side."""
    keys = ("overall", *GROUPS)
    width = 0.8 / len(results.stages)
    top = min(1.2 * max([100 * (stage.probe[key] or 0.0) for stage in results.stages for key in keys]) + 5, 108)

    def draw() -> Figure:
        figure = Figure(figsize=(8.5, 3.8), layout="constrained")
        ax = figure.subplots()
        for i, stage in enumerate(results.stages):
            heights = [math.nan if stage.probe[key] is None else 100 * stage.probe[key] for key in keys]
            x = np.arange(len(keys)) + (i - (len(results.stages) - 1) / 2) * width
            std = "" if stage.probe["std"] is None else f" (std {100 * stage.probe['std']:.1f})"
            bars = ax.bar(x, heights, 0.92 * width, color=STAGE_COLORS[stage.name], label=stage.title + std)
            labels = ["" if math.isnan(height) else f"{height:.1f}" for height in heights]
            ax.bar_label(bars, labels, fontsize=8.5, padding=2)
        ax.set_xticks(np.arange(len(keys)), [key.capitalize() for key in keys])
        ax.set(ylabel="accuracy, linear probe (%)", ylim=(0, top), yticks=range(0, min(int(top), 100) + 1, 20))
        ax.grid(axis="x", visible=False)
        figure.legend(loc="outside upper center", ncols=len(results.stages))
        return figure

    said = "; ".join(
        f"{s.title}: " + ", ".join(f"{key} {_percent(s.probe[key])}" for key in keys) for s in results.stages
    )
    return Picture(
        "groups",
        "Accuracy of the groups",
        "Linear probe on frozen features, mean over the classes of each group. The lower the spread (std), the more "
        "balanced the features.",
        f"Bar chart of accuracy by group. {said}.",
        _png(draw),
    )


def class_size_picture(results: RunResults) -> Picture:
    """Points: accuracy of each class against its number of training images (log), a panel a stage."""
    groups = split_groups(results.class_counts, results.scheme)
    sizes = [max(n, 0.8) for n in results.class_counts]  # a class without training images still has a place
    known = [100 * a for stage in results.stages for a in stage.probe["per_class"] if a is not None]
    highest = min(10 * math.ceil(max(known, default=100.0) / 10) + 6, 106)
    lowest = max(10 * math.floor(min(known, default=0.0) / 10) - 10, -4)

    def draw() -> Figure:
        n = len(results.stages)
        figure = Figure(figsize=(max(4.2 * n, 6.0), 4.2), layout="constrained")
        axes = figure.subplots(1, n, sharex=True, sharey=True, squeeze=False)[0]
        for ax, stage in zip(axes, results.stages, strict=True):
            for group, classes in groups.items():
                _draw_class_group(ax, stage, group, classes, sizes, results)
            ax.set(
                xscale="log",
                title=stage.title,
                xlabel="training images of the class (log scale)",
                ylim=(lowest, highest),
            )
            ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.10g}"))
        axes[0].set_ylabel("accuracy, linear probe (%)")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(handles))
        return figure

    return Picture(
        "class_size",
        "Accuracy against class size",
        "Each point is a class; the line of a group is its mean. A falling line to the left is the price of the tail.",
        "Scatter plots, one for each stage, of class accuracy against the number of training images: "
        + "; ".join(
            f"{s.title} many {_percent(s.probe['many'])}, few {_percent(s.probe['few'])}" for s in results.stages
        )
        + ".",
        _png(draw),
    )


def _draw_class_group(
    ax: Axes, stage: StageResult, group: str, classes: list[int], sizes: list[float], results: RunResults
) -> None:
    tested = [c for c in classes if stage.probe["per_class"][c] is not None]
    if not tested:
        return
    x, y = [sizes[c] for c in tested], [100 * stage.probe["per_class"][c] for c in tested]
    color = GROUP_COLORS[group]
    ax.scatter(x, y, s=42, c=color, marker=GROUP_MARKERS[group], label=group.capitalize(), zorder=3, alpha=0.9)
    mean = 100 * stage.probe[group]
    ax.plot([min(x) / 1.15, max(x) * 1.15], [mean, mean], color=color, linewidth=1.6, alpha=0.6)
    if len(sizes) <= MAX_NAMED_CLASSES:
        for c, at_x, at_y in zip(tested, x, y, strict=True):
            ax.annotate(
                str(results.class_names[c]),
                (at_x, at_y),
                xytext=(0, 7 if at_y < 92 else -14),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color="#404040",
            )


def tailness_picture(results: RunResults, resampling: Resampling) -> Picture:
    """A row a cluster, sparsest first: tailness, who is in it, its budget, and the OOD images taken for it."""
    order = sorted(range(len(resampling.tailness)), key=lambda c: -_finite(resampling.tailness[c]))
    shown = order if len(order) <= MAX_CLUSTERS else order[: MAX_CLUSTERS // 2] + order[-MAX_CLUSTERS // 2 :]
    left_out = "" if shown is order else f" The {MAX_CLUSTERS // 2} sparsest and densest of {len(order)} are shown."

    def draw() -> Figure:
        cell = 0.52  # inches a row and a thumbnail
        thumbnails = resampling.thumbnails
        columns = max([len(row) for row in thumbnails], default=0) if thumbnails else 0
        widths = [1.7, 1.7, 1.7, cell * max(columns, 0.1), 1.7 if resampling.ood_classes else 0.1]
        height = cell * len(shown)
        size = (0.9 + sum(widths) + 0.8, height + 1.0)
        figure = Figure(figsize=size)
        grid = figure.add_gridspec(
            1, 5, width_ratios=widths, wspace=0.09, left=0.9 / size[0], right=0.99, top=1 - 0.55 / size[1],
            bottom=0.45 / size[1],
        )  # fmt: skip
        axes = [figure.add_subplot(grid[0, i]) for i in range(5)]
        _draw_cluster_bars(axes, results, resampling, shown)
        _draw_taken(axes[3], axes[4], resampling, shown, columns)
        for ax in axes:
            ax.set_ylim(len(shown) - 0.5, -0.5)
        return figure

    top = order[0]
    return Picture(
        "tailness",
        "Tailness of the clusters and the OOD images taken for them",
        f"Last re-sampling ({resampling.stage}, epoch {resampling.epoch}). Tailness is the mean distance (1 - cosine) "
        f"to the nearest neighbours; sparse clusters get more OOD images, those nearest to their centroid.{left_out}",
        f"A row for each of {len(shown)} clusters, sparsest first, with tailness, class groups, OOD budget and sample "
        f"images. The sparsest cluster has tailness {resampling.tailness[top]:.2g}, {resampling.cluster_sizes[top]} "
        f"images and a budget of {resampling.budget[top]} OOD images.",
        _png(draw),
    )


def _draw_cluster_bars(axes: list[Axes], results: RunResults, resampling: Resampling, shown: list[int]) -> None:
    rows = range(len(shown))
    tailness = [_finite(resampling.tailness[c], 0.0) for c in shown]
    bars = axes[0].barh(rows, tailness, 0.62, color="#7A4FA3")
    axes[0].bar_label(bars, [f"{t:.2g}" for t in tailness], fontsize=8.5, padding=2)
    axes[0].set(title="tailness", xlim=(0, 1.3 * max(max(tailness), 1e-6)))
    axes[0].set_yticks(rows, [f"cluster {c}" for c in shown], fontsize=9)

    left = np.zeros(len(shown))
    members = np.array(resampling.cluster_classes or np.array(resampling.cluster_sizes)[:, None])[shown]
    groups = split_groups(results.class_counts, results.scheme) if resampling.cluster_classes else {"": [0]}
    for group, classes in groups.items():
        counts = members[:, classes].sum(axis=1)
        axes[1].barh(rows, counts, 0.62, left=left, color=GROUP_COLORS.get(group, "#8C8C8C"), label=group.capitalize())
        left += counts
    axes[1].set(title="ID images", xlim=(0, 1.3 * max(left.max(), 1)))
    for row, count in enumerate(left):
        axes[1].text(count + 0.02 * left.max(), row, f"{int(count):,}", va="center", fontsize=8.5)
    if resampling.cluster_classes:
        axes[1].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, handlelength=0.8,
                       columnspacing=0.8, borderaxespad=1.2)  # fmt: skip

    budget = [resampling.budget[c] for c in shown]
    bars = axes[2].barh(rows, budget, 0.62, color="#E69F00")
    axes[2].bar_label(bars, [f"{b:,}" for b in budget], fontsize=8.5, padding=2)
    axes[2].set(title="OOD images taken", xlim=(0, 1.3 * max(max(budget), 1)))
    for i, ax in enumerate(axes[:3]):
        ax.xaxis.set_visible(False)
        ax.grid(visible=False)
        ax.spines["bottom"].set_visible(False)
        ax.tick_params(left=False, labelleft=i == 0)


def _draw_taken(ax: Axes, text_ax: Axes, resampling: Resampling, shown: list[int], columns: int) -> None:
    for empty in (ax, text_ax):
        empty.axis("off")
    if columns:
        ax.set_title("nearest of them")
        ax.set_xlim(-0.5, columns - 0.5)
        for row, c in enumerate(shown):
            for column, image in enumerate(resampling.thumbnails[c]):
                _draw_image(ax, image, column, row)
    if resampling.ood_classes:
        text_ax.set_title("their classes", loc="left")
        text_ax.set_xlim(0, 1)
        for row, c in enumerate(shown):
            names = [f"{_shortened(name)} {n}" for name, n in list(resampling.ood_classes[c].items())[:3]]
            text_ax.text(0.0, row, "\n".join(names), va="center", fontsize=8)


def history_picture(results: RunResults) -> Picture:
    """Lines: loss and its parts, and images per second, over the epochs of each stage."""
    stages = [stage for stage in results.stages if stage.history]

    def draw() -> Figure:
        figure = Figure(figsize=(max(4.2 * len(stages), 6.0), 5.0), layout="constrained")
        axes = figure.subplots(2, len(stages), squeeze=False, sharex="col", height_ratios=(2, 1))
        for (loss_ax, speed_ax), stage in zip(axes.T, stages, strict=True):
            epochs = [line["epoch"] for line in stage.history]
            _draw_losses(loss_ax, stage, epochs)
            speed = [_number(line.get("images_per_second")) for line in stage.history]
            speed_ax.plot(epochs, speed, color="#404040", **_line(len(epochs)))
            speed_ax.set(xlabel="epoch", ylim=(0, 1.15 * max([s for s in speed if math.isfinite(s)], default=1.0)))
            speed_ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            if len(epochs) == 1:
                speed_ax.set_xlim(epochs[0] - 0.5, epochs[0] + 0.5)
            times = [r.epoch for r in results.resamplings if r.stage == stage.name]
            for i, epoch in enumerate(times):
                label = "OOD re-sampled" if i == 0 else None
                loss_ax.axvline(epoch, color="#B0B0B0", linestyle=":", linewidth=1.2, label=label, zorder=1)
            loss_ax.set_title(stage.title)
            loss_ax.legend(fontsize=8.5)
        axes[0, 0].set_ylabel("loss (nats)")
        axes[1, 0].set_ylabel("images / s")
        return figure

    last = "; ".join(f"{s.title} {_number(s.history[-1].get('loss')):.3f}" for s in stages)
    return Picture(
        "history",
        "Loss and speed",
        "Mean loss of each epoch with its parts, and images per second.",
        f"Line charts of loss and images per second over the epochs. Last losses: {last}.",
        _png(draw),
    )


def _draw_losses(ax: Axes, stage: StageResult, epochs: list[int]) -> None:
    style = _line(len(epochs))
    total = [_number(line.get("loss")) for line in stage.history]
    ax.plot(epochs, total, color="black", label="loss", **style)
    parts = dict.fromkeys(name for line in stage.history for name in (line.get("parts") or {}))
    for i, name in enumerate(parts):
        values = [_number((line.get("parts") or {}).get(name)) for line in stage.history]
        color = PART_COLORS[i % len(PART_COLORS)]
        ax.plot(epochs, values, color=color, label=name.replace("_", " "), **{**style, "linewidth": 1.2})


def _line(n_points: int) -> dict:
    """A single epoch is a dot, a few are dots on a line, many are a line."""
    return {"marker": "o" if n_points <= 15 else None, "markersize": 3.5, "linewidth": 1.8}


def embedding_picture(results: RunResults, *, method: str = "tsne", max_points: int = 1000, seed: int = 0) -> Picture:
    """The test embeddings of each stage in two dimensions, tail classes on top; without labels, coloured by cluster.

    Args:
        method: ``tsne`` (of the 50 leading principal components of the unit rows) or ``pca``.
        max_points: test images shown at most, the same number of each class, the same images for each stage.
        seed: of the map.
    """
    stages = [stage for stage in results.stages if stage.test_features is not None]

    def draw() -> Figure:
        figure = Figure(figsize=(max(4.4 * len(stages), 6.0), 4.8), layout="constrained")
        axes = figure.subplots(1, len(stages), squeeze=False)[0]
        for ax, stage in zip(axes, stages, strict=True):
            kept = _spread_over_classes(stage.test_labels, max_points)
            points = _in_two_dimensions(stage.test_features[kept], method, seed)
            labels = stage.test_labels[kept].numpy()
            if results.has_labels:
                _draw_groups(ax, points, labels, results)
            else:
                ax.scatter(*points.T, s=14, alpha=0.7, c=labels, cmap="tab20", linewidths=0)
            ax.set(title=stage.title, xticks=[], yticks=[], xlabel=f"{_METHOD_NAMES[method]} 1")
            ax.grid(visible=False)
        axes[0].set_ylabel(f"{_METHOD_NAMES[method]} 2")
        if results.has_labels:
            handles, names = axes[0].get_legend_handles_labels()
            legend = figure.legend(handles, names, loc="outside upper center", ncols=3, markerscale=1.6)
            for handle in legend.legend_handles:
                handle.set_alpha(1.0)
        return figure

    shown, colours = (
        ("equally many images of each class, at most", "Many, Medium and Few")
        if results.has_labels
        else ("at most", "cluster")
    )
    tail = " Few classes are on top and named; balanced features keep them apart from the rest."
    more = tail if results.has_labels else ""
    return Picture(
        "embedding",
        "Map of the test embeddings",
        f"{_METHOD_NAMES[method]} of test features, {shown} {max_points:,}.{more} Axes have no unit.",
        f"Scatter plots of {len(stages)} stages: test images in two dimensions, coloured by {colours}.",
        _png(draw),
    )


def _draw_groups(ax: Axes, points: np.ndarray, labels: np.ndarray, results: RunResults) -> None:
    groups = split_groups(results.class_counts, results.scheme)
    group_of = {c: group for group, classes in groups.items() for c in classes}
    member = np.array([group_of[c] for c in labels])
    for group, size, alpha in (("many", 9, 0.30), ("medium", 11, 0.45), ("few", 20, 0.85)):
        inside = points[member == group]
        ax.scatter(*inside.T, s=size, alpha=alpha, c=GROUP_COLORS[group], marker=GROUP_MARKERS[group], linewidths=0,
                   label=group.capitalize())  # fmt: skip
    _name_classes(ax, points, labels, group_of, results)


def clusters_picture(stage: StageResult) -> Picture:
    """A row a cluster, largest first: the training images nearest to its centroid."""
    found = stage.without_labels
    rows, sizes = found.cluster_images[:MAX_CLUSTERS], found.cluster_sizes[:MAX_CLUSTERS]
    return Picture(
        "clusters",
        "Clusters of the training images",
        f"k-means clusters of the features of {stage.title}, largest first, each with the images nearest to its "
        "centroid.",
        f"A row for each of {len(rows)} clusters of {', '.join(map(str, sizes))} images.",
        _png(lambda: _thumbnail_rows(rows, [f"{size:,} images" for size in sizes])),
    )


def retrieval_picture(stage: StageResult) -> Picture:
    """A row a query: a test image and the training images nearest to it."""
    rows = stage.without_labels.retrieved
    return Picture(
        "retrieval",
        "Nearest training images of test images",
        f"Each row: a test image (left) and the training images nearest to it by the features of {stage.title}.",
        f"{len(rows)} rows of thumbnails: a test image and its nearest training images.",
        _png(lambda: _thumbnail_rows(rows, [f"test image {i + 1}" for i in range(len(rows))], gap=True)),
    )


def _thumbnail_rows(rows: list[Tensor], names: list[str], gap: bool = False) -> Figure:
    """Images side by side, named on the left; `gap` sets the first one of a row apart."""
    cell, columns = 0.72, max(map(len, rows)) + 0.4 * gap
    figure = Figure(figsize=(1.5 + cell * columns, cell * len(rows)), layout="constrained")
    ax = figure.subplots()
    for y, images in enumerate(rows):
        for i, image in enumerate(images):
            x = i + 0.4 * (gap and i > 0)
            _draw_image(ax, image, x, y)
    ax.set(xlim=(-0.5, columns - 0.5), ylim=(len(rows) - 0.5, -0.5), xticks=[])
    ax.set_yticks(range(len(rows)), names)
    ax.tick_params(left=False)
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return figure


def _draw_image(ax: Axes, image: Tensor, x: float, y: int) -> None:
    extent = (x - 0.46, x + 0.46, y + 0.46, y - 0.46)
    pixels = image.expand(3, -1, -1).permute(1, 2, 0).numpy()
    ax.imshow(pixels, extent=extent, aspect="auto", interpolation="nearest")


_METHOD_NAMES = {"tsne": "t-SNE", "pca": "PCA"}


def _name_classes(
    ax: Axes, points: np.ndarray, labels: np.ndarray, group_of: dict[int, str], results: RunResults
) -> None:
    few = [c for c in np.unique(labels) if group_of[c] == "few"]
    for c in few if len(few) <= MAX_NAMED_CLASSES // 2 else []:
        x, y = np.median(points[labels == c], axis=0)
        box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": GROUP_COLORS["few"], "alpha": 0.85}
        ax.text(x, y, str(results.class_names[c]), fontsize=9, ha="center", va="center", bbox=box, zorder=5)


def _spread_over_classes(labels: Tensor, max_points: int) -> Tensor:
    """Indices of at most max_points rows, evenly many of each class, in row order."""
    quota = max(max_points // len(labels.unique()), 1)
    order = labels.argsort(stable=True)
    counts = torch.bincount(labels)
    starts = counts.cumsum(0) - counts
    rank = torch.arange(len(labels)) - starts[labels[order]]  # how many rows of the class come before this one
    return order[rank < quota].sort().values


def _in_two_dimensions(features: Tensor, method: str, seed: int) -> np.ndarray:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    rows = F.normalize(features.float(), dim=1).numpy()
    if method == "pca" or len(rows) < 5:
        return PCA(2, random_state=seed).fit_transform(rows)
    leading = PCA(min(50, *rows.shape), random_state=seed).fit_transform(rows)
    tsne = TSNE(2, perplexity=min(30, (len(rows) - 1) / 3), init="pca", random_state=seed)
    with threadpool_limits(
        1
    ):  # its short parallel loops wait for each other: 6 s on one thread, 38 s on two busy cores
        return tsne.fit_transform(leading)


def _png(draw: Callable[[], Figure]) -> bytes:
    with mpl.rc_context(STYLE):
        buffer = io.BytesIO()
        draw().savefig(buffer, format="png")
    return buffer.getvalue()


def _percent(fraction: float | None) -> str:
    return "unknown" if fraction is None else f"{100 * fraction:.1f} %"


def _finite(value: float, otherwise: float = -math.inf) -> float:
    return value if math.isfinite(value) else otherwise


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _shortened(name: str) -> str:
    return name if len(name) <= 22 else name[:21] + "…"

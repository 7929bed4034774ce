"""Exact re-sampling against FAISS's inverted file as the OOD pool grows. Nothing is trained."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ..eval.plots import PART_COLORS
from ..eval.runs import spread
from .exact_vs_ivf import Setup, by_ivf, exact, make_data, row
from .outcomes import Outcomes
from .pictures import legend_above
from .spec import Experiment, Setting, Summary, Table
from .verdict import REFUTED, UNDECIDED, decide_all, estimate, say

CANDIDATES = (10_000, 30_000, 100_000, 300_000)
SETUP = Setup(id_rows=12_406, candidates=0, D=128, K=10, budget=5_000, lists=0, probes=(8, 128))
PLAIN = FuncFormatter(lambda value, _: f"{value:,.10g}")
ENOUGH = 0.95  # share of the exact choice that an approximate one must find to count
COLUMNS = {
    "total_s": "seconds",
    "tailness_s": "tailness (s)",
    "index_s": "index (s)",
    "search_s": "search (s)",
    "peak_mib": "peak memory (MiB)",
    "recall": "of the exact choice",
}

Rows = dict[tuple[int, str], list[dict[str, Any]]]
"""By candidates and method, one a seed."""


def measure(setting: Setting) -> Rows:
    """Every size and method once a seed, the methods in turn."""
    rows: Rows = {}
    for seed in setting.seeds:
        for n in CANDIDATES:
            setup = replace(SETUP, candidates=n, lists=round(2 * math.sqrt(n)), budget=min(SETUP.budget, n // 4))
            data = make_data(setup, seed)
            first, truth = row("exact", lambda spent, d=data, s=setup: exact(d, s, spent), None, setup.budget)
            rows.setdefault((n, "exact"), []).append(first)
            for probes in setup.probes:
                method = f"IVF, {probes} list{'s' * (probes > 1)} searched"
                found, _ = row(method, lambda spent, d=data, s=setup, p=probes: by_ivf(d, s, p, spent), truth,
                               setup.budget)  # fmt: skip
                rows.setdefault((n, method), []).append(found)
    return rows


def table(rows: Rows) -> Table:
    lines = []
    for (n, method), found in rows.items():
        cells = []
        for key in COLUMNS:
            mean = spread(line[key] for line in found).mean
            cells.append(f"{100 * mean:.1f} %" if key == "recall" else f"{mean:,.3g}" if mean < 100 else f"{mean:,.0f}")
        lines.append([f"{n:,}", method, str(len(found)), *cells])
    note = (
        f"One re-sampling of {SETUP.id_rows:,} ID rows of {SETUP.D} features, {SETUP.K} clusters and a budget of "
        f"{SETUP.budget:,} (a quarter of a small pool), synthetic; means over the seeds. The index is built for each, "
        "as embeddings change; its tailness comes from an inverted file too. Wall times: read ratios on a busy machine."
    )
    return Table("Time, memory and agreement", ["candidates", "method", "seeds", *COLUMNS.values()], lines, note)


def figure(rows: Rows) -> Figure:
    """Time and memory of each method against the number of candidates, and its agreement with the exact choice."""
    fig = Figure(figsize=(12.0, 4.2), layout="constrained")
    axes = fig.subplots(1, 3)
    methods = list(dict.fromkeys(method for _, method in rows))
    panels = {"total_s": "time (s)", "peak_mib": "peak memory (MiB)", "recall": "of the exact choice (%)"}
    for ax, (key, title) in zip(axes, panels.items(), strict=True):
        for i, method in enumerate(methods):
            sizes = [n for n, other in rows if other == method]
            found = [spread(line[key] for line in rows[n, method]) for n in sizes]
            scale = 100 if key == "recall" else 1
            ax.errorbar(sizes, [scale * s.mean for s in found], yerr=[scale * (s.std or 0) for s in found],
                        marker="o", markersize=4, color=PART_COLORS[i], label=method, capsize=2.5)  # fmt: skip
        ax.set(xscale="log", xlabel="candidates", ylabel=title)
        if key != "recall":
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter(PLAIN)
            ax.yaxis.set_minor_formatter(PLAIN)
        ax.xaxis.set_major_formatter(PLAIN)
    axes[2].set_ylim(0, 104)
    legend_above(fig, axes[0])
    return fig


def summarise(setting: Setting, outcomes: Outcomes) -> Summary:
    rows = measure(setting)
    largest = max(n for n, _ in rows)
    exact_s = [line["total_s"] for line in rows[largest, "exact"]]
    close = {
        method: [line["total_s"] for line in found]
        for (n, method), found in rows.items()
        if n == largest and method != "exact" and min(line["recall"] for line in found) >= ENOUGH
    }
    if close:
        best = min(close, key=lambda method: sum(close[method]))
        gains = [math.log(a / b) for a, b in zip(exact_s, close[best], strict=True)]
        ratio = sum(close[best]) / sum(exact_s)
        said = f"at {largest:,} candidates {best} takes {ratio:.2f} times as long as the exact way"
        verdict = say(decide_all([estimate(gains)])[0], len(gains), said)
    else:
        said = f"no inverted file finds {100 * ENOUGH:.0f} % of the exact choice at {largest:,} candidates"
        verdict = say(REFUTED if len(exact_s) > 1 else UNDECIDED, len(exact_s), said)
    listed = [{"candidates": n, **line} for (n, _), found in rows.items() for line in found]
    return Summary([table(rows)], lambda: figure(rows), verdict, {"sampler": listed})


SAMPLER_SCALING = Experiment(
    "sampler-scaling",
    "what does a re-sampling cost as the OOD pool grows, exactly and through FAISS?",
    "Sampling from a large OOD set wants approximate nearest neighbours [paper]: they save "
    f"time and keep at least {100 * ENOUGH:.0f} % of the choice [ltood_fast].",
    lambda setting: [],
    summarise,
    "Nothing is trained; the exact way is the measure of the others.",
)

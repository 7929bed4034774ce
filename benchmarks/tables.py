"""A run as tables: for Markdown and for the report."""

from __future__ import annotations

from typing import Any, NamedTuple

from .harness import OK


class Table(NamedTuple):
    header: list[str]
    lines: list[list[str]]

    def markdown(self) -> str:
        rows = (self.header, ["---"] * len(self.header), *self.lines)
        return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def grouped(rows: list[dict]) -> dict[str, list[dict]]:
    """case -> its rows, in the order of the run."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["case"], []).append(row)
    return groups


def best_others(rows: list[dict]) -> list[dict]:
    """The timed rows of a case that are not ours, the fastest first."""
    return sorted(
        (row for row in rows if row["status"] == OK and row["kind"] != "ours"), key=lambda row: row["median_ms"]
    )


def timed(rows: list[dict], name: str) -> dict | None:
    return next((row for row in rows if row["implementation"] == name and row["status"] == OK), None)


def number(value: float | None, unit: str = "", digits: int = 3) -> str:
    """So many significant digits, never in scientific notation; empty for None."""
    if value is None:
        return ""
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:,.{max(0, digits - whole)}f}{unit}"


def per_cent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def shown(name: str) -> str:
    """An implementation's name in the tables."""
    return "ltood_fast" if name == "ours" else name


def cells(row: dict) -> list[str]:
    """One row of a case's table."""
    if row["status"] != OK:
        return [shown(row["implementation"]), f"{row['status']}: {row['message']}", *[""] * 6]
    return [
        shown(row["implementation"]),
        number(row["median_ms"]),
        f"{number(row['p10_ms'])} – {number(row['p90_ms'])}",
        number(row["peak_mib"], digits=2),
        number(row.get("vs_eager"), "x"),
        number(row.get("vs_best_rival"), "x"),
        per_cent(row.get("of_floor")),
        f"{row['error']:.0e}",
    ]


def full(result: dict[str, Any]) -> dict[str, Table]:
    """A table a case with everything that was measured; its title names the floor."""
    header = ["implementation", "ms", "p10 – p90", "MiB", "over eager", "over the best other", "of floor", "error"]
    return {
        f"{case}, floor {number(rows[0].get('floor_ms'))} ms": Table(header, [cells(row) for row in rows])
        for case, rows in grouped(result["rows"]).items()
    }


def summary(result: dict[str, Any]) -> Table:
    """A line a case: ltood_fast, eager, the two best others."""

    def time(row: dict | None, name: bool = False) -> str:
        if row is None:
            return "–"
        label = f"{row['implementation']} " if name else ""
        return f"{label}{number(row['median_ms'])} ({number(row['peak_mib'], digits=2)})"

    lines = []
    for case, rows in grouped(result["rows"]).items():
        ours = timed(rows, "ours")
        others = ", ".join(time(row, name=True) for row in best_others(rows)[:2]) or "–"
        ratio, part = (number(ours.get("vs_best_rival"), "x"), per_cent(ours.get("of_floor"))) if ours else ("–", "–")
        lines.append([case, time(ours), ratio, part, time(timed(rows, "eager")), others])
    return Table(
        ["case", "ltood_fast: ms (MiB)", "times as fast", "of floor", "eager: ms (MiB)", "two best others: ms (MiB)"],
        lines,
    )


def problems(result: dict[str, Any]) -> list[str]:
    """What was not timed, and why."""
    seen: dict[tuple, list[str]] = {}
    for row in result["rows"]:
        if row["status"] != OK:
            seen.setdefault((row["implementation"], row["status"], row["message"]), []).append(row["case"])
    return [f"{name}, {status}: {text} ({', '.join(cases)})" for (name, status, text), cases in seen.items()]


def _failed(row: dict) -> str:
    return f"{row['status']}: {row['message']}"


def training(result: dict[str, Any]) -> tuple[Table, list[str]] | None:
    """(share of a step, largest batches)."""
    part = result.get("training")
    if not part:
        return None
    lines = []
    for row in part["steps"]:
        network = [row["network"], f"{row['N']:,}", number(row.get("network_ms"))]
        if "implementation" not in row:
            lines.append([*network[:2], _failed(row), "", "", ""])
            continue
        loss = number(row["loss_ms"]) if "loss_ms" in row else _failed(row)
        share = number(100 * row["share"], " %", digits=2) if "share" in row else ""
        lines.append([*network, f"{row['op']}, {shown(row['implementation'])}", loss, share])
    largest = [
        f"{row['op']}, {shown(row['implementation'])}: N = {row['N']:,} fits in {row['limit_gib']:g} GiB "
        f"(peak {number(row['peak_mib'])} MiB), {row['beyond']}"
        for row in part["largest"]
    ]
    return Table(["network", "N", "network: ms", "loss", "loss: ms", "share of the step"], lines), largest


def resampling(result: dict[str, Any]) -> Table | None:
    part = result.get("resampling")
    if not part:
        return None
    columns = ("tailness_s", "index_s", "search_s", "total_s", "peak_mib")
    lines = [
        [row["method"], _failed(row), *[""] * len(columns)]
        if "message" in row
        else [row["method"], f"{100 * row['recall']:.1f} %", *(number(row[name]) for name in columns)]
        for row in part["rows"]
    ]
    return Table(["method", "recall", "tailness: s", "index: s", "search: s", "total: s", "peak: MiB"], lines)


def text(result: dict[str, Any], short: bool) -> str:
    """The whole run in Markdown; short: a line a case."""
    if short:
        parts = [summary(result).markdown()]
    else:
        parts = [f"**{title}**\n\n{table.markdown()}" for title, table in full(result).items()]
    parts += ["\n".join(f"- {line}" for line in problems(result))]
    if steps := training(result):
        parts += [steps[0].markdown(), "\n".join(f"- {line}" for line in steps[1])]
    if rows := resampling(result):
        parts.append(rows.markdown())
    return "\n\n".join(filter(None, parts))

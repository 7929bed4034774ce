"""Two runs against each other: what became slower, larger or wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .harness import OK
from .results_file import key
from .tables import Table, number


@dataclass(frozen=True)
class Change:
    case: str
    implementation: str
    what: str
    """"time", "memory", "status", "gone" or "not run"."""
    before: float | str
    after: float | str
    regressed: bool

    @property
    def ratio(self) -> float | None:
        return self.after / self.before if isinstance(self.after, float) and self.before else None


def _ratio_changes(name: tuple[str, str], a: dict, b: dict, time: float, memory: float) -> list[Change]:
    changes = [Change(*name, "time", a["median_ms"], b["median_ms"], b["median_ms"] > time * a["median_ms"])]
    # A few pages more are no regression: below a MiB the resident set's grain decides.
    larger = b["peak_mib"] > memory * a["peak_mib"] and b["peak_mib"] > a["peak_mib"] + 1
    return [*changes, Change(*name, "memory", float(a["peak_mib"]), float(b["peak_mib"]), larger)]


def compare(before: dict[str, Any], after: dict[str, Any], time: float = 1.1, memory: float = 1.2) -> list[Change]:
    """Every row of `before`, found again in `after` by case and implementation.

    A ratio after / before above `time` (of medians) or `memory` (of peaks) is a regression, and so is a row that was
    timed before and is now wrong, failed, missing, or gone from its case. A case that the second run left out
    (`--quick`, `--only`) is listed, and is none.
    """
    rows = {key(row): row for row in after["rows"]}
    cases = {name[:-1] for name in rows}
    changes = []
    for a in before["rows"]:
        if a["status"] != OK:
            continue
        name, b = (a["case"], a["implementation"]), rows.get(key(a))
        if b is None and key(a)[:-1] not in cases:
            changes.append(Change(*name, "not run", OK, "not in the second run", False))
        elif b is None:
            changes.append(Change(*name, "gone", OK, "not in the second run", True))
        elif b["status"] != OK:
            changes.append(Change(*name, "status", OK, f"{b['status']}: {b['message']}", True))
        else:
            changes += _ratio_changes(name, a, b, time, memory)
    return changes


def different_machines(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """A warning where ratios say more about the machines than about the code."""
    fields = [
        n for n in ("device", "threads", "torch", "driver") if before["machine"].get(n) != after["machine"].get(n)
    ]
    pairs = [f"{n} {before['machine'].get(n)} and {after['machine'].get(n)}" for n in fields]
    return f"the runs differ in {'; '.join(pairs)}" if fields else None


def table(changes: list[Change]) -> str:
    lines = []
    for change in sorted(changes, key=lambda c: (not c.regressed, c.case)):
        values = [number(v) if isinstance(v, float) else v for v in (change.before, change.after)]
        verdict = "REGRESSION" if change.regressed else ""
        lines.append([change.case, change.implementation, change.what, *values, number(change.ratio, "x"), verdict])
    return Table(["case", "implementation", "what", "before", "after", "ratio", ""], lines).markdown()

"""python -m benchmarks table results.json: pytest-benchmark's JSON as one Markdown table with ratios."""

import argparse
import json
from pathlib import Path

from benchmarks.registry import floor_seconds


def table(path: Path) -> str:
    """One line a case and direction: median time and peak memory of each implementation, ours against the best,
    and the part of our time that our products alone would take at the measured rate of sgemm."""
    groups: dict[str, dict[str, dict]] = {}
    for row in json.loads(path.read_text())["benchmarks"]:
        groups.setdefault(row["group"], {})[row["extra_info"]["implementation"]] = row
    lines = ["| case | rivals: ms (MiB) | ours: ms (MiB) | best rival / ours | products |", "|---|---|---|---|---|"]
    for group, rows in groups.items():
        cells = {n: (1e3 * r["stats"]["median"], r["extra_info"]["peak_mib"]) for n, r in rows.items()}
        ours = cells.pop("ours")
        rivals = ", ".join(f"{name} {time:.1f} ({mib:.0f})" for name, (time, mib) in cells.items())
        ratio = min(time for time, _ in cells.values()) / ours[0]
        info = rows["ours"]["extra_info"]
        floor = floor_seconds(info["op"], info["direction"], info, 1e9 * info["sgemm_gflop_per_s"])
        products = f"{100 * floor / rows['ours']['stats']['median']:.0f} %"
        lines.append(f"| {group} | {rivals} | {ours[0]:.1f} ({ours[1]:.0f}) | {ratio:.2f}x | {products} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("table", help="pytest-benchmark's JSON as a Markdown table")
    show.add_argument("json", type=Path)
    print(table(parser.parse_args().json))


if __name__ == "__main__":
    main()

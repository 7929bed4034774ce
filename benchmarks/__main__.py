"""python -m benchmarks table results.json: pytest-benchmark's JSON as one Markdown table with ratios."""

import argparse
import json
from pathlib import Path


def table(path: Path) -> str:
    """One line a case and direction: median time and peak memory of each implementation, and ours against the best."""
    groups: dict[str, dict[str, dict]] = {}
    for row in json.loads(path.read_text())["benchmarks"]:
        groups.setdefault(row["group"], {})[row["extra_info"]["implementation"]] = row
    lines = ["| case | rivals: ms (MiB) | ours: ms (MiB) | best rival / ours |", "|---|---|---|---|"]
    for group, rows in groups.items():
        cells = {n: (1e3 * r["stats"]["median"], r["extra_info"]["peak_mib"]) for n, r in rows.items()}
        ours = cells.pop("ours")
        rivals = ", ".join(f"{name} {time:.1f} ({mib:.0f})" for name, (time, mib) in cells.items())
        ratio = min(time for time, _ in cells.values()) / ours[0]
        lines.append(f"| {group} | {rivals} | {ours[0]:.1f} ({ours[1]:.0f}) | {ratio:.2f}x |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("table", help="pytest-benchmark's JSON as a Markdown table")
    show.add_argument("json", type=Path)
    print(table(parser.parse_args().json))


if __name__ == "__main__":
    main()

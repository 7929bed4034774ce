"""The command line of the benchmarks: see `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import re
import sys
from functools import partial
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
PARTS = ("ops", "training", "resampling")


def _run(arguments: argparse.Namespace) -> int:
    from . import results_file, tables
    from .machine import device_name
    from .run import run

    output = arguments.output
    if output is None:
        device = re.sub(r"[^a-z0-9]+", "-", device_name(arguments.device).lower()).strip("-")
        threads = f"-{arguments.threads}-threads" if arguments.device == "cpu" else ""
        output = arguments.results / f"{device}{threads}{'-quick' if arguments.quick else ''}.json"
    result = run(
        arguments.device,
        quick=arguments.quick,
        parts=tuple(arguments.parts),
        threads=arguments.threads,
        seconds=arguments.seconds,
        only=arguments.only,
        save=partial(results_file.write, output),
    )
    print(f"\n{tables.text(result, short=True)}\n\nwritten to {output}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from . import compare, results_file

    before, after = results_file.read(arguments.before), results_file.read(arguments.after)
    if warning := compare.different_machines(before, after):
        print(f"warning: {warning}", file=sys.stderr)
    changes = compare.compare(before, after, arguments.time, arguments.memory)
    print(compare.table(changes))
    regressions = sum(change.regressed for change in changes)
    compared = sum(change.what != "not run" for change in changes)
    print(f"\n{regressions} regression{'' if regressions == 1 else 's'} in {compared} comparisons")
    return 1 if regressions else 0


def _plot(arguments: argparse.Namespace) -> int:
    from . import plots, results_file

    folder = arguments.output or arguments.json.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for picture in plots.draw(results_file.read(arguments.json)):
        path = folder / f"{picture.name}.png"
        path.write_bytes(picture.png)
        print(path)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from . import report, results_file

    output = arguments.output or arguments.json.with_suffix(".html")
    output.write_text(report.page(results_file.read(arguments.json)), encoding="utf-8")
    print(output)
    return 0


def _table(arguments: argparse.Namespace) -> int:
    from . import results_file, tables

    print(tables.text(results_file.read(arguments.json), arguments.summary))
    return 0


def parser() -> argparse.ArgumentParser:
    from . import autotune, documents, gpu_check, pipeline, profile, scaling, static_cost

    top = argparse.ArgumentParser(prog="python -m benchmarks", description="ltood_fast's ops against everybody else's.")
    commands = top.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="check and time every implementation, write one JSON")
    run.set_defaults(function=_run)
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    run.add_argument("--quick", action="store_true", help="small sizes: two minutes on two cores")
    run.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    run.add_argument("--only", help="only cases whose name contains this")
    run.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    run.add_argument("--seconds", type=float, help="spent on the rounds of a row (default 0.6, quick 0.2)")
    run.add_argument("--results", type=Path, default=RESULTS, help="folder of <device>.json")
    run.add_argument("--output", type=Path, help="the JSON itself")

    compare = commands.add_parser("compare", help="two runs: regressions by ratio; exit status 1 if there is one")
    compare.set_defaults(function=_compare)
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    compare.add_argument("--time", type=float, default=1.1, help="ratio of medians that is a regression (default 1.1)")
    compare.add_argument("--memory", type=float, default=1.2, help="ratio of peaks that is one (default 1.2)")

    for name, function, about, output in (
        ("plot", _plot, "pictures of a run", "folder of the PNG files (default: beside the JSON)"),
        ("report", _report, "one HTML page with everything in it", "the page (default: beside the JSON)"),
        ("table", _table, "Markdown tables of a run", None),
    ):
        command = commands.add_parser(name, help=about)
        command.set_defaults(function=function)
        command.add_argument("json", type=Path)
        if output:
            command.add_argument("--output", type=Path, help=output)
        else:
            command.add_argument("--summary", action="store_true", help="a line a case")

    scaling.add_parser(commands)
    pipeline.add_parser(commands)
    autotune.add_parser(commands)
    profile.add_parser(commands)
    documents.add_parser(commands)
    static_cost.add_parser(commands)
    gpu_check.add_parser(commands)
    return top


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        return arguments.function(arguments)
    except ValueError as error:
        print(f"python -m benchmarks {arguments.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

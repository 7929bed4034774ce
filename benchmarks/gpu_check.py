"""A device in steps of less than ten minutes: ``python -m benchmarks gpu-check STEP``.

No step stops at a failure. Each command is a process of its own with a limit of its own: an illegal access ends a
process, and a kernel that hangs must not take the rest with it. After every command the step's JSON is written again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KILL_AFTER = 5  # seconds between the request to end and the end
TAIL = 4_000  # characters of a command's output that are kept
TESTS, DEVICE_TESTS = "python_tests/ops", "python_tests/ops/test_cuda_device.py"
SMALL = f"{DEVICE_TESTS} -k 'same_bits and bfloat16'"
LARGE = "large or million or memory_at"
BENCHMARK = "{python} -m benchmarks run --device cuda --quick --output {results}/PATH.json"
SANITIZE = (
    "PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool TOOL --error-exitcode 1 {python} -m pytest -q " + SMALL
)
CONFORMANCE = (
    "nvcc -std=c++17 -DLTOOD_DUMP_MAIN -DLTOOD_HOPPER -gencode=arch=compute_90a,code=sm_90a -Icsrc "
    "python_tests/ptxsim/conformance.cu -o build/conformance"
)


@dataclass(frozen=True)
class Command:
    name: str
    line: str
    seconds: int
    path: str | None = None  # LTOOD_CUDA_PATH


@dataclass
class Outcome:
    name: str
    line: str
    status: int
    """Exit status; 124 and 137: it ran past its limit."""
    seconds: float
    tail: str = field(repr=False)


def pytest_line(what: str, workers: int, each: int) -> str:
    """A pytest command; parallel and with a limit for each test where the plugins are installed."""
    options = f" -n {workers} --dist loadfile" if workers > 1 and find_spec("xdist") else ""
    if find_spec("pytest_timeout"):
        options += f" --timeout {each} --timeout-method thread"
    return f"{{python}} -m pytest -q -m cuda --durations=10{options} {what}"


def steps() -> dict[int, list[Command]]:
    sanitizers = [
        Command(f"{tool} {path}", SANITIZE.replace("TOOL", tool), seconds, path)
        for tool, seconds in (("memcheck", 100), ("synccheck", 60), ("racecheck", 60), ("initcheck", 40))
        for path in ("sm90", "sm80")
    ]
    return {
        1: [
            Command("build", "{python} setup.py -q build_ext --inplace", 290),
            Command("info", "{python} -m ltood_fast info", 20),
            Command("one test", pytest_line(f"{SMALL} --maxfail=1", 1, 60), 90),
            Command("conformance: build", CONFORMANCE, 60),
            Command("conformance: dump", "build/conformance {results}/conformance.bin", 20),
            Command("conformance", "{python} -m ptxsim.conformance compare {results}/conformance.bin", 90),
        ],
        2: [Command("tests sm80", pytest_line(f"{TESTS} -k 'not ({LARGE})'", 6, 90), 500, "sm80")],
        3: [Command("tests sm90", pytest_line(f"{TESTS} -k 'not ({LARGE})'", 4, 60), 500, "sm90")],
        4: [
            Command(f"large {path}", pytest_line(f"{DEVICE_TESTS} -k '{LARGE}'", 1, 120), 280, path)
            for path in ("sm80", "sm90")
        ],
        5: sanitizers,
        6: [Command(f"benchmark {path}", BENCHMARK.replace("PATH", path), 280, path) for path in ("sm80", "sm90")],
    }


def _execute(command: Command, results: Path) -> Outcome:
    line = command.line.format(python=shlex.quote(sys.executable), results=shlex.quote(str(results)))
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT / 'python_tests'}", LTOOD_CUDA="1")
    environment.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    toolkit = Path(environment.get("CUDA_HOME", "/usr/local/cuda")) / "bin"  # where setup.py looks for nvcc, too
    environment["PATH"] = f"{environment.get('PATH', '')}:{toolkit}"
    if command.path:
        environment["LTOOD_CUDA_PATH"] = command.path
    bounded = ["timeout", "-k", str(KILL_AFTER), str(command.seconds), "bash", "-c", line]
    start = time.monotonic()
    done = subprocess.run(
        bounded, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace"
    )
    return Outcome(command.name, line, done.returncode, round(time.monotonic() - start, 1), done.stdout[-TAIL:])


def table(outcomes: list[Outcome]) -> str:
    lines = ["| command | result | seconds |", "| --- | --- | ---: |"]
    for outcome in outcomes:
        said = {0: "ok", 124: "timed out", 137: "timed out"}.get(outcome.status, f"failed ({outcome.status})")
        lines.append(f"| {outcome.name} | {said} | {outcome.seconds} |")
    return "\n".join(lines)


def run_step(
    number: int,
    commands: list[Command],
    results: Path,
    execute: Callable[[Command, Path], Outcome] = _execute,
) -> list[Outcome]:
    """Runs every command, whatever the others did."""
    results.mkdir(parents=True, exist_ok=True)
    (ROOT / "build").mkdir(exist_ok=True)
    outcomes: list[Outcome] = []
    for command in commands:
        print(f"{command.name} ...", flush=True)
        outcomes.append(execute(command, results))
        text = json.dumps({"step": number, "commands": [asdict(outcome) for outcome in outcomes]}, indent=1)
        (results / f"step-{number}.json").write_text(text + "\n", encoding="utf-8")
    return outcomes


def run(arguments: argparse.Namespace) -> int:
    plan = steps()[arguments.step]
    if arguments.list:
        print("\n".join(f"{c.seconds:4d} s  {c.path or '':4s}  {c.line}" for c in plan))
        return 0
    outcomes = run_step(arguments.step, plan, arguments.results)
    print("\n".join(f"\n--- {o.name}\n{o.tail}" for o in outcomes if o.status))
    print(table(outcomes))
    return 1 if any(outcome.status for outcome in outcomes) else 0


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("gpu-check", help="one of six steps that a machine with a GPU can add: make gpu-1 ...")
    parser.set_defaults(function=run)
    parser.add_argument("step", type=int, choices=sorted(steps()))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/gpu", help="folder of the JSON")
    parser.add_argument("--list", action="store_true", help="print the commands and their limits, run nothing")

"""The experiment `pairing` in a given time, in parts that resume: a plan from a measured rate, and one JSON a seed.

    python -m ltood_fast.experiments.timed --config cifar10_lt --output build/method --data.root /data ...

Each call measures (the first one), prints the plan and trains for at most `--part` seconds; the next call goes on. When
every run of a seed is done, `<output>/pairing_seed<k>.json` holds its numbers. Files of several days add up:

    python -m ltood_fast.experiments.timed --merge build/method/pairing_seed*.json --output benchmarks/results/pairing
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import _files
from ..cli import Parser, parse_overrides, parse_seeds, positive, some_path, whole_number
from ..eval.results import to_json
from ..train.config import Config, load_config
from .command import SCHEMA, Findings, numbers_of, summarise
from .grid import GridResult, TimeOverError, plan_runs, train_grid
from .outcomes import read_outcomes
from .pairing import PAIRING, variants
from .rejudge import rejudge
from .spec import ExperimentError, Setting, Variant

EPOCHS = {"simclr": 150, "stage1": 100, "stage2": 40}  # where the time allows them
STUDENT_COST = 1.35  # of an image of stage 2 against one of SimCLR: the guide's forward pass; a prediction
EVALUATION = 1.1  # share of all else that embedding, sampling and evaluation add; a prediction
SEED_KEYS = {"experiment", "preset", "overrides", "test_images", "variants", "seeds", "runs", "gpu", "cpu"}
RESAMPLINGS = 4  # choices of OOD images in a branch, as 100 epochs and T = 25


@dataclass(frozen=True)
class Plan:
    """The training of each seed, and how long it takes at the measured rate."""

    rate: float
    """Images a second, two views each, of SimCLR."""
    epochs: dict[str, int]
    share: float
    """Share of `EPOCHS` that the time allows."""
    seconds: dict[str, float]
    """Predicted, by variant."""

    @property
    def overrides(self) -> dict[str, str]:
        found = {f"{stage}.epochs": str(epochs) for stage, epochs in self.epochs.items()}
        every = max(1, -(-self.epochs["stage1"] // RESAMPLINGS))
        return found | {"stage1.resample_every": str(every), "stage1.warmup_epochs": "0"}

    def __str__(self) -> str:
        lines = [f"rate: {self.rate:,.0f} images/s (measured); epochs: {self.epochs}, {100 * self.share:.0f} % of "
                 f"{EPOCHS}"]  # fmt: skip
        lines += [f"  {name:24} {seconds:7.0f} s (predicted)" for name, seconds in self.seconds.items()]
        return "\n".join([*lines, f"  {'a seed':24} {sum(self.seconds.values()):7.0f} s (predicted)"])


def predicted(
    rate: float, epochs: dict[str, int], n_id: int, budget: int, listed: Sequence[Variant]
) -> dict[str, float]:
    """Seconds of each variant."""
    found = {}
    for variant in listed:
        stage = variant.stages[-1]
        images = n_id + (budget if variant.overrides.get("stage1.ood_strategy", "none") != "none" else 0)
        cost = STUDENT_COST if stage == "stage2" else 1.0
        found[variant.name] = EVALUATION * cost * epochs[stage] * images / rate
    return found


def make_plan(rate: float, seconds: float, n_id: int, budget: int, listed: Sequence[Variant]) -> Plan:
    """One seed within the time: all epochs shrink by one factor, none below 1."""
    whole = sum(predicted(rate, EPOCHS, n_id, budget, listed).values())
    share = min(1.0, seconds / whole)
    epochs = {stage: max(1, int(share * count)) for stage, count in EPOCHS.items()}
    return Plan(rate, epochs, share, predicted(rate, epochs, n_id, budget, listed))


def measure_rate(config: Config, seconds: float) -> tuple[float, int]:
    """(images a second, ID images): whole epochs of SimCLR for so long, the first of them not counted."""
    from tqdm import tqdm

    from ..train.loop import Stage
    from ..train.session import Session

    with tempfile.TemporaryDirectory() as folder:
        stage = Stage.open("simclr", Session.open(config, Path(folder)))
        bar = tqdm(disable=True)
        stage.train_epoch(bar)  # warms up
        images, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds or not images:
            images += stage.train_epoch(bar)["images"]
        return images / (time.perf_counter() - start), stage.session.n_id


def load_plan(setting: Setting, seconds: float, measure: float) -> Plan:
    """That of the output folder, made where there is none: all parts and seeds train the same."""
    path = setting.output / "plan.json"
    if path.is_file():
        try:
            return Plan(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ExperimentError(f"timed: {path} must be a plan of this command, got another file ({error})") from None
    config = load_config(setting.preset, {**setting.overrides, "stages": "simclr"})
    rate, n_id = measure_rate(config, measure)
    listed = PAIRING.with_control(variants(setting))
    plan = make_plan(rate, seconds, n_id, setting.config.stage1.budget, listed)
    path.parent.mkdir(parents=True, exist_ok=True)
    _files.write_atomic(path, json.dumps(vars(plan), indent=1).encode())
    return plan


def run_part(setting: Setting, plan: Plan, part: float) -> bool:
    """Trains for at most `part` seconds; whether every run is done. Writes the file of each seed that is.

    Raises:
        ExperimentError: a run failed.
    """
    planned = replace(setting, overrides={**plan.overrides, **setting.overrides})
    end = time.monotonic() + part
    for seed in setting.seeds:
        alone = replace(planned, seeds=(seed,))
        listed = PAIRING.variants(alone)
        runs = plan_runs(alone, PAIRING.with_control(listed))
        try:
            result = train_grid(alone, runs, until=end)
        except TimeOverError:
            return False
        if result.failures:
            failed = "; ".join(f"{name}/seed{s}: {why}" for (name, s), why in result.failures.items())
            raise ExperimentError(f"timed: every run must end, got {len(result.failures)} that did not ({failed})")
        _write_seed(alone, listed, runs, result)
    return True


def _write_seed(setting: Setting, listed: list[Variant], runs: list, result: GridResult) -> None:
    outcomes = read_outcomes(PAIRING.with_control(listed), result.reports)
    summary = summarise(PAIRING, setting, outcomes, listed)
    data = numbers_of(Findings(PAIRING, setting, runs, result, outcomes, summary))
    path = setting.output / f"pairing_seed{setting.seeds[0]}.json"
    _files.write_atomic(path, json.dumps(to_json(data), indent=1, allow_nan=False).encode())


def merge(paths: Sequence[Path], folder: Path) -> str:
    """One results.json of the files of single seeds, judged together; returns the verdict.

    Raises:
        ExperimentError: no file, one that is not of an experiment, a seed twice, or seeds of different configurations.
    """
    if not paths:
        raise ExperimentError("timed: merge must name at least one file, got none")
    files = [_read_seed(path) for path in paths]
    first, seeds = files[0], []
    for path, data in zip(paths, files, strict=True):
        for key in ("experiment", "preset", "overrides", "test_images"):
            if data[key] != first[key]:
                raise ExperimentError(f"timed: all files must have one {key}, got another in {path}")
        if _ways(data) != _ways(first):
            raise ExperimentError(f"timed: all files must have the same variants, got others in {path}")
        seeds += data["seeds"]
    if len(set(seeds)) < len(seeds):
        raise ExperimentError(f"timed: each seed must come once, got {sorted(seeds)}")
    merged = {**first, "seeds": sorted(seeds), "runs": [run for data in files for run in data["runs"]]}
    merged["machines"] = sorted({str(data["gpu"] or data["cpu"]) for data in files})
    folder.mkdir(parents=True, exist_ok=True)
    _files.write_atomic(folder / "results.json", json.dumps(merged, indent=1).encode())
    return rejudge(folder / "results.json").verdict.sentence


def _read_seed(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExperimentError(f"timed: {path} must be JSON of a seed, got another file ({error})") from None
    schema = data.get("schema") if isinstance(data, dict) else type(data).__name__
    if schema != SCHEMA or not data.keys() >= SEED_KEYS:
        raise ExperimentError(f"timed: {path} must be a file of {SCHEMA} with all keys of a seed, got {schema!r}")
    return data


def _ways(data: dict[str, Any]) -> dict[str, Any]:
    return {name: {k: v for k, v in saved.items() if k != "measures"} for name, saved in data["variants"].items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m ltood_fast.experiments.timed", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=some_path, required=True)
    parser.add_argument("--config", default="cifar10_lt", help="preset or YAML file (cifar10_lt)")
    parser.add_argument("--seeds", type=parse_seeds, default="0", help="commas between them (0)")
    parser.add_argument("--seconds", type=positive, default=1800, help="for a seed (1800)")
    parser.add_argument("--part", type=positive, default=540, help="seconds of this call (540)")
    parser.add_argument("--measure", type=positive, default=20, help="seconds of the measurement (20)")
    parser.add_argument("--jobs", type=whole_number(1), default=1, help="runs at a time (1)")
    parser.add_argument("--merge", type=some_path, nargs="+", help="files of single seeds, to be judged together")
    try:
        args, rest = parser.parse_known_args(argv)
        if args.output.exists() and not args.output.is_dir():
            raise ValueError(f"timed: --output must be a folder, got the file {args.output}")
        if args.merge:
            print(merge(args.merge, args.output))
            return 0
        setting = Setting(args.config, args.output, args.seeds, args.jobs, parse_overrides(rest))
        start = time.monotonic()
        plan = load_plan(setting, args.seconds, args.measure)
        print(plan, flush=True)
        done = run_part(setting, plan, args.part - (time.monotonic() - start))
    except (ExperimentError, ValueError, RuntimeError, OSError) as error:
        print(f"ltood: error: {error}", file=sys.stderr)
        return 2
    print("every run is done" if done else "the time of this part is over; the same command goes on")
    return 0


if __name__ == "__main__":
    sys.exit(main())

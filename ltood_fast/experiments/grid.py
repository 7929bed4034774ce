"""The grid: every variant at every seed as an ordinary `ltood train` run in a folder and a process of its own.

`<output>/runs/<variant>/seed<k>/` is the run, `seed<k>.log` next to it is its output. A run is done when its
report.json is there, of the same configuration; experiments that share an output folder share its runs. A lock that the
training process inherits keeps a second grid, or one that was killed and started again, from training a run twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from .._signals import sigterm_raises
from ..eval.runs import read_report
from ..train.config import Config, differing_keys, load_config, to_dict
from ..train.run import begun_stages
from .spec import ExperimentError, Setting, Variant

SET_BY_THE_GRID = ("seed", "stages", "stage1.init_from", "stage2.guide")
POLL_SECONDS = 0.2
PACKAGE_ROOT = Path(__file__).resolve().parents[2]

RunKey = tuple[str, int]


@dataclass(frozen=True)
class Run:
    variant: Variant
    seed: int
    run_dir: Path
    overrides: dict[str, str]
    config: Config
    before: RunKey | None
    """The run that it starts from: its guide, or its trunk."""

    @property
    def key(self) -> RunKey:
        return self.variant.name, self.seed

    @property
    def name(self) -> str:
        return f"{self.variant.name}/seed{self.seed}"

    @property
    def log(self) -> Path:
        return self.run_dir.with_name(f"{self.run_dir.name}.log")


@dataclass
class GridResult:
    reports: dict[RunKey, dict[str, Any]] = field(default_factory=dict)
    """The content of report.json of each run that is done."""
    failures: dict[RunKey, str] = field(default_factory=dict)
    """Why the others are not."""


def plan_runs(setting: Setting, variants: Sequence[Variant]) -> list[Run]:
    """All runs, seed by seed, in an order in which trunks come before their branches and guides before students.

    Raises:
        ConfigError: a variant's configuration is not valid.
        ExperimentError: an override of what the grid sets; a folder that holds a run of another configuration.
    """
    for key in SET_BY_THE_GRID:
        if key in setting.overrides:
            raise ExperimentError(f"experiment: {key} must be left to the experiment, got {setting.overrides[key]!r}")
    ordered = sorted(variants, key=lambda v: (bool(v.guide), bool(v.trunk)))  # stable; neither has one itself
    runs = [_plan(setting, variant, seed) for seed in setting.seeds for variant in ordered]
    for run in runs:
        saved_config(run)
    return runs


def run_folder(setting: Setting, variant: str, seed: int) -> Path:
    return setting.output / "runs" / variant / f"seed{seed}"


def _plan(setting: Setting, variant: Variant, seed: int) -> Run:
    overrides = {"run.progress": "false", **setting.overrides, **variant.overrides}
    overrides |= {"seed": str(seed), "stages": ",".join(variant.stages)}
    if variant.guide:
        checkpoint = run_folder(setting, variant.guide, seed) / "stage1" / "last.pt"
        overrides["stage2.guide"] = str(checkpoint.resolve())
    elif variant.trunk:
        checkpoint = run_folder(setting, variant.trunk, seed) / "simclr" / "last.pt"
        overrides["stage1.init_from"] = str(checkpoint.resolve())
    before = variant.guide or variant.trunk
    config = load_config(setting.preset, overrides)
    run_dir = run_folder(setting, variant.name, seed)
    return Run(variant, seed, run_dir, overrides, config, (before, seed) if before else None)


def _starts(config: Config) -> dict[str, str]:
    """The checkpoints of other runs."""
    return {"stage2.guide": config.stage2.guide, "stage1.init_from": config.stage1.init_from}


def saved_config(run: Run) -> Config | None:
    """The configuration in a run's folder; None where there is none yet.

    Raises:
        ExperimentError: it is another one than the variant's.
    """
    path = run.run_dir / "config.yaml"
    if not path.is_file() or not (begun_stages(run.run_dir) or (run.run_dir / "report.json").is_file()):
        return None  # or one that a failed start left
    saved = load_config(str(path))
    mine, theirs = _starts(run.config), _starts(saved)
    different = [key for key in differing_keys(run.config, to_dict(saved)) if key not in mine]
    # They are known by their place among the runs: a folder of runs may be moved.
    different += [key for key in mine if Path(mine[key]).parts[-4:] != Path(theirs[key]).parts[-4:]]
    if different:
        raise ExperimentError(
            f"experiment: {run.run_dir} must hold a run of this configuration, got one that differs in "
            f"{', '.join(different)} (another --output keeps both)"
        )
    return saved


def finished_report(run: Run) -> dict[str, Any] | None:
    """The report of a run that is done: trained by this configuration and evaluated as it says."""
    path = run.run_dir / "report.json"
    if saved_config(run) is None or not path.is_file():
        return None
    try:
        report = read_report(path)
    except ValueError:  # of another version: evaluated again
        return None
    wanted = to_dict(run.config)["eval"]
    evaluated = {**to_dict(Config())["eval"], **report["config"].get("eval", {})}
    same = all(evaluated.get(key) == value for key, value in wanted.items())
    return report if same and run.variant.stages[-1] in [stage["name"] for stage in report["stages"]] else None


def collect(runs: Sequence[Run]) -> GridResult:
    """The runs that are done, without training the others."""
    result = GridResult()
    for run in runs:
        if report := finished_report(run):
            result.reports[run.key] = report
        else:
            result.failures[run.key] = "not trained"
    return result


class TimeOverError(ExperimentError):
    """The time was over before every run was done; the runs go on with the next call."""


def train_grid(setting: Setting, runs: Sequence[Run], until: float = math.inf) -> GridResult:
    """Trains what is not done yet, `setting.jobs` runs at a time; a run that fails leaves the others alone.

    Raises:
        TimeOverError: at `until` of `time.monotonic`; the training processes end, with their finished epochs saved.
    """
    result, waiting = GridResult(), list(runs)
    active: dict[RunKey, _Job] = {}
    announced: set[RunKey] = set()

    def settle(run: Run, why_not: str) -> None:
        """Files a run under the reports, or under the failures."""
        if report := finished_report(run):
            result.reports[run.key] = report
        else:
            result.failures[run.key] = why_not
        done = len(result.reports) + len(result.failures)
        said = "done" if report else f"failed: {why_not}"
        print(f"[{done}/{len(runs)}] {run.name} {said}", file=sys.stderr, flush=True)

    with _ended_with_us(active):
        while waiting or active:
            for run in list(waiting):
                if run.before in result.failures:
                    waiting.remove(run)
                    word = "guide" if run.variant.guide else "trunk"
                    settle(run, f"its {word} {run.before[0]}/seed{run.before[1]} failed")
                elif run.before and run.before not in result.reports:
                    continue
                elif finished_report(run):
                    waiting.remove(run)
                    settle(run, "")
                elif len(active) < setting.jobs:
                    if job := _Job.start(setting, run):
                        waiting.remove(run)
                        active[run.key] = job
                    elif run.key not in announced:
                        announced.add(run.key)
                        print(f"{run.name}: another process trains it, waiting", file=sys.stderr, flush=True)
            for key, job in list(active.items()):
                if job.process.poll() is not None:
                    del active[key]
                    settle(job.run, job.end())
            if active or waiting:
                if time.monotonic() >= until:
                    raise TimeOverError(
                        f"experiment: {len(active) + len(waiting)} of {len(runs)} runs are not done yet"
                    )
                time.sleep(POLL_SECONDS)
    return result


@dataclass
class _Job:
    """A training process under way, its log and its lock."""

    run: Run
    process: subprocess.Popen
    log: IO[bytes]
    lock: IO[bytes]

    @classmethod
    def start(cls, setting: Setting, run: Run) -> _Job | None:
        """None while another process holds the run."""
        run.run_dir.parent.mkdir(parents=True, exist_ok=True)
        lock = open(run.run_dir.with_name(f".{run.run_dir.name}.lock"), "wb")  # noqa: SIM115  closed by `end`
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        log = open(run.log, "ab")  # noqa: SIM115
        process = subprocess.Popen(
            _command(setting, run),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(setting.jobs),
            pass_fds=[lock.fileno()],  # held as long as either of us lives
        )
        return cls(run, process, log, lock)

    def end(self) -> str:
        """Closes what is open; why the run failed, if it did."""
        code = self.process.wait()
        self.log.close()
        self.lock.close()
        if code < 0:
            return f"ended by signal {-code}, see {self.run.log}"
        lines = self.run.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"{lines[-1].removeprefix('ltood: error: ') if lines else f'exit code {code}'}, see {self.run.log}"


def _command(setting: Setting, run: Run) -> list[str]:
    command = [sys.executable, "-m", "ltood_fast", "train", "--config", setting.preset]
    command += ["--run-dir", str(run.run_dir), "--resume"]
    return command + [f"--{key}={value}" for key, value in run.overrides.items()]


def _environment(jobs: int) -> dict[str, str]:
    """The cores are shared out, unless the user has; children find the package that runs here."""
    share = max(1, len(os.sched_getaffinity(0)) // jobs)
    paths = [str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"OMP_NUM_THREADS": str(share), **os.environ, "PYTHONPATH": os.pathsep.join(paths)}


@contextlib.contextmanager
def _ended_with_us(active: dict[RunKey, _Job]) -> Iterator[None]:
    """Training processes end when the grid does, also by SIGTERM; they save every epoch."""

    with sigterm_raises():
        try:
            yield
        finally:
            for job in active.values():
                job.process.terminate()
            for job in active.values():
                job.end()

"""report.html while a run trains: losses, speed and the time left, until the final report replaces it."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

from .._files import write_atomic
from ..eval.plots import history_picture
from ..eval.report import render_live
from ..eval.results import RunResults, StageResult
from .config import Config
from .history import read_history


class LivePage:
    """Written at most every `run.report_every` seconds, after an epoch; 0: never."""

    def __init__(self, config: Config, run_dir: Path):
        self.config, self.run_dir = config, run_dir
        self.last = self.begun = time.monotonic()

    def epoch_ended(self, stage: str, epoch: int, epochs: int) -> None:
        """Writes the page if its time has come. A page that cannot be written is a warning: training goes on."""
        every, now = self.config.run.report_every, time.monotonic()
        if not every or now - self.last < every:
            return
        stages = [self._so_far(name) for name in self.config.stages]
        results = RunResults(self.run_dir.name, (), (), self.config.eval.groups, [s for s in stages if s.history])
        seconds = results.stages[-1].seconds() if results.stages else None
        left = (epochs - epoch) * seconds / len(results.stages[-1].history) if seconds else None
        try:
            page = render_live(results, history_picture(results), stage, epoch, epochs, left, every)
            write_atomic(self.run_dir / "report.html", page.encode())
        except OSError as error:
            warnings.warn(f"train: report.html cannot be written while training ({error.strerror})", stacklevel=2)
        self.last = time.monotonic()

    def _so_far(self, stage: str) -> StageResult:
        return StageResult(stage, history=read_history(self.run_dir / stage / "history.jsonl"))

"""The history of a stage: `history.jsonl`, a line an epoch, and the same values in the loggers of `run.loggers`.

history.jsonl is the record that reports are made of. The loggers, Lightning's, show its values elsewhere.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .._files import write_atomic
from .extras import import_extra
from .ranks import TrainingError

if TYPE_CHECKING:
    from lightning_fabric.loggers import Logger

    from .session import Session


def _tensorboard(session: Session, stage: str, next_epoch: int) -> Logger:
    from lightning_fabric.loggers import TensorBoardLogger

    return TensorBoardLogger(session.run_dir / "tensorboard", name=stage, version="", purge_step=next_epoch)


def _csv(session: Session, stage: str, next_epoch: int) -> Logger:
    from lightning_fabric.loggers import CSVLogger

    # `History` writes it anew from history.jsonl; Lightning would remove it, with a warning.
    (session.run_dir / "csv" / stage / "metrics.csv").unlink(missing_ok=True)
    return CSVLogger(session.run_dir / "csv", name=stage, version="", flush_logs_every_n_steps=1)


def _wandb(session: Session, stage: str, next_epoch: int) -> Logger:
    loggers = _lightning_loggers("wandb")
    name = f"{session.run_dir.name}-{stage}"
    return loggers.WandbLogger(name=name, save_dir=str(session.run_dir), group=session.run_dir.name)


def _mlflow(session: Session, stage: str, next_epoch: int) -> Logger:
    loggers = _lightning_loggers("mlflow")
    # MLflow's own default, a folder of files, is one that it no longer opens.
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{session.run_dir.absolute() / 'mlflow.db'}"
    return loggers.MLFlowLogger("ltood_fast", f"{session.run_dir.name}-{stage}", tracking_uri=uri)


def _lightning_loggers(name: str) -> ModuleType:
    import_extra(name, "train", f"run.loggers {name}", "loggers")
    return import_extra("pytorch_lightning.loggers", "train", f"run.loggers {name}", "loggers")


def check_loggers(names: Sequence[str]) -> None:
    """Raises ImportError where the package of one is missing."""
    for name in {"wandb", "mlflow"} & set(names):
        _lightning_loggers(name)


# name -> function of (session, stage, first epoch to come) that opens a logger
LOGGERS: dict[str, Callable[[Session, str, int], Logger]] = {
    "tensorboard": _tensorboard,
    "csv": _csv,
    "wandb": _wandb,
    "mlflow": _mlflow,
}


def _opened(name: str, session: Session, stage: str, next_epoch: int) -> Logger:
    try:
        return LOGGERS[name](session, stage, next_epoch)
    except (OSError, ImportError):
        raise
    except Exception as error:  # each package has errors of its own
        raise TrainingError(
            f"train: run.loggers must be loggers that open here, got {name} ({_reason(error)})"
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


REPLAYED = ("csv",)  # loggers that begin an empty file when a run is resumed


class History:
    """The open history of a stage; of rank 0 alone."""

    def __init__(self, session: Session, stage: str, next_epoch: int):
        self.writes = session.rank == 0
        if not self.writes:
            return
        self.path = session.run_dir / stage / "history.jsonl"
        kept = [line for line in read_history(self.path) if line["epoch"] < next_epoch]
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        names = session.config.run.loggers
        self.loggers = {name: _opened(name, session, stage, next_epoch) for name in names if name != "none"}
        for line in kept:
            self._log(line, REPLAYED)

    def add(self, line: dict[str, Any]) -> None:
        if not self.writes:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # a failed write, unlike a failed open, does not say which file it was
            raise TrainingError(
                f"train: {self.path} cannot be written ({error.strerror}); the last checkpoint is kept"
            ) from error
        self._log(line, tuple(self.loggers))

    def _log(self, line: dict[str, Any], names: Sequence[str]) -> None:
        """A logger that fails (its server is gone, say) is left out from then on: history.jsonl has all values."""
        flat = {**{key: line[key] for key in line if key not in ("parts", "epoch")}, **line.get("parts", {})}
        known = {name: value for name, value in flat.items() if value is not None}
        for name in [name for name in names if name in self.loggers]:
            try:
                self.loggers[name].log_metrics(known, step=line["epoch"])
                self.loggers[name].save()
            except Exception as error:  # each package has errors of its own
                del self.loggers[name]
                warnings.warn(
                    f"train: run.loggers {name} failed at epoch {line['epoch']} ({_reason(error)}) and is left out "
                    "from here on; history.jsonl has all values",
                    stacklevel=2,
                )

    def close(self) -> None:
        if self.writes:
            for name, logger in self.loggers.items():
                try:
                    logger.finalize("success")
                    if name == "wandb":  # it would take the next stage for the same run, and drop its first epochs
                        logger.experiment.finish()
                except Exception as error:  # each package has errors of its own
                    warnings.warn(
                        f"train: run.loggers {name} could not be closed ({_reason(error)}); history.jsonl has all "
                        "values",
                        stacklevel=2,
                    )


def read_history(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a history, up to one that a killed run cut short or that is damaged, which a warning names."""
    lines = []
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict) or not isinstance(line.get("epoch"), int):
            if number < len(texts):
                warnings.warn(f"train: line {number} of {path} is damaged; it and those after it are left out",
                              stacklevel=2)  # fmt: skip
            break
        lines.append(line)
    return lines

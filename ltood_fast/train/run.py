"""A run from its folder: start it or resume it, train the stages that are left, evaluate, report."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .._keys import flatten
from .._progress import progress_shown
from .config import (
    STAGES,
    Config,
    ConfigError,
    differing_keys,
    from_dict,
    is_binding,
    known_keys,
    load_config,
    save_config,
    start_of,
    to_dict,
)
from .ranks import end_ranks, lost_ranks_named, on_first_rank
from .session import Session

if TYPE_CHECKING:
    import numpy as np

    from ..data import ImageSet


class RunError(RuntimeError):
    """A sentence about a run's folder."""


def _load(name_or_path: str, overrides: dict[str, Any] | None = None) -> Config:
    """`load_config`; what YAML's own types raise (a date of month 99, lists of 5,000 levels) names the file."""
    try:
        return load_config(name_or_path, overrides)
    except ConfigError:
        raise
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        raise RunError(f"config: {name_or_path} must be YAML of sections and keys, got {error}") from error


def open_run(run_dir: Path, config_name: str | None, overrides: dict[str, Any], resume: bool) -> Config:
    """The configuration of a run, new or resumed; nothing is written yet (`train_run` does, once all is checked).

    A folder without a checkpoint holds no run: whatever a failed start left there is written anew. In a run that is
    resumed the keys that its stages depend on may change for the stages that have not begun. A stage that has begun,
    finished or not, may be given another number of epochs, at least those that are trained and unless a later stage has
    already started from its weights; the rate then follows the schedule of the new length, see `loop.learning_rate`.
    `run.*` but the precision, and `eval.*`, are free; those that are not named keep their saved values.

    Raises:
        RunError: the folder holds a run and `resume` is false; nothing to resume and no `config_name`; a key that a
            stage which has begun depends on is another one.
        ConfigError: as `load_config`.
    """
    saved, begun = run_dir / "config.yaml", begun_stages(run_dir)
    if begun and not resume:
        raise RunError(
            f"train: run-dir must be a new folder, got {run_dir}, which holds a run (--resume goes on with it)"
        )
    if config_name is not None and not (begun and saved.exists()):
        return _load(config_name, overrides)
    if not (resume and saved.exists()):
        missing = "train: config must be given for a new run"
        raise RunError(f"{missing}, got none" if not resume else f"{missing}, and {run_dir} holds none to resume")
    original = _load(str(saved))
    values = flatten(to_dict(original))
    if config_name is not None:
        named = flatten(to_dict(_load(config_name, overrides)))
        values |= {key: value for key, value in named.items() if is_binding(key)}
    config = from_dict({**values, **overrides})
    _check_begun(config, original, begun)
    return config


def begun_stages(run_dir: Path) -> list[str]:
    """The stages with a checkpoint."""
    return [stage for stage in STAGES if (run_dir / stage / "last.pt").exists()]


def _check_begun(config: Config, original: Config, begun: list[str]) -> None:
    saved = to_dict(original)
    changed = differing_keys(config, saved)
    if gone := [stage for stage in begun if stage not in config.stages and stage in original.stages]:
        raise RunError(f"train: stages must hold {', '.join(gone)}, which has begun, got {', '.join(config.stages)}")
    for stage in begun:
        if keys := differing_keys(config, saved, stage):
            raise RunError(
                f"train: stage {stage} has begun and must keep its configuration, got another {', '.join(keys)}"
            )
        before = start_of(stage, original)
        if before is not None and f"{before}.epochs" in changed:
            raise RunError(f"train: {before}.epochs must stay, as {stage} has begun from its weights, got another")


def train_run(config: Config, run_dir: Path) -> Session:
    """Trains the stages of the configuration, those that are finished left out.

    The folder and its config.yaml are written once every stage is checked: a start that fails leaves nothing behind.
    """
    from .checks import check_run
    from .loop import Stage

    with lost_ranks_named(config.run.timeout):
        session = Session.open(config, run_dir)
        check_run(session)
        on_first_rank(lambda: _keep_config(config, run_dir))
        for name in config.stages:
            stage = Stage.open(name, session)
            if not stage.finished:
                stage.run()
            elif session.rank == 0:
                print(f"{name}: finished before, {stage.epoch} epochs", file=sys.stderr)
    end_ranks()
    return session


def _keep_config(config: Config, run_dir: Path) -> None:
    """Saves it in the folder, unless the one there says the same about the weights."""
    saved = run_dir / "config.yaml"
    if begun_stages(run_dir) and saved.exists() and not differing_keys(config, to_dict(_load(str(saved)))):
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, saved)


def report_run(session: Session) -> str:
    """Evaluates the stages, writes report.json and report.html, and returns the table and the failure signatures."""
    from ..eval.report import format_findings, format_table, write_report
    from .evaluate import evaluate_run

    results = evaluate_run(session)
    page = write_report(session.run_dir, results)
    return f"{format_table(results)}\n\n{format_findings(results)}\n\nreport: {page}"


def saved_progress(run_dir: Path) -> str:
    """A clause on what an interrupted run has saved, and the command that goes on with it."""
    from .checkpoint import CheckpointError, load_checkpoint

    if not (run_dir / "config.yaml").is_file():
        return "nothing is saved yet, the same command starts again"
    resume = f"go on with: {shlex.join(['ltood', 'train', '--run-dir', str(run_dir), '--resume'])}"
    paths = [path for stage in STAGES if (path := run_dir / stage / "last.pt").is_file()]
    if not paths:
        return f"no epoch is saved yet, {resume}"
    newest = max(paths, key=lambda path: path.stat().st_mtime_ns)
    try:
        state = load_checkpoint(newest)
    except CheckpointError as error:
        return f"{error}"
    return f"{state['epoch']} epochs of {state['stage']} are saved in {newest}, {resume}"


# The keys that `ltood embed` reads: of the images, not of the network.
EMBED_KEYS = ("data.root", "data.cache_dir", "data.workers", "data.image_size", "data.decode_size", "data.ood_size",
              "data.seed")  # fmt: skip


class EmbeddedSet(NamedTuple):
    features: np.ndarray
    """float32 [N, F]"""
    files: tuple[str, ...]
    """The file of each row; empty where images are not files."""


def embed_set(checkpoint: Path, spec: str, overrides: dict[str, str], *, projection: bool = False) -> EmbeddedSet:
    """Features of a set of images from the network of a checkpoint.

    Args:
        checkpoint: a stage's last.pt.
        spec: as `data.id` or `data.ood`; a list as `list:/path.txt`.
        overrides: of the configuration in the checkpoint: EMBED_KEYS and `run.*`.
        projection: the projections [N, D] instead.

    Raises:
        CheckpointError, ConfigError, DataError: one sentence each.
    """
    from ..data import make_eval_transform
    from ..data.bundle import with_channels
    from .checkpoint import fitted, load_checkpoint
    from .model import make_model
    from .session import embed, make_fabric

    if unread := [key for key in overrides if key not in EMBED_KEYS and not key.startswith("run.")]:
        raise RunError(f"embed: key must be one of {', '.join(EMBED_KEYS)}, run.*, got {unread[0]}")
    state = load_checkpoint(checkpoint)
    with fitted(checkpoint, "a configuration of this version"):
        config = from_dict(flatten(state["config"]))
    config = from_dict({**flatten(state["config"]), **overrides})
    data, image_size = config.data, state["config"]["data"]["image_size"]
    fabric = make_fabric(config.run)
    with progress_shown(config.run.progress):
        opened = _open_images(spec, config)
    with fitted(checkpoint, "the network that its configuration names"):
        model = fabric.to_device(make_model(config.model, state["channels"], image_size))
        model.load_state_dict(state["model"])
    transform = fabric.to_device(make_eval_transform(data.image_size))
    images = with_channels(opened.images, state["channels"])
    with progress_shown(config.run.progress):
        embedded = embed(model, images, fabric, transform)
    return EmbeddedSet(embedded[projection].cpu().numpy(), opened.files)


def _open_images(spec: str, config: Config) -> ImageSet:
    from ..data import open_set

    data = config.data
    return open_set(
        spec,
        root=data.root,
        part="train",
        image_size=data.decode_size or data.image_size,
        cache_dir=data.cache_dir,
        workers=data.workers,
        limit=data.ood_size,
        seed=data.seed,
    )


def saved_config(run_dir: Path, overrides: dict[str, str]) -> Config:
    """The configuration of a run that exists.

    Raises:
        RunError: the folder holds no run; a key that its weights depend on.
    """
    if fixed := [key for key in overrides if key in known_keys() and is_binding(key)]:
        raise RunError(
            f"eval: key must be one that the weights do not depend on (eval.*, run.* but run.precision, "
            f"data.few_shot_list, data.on_device, data.workers), got {fixed[0]}, which the run has been trained with"
        )
    saved = run_dir / "config.yaml"
    if not saved.exists():
        raise RunError(f"eval: run-dir must be the folder of a run, got {run_dir}, which holds no config.yaml")
    return _load(str(saved), overrides)

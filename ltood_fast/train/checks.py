"""Requirements of a run on its data, its files and its machine, judged before the first step of its first stage.

A stage that starts after days must not be the first to say that its budget is larger than the pool.
"""

from __future__ import annotations

import warnings

from .._faiss import load_faiss
from .checkpoint import load_checkpoint
from .encoders import initialise
from .history import check_loggers
from .methods import METHODS, Joint, Stage1, Stage2, first_state
from .methods.samplers import sampler_of
from .ranks import TrainingError, on_first_rank
from .sdclr import STAGES as SDCLR_STAGES
from .session import Session


def check_run(session: Session) -> None:
    """Every stage of the configuration against the data, the checkpoints in the folder, and what it imports.

    Warns where a batch is larger than a stage's images.

    Raises:
        ValueError, TrainingError: a stage cannot be trained on this data.
        ConfigError: the network cannot be made for the images, or not with the weights of model.init.
        CheckpointError: a checkpoint of the run, or the guide, cannot be used.
        DataError: the list or split of the few-shot probe cannot be used.
        ImportError: a stage needs FAISS, or a logger its package, and it cannot be imported.
    """
    small: dict[str, int] = {}
    check_loggers(session.config.run.loggers)
    initialise(session.new_model().encoder, session.config.model, session.channels, session.config.data.image_size)
    for stage in session.config.stages:
        METHODS[stage].check(session)
        _check_checkpoint(session, stage)
        for images in _images_of(session, stage):
            _check_batches(session, stage, images)
            if images < session.config.optim.batch_size:
                small[stage] = images
    if _clusters_images(session):
        load_faiss("train")
    starts = {"stage1": session.config.stage1.init_from, "joint": session.config.stage1.init_from,
              "stage2": session.config.stage2.guide}  # fmt: skip
    for stage in session.config.stages:
        if starts.get(stage):
            first_state(stage, session)
    if session.config.stage1.neighbors == "oracle" and not session.data.train.class_names:
        raise ValueError("train: stage1.neighbors must be another than oracle where no image has a label, got oracle")
    if session.config.stage1.pairing == "cross" and session.ranks > 1:
        raise ValueError(f"train: stage1.pairing must be same on several ranks, got cross on {session.ranks}")
    on_first_rank(lambda: _check_evaluation(session))
    if small and session.rank == 0:
        of_stages = ", ".join(f"{images} of {stage}" for stage, images in small.items())
        warnings.warn(
            f"train: optim.batch_size is {session.config.optim.batch_size}, more than the images of an epoch "
            f"({of_stages}): such an epoch is one batch of them all",
            stacklevel=2,
        )


def _images_of(session: Session, stage: str) -> list[int]:
    """The numbers of images that an epoch of the stage may show."""
    options = session.config.stage1
    if stage not in ("stage1", "joint") or sampler_of(options) is None:
        return [session.n_id]
    with_ood = [session.n_id + options.budget] if options.warmup_epochs < options.epochs else []
    return with_ood + ([session.n_id] if options.warmup_epochs > 0 else [])


def _check_checkpoint(session: Session, stage: str) -> None:
    """A stage that has begun can go on, and is not asked to have ended before."""
    path = session.run_dir / stage / "last.pt"
    if not path.exists():
        return
    epoch, epochs = load_checkpoint(path, session.config)["epoch"], METHODS[stage].epochs_of(session.config)
    if epoch > epochs:
        section = "stage1" if stage == "joint" else stage
        raise TrainingError(
            f"train: {section}.epochs must be at least the {epoch} epochs of {stage} that are trained, got {epochs}"
        )


def _check_batches(session: Session, stage: str, images: int) -> None:
    config, ranks = session.config, session.ranks
    size = min(config.optim.batch_size, images)
    if size % ranks:
        key = "optim.batch_size" if size < images else f"the number of {stage}'s images, fewer than a batch,"
        raise TrainingError(f"train: {key} must be a multiple of the {ranks} ranks, got {size}")
    own, micro = size // ranks, config.optim.micro_batch
    smallest = (own % micro or micro) if 0 < micro < own else own
    if config.base.name == "sdclr" and stage in SDCLR_STAGES and smallest < 2:
        raise TrainingError(
            f"train: base.name sdclr must see two images of a rank or more at a time, got 1 in {stage}, where a rank's "
            f"batch is {own} (optim.batch_size) in parts of {micro or own} (optim.micro_batch)"
        )
    for key, k in _neighbors_of(session, stage):
        if k > 2 * size - 1:
            raise TrainingError(f"train: {key} must be less than the {2 * size} views of a batch of {stage}, got {k}")


def _neighbors_of(session: Session, stage: str) -> list[tuple[str, int]]:
    """Neighbours that the stage searches in a batch. The joint stage leaves its guide out where they are too few."""
    config = session.config
    if stage == "stage2":
        return [("stage2.k", config.stage2.k)]
    searches = stage != "simclr" and config.stage1.warmup_epochs < config.stage1.epochs
    return [("stage1.k", config.stage1.k)] if searches and config.stage1.neighbors in ("in_batch", "oracle") else []


def _clusters_images(session: Session) -> bool:
    methods = [METHODS[stage] for stage in session.config.stages]
    sampler = sampler_of(session.config.stage1)
    by_sampler = sampler is not None and sampler.clusters_images
    return any(m in (Joint, Stage2) or (m is Stage1 and by_sampler) for m in methods)


def _check_evaluation(session: Session) -> None:
    from .evaluate import few_shot_set

    labels = session.data.probe.labels
    if session.data.has_labels and not bool((labels != labels[0]).any()):
        raise ValueError(
            f"train: the probe set must hold at least two classes for the evaluation, got class {int(labels[0])} only"
        )
    few_shot_set(session)

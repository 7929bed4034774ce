"""From the checkpoints of a run to its results: every stage on the probe and test sets, and what was sampled."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import ltood_fast

from ..data.augment import make_probe_augment
from ..eval.evaluate import EvalProtocol, evaluate_features
from ..eval.probe import EpochwiseProbe, few_shot_rows
from ..eval.results import Resampling, RunResults, SampleTensors, StageResult, resampling_result
from ..eval.without_labels import Embedded, evaluate_without_labels
from .checkpoint import CheckpointError, fitted, load_checkpoint, load_tensors
from .config import STAGES, to_dict
from .history import read_history
from .model import ContrastiveModel
from .session import Session, embed

if TYPE_CHECKING:
    from ..data.image_set import ImageSet

# Images of the test set at most [ltood_fast]; the standard error is then one or two hundredths of the value.
ALIGNMENT_IMAGES = 2048


def evaluate_run(session: Session) -> RunResults:
    """Everything that the report of a run shows.

    Raises:
        CheckpointError: no stage of the run has a checkpoint, or one cannot be used.
    """
    trained = [name for name in STAGES if (session.run_dir / name / "last.pt").exists()]
    if not trained:
        raise CheckpointError(f"eval: {session.run_dir} must hold a trained stage, got none")
    train, few_shot = session.data.train, few_shot_set(session)
    resamplings = _resamplings(session)  # first: a damaged file then shows before minutes of evaluation
    return RunResults(
        name=session.run_dir.name,
        class_names=train.class_names,
        class_counts=_class_counts(session),
        scheme=session.config.eval.groups,
        stages=[_evaluate_stage(session, name, few_shot) for name in trained],
        resamplings=resamplings,
        config=to_dict(session.config),
        build=ltood_fast.build_info(),
    )


def _class_counts(session: Session) -> list[int]:
    return [int(count) for count in session.data.train.class_counts()]


def few_shot_set(session: Session) -> Tensor | ImageSet | None:
    """The few-shot probe's training images: rows of the probe set, or other images; None where the probe is off.

    Raises:
        DataError: the list or split cannot be read, or its labels are not those of the classes.
        ValueError: eval.few_shot is more than a class of the probe set has.
    """
    data, probe = session.config.data, session.data.probe
    n_classes = len(session.data.train.class_names)
    if not session.data.has_labels:
        if data.few_shot_list or session.config.eval.few_shot:
            raise ValueError("eval: eval.few_shot must be 0 and data.few_shot_list empty where no image has a label")
        return None
    if not data.few_shot_list:
        per_class, least = session.config.eval.few_shot, int(torch.bincount(probe.labels).min())
        if per_class > least:
            raise ValueError(
                f"eval: eval.few_shot must be at most {least}, the images of the smallest class of the probe set, got "
                f"{per_class}"
            )
        return few_shot_rows(probe.labels, n_classes, per_class, data.seed) if per_class else None
    from ..data import open_set
    from ..data.bundle import with_channels
    from ..data.image_set import DataError, user_path
    from ..data.longtail import read_split

    path = user_path(data.few_shot_list)
    if path.suffix == ".npy":
        whole = session.data.labelled or probe
        chosen = read_split(path, len(whole))
        labels = whole.labels[chosen]
        if data.probe_split:  # most of the rows are of the probe set, but not all of CIFAR-100's
            chosen = whole.subset(chosen)
    else:
        chosen = open_set(f"list:{path}", root=data.root, image_size=data.image_size, cache_dir=data.cache_dir)
        labels, chosen = chosen.labels, replace(chosen, images=with_channels(chosen.images, session.channels))
    if odd := set(labels.tolist()) ^ set(range(n_classes)):
        raise DataError(
            f"data: data.few_shot_list must hold each of the {n_classes} classes and no other label, got one that "
            f"differs in {', '.join(map(str, sorted(odd)[:5]))}: {path}"
        )
    return chosen


def _evaluate_stage(session: Session, name: str, few_shot: Tensor | ImageSet | None) -> StageResult:
    path = session.run_dir / name / "last.pt"
    state = load_checkpoint(path, session.config)
    model = session.new_model()
    with fitted(path, "this run's network"):
        model.load_state_dict(state["model"])
    history = read_history(session.run_dir / name / "history.jsonl")
    if not session.data.has_labels:
        return StageResult(name, history=history, **_without_labels(session, model))
    data, options = session.data, session.config.eval
    probe_features, probe_labels = session.embed(model, data.probe.images)[0], data.probe.labels.to(session.device)
    if isinstance(few_shot, Tensor):
        rows = few_shot.to(session.device)
        few = probe_features[rows], probe_labels[rows]
    elif few_shot is not None:
        few = session.embed(model, few_shot.images)[0], few_shot.labels.to(session.device)
    else:
        few = None
    return evaluate_features(
        name,
        (probe_features, probe_labels),
        (session.embed(model, data.test.images)[0], data.test.labels.to(session.device)),
        _class_counts(session),
        EvalProtocol(
            options.groups,
            options.probe,
            options.knn_k,
            seed=session.config.seed,
            probe_batch=options.probe_batch,
            epochwise=_epochwise(session, model) if options.probe == "sgd" and options.probe_augment else None,
        ),
        few_shot=few,
        views=_two_views(session, model),
        history=history,
    )


def _without_labels(session: Session, model: ContrastiveModel) -> dict[str, Any]:
    train, test = (
        Embedded(part.images, session.embed(model, part.images)[0]) for part in (session.data.train, session.data.test)
    )
    clusters = session.config.stage1.clusters
    return evaluate_without_labels(train, test, _two_views(session, model), clusters, seed=session.config.seed)


HELD_OUT = 0.1  # share of each class of the probe set, where there are no labelled images outside it


def _epochwise(session: Session, model: ContrastiveModel) -> EpochwiseProbe:
    """Views of the probe's images drawn anew each epoch, and held-out images to pick the epoch on."""
    learnt, held_out = probe_parts(session)
    augment = session.fabric.to_device(make_probe_augment(session.config.data.image_size))

    def features_of(epoch: int) -> Tensor:
        with torch.random.fork_rng(devices=[session.device] if session.device.type == "cuda" else []):
            torch.manual_seed(session.config.seed * 1_000_003 + epoch)
            return embed(model, learnt.images, session.fabric, augment)[0]

    features = session.embed(model, held_out.images)[0]
    return EpochwiseProbe(features_of, learnt.labels.to(session.device), features, held_out.labels.to(session.device))


def probe_parts(session: Session) -> tuple[ImageSet, ImageSet]:
    """The images that a probe with views of each epoch learns from, and those that its epoch is picked on.

    They are the probe set and the labelled images outside it, as the baselines' 45,000 and 5,000 of CIFAR; without such
    ones the last tenth of each class of the probe set is held out [ltood_fast].
    """
    data, split = session.data, session.config.data.probe_split
    if split and data.labelled is not None and len(data.labelled) > len(data.probe):
        from ..data.image_set import user_path
        from ..data.longtail import read_split

        outside = torch.ones(len(data.labelled), dtype=torch.bool)
        outside[read_split(user_path(session.config.data.root) / split, len(data.labelled))] = False
        return data.probe, data.labelled.subset(outside.nonzero()[:, 0])
    held_out = torch.zeros(len(data.probe), dtype=torch.bool)
    for c in data.probe.labels.unique():
        mine = (data.probe.labels == c).nonzero()[:, 0]
        held_out[mine[len(mine) - max(1, int(HELD_OUT * len(mine))) :]] = True
    return data.probe.subset((~held_out).nonzero()[:, 0]), data.probe.subset(held_out.nonzero()[:, 0])


def _two_views(session: Session, model: ContrastiveModel) -> tuple[Tensor, Tensor]:
    """Features of two random views of images all over the test set, drawn from the run's seed."""
    images = session.data.test.images
    n = min(len(images), ALIGNMENT_IMAGES)
    images = images[torch.arange(n) * len(images) // n]
    with torch.random.fork_rng(devices=[session.device] if session.device.type == "cuda" else []):
        torch.manual_seed(session.config.seed)
        first, second = (embed(model, images, session.fabric, session.augment)[0] for _ in range(2))
    return first, second


def _resamplings(session: Session) -> list[Resampling]:
    """The re-samplings of the strategy "tailness" for clusters; another choice belongs to no cluster."""
    options = session.config.stage1
    if options.ood_strategy != "tailness" or options.targets != "clusters":
        return []
    return [result for stage in ("stage1", "joint") for result in _resamplings_of(session, stage)]


def _resamplings_of(session: Session, stage: str) -> list[Resampling]:
    folder: Path = session.run_dir / stage
    seconds = {line["epoch"]: line.get("resample_seconds") for line in read_history(folder / "history.jsonl")}
    results, unsealed = [], 0
    for path in sorted(folder.glob("resample_*.pt")):
        saved, sealed = load_tensors(path)
        unsealed += not sealed
        with fitted(path, "a re-sampling of this run"):
            results.append(_resampling(session, stage, saved, seconds))
    if unsealed:
        warnings.warn(
            f"eval: {unsealed} of the re-samplings in {folder} carry no checksum, as an earlier version wrote them; "
            "they are used unchecked",
            stacklevel=2,
        )
    return results


def _resampling(session: Session, stage: str, saved: dict[str, Any], seconds: dict[int, float | None]) -> Resampling:
    return resampling_result(
        stage,
        saved["epoch"],
        SampleTensors(saved["assignments"], saved["tailness"], saved["indices"], saved["index_clusters"]),
        ood=session.data.ood,
        labels=session.data.train.labels,
        n_classes=len(session.data.train.class_names),
        seconds=seconds.get(saved["epoch"]),
    )

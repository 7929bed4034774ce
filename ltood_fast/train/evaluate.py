"""From the checkpoints of a run to its results: every stage on the probe and test sets, and what was sampled."""

from __future__ import annotations

from pathlib import Path

import torch

import ltood_fast

from ..eval.evaluate import evaluate_features
from ..eval.results import Resampling, RunResults, StageResult, resampling_result
from .checkpoint import CheckpointError, load_checkpoint
from .config import STAGES, to_dict
from .loop import read_history
from .session import Session


def evaluate_run(session: Session) -> RunResults:
    """Everything that the report of a run shows.

    Raises:
        CheckpointError: no stage of the run has a checkpoint, or one cannot be used.
    """
    trained = [name for name in STAGES if (session.run_dir / name / "last.pt").exists()]
    if not trained:
        raise CheckpointError(f"eval: {session.run_dir} must hold a trained stage, got none")
    train = session.data.train
    return RunResults(
        name=session.run_dir.name,
        class_names=train.class_names,
        class_counts=_class_counts(session),
        scheme=session.config.eval.groups,
        stages=[_evaluate_stage(session, name) for name in trained],
        resamplings=_resamplings(session),
        config=to_dict(session.config),
        build=ltood_fast.build_info(),
    )


def _class_counts(session: Session) -> list[int]:
    return [int(count) for count in session.data.train.class_counts()]


def _evaluate_stage(session: Session, name: str) -> StageResult:
    state = load_checkpoint(session.run_dir / name / "last.pt", session.config)
    model = session.new_model()
    model.load_state_dict(state["model"])
    data, options = session.data, session.config.eval
    return evaluate_features(
        name,
        session.embed(model, data.probe.images)[0],
        data.probe.labels.to(session.device),
        session.embed(model, data.test.images)[0],
        data.test.labels.to(session.device),
        _class_counts(session),
        scheme=options.groups,
        probe=options.probe,
        knn_k=options.knn_k,
        seed=session.config.seed,
        history=read_history(session.run_dir / name / "history.jsonl"),
    )


def _resamplings(session: Session) -> list[Resampling]:
    """Of stage 1 with the strategy "tailness" for clusters; another choice belongs to no cluster."""
    folder: Path = session.run_dir / "stage1"
    options = session.config.stage1
    if options.ood_strategy != "tailness" or options.targets != "clusters" or not folder.exists():
        return []
    seconds = {line["epoch"]: line["resample_seconds"] for line in read_history(folder / "history.jsonl")}
    results = []
    for path in sorted(folder.glob("resample_*.pt")):
        saved = torch.load(path, weights_only=True)
        results.append(
            resampling_result(
                "stage1",
                saved["epoch"],
                assignments=saved["assignments"],
                tailness=saved["tailness"],
                ood_indices=saved["indices"],
                ood_clusters=saved["index_clusters"],
                ood=session.data.ood,
                labels=session.data.train.labels,
                n_classes=len(session.data.train.class_names),
                seconds=seconds.get(saved["epoch"]),
            )
        )
    return results

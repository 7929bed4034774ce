"""The files at the end of `ltood train --images`: embeddings, the names of their files, chosen images, the network."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import torch

from .._files import write_atomic
from .checkpoint import fitted, load_checkpoint
from .export import export_network, last_checkpoint
from .session import Session

EMBEDDINGS, ROWS, CHOSEN, NETWORK = "embeddings.npy", "embeddings.csv", "chosen_ood.csv", "network"


def take_away(session: Session) -> str:
    """Writes them for the last stage; returns a line for each."""
    run_dir, data = session.run_dir, session.data
    checkpoint = last_checkpoint(run_dir)
    state = load_checkpoint(checkpoint, session.config)
    model = session.new_model()
    with fitted(checkpoint, "this run's network"):
        model.load_state_dict(state["model"])
    parts = {"train": data.train, "test": data.test}
    features = torch.cat([session.embed(model, part.images)[0].cpu() for part in parts.values()]).numpy()
    rows = [
        (name, file, part.class_names[label] if label >= 0 else "")
        for name, part in parts.items()
        for file, label in zip(part.files or [""] * len(part), part.labels.tolist(), strict=True)
    ]
    write_atomic(run_dir / EMBEDDINGS, lambda file: np.save(file, features))
    write_csv(run_dir / ROWS, ("part", "file", "class"), rows)
    lines = [f"embeddings: {run_dir / EMBEDDINGS} {features.shape}, their files in {run_dir / ROWS}"]
    if (chosen := chosen_files(session)) is not None:
        write_csv(run_dir / CHOSEN, ("row", "file"), chosen)
        lines.append(f"OOD images chosen last: {run_dir / CHOSEN} ({len(chosen)} of {session.n_ood})")
    export_network(checkpoint, "torch", run_dir / NETWORK)
    lines.append(f"network: {run_dir / NETWORK} (README.md there says how to load it)")
    return "\n".join(lines)


def chosen_files(session: Session) -> list[tuple[int, str]] | None:
    """(row, file) of the pool's images that the last re-sampling chose; None where nothing was sampled."""
    pool = session.data.ood
    paths = [path for stage in ("stage1", "joint") if (path := session.run_dir / stage / "last.pt").is_file()]
    if pool is None or not paths:
        return None
    with fitted(paths[-1], "a stage with OOD images"):
        rows = load_checkpoint(paths[-1])["method"]["chosen"].tolist()
        return [(row, pool.files[row] if pool.files else "") for row in rows]


def write_csv(path: Path, head: tuple[str, ...], rows: list[tuple]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    write_atomic(path, text.getvalue().encode("utf-8", "surrogateescape"))

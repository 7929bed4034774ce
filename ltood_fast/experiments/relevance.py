"""Does it matter how far the OOD images are from the ID ones? The given pool, another one, and noise.

Distance is measured with the network of SimCLR, which has seen no OOD image, a seed at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from ..data import load_data
from ..eval.runs import spread
from ..sampling.kmeans import kmeans
from ..train.checkpoint import fitted, load_checkpoint
from ..train.config import Config, load_config
from ..train.session import Session
from .grid import run_folder
from .outcomes import Judged, Outcomes
from .pictures import OVERALL, finding, forest_panel
from .spec import Comparison, Experiment, Setting, Summary, Table, Variant
from .summaries import summary_of
from .variants import NONE, ORACLE_GAINS, SIMCLR, TAILNESS

MOST_IMAGES = 5000  # of a set that distances are measured on
HELD_OUT = "test images"  # how near a pool can come
DISTANCES = {"cosine": "cosine to the nearest ID centroid", "frechet": "Fréchet distance"}


def pools(setting: Setting) -> list[Variant]:
    """The source's stage 1 with each pool; the given one is the variant that other experiments have."""
    config = setting.config
    size = config.data.ood_size or 2 * config.stage1.budget

    def pool(name: str, spec: str, **overrides: str) -> Variant:
        keys = {"data.ood": spec, "data.ood_size": str(size), **overrides}
        return Variant(f"pool-{name}", {**TAILNESS.overrides, **keys})

    found = [TAILNESS]
    if setting.other_ood:
        found.append(pool("other", setting.other_ood, **{"data.ood_root": setting.other_root}))
    elif config.data.ood != "letters":
        found.append(pool("letters", "letters"))
    return [*found, pool("noise", "noise")]


def cosine_to_centroids(pool: Tensor, centroids: Tensor) -> float:
    """Mean over the rows of the pool of the cosine to the nearest centroid; 1: on top of one."""
    return float((F.normalize(pool, dim=1) @ F.normalize(centroids, dim=1).T).amax(dim=1).mean())


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of the Gaussians fitted to two sets of rows [Heusel 2017].

    The trace of the root is the sum of the roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is symmetric.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    crossed = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * crossed)


def measure_distances(setting: Setting, seed: int, variants: list[Variant]) -> dict[str, dict[str, float]]:
    """Of each pool and of the test images from the ID training set, in unit features of SimCLR's network."""
    run_dir = run_folder(setting, SIMCLR.name, seed)
    path = run_dir / "simclr" / "last.pt"
    checkpoint = load_checkpoint(path)
    session = Session.open(_config(setting, SIMCLR, seed), run_dir)
    model = session.new_model()
    with fitted(path, "this experiment's network"):
        model.load_state_dict(checkpoint["model"])

    def features(images: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        kept = torch.randperm(len(images), generator=generator)[:MOST_IMAGES]
        return F.normalize(session.embed(model, images[kept])[0], dim=1).cpu()

    own = features(session.data.train.images)
    clusters = min(session.config.stage1.clusters, len(own))
    centroids, _ = kmeans(own, clusters, seed=seed)
    sets = {HELD_OUT: features(session.data.test.images)}
    for variant in variants:
        sets[variant.name] = features(load_data(_config(setting, variant, seed).data).ood.images)
    return {
        name: {"cosine": cosine_to_centroids(rows, centroids), "frechet": frechet_distance(own, rows)}
        for name, rows in sets.items()
    }


def _config(setting: Setting, variant: Variant, seed: int) -> Config:
    overrides = {**setting.overrides, **variant.overrides, "stages": ",".join(variant.stages), "seed": str(seed)}
    return load_config(setting.preset, overrides)


def summarise(setting: Setting, outcomes: Outcomes) -> Summary:
    tried = [variant for variant in outcomes.variants if variant not in (SIMCLR, NONE)]
    distances = {run.seed: measure_distances(setting, run.seed, tried) for run in outcomes.of(SIMCLR.name)}
    farther = [variant.name for variant in tried if variant is not TAILNESS]
    return summary_of(
        outcomes,
        [Comparison(TAILNESS.name, other) for other in farther],
        [Comparison(variant.name, NONE.name) for variant in tried]
        + [Comparison(TAILNESS.name, other, "few") for other in farther],
        tables=[distance_table(distances)],
        draw=lambda judged: figure(outcomes, distances, judged),
        values={"distances": distances},
    )


def distance_table(distances: dict[int, dict[str, dict[str, float]]]) -> Table:
    names = dict.fromkeys(name for found in distances.values() for name in found)
    rows = []
    for name in names:
        cells = []
        for key in DISTANCES:
            value = spread(found[name][key] for found in distances.values())
            cells.append(f"{value.mean:.3f}" + ("" if value.std is None else f" ± {value.std:.3f}"))
        rows.append([name, str(len(distances)), *cells])
    note = (
        "In unit features of SimCLR's network: mean cosine of the pool's images to the nearest of the ID set's "
        "centroids (higher is nearer), and Fréchet distance between the Gaussians of pool and ID set (lower is "
        "nearer); mean ± sample standard deviation over the seeds. The pool of `tailness` is the given one."
    )
    return Table("How far the pools are", ["images", "seeds", *DISTANCES.values()], rows, note)


def figure(outcomes: Outcomes, distances: dict[int, dict[str, dict[str, float]]], judged: list[Judged]) -> Figure:
    """Differences on the left; accuracy against the distance of its pool on the right."""
    fig = Figure(figsize=(12.5, 1.7 + 0.55 * len(outcomes.variants)), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=(3, 2))
    forest_panel(left, judged)
    left.set_title(finding(judged), loc="left")
    for outcome in outcomes.by_run.values():
        if (found := distances.get(outcome.seed, {}).get(outcome.variant)) is not None:
            x, y = found["frechet"], 100 * outcome.measures["overall"]
            right.scatter(x, y, color=OVERALL["color"], marker=OVERALL["marker"], s=24, alpha=0.8, linewidths=0)
            right.annotate(outcome.variant, (x, y), xytext=(5, 3), textcoords="offset points", fontsize=8)
    right.set(xlabel="Fréchet distance of the pool to the ID set", ylabel="accuracy overall (%)")
    right.margins(x=0.25)
    return fig


OOD_RELEVANCE = Experiment(
    "ood-relevance",
    "do OOD images have to be related to the ID ones?",
    "The method assumes OOD images that are semantically relevant for the tail, so a farther pool helps less (left "
    "open by the source).",
    lambda setting: [SIMCLR, NONE, *pools(setting)],
    summarise,
    ORACLE_GAINS,
)

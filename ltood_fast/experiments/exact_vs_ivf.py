"""One OOD re-sampling, exact and through FAISS's inverted file: what the approximation loses and what it saves.

Both measure the tailness of clusters and take, cluster by cluster, the budget's nearest candidates to the centroids.
The index is built for one re-sampling and thrown away, as in training, where the next one has other embeddings.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import ltood_fast

from .._memory import peak_mib_cpu
from ..reference.sampling import cluster_budgets, descending_tailness

SEED = 0


@dataclass(frozen=True)
class Setup:
    id_rows: int
    candidates: int
    D: int
    K: int
    budget: int
    lists: int
    probes: tuple[int, ...]


@dataclass(frozen=True)
class Data:
    rows: Tensor
    assignments: Tensor
    centroids: Tensor
    candidates: Tensor


def make_data(setup: Setup, seed: int = SEED) -> Data:
    """Unit rows around K centroids, cluster c of them 100^(-c/K) times as large as the first; the candidates lie around
    twice as many centroids, half of them those of the ID rows, further out."""
    generator = torch.Generator().manual_seed(seed)
    centroids = torch.randn(2 * setup.K, setup.D, generator=generator)
    weights = 0.01 ** (torch.arange(setup.K) / setup.K)
    assignments = torch.multinomial(weights, setup.id_rows, replacement=True, generator=generator)
    spread = 0.5 + torch.rand(setup.K, 1, generator=generator)
    rows = centroids[assignments] + spread[assignments] * torch.randn(setup.id_rows, setup.D, generator=generator)
    origin = torch.randint(0, 2 * setup.K, (setup.candidates,), generator=generator)
    candidates = torch.randn(setup.candidates, setup.D, generator=generator).mul_(1.5).add_(centroids[origin])
    return Data(F.normalize(rows, dim=1), assignments, F.normalize(centroids[: setup.K], dim=1), candidates)


def exact(data: Data, setup: Setup, spent: dict[str, float]) -> Tensor:
    """The sampled candidates, by this package's functions."""
    with clock(spent, "tailness_s"):
        tailness = ltood_fast.cluster_tailness(data.rows, data.assignments, setup.K)
    with clock(spent, "search_s"):
        return ltood_fast.sample_ood(data.candidates, data.centroids, tailness, setup.budget)[0]


def by_ivf(data: Data, setup: Setup, probes: int, spent: dict[str, float]) -> Tensor:
    """The same choice, neighbours and candidates from inverted files. A cluster whose probed lists hold too few
    candidates takes what it finds."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    with clock(spent, "tailness_s"):
        tailness = ltood_fast.cluster_tailness(data.rows, data.assignments, setup.K, method="ivf")
    with clock(spent, "index_s"):
        rows = F.normalize(data.candidates, dim=1).numpy()
        index = faiss.index_factory(setup.D, f"IVF{setup.lists},Flat", faiss.METRIC_INNER_PRODUCT)
        index.train(rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: 64 * setup.lists]])
        index.add(rows)
    with clock(spent, "search_s"):
        index.nprobe = probes
        order = descending_tailness(tailness)
        shares = cluster_budgets(tailness, setup.budget, 1.0)[order].tolist()
        keep, taken, chosen = 0, torch.zeros(setup.candidates, dtype=torch.bool), []
        for centroid, share in zip(data.centroids[order], shares, strict=True):
            keep += share  # those before it take no more than this
            _, found = index.search(centroid[None].numpy(), keep)
            found = torch.from_numpy(found[0])
            found = found[found >= 0]
            mine = found[~taken[found]][:share]
            taken[mine] = True
            chosen.append(mine)
        return torch.cat(chosen)


class clock:  # noqa: N801  reads as a statement
    def __init__(self, spent: dict[str, float], name: str):
        self.spent, self.name = spent, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.spent[self.name] = time.perf_counter() - self.start


def row(method: str, choose: Callable[[dict], Tensor], truth: Tensor | None, budget: int) -> tuple[dict, Tensor]:
    spent: dict[str, float] = {}
    found: list[Tensor] = []
    peak = peak_mib_cpu(lambda: found.append(choose(spent)))
    chosen = found[0]
    recall = 1.0 if truth is None else torch.isin(chosen, truth).sum().item() / budget
    times = {name: spent.get(name, 0.0) for name in ("tailness_s", "index_s", "search_s")}
    return {"method": method, "recall": recall, **times, "total_s": sum(times.values()), "peak_mib": peak}, chosen

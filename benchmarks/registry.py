"""Cases and implementations: what is measured, and against what. A case is data, an implementation a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import ltood_fast
from ltood_fast.reference import cluster_kl, contrastive, guided, knn


@dataclass(frozen=True)
class Case:
    """One row group of the table: an op at one size. `make` builds the keyword arguments from a seeded generator."""

    op: str
    size: dict[str, int]
    make: Callable[[torch.Generator], dict]
    rounds: int = 7
    directions: tuple[str, ...] = ("forward", "forward+backward")
    rivals: tuple[str, ...] = field(default=("eager", "compile"))

    @property
    def name(self) -> str:
        return f"{self.op} " + " ".join(f"{k}={v}" for k, v in self.size.items())


def _rows(n: int, d: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(n, d, generator=generator)


def _contrastive(op: str, n: int, d: int, rounds: int) -> Case:
    def make(generator):
        inputs = {"z": _rows(n, d, generator).requires_grad_(), "temperature": 0.2}
        if op == "stage1_loss":
            inputs["domain"] = torch.randint(0, 2, (n // 2,), generator=generator).repeat(2)
        if op == "supcon":
            inputs["labels"] = torch.randint(0, 10, (n,), generator=generator)
        return inputs

    return Case(op, {"N": n, "D": d}, make, rounds)


def _guided(op: str, n: int, d: int, k: int, rounds: int) -> Case:
    def make(generator):
        centroids = _rows(k, d, generator)
        clusters = torch.randint(0, k, (n // 2,), generator=generator).repeat(2)
        guide = centroids[clusters] + _rows(n, d, generator)
        z = (guide + 0.5 * _rows(n, d, generator)).requires_grad_()
        far = ltood_fast.farthest_cluster(centroids)
        return {"z": z, "guide": guide, "clusters": clusters, "far": far, "temperature": 0.2}

    return Case(op, {"N": n, "D": d, "K": k}, make, rounds)


def _distill(n: int, d: int, rounds: int) -> Case:
    def make(generator):
        guide = _rows(n, d, generator)
        return {"z": (guide + 0.5 * _rows(n, d, generator)).requires_grad_(), "guide": guide, "temperature": 0.2}

    return Case("relational_distill", {"N": n, "D": d}, make, rounds)


def _cluster_kl(n: int, d: int, k: int, rounds: int) -> Case:
    def make(generator):
        centroids = _rows(k, d, generator)
        z = centroids[torch.randint(0, k, (n,), generator=generator)] + _rows(n, d, generator)
        return {"z": z.requires_grad_(), "centroids": centroids.requires_grad_()}

    return Case("cluster_kl", {"N": n, "D": d, "K": k}, make, rounds)


def _knn(n: int, d: int, k: int, rounds: int) -> Case:
    def make(generator):
        return {"x": _rows(n, d, generator), "k": k}

    return Case("knn", {"N": n, "D": d, "k": k}, make, rounds, ("forward",), ("matmul+topk", "faiss"))


# Products of our scheme, forward and forward + backward, in units of the full one, 2 N N D (2 N K D) FLOP. Symmetric
# passes take half of it; gradients G u take it whole. Guided: student and guide for N N / K pairs, and both gradients.
PRODUCTS = {
    "nt_xent": (0.5, 2), "supcon": (0.5, 2), "psd_loss": (0.5, 2), "stage1_loss": (0.5, 2), "knn": (0.5, 0.5),
    "guided_contrastive": (0.2, 0.6), "relational_distill": (2, 5), "stage2_loss": (2.2, 5.6), "cluster_kl": (1, 3),
}  # fmt: skip


def floor_seconds(op: str, direction: str, size: dict[str, int], flop_per_s: float) -> float:
    """The least time that the products of our scheme take at a measured rate."""
    products = PRODUCTS[op][direction == "forward+backward"]
    columns = size["K"] if op == "cluster_kl" else size["N"]
    return products * 2 * size["N"] * columns * size["D"] / flop_per_s


CASES = [
    _contrastive("nt_xent", 1024, 128, 15),
    _contrastive("nt_xent", 4096, 128, 7),
    _contrastive("nt_xent", 16384, 128, 3),
    _contrastive("supcon", 4096, 128, 7),
    _contrastive("psd_loss", 4096, 128, 5),
    _contrastive("stage1_loss", 4096, 128, 5),
    _guided("guided_contrastive", 4096, 128, 10, 5),
    _distill(4096, 128, 5),
    _guided("stage2_loss", 4096, 128, 10, 5),
    _cluster_kl(50_000, 128, 100, 5),
    _knn(50_000, 128, 10, 1),
]


def _unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=1)


def knn_matmul_topk(x: torch.Tensor, k: int, chunk: int = 2048) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain PyTorch way that fits in memory: chunks of rows against all columns, then topk."""
    x = _unit(x)
    parts = []
    for start in range(0, x.shape[0], chunk):
        cosines = x[start : start + chunk] @ x.T
        rows = torch.arange(cosines.shape[0])
        cosines[rows, rows + start] = -torch.inf
        parts.append(cosines.topk(k, dim=1))
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def knn_faiss(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """faiss-cpu IndexFlatIP on unit rows, k + 1 neighbours because the row itself comes back too; same threads."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    rows = _unit(x).numpy()
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    cosines, columns = index.search(rows, k + 1)
    return torch.from_numpy(cosines[:, 1:]), torch.from_numpy(columns[:, 1:])


def reference_of(op: str) -> Callable:
    """The plain PyTorch definition of a public function."""
    return next(getattr(family, op) for family in (contrastive, guided, cluster_kl, knn) if hasattr(family, op))


def implementations(case: Case) -> dict[str, Callable]:
    """Name -> function with the case's keyword arguments. "compile": torch.compile of the reference."""
    rivals = {
        "eager": lambda: reference_of(case.op),
        "compile": lambda: torch.compile(reference_of(case.op), fullgraph=True, dynamic=False),
        "matmul+topk": lambda: knn_matmul_topk,
        "faiss": lambda: knn_faiss,
    }
    return {**{name: rivals[name]() for name in case.rivals}, "ours": getattr(ltood_fast, case.op)}

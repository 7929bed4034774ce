"""The registry of cases: an op at one size on one device. A case is data; `suite` lists those of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch

FORWARD, BOTH = "forward", "forward+backward"
CHECKED_ROWS = 16384  # the float64 reference of an N×N loss takes 8 N² bytes a matrix: larger cases are checked here


@dataclass(frozen=True)
class Case:
    op: str
    N: int
    D: int = 128
    K: int | None = None
    k: int | None = None
    temperature: float | None = 0.2
    dtype: str = "float32"
    direction: str = BOTH
    device: str = "cpu"

    @property
    def name(self) -> str:
        sizes = [f"{name}={getattr(self, name)}" for name in ("N", "D", "K", "k") if getattr(self, name) is not None]
        extra = ([] if self.dtype == "float32" else [self.dtype]) + ([] if self.direction == BOTH else [self.direction])
        return " ".join([self.op, *sizes, *extra])

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def checked(self) -> Case:
        """The case at the size where its implementations are compared with the reference: its own, if that fits."""
        return replace(self, N=min(self.N, CHECKED_ROWS)) if not (self.K or self.k) else self

    def labels(self) -> dict:
        """The case as columns of a row of results."""
        return {"case": self.name, **asdict(self)}


def _searches(device: str, sizes: dict[str, list[tuple[int, ...]]]) -> list[Case]:
    """kNN of (N, k) and k-means of (N, K)."""
    found = [Case("knn", n, k=k, temperature=None, direction=FORWARD, device=device) for n, k in sizes["knn"]]
    clusterings = [(n, K) for n, K in sizes["kmeans"]]
    return found + [Case("kmeans", n, K=K, temperature=None, direction=FORWARD, device=device) for n, K in clusterings]


def _clusterings(device: str, sizes: list[tuple[int, int]]) -> list[Case]:
    return [Case("cluster_kl", n, K=K, temperature=None, device=device) for n, K in sizes]


def _losses(n: int, device: str, dtype: str) -> list[Case]:
    """Every N×N loss at one size."""
    common = {"N": n, "device": device, "dtype": dtype}
    return [
        Case("supcon", K=10, **common),
        Case("psd_loss", **common),
        Case("stage1_loss", **common),
        Case("guided_contrastive", K=10, **common),
        Case("relational_distill", **common),
        Case("stage2_loss", K=10, **common),
    ]


CPU_QUICK = [  # a compilation takes seconds: few losses
    Case("nt_xent", 1024),
    Case("stage1_loss", 1024),
    Case("clip", 1024),
    *_clusterings("cpu", [(5_000, 100)]),
    *_searches("cpu", {"knn": [(5_000, 10)], "kmeans": [(5_000, 100)]}),
]
CPU_FULL = [
    *(Case("nt_xent", n) for n in (256, 1024, 2048, 4096, 8192, 16384)),
    Case("nt_xent", 4096, direction=FORWARD),
    Case("nt_xent", 4096, dtype="bfloat16"),
    Case("nt_xent", 4096, D=512),
    *_losses(4096, "cpu", "float32"),
    *(Case("stage1_loss", n) for n in (1024, 2048)),
    Case("clip", 4096),
    *_clusterings("cpu", [(50_000, 100)]),
    *_searches("cpu", {"knn": [(10_000, 10), (50_000, 10)], "kmeans": [(50_000, 100)]}),
]
CUDA_QUICK = [
    *(Case("nt_xent", n, dtype="bfloat16", device="cuda") for n in (1024, 4096, 16384)),
    Case("nt_xent", 4096, device="cuda"),
    *_losses(4096, "cuda", "bfloat16"),
    Case("clip", 4096, dtype="bfloat16", device="cuda"),
    *_clusterings("cuda", [(50_000, 100)]),
    *_searches("cuda", {"knn": [(50_000, 10)], "kmeans": [(50_000, 100)]}),
]
CUDA_FULL = [
    *(Case("nt_xent", n, dtype="bfloat16", device="cuda") for n in (1024, 4096, 8192, 16384, 32768, 65536)),
    Case("nt_xent", 16384, dtype="bfloat16", device="cuda", direction=FORWARD),
    Case("nt_xent", 16384, D=512, dtype="bfloat16", device="cuda"),
    *(Case("nt_xent", n, device="cuda") for n in (4096, 16384)),
    *_losses(16384, "cuda", "bfloat16"),
    Case("stage1_loss", 16384, device="cuda"),
    *(Case("clip", n, D=512, dtype="bfloat16", device="cuda") for n in (4096, 16384, 32768)),
    *_clusterings("cuda", [(200_000, 1000)]),
    *_searches("cuda", {"knn": [(100_000, 10), (300_000, 10)], "kmeans": [(300_000, 1000)]}),
]
SUITES = {("cpu", True): CPU_QUICK, ("cpu", False): CPU_FULL, ("cuda", True): CUDA_QUICK, ("cuda", False): CUDA_FULL}


def suite(device: str, quick: bool) -> list[Case]:
    """The cases of a run."""
    return SUITES[device, quick]

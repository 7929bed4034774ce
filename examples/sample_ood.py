"""Choose OOD images for the tail of your own data: embeddings in, row numbers of the pool out.

    python examples/sample_ood.py

The embeddings here are made up: ten classes of falling size, and a pool that is read from its file block by block.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch

import ltood_fast
from ltood_fast.sampling import kmeans

CLASSES, WIDTH, INSIDE, POOL, BUDGET = 10, 64, 4, 20_000, 500


def make_data(folder: Path) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """(embeddings [N, D], labels [N], memory-mapped pool [M, D])"""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(CLASSES, WIDTH, generator=generator)
    sizes = [int(1000 * 0.55**c) for c in range(CLASSES)]
    labels = torch.arange(CLASSES).repeat_interleave(torch.tensor(sizes))
    within = torch.randn(len(labels), INSIDE, generator=generator) @ torch.randn(INSIDE, WIDTH, generator=generator)
    embeddings = centers[labels] + 0.2 * within
    near = centers[torch.randint(CLASSES, (POOL,), generator=generator)]
    pool = near + 1.5 * torch.randn(POOL, WIDTH, generator=generator)
    np.save(folder / "pool.npy", pool.numpy())
    return embeddings, labels, np.load(folder / "pool.npy", mmap_mode="r")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        embeddings, labels, pool = make_data(Path(folder))
        centroids, clusters = kmeans(embeddings, CLASSES, seed=0)
        centroids, clusters = ltood_fast.refine_centroids(embeddings, centroids)
        tailness = ltood_fast.cluster_tailness(embeddings, clusters, CLASSES)
        chosen, cluster_of = ltood_fast.sample_ood(pool, centroids, tailness, BUDGET)

    print("cluster  rows  commonest class  tailness  taken")
    for c in tailness.argsort(descending=True).tolist():
        rows = labels[clusters == c]
        taken = int((cluster_of == c).sum())
        print(f"{c:7d} {len(rows):5d} {int(rows.mode().values):16d} {tailness[c]:9.3f} {taken:6d}")
    print(f"{len(chosen)} of {len(pool):,} rows, the first {chosen[:3].tolist()}")


if __name__ == "__main__":
    main()

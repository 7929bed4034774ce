"""The sampler with its rows on three ranks, one of which holds few and one none, against one process with all rows."""

import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist

import ltood_fast
from ltood_fast.sampling import kmeans, ood
from ltood_fast.sampling.resample import Budget, choose_ood, cluster_embeddings, density_weights

WORLD = 3
CUTS = {"even": [40, 40, 40], "uneven": [70, 0, 50], "one row": [1, 118, 1]}
POOL = [0, 130, 170]
N_CLUSTERS = 6


def rows(n=120, d=9, dtype=torch.float64, seed=0):
    """Blobs, so that clusters are clear."""
    generator = torch.Generator().manual_seed(seed)
    centers = 3 * torch.randn(N_CLUSTERS, d, generator=generator, dtype=torch.float64)
    return (centers[torch.arange(n) % N_CLUSTERS] + torch.randn(n, d, generator=generator, dtype=torch.float64)).to(
        dtype
    )


def ties(n):
    """Rows of signs, 16 wide: their norm is 4, all arithmetic is exact and most cosines come many times."""
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(n)).sign()


def calls(part, group):
    """Name -> call of a public function on a rank's part of the rows; on all rows without a group."""
    x, pool, few = part(rows()), part(rows(300, seed=1)), {"group": group}
    assignments = torch.arange(120) % N_CLUSTERS
    assignments[assignments == 4] = 3  # cluster 4 is empty
    pairs = part(rows().float()[torch.arange(120) % 100])
    sampling = rows(N_CLUSTERS, seed=2), torch.tensor([0.3, float("nan"), 0.9, 0.5, 0.5, 0.1]), 90
    return {
        "knn": lambda: ltood_fast.knn(x, 7, **few),
        "knn float32": lambda: ltood_fast.knn(x.float(), 7, **few),
        "knn ties": lambda: ltood_fast.knn(part(ties(120)), 20, **few),
        "knn y ties": lambda: ltood_fast.knn(part(ties(120)), 20, y=part(ties(300)), **few),
        "knn y": lambda: ltood_fast.knn(x, 60, y=pool, normalize=False, **few),
        "density": lambda: ltood_fast.knn_density(x, 5, **few),
        "density ivf": lambda: ltood_fast.knn_density(x.float(), 5, method="ivf", n_lists=9, n_probes=9, **few),
        "tailness": lambda: ltood_fast.cluster_tailness(x, part(assignments), N_CLUSTERS, k=4, **few),
        "refine": lambda: ltood_fast.refine_centroids(x, sampling[0], steps=9, lr=0.5, **few),
        "refine stops": lambda: ltood_fast.refine_centroids(x, sampling[0], steps=60, lr=0.5, tol=0.05, **few),
        "kmeans": lambda: kmeans(x.float(), N_CLUSTERS, seed=5, **few),
        "kmeans flat": lambda: kmeans(x.float(), N_CLUSTERS, seed=5, spherical=False, **few),
        "kmeans of every row": lambda: kmeans(x.float(), 120, **few),
        # Of some of the 20 pairs of equal rows both are in the start, and the second one's cluster is empty.
        "kmeans empty": lambda: kmeans(pairs, 50, iterations=4, spherical=False, **few),
        "sample": lambda: ltood_fast.sample_ood(pool, *sampling, **few),
        "sample chunks": lambda: ltood_fast.sample_ood(iter(pool.split(7)), *sampling, block_rows=16, **few),
        "sample array": lambda: ltood_fast.sample_ood(pool.numpy(), *sampling, block_rows=16, **few),
        "sample ties": lambda: ltood_fast.sample_ood(part(ties(300)), ties(6), *sampling[1:], **few),
        "random": lambda: ltood_fast.sample_ood(
            pool, *sampling, strategy="random", generator=torch.Generator().manual_seed(3), **few
        ),
        "resample": lambda: resample(x.float(), pool.float(), group),
        "weights": lambda: (density_weights(x, 5, **few),),
    }


def resample(x, pool, group):
    clusters = cluster_embeddings(x, N_CLUSTERS, seed=1, group=group)
    sample = choose_ood(x, pool, clusters, Budget(40), group=group)
    return clusters.assignments, clusters.centroids, sample.tailness, sample.indices, sample.index_clusters


# Which results lie on the ranks as the rows do; the others are the same on all of them.
OF_ROWS = {
    "knn": (0, 1), "knn float32": (0, 1), "knn y": (0, 1), "knn ties": (0, 1), "knn y ties": (0, 1),
    "density": (0,), "density ivf": (0,), "refine": (1,), "refine stops": (1,),
    "kmeans": (1,), "kmeans flat": (1,), "kmeans of every row": (1,), "kmeans empty": (1,), "resample": (0,),
}  # fmt: skip

ERRORS = {
    "a rank's NaN": lambda x, r, g: ltood_fast.sample_ood(x / (r != 1), x[:2] * 0 + 1, torch.ones(2), 2, group=g),
    "a rank's k": lambda x, r, g: ltood_fast.knn(x, 3 + (r == 2), group=g),
    "a rank's width": lambda x, r, g: ltood_fast.knn_density(x[:, : 9 - (r == 1)], 3, group=g),
    "a rank's dtype": lambda x, r, g: kmeans(x.float() if r else x, 3, group=g),
    "a rank's centroids": lambda x, r, g: ltood_fast.refine_centroids(x, torch.eye(2, 9) * (r + 1), group=g),
    "a rank's type": lambda x, r, g: ltood_fast.knn([1] if r == 2 else x, 3, group=g),
    "few rows": lambda x, r, g: ltood_fast.knn(x[: r == 0], 3, group=g),
    "few candidates": lambda x, r, g: ltood_fast.sample_ood(x[:2], torch.eye(2, 9), torch.ones(2), 7, group=g),
    "many clusters": lambda x, r, g: kmeans(x[:2], 7, group=g),
    "nothing at all": lambda x, r, g: ltood_fast.refine_centroids(x[:0], torch.eye(2, 9), group=g),
    "a rank's method": lambda x, r, g: ltood_fast.cluster_tailness(
        x, torch.arange(10), 10, method="ivf" if r else "exact", group=g
    ),
}
SENTENCES = {
    "a rank's NaN": "sample_ood: candidates must be finite, got NaN or Inf in row 0, on rank 1",
    "a rank's k": "knn: k must be the same on all ranks of the group, got 3 on rank 0 and 4 on rank 2",
    "a rank's width": "knn_density: shape must be the same on all ranks of the group, got [9] on rank 0 and [8] on ",
    "a rank's dtype": "kmeans: dtype must be the same on all ranks of the group, got torch.float64 on rank 0 and torch",
    "a rank's centroids": "refine_centroids: centroids must be the same on all ranks of the group, got torch.float32 (",
    "a rank's type": "knn: x must be a tensor, got list, on rank 2",
    "few rows": "knn: k must be in [1, 0], got 3",
    "few candidates": "sample_ood: candidates must be at least as many rows as the budget 7, got 6 rows",
    "many clusters": "kmeans: n_clusters must be in [1, 6], got 7",
    "nothing at all": "refine_centroids: z must be non-empty on a rank at least, got 0 rows",
    "a rank's method": "cluster_tailness: method must be the same on all ranks of the group, got exact on rank 0 and ",
}


def part_of(sizes, rank):
    return lambda x: x.split(sizes if len(x) == 120 else POOL)[rank]


def as_tuple(result):
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def everything(rank, world):
    """On one rank: every call with every cut, and every error."""
    results, errors = {}, {}
    for cut, sizes in CUTS.items():
        for name, function in calls(part_of(sizes, rank), dist.group.WORLD).items():
            results[cut, name] = as_tuple(function())
    for name, function in ERRORS.items():
        try:
            function(rows(30)[:10], rank, dist.group.WORLD)
        except (TypeError, ValueError) as error:
            errors[name] = str(error)
    return results, errors


@pytest.fixture(scope="module")
def ranks(groups):
    pytest.importorskip("faiss")
    return groups(WORLD).results(everything)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", list(calls(lambda x: x, None)))
def test_many_ranks_find_what_one_process_finds(name, cut, ranks):
    expected = as_tuple(calls(lambda x: x, None)[name]())
    for i, whole in enumerate(expected):
        of_ranks = [results[cut, name][i] for results, _ in ranks]
        if i in OF_ROWS.get(name, ()):
            assert [len(part) for part in of_ranks] == CUTS[cut]
            found = torch.cat(of_ranks)
        else:
            assert all(torch.equal(part.nan_to_num(), of_ranks[0].nan_to_num()) for part in of_ranks)
            found = of_ranks[0]
        assert found.dtype == whole.dtype
        if whole.dtype == torch.int64:
            assert torch.equal(found, whole)
        else:
            atol = 1e-11 if whole.dtype == torch.float64 else 1e-5
            assert torch.allclose(found, whole, rtol=0, atol=atol, equal_nan=True)


@pytest.mark.parametrize("name", SENTENCES)
def test_an_error_of_one_rank_is_one_sentence_on_all(name, ranks):
    sentences = [errors[name] for _, errors in ranks]
    assert len(set(sentences)) == 1
    assert sentences[0].startswith(SENTENCES[name])


def test_a_file_is_read_a_block_at_a_time(tmp_path):
    pool = rows(50, dtype=torch.float32)
    np.save(tmp_path / "pool.npy", pool.numpy())
    streamed = np.load(tmp_path / "pool.npy", mmap_mode="r")
    assert [len(block) for block in ood._read(streamed, 16)] == [16, 16, 16, 2]
    arguments = rows(3, seed=2), torch.tensor([0.3, 0.9, 0.5]), 20
    expected = ltood_fast.sample_ood(pool, *arguments)[0]
    assert torch.equal(ltood_fast.sample_ood(streamed, *arguments, block_rows=16)[0], expected)


def warnings_of_few_rows(rank, world):
    """On one rank: what k-means in 5 clusters says of rows of 3 kinds, of which each rank holds one kind or two."""
    kinds = torch.eye(3, 9)[[[0, 1], [1], [2]][rank]].repeat(4, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kmeans(kinds, 5, group=dist.group.WORLD)
        kmeans(kinds, 3, group=dist.group.WORLD)
    return [str(warning.message) for warning in caught]


def test_few_distinct_rows_of_all_ranks_are_told_once(groups):
    pytest.importorskip("faiss")
    first, *others = groups(WORLD).results(warnings_of_few_rows)
    assert [sentence.split(":")[1] for sentence in first] == [
        " x should hold at least as many distinct rows as n_clusters = 5, got 3"
    ]
    assert others == [[], []]

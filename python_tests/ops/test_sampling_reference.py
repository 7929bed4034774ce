"""sample_ood and k-means against plain loops; the streamed form against the in-memory form."""

import math
import sys

import numpy as np
import pytest
import torch

import ltood_fast
from ltood_fast.reference import sampling as reference
from ltood_fast.sampling import kmeans, ood

NAN = math.nan


def loops_budgets(tailness, budget, temperature):
    known = [c for c, t in enumerate(tailness) if not math.isnan(t)]
    mean = sum(tailness[c] for c in known) / len(known)
    std = math.sqrt(sum((tailness[c] - mean) ** 2 for c in known) / len(known))
    weights = {c: math.exp((tailness[c] - mean) / std / temperature) if std else 1.0 for c in known}
    shares = {c: w * budget / sum(weights.values()) for c, w in weights.items()}
    budgets = [math.floor(shares.get(c, 0)) for c in range(len(tailness))]
    for c in sorted(known, key=lambda c: (budgets[c] - shares[c], c))[: budget - sum(budgets)]:
        budgets[c] += 1
    return budgets


def loops_sample(candidates, centroids, tailness, budget, temperature=1.0):
    budgets = loops_budgets(tailness, budget, temperature)
    taken, indices, clusters = set(), [], []
    known = [c for c, t in enumerate(tailness) if not math.isnan(t)]
    for c in sorted(known, key=lambda c: (-tailness[c], c)):
        mu = centroids[c]
        cosine = [x @ mu / math.sqrt(x @ x) / math.sqrt(mu @ mu) for x in candidates]
        ranked = [i for i in sorted(range(len(candidates)), key=lambda i: (-cosine[i], i)) if i not in taken]
        taken.update(ranked[: budgets[c]])
        indices += ranked[: budgets[c]]
        clusters += [c] * budgets[c]
    return indices, clusters


def case(m=40, k=4, d=3):
    """Candidates near each other, so that clusters compete for the same rows."""
    candidates = torch.randn(m, d, dtype=torch.float64) + 2
    return candidates, torch.randn(k, d, dtype=torch.float64) + 2, torch.rand(k, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 0.1, 5.0])
@pytest.mark.parametrize("tailness", [[0.3, 0.1, 0.7], [0.2, NAN, 0.9, 0.2], [0.1, 0.1, 0.1], [NAN, 0.4, NAN], [0.5]])
def test_budgets_match_the_loops(tailness, temperature):
    for budget in (1, 2, 7, 100, 9999):
        budgets = reference.cluster_budgets(torch.tensor(tailness, dtype=torch.float64), budget, temperature)
        assert budgets.tolist() == loops_budgets(tailness, budget, temperature)
        assert budgets.sum() == budget


def test_budgets_closed_form():
    assert reference.cluster_budgets(torch.tensor([0.1, 0.1, 0.1, 0.1]), 10).tolist() == [3, 3, 2, 2]
    e = math.e  # two clusters have z-scores -1 and 1
    assert reference.cluster_budgets(torch.tensor([3.0, 5.0]), 1000).tolist() == [round(1000 / (1 + e * e)), 881]


@pytest.mark.parametrize("budget", [1, 7, 25, 40])
def test_sampling_matches_the_loops(budget):
    candidates, centroids, tailness = case()
    expected = loops_sample(candidates.numpy(), centroids.numpy(), tailness.tolist(), budget)
    for function in (reference.sample_ood, ltood_fast.sample_ood):
        indices, clusters = function(candidates, centroids, tailness, budget)
        assert (indices.tolist(), clusters.tolist()) == expected
        assert len(set(indices.tolist())) == budget
        assert indices.dtype == clusters.dtype == torch.int64


def test_temperature_and_empty_clusters():
    candidates, centroids, tailness = case()
    tailness[2] = NAN
    expected = loops_sample(candidates.numpy(), centroids.numpy(), tailness.tolist(), 20, temperature=0.3)
    for function in (reference.sample_ood, ltood_fast.sample_ood):
        indices, clusters = function(candidates, centroids, tailness, 20, temperature=0.3)
        assert (indices.tolist(), clusters.tolist()) == expected
        assert 2 not in clusters


@pytest.mark.parametrize("cut", [[1] * 90, [89, 1], [0, 45, 45], [7] * 12 + [6], [90]])
def test_streaming_gives_the_same_bits(monkeypatch, cut):
    """float32, so that products over blocks of another size could differ; blocks of 16 rows, so that there are many."""
    monkeypatch.setattr(ood, "ROWS", 16)
    candidates, centroids, tailness = (a.float() for a in case(m=90, k=6, d=17))
    chunks = [chunk for chunk in candidates.split(cut) if len(chunk)]
    assert [len(block) for block in ood._blocks(chunks, 16)] == [16] * 5 + [10]
    whole = ltood_fast.sample_ood(candidates, centroids, tailness, 30)
    for streamed in (
        ltood_fast.sample_ood(chunks, centroids, tailness, 30),
        ltood_fast.sample_ood(iter(chunks), centroids, tailness, 30),
    ):
        assert torch.equal(streamed[0], whole[0])
        assert torch.equal(streamed[1], whole[1])


@pytest.mark.parametrize("seed", range(5))
def test_streaming_keeps_enough_when_clusters_share_rows(monkeypatch, seed):
    """All centroids are nearly the same, so a late cluster loses all of its best rows to earlier ones."""
    torch.manual_seed(seed)
    monkeypatch.setattr(ood, "ROWS", 10)
    candidates, centroids, tailness = case(m=200, k=5)
    centroids = centroids[:1] + 1e-3 * centroids
    expected = loops_sample(candidates.numpy(), centroids.numpy(), tailness.tolist(), 60)
    indices, clusters = ltood_fast.sample_ood(candidates.split(7), centroids, tailness, 60)
    assert (indices.tolist(), clusters.tolist()) == expected


def test_memory_is_bounded(monkeypatch):
    """No centroid keeps more rows than the budgets up to its own."""
    monkeypatch.setattr(ood, "ROWS", 8)
    kept = []
    merge = ood._merge
    monkeypatch.setattr(ood, "_merge", lambda *a: kept.append(len(merge(*a)[1])) or merge(*a))
    candidates, centroids, tailness = case(m=200)
    ltood_fast.sample_ood(candidates.split(3), centroids, tailness, 12)
    assert max(kept) <= 12


def test_ties_go_to_the_lower_row(monkeypatch):
    monkeypatch.setattr(ood, "ROWS", 4)
    candidates, centroids = torch.ones(10, 2), torch.ones(2, 2)
    indices, clusters = ltood_fast.sample_ood(candidates, centroids, torch.tensor([0.5, 0.5]), 7)
    assert indices.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert clusters.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_random_strategy():
    candidates, centroids, tailness = case(m=1000)
    random = {"budget": 300, "strategy": "random"}
    draws = [
        ltood_fast.sample_ood(candidates, centroids, tailness, generator=torch.Generator().manual_seed(s), **random)
        for s in (1, 1, 2)
    ]
    assert torch.equal(draws[0][0], draws[1][0])
    assert not torch.equal(draws[0][0], draws[2][0])
    assert len(set(draws[0][0].tolist())) == 300
    assert draws[0][0].min() >= 0
    assert draws[0][0].max() < 1000
    assert abs(draws[0][0].double().mean() - 499.5) < 60  # 3.6 standard deviations of a uniform draw
    assert set(draws[0][1].tolist()) == {-1}
    generator = torch.Generator().manual_seed(1)
    streamed, _ = ltood_fast.sample_ood(iter(candidates.split(7)), centroids, tailness, generator=generator, **random)
    assert torch.equal(streamed, draws[0][0])
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(
        reference.sample_ood(candidates, centroids, tailness, generator=generator, **random)[0], draws[0][0]
    )
    torch.manual_seed(5)
    first = ltood_fast.sample_ood(candidates, centroids, tailness, **random)[0]
    torch.manual_seed(5)
    assert torch.equal(ltood_fast.sample_ood(candidates, centroids, tailness, **random)[0], first)


def test_half_precision_candidates():
    candidates, centroids, tailness = case()
    expected, _ = ltood_fast.sample_ood(candidates.bfloat16().double(), centroids, tailness, 10)
    assert torch.equal(ltood_fast.sample_ood(candidates.bfloat16(), centroids, tailness, 10)[0], expected)


C, T, M = torch.ones(2, 3), torch.tensor([0.1, 0.2]), torch.ones(5, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"centroids": [1]}, TypeError, "centroids must be a tensor, got list"),
        ({"centroids": C * NAN}, ValueError, "centroids must be finite, got NaN or Inf in row 0"),
        ({"tailness": [0.1, 0.2]}, TypeError, "tailness must be a float tensor, got list"),
        ({"tailness": T.int()}, TypeError, "tailness must be a float tensor, got torch.int32"),
        ({"tailness": T[:1]}, ValueError, "tailness must be of shape [2], got shape (1,)"),
        ({"tailness": T / 0}, ValueError, "tailness must be finite, or NaN for an empty cluster, got inf"),
        ({"tailness": T * NAN}, ValueError, "tailness must be known for a cluster at least, got NaN for all"),
        ({"budget": 0}, ValueError, "budget must be at least 1, got 0"),
        ({"budget": 6}, ValueError, "candidates must be at least as many rows as the budget 6, got 5 rows"),
        (
            {"budget": 6, "strategy": "random"},
            ValueError,
            "candidates must be at least as many rows as the budget 6, got 5 rows",
        ),
        ({"candidates": []}, ValueError, "candidates must be at least as many rows as the budget 2, got 0 rows"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
        ({"strategy": "best"}, ValueError, "strategy must be one of tailness, random, got 'best'"),
        ({"candidates": 3}, TypeError, "candidates must be a tensor or an iterable of tensors, got int"),
        (
            {"candidates": [(M, M)]},
            TypeError,
            "candidates must be a tensor, got tuple; join tensors by torch.cat(candidates)",
        ),
        ({"candidates": M[:, :2]}, ValueError, "candidates must be 3 wide as centroids is, got shape (5, 2)"),
        ({"candidates": [M, torch.cat([M, M / 0])]}, ValueError, "candidates must be finite, got NaN or Inf in row 10"),
    ],
)
def test_bad_input(arguments, error, sentence):
    with pytest.raises(error) as raised:
        ltood_fast.sample_ood(**{"candidates": M, "centroids": C, "tailness": T, "budget": 2, **arguments})
    assert str(raised.value) == f"sample_ood: {sentence}"


def blobs(per=50):
    centers = torch.eye(4) * 10
    return (centers[:, None] + torch.randn(4, per, 4)).reshape(-1, 4)


@pytest.mark.parametrize("spherical", [True, False])
def test_kmeans_finds_blobs(spherical):
    x = blobs()
    centroids, assignments = kmeans(x, 4, seed=3, spherical=spherical)
    groups = assignments.view(4, 50)
    assert all(len(set(group.tolist())) == 1 for group in groups)
    assert len({group[0].item() for group in groups}) == 4
    rows = torch.nn.functional.normalize(x) if spherical else x
    for group in range(4):
        mean = rows.view(4, 50, 4)[group].mean(0)
        expected = torch.nn.functional.normalize(mean, dim=0) if spherical else mean
        assert torch.allclose(centroids[groups[group, 0]], expected, atol=1e-4)


def test_kmeans_assigns_to_the_nearest_and_repeats_itself():
    x = torch.randn(300, 8, dtype=torch.float64)
    centroids, assignments = kmeans(x, 7, iterations=3)
    assert centroids.shape == (7, 8)
    assert assignments.dtype == torch.int64
    unit = torch.nn.functional.normalize(x).float()
    assert torch.equal(torch.cdist(unit, centroids).argmin(1), assignments)
    again = kmeans(x, 7, iterations=3)
    assert torch.equal(again[0], centroids)
    assert torch.equal(again[1], assignments)
    assert not torch.equal(kmeans(x, 7, iterations=3, seed=1)[0], centroids)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"n_clusters": 6}, ValueError, "n_clusters must be in [1, 5], got 6"),
        ({"n_clusters": 2.0}, TypeError, "n_clusters must be an int, got float"),
        ({"iterations": 0}, ValueError, "iterations must be at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be in [0, 2147483646], got -1"),
        ({"x": M * NAN}, ValueError, "x must be finite, got NaN or Inf in row 0"),
        ({"x": M.int()}, TypeError, "x must be float64, float32, bfloat16 or float16, got torch.int32"),
    ],
)
def test_kmeans_bad_input(arguments, error, sentence):
    with pytest.raises(error) as raised:
        kmeans(**{"x": M, "n_clusters": 2, **arguments})
    assert str(raised.value) == f"kmeans: {sentence}"


def test_kmeans_without_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"^kmeans: FAISS cannot be imported \(.*pip install faiss-cpu`$"):
        kmeans(torch.as_tensor(np.ones((4, 2), dtype=np.float32)), 2)

import warnings

import numpy as np
import pytest
import torch

import ltood_fast
from ltood_fast.sampling.kmeans import kmeans
from ltood_fast.sampling.resample import (
    Budget,
    choose_for_samples,
    choose_ood,
    cluster_embeddings,
    density_weights,
    gate_weights,
    mutual_weights,
    refine_by_minibatches,
)


@pytest.fixture
def embeddings():
    """Cluster 0 dense and large, 1 and 2 sparse and small; on rays of very different lengths."""
    directions = torch.eye(6)[:3].repeat_interleave(torch.tensor([40, 12, 12]), dim=0)
    spread = torch.tensor([0.05, 0.5, 0.5]).repeat_interleave(torch.tensor([40, 12, 12])).unsqueeze(1)
    lengths = torch.tensor([0.1, 1.0, 30.0]).repeat(22)[:64].unsqueeze(1)
    return lengths * (directions + spread * torch.rand(64, 6))


def test_clusters_are_of_directions_not_of_lengths(embeddings):
    clusters = cluster_embeddings(embeddings, 3, seed=1)
    groups = [set(part.tolist()) for part in clusters.assignments.split([40, 12, 12])]
    assert [len(group) for group in groups] == [1, 1, 1]
    assert len(set.union(*groups)) == 3
    assert clusters.centroids.shape == (3, 6)


def test_refinement_starts_at_kmeans_and_can_be_left_out(embeddings):
    plain = cluster_embeddings(embeddings, 3, refine_steps=0, seed=1)
    expected = ltood_fast.sampling.kmeans(torch.nn.functional.normalize(embeddings, dim=1), 3, seed=1)
    assert torch.equal(plain.centroids, expected[0])
    refined = cluster_embeddings(embeddings, 3, refine_steps=20, seed=1)
    assert not torch.equal(refined.centroids, plain.centroids)


def test_the_seed_is_that_of_kmeans(embeddings):
    noise = torch.randn(200, 6)
    one, same, other = (cluster_embeddings(noise, 8, refine_steps=0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.centroids, same.centroids)
    assert not torch.equal(one.centroids, other.centroids)


def test_sparse_clusters_get_more_and_their_nearest_images(embeddings):
    clusters = cluster_embeddings(embeddings, 3, seed=1)
    pool = torch.cat([torch.eye(6)[c] + 0.1 * torch.rand(50, 6) for c in range(3)])
    sample = choose_ood(embeddings, pool, clusters, Budget(30))
    dense, *sparse = (int(clusters.assignments[row]) for row in (0, 40, 52))
    taken = torch.bincount(sample.index_clusters, minlength=3)
    assert taken.sum() == len(sample.indices.unique()) == 30
    assert min(int(taken[c]) for c in sparse) > int(taken[dense])
    assert sample.tailness.argmin() == dense
    for cluster, rows in ((dense, range(50)), (sparse[0], range(50, 100)), (sparse[1], range(100, 150))):
        assert set(sample.indices[sample.index_clusters == cluster].tolist()) <= set(rows)


def test_the_random_strategy_follows_its_seed(embeddings):
    clusters = cluster_embeddings(embeddings, 3)
    pool = torch.randn(50, 6)
    one, same, other = (
        choose_ood(embeddings, pool, clusters, Budget(20, strategy="random", seed=s)) for s in (1, 1, 2)
    )
    assert torch.equal(one.indices, same.indices)
    assert not torch.equal(one.indices, other.indices)
    assert one.index_clusters.unique().tolist() == [-1]


def test_density_weights_are_ranks_from_sparsest_to_densest(embeddings):
    weights = density_weights(embeddings, 5)
    order = weights.argsort(descending=True)
    sparsity = ltood_fast.knn_density(embeddings, 5)[order]
    assert weights.sort().values.tolist() == pytest.approx([i / 63 for i in range(64)])
    assert bool((sparsity[1:] >= sparsity[:-1]).all())
    assert len(density_weights(embeddings[:3], 10)) == 3  # fewer rows than neighbours


def test_too_few_candidates_and_too_many_clusters(embeddings):
    clusters = cluster_embeddings(embeddings, 3)
    with pytest.raises(ValueError, match="at least as many rows as the budget 11, got 10 rows"):
        choose_ood(embeddings, torch.randn(10, 6), clusters, Budget(11))
    with pytest.raises(ValueError, match="kmeans: n_clusters must be in"):
        cluster_embeddings(embeddings, 65)
    with pytest.raises(ValueError, match="cluster_embeddings: refine_steps must be at least 0, got -1"):
        cluster_embeddings(embeddings, 3, refine_steps=-1)


@pytest.mark.parametrize("spherical", [True, False])
def test_fewer_distinct_rows_than_clusters_are_a_warning(spherical):
    """Scaled copies are one direction and several points."""
    rows = torch.randn(3, 6).repeat(20, 1)
    with pytest.warns(UserWarning, match="as many distinct rows as n_clusters = 5, got 3: the other clusters are emp"):
        kmeans(rows, 5, spherical=spherical)
    with pytest.warns(UserWarning, match="n_clusters = 60, got 3"):
        kmeans(rows, 60, spherical=spherical)
    scaled = rows * torch.arange(1, 61)[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kmeans(rows, 3, spherical=spherical)
        kmeans(torch.randn(60, 6), 60, spherical=spherical)
        if not spherical:
            kmeans(scaled, 5, spherical=False)
    if spherical:
        with pytest.warns(UserWarning, match="got 3: the other"):
            kmeans(scaled, 5)


def greedy_for_samples(id_z, pool, density, n_targets, budget):
    """NumPy: the sparsest rows choose in turn, each its nearest free candidates."""
    id_z, pool = (x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (id_z, pool))
    targets = np.argsort(-density.numpy(), kind="stable")[:n_targets]
    shares = [budget // n_targets + (place < budget % n_targets) for place in range(n_targets)]
    free, chosen = list(range(len(pool))), []
    for target, share in zip(targets, shares, strict=True):
        best = sorted(free, key=lambda row, t=target: -float(pool[row] @ id_z[t]))[:share]
        free = [row for row in free if row not in best]
        chosen += best
    return targets.tolist(), shares, chosen


def test_the_sparsest_samples_choose_in_turn_with_equal_budgets(embeddings):
    pool = torch.randn(90, 6)
    density = ltood_fast.knn_density(embeddings, 10)
    sample = choose_for_samples(embeddings, pool, 7, 31)
    targets = sample.targets
    expected, shares, chosen = greedy_for_samples(embeddings, pool, density, 7, 31)
    assert targets.tolist() == expected
    assert torch.bincount(sample.index_clusters, minlength=7).tolist() == shares
    assert sample.indices.tolist() == chosen
    assert torch.equal(sample.tailness, density[targets])
    assert sample.clusters.assignments[targets].tolist() == list(range(7))


def test_samples_can_be_chosen_by_a_density_that_is_given(embeddings):
    density = torch.rand(64)
    sample = choose_for_samples(embeddings, torch.randn(90, 6), 80, 70, density=density)
    assert torch.equal(sample.targets, density.argsort(descending=True))  # 64 targets at most
    assert torch.bincount(sample.index_clusters, minlength=64).tolist() == [2] * 6 + [1] * 58
    clusters = cluster_embeddings(embeddings, 3)
    tailness = choose_ood(embeddings, torch.randn(90, 6), clusters, Budget(30), density=density).tailness
    expected = torch.stack([density[clusters.assignments == c].mean() for c in range(3)])
    assert torch.allclose(tailness, expected)


def test_the_gate_is_open_for_the_densest_share(embeddings):
    sparsity = ltood_fast.knn_density(embeddings, 5)
    gate = gate_weights(embeddings, 0.4, 5)
    assert gate.unique().tolist() == [0, 1]
    assert gate.sum() == 26  # round(0.4 * 64)
    assert sparsity[gate == 1].max() < sparsity[gate == 0].min()
    assert gate_weights(embeddings, 0.0, 5).sum() == 0
    assert gate_weights(embeddings, 1.0, 5).sum() == 64


def test_mutual_neighbors_by_a_loop(embeddings):
    z = torch.nn.functional.normalize(embeddings, dim=1).numpy()
    nearest = [max((j for j in range(64) if j != i), key=lambda j, i=i: z[i] @ z[j]) for i in range(64)]
    expected = [float(nearest[nearest[i]] == i) for i in range(64)]
    assert mutual_weights(embeddings).tolist() == expected
    assert 0 < sum(expected) < 64


def test_a_minibatch_of_all_rows_is_the_whole_refinement(embeddings):
    z = torch.nn.functional.normalize(embeddings, dim=1)
    centroids = kmeans(z, 3, seed=0)[0]
    options = {"nu": 0.5, "steps": 7, "lr": 0.3}
    whole = ltood_fast.refine_centroids(z, centroids, tol=0.0, **options)
    by_batches = refine_by_minibatches(z, centroids, 64, seed=0, **options)
    torch.testing.assert_close(by_batches[0], whole[0], rtol=1e-4, atol=1e-6)
    assert torch.equal(by_batches[1], whole[1])


def test_a_step_is_the_gradient_of_its_minibatch(embeddings):
    """Two steps of 32 of 64 rows are one pass; f_j and the target are those of the minibatch."""
    z = torch.nn.functional.normalize(embeddings, dim=1).double()
    centroids = z[[0, 45, 60]].clone()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(5))
    expected = centroids
    for rows in order.split(32):
        leaf = expected.clone().requires_grad_()
        q = (1 + torch.cdist(z[rows], leaf).square() / 2.0).pow(-1.5)
        q = q / q.sum(dim=1, keepdim=True)
        p = (q.square() / q.sum(dim=0)).detach()
        p = p / p.sum(dim=1, keepdim=True)
        (p * (p / q).log()).sum(dim=1).mean().backward()
        expected = expected - 0.3 * leaf.grad
    found = refine_by_minibatches(z, centroids, 32, nu=2.0, steps=2, lr=0.3, seed=5)[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert (found - centroids).abs().max() > 1e-4


def test_a_configuration_reaches_the_refinement(embeddings):
    plain = cluster_embeddings(embeddings, 3, refine_steps=5, refine_lr=1.0)
    small = cluster_embeddings(embeddings, 3, refine_steps=5, refine_lr=1.0, refine_batch=16)
    other = cluster_embeddings(embeddings, 3, refine_steps=5, refine_lr=1.0, refine_nu=5.0)
    assert not torch.equal(small.centroids, plain.centroids)
    assert not torch.equal(other.centroids, plain.centroids)

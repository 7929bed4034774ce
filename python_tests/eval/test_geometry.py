"""Uniformity and alignment against their definitions, and k-means clusters against classes by hand."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from ltood_fast.eval import clustering
from ltood_fast.eval.clustering import agreement, cluster_quality
from ltood_fast.eval.geometry import alignment, uniformity
from ltood_fast.eval.results import SampleTensors, resampling_result


def pairwise_uniformity(features, t):
    """Every pair of rows once, in float64."""
    rows = F.normalize(features.double(), dim=1).tolist()
    terms = [
        math.exp(-t * sum((a - b) ** 2 for a, b in zip(u, v, strict=True)))
        for u, v in itertools.combinations(rows, 2)
    ]  # fmt: skip
    return math.log(sum(terms) / len(terms))


@pytest.mark.parametrize(("n", "t"), [(2, 2.0), (41, 2.0), (40, 0.5), (33, 5.0)])  # odd and even: no row has a partner
def test_uniformity_is_the_mean_over_pairs(n, t):
    features = torch.randn(n, 7, generator=torch.Generator().manual_seed(n)) * torch.logspace(-2, 2, n)[:, None]
    assert uniformity(features, t=t) == pytest.approx(pairwise_uniformity(features, t), abs=1e-5)


def test_uniformity_of_known_places():
    assert uniformity(torch.tensor([[2.0, 0.0], [0.0, 0.1]])) == pytest.approx(-4.0, abs=1e-5)  # distance sqrt 2
    assert uniformity(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])) == pytest.approx(-8.0, abs=1e-5)
    assert uniformity(torch.ones(6, 3)) == pytest.approx(0.0, abs=1e-5)


def test_alignment_is_the_mean_squared_distance():
    first, second = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))
    expected = 0.0
    for u, v in zip(first.double(), second.double(), strict=True):
        expected += float(((u / u.norm() - v / v.norm()) ** 2).sum()) / 9
    assert alignment(first, second) == pytest.approx(expected, rel=1e-6)
    assert alignment(first, 3 * first) == pytest.approx(0.0, abs=1e-12)
    assert alignment(first, -first) == pytest.approx(4.0)


@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
def test_a_row_without_a_place_on_the_sphere_makes_both_unknown(bad):
    features = torch.ones(4, 3)
    features[2] = bad
    assert math.isnan(uniformity(features))
    assert math.isnan(alignment(features, torch.ones(4, 3)))
    assert math.isnan(alignment(torch.ones(4, 3), features))


def test_geometry_of_rows_that_do_not_fit():
    with pytest.raises(ValueError, match=r"^uniformity: features must be at least two rows, got 1$"):
        uniformity(torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"^alignment: second must be 4 rows as first has, got 3$"):
        alignment(torch.ones(4, 3), torch.ones(3, 3))


def by_hand(assignments, labels):
    """NMI with the arithmetic mean, from entropies; ARI from pairs of rows, one after another."""
    pairs, n = list(zip(labels, assignments, strict=True)), len(labels)

    def entropy(values):
        return -sum(values.count(v) / n * math.log(values.count(v) / n) for v in set(values))

    a, b, both = entropy(list(labels)), entropy(list(assignments)), entropy(pairs)
    same_class = same_cluster = same_both = 0
    for (c, k), (d, j) in itertools.combinations(pairs, 2):
        same_class += c == d
        same_cluster += k == j
        same_both += c == d and k == j
    chance = same_class * same_cluster / math.comb(n, 2)
    return (a + b - both) / ((a + b) / 2), (same_both - chance) / ((same_class + same_cluster) / 2 - chance)


def test_agreement_by_hand():
    assignments, labels = [0, 0, 1, 1, 1, 2, 2, 0, 1, 2, 2], [0, 0, 0, 1, 1, 1, 2, 2, 1, 2, 0]
    nmi, ari = by_hand(assignments, labels)
    assert 0.05 < ari < nmi < 0.9
    got = agreement(torch.tensor(assignments), torch.tensor(labels))
    assert (got["nmi"], got["ari"]) == (pytest.approx(nmi), pytest.approx(ari))
    unknown = agreement(torch.tensor([*assignments, 0, 1]), torch.tensor([*labels, -1, -1]))
    assert unknown == got
    assert agreement(torch.tensor([0, 1]), torch.tensor([-1, -1])) is None


def test_agreement_does_not_care_for_the_names_of_clusters():
    labels = torch.arange(30) % 3
    assert agreement((labels + 1) % 3, labels) == {"nmi": pytest.approx(1.0), "ari": pytest.approx(1.0)}


def test_cluster_quality_finds_a_direction_for_each_class():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 4
    features = (torch.eye(4)[labels] + 0.05 * torch.randn(60, 4, generator=generator)) * torch.logspace(-1, 1, 60)[
        :, None
    ]
    assert cluster_quality(features, labels) == {"nmi": pytest.approx(1.0), "ari": pytest.approx(1.0)}
    merged = cluster_quality(features, labels % 2)  # two classes, two clusters: of four directions
    assert merged["nmi"] < 0.9


def test_cluster_quality_keeps_the_best_of_its_starts(monkeypatch):
    """The start with the largest mean cosine, whichever comes first; long rows count as much as short ones."""
    labels = torch.arange(12) % 3
    features = torch.eye(3)[labels]
    features[0] *= 100
    good, bad = labels.clone(), torch.arange(12) // 4  # bad: right on four rows
    good[0] = 1  # wrong on the long row alone
    seeds = []

    def kmeans(x, k, *, seed):
        seeds.append((k, seed))
        return torch.eye(3), good if seed == 8 else bad

    monkeypatch.setattr(clustering, "kmeans", kmeans)
    assert cluster_quality(features, labels, seed=7, starts=3) == agreement(good, labels)
    assert seeds == [(3, 7), (3, 8), (3, 9)]
    assert cluster_quality(features, labels, seed=7, starts=1) == agreement(bad, labels)


def test_a_resampling_says_how_its_clusters_agree():
    assignments, labels = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 0, 0, 1, -1])
    sample = SampleTensors(assignments, torch.tensor([0.1, 0.2]), torch.tensor([0]), torch.tensor([0]))
    nmi, ari = by_hand(assignments[:4].tolist(), labels[:4].tolist())
    result = resampling_result("stage1", 0, sample, labels=labels, n_classes=2)
    assert result.clustering == {"nmi": pytest.approx(nmi), "ari": pytest.approx(ari)}
    assert resampling_result("stage1", 0, sample, n_classes=2).clustering is None
    assert resampling_result("stage1", 0, sample, labels=torch.full((5,), -1), n_classes=2).clustering is None

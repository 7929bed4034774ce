"""The test images' part of a difference, against simulated test sets."""

import math

import numpy as np
import pytest
import torch

from ltood_fast.eval.scores import Scores, pack_right, unpack_right
from ltood_fast.experiments.image_noise import Answers, standard_error

GROUPS = {"many": [0, 1], "medium": [2], "few": [3]}
COUNTS = [200, 200, 200, 200]


def measures_of(right):
    per_class = [part.mean() for part in right]
    groups = {group: float(np.mean([per_class[c] for c in classes])) for group, classes in GROUPS.items()}
    std = float(np.std(list(groups.values())))
    return {"overall": float(np.mean(per_class)), **groups, "std": std, "knn": None}


def run(right):
    return Answers(COUNTS, GROUPS, {"probe": right}), measures_of(right)


def simulate(generator, n, method=0.05, image=1.0, seed=0.02):
    """n pairs of runs on one drawn test set: an image is easy or hard for all, one way gains `method` on average and
    more on some images than on others."""
    pairs, level = [], [0.8, 0.7, 0.5, 0.3]
    ease = [generator.uniform(-0.3, 0.3, count) * image for count in COUNTS]
    gain = [method + 0.3 * generator.normal(size=count) for count in COUNTS]
    for _ in range(n):
        shift = generator.normal() * seed
        a, b = [], []
        for c in range(4):
            a.append(generator.random(COUNTS[c]) < np.clip(level[c] + ease[c] + gain[c] + shift, 0, 1))
            b.append(generator.random(COUNTS[c]) < np.clip(level[c] + ease[c], 0, 1))
        pairs.append((run(a), run(b)))
    return pairs


@pytest.mark.parametrize("measure", ["overall", "few", "std"])
def test_the_spread_over_test_sets_is_what_is_estimated(measure):
    """400 test sets: the variance of the mean difference is the seeds' part and the images' part together."""
    generator, n = np.random.default_rng(1), 4
    means, estimated = [], []
    for _ in range(400):
        pairs = simulate(generator, n)
        differences = [a[1][measure] - b[1][measure] for a, b in pairs]
        images, paired = standard_error(pairs, measure)
        assert paired
        means.append(np.mean(differences))
        estimated.append(np.var(differences, ddof=1) / n + images**2)
    assert np.mean(estimated) == pytest.approx(np.var(means, ddof=1), rel=0.2)


def test_without_answers_it_is_a_bound():
    pairs = simulate(np.random.default_rng(0), 3)
    bare = [tuple((Answers(COUNTS, GROUPS, {}), measures) for _, measures in pair) for pair in pairs]
    for measure in ("overall", "many", "few", "std"):
        exact, bound = standard_error(pairs, measure), standard_error(bare, measure)
        assert (exact[1], bound[1]) == (True, False)
        assert exact[0] < bound[0]
    p, q = (np.mean([pair[side][1]["few"] for pair in pairs]) for side in (0, 1))
    assert standard_error(bare, "few")[0] == pytest.approx(math.sqrt((p * (1 - p) + q * (1 - q)) / 200))


def test_runs_that_agree_on_every_image_have_none():
    generator = np.random.default_rng(0)
    right = [generator.random(count) < 0.5 for count in COUNTS]
    pairs = [(run(right), run([part.copy() for part in right]))] * 3
    assert standard_error(pairs, "overall") == (0.0, True)


def test_what_is_no_sum_over_images_has_none():
    assert standard_error(simulate(np.random.default_rng(0), 2), "nmi") == (0.0, False)
    assert standard_error([], "overall") == (0.0, False)


def test_answers_survive_a_report():
    labels = torch.arange(50) % 3
    answers = torch.randint(0, 3, (50,), generator=torch.Generator().manual_seed(0))
    scores = Scores.of(labels, answers, 3)
    counts = scores.confusion.sum(dim=1).tolist()
    for c, part in enumerate(unpack_right(pack_right(scores.right), counts)):
        assert part.tolist() == (answers[labels == c] == c).tolist()
        assert part.sum() == scores.confusion[c, c]
    with pytest.raises(ValueError, match="a class of 90 test images must have 12 bytes, got 3"):
        unpack_right(pack_right(scores.right), [90, 17, 16])

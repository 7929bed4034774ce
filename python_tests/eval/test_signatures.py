"""Every signature triggers on the failure it is for, stays quiet on a healthy run, and says when it cannot judge."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from ltood_fast.eval.signatures import CHECKS, check_signatures, format_signatures

from .conftest import make_resampling, make_results, make_stage

EVEN = [0.9] * 10
HEALTHY_LINE = {"epoch": 4, "loss": 1.0, "neighbor_purity": 0.9, "neighbor_purity_few": 0.6}


def signature(name, results):
    return next(s for s in check_signatures(results) if s.name == name)


def with_history(**line):
    """A run whose stage 1 logged one epoch."""
    return make_results(stages=[make_stage("stage1", EVEN, history=[{**HEALTHY_LINE, **line}])])


def with_resampling(**changes):
    return make_results(resamplings=[make_resampling(**changes)])


def test_a_healthy_run_has_no_warning():
    results = make_results()
    results.stages[1].history[-1].update(HEALTHY_LINE)
    signatures = check_signatures(results)
    assert [s.name for s in signatures] == list(CHECKS)
    assert [s.state for s in signatures] == ["ok"] * len(CHECKS)
    assert not any(s.remedy for s in signatures)


def test_an_empty_run_is_unknown_throughout():
    signatures = check_signatures(make_results(stages=[], resamplings=[]))
    assert [s.state for s in signatures] == ["unknown"] * len(CHECKS)
    assert all(s.sentence.endswith(".") for s in signatures)


def test_high_spread_over_the_groups():
    steep = [0.98] * 4 + [0.9] * 3 + [0.7] * 3
    found = signature("group_spread", make_results(stages=[make_stage("stage2", steep)]))
    assert found.state == "warning"
    assert "Stage 2: the groups spread by 11.8 points" in found.sentence
    assert "Many 98.0 %, Medium 90.0 %, Few 70.0 %" in found.sentence
    assert "stage1.budget" in found.remedy


def test_spread_that_grew_over_the_baseline():
    """4.0 points are not high, but more than the even baseline and its noise."""
    mild = [0.98] * 4 + [0.96] * 3 + [0.88] * 3
    assert signature("group_spread", make_results(stages=[make_stage("stage2", mild)])).state == "ok"
    found = signature("group_spread", make_results(stages=[make_stage("simclr", EVEN), make_stage("stage2", mild)]))
    assert found.state == "warning"
    assert "4.3 points" in found.sentence
    assert "against 0.0 points for SimCLR" in found.sentence


def test_group_noise_is_the_standard_error_of_the_groups():
    """Groups of 200, 150, 150 images at 0.9: root mean square of sqrt(0.09 / n) = 2.35 points."""
    found = signature("group_spread", make_results(stages=[make_stage("simclr", EVEN), make_stage("stage2", EVEN)]))
    expected = 100 * math.sqrt(0.09 * (1 / 200 + 1 / 150 + 1 / 150) / 3)
    assert f"noise about {expected:.1f} points" in found.sentence


@pytest.mark.parametrize(
    ("second", "change", "state"),
    [([0.96] * 10, "+6.0", "ok"), ([0.88] * 5 + EVEN[:5], "-1.0", "ok"), ([0.84] * 10, "-6.0", "warning")],
)
def test_stage_2_below_stage_1(second, change, state):
    """500 images at 0.9: the noise of the difference is about 1.9 points, so -1 is within it and -6 is not."""
    stages = [make_stage("stage1", EVEN), make_stage("stage2", second)]
    found = signature("stage2_below_stage1", make_results(stages=stages))
    assert found.state == state
    assert f"a change of {change} points" in found.sentence
    assert ("reduce stage2.beta" in found.remedy) == (state == "warning")


def test_tailness_that_is_the_same_everywhere():
    found = signature("tailness_spread", with_resampling(tailness=[0.20, 0.201, 0.202, 0.203, 0.21]))
    assert found.state == "warning"
    assert "from 0.2 to 0.21 over 5 clusters" in found.sentence


def test_tailness_of_empty_clusters_is_left_out():
    found = signature("tailness_spread", with_resampling(tailness=[0.1, math.nan, 0.2, math.nan, 0.3]))
    assert found.state == "ok"
    assert "over 3 clusters" in found.sentence
    assert f"{100 * math.sqrt(2 / 3) * 0.1 / 0.2:.1f} %" in found.sentence
    assert signature("tailness_spread", with_resampling(tailness=[math.nan] * 5)).state == "unknown"
    mirrored = [signature("tailness_spread", with_resampling(tailness=[s * x for x in (0.1, 0.2, 0.3, 0.4, 0.5)]))
                for s in (1, -1)]  # fmt: skip
    assert mirrored[0].sentence.split("its")[1] == mirrored[1].sentence.split("its")[1]


def test_tailness_that_does_not_rise_as_classes_get_rarer():
    tailness = np.array([0.35, 0.26, 0.18, 0.13, 0.10])
    results = with_resampling(tailness=tailness.tolist())
    members = np.array(results.resamplings[0].cluster_classes)  # [K, C]
    of_classes = [np.repeat(tailness, members[:, c]).mean() for c in range(10)]
    classes = np.corrcoef(of_classes, np.log(results.class_counts))[0, 1]
    clusters = np.corrcoef(tailness, np.log(members.sum(axis=1)))[0, 1]
    found = signature("tailness_tracks_size", results)
    assert found.state == "warning"
    said = f"{classes:+.2f} with the log size of classes and {clusters:+.2f} with the log size of clusters"
    assert said in found.sentence


def test_correlation_without_labels_is_that_of_clusters():
    sizes, tailness = [86, 73, 57, 22, 12], [0.10, 0.13, 0.18, 0.26, 0.35]
    found = signature("tailness_tracks_size", with_resampling(cluster_classes=None))
    pair = torch.tensor([tailness, [math.log(n) for n in sizes]])
    assert f"{torch.corrcoef(pair)[0, 1]:+.2f} with the log size of clusters" in found.sentence
    assert "classes" not in found.sentence
    assert found.state == "ok"
    equal = with_resampling(cluster_classes=None, cluster_sizes=[50] * 5)
    assert signature("tailness_tracks_size", equal).state == "unknown"


def test_labels_outweigh_cluster_sizes():
    """Small sparse clusters that hold the frequent classes: labels decide on correlation and on budget."""
    members = [
        [20, 20, 20, 20, 10, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 2, 8, 10, 20, 20, 20],
        [30, 10, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    changes = {"tailness": [0.2, 0.1, 0.4], "cluster_sizes": [90, 80, 40], "budget": [20, 10, 70]}
    results = with_resampling(cluster_classes=members, **changes)
    assert signature("tailness_tracks_size", results).state == "warning"
    found = signature("budget_reaches_tail", results)
    assert found.state == "warning"
    assert "2.1 times an even share" in found.sentence
    assert f"{0.1 * (60 / 80) / (60 / 210):.1f} times as many few-class images" in found.sentence


def test_budget_that_hardly_favours_the_tail():
    found = signature("budget_reaches_tail", with_resampling(budget=[86, 73, 57, 22, 12]))  # in proportion to the data
    assert found.state == "warning"
    assert "1.0 times as many few-class images" in found.sentence
    assert "lower stage1.budget_temperature" in found.remedy


def test_a_budget_without_labels_is_judged_by_sparse_clusters():
    found = signature("budget_reaches_tail", with_resampling(cluster_classes=None))
    assert found.state == "ok"
    assert "The sparsest 1 of 5 clusters took 50.0 % of 300 OOD images (2.5 times an even share" in found.sentence
    even = signature("budget_reaches_tail", with_resampling(cluster_classes=None, budget=[60] * 5))
    assert even.state == "warning"


def test_budget_for_a_single_cluster():
    found = signature("budget_reaches_tail", with_resampling(budget=[2, 2, 2, 4, 290]))
    assert found.state == "warning"
    assert "the largest budget is 96.7 %" in found.sentence
    assert "raise stage1.budget_temperature" in found.remedy


def test_no_budget_by_cluster_is_unknown():
    assert signature("budget_reaches_tail", with_resampling(budget=[0] * 5)).state == "unknown"


@pytest.mark.parametrize(
    ("seconds", "state"),
    [
        ([2.0, 2.0, 2.0], "ok"),  # 6 of 100 s
        ([10.0, 10.0, 10.0], "warning"),  # 30 %
        ([1.0, 2.0, 5.0], "warning"),  # 8 % only, but five times the first
        ([0.1, 0.2, 0.5], "ok"),  # grows as much, but takes no time to speak of
    ],
)
def test_resampling_time(seconds, state):
    resamplings = [make_resampling(epoch, seconds=s) for epoch, s in enumerate(seconds)]
    found = signature("resampling_time", make_results(resamplings=resamplings))
    assert found.state == state
    assert f"3 re-samplings took {sum(seconds):.1f} s, {sum(seconds):.1f} % of stage 1's time" in found.sentence


def test_resampling_time_that_was_not_taken():
    assert signature("resampling_time", with_resampling(seconds=None)).state == "unknown"


@pytest.mark.parametrize(
    ("line", "state"),
    [
        ({}, "ok"),
        ({"neighbor_purity": 0.4}, "warning"),
        ({"neighbor_purity_few": 0.04}, "warning"),
        ({"neighbor_purity_few": None}, "ok"),
        ({"neighbor_purity": None}, "unknown"),
    ],
)
def test_purity_of_pseudo_positives(line, state):
    found = signature("neighbor_purity", with_history(**line))
    assert found.state == state
    if line.get("neighbor_purity_few") == 0.04:
        assert "90.0 % of the pseudo-positives" in found.sentence
        assert "4.0 % for rows of few classes (epoch 4)" in found.sentence
        assert "density" in found.remedy


def test_neighbors_without_weight_are_no_pseudo_positives():
    wrong = with_history(neighbor_purity=0.1)
    found = signature("neighbor_purity", dataclasses.replace(wrong, config={"stage1": {"neighbor_weight": 0.0}}))
    assert (found.state, found.remedy) == ("ok", "")
    weighted = dataclasses.replace(wrong, config={"stage1": {"neighbor_weight": 0.1}})
    assert signature("neighbor_purity", weighted).state == "warning"


@pytest.mark.parametrize("loss", [math.nan, math.inf, None])
def test_loss_that_is_not_finite(loss):
    found = signature("finite_loss", with_history(loss=loss))
    assert found.state == "warning"
    assert found.sentence == "The loss of Stage 1 is not finite from epoch 4 on (1 epochs)."


def test_spoken_form_has_state_sentence_and_remedy():
    results = make_results(stages=[make_stage("stage1", EVEN), make_stage("stage2", [0.8] * 10)])
    text = format_signatures(check_signatures(results))
    assert "warning: Stage 2 has 80.0 % and stage 1 90.0 %, a change of -10.0 points" in text
    assert "         Try: Distillation may over-constrain the student: reduce stage2.beta." in text
    assert text.count("unknown: ") == 1  # purity


def test_groups_by_count_are_judged_without_few_classes():
    results = dataclasses.replace(make_results(), scheme="count", class_counts=[500] * 10)
    assert {s.state for s in check_signatures(results)} <= {"ok", "warning", "unknown"}

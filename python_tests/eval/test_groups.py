import math
import statistics

import pytest

from ltood_fast.eval.groups import group_report, split_groups

CIFAR10_LT = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


def test_cifar10_has_four_three_and_three_classes():
    assert split_groups(CIFAR10_LT) == {"many": [0, 1, 2, 3], "medium": [4, 5, 6], "few": [7, 8, 9]}


def test_cifar100_has_34_33_and_33_classes():
    groups = split_groups(range(100, 0, -1))
    assert groups == {"many": [*range(34)], "medium": [*range(34, 67)], "few": [*range(67, 100)]}


def test_rank_follows_the_counts_not_the_order_of_classes():
    assert split_groups([1, 9, 5, 7, 3, 2]) == {"many": [1, 3], "medium": [2, 4], "few": [0, 5]}


def test_equal_counts_rank_by_class():
    assert split_groups([5] * 6) == {"many": [0, 1], "medium": [2, 3], "few": [4, 5]}


@pytest.mark.parametrize("n_classes", [1, 2, 4, 5, 7])
def test_every_class_is_in_exactly_one_group(n_classes):
    groups = split_groups(range(n_classes))
    assert sorted(sum(groups.values(), [])) == list(range(n_classes))
    assert len(groups["many"]) >= len(groups["medium"]) == len(groups["few"])


def test_count_scheme_has_its_bounds_in_the_middle_group():
    assert split_groups([101, 100, 20, 19, 0], "count") == {"many": [0], "medium": [1, 2], "few": [3, 4]}


def test_report_by_hand():
    # Groups of six classes by rank: many {0, 1}, medium {2, 3}, few {4, 5}.
    report = group_report([1.0, 0.8, 0.7, 0.5, 0.4, 0.2], [60, 50, 40, 30, 20, 10])
    assert report["many"] == pytest.approx(0.9)
    assert report["medium"] == pytest.approx(0.6)
    assert report["few"] == pytest.approx(0.3)
    assert report["overall"] == pytest.approx(0.6)
    assert report["std"] == pytest.approx(math.sqrt(0.06))  # population: sqrt((0.3^2 + 0 + 0.3^2) / 3)
    assert report["std"] == pytest.approx(statistics.pstdev([0.9, 0.6, 0.3]))


def test_overall_counts_test_images_when_they_are_given():
    report = group_report([1.0, 0.5, 0.0], [3, 2, 1], test_counts=[10, 30, 60])
    assert report["overall"] == pytest.approx(0.25)


def test_empty_groups_and_untested_classes_count_nowhere():
    report = group_report([0.8, math.nan, 0.4], [500, 200, 50], "count")
    assert report["many"] == pytest.approx(0.8)
    assert report["medium"] == pytest.approx(0.4)
    assert report["few"] is None
    assert report["std"] == pytest.approx(0.2)
    assert report["overall"] == pytest.approx(0.6)
    assert report["per_class"] == [0.8, None, 0.4]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (([0.5] * 3, [1, 2]), "group_report: per_class_accuracy must be 2 long, got 3"),
        (([0.5, 1.5], [1, 2]), r"group_report: per_class_accuracy must be in \[0, 1\] or NaN, got \[1.5\]"),
        (([], []), "group_report: class_counts must be at least one class long, got none"),
        (([0.5], [-1]), "group_report: class_counts must be non-negative, got -1"),
        (([0.5], [1], "size"), "split_groups: scheme must be one of rank, count, got 'size'"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        group_report(*arguments)


def test_test_counts_of_another_length():
    with pytest.raises(ValueError, match="^group_report: test_counts must be 2 long, got 1$"):
        group_report([0.5, 0.5], [2, 1], test_counts=[3])

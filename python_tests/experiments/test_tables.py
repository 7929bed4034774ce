import math

import pytest
from made_up_runs import make_report

from ltood_fast.experiments.outcomes import read_outcomes
from ltood_fast.experiments.pictures import forest_figure, to_png
from ltood_fast.experiments.spec import Comparison, Table, Variant
from ltood_fast.experiments.summaries import compare, under_control, verdict_of
from ltood_fast.experiments.tables import comparisons_table, to_markdown, variants_table
from ltood_fast.train.config import load_config

A, B = Variant("a"), Variant("b")
LONG_TAIL = [10, 300, 100]  # class 1 is many, 2 medium, 0 few


@pytest.fixture
def outcomes():
    config = load_config("smoke", {"stages": "stage1"})

    def report(few, many, medium, knn=None):
        return make_report(config, [few, many, medium], LONG_TAIL, knn=knn)

    reports = {
        ("a", 0): report(0.30, 0.70, 0.50, 0.4),
        ("a", 1): report(0.40, 0.70, 0.55, 0.5),
        ("b", 0): report(0.20, 0.70, 0.45, 0.4),
        ("b", 1): report(0.30, 0.70, 0.50, 0.4),
        ("b", 2): report(0.90, 0.90, 0.90, 0.9),  # has no partner
    }
    return read_outcomes([A, B], reports)


def test_numbers_of_a_run(outcomes):
    measures = outcomes.by_run["a", 0].measures
    assert measures["overall"] == pytest.approx(0.5)
    assert (measures["many"], measures["medium"], measures["few"]) == (0.70, 0.50, 0.30)
    assert measures["std"] == pytest.approx(math.sqrt(0.08 / 3))
    assert measures["knn"] == 0.4


def test_the_table_is_mean_and_sample_deviation(outcomes):
    row = variants_table(outcomes).rows[0]
    assert row[:2] == ["a", "2"]
    assert row[2] == "52.50 ± 3.54"  # overall 0.50, 0.55: sample deviation 0.05 / sqrt(2)
    assert row[3:6] == ["70.00 ± 0.00", "52.50 ± 3.54", "35.00 ± 7.07"]
    assert row[7] == "45.00 ± 7.07"


def test_one_seed_has_no_deviation(outcomes):
    alone = read_outcomes([A], {("a", 0): outcomes.by_run["a", 0].report})
    assert variants_table(alone).rows[0][:3] == ["a", "1", "50.00"]


def test_what_fewer_runs_know_says_so(outcomes):
    outcomes.by_run["a", 1].measures["knn"] = None
    assert variants_table(outcomes).rows[0][7] == "40.00 (n = 1)"


def test_differences_are_paired_by_seed(outcomes):
    overall = Comparison("a", "b")
    assert outcomes.differences(overall) == pytest.approx([0.05, 0.05])
    [judged] = outcomes.judged([overall])
    # 300 test images, unpaired: accuracies 0.525 and 0.475 on average
    assert judged.found.test_error == pytest.approx(math.sqrt(2 * 0.525 * 0.475 / 300))
    row = comparisons_table([judged]).rows[0]
    assert row[:3] == ["a − b", "overall", "2"]
    assert row[3].startswith("+5.00 [-2.99, +12.99]")  # 1.96 times 4.08
    assert row[4:6] == ["0.00", "≤ 4.08"]
    assert row[7] == "not decided"


def test_a_lower_spread_is_better(outcomes):
    for run in outcomes.by_run.values():
        object.__setattr__(run, "answers", None)  # nothing is known of test images
    lower, higher = (outcomes.judged([Comparison(*pair, "std")])[0] for pair in (("a", "b"), ("b", "a")))
    assert all(difference < 0 for difference in lower.differences)
    assert outcomes.compared(Comparison("a", "b", "std"))[0].test_error == 0
    assert (lower.found.mean, lower.p) == (-higher.found.mean, higher.p)
    for seed in (0, 1):  # the same in every seed
        outcomes.by_run["a", seed].measures["std"] = 0.1
        outcomes.by_run["b", seed].measures["std"] = 0.2
    assert outcomes.judged([Comparison("a", "b", "std")])[0].decision == "held"
    assert outcomes.judged([Comparison("b", "a", "std")])[0].decision == "refuted"


def test_a_claim_of_two_comparisons(outcomes):
    for run in outcomes.by_run.values():
        object.__setattr__(run, "answers", None)

    def verdict(*comparisons):
        return verdict_of(outcomes.judged(comparisons))

    both = verdict(Comparison("a", "b"), Comparison("b", "a", "few"))
    assert both.decision == "refuted"
    assert "a − b (overall) is +5.00 [+5.00, +5.00] points; b − a (Few) is -10.00 [-10.00, -10.00]" in both.sentence
    assert both.sentence.endswith("(mean [95 % interval], 2 seeds).")
    missing = verdict(Comparison("a", "b"), Comparison("a", "c"))
    assert "; a − c (overall) has no pair of runs (" in missing.sentence
    uneven = verdict(Comparison("a", "b"), Comparison("b", "b"))
    assert uneven.sentence.endswith("(mean [95 % interval], 2 to 3 seeds).")


def test_nothing_is_concluded_without_a_gain_of_the_control(outcomes):
    for run in outcomes.by_run.values():
        object.__setattr__(run, "answers", None)
    gains, harms, missing = (outcomes.judged([Comparison(*pair)])[0] for pair in (("a", "b"), ("b", "a"), ("a", "c")))
    verdict = verdict_of([gains])
    assert under_control(verdict, gains) == verdict
    barred = under_control(verdict, harms)
    assert barred.decision == "not decided"
    assert barred.sentence.startswith("This page concludes nothing, as its positive control (b − a) is -5.00 [")
    assert "Found: a − b (overall) is +5.00 [" in barred.sentence
    assert "control (a − c) was not run" in under_control(verdict, missing).sentence


def test_groups_of_a_balanced_run_are_those_of_the_long_tail():
    config = load_config("smoke", {"stages": "simclr"})
    balanced = Variant("balanced", stages=("simclr",), counts_of="tail")
    reports = {
        ("balanced", 0): make_report(config, [0.1, 0.9, 0.5], [50, 50, 50]),
        ("tail", 0): make_report(config, [0.1, 0.9, 0.5], LONG_TAIL),
    }
    measures = read_outcomes([balanced], reports).by_run["balanced", 0].measures
    assert (measures["many"], measures["medium"], measures["few"]) == (0.9, 0.5, 0.1)
    own = read_outcomes([Variant("balanced", stages=("simclr",))], reports).by_run["balanced", 0].measures
    assert own["many"] == 0.1  # of three classes of one size the first counts as the largest
    del reports["tail", 0]
    assert read_outcomes([balanced], reports).by_run == {}


def test_a_class_without_test_images_counts_nowhere():
    config = load_config("smoke", {"stages": "simclr"})
    balanced = Variant("balanced", stages=("simclr",), counts_of="tail")
    reports = {
        ("balanced", 0): make_report(config, [0.0, 1.0, None], [50, 50, 50]),
        ("tail", 0): make_report(config, [0.1, 0.9, 0.5], LONG_TAIL),
    }
    measures = read_outcomes([balanced], reports).by_run["balanced", 0].measures
    assert (measures["many"], measures["medium"], measures["few"]) == (1.0, None, 0.0)
    assert measures["std"] == 0.5


def test_seconds_are_those_of_the_epochs():
    config = load_config("smoke", {"stages": "stage1"})
    report = make_report(config, [0.0, 1.0, 0.5], LONG_TAIL, history=[{"seconds": 1.5}, {"seconds": 2.0}])
    assert read_outcomes([A], {("a", 0): report}).by_run["a", 0].seconds == 3.5


def test_markdown():
    text = to_markdown(Table("T", ["x", "y"], [["1", "2"]], "a note"))
    assert text == "## T\n\n| x | y |\n| --- | --- |\n| 1 | 2 |\n\na note"


def test_the_forest_plot_shows_every_comparison(outcomes):
    judged = outcomes.judged([Comparison("a", "b"), Comparison("b", "a", "std")])
    [ax] = forest_figure(judged).axes
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    assert labels == ["a − b (overall)", "b − a (std, lower is better)"]
    means = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "D"]
    assert means == pytest.approx([5.0, 100 * judged[1].found.mean])
    caps = [float(x) for line in ax.lines if line.get_marker() == "|" for x in line.get_xdata()]
    assert caps[:2] == pytest.approx([100 * bound for bound in judged[0].found.interval])
    dots = [offset[0] for collection in ax.collections[:1] for offset in collection.get_offsets()]
    assert dots == pytest.approx([5.0, 5.0])  # a dot a seed
    assert ax.get_title(loc="left") == "0 of 2 differences decided"
    assert to_png(lambda: forest_figure(judged)).startswith(b"\x89PNG")


def test_a_variant_without_runs_is_an_empty_row(outcomes):
    empty = read_outcomes([Variant("none"), A], {("a", 0): outcomes.by_run["a", 0].report})
    assert variants_table(empty).rows[0] == ["none", "0", *["-"] * 6]
    summary = compare([Comparison("a", "none")])(None, empty)
    assert summary.verdict.sentence.startswith("Not decided here")
    assert to_png(summary.draw).startswith(b"\x89PNG")

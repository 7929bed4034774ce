from dataclasses import replace

import numpy as np
import pytest

from ltood_fast.data import load_data
from ltood_fast.experiments import imbalance
from ltood_fast.experiments.command import find_experiment, list_experiments
from ltood_fast.experiments.grid import plan_runs
from ltood_fast.experiments.outcomes import Outcomes
from ltood_fast.experiments.paper_claims import balanced
from ltood_fast.experiments.registry import EXPERIMENTS
from ltood_fast.experiments.spec import ExperimentError


def test_every_experiment_declares_its_positive_control(setting):
    """Two variants that are trained with it, or a sentence that says why there is none."""
    for experiment in EXPERIMENTS.values():
        if isinstance(experiment.control, str):
            assert experiment.control.endswith(".")
            continue
        listed = experiment.variants(setting)
        names = [variant.name for variant in experiment.with_control(listed)]
        assert {experiment.control.comparison.better, experiment.control.comparison.worse} <= set(names)
        assert len(set(names)) == len(names)
        assert experiment.with_control(experiment.with_control(listed)) == experiment.with_control(listed)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_a_list_of_valid_runs(name, setting):
    variants = EXPERIMENTS[name].variants(setting)
    runs = plan_runs(setting, variants)
    assert len(runs) == 2 * len(variants)
    named = [variant.name for variant in variants]
    assert len(set(named)) == len(named)
    assert {variant.guide for variant in variants} - {""} <= set(named)
    assert {variant.counts_of for variant in variants} - {""} <= set(named)


def test_a_name_means_one_configuration(setting):
    """Experiments share runs, so a variant must be the same in each."""
    known = {}
    for experiment in EXPERIMENTS.values():
        for variant in experiment.variants(setting):
            assert known.setdefault(variant.name, variant) == variant


def test_claims_are_compared_between_variants_that_are_trained(setting, monkeypatch):
    monkeypatch.setattr(imbalance, "cells", list)  # no synthetic part
    for experiment in EXPERIMENTS.values():
        if not (variants := experiment.variants(setting)):
            continue
        values = experiment.summarise(setting, Outcomes(variants, {})).values
        for comparison in values.get("comparisons", []):
            assert {comparison["better"], comparison["worse"]} <= {variant.name for variant in variants}


def test_the_list_and_a_wrong_name():
    lines = list_experiments().splitlines()
    assert [line.split()[0] for line in lines] == list(EXPERIMENTS)
    with pytest.raises(ExperimentError, match="got 'ablatio', did you mean ablation"):
        find_experiment("ablatio")


def test_a_balanced_set_of_the_size_of_the_long_tail(setting):
    variant = balanced(setting)
    config = plan_runs(setting, [variant])[0].config
    long_tail, even = load_data(setting.config.data).train, load_data(config.data).train
    assert len(even) == len(long_tail)
    counts = even.class_counts()
    assert int(counts.max() - counts.min()) <= 1
    assert int(long_tail.class_counts().max()) > 2 * int(counts.max())
    assert balanced(setting) == variant  # drawn once
    assert len(np.unique(np.load(config.data.split))) == len(long_tail)


def test_a_balanced_list_is_taken_as_it_is(setting):
    lists = replace(setting, overrides={"data.id": "list", "data.id_list": "tail.txt"})
    with pytest.raises(ExperimentError, match="balanced-list must be the list of a balanced set"):
        balanced(lists)
    same = replace(lists, balanced_list="even.txt", overrides={**lists.overrides, "data.probe_list": "even.txt"})
    with pytest.raises(ExperimentError, match=r"another list than balanced-list.* got even.txt twice"):
        balanced(same)
    variant = balanced(replace(lists, balanced_list="even.txt"))
    assert plan_runs(lists, [variant])[0].config.data.id_list == "even.txt"
    assert not setting.output.exists()

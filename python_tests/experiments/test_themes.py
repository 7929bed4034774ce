"""What single experiments measure beside the accuracies of their runs."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from made_up_runs import make_report

from ltood_fast.data import load_data
from ltood_fast.experiments import imbalance, relevance, sampler_scaling
from ltood_fast.experiments.baselines import BASELINES
from ltood_fast.experiments.exact_vs_ivf import Setup
from ltood_fast.experiments.imbalance import Cell, cluster_correlation, gaussian_classes, rank_correlation
from ltood_fast.experiments.outcomes import Outcomes, read_outcomes
from ltood_fast.experiments.pictures import to_png
from ltood_fast.experiments.pseudo_positives import PSEUDO_POSITIVES, purity
from ltood_fast.experiments.relevance import cosine_to_centroids, frechet_distance
from ltood_fast.experiments.sensitivity import SENSITIVITY, options
from ltood_fast.experiments.spec import Setting
from ltood_fast.experiments.tail_targets import TAIL_TARGETS, reached_few, targets_that_are_few
from ltood_fast.experiments.variants import TAILNESS
from ltood_fast.train.config import load_config

COUNTS = [60, 30, 10]


def outcomes_of(experiment, setting, **options):
    """Every variant with a run a seed, all alike but for what `options` say."""
    reports = {}
    variants = experiment.variants(setting)
    for variant in variants:
        config = load_config(setting.preset, {"stages": ",".join(variant.stages), "stage2.guide": "x"})
        for seed in setting.seeds:
            reports[variant.name, seed] = make_report(config, [0.6, 0.5, 0.4], COUNTS, **copy.deepcopy(options))
    return read_outcomes(variants, reports)


def resampling(cluster_classes, budget, tailness):
    return {"epoch": 1, "cluster_classes": cluster_classes, "budget": budget, "tailness": tailness}


def test_options_away_from_the_preset(setting):
    tried = {option.name: [value for value, _ in option.variants()] for option in options(setting.config)}
    assert tried["budget"] == [10, 20, 40, 80]  # the preset has 40
    assert tried["every"] == [1, 2, 4]
    assert tried["alpha"] == [0, 0.1, 0.3, 1]
    assert tried["beta"] == [0, 0.2, 0.4, 0.8]
    assert tried["clusters"] == [2, 4, 8, 40]
    budget = next(option for option in options(setting.config) if option.name == "budget")
    assert [variant.name for _, variant in budget.variants()] == ["budget-10", "budget-20", "tailness", "budget-80"]


def test_a_budget_stays_within_the_pool(setting):
    small = replace(setting, overrides={"data.ood_size": "60"})
    assert [value for value, _ in options(small.config)[0].variants()] == [10, 20, 40, 60]


def test_the_verdict_of_many_differences_counts_them(setting):
    summary = SENSITIVITY.summarise(setting, outcomes_of(SENSITIVITY, setting))
    assert "of 11 differences 0 held, 0 refuted, 11 not decided" in summary.verdict.sentence
    assert len(summary.values["comparisons"]) == 16
    assert summary.values["options"]["alpha"] == {
        "0": "no-domain", "0.1": "alpha-0.1", "0.3": "tailness", "1": "alpha-1"
    }  # fmt: skip
    assert to_png(summary.draw).startswith(b"\x89PNG")


def test_purity_over_training(setting):
    history = [
        {"epoch": 0},
        {"epoch": 1, "neighbor_purity": 0.4, "neighbor_purity_few": 0.1},
        {"epoch": 2, "neighbor_purity": 0.5, "neighbor_purity_few": None},
        {"epoch": 3, "neighbor_purity": 0.7, "neighbor_purity_few": 0.3},
    ]
    outcomes = outcomes_of(PSEUDO_POSITIVES, setting, history=history)
    outcomes.by_run["tailness", 1].history[1]["neighbor_purity"] = 0.6
    assert purity(outcomes, "tailness", "neighbor_purity") == [(1, 0.5), (2, 0.5), (3, 0.7)]
    summary = PSEUDO_POSITIVES.summarise(setting, outcomes)
    row = next(row for row in summary.tables[2].rows if row[0] == "tailness")
    assert row == ["tailness", "50.0", "50.0", "70.0", "10.0", "30.0", "30.0"]
    assert summary.values["purity"]["tailness"]["neighbor_purity_few"] == {1: 0.1, 3: 0.3}
    assert to_png(summary.draw).startswith(b"\x89PNG")


def test_full_weight_is_tailness_only_where_the_preset_says_so(setting):
    assert TAILNESS in PSEUDO_POSITIVES.variants(setting)
    weighted = replace(setting, overrides={"stage1.neighbor_weighting": "density"})
    names = [variant.name for variant in PSEUDO_POSITIVES.variants(weighted)]
    assert names[1] == "full-weight"
    assert "tailness" not in names


def test_how_much_of_the_budget_reaches_the_few(setting):
    samplings = [
        resampling([[60, 30, 10], [0, 0, 0]], [10, 0], [0.1, None]),  # of an earlier epoch
        resampling([[60, 20, 0], [0, 10, 10]], [5, 15], [0.1, 0.9]),
    ]
    outcomes = outcomes_of(TAIL_TARGETS, setting, resamplings=samplings)
    reached, blind = reached_few(outcomes.by_run["tailness", 0])
    assert reached == pytest.approx(0.75 * 0.5)  # three quarters go to the cluster that is half few
    assert blind == pytest.approx(0.1)
    del outcomes.by_run["random", 0].report["resamplings"]
    assert reached_few(outcomes.by_run["random", 0]) is None
    summary = TAIL_TARGETS.summarise(setting, outcomes)
    assert ["samples", "37.50", "10.00"] in summary.tables[2].rows


def test_sparse_images_count_by_their_own_label(setting):
    labels = load_data(setting.config.data).train.labels
    rarest, largest = int((labels == 9).nonzero()[0]), int((labels == 0).nonzero()[0])
    folder = setting.output / "runs/samples/seed1/stage1"
    folder.mkdir(parents=True)
    state = {"targets": torch.tensor([rarest, largest]), "index_clusters": torch.tensor([0, 0, 0, 1])}
    torch.save(state, folder / "resample_0003.pt")
    reached, blind = targets_that_are_few(setting, 1)
    assert reached == 0.75
    assert 0.05 < blind < 0.15
    assert targets_that_are_few(setting, 0) is None


def test_baselines_are_their_recipes(setting):
    found = {variant.name: variant for variant in BASELINES.variants(setting)}
    assert found["sdclr"].stages == ("simclr",)
    assert found["sdclr"].overrides["base.name"] == "sdclr"
    assert found["colt"].overrides["stage1.tailness"] == "momentum"
    assert found["full-sdclr"].guide == "tailness-sdclr"


def test_frechet_distance_of_known_gaussians():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    a, b = rows * torch.tensor([1.0, 2.0, 3.0]), rows * torch.tensor([2.0, 2.0, 1.0]) + torch.tensor([1.0, 0.0, 2.0])
    # axes in common: sum of (difference of means)² and (difference of deviations)²
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 1 + 0 + 4, rel=0.03)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    turned = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    assert frechet_distance(a @ turned, b @ turned) == pytest.approx(frechet_distance(a, b))


def test_cosine_to_the_nearest_centroid():
    centroids = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    assert cosine_to_centroids(torch.tensor([[3.0, 0.0], [1.0, 1.0]]), centroids) == pytest.approx((1 + 0.5**0.5) / 2)


def test_pools(setting):
    names = {variant.name: variant.overrides for variant in relevance.pools(setting)}
    assert list(names) == ["tailness", "pool-noise"]  # the preset's pool is the letters
    assert names["pool-noise"]["data.ood_size"] == "120"
    other = replace(setting, other_ood="folder:/x", other_root="/y")
    overrides = {variant.name: variant.overrides for variant in relevance.pools(other)}["pool-other"]
    assert (overrides["data.ood"], overrides["data.ood_root"]) == ("folder:/x", "/y")
    photos = Setting("cifar10_lt", setting.output)
    assert [variant.name for variant in relevance.pools(photos)] == ["tailness", "pool-letters", "pool-noise"]
    assert relevance.pools(photos)[2].overrides["data.ood_size"] == "20000"  # no less than the budget


def test_pools_are_measured_with_simclrs_network(setting, monkeypatch):
    """Untrained here: letters are still nearer to digits than noise is."""
    from ltood_fast.train.config import load_config as load
    from ltood_fast.train.session import Session

    def untrained(path):
        torch.manual_seed(0)
        config = load("smoke", {"stages": "simclr"})
        return {"model": Session.open(config, path.parent.parent).new_model().state_dict()}

    monkeypatch.setattr(relevance, "load_checkpoint", untrained)
    setting = replace(setting, seeds=(0,), overrides={"run.device": "cpu"})
    summary = relevance.summarise(setting, outcomes_of(relevance.OOD_RELEVANCE, setting))
    found = summary.values["distances"][0]
    assert found["test images"]["frechet"] < found["tailness"]["frechet"] < found["pool-noise"]["frechet"]
    assert found["tailness"]["cosine"] > found["pool-noise"]["cosine"]
    assert [row[0] for row in summary.tables[2].rows] == ["test images", "tailness", "pool-noise"]
    assert to_png(summary.draw).startswith(b"\x89PNG")


def test_synthetic_classes():
    rows, labels, counts = gaussian_classes(Cell(100, 32, "few"), seed=0)
    assert counts[0] == imbalance.LARGEST
    assert counts[-1] == imbalance.LARGEST // 100
    assert torch.bincount(labels).tolist() == counts
    assert rows.norm(dim=1).sub(1).abs().max() < 1e-5
    own = rows[labels == 0] - rows[labels == 0].mean(dim=0)
    # 16 directions of its own, and one more as rows are brought to the sphere
    assert int((torch.linalg.svdvals(own.double()) > 0.2 * own.norm() / 32**0.5).sum()) <= imbalance.INTRINSIC + 1
    spread = [rows[labels == c].std(dim=0).mean() for c in range(5)]
    assert max(spread) / min(spread) < 1.2
    rows, labels, _ = gaussian_classes(Cell(100, 32, "uneven"), seed=0)
    spread = [rows[labels == c].std(dim=0).mean() for c in range(5)]
    assert max(spread) / min(spread) > 1.3


def test_rank_correlation():
    assert rank_correlation(torch.tensor([1.0, 5.0, 9.0]), torch.tensor([2.0, 3.0, 100.0])) == pytest.approx(1)
    assert math.isnan(rank_correlation(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 3.0])))


def test_clusters_of_rare_classes_shall_be_the_sparse_ones():
    members = torch.tensor([[50, 0, 0], [0, 30, 0], [10, 0, 10], [0, 0, 0]])
    tailness = torch.tensor([0.1, 0.3, 0.2, math.nan])
    assert cluster_correlation(tailness, members, COUNTS) == pytest.approx(0.5)  # rarity -4.1, -3.4, -3.2
    assert cluster_correlation(-tailness, members, COUNTS) == pytest.approx(-0.5)


def test_extreme_imbalance_is_summarised(setting, monkeypatch):
    monkeypatch.setattr(imbalance, "RATIOS", (100,))
    monkeypatch.setattr(imbalance, "FEATURES", (16, 32))
    monkeypatch.setattr(imbalance, "LARGEST", 300)
    experiment = imbalance.EXTREME_IMBALANCE
    samplings = [resampling([[60, 20, 0], [0, 10, 0], [0, 0, 10]], [5, 5, 5], [0.1, 0.2, 0.9])]
    outcomes = outcomes_of(experiment, setting, resamplings=samplings)
    summary = experiment.summarise(setting, outcomes)
    assert summary.values["trained"]["ratio-100"] == pytest.approx([1.0, 1.0])
    cells = summary.values["synthetic"]
    assert len(cells) == 6
    alike = [cell for cell in cells if cell["kind"] == "few" and cell["features"] == 32]
    assert all(run["classes"] > 0.8 for cell in alike for run in cell["runs"])
    assert "it is above zero in " in summary.verdict.sentence
    assert summary.verdict.sentence.endswith("(2 seeds).")
    alone = replace(setting, seeds=(0,))
    said = experiment.summarise(alone, outcomes_of(experiment, alone, resamplings=samplings)).verdict.sentence
    assert said.startswith("One seed decides nothing: the rank correlation of tailness and rarity lies between ")
    assert "cases" not in said
    assert to_png(summary.draw).startswith(b"\x89PNG")


def test_ratios_come_from_the_whole_set(setting):
    lists = Setting("cifar10_lt_small", setting.output, balanced_list="even.txt")
    first = imbalance.EXTREME_IMBALANCE.variants(lists)[0].overrides
    assert (first["data.id_list"], first["data.imbalance"], first["data.split"]) == ("even.txt", "100", "")


@pytest.mark.parametrize(
    ("recall", "seconds", "decision"),
    [(0.99, 1.0, "held"), (0.99, 9.0, "refuted"), (0.5, 1.0, "refuted")],
)
def test_the_verdict_on_faiss(setting, monkeypatch, recall, seconds, decision):
    def line(total, found):
        return {"total_s": total, "tailness_s": 0, "index_s": 0, "search_s": total, "peak_mib": 5, "recall": found}

    rows = {(100, "exact"): [line(3.0, 1.0)] * 2, (100, "IVF"): [line(seconds, recall)] * 2}
    monkeypatch.setattr(sampler_scaling, "measure", lambda setting: rows)
    summary = sampler_scaling.SAMPLER_SCALING.summarise(setting, Outcomes([], {}))
    assert summary.verdict.decision == decision
    assert summary.tables[0].rows[1][:4] == ["100", "IVF", "2", f"{seconds:.3g}"]


def test_both_samplers_on_small_pools(setting, monkeypatch):
    pytest.importorskip("faiss")
    small = Setup(id_rows=300, candidates=0, D=16, K=4, budget=100, lists=0, probes=(1, 1000))
    monkeypatch.setattr(sampler_scaling, "SETUP", small)
    monkeypatch.setattr(sampler_scaling, "CANDIDATES", (200, 1000))
    summary = sampler_scaling.SAMPLER_SCALING.summarise(setting, Outcomes([], {}))
    recall = {(line["candidates"], line["method"]): line["recall"] for line in summary.values["sampler"]}
    assert recall[1000, "exact"] == 1
    assert recall[1000, "IVF, 1000 lists searched"] > 0.9  # all of them: only tailness is approximate
    assert recall[1000, "IVF, 1 list searched"] <= recall[1000, "IVF, 1000 lists searched"]
    assert len(summary.tables[0].rows) == 6
    assert to_png(summary.draw).startswith(b"\x89PNG")

"""Training on two ranks against one process with the same batches; what one rank's failure does to the other."""

import signal

import pytest
import torch
from tolerances import relative_error

from ltood_fast.train.checkpoint import load_checkpoint

from . import norm_cases, train_cases
from .ranks import Ranks, free_port

pytest.importorskip("faiss")  # the processes that it starts train
WORLD = 2
TOLERANCE = 1e-5  # float32 over some 25 steps; noise of 1e-7 in the first weights moves the last ones by 1e-7


def assert_same_run(found, expected):
    for stage, (weights, history) in expected.items():
        assert found[stage][0].keys() == weights.keys()
        mine, theirs = (torch.cat([x.double().flatten() for x in w.values()]) for w in (found[stage][0], weights))
        assert relative_error(mine, theirs) < TOLERANCE, stage
        for line, other in zip(history, found[stage][1], strict=True):
            assert other["loss"] == pytest.approx(line["loss"], abs=1e-4)
            assert other["images"] == line["images"]
            assert other["parts"].keys() == line["parts"].keys()
            purity = line.get("neighbor_purity")
            assert other.get("neighbor_purity") == (purity if purity is None else pytest.approx(purity))


@pytest.mark.parametrize("name", train_cases.RUNS)
def test_two_ranks_end_where_one_process_does(name, groups, tmp_path):
    first, second = groups(WORLD).results(train_cases.train_rank, tmp_path / "two", name)
    for stage in first:  # the ranks themselves never differ
        assert all(torch.equal(second[stage][0][key], value) for key, value in first[stage][0].items())
    micro = {"optim__micro_batch": 0} if name == "micro" else {}
    assert_same_run(first, train_cases.train(tmp_path / "one", name, **micro))
    for sample in (tmp_path / "one").glob("*/resample_*.pt"):
        mine, theirs = (
            torch.load(tmp_path / run / sample.parent.name / sample.name, weights_only=True) for run in ("one", "two")
        )
        assert all(torch.equal(mine[key], theirs[key]) for key in ("assignments", "indices", "index_clusters"))


@pytest.mark.parametrize("numbers", ["one then two", "two then one", "two then two"])
def test_another_number_of_ranks_goes_on(numbers, groups, tmp_path):
    """The last one is exact: the same bits as of a run that never stopped."""
    for part in numbers.split(" then "):
        if part == "one":
            found = train_cases.train(tmp_path, "queue", 2)
        else:
            found = groups(WORLD).results(train_cases.train_rank, tmp_path, "queue", 2)[0]
    whole = groups(WORLD).results(train_cases.train_rank, tmp_path / "whole", "queue", 4)[0]
    (weights, _), (expected, _) = found["stage1"], whole["stage1"]
    if numbers == "two then two":
        assert all(torch.equal(weights[key], value) for key, value in expected.items())
    assert_same_run(found, whole)
    assert load_checkpoint(tmp_path / "stage1" / "last.pt")["epoch"] == 4


SENTENCES = {
    "NaN": "train: loss must be finite, got nan in simclr, epoch 0, step 0; the last checkpoint is kept",
    "full disk": "checkpoint: last.pt cannot be written, on rank 0",
    "odd batch": "train: optim.batch_size must be a multiple of the 2 ranks, got 15",
    "few images": "train: the number of simclr's images, fewer than a batch, must be a multiple of the 2 ranks, got 13",
}


@pytest.mark.parametrize("name", SENTENCES)
def test_the_failure_of_a_rank_is_one_sentence_on_both(name, groups, tmp_path):
    raised = groups(WORLD).run(train_cases.fail, tmp_path, name)
    assert [str(error)[: len(SENTENCES[name])] for error in raised] == [SENTENCES[name]] * WORLD
    assert (tmp_path / "simclr" / "last.pt").exists() == (name == "NaN")


@pytest.mark.parametrize(("name", "timeout"), [("SIGKILL", 600), ("SIGSTOP", 3)])
def test_a_lost_rank_ends_the_run_with_a_sentence(name, timeout, tmp_path):
    ranks = Ranks(WORLD)
    try:
        ranks.start(train_cases.lose_a_rank, tmp_path, free_port(), getattr(signal, name).value, timeout)
        code, errors = ranks.result(0)
    finally:
        ranks.processes[1].kill()
        ranks.close()
    assert code == 2
    sentence = f"another rank of the run ended, or did not answer for run.timeout = {timeout} s"
    assert f"ltood: error: train: {sentence} (" in errors
    assert errors.strip().endswith("the last checkpoint is kept, go on with --resume")
    assert load_checkpoint(tmp_path / "simclr" / "last.pt")["epoch"] == 1


@pytest.mark.parametrize("images", [False, True])
def test_batch_norm_of_all_ranks_is_that_of_one_process(images, groups):
    """Far from 0, so that a variance from sums of squares would fail; 3 rows on one rank and 5 on the other."""
    of_ranks = groups(WORLD).results(norm_cases.on_ranks, images)
    expected = norm_cases.outcome(norm_cases.network(images), norm_cases.rows(images))
    for name, value in expected.items():
        parts = [found[name] for found in of_ranks]
        found = torch.cat(parts) if name in ("y", "x", "eval") else parts[0]
        assert relative_error(found, value) < 1e-5, name

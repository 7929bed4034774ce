"""Ranks that do not fit together: one sentence on all of them, never a hang, and the group still works afterwards."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import ltood_fast
from ltood_fast import nn
from python_tests.distributed.ranks import Ranks

N, D = 6, 4

# What rank 1 does otherwise, and the sentence of all ranks.
MISMATCHES = {
    "width": "the width D of z must be the same on all ranks of the group, got 4 on rank 0 and 5 on rank 1",
    "dtype": "the dtype of z must be the same on all ranks of the group, got torch.float32 on rank 0 and torch.float64",
    "k": "k must be the same on all ranks of the group, got 1 on rank 0 and 2 on rank 1",
    "k of all": r"k must be in \[1, 17\], 18 rows on all ranks, got 18",
    "temperature": "temperature must be the same on all ranks of the group, got 0.2 on rank 0 and 0.3 on rank 1",
    "function": "call must be the same on all ranks of the group, got psd_loss on rank 0 and nt_xent on rank 1",
    "exchange": "exchange must be the same on all ranks of the group, got gather on rank 0 and ring on rank 1",
    "instance_ids": "instance_ids must be the same on all ranks of the group, got None on rank 0 and a tensor on",
    "odd": "instance_ids must be given when the number of rows is odd .*, got None for 5 rows, on rank 1",
    "domain": r"domain must be of shape \[6\], got shape \(3,\), on rank 1",
    "no rows": r"z must be non-empty, got shape \(0, 4\), on rank 1",
}


def mismatched(rank: int, world: int, name: str) -> None:
    z, function = torch.randn(N, D), ltood_fast.psd_loss
    options = {"k": 18 if name == "k of all" else 1}
    if rank == 1:
        z = {"width": torch.randn(N, 5), "dtype": z.double(), "odd": z[:5], "no rows": z[:0]}.get(name, z)
        others = {"temperature": 0.3, "exchange": "ring", "k": 2, "domain": torch.zeros(3).long()}
        others["instance_ids"] = torch.arange(N)
        options |= {key: value for key, value in others.items() if key == name}
        if name == "function":
            function, options = ltood_fast.nt_xent, {}
    function(z, **{"temperature": 0.2, **options}, group=dist.group.WORLD)


@pytest.mark.parametrize("name", MISMATCHES)
def test_ranks_that_differ_all_say_the_same(groups, name):
    results = groups(3).run(mismatched, name)
    assert all(isinstance(result, ValueError) for result in results), results
    assert len({str(result) for result in results}) == 1
    with pytest.raises(ValueError, match=MISMATCHES[name]):
        raise results[0]


def stage2_with_other_far(rank: int, world: int) -> None:
    far = torch.tensor([1, 0, 0]) if rank == 0 else torch.tensor([1, 2, 0])
    z = torch.randn(N, D)
    ltood_fast.stage2_loss(z, z, torch.zeros(N).long(), far, k=1, group=dist.group.WORLD)


def pos_idx_outside(rank: int, world: int) -> None:
    z = torch.randn(N, D)
    chosen = torch.full((N, 1), 17 + rank)  # 18 rows in all
    far = torch.tensor([0])
    ltood_fast.guided_contrastive(z, z, torch.zeros(N).long(), far, pos_idx=chosen, group=dist.group.WORLD)


def test_stage_2_is_held_to_one_batch_too(groups):
    for result in groups(2).run(stage2_with_other_far):
        with pytest.raises(ValueError, match="far must be the same on all ranks of the group"):
            raise result
    for result in groups(3).run(pos_idx_outside):
        with pytest.raises(ValueError, match=r"pos_idx must be in \[-1, 18\), got \[17, 19\]"):
            raise result


def row_by_row(rank: int, world: int, loss: str, reduction: str) -> None:
    """Losses that exchange nothing but two numbers; rank 1's rows do not fit."""
    z, domain, options = torch.randn(N, D), torch.zeros(N).long(), {"reduction": reduction, "group": dist.group.WORLD}
    head = {"kind": "bce", "weight": torch.zeros(D), "bias": torch.zeros(())}
    if loss == "feature_distill":
        ltood_fast.feature_distill(z, z[: N - rank], **options)
    else:
        ltood_fast.domain_loss(z, domain[: N - rank], **head, **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", ["feature_distill", "domain_loss"])
def test_losses_of_single_rows_fail_together_too(groups, loss, reduction):
    for result in groups(2).run(row_by_row, loss, reduction):
        with pytest.raises(ValueError, match=rf"{loss}: .* got shape \(5.*\), on rank 1"):
            raise result


def other_reduction(rank: int, world: int) -> None:
    z = torch.randn(N, D)
    ltood_fast.feature_distill(z, z, reduction=("mean", "sum")[rank], group=dist.group.WORLD)


def test_single_rows_of_other_reductions(groups):
    for result in groups(2).run(other_reduction):
        with pytest.raises(
            ValueError, match="arguments must be the same on all ranks of the group, got mean on rank 0"
        ):
            raise result


def with_a_nan(rank: int, world: int, exchange: str) -> tuple[bool, bool]:
    z = torch.randn(N, D)
    if rank == 1:
        z[2, 1] = torch.nan
    z.requires_grad_()
    loss = ltood_fast.stage1_loss(z, torch.arange(N) % 2, group=dist.group.WORLD, exchange=exchange).total
    loss.backward()
    return bool(loss.isnan()), bool(z.grad.isnan().any())


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_a_nan_on_one_rank_is_a_nan_on_all(groups, exchange):
    assert groups(3).results(with_a_nan, exchange) == [(True, True)] * 3


def wrong_types(rank: int, world: int) -> list[str]:
    said = []
    for call in (
        lambda: ltood_fast.nt_xent(torch.randn(4, 2), group="world"),
        lambda: ltood_fast.stage2_loss(*[torch.zeros(2, 2)] * 4, group=0),
        lambda: nn.PSDLoss(group=torch.zeros(1)),
        lambda: nn.Stage2Loss(group=[0, 1]),
    ):
        with pytest.raises(TypeError) as error:
            call()
        said.append(str(error.value))
    with pytest.raises(ValueError, match="nt_xent: exchange must be one of gather, ring, got 'tree'"):
        ltood_fast.nt_xent(torch.randn(4, 2), group=dist.group.WORLD, exchange="tree")
    return said


def test_a_wrong_type_is_one_sentence(groups):
    said = groups(1).results(wrong_types)[0]
    assert said[0] == "nt_xent: group must be a torch.distributed.ProcessGroup or None, got str"
    assert [sentence.split(":")[0] for sentence in said] == ["nt_xent", "stage2_loss", "PSDLoss", "Stage2Loss"]


def after_the_end(rank: int, world: int) -> str:
    group = dist.group.WORLD
    dist.destroy_process_group()
    with pytest.raises(RuntimeError) as error:
        ltood_fast.nt_xent(torch.randn(4, 2), group=group)
    return str(error.value)


def twice_differentiated(rank: int, world: int) -> str:
    z = torch.randn(N, D, requires_grad=True)
    (gradient,) = torch.autograd.grad(ltood_fast.nt_xent(z, group=dist.group.WORLD), z, create_graph=True)
    with pytest.raises(RuntimeError) as error:
        gradient.sum().backward()
    return str(error.value)


def test_double_backward_is_refused(groups):
    assert groups(2).results(twice_differentiated) == ["nt_xent: double backward is not supported"] * 2


def one_that_leaves(rank: int, world: int, dies: bool) -> None:
    """In the middle of a step, after the forward."""
    group = dist.new_group(timeout=timedelta(seconds=20 if dies else 1))
    loss = ltood_fast.nt_xent(torch.randn(N, D, requires_grad=True), group=group)
    if rank != 1:
        loss.backward()
    elif dies:
        os._exit(1)
    else:
        time.sleep(2)


def test_a_rank_that_stays_away_is_an_error_on_the_others(groups):
    results = groups(3).run(one_that_leaves, False)
    for rank in (0, 2):
        with pytest.raises(RuntimeError, match="a rank of the group failed or did not answer in time"):
            raise results[rank]


def test_a_rank_that_dies_is_an_error_on_the_others():
    ranks = Ranks(2)
    results = ranks.run(one_that_leaves, True)
    ranks.close()
    assert isinstance(results[1], SystemExit)
    with pytest.raises(RuntimeError, match="nt_xent: a rank of the group failed or did not answer in time"):
        raise results[0]


def test_a_group_that_was_destroyed():
    ranks = Ranks(1)
    (said,) = ranks.results(after_the_end)
    ranks.close()
    assert said.startswith("nt_xent: group needs torch.distributed")

"""info_nce, clip_loss and sigmoid_loss over 1 to 3 ranks, against one process in float64 with the whole batch."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ltood_fast as lt
from ltood_fast import Denominator, Exclude
from python_tests.tolerances import assert_gradient_close, assert_loss_close

D = 7
SIZES = [[9], [6, 6], [3, 8], [5, 1, 4]]
CASES = {
    "plain": ("info_nce", {}),
    "both directions": ("info_nce", {"symmetric": True, "ids": True}),
    "targets": ("info_nce", {"target": True, "label_smoothing": 0.1}),
    "weights": ("info_nce", {"weight": True, "ids": True}),
    "a queue": ("info_nce", {"queue": True, "denominator": Denominator(decoupled=True)}),
    "clip_loss": ("clip_loss", {}),
    "sigmoid_loss": ("sigmoid_loss", {}),
}


def batch(n: int, dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(n)
    return {
        "x": torch.randn(n, D, generator=g, dtype=torch.float64).to(dtype),
        "y": torch.randn(n, D, generator=g, dtype=torch.float64).to(dtype),
        "queue": torch.randn(11, D, generator=g, dtype=torch.float64).to(dtype),
        "weight": torch.rand(n, generator=g, dtype=torch.float64),
        "x_ids": torch.randint(0, 4, (n,), generator=g),
        "y_ids": torch.randint(0, 4, (n,), generator=g),
        "queue_ids": torch.randint(0, 4, (11,), generator=g),
    }


def outcome(case: str, given: dict[str, Tensor], target: Tensor, reduction: str, **options) -> list[Tensor]:
    """[loss, gradients of x, y and of what is shared] of a sum over the rows, or of the reduced loss."""
    function, own = CASES[case]
    own = dict(own)
    x, y = (given[name].clone().requires_grad_() for name in ("x", "y"))
    if function != "info_nce":
        shared = [torch.tensor(2.0, dtype=torch.float64).requires_grad_(), torch.tensor(-1.0).double().requires_grad_()]
        loss = getattr(lt, function)(x, y, *shared, reduction=reduction, **options)
    else:
        shared = [torch.tensor(0.3, dtype=torch.float64, requires_grad=True)]
        queue = given["queue"] if own.pop("queue", False) else None
        if own.pop("ids", False):
            own["exclude"] = Exclude(given["x_ids"], given["y_ids"])
        own |= {"target": target} if own.pop("target", False) else {}
        own |= {"weight": given["weight"]} if own.pop("weight", False) else {}
        loss = lt.info_nce(x, y, queue, shared[0], reduction=reduction, **own, **options)
    loss.sum().backward()
    return [loss.detach(), x.grad, y.grad, *(number.grad for number in shared)]


def targets(sizes: list[int]) -> list[Tensor]:
    """Rows of the own rank's keys."""
    return [torch.arange(n) * 3 % n for n in sizes]


def on_a_rank(rank: int, world: int, case: str, sizes: list[int], dtype: torch.dtype, reduction: str, backend: str):
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    given = {name: x if name.startswith("queue") else x[own] for name, x in batch(sum(sizes), dtype).items()}
    return outcome(case, given, targets(sizes)[rank], reduction, group=dist.group.WORLD, backend=backend)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ranks_agree_with_one_process(groups, case, sizes, reduction):
    """Gradients of a mean are those of the sum of what all ranks return: W times those of one process."""
    dtype = torch.float64 if reduction == "none" else torch.float32
    outcomes = groups(len(sizes)).results(on_a_rank, case, sizes, dtype, reduction, "auto")
    first = [sum(sizes[:rank]) for rank in range(len(sizes))]
    target = torch.cat([part + start for part, start in zip(targets(sizes), first, strict=True)])
    whole = {name: x.double() if x.is_floating_point() else x for name, x in batch(sum(sizes), dtype).items()}
    expected = outcome(case, whole, target, reduction, backend="reference")
    times = 1 if reduction == "none" else len(sizes)
    loss = torch.cat([o[0] for o in outcomes]) if reduction == "none" else outcomes[0][0]
    assert_loss_close(loss, expected[0], dtype)
    for place in (1, 2):
        assert_gradient_close(torch.cat([o[place] for o in outcomes]), times * expected[place], dtype)
    for place in range(3, len(expected)):
        assert_gradient_close(sum(o[place] for o in outcomes), times * expected[place], dtype)


def test_the_reference_serves_ranks_too(groups):
    arguments = ("both directions", [3, 8], torch.float64, "none")
    by_kernel = groups(2).results(on_a_rank, *arguments, "cpu")
    by_reference = groups(2).results(on_a_rank, *arguments, "reference")
    for ours, theirs in zip(by_kernel, by_reference, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def _differ(rank: int, world: int) -> str:
    try:
        lt.info_nce(torch.randn(3, 4), torch.randn(3, 4), temperature=0.1 + rank, group=dist.group.WORLD)
    except ValueError as error:
        return str(error)


def test_ranks_that_disagree_get_one_sentence(groups):
    sentence = "info_nce: temperature must be the same on all ranks of the group, got 0.1 on rank 0 and 1.1 on rank 1"
    assert groups(2).results(_differ) == [sentence] * 2


def _ring(rank: int, world: int) -> str:
    try:
        lt.info_nce(torch.randn(3, 4), torch.randn(3, 4), group=dist.group.WORLD, exchange="ring")
    except ValueError as error:
        return str(error)


def test_a_ring_is_refused(groups):
    sentence = "info_nce: exchange must be one of gather, got 'ring'"
    assert all(text.startswith(sentence) for text in groups(2).results(_ring))


def _one_is_wrong(rank: int, world: int, name: str) -> str:
    """A call that differs on rank 1."""
    x, queue = torch.randn(3, 4), torch.randn(9, 4)
    other = rank == 1
    calls = {
        "features": lambda g: lt.clip_loss(x, x[:, : 4 - other], 10.0, group=g),
        "bias": lambda g: lt.clip_loss(x, x, 10.0, "b" if other else 0.0, group=g),
        "scale": lambda g: lt.clip_loss(x, x, 10.0 + rank, group=g),
        "temperature with a queue": lambda g: lt.info_nce(x, x, queue, 0.1 + rank, group=g),
        "a queue on one rank": lambda g: lt.info_nce(x, x, queue if other else None, group=g),
    }
    try:
        calls[name](dist.group.WORLD)
    except (ValueError, TypeError) as error:
        return str(error)


ONE_IS_WRONG = {
    "features": "clip_loss: text_features must be 4 wide as image_features is",
    "bias": "clip_loss: logit_bias must be a number",
    "scale": "clip_loss: logit_scale must be the same on all ranks of the group",
    "temperature with a queue": "info_nce: temperature must be the same on all ranks of the group",
    "a queue on one rank": "info_nce: negative_keys must be the same on all ranks of the group",
}


@pytest.mark.parametrize("name", ONE_IS_WRONG)
def test_a_mistake_of_one_rank_is_told_on_all(groups, name):
    for text in groups(2).results(_one_is_wrong, name):
        assert ONE_IS_WRONG[name] in text

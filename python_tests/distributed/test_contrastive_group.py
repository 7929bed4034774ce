"""The contrastive losses of a batch that is spread over 1 to 4 processes, against one process in float64."""

import pytest
import torch

from python_tests.distributed.group_cases import ALL_CASES, CASES, SIZES, Outcome, of_one_process, on_a_rank
from python_tests.tolerances import assert_gradient_close, assert_loss_close

SPREAD = [(world, shape) for world, shapes in SIZES.items() for shape in shapes]


def check(outcomes: list[Outcome], expected: Outcome, reduction: str, dtype: torch.dtype) -> None:
    if reduction == "none":
        losses = [torch.cat(parts) for parts in zip(*(o.losses for o in outcomes), strict=True)]
    else:
        losses = outcomes[0].losses
        assert all(torch.equal(a, b) for o in outcomes for a, b in zip(o.losses, losses, strict=True))
    for actual, truth in zip(losses, expected.losses, strict=True):
        assert_loss_close(actual, truth, dtype)
    if expected.lse is not None:
        assert_loss_close(torch.cat([o.lse for o in outcomes]), expected.lse, dtype)
    assert_gradient_close(torch.cat([o.grad_z for o in outcomes]), expected.grad_z, dtype)
    for parts, truth in zip(zip(*(o.grad_others for o in outcomes), strict=True), expected.grad_others, strict=False):
        assert_gradient_close(sum(parts), truth, dtype)
    if expected.indices is not None:
        assert torch.equal(torch.cat([o.indices for o in outcomes]), expected.indices)
        cosines = torch.cat([o.cosines for o in outcomes]).double()
        found = expected.indices >= 0
        torch.testing.assert_close(cosines[found], expected.cosines[found], rtol=0, atol=1e-6)
        assert torch.equal(cosines[~found], expected.cosines[~found])


@pytest.mark.parametrize(("world", "shape"), SPREAD)
@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_rows_and_gradients_are_those_of_one_process(groups, world, shape, exchange):
    sizes = SIZES[world][shape]
    for case in ALL_CASES if exchange == "gather" else CASES:
        arguments = (case, sizes, torch.float64, "none")
        outcomes = groups(world).results(on_a_rank, *arguments, exchange, "auto")
        check(outcomes, of_one_process(*arguments), "none", torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_reductions_in_the_dtypes_of_training(groups, dtype, reduction, exchange):
    for world in (2, 3):
        sizes = SIZES[world]["uneven"]
        for case in ("nt_xent ids", "psd bank", "stage1", *(("stage2", "feature") if exchange == "gather" else ())):
            arguments = (case, sizes, dtype, reduction)
            outcomes = groups(world).results(on_a_rank, *arguments, exchange, "auto")
            check(outcomes, of_one_process(*arguments), reduction, dtype)

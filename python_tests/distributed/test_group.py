"""The losses of a batch that is spread over 1 to 4 processes, against one process in float64."""

import pytest
import torch
import torch.distributed as dist

import ltood_fast
from python_tests.distributed.group_cases import ALL_CASES, SIZES, Outcome, batch, of_one_process, on_a_rank
from python_tests.oracle import contrastive as oracle
from python_tests.oracle.arithmetic import wide
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
    for case in ALL_CASES:
        arguments = (case, sizes, torch.float64, "none")
        outcomes = groups(world).results(on_a_rank, *arguments, exchange, "auto")
        check(outcomes, of_one_process(*arguments), "none", torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_reductions_in_the_dtypes_of_training(groups, dtype, reduction, exchange):
    for world in (2, 3):
        sizes = SIZES[world]["uneven"]
        for case in ("nt_xent ids", "psd bank", "stage1", "guided fallback", "relational", "stage2", "feature"):
            arguments = (case, sizes, dtype, reduction)
            outcomes = groups(world).results(on_a_rank, *arguments, exchange, "auto")
            check(outcomes, of_one_process(*arguments), reduction, dtype)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_the_reference_where_there_is_no_kernel(groups, exchange):
    for case in ("psd domain k3", "psd bank", "stage1", "supcon", "stage2"):
        arguments = (case, SIZES[3]["uneven"], torch.float64, "none")
        check(
            groups(3).results(on_a_rank, *arguments, exchange, "reference"),
            of_one_process(*arguments),
            "none",
            torch.float64,
        )


PAIRS = {"nt_xent": "instance_ids", "supcon": "labels"}
TAU = 0.05


def converged(rank: int, world: int, name: str, sizes: list[int], exchange: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The row losses of pairs that all but agree, most of them on two ranks, and the gradient of their sum."""
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    z = pairs_that_agree()[own].requires_grad_()
    options = {"temperature": TAU, "reduction": "none", "exchange": exchange, "group": dist.group.WORLD}
    loss = getattr(ltood_fast, name)(z, **{PAIRS[name]: (torch.arange(20) % 10)[own]}, **options)
    loss.sum().backward()
    return loss.detach(), z.grad


def pairs_that_agree() -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    return torch.randn(10, 24, generator=g).repeat(2, 1) + 0.1 * torch.randn(20, 24, generator=g)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("name", PAIRS)
def test_small_losses_keep_their_digits(groups, name, exchange):
    results = groups(3).results(converged, name, [7, 9, 4], exchange)
    loss, gradient = (torch.cat(parts) for parts in zip(*results, strict=True))
    pairs = {PAIRS[name]: torch.arange(20) % 10}
    truth = getattr(oracle, name)(z=pairs_that_agree(), temperature=TAU, reduction="sum", **pairs)
    assert 1e-9 < truth["loss"] < 1e-2
    assert (loss >= 0).all()
    assert abs(loss.double().sum().item() - truth["loss"]) < 1e-5 * truth["loss"]
    error = wide(gradient) - truth["grad z"]
    assert (error**2).sum() ** 0.5 < 1e-4 * (truth["grad z"] ** 2).sum() ** 0.5


def ties(n: int) -> torch.Tensor:
    """Rows of norm 2 of which many are equal: their cosines are exact."""
    return torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1]])[torch.arange(n) % 3]


def nearest(rank: int, world: int, sizes: list[int], exchange: str) -> tuple[torch.Tensor, torch.Tensor]:
    first, n = sum(sizes[:rank]), sizes[rank]
    options = {"instance_ids": first + torch.arange(n), "return_neighbors": True, "group": dist.group.WORLD}
    *_, indices = ltood_fast.psd_loss(ties(sum(sizes))[first : first + n], k=4, exchange=exchange, **options)
    *_, again = ltood_fast.psd_loss(ties(sum(sizes))[first : first + n], k=4, exchange=exchange, **options)
    return indices, again


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_equal_neighbours_go_to_the_lower_row_of_the_batch(groups, exchange):
    """A ring brings the shards in another order on every rank, some with fewer rows than neighbours are wanted."""
    sizes = [3, 7, 2, 6]
    indices, again = (torch.cat(x) for x in zip(*groups(4).results(nearest, sizes, exchange), strict=True))
    equal = [[j for j in range(18) if j % 3 == i % 3 and j != i][:4] for i in range(18)]
    assert indices.tolist() == equal
    assert torch.equal(indices, again)


def bits(rank: int, world: int, exchange: str) -> list[torch.Tensor]:
    torch.manual_seed(rank)
    z, domain = torch.randn(300, 24), torch.randint(0, 2, (300,))
    results = []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        z = z.detach().requires_grad_()
        temperature = torch.tensor(0.2, requires_grad=True)
        options = {"k": 2, "exchange": exchange, "group": dist.group.WORLD}
        total = ltood_fast.stage1_loss(z, domain, temperature, **options).total
        total = total + ltood_fast.stage2_loss(z, z, domain, torch.tensor([1, 0]), temperature, **options).total
        total.backward()
        results.append([total.detach(), z.grad, temperature.grad])
    torch.set_num_threads(1)
    return results


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_the_same_inputs_give_the_same_bits(groups, exchange):
    for first, *others in groups(2).results(bits, exchange):
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def opchecks(rank: int, world: int) -> None:
    whole, group = batch(12, torch.float32), dist.group.WORLD.group_name
    z, temperature = whole["z"].requires_grad_(), torch.tensor(0.3, requires_grad=True)
    rows, ranks = {"z": z, "temperature_tensor": temperature}, {"use_kernel": True, "group": group}
    searched = {name: whole[name] for name in ("instance_ids", "labels", "domain")} | {"k": 2}
    for exchange in ("gather", "ring"):
        call = {"op": "stage1_loss", "must_match": "reduction=none", "exchange": exchange}
        torch.library.opcheck(torch.ops.ltood_fast.contrastive_group.default, (), {**rows, **searched, **call, **ranks})
    torch.library.opcheck(
        torch.ops.ltood_fast.sum_over_ranks.default, (z.detach()[0].requires_grad_(), "sum", "", group)
    )
    keys = {name: whole[name] for name in ("guide", "far", "clusters")}
    gathered = {"z": z, **keys, "pos_idx": whole["pos_idx"], "op": "stage2", "must_match": "", "group": group}
    torch.library.opcheck(torch.ops.ltood_fast.gather_batch.default, (), gathered)
    for exchange, pos_idx in (("gather", None), ("ring", whole["pos_idx"])):
        call = {"op": "stage2_loss", "must_match": "", "exchange": exchange}
        options = {"pos_idx": pos_idx, "k": 2, "distill": True}
        torch.library.opcheck(
            torch.ops.ltood_fast.guided_group.default, (), {**rows, **keys, **options, **call, **ranks}
        )


def test_opcheck(groups):
    groups(1).results(opchecks)

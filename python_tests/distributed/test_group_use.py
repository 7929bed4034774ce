"""The losses over a group as a trainer uses them: compiled, under DDP, as Modules, beside open_clip's convention."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import ltood_fast
from ltood_fast.ops._group import EXCHANGES
from python_tests.distributed.group_cases import ALL_CASES, SIZES, batch, given_of, local
from python_tests.tolerances import assert_gradient_close


def compiled(rank: int, world: int, exchange: str, backend: str, cases: list[str]) -> None:
    """Uneven batches; the losses in one graph, each with a z and a temperature (or head) of its own."""
    own = local(batch(sum(SIZES[2]["uneven"]), torch.float32), SIZES[2]["uneven"], rank)
    variables = {case: own["z"].clone().requires_grad_() for case in cases}
    shared = {case: torch.tensor(0.3, requires_grad=True) for case in cases}

    def losses(variables, shared):
        values = []
        for case in cases:
            function, options, names = ALL_CASES[case]
            given = given_of(names, own) | options | {"group": dist.group.WORLD, "exchange": exchange}
            if function == "feature_distill":
                del given["exchange"]
            elif case == "bce":
                given["bias"] = shared[case]
            else:
                given |= {"temperature": shared[case], "return_lse": True}
            result = getattr(ltood_fast, function)(variables[case], **given)
            result, *extras = result if "return_lse" in given else (result,)
            value = result.total + 0.3 * result[2] if hasattr(result, "total") else result
            values.append(value + sum(0.1 * lse.sum() for lse in extras))
        return values

    inputs = *variables.values(), *(x for case, x in shared.items() if case != "feature")
    in_one_graph = torch.compile(losses, fullgraph=True, backend=backend)(variables, shared)
    eager = losses(variables, shared)
    torch.testing.assert_close(in_one_graph, eager)
    gradients = [torch.autograd.grad(sum(values), inputs) for values in (eager, in_one_graph)]
    torch.testing.assert_close(*gradients)
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])


ONE_OF_EACH = [*{function: case for case, (function, _, _) in ALL_CASES.items() if case != "bce"}.values(), "bce"]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_every_loss_compiles_in_one_graph(groups, exchange):
    groups(2).results(compiled, exchange, "aot_eager", ONE_OF_EACH)


def test_inductor_compiles_a_loss(groups):
    groups(2).results(compiled, "ring", "inductor", ["relational"])


class GatherWithGrad(torch.autograd.Function):
    """open_clip's gather_with_grad: all rows, and the sum over the ranks of the gradients that come back."""

    @staticmethod
    def forward(ctx, x):
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x)
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def as_open_clip(rank: int, world: int) -> None:
    """local_loss: the loss of the own rows, whose mean over ranks is that of the batch."""
    own = local(batch(sum(SIZES[3]["even"]), torch.float64), SIZES[3]["even"], rank)["z"]
    n = len(own)
    gradients = []
    for name in ("open_clip", "ours"):
        z, scale = own.clone().requires_grad_(), torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
        if name == "ours":
            ltood_fast.nt_xent(z, 1 / scale, group=dist.group.WORLD).backward()
        else:
            u = F.normalize(z, dim=1)
            rows = torch.arange(n)
            logits = scale * u @ GatherWithGrad.apply(u).T
            logits[rows, rank * n + rows] = -torch.inf
            F.cross_entropy(logits, rank * n + rows.roll(n // 2)).backward()
        dist.all_reduce(scale.grad)
        gradients.append((z.grad, scale.grad))
    torch.testing.assert_close(*gradients)


def test_the_convention_of_open_clip(groups):
    groups(3).results(as_open_clip)


def under_ddp(rank: int, world: int) -> list[torch.Tensor]:
    """A step of stage 1 with uneven batches and a learnt temperature: the gradients of the parameters."""
    sizes = SIZES[world]["uneven"]
    own = local(batch(sum(sizes), torch.float64), sizes, rank)
    model, loss = trained_parts()
    model = DistributedDataParallel(model)
    loss.hyper_parameters["group"] = dist.group.WORLD
    loss(model(own["z"]), own["domain"], instance_ids=own["instance_ids"]).total.backward()
    temperature = loss.temperature.grad
    dist.all_reduce(temperature)
    return [p.grad for p in model.parameters()] + [temperature / world]


def trained_parts() -> tuple[nn.Module, ltood_fast.nn.Stage1Loss]:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8)).double()
    return model, ltood_fast.nn.Stage1Loss(nn.Parameter(torch.tensor(0.3, dtype=torch.float64)), k=2)


def test_the_step_of_ddp_is_that_of_one_process(groups):
    whole = batch(sum(SIZES[3]["uneven"]), torch.float64)
    model, loss = trained_parts()
    loss(model(whole["z"]), whole["domain"], instance_ids=whole["instance_ids"]).total.backward()
    expected = [p.grad for p in model.parameters()] + [loss.temperature.grad]
    for result in groups(3).results(under_ddp):
        for actual, truth in zip(result, expected, strict=True):
            assert_gradient_close(actual, truth, torch.float64)


def both_stages(model: nn.Module, rows: dict[str, torch.Tensor], **options) -> torch.Tensor:
    z, ids = model(rows["z"]), {"instance_ids": rows["instance_ids"]}
    first = ltood_fast.stage1_loss(z, rows["domain"], k=2, **ids, **options).total
    return first + ltood_fast.stage2_loss(z, rows["guide"], rows["clusters"], rows["far"], **ids, **options).total


def step_under_fsdp(rank: int, world: int, exchange: str) -> list[torch.Tensor]:
    """The parameters, sharded over the ranks, after a step."""
    sizes = SIZES[world]["uneven"]
    model, _ = trained_parts()
    mesh = init_device_mesh("cpu", (world,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    own = local(batch(sum(sizes), torch.float64), sizes, rank)
    both_stages(model, own, group=dist.group.WORLD, exchange=exchange).backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    return [p.full_tensor().detach() for p in model.parameters()]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_the_step_of_fsdp_is_that_of_one_process(groups, exchange):
    model, _ = trained_parts()
    both_stages(model, batch(sum(SIZES[2]["uneven"]), torch.float64)).backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    for result in groups(2).results(step_under_fsdp, exchange):
        for actual, truth in zip(result, model.parameters(), strict=True):
            torch.testing.assert_close(actual, truth.detach(), rtol=1e-10, atol=1e-12)


def modules(rank: int, world: int) -> None:
    own = local(batch(16, torch.float64), [10, 6], rank)
    group = dist.group.WORLD
    z, guide, clusters, far, domain, labels = map(own.get, ("z", "guide", "clusters", "far", "domain", "labels"))
    shared = {"group": group, "exchange": "ring"}
    pairs = [
        (ltood_fast.nn.NTXentLoss(**shared)(z), ltood_fast.nt_xent(z, **shared)),
        (ltood_fast.nn.SupConLoss(**shared)(z, labels), ltood_fast.supcon(z, labels, **shared)),
        (ltood_fast.nn.DomainLoss(**shared)(z, domain), ltood_fast.domain_loss(z, domain, **shared)),
        (ltood_fast.nn.PSDLoss(k=2, **shared)(z), ltood_fast.psd_loss(z, k=2, **shared)),
        (ltood_fast.nn.Stage1Loss(**shared)(z, domain), ltood_fast.stage1_loss(z, domain, **shared)),
        (
            ltood_fast.nn.GuidedContrastiveLoss(**shared)(z, guide, clusters, far),
            ltood_fast.guided_contrastive(z, guide, clusters, far, **shared),
        ),
        (
            ltood_fast.nn.RelationalDistillLoss(**shared)(z, guide),
            ltood_fast.relational_distill(z, guide, **shared),
        ),
        (
            ltood_fast.nn.Stage2Loss(**shared)(z, guide, clusters, far),
            ltood_fast.stage2_loss(z, guide, clusters, far, **shared),
        ),
    ]
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert f"group={group.group_name!r}" in repr(ltood_fast.nn.NTXentLoss(group=group))


def test_modules_pass_their_group_on(groups):
    groups(2).results(modules)


def in_a_part_of_the_world(rank: int, world: int) -> None:
    """Ranks 0 and 2; rank 1, which is in no such group, has none to name."""
    group, whole = dist.new_group([0, 2]), batch(16, torch.float64)
    if rank == 1:
        with pytest.raises(TypeError, match="nt_xent: group must be a torch.distributed.ProcessGroup or None, got"):
            ltood_fast.nt_xent(whole["z"], group=group)
        return
    own = local(whole, [10, 6], rank // 2)
    expected = ltood_fast.stage1_loss(whole["z"], whole["domain"], instance_ids=whole["instance_ids"])
    for exchange in ("gather", "ring"):
        options = {"instance_ids": own["instance_ids"], "group": group, "exchange": exchange}
        torch.testing.assert_close(ltood_fast.stage1_loss(own["z"], own["domain"], **options), expected)


def test_a_group_of_some_ranks(groups):
    groups(3).results(in_a_part_of_the_world)

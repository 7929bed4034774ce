"""Every op and every Module under torch.compile, torch.export, on the meta device and with fake tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from python_tests.ops import one_call_each as each

CPU = torch.device("cpu")
SIZES = (8, 12, 16, 20, 24, 28, 32, 36, 40)  # torch.compile gives up on a function after eight graphs
TEMPERATURES = (0.05, 0.07, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0)

ALL = {name: (call.function, call.others) for name, call in each.OPS.items()}
ALL |= {name: (make(), others) for name, (make, others) in each.MODULES.items()}


@pytest.fixture(params=ALL)
def call(request):
    """(function or Module, the tensors that follow z, the quickest compiler that shows how many graphs there are): the
    Modules call the ops, whose gradients are compiled too."""
    torch._dynamo.reset()
    return *ALL[request.param], "aot_eager" if request.param in each.OPS else "eager"


def counted(
    function: Callable, compiler: str = "aot_eager", **options: object
) -> tuple[Callable, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(compiler)
    return torch.compile(function, backend=counter, fullgraph=True, **options), counter


def first(result: Tensor | tuple) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def gradient(loss: Tensor, z: Tensor) -> Tensor:
    return torch.autograd.grad(loss, z)[0] if loss.requires_grad else torch.zeros_like(z)


def assert_same(compiled: Callable, function: Callable, z: Tensor, others: tuple, **options: object) -> None:
    """The same value and gradient, of a fresh leaf each."""
    results = []
    for f in (compiled, function):
        leaf = z.clone().requires_grad_()
        loss = first(f(leaf, *others, **options))
        results.append((loss.detach(), gradient(loss, leaf)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_two_graphs_serve_any_number_of_rows(call):
    function, others, compiler = call
    compiled, counter = counted(function, compiler)
    for n in SIZES:
        assert_same(compiled, function, each.rows(n), others(n, CPU))
    assert counter.frame_count <= 2


def test_one_dynamic_graph_serves_any_number_of_rows(call):
    function, others, compiler = call
    compiled, counter = counted(function, compiler, dynamic=True)
    for n in SIZES[:4]:
        assert_same(compiled, function, each.rows(n), others(n, CPU))
    assert counter.frame_count == 1


def test_a_dimension_can_be_marked_dynamic(call):
    function, others, _ = call
    compiled, counter = counted(function, "eager")
    for n in SIZES[:3]:
        arguments = each.rows(n), *others(n, CPU)
        for x in arguments:
            if x.shape[0] == n:
                torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(first(compiled(*arguments)), first(function(*arguments)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", [name for name, call in each.OPS.items() if call.temperature])
def test_two_graphs_serve_a_schedule_of_temperatures(name):
    torch._dynamo.reset()
    function, others = ALL[name]
    compiled, counter = counted(function)
    for temperature in TEMPERATURES:
        assert_same(compiled, function, each.rows(8), others(8, CPU), temperature=temperature)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("relational_distill", "teacher_temperature"),
        ("guided_contrastive", "gamma"),
        ("psd_loss", "neighbor_weight"),
        ("stage1_loss", "alpha"),
        ("stage2_loss", "beta"),
        ("cluster_kl", "nu"),
    ],
)
def test_two_graphs_serve_a_schedule_of_another_number(name, option):
    torch._dynamo.reset()
    function, others = ALL[name]
    compiled, counter = counted(function)
    for value in TEMPERATURES:
        assert_same(compiled, function, each.rows(8), others(8, CPU), **{option: value})
    assert counter.frame_count <= 2


def test_a_schedule_of_a_modules_temperature_takes_two_graphs():
    torch._dynamo.reset()
    module, z = ALL["NTXentLoss"][0], each.rows(8)
    compiled, counter = counted(lambda z, temperature: type(module)(temperature)(z))
    for temperature in TEMPERATURES:
        expected = type(module)(temperature)(z)
        torch.testing.assert_close(compiled(z, temperature), expected)
    assert counter.frame_count <= 2


def test_inductor_runs_the_graph_of_varying_numbers():
    torch._dynamo.reset()
    function, others = ALL["guided_contrastive"]
    compiled = torch.compile(function, fullgraph=True)
    for temperature in TEMPERATURES[:3]:
        assert_same(compiled, function, each.rows(8), others(8, CPU), temperature=temperature)


def test_exports_with_a_plain_dimension(call):
    function, others, compiler = call
    strict = compiler == "eager"

    class Exported(torch.nn.Module):
        def forward(self, z: Tensor, others: tuple[Tensor, ...]) -> Tensor:
            return first(function(z, *others))

    rows = Dim("rows", min=4, max=4096)
    arguments = each.rows(8), others(8, CPU)
    shapes = {0: rows}, tuple({0: rows} if x.shape[0] == 8 else None for x in arguments[1])
    program = torch.export.export(Exported(), arguments, dynamic_shapes=shapes, strict=strict).module()
    for n in (8, 12, 30):
        expected = first(function(each.rows(n), *others(n, CPU)))
        torch.testing.assert_close(program(each.rows(n), others(n, CPU)), expected)


def test_an_exported_loss_refuses_an_odd_number_of_rows():
    """Its graph has no guard for it."""
    rows = Dim("rows", min=4, max=4096)
    module = ALL["NTXentLoss"][0]
    program = torch.export.export(module, (each.rows(8),), dynamic_shapes=({0: rows},)).module()
    with pytest.raises(ValueError, match="instance_ids must be given when the number of rows is odd"):
        program(each.rows(9))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", each.OPS)
def test_meta_tensors_have_the_shapes_of_real_ones(name, backend):
    function, others = ALL[name]
    z = each.rows(8, device="meta").requires_grad_()
    shapes = function(z, *others(8, torch.device("meta")), backend=backend)
    expected = function(each.rows(8), *others(8, CPU), backend=backend)
    assert shapes.is_meta
    assert (shapes.shape, shapes.dtype) == (expected.shape, expected.dtype)
    assert shapes.requires_grad == each.OPS[name].learned
    assert gradient(shapes, z).shape == z.shape


@pytest.mark.parametrize("name", each.MODULES)
def test_modules_run_on_meta_tensors(name):
    make, others = each.MODULES[name]
    z = each.rows(8, device="meta").requires_grad_()
    loss = first(make().to("meta")(z, *others(8, torch.device("meta"))))
    assert loss.is_meta
    assert torch.autograd.grad(loss, z)[0].shape == z.shape


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", each.OPS)
def test_fake_tensors_run_through_every_op(name, backend):
    function, others = ALL[name]
    with FakeTensorMode() as mode:
        z = mode.from_tensor(each.rows(8)).requires_grad_()
        loss = function(z, *(mode.from_tensor(x) for x in others(8, CPU)), backend=backend)
        assert loss.requires_grad == each.OPS[name].learned
        assert gradient(loss, z).shape == z.shape


def test_a_range_of_values_does_not_read_fake_tensors():
    """A check of values is for tensors that have them."""
    with FakeTensorMode():
        z, labels = torch.empty(8, each.D), torch.empty(8, dtype=torch.int64)
        each.lt.domain_loss(z, labels, kind="bce", weight=torch.empty(each.D), bias=torch.empty(()))
        each.lt.nt_xent(z, torch.empty(()))

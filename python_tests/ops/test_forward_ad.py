"""Forward-mode AD and the transforms of torch.func: the right derivatives, or a refusal that names the op.

The truth is the gradient in reverse mode, of the kernel in float64: it leaves out the parts that the ops document as
constants, which differences of the value would not. Second derivatives have the differences of that gradient.
"""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from python_tests.ops import one_call_each as each

CPU = torch.device("cpu")
N, STEP = 8, 1e-6
LEARNED = [name for name, call in each.OPS.items() if call.learned]
WITH_TEMPERATURE = [name for name in LEARNED if each.OPS[name].temperature]


def loss_of(name: str, **options: object):
    """The op as a function of z."""
    call = each.OPS[name]
    others = tuple(x.double() if x.is_floating_point() else x for x in call.others(N, CPU))
    return lambda z, **more: call.function(z, *others, **options, **more)


def inputs() -> tuple[Tensor, Tensor]:
    """z and a direction."""
    return each.rows(N, torch.float64), torch.randn(N, each.D, dtype=torch.float64)


def gradient(f, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(f(leaf), leaf)[0]


def slope(f, x: Tensor, direction: Tensor) -> Tensor:
    return (gradient(f, x) * direction).sum()


def close(actual: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 1e-4  # a tangent of 0 would say nothing
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", LEARNED)
def test_jvp_gives_the_tangent(name, backend):
    f, (z, direction) = loss_of(name, backend=backend), inputs()
    value, tangent = jvp(f, (z,), (direction,))
    close(value, f(z))
    close(tangent, slope(f, z, direction))


@pytest.mark.parametrize("name", WITH_TEMPERATURE)
def test_jvp_gives_the_tangent_of_the_temperature(name):
    z, _ = inputs()
    tau, one = torch.tensor(0.3, dtype=torch.float64), torch.ones((), dtype=torch.float64)

    def f(t):
        return loss_of(name, temperature=t)(z)

    close(jvp(f, (tau,), (one,))[1], slope(f, tau, one))


@pytest.mark.parametrize("name", LEARNED)
def test_dual_numbers_give_the_tangent(name):
    f, (z, direction) = loss_of(name), inputs()
    with fwad.dual_level():
        tangent = fwad.unpack_dual(f(fwad.make_dual(z, direction))).tangent
    close(tangent, slope(f, z, direction))


@pytest.mark.parametrize("name", LEARNED)
def test_transforms_of_torch_func_agree_with_reverse_mode(name):
    f, z = loss_of(name), inputs()[0]
    expected = gradient(f, z)
    for transform in (grad, jacrev, jacfwd):
        close(transform(f)(z), expected)
    close(vmap(grad(f))(torch.stack([z, 2 * z]))[0], expected)
    close(vmap(f)(torch.stack([z, 2 * z]))[0], f(z))


@pytest.mark.parametrize("name", [name for name in LEARNED if name != "cluster_kl"])
def test_second_derivatives_of_torch_func(name):
    """Forward over reverse, against differences of the gradient."""
    f, (z, direction) = loss_of(name), inputs()
    expected = (gradient(f, z + STEP * direction) - gradient(f, z - STEP * direction)) / (2 * STEP)
    close(jvp(grad(f), (z,), (direction,))[1], expected)
    close((hessian(f)(z) * direction).sum(dim=(2, 3)), expected)


def test_the_target_of_cluster_kl_is_constant_to_hessians():
    """Against reverse over reverse."""
    f, (z, direction) = loss_of("cluster_kl"), inputs()
    leaf = z.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss_of("cluster_kl", backend="reference")(leaf), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(first, leaf, direction)
    close(jvp(grad(f), (z,), (direction,))[1], expected)
    close((hessian(f)(z) * direction).sum(dim=(2, 3)), expected)


@pytest.mark.parametrize("name", [name for name, call in each.OPS.items() if not call.learned])
def test_searches_are_constants_in_forward_mode_too(name):
    f, (z, direction) = loss_of(name), inputs()
    value, tangent = jvp(f, (z,), (direction,))
    close(value, f(z))
    assert not tangent.any()


@pytest.mark.parametrize("name", ["psd_loss", "stage1_loss"])
def test_the_bank_has_no_tangent(name):
    """As in reverse mode: neighbours of a bank are constants."""
    z, direction = inputs()
    value, tangent = jvp(lambda bank: loss_of(name, bank=bank)(z), (z[:5],), (direction[:5],))
    assert value != 0
    assert tangent == 0


@pytest.mark.parametrize("name", [name for name in each.OPS if name != "feature_distill"])  # which has no kernel
def test_a_kernel_that_is_asked_for_refuses_by_name(name):
    f, (z, direction) = loss_of(name, backend="cpu"), inputs()
    sentence = f"^{name}: backend='cpu' has no forward-mode derivatives and does not run inside transforms"
    with pytest.raises(RuntimeError, match=sentence):
        jvp(f, (z,), (direction,))
    with pytest.raises(RuntimeError, match=sentence):
        grad(lambda z: f(z).sum())(z)
    with pytest.raises(RuntimeError, match=sentence):
        vmap(f)(z[None])
    with fwad.dual_level(), pytest.raises(RuntimeError, match=sentence):
        f(fwad.make_dual(z, direction))


def test_transforms_inside_and_around_torch_compile():
    torch._dynamo.reset()
    backend = "aot_eager"
    f, (z, direction) = loss_of("nt_xent"), inputs()
    gradient, tangent = grad(f)(z), slope(f, z, direction)
    close(torch.compile(lambda z: grad(f)(z), backend=backend, fullgraph=True)(z), gradient)
    close(torch.compile(lambda z: jvp(f, (z,), (direction,))[1], backend=backend, fullgraph=True)(z), tangent)
    compiled = torch.compile(f, backend=backend)
    close(compiled(z), f(z))  # without a transform first: its graph must not serve the transforms
    close(jvp(compiled, (z,), (direction,))[1], tangent)
    close(grad(compiled)(z), gradient)
    with fwad.dual_level():
        close(fwad.unpack_dual(compiled(fwad.make_dual(z, direction))).tangent, tangent)


def test_checks_of_values_do_not_break_vmap():
    """Labels that are batched, too, have no values to read."""
    z = each.rows(N, torch.float64)
    guide, clusters, far = each.OPS["guided_contrastive"].others(N, CPU)
    rows = vmap(lambda z, c: each.lt.guided_contrastive(z, guide, c, far, k=2))(
        z.expand(2, -1, -1), clusters.expand(2, -1)
    )
    close(rows[1], each.lt.guided_contrastive(z, guide, clusters, far, k=2))

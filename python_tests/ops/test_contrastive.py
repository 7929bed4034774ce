"""The CPU kernel of the contrastive family against the float64 reference, and what the dispatcher asks of an op."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import ltood_fast
from ltood_fast import Bank
from ltood_fast import nn as losses
from ltood_fast._ext import has_kernel
from ltood_fast.ops._backend import use_kernel
from python_tests.ops.contrastive_cases import (
    CASES,
    arguments_of,
    assert_neighbors_right,
    extras,
    run_kernel,
    true_result,
)
from python_tests.tolerances import GRADIENT, assert_gradient_close, assert_loss_close

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CUDA_DTYPES = DTYPES[1:]

# (N, D): why it is there
SHAPES = {
    "the smallest batch that has a pair": (2, 1),
    "odd, fewer rows than a vector": (3, 2),
    "just above a vector of floats": (17, 3),
    "odd, one tile": (127, 17),
    "odd, two ragged tiles": (129, 127),
    "an odd number of tiles: one sits out in each round": (300, 5),
    "eight tiles, the usual width and one more": (1000, 129),
    "wider than tall": (66, 2048),
}


def check(case, z, tau, tensors, normalize=True, backend="cpu"):
    before = z.clone()
    result = run_kernel(case, z, tau, tensors, normalize, backend)
    assert torch.equal(z, before)
    expected = true_result(case, z, tau, tensors, normalize, result.indices)
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    assert all(loss.dtype == wide for loss in result.losses)
    assert result.grad_z.dtype == z.dtype
    pairs = zip(result.losses, expected.losses, strict=True)
    if z.shape[0] == 2 or (z.shape[1] == 1 and normalize):
        # The exact loss of a pair, and the exact gradient of a unit number, is 0: what is left is rounding.
        size = GRADIENT[z.dtype] / tau / z.double().norm(dim=1).min().clamp(max=1)
        assert all((actual - truth).abs().max() <= size for actual, truth in pairs)
        assert (result.grad_z - expected.grad_z).abs().max() <= size
        assert (result.grad_temperature - expected.grad_temperature).abs() <= size / tau
    else:
        for actual, truth in pairs:
            assert_loss_close(actual, truth, z.dtype)
        assert_gradient_close(result.grad_z, expected.grad_z, z.dtype)
        assert_gradient_close(result.grad_temperature, expected.grad_temperature, z.dtype)
    assert_loss_close(result.lse, expected.lse, z.dtype)
    if "k" in case:
        assert_neighbors_right(case, z, tensors, normalize, result)
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_against_the_float64_reference(case, shape, dtype):
    n, d = shape
    case = {**case, "k": min(case["k"], n - 1)} if "k" in case else case
    check(case, torch.randn(n, d, dtype=torch.float64).to(dtype), 0.3, extras(n, d, dtype))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_cuda_against_the_float64_reference(case, shape, dtype):
    n, d = shape
    case = {**case, "k": min(case["k"], n - 1)} if "k" in case else case
    check(case, torch.randn(n, d, dtype=torch.float64).to(dtype), 0.3, extras(n, d, dtype), backend="cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("tau", [0.01, 0.0228, 0.023, 0.2, 10.0])  # on both sides of the fixed shift's bound
@pytest.mark.parametrize("normalize", [True, False])
def test_cuda_temperatures(tau, normalize, dtype):
    z = torch.nn.functional.normalize(torch.randn(320, 24, dtype=torch.float64), dim=1).to(dtype)
    check(CASES["stage1"], z, tau, extras(320, 24, dtype), normalize, backend="cuda")


TEMPERATURES = {
    0.005: "double precision for float inputs",
    0.01: "too cold for the fixed shift",
    0.0166: "just below the bound of the fixed shift, 1/60",
    0.0168: "just above it",
    0.2: "usual",
    10.0: "hot",
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tau", TEMPERATURES)
@pytest.mark.parametrize("case", [CASES["stage1"], CASES["psd bank"]], ids=["stage1", "psd bank"])
def test_temperatures(case, tau, dtype):
    check(case, torch.randn(160, 24, dtype=torch.float64).to(dtype), tau, extras(160, 24, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tau", [0.01, 0.001])  # exp(1 / tau) leaves the range of floats, and of doubles
def test_cold_similarities_of_almost_equal_and_of_opposite_rows(tau, dtype):
    z = torch.randn(80, 24, dtype=torch.float64)
    views = torch.cat([z, z + 0.01 * torch.randn_like(z)]).to(dtype)
    for case in (CASES["stage1"], CASES["psd bank"]):
        check(case, views, tau, extras(160, 24, dtype))
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=dtype)
    _, lse = ltood_fast.nt_xent(opposite, tau, return_lse=True, backend="cpu")
    torch.testing.assert_close(lse, torch.full_like(lse, -1 / tau))


NORMS = {
    0.1: "short rows: all similarities near 0",
    2.0: "fixed shift without normalisation",
    5.5: "online maximum in float",
    300.0: "exponents of 10^5: double precision for float inputs",
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("case", [CASES["stage1"], CASES["psd bank"]], ids=["stage1", "psd bank"])
def test_rows_as_they_are(case, norm, dtype):
    z = torch.randn(160, 24, dtype=torch.float64)
    z = (z / z.norm(dim=1, keepdim=True) * norm * torch.linspace(0.1, 1, 160)[:, None]).to(dtype)
    check(case, z, 0.3, extras(160, 24, dtype), normalize=False)


@pytest.mark.parametrize("scale", [1e-8, 1e25])  # squares of the entries leave the range of floats
def test_normalisation_of_tiny_and_huge_rows(scale):
    check(CASES["stage1"], torch.randn(40, 8) * scale, 0.3, extras(40, 8, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_rows_and_one_domain(dtype):
    z = torch.randn(5, 16, dtype=torch.float64).repeat(30, 1).to(dtype)  # 30 equal rows each: nothing but ties
    tensors = extras(150, 16, dtype)
    tensors["domain"] = torch.zeros(150, dtype=torch.long)
    for name in ("stage1", "psd domain k3", "supcon"):
        check(CASES[name], z, 0.3, tensors)


def test_equal_neighbours_go_to_the_lower_index_across_tiles():
    n = 300  # three tiles: a row meets its columns in no particular order
    z = torch.zeros(n, 4, dtype=torch.float32)
    z[torch.arange(n), torch.arange(n) % 2] = 1.0  # cosines are exactly 0 and 1
    *_, indices = ltood_fast.psd_loss(z, k=3, instance_ids=torch.arange(n), return_neighbors=True, backend="cpu")
    lowest = [[j for j in range(10) if j % 2 == i % 2 and j != i][:3] for i in range(n)]
    assert indices.tolist() == lowest
    *_, indices = ltood_fast.psd_loss(
        z, k=3, instance_ids=torch.arange(n), bank=z[:290], return_neighbors=True, backend="cpu"
    )
    assert indices.tolist() == [[i % 2, i % 2 + 2, i % 2 + 4] for i in range(n)]


@pytest.mark.parametrize("n", [1, 2, 150])
def test_rows_without_positives_give_zero_loss_and_gradient(n):
    alone, zeros = torch.arange(n), torch.zeros(n).long()
    foreign = {"bank": Bank(torch.randn(n, 6), domain=zeros + 1), "domain": zeros}
    for loss in (
        lambda z: ltood_fast.nt_xent(z, instance_ids=alone, backend="cpu"),
        lambda z: ltood_fast.supcon(z, alone, backend="cpu"),
        lambda z: ltood_fast.psd_loss(z, instance_ids=alone, **foreign, backend="cpu"),
    ):
        z = torch.randn(n, 6, requires_grad=True)
        value = loss(z)
        value.backward()
        assert value == 0
        assert torch.equal(z.grad, torch.zeros_like(z))


def test_a_single_row_has_no_log_sum_exp():
    z = torch.randn(1, 4, requires_grad=True)
    _, lse = ltood_fast.supcon(z, torch.zeros(1).long(), return_lse=True, backend="cpu")
    assert lse.tolist() == [-math.inf]
    lse.backward(torch.ones(1))
    assert torch.equal(z.grad, torch.zeros(1, 4))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(reduction):
    z, tensors = torch.randn(50, 8, dtype=torch.float64), extras(50, 8, torch.float64)
    ids, domain = tensors["instance_ids"], tensors["domain"]
    domain[7] = 9  # alone in its domain: it counts in one part of stage 1 only
    results = []
    for backend in ("cpu", "reference"):
        shared = {"reduction": reduction, "backend": backend}
        results.append(
            (
                ltood_fast.nt_xent(z, instance_ids=ids, **shared),
                ltood_fast.supcon(z, domain, **shared),
                ltood_fast.psd_loss(z, instance_ids=ids, domain=domain, neighbor_weight=0.5, **shared),
                *ltood_fast.stage1_loss(z, domain, alpha=0.7, instance_ids=ids, **shared),
            )
        )
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_zero_rows_take_the_gradient_of_torch(dtype):
    z = torch.randn(140, 8, dtype=torch.float64).to(dtype)
    zero = torch.zeros(140, dtype=torch.bool)
    zero[[3, 70, 139]] = True
    z[zero] = 0
    tensors = extras(140, 8, dtype)
    for case in (CASES["stage1"], CASES["psd bank"]):
        result = run_kernel(case, z, 0.3, tensors)
        expected = true_result(case, z, 0.3, tensors, True, result.indices)
        assert_loss_close(result.losses[0], expected.losses[0], dtype)
        for rows in (zero, ~zero):  # the slope at 0 is 1e12: the norm of all rows together would hide the others
            assert_gradient_close(result.grad_z[rows], expected.grad_z[rows], dtype)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("case", [CASES["psd domain k3"], CASES["stage1"], CASES["psd bank"]])
def test_non_finite_rows_are_never_a_wrong_finite_number(case, bad, normalize):
    z, tensors = torch.randn(140, 8), extras(140, 8, torch.float32)
    z[77, 2] = bad
    tensors["neighbor_weight"] = tensors["neighbor_weight"] + 0.1
    result = run_kernel(case, z, 0.3, tensors, normalize)
    truth = run_kernel(case, z.double(), 0.3, {**tensors, "bank": tensors["bank"].double()}, normalize, "reference")
    assert result.indices.min() >= -1
    assert result.indices.max() < 140
    for actual, expected in zip(result.losses, truth.losses, strict=True):
        assert torch.equal(actual.isfinite(), expected.isfinite())
    assert torch.equal(result.lse.isfinite(), truth.lse.isfinite())
    assert not result.grad_z.isfinite().all()


def test_a_bank_with_nan_shows_in_the_loss():
    z, bank = torch.randn(20, 4), torch.randn(9, 4)
    bank[4] = math.nan
    assert ltood_fast.psd_loss(z, bank=bank, reduction="none", backend="cpu").isnan().all()


def test_non_contiguous_inputs_are_read_right():
    wide = torch.randn(24, 260, dtype=torch.float64)
    z = wide.t()[::2]  # [130, 24], strides (2, 260)
    tensors = {key: value.repeat_interleave(2, dim=0)[::2] for key, value in extras(130, 24, torch.float64).items()}
    for case in (CASES["psd domain k3"], CASES["psd bank"], CASES["stage1"]):
        check(case, z, 0.3, tensors)
        check(case, z, 0.3, tensors, normalize=False)


@pytest.mark.parametrize("name", ["nt_xent ids", "supcon", "psd domain k3", "psd bank", "stage1"])
def test_gradcheck(name):
    case, n, d = CASES[name], 9, 3
    tensors = extras(n, d, torch.float64)
    options = {key: value for key, value in case.items() if key not in ("function", "tensors")}
    options |= arguments_of(case, tensors)
    options.setdefault("instance_ids", tensors["instance_ids"])
    if case["function"] == "supcon":
        del options["instance_ids"]
    function = getattr(ltood_fast, case["function"])

    def loss(z, temperature):
        value, lse, *_ = function(z, temperature=temperature, return_lse=True, backend="cpu", **options)
        return value.total if hasattr(value, "total") else value, lse

    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (torch.randn(n, d, dtype=torch.float64, requires_grad=True), temperature))


def op_arguments(n=20, d=4, dtype=torch.float32):
    tensors = extras(n, d, dtype)
    z = torch.randn(n, d, dtype=dtype, requires_grad=True)
    temperature = torch.tensor(0.3, requires_grad=True)
    ids, domain = tensors["instance_ids"], tensors["domain"]
    batch = {"instance_ids": ids, "labels": domain, "neighbor_weights": tensors["neighbor_weight"], "domain": domain}
    searched = {"bank": tensors["bank"], "bank_ids": tensors["bank_ids"]}
    return {
        "nt_xent": {"z": z, "temperature": 0.3},
        "supcon": {
            "z": z,
            "temperature_tensor": temperature,
            "labels": tensors["labels"],
            "temperature": 0.3,
            "normalize": False,
            "views": False,
        },
        "stage1": {"z": z, "temperature_tensor": temperature, **batch, "k": 2},
        "bank": {"z": z, "instance_ids": ids, **searched, "temperature": 0.3, "k": 2, "neighbor_weight": 0.5},
    }


@pytest.mark.parametrize("name", ["nt_xent", "supcon", "stage1", "bank"])
def test_opcheck(name):
    torch.library.opcheck(torch.ops.ltood_fast.contrastive.default, (), op_arguments()[name])


def test_opcheck_of_the_backward():
    arguments = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in op_arguments()["stage1"].items()}
    _, _, lse, instance_weight, class_weight, cosines, indices = torch.ops.ltood_fast.contrastive(**arguments)
    gradients = (torch.rand(20), torch.rand(20), torch.rand(20, dtype=torch.float64))
    torch.library.opcheck(
        torch.ops.ltood_fast.contrastive_bwd.default,
        (*gradients, lse, instance_weight, class_weight, cosines, indices),
        arguments,
    )


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(compiler):
    if compiler == "aot_eager":
        names = ["nt_xent", "supcon", "psd domain k3", "psd bank", "stage1"]
    else:
        names = ["stage1"]
    tensors = extras(20, 4, torch.float32)
    for name in names:
        case = CASES[name]
        options = arguments_of(case, tensors)
        options.pop("neighbor_weight", None)
        options["temperature"] = torch.tensor(0.3, requires_grad=True)
        function = getattr(ltood_fast, case["function"])

        def loss(z, function=function, options=options):
            value = function(z, **options)
            return value.total if hasattr(value, "total") else value

        z = torch.randn(20, 4, requires_grad=True)
        expected = torch.autograd.grad(loss(z), (z, options["temperature"]))
        actual = torch.autograd.grad(
            torch.compile(loss, fullgraph=True, backend=compiler)(z), (z, options["temperature"])
        )
        torch.testing.assert_close(actual, expected)


def test_exports():
    module = losses.Stage1Loss(k=2, return_neighbors=True)
    arguments = (torch.randn(12, 4), torch.randint(0, 2, (12,)))
    program = torch.export.export(module, arguments)
    assert "ltood_fast.contrastive" in str(program.graph)
    torch.testing.assert_close(program.module()(*arguments), module(*arguments))


def test_inference_mode():
    z = torch.randn(300, 8)
    expected = ltood_fast.nt_xent(z, backend="cpu")
    with torch.inference_mode():
        assert torch.equal(ltood_fast.nt_xent(z.clone(), backend="cpu"), expected)


def test_autocast_changes_nothing_and_gives_float32():
    z, domain = torch.randn(300, 8), torch.randint(0, 2, (300,))
    expected = ltood_fast.stage1_loss(z, domain, backend="cpu").total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ltood_fast.stage1_loss(z, domain, backend="cpu").total, expected)
        assert ltood_fast.nt_xent(torch.mm(z, z.t()), backend="cpu").dtype == torch.float32


@pytest.mark.parametrize("shape", [(40, 300), (300, 64), (1100, 33)])  # 1 tile, 3 tiles, 9 tiles of 123 rows
def test_one_and_two_threads_give_the_same_bits(shape):
    z, tensors = torch.randn(shape), extras(*shape, torch.float32)
    before = torch.get_num_threads()
    try:
        for tau in (0.3, 0.01):
            for name in ("stage1", "psd bank", "psd domain k3"):
                results = []
                for threads in (1, 2, 2):
                    torch.set_num_threads(threads)
                    result = run_kernel(CASES[name], z, tau, tensors)
                    results.append([t for t in (*result.losses, *result[1:]) if t is not None])
                for one, *others in zip(*results, strict=True):
                    assert all(torch.equal(one, other) for other in others)
    finally:
        torch.set_num_threads(before)


def test_double_backward_is_refused():
    z = torch.randn(8, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(ltood_fast.nt_xent(z, backend="cpu"), z, create_graph=True)
    with pytest.raises(RuntimeError, match="^nt_xent: double backward is not supported$"):
        gradient.sum().backward()


def test_gradients_of_parts_that_are_not_used():
    """Only the log-sum-exp, only one part, nothing: the backward gets no gradient for the others."""
    z, domain = torch.randn(30, 4, dtype=torch.float64, requires_grad=True), torch.randint(0, 2, (30,))
    for pick in (lambda r, lse: lse.sum(), lambda r, lse: r.psd, lambda r, lse: r.domain):
        gradients = []
        for backend in ("cpu", "reference"):
            loss = pick(*ltood_fast.stage1_loss(z, domain, return_lse=True, backend=backend))
            gradients.append(torch.autograd.grad(loss, z)[0])
        torch.testing.assert_close(*gradients)


def test_backends():
    z = torch.randn(8, 3)
    assert ltood_fast.build_info()["kernels"]["nt_xent"]["cpu"] == "kernel"
    assert torch.equal(ltood_fast.nt_xent(z), ltood_fast.nt_xent(z, backend="cpu"))
    torch.testing.assert_close(ltood_fast.nt_xent(z), ltood_fast.nt_xent(z, backend="reference"))
    with pytest.raises(ValueError, match="nt_xent: backend='cuda' needs inputs on a cuda device, got cpu"):
        ltood_fast.nt_xent(z, backend="cuda")
    with FakeTensorMode():  # a float64 tensor on a device that is not there
        double = torch.empty(8, 3, dtype=torch.float64, device="cuda")
        assert not use_kernel("nt_xent", "auto", double)
        assert use_kernel("nt_xent", "auto", double.float()) == has_kernel("contrastive", "cuda")
        if has_kernel("contrastive", "cuda"):
            with pytest.raises(TypeError, match="backend='cuda' takes float32, bfloat16 or float16, got float64"):
                use_kernel("nt_xent", "cuda", double)


def test_the_op_checks_what_reaches_it():
    z, call = torch.randn(6, 3), torch.ops.ltood_fast.contrastive
    with pytest.raises(ValueError, match="contrastive: instance_ids must be given when the number of rows is odd"):
        call(z[:5], temperature=0.5)
    with pytest.raises(ValueError, match="contrastive: views must be true when there are no labels, got false"):
        call(z, temperature=0.5, views=False)
    with pytest.raises(ValueError, match=r"contrastive: k must be in \[0, 5\], and 0 without views, got 6"):
        call(z, temperature=0.5, k=6)
    with pytest.raises(TypeError, match="contrastive: labels must be Long, got Int"):
        call(z, labels=torch.zeros(6).int(), temperature=0.5, views=False)
    with pytest.raises(ValueError, match=r"contrastive: labels must be of shape \[6\], got shape \[4\]"):
        call(z, labels=torch.zeros(4).long(), temperature=0.5, views=False)
    saved = call(z, temperature=0.5, k=1)[2:]
    saved[-1][0] = 6
    with pytest.raises(ValueError, match=r"contrastive_bwd: indices must be in \[-1, 6\), got 6"):
        torch.ops.ltood_fast.contrastive_bwd(torch.ones(6), None, None, *saved, z, temperature=0.5, k=1)


MEMORY = """
import resource, torch, ltood_fast
torch.set_num_threads(2)
def step(n):
    z, domain = torch.randn(n, 16, requires_grad=True), torch.arange(n) % 2
    ltood_fast.stage1_loss(z, domain, k=5, backend="cpu").total.backward()
step(2048)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(16384)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_stays_linear():
    """N = 16,384: the N×N matrix takes 1 GiB, the op, its inputs and outputs less than a twentieth of that."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 0.05 * 1024


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(CASES)),
    n=st.integers(8, 300),  # of fewer rows all may be equal: a gradient of 0, and only rounding to compare
    d=st.integers(2, 40),
    tau=st.sampled_from([0.01, 0.07, 0.5, 10.0]),
    normalize=st.booleans(),
    dtype=st.sampled_from(DTYPES[:2]),
    spread=st.integers(0, 3),
)
def test_any_shape(name, n, d, tau, normalize, dtype, spread):
    torch.manual_seed(n * 41 + d)
    case = CASES[name]
    case = {**case, "k": min(case["k"], n - 1)} if "k" in case else case
    z = torch.randn(n, d, dtype=torch.float64)
    if spread:
        z = z[torch.randint(0, n, (n,)) // spread]  # equal rows
    check(case, z.to(dtype), tau, extras(n, d, dtype), normalize)


def by_hand(z, tau, ids, lam, k, domain=None, bank=None):
    """psd_loss with pairing="cross", row by row from its equation; the targets are constants."""
    n, u = len(z), torch.nn.functional.normalize(z, dim=1)
    fixed = u.detach()
    pool = fixed if bank is None else torch.nn.functional.normalize(bank, dim=1)
    rows = []
    for i in range(n):
        views = [j for j in range(n) if j != i and ids[j] == ids[i]]
        if not views:
            rows.append(z.new_zeros(()))
            continue
        after = [j for j in views if j > i]
        other = after[0] if after else views[0]
        allowed = [j for j in range(len(pool)) if bank is not None or ids[j] != ids[other]]
        if domain is not None:
            allowed = [j for j in allowed if domain[j] == domain[other]]
        near = sorted(allowed, key=lambda j: (-float(fixed[other] @ pool[j]), j))[:k]
        lse = torch.stack([u[i] @ u[j] / tau for j in range(n) if j != i]).logsumexp(0)
        pull = sum(u[i] @ u[j] / tau for j in views) + lam[i] * sum(u[i] @ pool[j] / tau for j in near)
        rows.append(lse - pull / (len(views) + lam[i] * len(near)))
    return torch.stack(rows)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", ["two views", "several views", "domains", "bank"])
def test_cross_pairing_is_its_equation(kind, backend):
    """Loss and gradient: z_i is attracted to the neighbours of its other view, which do not move."""
    n, tau = 12, 0.3
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(n, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    lam = torch.rand(n, generator=generator, dtype=torch.float64)
    ids = torch.arange(n) % 6 if kind != "several views" else torch.tensor([0, 0, 0, 1, 2, 1, 3, 3, 3, 3, 4, 5])
    domain = torch.arange(n) % 2 if kind == "domains" else None
    bank = torch.randn(7, 5, generator=generator, dtype=torch.float64) if kind == "bank" else None
    options = {"k": 2, "neighbor_weight": lam, "domain": domain, "bank": bank, "backend": backend}
    if kind == "several views":
        options["instance_ids"] = ids
    found = ltood_fast.psd_loss(z, tau, pairing="cross", reduction="none", **options)
    expected = by_hand(z, tau, ids.tolist(), lam, 2, domain, bank)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    weight = torch.linspace(0.5, 2, n, dtype=torch.float64)
    ours, truth = (torch.autograd.grad((rows * weight).sum(), z)[0] for rows in (found, expected))
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-11)
    same = ltood_fast.psd_loss(z, tau, reduction="none", **options)
    assert (same - found).abs().max() > 1e-3


def test_cross_pairing_keeps_small_losses_positive():
    """Views that all but agree at a low temperature, and neighbours of weight 0: nt_xent."""
    z = torch.randn(32, 16).repeat(2, 1) + 1e-4 * torch.randn(64, 16)
    options = {"neighbor_weight": torch.zeros(64), "reduction": "none"}
    cross, plain = (
        ltood_fast.psd_loss(z, 0.02, pairing="cross", **options),
        ltood_fast.nt_xent(z, 0.02, reduction="none"),
    )
    assert torch.equal(cross, plain)
    near = ltood_fast.psd_loss(z, 0.02, pairing="cross", reduction="none")
    assert float(near.min()) >= 0


def test_an_unknown_pairing_is_refused():
    with pytest.raises(ValueError, match="psd_loss: pairing must be one of same, cross, got 'both'"):
        ltood_fast.psd_loss(torch.randn(4, 2), pairing="both")
    with pytest.raises(ValueError, match="PSDLoss: pairing must be one of same, cross, got 'both'"):
        losses.PSDLoss(pairing="both")
    z, domain = torch.randn(6, 3), torch.tensor([0, 0, 1, 0, 0, 1])
    of_module = losses.Stage1Loss(pairing="cross")(z, domain)
    assert torch.equal(of_module.total, ltood_fast.stage1_loss(z, domain, pairing="cross").total)

"""The cluster_kl kernel against the float64 reference fed the same (rounded) inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ltood_fast
from ltood_fast.ops import cluster_kl as ops
from ltood_fast.reference import clustering as reference
from python_tests.tolerances import GRADIENT, assert_gradient_close, assert_loss_close, relative_error

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1, 1),  # everything is one
    (2, 3, 2),  # fewer rows than clusters
    (17, 3, 3),  # odd, less than a vector
    (127, 17, 129),  # one off a power of two
    (1000, 7, 17),  # several blocks, the last one short
    (1000, 129, 127),  # more clusters than features
    (129, 17, 2048),  # widest rows: blocks of 16
    (3, 1000, 2),  # many clusters, few rows
]


def inputs(n, k, d, dtype=torch.float32, scale=1.0):
    z, mu = (scale * torch.randn(rows, d, dtype=torch.float64) for rows in (n, k))
    return z.to(dtype), mu.to(dtype)


def run(function, z, mu, weight=None, **options):
    """(loss rows, grad z, grad centroids), the rows weighted one by one."""
    z, mu = z.detach().requires_grad_(), mu.detach().requires_grad_()
    rows = function(z, mu, reduction="none", **options)
    rows.backward(torch.ones_like(rows) if weight is None else weight.to(rows.dtype))
    return rows.detach(), z.grad, mu.grad


def run_on(device, z, mu, weight=None, **options):
    """The kernel of the device, which for float64 on CUDA is none; back on the CPU."""
    double = torch.float64 in (z.dtype, mu.dtype) and device.type == "cuda"
    weight = None if weight is None else weight.to(device)
    backend = "auto" if double else device.type
    results = run(ltood_fast.cluster_kl, z.to(device), mu.to(device), weight, backend=backend, **options)
    return [result.cpu() for result in results]


def check(z, mu, dtype, device=CPU, **options):
    weight = torch.rand(len(z)) + 0.5
    got = run_on(device, z, mu, weight, **options)
    expected = run(reference.cluster_kl, z.double(), mu.double(), weight, **options)
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (got[1].dtype, got[2].dtype) == (z.dtype, mu.dtype)
    assert_loss_close(got[0], expected[0], dtype)
    assert_gradient_close(got[1], expected[1], dtype)
    assert_gradient_close(got[2], expected[2], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, dtype, device):
    check(*inputs(*shape, dtype), dtype, device)


@pytest.mark.parametrize("nu", [0.3, 2.0, 50.0, 1000.0])  # logarithm and exponential instead of a reciprocal
@pytest.mark.parametrize("dtype", DTYPES)
def test_degrees_of_freedom(nu, dtype, device):
    check(*inputs(300, 17, 33, dtype, scale=0.5), dtype, device, nu=nu)


@pytest.mark.parametrize("dtype", DTYPES)
def test_normalize(dtype, device):
    check(*inputs(300, 17, 33, dtype, scale=5.0), dtype, device, normalize=True)


def test_zero_rows(device):
    for dtype in (torch.float64, torch.float32):
        z, mu = inputs(50, 5, 7, dtype)
        z[3], mu[1] = 0, 0
        check(z, mu, dtype, device)
        check(z, mu, dtype, device, normalize=True)


def test_mixed_dtypes(device):
    z, mu = inputs(100, 5, 16)
    check(z.bfloat16(), mu, torch.bfloat16, device)
    loss, grad_z, grad_mu = run_on(device, z, mu.double())
    expected = run(reference.cluster_kl, z.double(), mu.double())
    assert_loss_close(loss, expected[0], torch.float64)
    assert_gradient_close(grad_z, expected[1], torch.float32)  # float64 inside, then rounded to the dtype of z
    assert_gradient_close(grad_mu, expected[2], torch.float64)


@pytest.mark.parametrize("cache_rows", [0, 1, 500, 700])  # none, less than a block, some blocks, all but a part of one
def test_kept_and_computed_distances_give_the_same_bits(monkeypatch, cache_rows):
    z, mu = inputs(1000, 40, 70)
    expected = run(ltood_fast.cluster_kl, z, mu)
    monkeypatch.setattr(ops, "CACHE_BYTES", cache_rows * 40 * 4)
    assert ops._run_kernel(z, mu, 1.0, False)[3].shape == (cache_rows, 40)
    for got, want in zip(run(ltood_fast.cluster_kl, z, mu), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions_and_q(reduction, device):
    z, mu = inputs(300, 5, 9)
    options = {"reduction": reduction, "return_q": True, "backend": device.type}
    loss, q = (x.cpu() for x in ltood_fast.cluster_kl(z.to(device), mu.to(device), **options))
    expected, expected_q = reference.cluster_kl(z.double(), mu.double(), reduction=reduction, return_q=True)
    assert loss.shape == ()
    assert_loss_close(loss, expected, torch.float32)
    assert_loss_close(q, expected_q, torch.float32)
    assert not q.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tight_clusters_far_from_the_origin(dtype, device):
    """Distances of 1 between norms of 500, where |x|^2 + |m|^2 - 2 x m would be off by percents, and q is 1 - 1e-5, so
    that p - q would be. Gradients sum w (m - x) as differences of sums: that of a centroid is given norms of 50, and on
    CUDA, where products of weights keep 16 bits of float32 rows, both have 20 times the tolerance."""
    for norm in (50, 500):
        mu = norm * torch.nn.functional.normalize(torch.randn(6, 32))
        z = mu[torch.arange(200) % 6] + 0.2 * torch.randn(200, 32)
        z, mu = z.to(dtype), mu.to(dtype)
        got = run_on(device, z, mu)
        expected = run(reference.cluster_kl, z.double(), mu.double())
        assert_loss_close(got[0], expected[0], dtype)
        slack = 20 if device.type == "cuda" and dtype == torch.float32 else 1
        assert relative_error(got[1], expected[1]) <= slack * GRADIENT[dtype]
        if norm == 50:
            assert relative_error(got[2], expected[2]) <= slack * GRADIENT[dtype]


def test_common_offset_and_large_norms(device):
    z, mu = inputs(300, 5, 16)
    check(z + 300, mu + 300, torch.float32, device)
    check(1e4 * z, 1e4 * mu, torch.float32, device)
    mu[2] = 1e6  # one far centroid: a cluster that no row is near
    check(z, mu, torch.float32, device)
    check(z, mu, torch.float32, device, nu=20.0)  # its mass is 0 in float32


def test_weights_that_underflow_before_they_are_normalised(device):
    """(1 + d/nu)^-h is 1e-48 for every row and centroid; its logarithm, -111, would round by what tells them apart."""
    z, mu = inputs(300, 5, 16, scale=0.7)
    check(z + 20 * torch.eye(16)[0], mu, torch.float32, device, nu=200.0)


def test_duplicates(device):
    """Rows on their centroid, and centroids on each other: distance 0 exactly."""
    _, mu = inputs(1, 4, 8)
    mu[3] = mu[1]
    check(mu[torch.arange(50) % 4], mu, torch.float32, device)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["z", "centroids"])
@pytest.mark.parametrize("nu", [1.0, 3.0])
def test_broken_values_show(broken, where, nu, device):
    """A NaN reaches the mass of every cluster and so every row, as in the reference."""
    z, mu = inputs(40, 3, 5)
    (z if where == "z" else mu)[1, 2] = broken
    assert run(reference.cluster_kl, z, mu, nu=nu)[0].isnan().all()
    for result in run_on(device, z, mu, nu=nu):
        assert result.isnan().all()


def test_layouts():
    z, mu = inputs(40, 6, 10)
    expected = run(ltood_fast.cluster_kl, z, mu)
    strided_z, strided_mu = torch.randn(80, 20)[::2, ::2], torch.randn(10, 6).T
    strided_z.copy_(z)
    strided_mu.copy_(mu)
    for got, want in zip(run(ltood_fast.cluster_kl, strided_z, strided_mu), expected, strict=True):
        assert torch.equal(got, want)


def test_inputs_stay():
    z, mu = inputs(40, 6, 10)
    copies = z.clone(), mu.clone()
    run(ltood_fast.cluster_kl, z, mu)
    assert torch.equal(z, copies[0])
    assert torch.equal(mu, copies[1])


class HeldTarget(torch.autograd.Function):
    """The kernel's gradient beside the value that it is the gradient of: the loss with the target of the start."""

    @staticmethod
    def forward(ctx, z, mu, p, options):
        ctx.save_for_backward(z, mu)
        ctx.options = options
        q = ltood_fast.cluster_kl(z, mu, return_q=True, **options)[1]
        return (p * (p / q).log()).sum(1).mean()

    @staticmethod
    def backward(ctx, grad):
        z, mu = (a.detach().requires_grad_() for a in ctx.saved_tensors)
        with torch.enable_grad():
            loss = ltood_fast.cluster_kl(z, mu, **ctx.options)
        return *(grad * g for g in torch.autograd.grad(loss, (z, mu))), None, None


@pytest.mark.parametrize("options", [{}, {"nu": 2.5}, {"normalize": True}])
def test_gradcheck(options):
    z, mu = (a.requires_grad_() for a in inputs(9, 4, 5, torch.float64))
    q = ltood_fast.cluster_kl(z, mu, return_q=True, **options)[1]
    p = q**2 / q.sum(0)
    p = p / p.sum(1, keepdim=True)
    start = HeldTarget.apply(z, mu, p, options)
    assert torch.allclose(start, ltood_fast.cluster_kl(z, mu, **options), rtol=1e-12)
    assert torch.autograd.gradcheck(lambda z, mu: HeldTarget.apply(z, mu, p, options), (z, mu))


def test_one_gradient_at_a_time():
    z, mu = inputs(40, 6, 10)
    _, grad_z, grad_mu = run(ltood_fast.cluster_kl, z, mu)
    leaf = z.clone().requires_grad_()
    ltood_fast.cluster_kl(leaf, mu, reduction="sum").backward()
    assert torch.equal(leaf.grad, grad_z)
    leaf = mu.clone().requires_grad_()
    ltood_fast.cluster_kl(z, leaf, reduction="sum").backward()
    assert torch.equal(leaf.grad, grad_mu)
    assert not ltood_fast.cluster_kl(z, mu).requires_grad


def test_double_backward_is_refused():
    z, mu = inputs(10, 3, 4)
    z.requires_grad_()
    (grad,) = torch.autograd.grad(ltood_fast.cluster_kl(z, mu), z, create_graph=True)
    with pytest.raises(RuntimeError, match="^cluster_kl: double backward is not supported$"):
        grad.sum().backward()


@pytest.mark.parametrize("shape", [(3000, 20, 30), (40, 3, 5), (400, 300, 2048)])  # many workers, one, few
def test_threads_give_the_same_bits(shape):
    z, mu = inputs(*shape)
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(run(ltood_fast.cluster_kl, z, mu))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    z, mu = (a.requires_grad_() for a in inputs(20, 3, 5, dtype))
    more = {"cached_rows": 7, "return_q": True, "return_assignments": True}
    for options in (more, {"nu": 2.0}):
        torch.library.opcheck(torch.ops.ltood_fast.cluster_kl.default, (z, mu), options)
    _, mass, stats, distances, _, _ = torch.ops.ltood_fast.cluster_kl(z.detach(), mu.detach(), cached_rows=7)
    arguments = (torch.rand(20, dtype=mass.dtype), mass, stats, distances, z.detach(), mu.detach())
    for need_z, need_centroids in ((True, True), (True, False), (False, True)):
        needs = {"need_z": need_z, "need_centroids": need_centroids}
        torch.library.opcheck(torch.ops.ltood_fast.cluster_kl_bwd.default, arguments, needs)


def test_compile_fullgraph():
    def loss(z, mu):
        return ltood_fast.cluster_kl(z, mu, nu=1.0, normalize=True)

    z, mu = (a.requires_grad_() for a in inputs(50, 4, 8))
    expected = torch.autograd.grad(loss(z, mu), (z, mu))
    compiled = torch.compile(loss, fullgraph=True)
    for got, want in zip(torch.autograd.grad(compiled(z, mu), (z, mu)), expected, strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-7)


def test_compile_with_other_sizes():
    compiled = torch.compile(lambda z, mu: ltood_fast.cluster_kl(z, mu), fullgraph=True, dynamic=True)
    for n in (50, 61, 300):
        z, mu = inputs(n, 4, 8)
        assert torch.allclose(compiled(z, mu), ltood_fast.cluster_kl(z, mu), rtol=1e-6)


def test_export():
    z, mu = inputs(50, 4, 8)
    program = torch.export.export(ltood_fast.nn.ClusterKL(mu, return_q=True), (z,))
    for got, want in zip(program.module()(z), ltood_fast.cluster_kl(z, mu, return_q=True), strict=True):
        assert torch.equal(got, want)


def test_autocast():
    z, mu = inputs(50, 4, 8)
    for normalize in (False, True):
        expected = ltood_fast.cluster_kl(z, mu, normalize=normalize)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(ltood_fast.cluster_kl(z, mu, normalize=normalize), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [{}, {"nu": 3.0, "normalize": True}])
def test_refine_centroids(dtype, options, device):
    z, mu = inputs(500, 5, 6, dtype)
    on_device, options = (z.to(device), mu.to(device)), {"steps": 20, "lr": 1.0, **options}
    got, assignments = (x.cpu() for x in ltood_fast.refine_centroids(*on_device, tol=0.0, **options))
    expected, expected_assignments = reference.refine_centroids(z.double(), mu.double(), tol=0.0, **options)
    assert_gradient_close(got, expected, dtype)
    assert (assignments != expected_assignments).sum() <= (0 if dtype == torch.float64 else 2)
    stopped, _ = ltood_fast.refine_centroids(*on_device, tol=1.0, **options)
    assert not torch.equal(stopped.cpu(), got)


def test_assignments_of_ties_and_broken_rows(device):
    z = torch.tensor([[0.0], [2.0], [torch.nan], [9.0]])
    mu = torch.tensor([[1.0], [-1.0], [3.0], [1.0]])
    outputs = ops._run_kernel(z.to(device), mu.to(device), 1.0, False, return_assignments=True)
    assert outputs[5].tolist() == [0, 0, 0, 2]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 200),
    k=st.integers(1, 40),
    d=st.integers(1, 70),
    nu=st.sampled_from([1.0, 0.7, 12.0]),
    cached=st.integers(0, 200),
    seed=st.integers(0, 2**31),
)
def test_fuzz(n, k, d, nu, cached, seed):
    torch.manual_seed(seed)
    z, mu = inputs(n, k, d, torch.float64)
    rows, mass, stats, distances, q, _ = torch.ops.ltood_fast.cluster_kl(
        z, mu, nu=nu, cached_rows=min(n, cached), return_q=True
    )
    grads = torch.ops.ltood_fast.cluster_kl_bwd(torch.ones_like(rows), mass, stats, distances, z, mu, nu=nu)
    expected = run(reference.cluster_kl, z, mu, nu=nu)
    expected_q = reference.cluster_kl(z, mu, nu=nu, return_q=True)[1]
    assert torch.allclose(q, expected_q, rtol=1e-9, atol=1e-300)
    assert torch.allclose(mass, expected_q.sum(0), rtol=1e-9)
    for got, want in zip((rows, *grads), expected, strict=True):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)


def test_operator_refuses_what_would_read_out_of_bounds():
    z, mu = inputs(10, 3, 4)
    op, bwd = torch.ops.ltood_fast.cluster_kl, torch.ops.ltood_fast.cluster_kl_bwd
    with pytest.raises(ValueError, match="^cluster_kl: centroids must be a non-empty matrix as wide as z, got shape"):
        op(z, mu[:, :3])
    with pytest.raises(ValueError, match=r"^cluster_kl: cached_rows must be in \[0, N\], got 11"):
        op(z, mu, cached_rows=11)
    with pytest.raises(ValueError, match="^cluster_kl: nu must be positive and finite, got 0"):
        op(z, mu, nu=0.0)
    with pytest.raises(TypeError, match="^cluster_kl: z must be a float tensor, got Int"):
        op(z.int(), mu)
    rows, mass, stats, distances, _, _ = op(z, mu, cached_rows=5)
    with pytest.raises(ValueError, match=r"^cluster_kl_bwd: grad_loss must be of shape \[N\], got \[9\]"):
        bwd(rows[:9], mass, stats, distances, z, mu)
    with pytest.raises(ValueError, match=r"^cluster_kl_bwd: stats must be of shape \[3, N\], got \[2, 10\]"):
        bwd(rows, mass, stats[:2], distances, z, mu)
    with pytest.raises(ValueError, match=r"^cluster_kl_bwd: distances must be of shape \[cached rows, K\]"):
        bwd(rows, mass, stats, distances[:, :2], z, mu)

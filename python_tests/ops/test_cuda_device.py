"""What only a device can show: streams, graphs, large batches, memory, equal bits. Skipped without one."""

import pytest
import torch
import torch.nn.functional as F

import ltood_fast
from ltood_fast._ext import has_kernel
from ltood_fast.ops._contrastive_partial import contrastive_partial, contrastive_partial_bwd
from python_tests.tolerances import assert_gradient_close, assert_loss_close

pytestmark = pytest.mark.cuda


def ops(n: int, d: int, dtype: torch.dtype) -> dict:
    """One call of every family, all inputs on the device."""
    z = torch.randn(n, d, device="cuda").to(dtype)
    guide = (z.float() + 0.5 * torch.randn(n, d, device="cuda")).to(dtype)
    domain = torch.arange(n, device="cuda") % (n // 2) % 2
    clusters = torch.randint(0, 5, (n // 2,), device="cuda").repeat(2)
    centroids = torch.randn(5, d, device="cuda")
    far = ltood_fast.farthest_cluster(centroids)
    return {
        "nt_xent": lambda: grad(lambda x: ltood_fast.nt_xent(x, 0.2), z),
        "stage1_loss": lambda: grad(lambda x: ltood_fast.stage1_loss(x, domain, 0.2, k=1).total, z),
        "psd_loss k=3": lambda: grad(lambda x: ltood_fast.psd_loss(x, 0.2, k=3), z),
        "stage2_loss": lambda: grad(lambda x: ltood_fast.stage2_loss(x, guide, clusters, far, 0.2).total, z),
        "cluster_kl": lambda: grad(lambda x: ltood_fast.cluster_kl(x, centroids.to(dtype)), z),
        "knn": lambda: ltood_fast.knn(z, 5),
        "contrastive_partial": lambda: partial(z[: n // 2], z, n // 4),
        "guided_partial": lambda: guided_partial(z, guide, clusters, far),
    }


def grad(loss, z):
    z = z.detach().requires_grad_()
    value = loss(z)
    return value.detach(), *torch.autograd.grad(value, z)


def partial(x, y, diagonal):
    """Both partial ops: all that they return."""
    shared = {"normalize": True, "diagonal": diagonal}
    found = contrastive_partial(x, y, 0.2, k=3, **shared)
    of_columns = torch.linspace(4, 5, len(y), dtype=torch.float64, device="cuda")
    weights = {"of_rows": (found.lse, found.lse), "of_columns": (of_columns, of_columns)}
    return *found, contrastive_partial_bwd(x, y, 0.2, **weights, **shared)


def guided_partial(z, guide, clusters, far):
    """Half of the rows against all: what both partial ops of stage 2 return."""
    n, ids = len(z) // 2, torch.arange(len(z), device="cuda") % (len(z) // 2)
    partial = {
        "x_guide": guide[:n], "y_guide": guide, "x": z[:n], "y": z, "x_instance": ids[:n], "y_instance": ids,
        "x_clusters": clusters[:n], "y_clusters": clusters, "far": far, "temperature": 0.2,
    }  # fmt: skip
    found = torch.ops.ltood_fast.guided_partial(**partial, x_every=ids[:n] % 9 == 0, k=3, distill=True)
    state = 4 + (ids[:, None] % torch.arange(2, 6, device="cuda")).double() / 9
    states = {"x_contrast": state[:n], "y_contrast": state, "x_distill": state[:n], "y_distill": state}
    return *found, torch.ops.ltood_fast.guided_partial_bwd(**partial, **states)


NAMES = ["nt_xent", "stage1_loss", "psd_loss k=3", "stage2_loss", "cluster_kl", "knn", "contrastive_partial",
         "guided_partial"]  # fmt: skip


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_again(name, dtype):
    call = ops(300, 96, dtype)[name]
    assert equal(call(), call())


@pytest.mark.parametrize("name", NAMES)
def test_the_current_stream_is_used(name):
    """Inputs are written on a side stream behind a long wait: a kernel on another stream would read what was before."""
    torch.manual_seed(1)
    expected = ops(600, 64, torch.bfloat16)[name]()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        torch.manual_seed(1)
        result = ops(600, 64, torch.bfloat16)[name]()
    side.synchronize()
    assert equal(result, expected)


@pytest.mark.parametrize("name", NAMES)
def test_graph_capture(name):
    call = ops(512, 64, torch.bfloat16)[name]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # it made the inputs
    with torch.cuda.stream(side):
        expected = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    for x in result:
        x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert equal(result, expected)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_device(name):
    call = ops(512, 64, torch.bfloat16)[name]
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def chunked_nt_xent(z: torch.Tensor, tau: float, chunk: int = 2048) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient in float64 without the N×N matrix: G = P + P' by rows, columns a chunk at a time."""
    n = z.shape[0]
    z = z.double().requires_grad_()
    u = F.normalize(z, dim=1)
    fixed = u.detach()
    other = torch.arange(n, device=z.device).roll(n // 2)
    lse = fixed.new_empty(n)
    for start in range(0, n, chunk):
        s = fixed[start : start + chunk] @ fixed.T / tau
        s[torch.arange(s.shape[0]), torch.arange(s.shape[0]) + start] = -torch.inf
        lse[start : start + chunk] = s.logsumexp(1)
    gradient = torch.empty_like(fixed)
    for start in range(0, n, chunk):
        s = fixed[start : start + chunk] @ fixed.T / tau
        s[torch.arange(s.shape[0]), torch.arange(s.shape[0]) + start] = -torch.inf
        weights = (s - lse[start : start + chunk, None]).exp() + (s - lse).exp()
        gradient[start : start + chunk] = (weights @ fixed - 2 * fixed[other[start : start + chunk]]) / (tau * n)
    loss = (lse - (fixed * fixed[other]).sum(1) / tau).mean()
    u.backward(gradient)
    return loss, z.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [16_384, 65_538, 262_144])
def test_large_batches(n, dtype):
    z = torch.randn(n, 128, device="cuda").to(dtype)
    loss, gradient = grad(lambda x: ltood_fast.nt_xent(x, 0.2), z)
    expected, expected_gradient = chunked_nt_xent(z, 0.2)
    assert_loss_close(loss, expected, dtype)
    assert_gradient_close(gradient, expected_gradient, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shards", [2, 64])
def test_shards_of_a_large_batch(shards, dtype):
    """The last of many ranks, all columns and one shard at a time: the rows of the square op."""
    n = 65_536
    rows = n // shards
    z = torch.randn(n, 128, device="cuda").to(dtype)
    lse, grad_unit = (x.detach() for x in lse_and_its_gradient(z))
    start, weight = n - rows, torch.ones(n, dtype=torch.float64, device="cuda")
    x = z[start:]
    whole = contrastive_partial(x, z, 0.2, normalize=False, diagonal=start).lse
    assert_loss_close(whole, lse[start:], dtype)
    passed = sum(
        contrastive_partial_bwd(
            x, z[at : at + rows], 0.2, normalize=False, diagonal=start - at, of_rows=(whole, weight[:rows]),
            of_columns=(lse[at : at + rows].double(), weight[:rows]),
        )
        for at in range(0, n, rows)
    )  # fmt: skip
    assert_gradient_close(passed, grad_unit[start:], dtype)


def lse_and_its_gradient(z):
    """Log-sum-exps of the square op for rows as they are, made unit rows here, and the gradient of their sum."""
    z.copy_(F.normalize(z.float(), dim=1))
    leaf = z.detach().requires_grad_()
    _, lse = ltood_fast.nt_xent(leaf, 0.2, normalize=False, return_lse=True)
    return lse, *torch.autograd.grad(lse.sum(), leaf)


def test_memory_at_262144_rows():
    z = torch.randn(262_144, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ltood_fast.nt_xent(z, 0.2).backward()
    assert torch.cuda.max_memory_allocated() - before < 2e9


def test_a_million_rows():
    z = torch.randn(1_048_576, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    loss = ltood_fast.nt_xent(z, 0.2)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(z.grad).all()


def test_matmul_precision_medium():
    z = torch.randn(2048, 128, device="cuda")
    expected = grad(lambda x: ltood_fast.nt_xent(x, 0.2, backend="reference"), z.double())
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        loss, gradient = grad(lambda x: ltood_fast.nt_xent(x, 0.2), z)
    finally:
        torch.set_float32_matmul_precision(kept)
    assert_loss_close(loss, expected[0], torch.bfloat16)
    assert_gradient_close(gradient, expected[1], torch.bfloat16)


@pytest.mark.parametrize("name", ["nt_xent", "stage1_loss"])
def test_the_dispatcher_accepts_the_op(name):
    z = torch.randn(64, 16, device="cuda", requires_grad=True)
    domain = torch.arange(64, device="cuda") % 2
    searched = {"labels": domain, "domain": domain, "k": 1} if name == "stage1_loss" else {}
    torch.library.opcheck(torch.ops.ltood_fast.contrastive, (z,), {"temperature": 0.2, **searched})


def test_the_dispatcher_accepts_the_partial_ops():
    x, y = torch.randn(40, 16, device="cuda"), torch.randn(70, 16, device="cuda")
    ids, lse = torch.arange(70, device="cuda"), torch.rand(70, device="cuda").double()
    found = {"x_instance": ids[:40], "y_instance": ids, "temperature": 0.2, "diagonal": 10, "k": 2}
    torch.library.opcheck(torch.ops.ltood_fast.contrastive_partial, (x, y), found)
    learned = {"temperature_tensor": torch.tensor(0.3, device="cuda"), "normalize": False, "diagonal": 10}
    torch.library.opcheck(torch.ops.ltood_fast.contrastive_partial_bwd, (x, y, lse[:40], lse[:40], lse, lse), learned)


def test_stage2_over_a_group(tmp_path):
    """A rank alone with itself: by the partial kernels, what the square ones give; labels out of range as there."""
    assert has_kernel("guided_partial", "cuda")
    z = torch.randn(300, 32, device="cuda")
    guide, clusters = z + torch.randn(300, 32, device="cuda"), torch.arange(300, device="cuda") % 5
    clusters[::9], far = -1, torch.tensor([1, 2, 7, 4, 0], device="cuda")
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        options = {"group": torch.distributed.group.WORLD}
        results = [
            grad(lambda x, more=more: ltood_fast.stage2_loss(x, guide, clusters, far, 0.2, **more).total, z)
            for more in ({}, options)
        ]
    finally:
        torch.distributed.destroy_process_group()
    assert_loss_close(results[1][0], results[0][0], torch.float32)
    assert_gradient_close(results[1][1], results[0][1], torch.float32)


def test_compile():
    z = torch.randn(256, 64, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(lambda x: ltood_fast.nt_xent(x, 0.2), fullgraph=True)
    loss, gradient = grad(compiled, z)
    expected, expected_gradient = grad(lambda x: ltood_fast.nt_xent(x, 0.2), z)
    assert torch.equal(loss, expected)
    assert torch.equal(gradient, expected_gradient)


def test_float64_goes_to_the_reference():
    z = torch.randn(16, 4, device="cuda", dtype=torch.float64)
    assert torch.equal(ltood_fast.nt_xent(z), ltood_fast.nt_xent(z, backend="reference"))
    with pytest.raises(TypeError, match="nt_xent: backend='cuda' takes float32, bfloat16 or float16, got float64"):
        ltood_fast.nt_xent(z, backend="cuda")

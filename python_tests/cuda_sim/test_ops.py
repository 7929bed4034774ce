"""The public functions on their CUDA operators, executed without a GPU: torch glue, launchers and kernels together."""

import pytest
import torch
import torch.distributed as dist

import ltood_fast
from python_tests.ops.contrastive_cases import CASES, extras
from python_tests.ops.test_cluster_kl import check as check_cluster_kl
from python_tests.ops.test_contrastive import check
from python_tests.ops.test_contrastive_partial import check as check_partial
from python_tests.ops.test_contrastive_partial import rules_of
from python_tests.tolerances import assert_gradient_close, assert_loss_close

SIXTEEN_BITS = [(CASES[name], dtype) for name in ("psd bank", "stage1") for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("case", "dtype"), [*((case, torch.float32) for case in CASES.values()), *SIXTEEN_BITS])
def test_contrastive(served, case, dtype):
    """A learned temperature, gradients of every output; odd N, so that instance ids are given."""
    n, d = (131, 24) if dtype == torch.float32 else (66, 70)
    check(case, torch.randn(n, d, dtype=torch.float64).to(dtype), 0.3, extras(n, d, dtype))


@pytest.mark.parametrize(
    ("dtype", "normalize", "temperature"),
    [
        (torch.float32, True, 0.3),
        (torch.float32, False, torch.tensor(0.5)),
        (torch.bfloat16, True, torch.tensor(0.3, dtype=torch.float64)),
        (torch.float16, True, 0.3),
        (torch.float16, False, 0.5),
    ],
)
def test_contrastive_partial(served, dtype, normalize, temperature):
    """Both ops, all four rules of the search, with and without weights of the columns."""
    x, y = (torch.randn(rows, 20, dtype=torch.float64) for rows in (70, 90))
    if not normalize:
        x, y = x / 20**0.5, y / 20**0.5
    rules, device = rules_of(70, 90), torch.device("cpu")
    check_partial(device, x.to(dtype), y.to(dtype), temperature, normalize, 15, k=3, rules=rules, on_cuda=True)


def test_a_fixed_temperature_and_the_default_views(served):
    z = torch.randn(134, 40, requires_grad=True)
    domain = torch.arange(67).repeat(2) % 2
    expected = ltood_fast.stage1_loss(z.double(), domain, 0.2, k=1, backend="reference").total
    actual = ltood_fast.stage1_loss(z, domain, 0.2, k=1).total
    assert_loss_close(actual, expected, torch.float32)
    gradients = (torch.autograd.grad(loss, z)[0] for loss in (actual, expected))
    assert_gradient_close(*gradients, torch.float32)


def test_the_hopper_path(served, monkeypatch):
    """The same functions, their kernels chosen by the environment: the backward of a partial problem too."""
    monkeypatch.setenv("LTOOD_CUDA_PATH", "sm90")
    test_a_fixed_temperature_and_the_default_views(served)
    x, y = torch.randn(70, 20), torch.randn(150, 20)
    rules, device = rules_of(70, 150), torch.device("cpu")
    check_partial(device, x, y, 0.3, True, 15, k=3, rules=rules, on_cuda=True)
    test_stage2(served, torch.float16, torch.float16)
    for kernel in ("tiles_sm90", "lse_bwd_sm90", "topk_sm90", "forward_sm90", "backward_sm90"):
        assert any(kernel in name for name in served.launches), kernel


def test_two_types_of_rows(served):
    """A bank of another type: both are searched in float32, the gradient comes back in the rows' own."""
    z, bank = torch.randn(40, 16).bfloat16().requires_grad_(), torch.randn(9, 16)
    expected = ltood_fast.psd_loss(z.double(), 0.2, k=2, bank=bank.double(), backend="reference")
    actual = ltood_fast.psd_loss(z, 0.2, k=2, bank=bank)
    assert_loss_close(actual, expected, torch.bfloat16)
    gradients = [torch.autograd.grad(loss, z)[0] for loss in (actual, expected)]
    assert gradients[0].dtype == torch.bfloat16
    assert_gradient_close(*gradients, torch.bfloat16)


@pytest.mark.parametrize("searched", [None, 50])
def test_knn(served, searched):
    x, y = torch.randn(70, 20), None if searched is None else torch.randn(searched, 20).half()
    cosines, indices = ltood_fast.knn(x, 4, y=y)
    expected, truth = ltood_fast.knn(x.double(), 4, y=None if y is None else y.double(), backend="reference")
    assert torch.equal(indices, truth)
    assert_loss_close(cosines, expected, torch.float32)


CLUSTER_TYPES = [
    (torch.float32, torch.float32, {}),
    (torch.float32, torch.float32, {"nu": 3.0, "normalize": True}),
    (torch.float16, torch.float16, {}),
    (torch.bfloat16, torch.bfloat16, {}),
    (torch.bfloat16, torch.float32, {}),
]


@pytest.mark.parametrize(("dtype", "centroid_dtype", "options"), CLUSTER_TYPES)
def test_cluster_kl(served, dtype, centroid_dtype, options):
    """Loss and both gradients; an offset that both share costs float32 nothing."""
    offset = 100 if dtype == centroid_dtype == torch.float32 and not options else 0
    z, centroids = torch.randn(140, 20) + offset, torch.randn(6, 20) + offset
    check_cluster_kl(z.to(dtype), centroids.to(centroid_dtype), dtype, **options)


def test_refine_centroids(served):
    z, centroids = torch.randn(70, 5), torch.randn(4, 5)
    options = {"steps": 2, "lr": 1.0, "tol": 0.0}
    got = ltood_fast.refine_centroids(z, centroids, **options)
    expected = ltood_fast.refine_centroids(z.double(), centroids.double(), backend="reference", **options)
    assert_gradient_close(got[0], expected[0], torch.float32)
    assert torch.equal(got[1], expected[1])


def guide_problem(n: int, d: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(z, guide, clusters, far): float64, three clusters, the fourth empty and the farthest of one."""
    clusters = torch.arange(n) % 3
    guide = torch.randn(n, width, dtype=torch.float64) + 2 * torch.randn(3, width, dtype=torch.float64)[clusters]
    return torch.randn(n, d, dtype=torch.float64), guide, clusters, torch.tensor([1, 3, 0, 0])


TYPES = [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, torch.float16)]


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_stage2_over_a_group(served, one_rank):
    """By rows against all ranks' columns, though all are this rank's here: the partial kernels, no others."""
    check_stage2(torch.float32, torch.float16, group=one_rank)
    for kernel in ("guided_partial_epilogue", "guided_partial_bwd_epilogue", "topk"):
        assert any(kernel in name for name in served.launches), kernel
    assert not any("guided_select" in name for name in served.launches)


@pytest.mark.parametrize(("dtype", "guide_dtype"), [*TYPES, (torch.float16, torch.float32)])
def test_stage2(served, dtype, guide_dtype):
    check_stage2(dtype, guide_dtype)


def check_stage2(dtype, guide_dtype, **options):
    """The guide's own neighbours, both parts, a learned temperature; types that are multiplied in another."""
    z, guide, clusters, far = guide_problem(68, 20, 70)
    z, guide = z.to(dtype), guide.to(guide_dtype)
    tau = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(68) % 30 if dtype == torch.float32 else None
    results = []
    for wide in (False, True):
        rows = (z.double() if wide else z).detach().requires_grad_()
        losses, lse = ltood_fast.stage2_loss(
            rows, guide.double() if wide else guide, clusters, far, tau, k=3, instance_ids=ids,
            reduction="none", return_lse=True, backend="reference" if wide else "auto", **({} if wide else options),
        )  # fmt: skip
        total = (losses.total * torch.linspace(0.5, 1.5, 68)).sum() + lse.sum()
        results.append((losses.guided, losses.distill, *torch.autograd.grad(total, (rows, tau))))
    (guided, distill, grad_z, grad_tau), expected = results
    assert_loss_close(guided, expected[0], dtype)
    assert_loss_close(distill, expected[1], dtype)
    assert grad_z.dtype == dtype
    assert_gradient_close(grad_z, expected[2], dtype)
    assert_gradient_close(grad_tau, expected[3], dtype)


def test_relational_distill(served):
    z, guide, *_ = guide_problem(67, 20, 12)
    z = z.float().requires_grad_()
    kernel, exact = (
        ltood_fast.relational_distill(x, g, 0.3, teacher_temperature=0.2, normalize=False, backend=backend)
        for x, g, backend in ((z, guide, "auto"), (z.double(), guide, "reference"))
    )
    assert_loss_close(kernel, exact, torch.float32)
    assert_gradient_close(*(torch.autograd.grad(loss, z)[0] for loss in (kernel, exact)), torch.float32)


def test_guided_contrastive(served):
    """Alone and in bfloat16: the tiles of the negatives only."""
    z, guide, clusters, far = guide_problem(70, 20, 12)
    z, guide = z.bfloat16(), guide.bfloat16()
    results = []
    for rows, other, backend in ((z, guide, "auto"), (z.double(), guide.double(), "reference")):
        rows = rows.detach().requires_grad_()
        loss = ltood_fast.guided_contrastive(rows, other, clusters, far, 0.25, k=2, backend=backend)
        results.append((loss, torch.autograd.grad(loss, rows)[0]))
    assert_loss_close(results[0][0], results[1][0], torch.bfloat16)
    assert_gradient_close(results[0][1], results[1][1], torch.bfloat16)

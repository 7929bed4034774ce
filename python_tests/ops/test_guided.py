"""The kernels of stage 2 against the float64 reference, and its manners under PyTorch's machinery."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ltood_fast as lt
from ltood_fast.nn import Stage2Loss
from python_tests.tolerances import assert_gradient_close, assert_loss_close

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # (N, D, Dg)
    (2, 1, 1),  # a lone pair; every cosine is 1 or -1
    (3, 2, 3),  # an odd row out, widths below any vector
    (17, 3, 17),  # one more than a vector of 16
    (127, 17, 2),  # one less than a tile of rows
    (129, 127, 129),  # one more than a tile of rows
    (514, 129, 64),  # two more than a tile of columns
    (1000, 128, 32),  # several tiles each way, none whole
    (64, 2048, 1000),  # the widest rows
]


def problem(n, d=16, dg=8, k=4, dtype=torch.float64):
    """Rows in clusters of uneven size, in pairs where n is even and alone or in threes where it is odd."""
    z, guide = torch.randn(n, d).to(dtype), torch.randn(n, dg).to(dtype)
    clusters = (torch.rand(n) ** 2 * k).long()
    ids = {} if n % 2 == 0 else {"instance_ids": torch.arange(n) % max(n // 3, 1)}
    return z, guide, clusters, (torch.arange(k) + 1) % k, ids


def outcome(function, z, *arguments, backend, temperature=0.2, **options):
    """(losses and extras, grad z, grad temperature) with a different weight on every output; back on the CPU."""
    device = "cuda" if backend == "cuda" else "cpu"
    arguments = [x.to(device) for x in arguments]
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    z = z.detach().clone().to(device).requires_grad_()
    wide = z.dtype if z.dtype == torch.float64 else torch.float32
    tau = torch.tensor(temperature, dtype=wide, device=device, requires_grad=True)
    losses, lse = function(z, *arguments, tau, backend=backend, reduction="none", return_lse=True, **options)
    losses = [losses] if isinstance(losses, torch.Tensor) else list(losses[1:])
    shown = [*losses, lse]
    weight = torch.linspace(1, 2, len(z), device=device)
    total = sum((x.where(x.isfinite(), 0) * weight / (n + 1)).sum() for n, x in enumerate(shown))
    gradients = torch.autograd.grad(total, (z, tau))
    return [x.cpu() for x in shown], *(x.cpu() for x in gradients)


def assert_like_reference(function, z, guide, *rest, device=CPU, **options):
    """The kernel's losses, lse and gradients are those of the reference fed the same values in float64."""
    if device.type == "cuda" and z.dtype == torch.float64:
        pytest.skip("there is no float64 kernel for CUDA")
    dtype = z.dtype
    actual = outcome(function, z, guide, *rest, backend=device.type, **options)
    expected = outcome(function, z.double(), guide.double(), *rest, backend="reference", **options)
    for x, y in zip(actual[0], expected[0], strict=True):
        assert x.dtype == (torch.float64 if z.dtype == torch.float64 else torch.float32)
        assert x.isneginf().equal(y.isneginf())
        assert_loss_close(x.nan_to_num(neginf=0), y.nan_to_num(neginf=0), dtype)
    assert actual[1].dtype == z.dtype
    assert_gradient_close(actual[1], expected[1], dtype)
    if function is not lt.relational_distill:  # there the sum of all terms may cancel: see its own test
        assert_gradient_close(actual[2], expected[2], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_losses_and_gradients(device, shape, dtype):
    z, guide, clusters, far, ids = problem(*shape, dtype=dtype)
    k = min(5, shape[0] - 1)
    assert_like_reference(lt.stage2_loss, z, guide, clusters, far, device=device, k=k, **ids)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_function_alone(device, dtype):
    z, guide, clusters, far, _ = problem(200, dtype=dtype)
    assert_like_reference(lt.guided_contrastive, z, guide, clusters, far, device=device)
    assert_like_reference(lt.relational_distill, z, guide, device=device)
    assert_like_reference(lt.relational_distill, z, guide, device=device, teacher_temperature=0.05)


OPTIONS = {
    "unweighted": {"weighted": False},
    "gamma": {"gamma": 2.5},
    "gamma=0": {"gamma": 0.0},
    "as they are": {"normalize": False, "temperature": 2.0},
    "pos_idx": {"pos_idx": torch.randint(-1, 150, (150, 6), generator=torch.Generator().manual_seed(3))},
    "pos_idx of the view, itself, twice": {
        "pos_idx": torch.stack([torch.arange(150), (torch.arange(150) + 75) % 150, torch.arange(150).flip(0)] * 2, 1)
    },
    "no neighbours": {"pos_idx": torch.full((150, 1), -1)},
    "no positives but one": {
        "pos_idx": torch.tensor([[9]] + [[-1]] * 149),
        "instance_ids": torch.arange(150),
    },
    "multi-crop": {"instance_ids": torch.arange(150) // 7},
    "one image": {"instance_ids": torch.zeros(150).long()},
    "all neighbours": {"k": 149},
    "own teacher temperature": {"distill": lt.Distill(teacher_temperature=0.07)},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(device, options, dtype):
    z, guide, clusters, far, _ = problem(150, dtype=dtype)
    assert_like_reference(lt.stage2_loss, z, guide, clusters, far, device=device, **options)


@pytest.mark.parametrize("temperature", [0.01, 0.05, 1.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_temperatures(device, temperature, dtype):
    z, guide, clusters, far, _ = problem(150, dtype=dtype)
    assert_like_reference(lt.stage2_loss, z, guide, clusters, far, device=device, temperature=temperature)


CLUSTERINGS = {  # clusters of N = 600 rows, far
    "one cluster": (torch.zeros(600).long(), torch.tensor([0])),
    "all rows in one of three": (torch.ones(600).long(), torch.tensor([1, 2, 0])),  # nobody has a negative there
    "far is itself": (torch.arange(600) % 3, torch.tensor([0, 1, 2])),
    "empty clusters": (torch.arange(600) % 3 * 2, torch.tensor([2, 0, 4, 1, 3, 0])),  # cluster 4 falls back
    "all repel one": (torch.arange(600) % 5, torch.tensor([4, 4, 4, 4, 0])),
    "a negative each": (torch.arange(600), torch.arange(1, 601) % 600),  # K = N: spans of one column
    "K > N": (torch.randint(5000, (600,)), torch.randint(5000, (5000,))),
    "a few fall back": (torch.tensor([0] * 590 + [1] * 6 + [2] * 4), torch.tensor([2, 0, 1])),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("clustering", CLUSTERINGS.values(), ids=CLUSTERINGS.keys())
def test_clusterings(device, clustering, dtype):
    z, guide, _, _, _ = problem(600, dtype=dtype)
    pos_idx = torch.randint(-1, 600, (600, 3))
    pos_idx[:590:3, 0] = 596 + torch.arange(197) % 4  # positives inside the small far cluster of the last clustering
    assert_like_reference(lt.guided_contrastive, z, guide, *clustering, device=device, k=3)
    assert_like_reference(lt.stage2_loss, z, guide, *clustering, device=device, pos_idx=pos_idx)


def test_rows_whose_negatives_are_all_positives_fall_back():
    z, guide, _, _, _ = problem(300, dtype=torch.float64)
    clusters, far = torch.zeros(300).long(), torch.tensor([1, 0])
    clusters[[40, 200]] = 1  # the far cluster of 298 rows has two rows ...
    pos_idx = torch.randint(300, (300, 4))
    pos_idx[::5, :2] = torch.tensor([40, 200])  # ... which are positives of every fifth row
    rows = lt.guided_contrastive(z, guide, clusters, far, pos_idx=pos_idx, reduction="none", return_lse=True)[1]
    assert rows[5] > rows[6] + 1  # 298 negatives instead of two
    assert_like_reference(lt.guided_contrastive, z, guide, clusters, far, pos_idx=pos_idx)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dg", [1, 5, 64])
def test_ties_of_the_guide_go_to_the_lower_row(dg, dtype):
    z, guide, clusters, far, _ = problem(1200, dg=dg, dtype=dtype)
    guide = guide[torch.randint(30, (1200,))]  # 40 copies of each row, over all tiles
    assert_like_reference(lt.guided_contrastive, z, guide, clusters, far, k=7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_zero_and_equal_rows(dtype):
    z, guide, clusters, far, _ = problem(140, dtype=dtype)
    z[3], guide[5] = 0, 0
    z[20:40], guide[30:60] = z[20].clone(), guide[30].clone()
    actual = outcome(lt.stage2_loss, z, guide, clusters, far, backend="cpu")
    expected = outcome(lt.stage2_loss, z.double(), guide.double(), clusters, far, backend="reference")
    for x, y in zip(actual[0], expected[0], strict=True):
        assert_loss_close(x, y, dtype)
    assert_gradient_close(actual[1][3], expected[1][3], dtype)  # 1e12 times the others: eps of the normalisation
    others = torch.arange(140) != 3
    assert_gradient_close(actual[1][others], expected[1][others], dtype)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("spoilt", ["z", "guide"])
def test_non_finite_rows_are_non_finite_where_the_reference_is(spoilt, value, normalize):
    z, guide, clusters, far, _ = problem(140)
    (z if spoilt == "z" else guide)[[7, 100], 2] = value
    pos_idx = torch.randint(-1, 140, (140, 2))
    for options in ({}, {"pos_idx": pos_idx}, {"pos_idx": pos_idx, "weighted": False}, {"weighted": False}):
        options = {**options, "reduction": "none", "normalize": normalize}
        actual = lt.stage2_loss(z, guide, clusters, far, **options, backend="cpu")
        expected = lt.stage2_loss(z, guide, clusters, far, **options, backend="reference")
        for x, y in zip(actual, expected, strict=True):
            assert x.isfinite().equal(y.isfinite())
            torch.testing.assert_close(x[x.isfinite()], y[x.isfinite()])


def test_one_row_and_no_positives_have_zero_loss_and_gradient():
    z = torch.randn(1, 3, requires_grad=True)
    arguments = torch.randn(1, 2), torch.tensor([0]), torch.tensor([0])
    lone = {"instance_ids": torch.tensor([7]), "pos_idx": torch.tensor([[-1]])}
    losses, lse = lt.stage2_loss(z, *arguments, **lone, return_lse=True, backend="cpu")
    losses.total.backward()
    assert losses.total == losses.guided == losses.distill == 0
    assert lse.item() == -math.inf
    assert z.grad.eq(0).all()

    z = torch.randn(6, 3, requires_grad=True)
    lone = {"instance_ids": torch.arange(6), "pos_idx": torch.full((6, 0), -1)}
    loss = lt.guided_contrastive(
        z, torch.randn(6, 2), torch.zeros(6).long(), torch.zeros(1).long(), **lone, backend="cpu"
    )
    loss.backward()
    assert loss == 0
    assert z.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_of_large_norm_as_they_are(dtype):
    z, guide, clusters, far, _ = problem(150, dtype=dtype)
    assert_like_reference(lt.stage2_loss, z * 30, guide * 30, clusters, far, normalize=False)
    losses = lt.stage2_loss(z * 1e4, guide, clusters, far, normalize=False, backend="cpu")  # exponents of 10^9
    expected = lt.stage2_loss((z * 1e4).double(), guide.double(), clusters, far, normalize=False, backend="reference")
    for x, y in zip(losses, expected, strict=True):
        assert_loss_close(x, y, dtype)


def test_inputs_of_any_layout_and_dtype_are_left_unchanged():
    z, guide, clusters, far, _ = problem(150, d=16, dg=8)
    expected = lt.stage2_loss(z, guide, clusters, far, backend="cpu", pos_idx=torch.arange(150)[:, None].flip(0))
    strided = torch.stack([z.T.contiguous(), z.T.contiguous()], 2)[:, :, 1].T
    wide_guide = torch.cat([guide, guide], 1)[:, :8]
    pos_idx = torch.arange(150).flip(0).repeat(2, 1).T[:, :1]
    before = [x.clone() for x in (strided, wide_guide, clusters, far, pos_idx)]
    losses = lt.stage2_loss(
        strided, wide_guide, clusters.repeat_interleave(2)[::2].int(), far.int(), backend="cpu", pos_idx=pos_idx
    )
    for x, y in zip(losses, expected, strict=True):
        assert torch.equal(x, y)
    for x, y in zip((strided, wide_guide, clusters, far, pos_idx), before, strict=True):
        assert torch.equal(x, y)
    mixed = lt.stage2_loss(z.float(), guide.bfloat16(), clusters, far, backend="cpu").total
    rounded = lt.stage2_loss(z.float(), guide.bfloat16().double(), clusters, far, backend="cpu").total
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, rounded)


def test_gradcheck():
    z, guide, clusters, far, _ = problem(10, d=3, dg=2, k=3)
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    distill = lt.Distill("relational", 0.2)
    for options in (
        {"k": 2},
        {"k": 1, "normalize": False, "gamma": 1.5},
        {"k": 3, "instance_ids": torch.arange(10) // 4},
    ):

        def losses(z, tau, options=options):
            losses, lse = lt.stage2_loss(
                z, guide, clusters, far, tau, distill=distill, return_lse=True, backend="cpu", **options
            )
            distilled = lt.relational_distill(z, guide, tau, teacher_temperature=0.3, return_lse=True, backend="cpu")
            return *losses, lse, *distilled

        assert torch.autograd.gradcheck(losses, (z.requires_grad_(), tau), fast_mode=True)


def test_thread_count_and_repetition_leave_the_bits_alone():
    z, guide, clusters, far, _ = problem(1100, d=24, dtype=torch.float32)
    clusters[500:600] = 3
    far = torch.tensor([1, 2, 5, 4, 0, 5])  # cluster 5 is empty: rows of 2 fall back
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            shown, *gradients = outcome(lt.stage2_loss, z, guide, clusters, far, backend="cpu")
            results.append([*shown, *gradients])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(x, y)


def op_arguments(contrast, distill, tau_tensor, pos_idx):
    z, guide, clusters, far, _ = problem(12, d=4, dg=3, k=3, dtype=torch.float32)
    z.requires_grad_()
    chosen = torch.randint(-1, 12, (12, 3)) if pos_idx else None
    tau = torch.tensor(0.3, requires_grad=True) if tau_tensor else None
    selection = {"clusters": clusters, "far": far, "pos_idx": chosen} if contrast else {}
    temperatures = {"temperature_tensor": tau, "temperature": 0.3, "teacher_temperature": 0.1}
    options = {"k": 0 if pos_idx else 2, "distill": distill}
    return {"z": z, "guide": guide, **selection, **temperatures, **options}


@pytest.mark.parametrize("case", [(True, False, False, False), (False, True, True, False), (True, True, True, True)])
def test_opcheck(case):
    torch.library.opcheck(torch.ops.ltood_fast.guided.default, (), op_arguments(*case))


def test_compiled_whole_with_gradients():
    z, guide, clusters, far, _ = problem(64, dtype=torch.float32)

    def losses(z, guide, tau):
        return lt.stage2_loss(z, guide, clusters, far, tau, k=3, backend="cpu", return_lse=True)

    tau = torch.tensor(0.3, requires_grad=True)
    (compiled, lse), (eager, eager_lse) = (
        f(z.requires_grad_(), guide, tau)
        for f in (
            torch.compile(losses, fullgraph=True),
            losses,
        )
    )
    torch.testing.assert_close(compiled.total, eager.total)
    assert torch.equal(lse, eager_lse)
    for x, y in zip(*(torch.autograd.grad(r.total, (z, tau)) for r in (compiled, eager)), strict=True):
        torch.testing.assert_close(x, y)


def test_compiled_code_checks_the_values_that_python_could_not():
    z, guide, clusters, far, _ = problem(8)
    compiled = torch.compile(lt.guided_contrastive, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"guided: clusters must be in \[0, 4\), got 4"):
        compiled(z, guide, clusters + 4, far, k=2)
    with pytest.raises(ValueError, match=r"guided: pos_idx must be in \[-1, 8\), got 8"):
        compiled(z, guide, clusters, far, pos_idx=torch.full((8, 1), 8))


def test_export():
    z, guide, clusters, far, _ = problem(16, dtype=torch.float32)
    module = Stage2Loss(k=2)
    exported = torch.export.export(module, (z, guide, clusters, far)).module()
    assert torch.equal(exported(z, guide, clusters, far).total, module(z, guide, clusters, far).total)


def test_autocast_and_inference_mode():
    z, guide, clusters, far, _ = problem(300, dtype=torch.bfloat16)
    expected = lt.stage2_loss(z, guide, clusters, far, backend="cpu").total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = lt.stage2_loss(z, guide, clusters, far, backend="cpu").total
    with torch.inference_mode():
        inferred = lt.stage2_loss(z.clone(), guide, clusters, far, backend="cpu").total
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert torch.equal(inferred, expected)


def test_double_backward_is_refused():
    z, guide, clusters, far, _ = problem(8, d=3)
    loss = lt.guided_contrastive(z.requires_grad_(), guide, clusters, far, k=2, backend="cpu")
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="^guided_contrastive: double backward is not supported$"):
        grad.square().sum().backward()


def test_only_what_has_a_gradient_gets_one():
    z, guide, clusters, far, _ = problem(8)
    guide.requires_grad_()
    tau = torch.tensor(0.2, requires_grad=True)
    losses, lse = lt.stage2_loss(z, guide, clusters, far, tau, k=2, return_lse=True, backend="cpu")
    losses.total.backward()
    assert guide.grad is None
    assert tau.grad.dtype == torch.float32
    assert lse.requires_grad
    assert not lt.stage2_loss(z, guide, clusters, far, k=2, backend="cpu").total.requires_grad


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 40),
    d=st.integers(1, 20),
    dg=st.integers(1, 5),
    k_clusters=st.integers(1, 50),
    images=st.integers(1, 45),
    neighbors=st.integers(1, 6),
    given_neighbors=st.booleans(),
    weighted=st.booleans(),
    normalize=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_fuzz(n, d, dg, k_clusters, images, neighbors, given_neighbors, weighted, normalize, seed):
    torch.manual_seed(seed)
    options = {"instance_ids": torch.randint(images, (n,)), "weighted": weighted, "normalize": normalize}
    if given_neighbors or n == 1:
        options["pos_idx"] = torch.randint(-1, n, (n, neighbors))
    else:
        options["k"] = min(neighbors, n - 1)
    z, guide = torch.randn(n, d).double(), torch.randn(n, dg).double()
    arguments = (z, guide, torch.randint(k_clusters, (n,)), torch.randint(k_clusters, (k_clusters,)))
    shown, *gradients = outcome(lt.stage2_loss, *arguments, backend="cpu", temperature=0.5, **options)
    expected, *expected_gradients = outcome(lt.stage2_loss, *arguments, backend="reference", temperature=0.5, **options)
    for x, y in zip([*shown, *gradients], [*expected, *expected_gradients], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_guide_row_reaches_every_loss(value, weighted):
    """Who is near is unknown to all rows but the other view of the broken one."""
    z, guide, clusters, far = torch.randn(12, 5), torch.randn(12, 4), torch.arange(12) % 3, torch.tensor([1, 2, 0])
    guide[3, 1] = value
    options = {"k": 2, "weighted": weighted, "reduction": "none"}
    ours, defined = (
        lt.guided_contrastive(z, guide, clusters, far, backend=backend, **options) for backend in ("auto", "reference")
    )
    assert ours.isfinite().equal(defined.isfinite())
    assert defined.isfinite().sum() == (0 if weighted else 1)

"""The partial contrastive ops against a dense float64 definition, and against the square op they are cut from."""

import math

import pytest
import torch
from torch.nn.functional import normalize as unit

import ltood_fast
from ltood_fast._ext import has_kernel
from ltood_fast.ops._contrastive_partial import contrastive_partial, contrastive_partial_bwd
from python_tests.tolerances import assert_gradient_close, assert_loss_close

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# (n, M, D, diagonal): why it is there
SHAPES = {
    "one pair": (1, 1, 3, 5),
    "fewer rows than a vector": (3, 50, 2, 10),
    "fewer columns than rows, the diagonal runs out": (129, 17, 7, -20),
    "several tiles, the diagonal from the middle of one to the end": (200, 333, 65, 133),
    "the diagonal starts in the rows and ends in the columns": (300, 70, 16, -290),
    "no diagonal: below": (40, 60, 5, -40),
    "no diagonal: beyond": (40, 60, 5, 60),
    "tiles of 256 columns, wider than the usual": (130, 8200, 130, 4096),
}


def dense(x, y, tau, normalize, diagonal):
    """(s, u(y)) in float64, -inf where a row meets itself."""
    x, y = x.double(), y.double()
    if normalize:
        x, y = unit(x, dim=1, eps=1e-12), unit(y, dim=1, eps=1e-12)
    same = torch.arange(len(x))[:, None] + diagonal == torch.arange(len(y))
    return (x @ y.t() / float(tau)).masked_fill(same, -math.inf), y


def dense_lse_bwd(x, y, tau, normalize, diagonal, x_lse, x_weight, y_lse=None, y_weight=None):
    s, u = dense(x, y, tau, normalize, diagonal)
    gradients = (s - x_lse[:, None]).exp() * x_weight[:, None]
    gradients[x_lse == -math.inf] = 0  # no column: nothing to repel
    if y_lse is not None:
        gradients = gradients + torch.where(y_lse == -math.inf, 0.0, (s - y_lse).exp() * y_weight)
    return gradients @ u / float(tau)


def global_lse(s, dim):
    """A log-sum-exp of other rows than these too: no larger similarity than lse can occur."""
    return torch.logaddexp(s.logsumexp(dim), torch.zeros((), dtype=torch.float64))


def on(device, *tensors):
    return [None if t is None else t.to(device) for t in tensors]


def run_lse_bwd(device, x, y, tau, normalize, diagonal, *weights):
    x, y, *weights = on(device, x, y, *weights)
    named = {"of_rows": tuple(weights[:2]), "of_columns": tuple(weights[2:]) or None}
    return contrastive_partial_bwd(x, y, tau, normalize=normalize, diagonal=diagonal, **named).cpu()


def check(device, x, y, tau, normalize, diagonal, k=0, rules=None, on_cuda=False):
    """Everything that the two ops return, against the dense definition. CUDA multiplies rows as they are in two parts
    of 8 bits."""
    rules = rules or {}
    s, u = dense(x, y, tau, normalize, diagonal)
    moved = {name: tuple(on(device, *pair)) for name, pair in rules.items()}
    options = {"normalize": normalize, "diagonal": diagonal, "k": k}
    found = contrastive_partial(*on(device, x, y), tau, **options, **moved)
    lse, cosines, indices = on("cpu", *found)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    assert (lse.dtype, cosines.dtype, indices.dtype) == (torch.float64, wide, torch.int64)
    reached = s.logsumexp(1)
    assert torch.equal(lse == -math.inf, reached == -math.inf)
    if reached.isfinite().any():
        assert_loss_close(lse[reached.isfinite()], reached[reached.isfinite()], x.dtype)
    rounding = 1e-13 if wide == torch.float64 else 1e-6
    if not normalize:
        rounding = max(rounding, 2.0**-15 if on_cuda or device.type == "cuda" else 0)
        rounding *= x.double().norm(dim=1).max().item() * y.double().norm(dim=1).max().item()
    assert_neighbors_right(s * float(tau), cosines, indices, k, rules, rounding)
    x_lse, y_lse = global_lse(s, 1), global_lse(s, 0)
    x_weight, y_weight = torch.linspace(0.5, 1.5, len(x)).double(), torch.linspace(-1, 2, len(y)).double()
    x_weight[::7], y_weight[::5] = 0, 0
    for weights in ((x_lse, x_weight), (x_lse, x_weight, y_lse, y_weight)):
        grad_unit = run_lse_bwd(device, x, y, tau, normalize, diagonal, *weights)
        assert grad_unit.dtype == wide
        assert_gradient_close(grad_unit, dense_lse_bwd(x, y, tau, normalize, diagonal, *weights), x.dtype)


def assert_neighbors_right(cosine, cosines, indices, k, rules, rounding):
    """The chosen are the k best of the admissible, within rounding, and belong to their indices."""
    admissible = cosine > -math.inf
    if "instances" in rules:
        of_rows, of_columns = rules["instances"]
        admissible &= of_rows[:, None] != of_columns
    if "domains" in rules:
        of_rows, of_columns = rules["domains"]
        admissible &= of_rows[:, None] == of_columns
    assert cosines.shape == indices.shape == (len(cosine), k)
    truth = cosine.masked_fill(~admissible, -math.inf).sort(dim=1, descending=True).values[:, :k]
    truth = torch.nn.functional.pad(truth, (0, k - truth.shape[1]), value=-math.inf)
    found = indices >= 0
    assert torch.equal(found, truth > -math.inf)
    assert torch.equal(found, cosines > -math.inf)
    assert torch.equal(indices == -1, ~found)
    of_choice = cosine.masked_fill(~admissible, -math.inf).gather(1, indices.clamp(min=0))
    close = {"rtol": 0, "atol": rounding}
    torch.testing.assert_close(cosines.double()[found], truth[found], **close)
    torch.testing.assert_close(of_choice[found], truth[found], **close)
    for row in indices.tolist():
        chosen = [index for index in row if index >= 0]
        assert len(set(chosen)) == len(chosen)


def draw(n, m, d, dtype):
    return (torch.randn(rows, d, dtype=torch.float64).to(dtype) for rows in (n, m))


def rules_of(n, m):
    return {
        "instances": (torch.randint(0, 30, (n,)), torch.randint(0, 30, (m,))),
        "domains": (torch.randint(-1, 2, (n,)), torch.randint(-1, 2, (m,))),
    }


def skip_double_on_cuda(device, dtype):
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("there is no float64 kernel for CUDA")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_against_the_dense_definition(device, shape, dtype):
    skip_double_on_cuda(device, dtype)
    n, m, d, diagonal = shape
    check(device, *draw(n, m, d, dtype), 0.3, True, diagonal, k=3, rules=rules_of(n, m) if n > 3 else None)


TEMPERATURES = {
    0.005: "double precision for float inputs on the CPU",
    0.0165: "just below the bound of the CPU's fixed shift",
    0.0168: "just above it, below that of CUDA",
    0.023: "above that of CUDA",
    10.0: "hot",
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tau", TEMPERATURES)
def test_temperatures(device, tau, dtype):
    skip_double_on_cuda(device, dtype)
    if device.type == "cuda" and tau < 0.01:
        pytest.skip("there are no double products on CUDA")
    x, y = draw(140, 150, 24, dtype)
    check(device, x, y, tau, True, 9, k=1)
    check(device, x, y, torch.tensor(tau, dtype=torch.float64, device=device), True, 9)


NORMS = {
    (0.1, 0.2): "all similarities near 0",
    (0.1, 100.0): "a fixed shift needs the product of both lengths",
    (6.0, 6.0): "online maximum in float on the CPU",
    (200.0, 300.0): "exponents of 10^5: double precision on the CPU",
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norms", NORMS)
def test_rows_as_they_are(device, norms, dtype):
    skip_double_on_cuda(device, dtype)
    if device.type == "cuda" and norms[0] * norms[1] > 1:
        pytest.skip("products of 16 bits on CUDA: exponents beyond 3 keep fewer than 4 digits")
    x, y = (
        (unit(rows.double(), dim=1) * norm * torch.linspace(0.1, 1, len(rows))[:, None]).to(dtype)
        for rows, norm in zip(draw(150, 130, 24, torch.float64), norms, strict=True)
    )
    check(device, x, y, 0.3, False, -11, k=2, rules=rules_of(150, 130))


def test_equal_columns_go_to_the_lower_index_across_tiles(device):
    m = 300
    y = torch.zeros(m, 4)
    y[torch.arange(m), torch.arange(m) % 2] = 1.0  # cosines are exactly 0 and 1
    *_, indices = contrastive_partial(*on(device, y[:5], y), 0.3, normalize=True, diagonal=2, k=3)
    lowest = [[j for j in range(10) if j % 2 == i % 2 and j != i + 2][:3] for i in range(5)]
    assert indices.tolist() == lowest


def test_candidates_run_out(device):
    x, y = draw(40, 7, 5, torch.float32)
    check(device, x, y, 0.3, True, 3, k=7)  # one of the seven columns is the row itself
    check(device, x, y, 0.3, True, 3, k=2, rules={"domains": (torch.zeros(40).long(), torch.arange(7))})
    check(device, x, y, 0.3, True, 40, k=2, rules={"instances": (torch.zeros(40).long(), torch.ones(7).long())})
    same = tuple(on(device, torch.zeros(40).long(), torch.zeros(7).long()))
    *_, indices = contrastive_partial(*on(device, x, y), 0.3, normalize=True, diagonal=3, k=9, instances=same)
    assert indices.tolist() == [[-1] * 9] * 40


def test_a_row_without_a_column(device):
    x = torch.randn(1, 6)
    lse, cosines, indices = on("cpu", *contrastive_partial(*on(device, x, x), 0.3, normalize=True, diagonal=0, k=1))
    assert lse.tolist() == [-math.inf]
    assert (cosines.tolist(), indices.tolist()) == ([[-math.inf]], [[-1]])
    zero = torch.zeros(1, dtype=torch.float64)
    for normalize in (True, False):
        grad_unit = run_lse_bwd(device, x, x, 0.3, normalize, 0, lse, zero, lse, zero)
        assert torch.equal(grad_unit, torch.zeros(1, 6))
    x, y = draw(20, 30, 6, torch.float32)
    x_lse, x_weight = torch.full((20,), 3.0).double(), torch.ones(20).double()
    x_lse[4], x_weight[4] = -math.inf, 2
    y_lse, y_weight = torch.full((30,), 3.0).double(), torch.ones(30).double()
    y_lse[5], y_weight[5] = -math.inf, 2
    for weights in ((x_lse, x_weight), (x_lse, x_weight, y_lse, y_weight)):
        grad_unit = run_lse_bwd(device, x, y, 0.3, True, 50, *weights)
        assert_gradient_close(grad_unit, dense_lse_bwd(x, y, 0.3, True, 50, *weights), torch.float32)
    assert torch.equal(run_lse_bwd(device, x, y, 0.3, True, 50, x_lse, x_weight)[4], torch.zeros(6))


def test_a_log_sum_exp_far_from_the_similarities(device):
    """Columns of another shard decide it: nothing overflows, nothing turns into NaN."""
    x = torch.randn(1, 4)
    for lse in (-700.0, 700.0):
        far = torch.tensor([lse]).double()
        grad_unit = run_lse_bwd(device, x, x, 0.3, True, 0, far, torch.ones(1).double(), far, torch.ones(1).double())
        assert torch.equal(grad_unit, torch.zeros(1, 4))
    x, y = draw(10, 40, 4, torch.float32)
    x_lse, x_weight = torch.full((10,), 700.0).double(), torch.ones(10).double()
    x_lse[:5] = 3
    grad_unit = run_lse_bwd(device, x, y, 0.3, True, 50, x_lse, x_weight)
    assert_gradient_close(grad_unit, dense_lse_bwd(x, y, 0.3, True, 50, x_lse, x_weight), torch.float32)
    assert torch.equal(grad_unit[5:], torch.zeros(5, 4))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_weights_of_any_size(device, scale):
    x, y = draw(20, 40, 8, torch.float32)
    s, _ = dense(x, y, 0.3, True, 2)
    weights = (s.logsumexp(1), torch.rand(20).double() * scale, s.logsumexp(0), torch.rand(40).double() * scale)
    grad_unit = run_lse_bwd(device, x, y, 0.3, True, 2, *weights)
    assert_gradient_close(
        grad_unit.double() / scale, dense_lse_bwd(x, y, 0.3, True, 2, *weights) / scale, torch.float32
    )


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_rows_are_never_a_wrong_finite_number(device, bad, normalize):
    for which in (0, 1):
        pair = [0.3 * rows for rows in draw(150, 140, 8, torch.float32)]
        pair[which][77, 2] = bad
        s, _ = dense(*pair, 0.3, normalize, 60)
        lse, cosines, indices = on(
            "cpu", *contrastive_partial(*on(device, *pair), 0.3, normalize=normalize, diagonal=60, k=2)
        )
        assert torch.equal(lse.isfinite(), s.logsumexp(1).isfinite())
        assert indices.min() >= -1
        assert indices.max() < 140
        weights = s.logsumexp(1), torch.ones(150).double()
        grad_unit = run_lse_bwd(device, *pair, 0.3, normalize, 60, *weights)
        assert not grad_unit.isfinite().all()
        if which == 0:
            rows = torch.arange(150) != 77
            expected = dense_lse_bwd(*pair, 0.3, normalize, 60, *weights)
            assert_gradient_close(grad_unit[rows], expected[rows], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tau", [0.3, 0.012])
def test_shards_reproduce_the_square_op(device, tau, dtype):
    """Rows cut into shards, all columns or one shard of them at a time: the lse and the gradient of the whole batch."""
    skip_double_on_cuda(device, dtype)
    n, shards = 160, (50, 70, 40)
    z = torch.randn(n, 24, dtype=torch.float64).to(dtype).to(device)
    leaf, weight = z.clone().requires_grad_(), torch.linspace(0.5, 1.5, n, dtype=torch.float64, device=device)
    _, lse = ltood_fast.supcon(leaf, torch.arange(n, device=device), tau, return_lse=True)
    (expected,) = torch.autograd.grad((lse.double() * weight).sum(), leaf)
    starts = [sum(shards[:r]) for r in range(len(shards))]
    parts = [z[start : start + size] for start, size in zip(starts, shards, strict=True)]
    options = {"normalize": True}
    rows, ring = [], []
    for start, part in zip(starts, parts, strict=True):
        rows.append(contrastive_partial(part, z, tau, diagonal=start, **options).lse)
        pieces = [
            contrastive_partial(part, other, tau, diagonal=start - first, **options).lse
            for first, other in zip(starts, parts, strict=True)
        ]
        ring.append(torch.stack(pieces).logsumexp(0))
    rows, ring = torch.cat(rows), torch.cat(ring)
    assert_loss_close(rows, lse.double(), dtype)
    assert_loss_close(ring, lse.double(), dtype)
    for start, part in zip(starts, parts, strict=True):
        mine = slice(start, start + len(part))
        own = {"of_rows": (rows[mine], weight[mine])}
        grad_unit = contrastive_partial_bwd(part, z, tau, diagonal=start, of_columns=(rows, weight), **own, **options)
        passed = sum(
            contrastive_partial_bwd(
                part,
                other,
                tau,
                diagonal=start - first,
                of_columns=(rows[first : first + len(other)], weight[first : first + len(other)]),
                **own,
                **options,
            )
            for first, other in zip(starts, parts, strict=True)
        )
        for gradients in (grad_unit, passed):
            exact = part.double().requires_grad_()
            (grad,) = torch.autograd.grad(unit(exact, dim=1), exact, gradients.double())
            assert_gradient_close(grad, expected[mine], dtype)


def test_non_contiguous_inputs_are_read_right(device):
    x = torch.randn(24, 300, dtype=torch.float32).t()[::2]
    y = torch.randn(48, 90, dtype=torch.float32).t()[:, ::2]
    rules = {name: tuple(rule.repeat_interleave(2)[::2] for rule in pair) for name, pair in rules_of(150, 90).items()}
    check(device, x, y, 0.3, True, 10, k=2, rules=rules)
    s, _ = dense(x, y, 0.3, True, 10)
    wide = torch.stack([s.logsumexp(1), torch.ones(150).double()], dim=1)
    grad_unit = run_lse_bwd(device, x, y, 0.3, True, 10, wide[:, 0], wide[:, 1])
    assert_gradient_close(grad_unit, dense_lse_bwd(x, y, 0.3, True, 10, wide[:, 0], wide[:, 1]), torch.float32)


def everything(x, y, tau, diagonal):
    found = contrastive_partial(x, y, tau, normalize=True, diagonal=diagonal, k=2)
    y_lse = torch.zeros(len(y), dtype=torch.float64, device=y.device) + 5
    own = {"of_rows": (found.lse, torch.ones_like(found.lse)), "of_columns": (y_lse, y_lse)}
    return (*found, contrastive_partial_bwd(x, y, tau, normalize=True, diagonal=diagonal, **own))


@pytest.mark.parametrize("shape", [(40, 1100, 33), (300, 500, 64)])
def test_one_and_two_threads_give_the_same_bits(shape):
    x, y = draw(*shape, torch.float32)
    before = torch.get_num_threads()
    try:
        for tau in (0.3, 0.01):
            results = []
            for threads in (1, 2, 2):
                torch.set_num_threads(threads)
                results.append(everything(x, y, tau, 20))
            for one, *others in zip(*results, strict=True):
                assert all(torch.equal(one, other) for other in others)
    finally:
        torch.set_num_threads(before)


def op_arguments(n=12, m=20, d=4):
    x, y = draw(n, m, d, torch.float32)
    (x_instance, y_instance), (x_domain, y_domain) = rules_of(n, m).values()
    rules = {"x_instance": x_instance, "y_instance": y_instance, "x_domain": x_domain, "y_domain": y_domain}
    cold = {"x": x, "y": y, "temperature": 0.3, "diagonal": 4}
    learned = {"x": x, "y": y, "temperature_tensor": torch.tensor(0.3), "normalize": False}
    lse, weight = torch.rand(m).double(), torch.rand(m).double()
    grad_unit = {**learned, "x_lse": lse[:n], "x_weight": weight[:n], "diagonal": -3}
    return {
        "contrastive_partial": [{**cold, **rules, "k": 2}, {**learned, "diagonal": 30}],
        "contrastive_partial_bwd": [{**grad_unit, "y_lse": lse, "y_weight": weight}, grad_unit],
    }


@pytest.mark.parametrize("op", ["contrastive_partial", "contrastive_partial_bwd"])
def test_opcheck(op):
    for arguments in op_arguments()[op]:
        torch.library.opcheck(getattr(torch.ops.ltood_fast, op).default, (), arguments)


def test_compiles_in_one_graph():
    x, y = draw(12, 20, 4, torch.float32)
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager", dynamic=True)
    for diagonal in (3, 5):
        torch.testing.assert_close(compiled(x, y, 0.3, diagonal), everything(x, y, 0.3, diagonal))


def test_differentiation_is_refused():
    x, y = draw(6, 9, 4, torch.float32)
    lse = contrastive_partial(x.requires_grad_(), y, 0.3, normalize=True, diagonal=1).lse
    with pytest.raises(RuntimeError, match="contrastive_partial: differentiation is not supported"):
        lse.sum().backward()
    weight = torch.ones(6).double()
    grad_unit = contrastive_partial_bwd(x, y, 0.3, normalize=True, diagonal=1, of_rows=(lse.detach(), weight))
    with pytest.raises(RuntimeError, match="contrastive_partial_bwd: differentiation is not supported"):
        grad_unit.sum().backward()


def test_the_kernel_is_announced():
    assert has_kernel("contrastive_partial", "cpu")
    assert "contrastive_partial" not in ltood_fast.build_info()["kernels"]


def test_the_ops_check_what_reaches_them():
    x, y = draw(6, 9, 3, torch.float32)
    ids, lse = torch.zeros(9).long(), torch.zeros(9).double()
    partial, bwd = torch.ops.ltood_fast.contrastive_partial, torch.ops.ltood_fast.contrastive_partial_bwd
    with pytest.raises(TypeError, match="contrastive_partial: x must be a float tensor, got Long"):
        partial(x.long(), y, temperature=0.3)
    with pytest.raises(TypeError, match="contrastive_partial: y must be Float as x is, got Double"):
        partial(x, y.double(), temperature=0.3)
    with pytest.raises(
        ValueError, match=r"contrastive_partial: x must be a non-empty matrix \[n, D\], got shape \[0, 3\]"
    ):
        partial(x[:0], y, temperature=0.3)
    with pytest.raises(
        ValueError, match=r"contrastive_partial: y must be a non-empty matrix as wide as x, got shape \[9"
    ):
        partial(x, y[:, :2], temperature=0.3)
    with pytest.raises(ValueError, match="contrastive_partial: k must be at least 0, got -1"):
        partial(x, y, temperature=0.3, k=-1)
    with pytest.raises(
        ValueError, match="contrastive_partial: y_instance must be given when x_instance is, and only then"
    ):
        partial(x, y, x_instance=ids[:6], temperature=0.3, k=1)
    with pytest.raises(ValueError, match="contrastive_partial: y_domain must be given when x_domain is, and only then"):
        partial(x, y, y_domain=ids, temperature=0.3, k=1)
    with pytest.raises(ValueError, match=r"contrastive_partial: y_instance must be of shape \[9\], got shape \[6\]"):
        partial(x, y, x_instance=ids[:6], y_instance=ids[:6], temperature=0.3, k=1)
    with pytest.raises(ValueError, match=r"temperature must be a float or a 0-d float tensor, got shape \[2\]"):
        partial(x, y, temperature_tensor=torch.ones(2))
    with pytest.raises(TypeError, match="contrastive_partial_bwd: x_lse must be Double, got Float"):
        bwd(x, y, lse[:6].float(), lse[:6], temperature=0.3)
    with pytest.raises(
        ValueError, match="contrastive_partial_bwd: y_weight must be given when y_lse is, and only then"
    ):
        bwd(x, y, lse[:6], lse[:6], lse, temperature=0.3)

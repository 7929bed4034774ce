"""The CPU kernel of two sets of embeddings over many panels, against the float64 reference, and as an operator."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import ltood_fast as lt
from ltood_fast import Denominator, Exclude
from python_tests.tolerances import assert_gradient_close, assert_loss_close

# (queries, keys, queue, D): why it is there
SHAPES = {
    "two ragged panels each": (200, 333, None, 31),
    "one panel of queries against many of keys: splits of the keys": (40, 2000, None, 16),
    "many panels of queries against one of keys: splits of the queries": (2000, 40, None, 16),
    "more panels than tasks": (2100, 2300, None, 8),
    "a queue read panel by panel": (24, 24, 3001, 20),
    "a queue read panel by panel, two panels of queries": (300, 300, 5000, 8),
    "a short queue": (300, 400, 500, 20),
    "an empty queue": (30, 30, 0, 5),
}
OPTIONS = {
    "defaults": {},
    "small temperature, in double": {"temperature": 0.005},
    "online sums": {"temperature": 0.01},
    "smoothed": {"label_smoothing": 0.2},
    "decoupled": {"denominator": Denominator(decoupled=True)},
    "rows as given": {"normalize": False, "temperature": 5.0},
}


def tensors(n, m, q, d, dtype=torch.float32):
    g = torch.Generator().manual_seed(n + m)

    def rows(count):
        return torch.randn(count, d, generator=g, dtype=torch.float64).to(dtype)

    given = {"query": rows(n), "positive_key": rows(m)}
    if q is not None:
        given["negative_keys"] = rows(q)
    more = {"target": torch.randint(0, m, (n,), generator=g)} if m < n else {}
    ids = torch.randint(0, 50, (n,), generator=g), torch.randint(0, 50, (m if q is None else q,), generator=g)
    more["exclude"] = Exclude(*ids)
    return given, more


def with_gradients(given, frozen=(), **options):
    leaves = {name: x.detach().clone().requires_grad_(name not in frozen) for name, x in given.items()}
    leaves["temperature"] = torch.tensor(options.pop("temperature", 0.1), dtype=torch.float64, requires_grad=True)
    rows, lse = lt.info_nce(**leaves, **options, reduction="none", return_lse=True)
    weights = torch.linspace(0.5, 1.5, len(rows), dtype=torch.float64)
    finite = torch.where(lse.isfinite(), lse, 0)
    ((rows * weights).sum() + 0.3 * (finite * weights).sum()).backward()
    return rows.detach(), lse.detach(), {name: x.grad for name, x in leaves.items() if x.requires_grad}


def check(given, dtype, **options):
    rows, lse, gradients = with_gradients(given, backend="cpu", **options)
    wide = {name: x.double() for name, x in given.items()}
    true_rows, true_lse, truth = with_gradients(wide, backend="reference", **options)
    assert_loss_close(rows, true_rows, dtype)
    finite = true_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite)
    assert_loss_close(lse[finite], true_lse[finite], dtype)
    for name, gradient in truth.items():
        if gradient is None or not gradient.any():
            assert gradients[name] is None or not gradients[name].any(), name
        else:
            assert_gradient_close(gradients[name], gradient, dtype)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_many_panels_against_the_reference(shape, options):
    given, more = tensors(*shape)
    check(given, torch.float32, **more, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_both_directions_over_many_panels(options):
    given, more = tensors(700, 700, None, 24, torch.float64)
    check(given, torch.float64, symmetric=True, **more, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_queue_of_wider_queries(dtype):
    """As under autocast with a queue of another dtype; sums are those of the widest."""
    given, more = tensors(24, 24, 3000, 20)
    given["negative_keys"] = given["negative_keys"].to(dtype)
    rows, _, gradients = with_gradients(given, backend="cpu", **more)
    assert gradients["negative_keys"].dtype == dtype
    assert rows.dtype == torch.float32
    check(given, dtype, **more)


FROZEN = [("query",), ("positive_key",), ("query", "positive_key")]


@pytest.mark.parametrize(
    ("queue", "frozen"), [*((None, names) for names in FROZEN), *((3000, n) for n in (*FROZEN, ("negative_keys",)))]
)
def test_frozen_sides_leave_the_other_gradients(queue, frozen):
    given, more = tensors(150, 150, queue, 12)
    every = with_gradients(given, backend="cpu", **more)[2]
    some = with_gradients(given, frozen, backend="cpu", **more)[2]
    assert set(some) == set(every) - set(frozen)
    for name, gradient in some.items():
        torch.testing.assert_close(gradient, every[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("frozen", [(), ("query",), ("positive_key",)])
def test_a_frozen_side_is_not_computed(frozen):
    """The operator returns no rows for it."""
    given, _ = tensors(64, 64, None, 8)
    needs = {f"need_{name}": name not in frozen for name in given}
    _, _, _, _, stats = torch.ops.ltood_fast.info_nce(**given)
    gradients = torch.ops.ltood_fast.info_nce_bwd(
        torch.ones(64), None, None, None, stats, **given, **needs, need_temperature_tensor=False
    )
    for name, gradient in zip(given, gradients, strict=False):
        assert gradient.shape == ((0 if name in frozen else 64), 8)


@pytest.mark.parametrize("temperature", [0.1, 0.07, 0.05, 0.01])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_converged_pairs_keep_their_digits(backend, temperature):
    """Row losses of 1e-2 down to 1e-38: no worse than float32 cross-entropy of the same rows, and never negative."""
    g = torch.Generator().manual_seed(1)
    key = torch.randn(64, 64, generator=g)
    query = key + 0.2 * torch.randn(64, 64, generator=g)

    def exact(x):
        s = F.normalize(x, dim=1) @ F.normalize(key.double(), dim=1).T / temperature
        gaps = (s - s.diagonal()[:, None]).masked_fill(torch.eye(64, dtype=torch.bool), -torch.inf)
        return gaps.logsumexp(1).exp().log1p()

    def plain(x):
        s = F.normalize(x, dim=1) @ F.normalize(key, dim=1).T / temperature
        return F.cross_entropy(s, torch.arange(64), reduction="none")

    def ours(x):
        return lt.info_nce(x, key, temperature=temperature, reduction="none", backend=backend)

    def off(f):
        x = query.clone().requires_grad_()
        rows = f(x)
        (gradient,) = torch.autograd.grad(rows.mean(), x)
        return ((rows - truth[0]).norm() / truth[0].norm()).item(), (
            (gradient - truth[1]).norm() / truth[1].norm()
        ).item()

    x = query.double().requires_grad_()
    rows = exact(x)
    truth = rows.detach(), torch.autograd.grad(rows.mean(), x)[0]
    assert (ours(query) >= 0).all()
    for found, theirs, least in zip(off(ours), off(plain), (2e-6, 1e-5), strict=True):
        assert found <= max(1.00001 * theirs, least)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_ids_that_exclude_everything(backend):
    """Only the positive is left: a loss of 0, and without it (decoupled) no loss at all."""
    key = torch.randn(6, 4)
    query = torch.randn(6, 4, requires_grad=True)
    same = Exclude(torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.int64))
    for denominator in (None, Denominator(decoupled=True)):
        loss = lt.info_nce(query, key, exclude=same, denominator=denominator, backend=backend)
        assert loss == 0
        assert not torch.autograd.grad(loss, query)[0].any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_decoupled_rows_without_negatives_do_not_count(backend):
    query, key = torch.randn(4, 3), torch.randn(4, 3)
    ids = Exclude(torch.tensor([0, 1, 2, 3]), torch.tensor([9, 0, 0, 0]))
    options = {"exclude": ids, "denominator": Denominator(decoupled=True), "backend": backend}
    rows, lse = lt.info_nce(query, key, reduction="none", return_lse=True, **options)
    assert lse[0] == -torch.inf
    assert rows[0] == 0
    torch.testing.assert_close(lt.info_nce(query, key, **options), rows[1:].mean())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_options_of_cross_entropy(backend):
    """label_smoothing, target and the weights of the rows, as torch has them."""
    query, key, weight = torch.randn(9, 5), torch.randn(7, 5), torch.rand(9)
    target = torch.randint(0, 7, (9,))
    logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / 0.2
    rows = F.cross_entropy(logits, target, label_smoothing=0.1, reduction="none")
    options = {"temperature": 0.2, "target": target, "label_smoothing": 0.1, "weight": weight, "backend": backend}
    torch.testing.assert_close(lt.info_nce(query, key, **options, reduction="none"), rows * weight)
    torch.testing.assert_close(lt.info_nce(query, key, **options), (rows * weight).sum() / weight.sum())
    options["weight"] = torch.zeros(9)
    assert lt.info_nce(query, key, **options) == 0


def test_one_and_two_threads_give_the_same_bits():
    before, results = torch.get_num_threads(), []
    for shape in ((200, 333, None, 31), (40, 2000, None, 16), (24, 24, 3001, 20)):
        given, more = tensors(*shape)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            try:
                results.append(with_gradients(given, backend="cpu", **more))
            finally:
                torch.set_num_threads(before)
        (rows, lse, gradients), (other_rows, other_lse, others) = results[-2:]
        assert torch.equal(rows, other_rows)
        assert torch.equal(lse, other_lse)
        assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())


def test_inputs_stay_as_they_are():
    """Rows as given, whole panels and contiguous are read where they lie."""
    given, _ = tensors(128, 128, None, 16)
    copies = {name: x.clone() for name, x in given.items()}
    with_gradients(given, normalize=False, symmetric=True, temperature=1.0)
    assert all(torch.equal(x, copies[name]) for name, x in given.items())


OPERATORS = {
    "plain": ({}, None),
    "both directions": ({"symmetric": True}, None),
    "a queue": ({"decoupled": True}, 20),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    options, queue = OPERATORS[name]
    given, _ = tensors(6, 6, queue, 4)
    given = {key: x.requires_grad_() for key, x in given.items()}
    given["temperature_tensor"] = torch.tensor(0.2, requires_grad=True)
    torch.library.opcheck(torch.ops.ltood_fast.info_nce.default, (), given | options)
    given = {key: x.detach() for key, x in given.items()}
    stats = torch.ops.ltood_fast.info_nce(**given, **options)[-1]
    arguments = torch.ones(6), None, torch.ones(6, dtype=torch.float64), None, stats
    tests = ("test_schema", "test_faketensor")
    for needs in ({}, {"need_query": False, "need_positive_key": False}):
        torch.library.opcheck(
            torch.ops.ltood_fast.info_nce_bwd.default, arguments, given | options | needs, test_utils=tests
        )


def test_double_backward_is_refused():
    query = torch.randn(6, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(lt.info_nce(query, torch.randn(6, 4)), query, create_graph=True)
    with pytest.raises(RuntimeError, match="info_nce: double backward is not supported"):
        gradient.sum().backward()


def test_autocast_gives_float32():
    query, key = torch.randn(8, 4), torch.randn(8, 4)
    expected = lt.info_nce(query, key)
    with torch.autocast("cpu", torch.bfloat16):
        for backend in ("cpu", "reference"):
            loss = lt.info_nce(query, key, backend=backend)
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss, expected)


SENTENCES = {
    "few keys": ({"positive_key": torch.randn(3, 4)}, ValueError, "positive_key must be of at least one row for each"),
    "other width": ({"positive_key": torch.randn(6, 5)}, ValueError, "positive_key must be 4 wide as query is"),
    "target range": ({"target": torch.full((6,), 7)}, ValueError, r"target must be in \[0, 6\), got \[7, 7\]"),
    "target type": ({"target": torch.rand(6)}, TypeError, "target must be an integer tensor, got torch.float32"),
    "both ways with a queue": (
        {"symmetric": True, "negative_keys": torch.randn(3, 4)}, ValueError, "symmetric must be False with target or n"
    ),
    "both ways, more keys": (
        {"symmetric": True, "positive_key": torch.randn(7, 4)}, ValueError, "positive_key must be of one row for each"
    ),
    "half of the ids": ({"exclude": Exclude(torch.arange(6), None)}, TypeError, "exclude.key_ids must be an integer"),
    "ids of the wrong set": (
        {"exclude": Exclude(torch.arange(6), torch.arange(6)), "negative_keys": torch.randn(3, 4)}, ValueError,
        r"exclude.key_ids must be of shape \[3\], got shape \(6,\)",
    ),
    "smoothing": ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\), got 1.0"),
    "smoothing without positives": (
        {"label_smoothing": 0.1, "denominator": Denominator(decoupled=True)}, ValueError,
        "label_smoothing must be 0 with denominator.decoupled",
    ),
    "weights": ({"weight": torch.full((6,), -1.0)}, ValueError, "weight must be non-negative and finite"),
    "no dataclass": ({"exclude": torch.arange(6)}, TypeError, "exclude must be an Exclude or None, got Tensor"),
    "a queue as temperature": ({"temperature": torch.randn(6, 4)}, ValueError, "temperature must be a float"),
}  # fmt: skip


@pytest.mark.parametrize("name", SENTENCES)
def test_a_wrong_argument_ends_in_one_sentence(name):
    given, kind, sentence = SENTENCES[name]
    with pytest.raises(kind, match=f"^info_nce: {sentence}"):
        lt.info_nce(**({"query": torch.randn(6, 4), "positive_key": torch.randn(6, 4)} | given))


MEMORY = """
import resource, torch, ltood_fast
torch.set_num_threads(2)
query, key = (torch.randn({n}, 32, requires_grad=True) for _ in range(2))
queue = torch.empty({q}, 32).uniform_(-1, 1) if {q} else None  # without a larger temporary
ltood_fast.info_nce(query[:64], key[:64]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ltood_fast.info_nce(query, key, queue).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize(("n", "q", "most"), [(8192, 0, 40), (256, 524288, 16)])
def test_memory_stays_linear(n, q, most):
    """Neither 8,192 × 8,192 similarities, 256 MiB, nor a copy of a queue of 64 MiB is kept."""
    run = subprocess.run([sys.executable, "-c", MEMORY.format(n=n, q=q)], capture_output=True, text=True, check=True)
    assert float(run.stdout) < most

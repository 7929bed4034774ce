"""The contrastive references against loops over Python floats, and the sentence that every refused input gets."""

import math

import numpy as np
import pytest
import torch

import ltood_fast
from ltood_fast import Bank
from ltood_fast import nn as losses
from ltood_fast.reference import contrastive as reference

N, D, Q = 8, 3, 5
TAU = 0.3


def loop_unit(rows, normalize):
    rows = [[float(v) for v in row] for row in rows]
    if not normalize:
        return rows
    return [[v / max(math.sqrt(sum(w * w for w in row)), 1e-12) for v in row] for row in rows]


def loop_dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def loop_lse(u, i, tau):
    others = [loop_dot(u[i], u[j]) / tau for j in range(len(u)) if j != i]
    return math.log(sum(math.exp(s) for s in others)) if others else -math.inf


def loop_loss(lse, weighted):
    """l_i from the (weight, similarity) of its positives."""
    total = sum(w for w, _ in weighted)
    return lse - sum(w * s for w, s in weighted) / total if total > 0 else 0.0


def loop_views(i, n, ids):
    ids = [r % (n // 2) for r in range(n)] if ids is None else [int(v) for v in ids]
    return [j for j in range(n) if j != i and ids[j] == ids[i]]


def loop_neighbors(u, i, k, ids, domain, bank, bank_ids, bank_domain):
    """[(similarity, column)] of M_k(i), best first, ties to the lower column."""
    if bank is None:
        allowed = [j for j in range(len(u)) if j != i and j not in loop_views(i, len(u), ids)]
        allowed = [j for j in allowed if domain is None or domain[j] == domain[i]]
        rows = u
    else:
        allowed = [m for m in range(len(bank)) if bank_ids is None or bank_ids[m] != ids[i]]
        allowed = [m for m in allowed if bank_domain is None or bank_domain[m] == domain[i]]
        rows = bank
    return sorted(((loop_dot(u[i], rows[m]), m) for m in allowed), key=lambda pair: (-pair[0], pair[1]))[:k]


def loop_psd(z, tau, k=1, lam=None, ids=None, domain=None, bank=None, bank_ids=None, bank_domain=None, normalize=True):
    """(rows, lse, [[(similarity, column)]])"""
    u = loop_unit(z, normalize)
    b = None if bank is None else loop_unit(bank, normalize)
    lam = [1.0] * len(u) if lam is None else lam
    rows, lses, chosen = [], [], []
    for i in range(len(u)):
        lses.append(loop_lse(u, i, tau))
        chosen.append(loop_neighbors(u, i, k, ids, domain, b, bank_ids, bank_domain))
        weighted = [(1.0, loop_dot(u[i], u[v]) / tau) for v in loop_views(i, len(u), ids)]
        weighted += [(float(lam[i]), s / tau) for s, _ in chosen[-1]]
        rows.append(loop_loss(lses[-1], weighted))
    return rows, lses, chosen


def loop_nt_xent(z, tau, ids=None, normalize=True):
    return loop_psd(z, tau, lam=[0.0] * len(z), ids=ids, normalize=normalize)[:2]


def loop_supcon(z, labels, tau, normalize=True):
    u = loop_unit(z, normalize)
    rows, lses = [], []
    for i in range(len(u)):
        lses.append(loop_lse(u, i, tau))
        same = [j for j in range(len(u)) if j != i and labels[j] == labels[i]]
        rows.append(loop_loss(lses[-1], [(1.0, loop_dot(u[i], u[j]) / tau) for j in same]))
    return rows, lses


def make(n=N, d=D):
    return torch.randn(n, d, dtype=torch.float64, requires_grad=True)


def assert_same(actual, expected):
    expected = torch.tensor(np.asarray(expected), dtype=torch.float64)
    torch.testing.assert_close(actual.detach(), expected, rtol=1e-10, atol=1e-12)


IDS = {
    "default": None,
    "multi-crop": torch.tensor([4, 4, 4, 9, 9, -1, -1, 4]),  # four, two and two views of an image, any integers
    "lonely": torch.tensor([0, 0, 1, 2, 3, 3, 4, 5]),  # four rows have no other view
    "none": torch.arange(N),  # no row has a positive
    "one image": torch.zeros(N, dtype=torch.long),  # no row is outside the instance
}
DOMAIN = torch.tensor([0, 1, 0, 0, 0, 1, 1, 0])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_nt_xent_is_the_loop(ids, normalize):
    z = make()
    rows, lse = loop_nt_xent(z.tolist(), TAU, ids, normalize)
    actual, actual_lse = ltood_fast.nt_xent(
        z, TAU, instance_ids=ids, normalize=normalize, reduction="none", return_lse=True, backend="reference"
    )
    assert_same(actual, rows)
    assert_same(actual_lse, lse)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "labels",
    [torch.tensor([3, 3, 3, -7, 0, 0, 1, 3]), torch.zeros(N, dtype=torch.long), torch.arange(N)],
    ids=["some alone", "one class", "all alone"],
)
def test_supcon_is_the_loop(labels, normalize):
    z = make()
    rows, lse = loop_supcon(z.tolist(), labels.tolist(), TAU, normalize)
    for function in (ltood_fast.supcon, ltood_fast.domain_loss):
        actual, actual_lse = function(
            z, labels, TAU, normalize=normalize, reduction="none", return_lse=True, backend="reference"
        )
        assert_same(actual, rows)
        assert_same(actual_lse, lse)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [1, 3, N - 1])
@pytest.mark.parametrize("with_domain", [False, True])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_psd_in_the_batch_is_the_loop(ids, with_domain, k, normalize):
    z, lam = make(), torch.rand(N, dtype=torch.float64)
    lam[2] = 0
    domain = DOMAIN if with_domain else None
    rows, _, chosen = loop_psd(z.tolist(), TAU, k, lam.tolist(), ids, domain, normalize=normalize)
    actual, cosines, columns = ltood_fast.psd_loss(
        z,
        TAU,
        k=k,
        neighbor_weight=lam,
        domain=domain,
        instance_ids=ids,
        normalize=normalize,
        reduction="none",
        return_neighbors=True,
        backend="reference",
    )
    assert_same(actual, rows)
    for row in range(N):
        padding = k - len(chosen[row])
        assert columns[row].tolist() == [m for _, m in chosen[row]] + [-1] * padding
        assert_same(cosines[row], [s for s, _ in chosen[row]] + [-math.inf] * padding)
    assert not cosines.requires_grad


@pytest.mark.parametrize("with_bank_domain", [False, True])
@pytest.mark.parametrize("with_bank_ids", [False, True])
@pytest.mark.parametrize("k", [1, 2, Q])
def test_psd_with_a_bank_is_the_loop(k, with_bank_ids, with_bank_domain):
    z, bank = make(), torch.randn(Q, D, dtype=torch.float64)
    ids = IDS["multi-crop"]
    bank_ids = torch.tensor([4, 4, 1, 2, 9]) if with_bank_ids else None
    bank_domain = torch.tensor([1, 1, 1, 0, 1]) if with_bank_domain else None
    rows, lse, chosen = loop_psd(z.tolist(), TAU, k, None, ids, DOMAIN, bank.tolist(), bank_ids, bank_domain)
    actual, actual_lse, _, columns = ltood_fast.psd_loss(
        z,
        TAU,
        k=k,
        bank=Bank(bank, bank_ids, bank_domain),
        domain=DOMAIN,
        instance_ids=ids,
        reduction="none",
        return_lse=True,
        return_neighbors=True,
        backend="reference",
    )
    assert_same(actual, rows)
    assert_same(actual_lse, lse)
    assert [[m for m in row if m >= 0] for row in columns.tolist()] == [[m for _, m in row] for row in chosen]


def test_equal_neighbours_go_to_the_lower_index():
    z = torch.tensor([[1.0, 0], [0, 1], [0, 1], [1, 0], [0, 1], [1, 0]], dtype=torch.float64)
    *_, columns = ltood_fast.psd_loss(z, k=2, instance_ids=torch.arange(6), return_neighbors=True, backend="reference")
    assert columns.tolist() == [[3, 5], [2, 4], [1, 4], [0, 5], [1, 2], [0, 3]]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("same_domain", [True, False])
def test_stage1_is_the_loop(same_domain, reduction):
    z, alpha = make(), 0.7
    ids = IDS["lonely"]
    domain = torch.tensor([0, 0, 0, 5, 0, 0, 0, 0])  # row 3: no view, no neighbour in its domain, alone in its class
    neighbor_domain = domain if same_domain else None
    psd, lse, _ = loop_psd(z.tolist(), TAU, 2, [0.5] * N, ids, neighbor_domain)
    separation, _ = loop_supcon(z.tolist(), domain.tolist(), TAU)
    psd, separation = np.array(psd), np.array(separation)
    if reduction == "mean":
        psd, separation = psd.sum() / (N - same_domain), separation.sum() / (N - 1)
    elif reduction == "sum":
        psd, separation = psd.sum(), separation.sum()
    result, actual_lse = ltood_fast.stage1_loss(
        z,
        domain,
        TAU,
        alpha=alpha,
        k=2,
        neighbor_weight=0.5,
        same_domain=same_domain,
        instance_ids=ids,
        reduction=reduction,
        return_lse=True,
        backend="reference",
    )
    assert_same(result.psd, psd)
    assert_same(result.domain, separation)
    assert_same(result.total, psd + alpha * separation)
    assert_same(actual_lse, lse)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_domain_bce_is_the_loop(reduction):
    z, weight, bias = make(), torch.randn(D, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    rows = []
    for u, y in zip(loop_unit(z.tolist(), True), DOMAIN.tolist(), strict=True):
        p = 1 / (1 + math.exp(-(loop_dot(u, weight.tolist()) + float(bias))))
        rows.append(-math.log(p if y else 1 - p))
    expected = {"mean": np.mean(rows), "sum": np.sum(rows), "none": rows}[reduction]
    assert_same(ltood_fast.domain_loss(z, DOMAIN, kind="bce", weight=weight, bias=bias, reduction=reduction), expected)


def test_mean_counts_only_the_rows_that_have_a_positive():
    z = make()
    rows, _ = loop_nt_xent(z.tolist(), TAU, IDS["lonely"])
    actual = ltood_fast.nt_xent(z, TAU, instance_ids=IDS["lonely"], backend="reference")
    assert_same(actual, sum(rows) / 4)


LOSSES = {
    "nt_xent": lambda z, tau: reference.nt_xent(z, tau),
    "nt_xent lse": lambda z, tau: reference.nt_xent(z, tau, instance_ids=IDS["lonely"], return_lse=True)[1],
    "raw": lambda z, tau: reference.nt_xent(z, tau, normalize=False),
    "supcon": lambda z, tau: reference.supcon(z, torch.tensor([3, 3, 3, 7, 0, 0, 1, 3]), tau),
    "psd": lambda z, tau: reference.psd_loss(z, tau, k=2, domain=DOMAIN, neighbor_weight=0.5, reduction="none"),
    "bank": lambda z, tau: reference.psd_loss(z, tau, k=2, bank=torch.eye(D, dtype=torch.float64) + 0.1),
    "stage1": lambda z, tau: reference.stage1_loss(z, DOMAIN, tau, reduction="sum").total,
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_gradients_of_embeddings_and_temperature(loss):
    temperature = torch.tensor(TAU, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (make(), temperature))


def test_bank_and_weights_get_no_gradient():
    z, bank, lam = make(), make(Q), torch.rand(N, dtype=torch.float64, requires_grad=True)
    ltood_fast.psd_loss(z, bank=bank, neighbor_weight=lam, backend="reference").backward()
    assert bank.grad is None
    assert lam.grad is None
    assert z.grad.abs().sum() > 0


def test_head_of_bce_gets_its_gradient():
    z, weight, bias = make(), torch.randn(D, dtype=torch.float64, requires_grad=True), torch.tensor(0.1).double()
    bias.requires_grad_()
    call = lambda z, w, b: ltood_fast.domain_loss(z, DOMAIN, kind="bce", weight=w, bias=b)  # noqa: E731
    assert torch.autograd.gradcheck(call, (z, weight, bias))


@pytest.mark.parametrize("n", [1, 2])  # the smallest batches: no other row at all, and nothing but a negative
def test_no_positive_at_all_is_a_zero_loss_with_a_zero_gradient(n):
    alone, zeros = torch.arange(n), torch.zeros(n).long()
    foreign = {"bank": Bank(torch.randn(n, D), domain=zeros + 1), "domain": zeros}
    for loss in (
        lambda z: ltood_fast.nt_xent(z, instance_ids=alone, backend="reference"),
        lambda z: ltood_fast.supcon(z, alone, backend="reference"),
        lambda z: ltood_fast.psd_loss(z, instance_ids=alone, **foreign, backend="reference"),
    ):
        z = make(n)
        value = loss(z)
        value.backward()
        assert value == 0
        assert torch.equal(z.grad, torch.zeros_like(z))


def test_two_views_alone_have_lse_equal_to_their_similarity():
    loss, lse, cosines, columns = ltood_fast.psd_loss(
        make(2), TAU, return_lse=True, return_neighbors=True, backend="reference"
    )
    assert loss == 0
    assert lse[0] == lse[1]
    assert columns.tolist() == [[-1], [-1]]
    assert cosines.tolist() == [[-math.inf], [-math.inf]]


def test_zero_rows_are_orthogonal_to_all():
    z = make().detach()
    z[[1, 5]] = 0
    z.requires_grad_()
    assert_same(ltood_fast.nt_xent(z, TAU, reduction="none", backend="reference"), loop_nt_xent(z.tolist(), TAU)[0])
    ltood_fast.nt_xent(z, TAU, backend="reference").backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_rows_make_the_loss_non_finite(bad):
    z = make().detach()
    z[3, 1] = bad
    for value in (
        ltood_fast.nt_xent(z, backend="reference"),
        ltood_fast.supcon(z, DOMAIN, backend="reference"),
        ltood_fast.stage1_loss(z, DOMAIN, backend="reference").total,
    ):
        assert not value.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_and_half_types_give_a_float32_loss(dtype):
    z = make().to(dtype)
    expected = ltood_fast.stage1_loss(z.double(), DOMAIN, TAU, backend="reference").total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = ltood_fast.stage1_loss(z, DOMAIN, TAU, backend="reference").total
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)


def z32(n=N, d=D):
    return torch.randn(n, d)


ids64 = torch.arange(N) % 4
BAD = {
    "z is no tensor": (lambda: ltood_fast.nt_xent([[1.0]]), TypeError, "nt_xent: z must be a tensor, got list"),
    "z is integer": (lambda: ltood_fast.supcon(z32().long(), ids64), TypeError, "supcon: z must be float64, float32"),
    "z is a vector": (lambda: ltood_fast.nt_xent(torch.randn(4)), ValueError, r"z must be a matrix \[N, D\]"),
    "no rows": (lambda: ltood_fast.nt_xent(z32(0)), ValueError, r"z must be non-empty, got shape \(0, 3\)"),
    "no columns": (lambda: ltood_fast.nt_xent(z32(4, 0)), ValueError, r"z must be non-empty, got shape \(4, 0\)"),
    "odd": (lambda: ltood_fast.nt_xent(z32(3)), ValueError, "nt_xent: instance_ids must be given when .* None for 3"),
    "tau zero": (lambda: ltood_fast.nt_xent(z32(), 0.0), ValueError, "temperature must be positive and finite, got 0"),
    "tau tensor": (
        lambda: ltood_fast.nt_xent(z32(), torch.tensor([0.1, 0.2])),
        ValueError,
        r"temperature must be a float or a float tensor of one element, got torch.float32 of shape \(2,\)",
    ),
    "tau negative tensor": (
        lambda: ltood_fast.nt_xent(z32(), torch.tensor(-0.5)),
        ValueError,
        "temperature must be positive and finite, got -0.5",
    ),
    "tau elsewhere": (
        lambda: ltood_fast.nt_xent(z32(), torch.tensor(0.5, device="meta")),
        ValueError,
        "temperature must be on cpu, the device of z, got meta",
    ),
    "reduction": (lambda: ltood_fast.nt_xent(z32(), reduction="avg"), ValueError, "reduction must be one of mean, sum"),
    "backend": (lambda: ltood_fast.nt_xent(z32(), backend="gpu"), ValueError, "backend must be one of auto, reference"),
    "ids length": (
        lambda: ltood_fast.nt_xent(z32(), instance_ids=ids64[:5]),
        ValueError,
        r"instance_ids must be of shape \[8\], got shape \(5,\)",
    ),
    "ids float": (
        lambda: ltood_fast.nt_xent(z32(), instance_ids=ids64.float()),
        TypeError,
        "instance_ids must be an integer tensor, got torch.float32",
    ),
    "ids elsewhere": (
        lambda: ltood_fast.nt_xent(z32(), instance_ids=ids64.to("meta")),
        ValueError,
        "instance_ids must be on cpu, the device of the embeddings, got meta",
    ),
    "labels missing": (lambda: ltood_fast.supcon(z32(), None), TypeError, "labels must be an integer or bool tensor"),
    "k zero": (lambda: ltood_fast.psd_loss(z32(), k=0), ValueError, r"psd_loss: k must be in \[1, 7\], got 0"),
    "k of N": (lambda: ltood_fast.psd_loss(z32(), k=8), ValueError, r"psd_loss: k must be in \[1, 7\], got 8"),
    "k float": (lambda: ltood_fast.psd_loss(z32(), k=1.0), TypeError, "k must be an int, got float"),
    "k of bank": (lambda: ltood_fast.psd_loss(z32(), k=6, bank=z32(5)), ValueError, r"k must be in \[1, 5\], got 6"),
    "one row": (
        lambda: ltood_fast.psd_loss(z32(1), instance_ids=torch.zeros(1).int()),
        ValueError,
        "psd_loss: z must be at least 2 rows, to find neighbours in the batch, got 1 row",
    ),
    "bank width": (lambda: ltood_fast.psd_loss(z32(), bank=z32(5, 4)), ValueError, "bank must be 3 wide as z is"),
    "bank empty": (lambda: ltood_fast.psd_loss(z32(), bank=z32(0)), ValueError, "bank must be non-empty"),
    "bank ids alone": (
        lambda: ltood_fast.psd_loss(z32(), bank=Bank(z32(5), ids64[:5])),
        ValueError,
        "psd_loss: instance_ids must be given with bank.ids",
    ),
    "bank ids without rows": (
        lambda: ltood_fast.psd_loss(z32(), bank=Bank(None, ids64[:5])),
        TypeError,
        "psd_loss: bank must be a tensor, got NoneType",
    ),
    "bank domain alone": (
        lambda: ltood_fast.psd_loss(z32(), bank=Bank(z32(5), domain=ids64[:5])),
        ValueError,
        "bank.domain must be None unless neighbours are restricted",
    ),
    "bank domain, any domain": (
        lambda: ltood_fast.stage1_loss(z32(), DOMAIN, same_domain=False, bank=Bank(z32(5), domain=ids64[:5])),
        ValueError,
        "stage1_loss: bank.domain must be None unless",
    ),
    "weight negative": (
        lambda: ltood_fast.psd_loss(z32(), neighbor_weight=-1.0),
        ValueError,
        "neighbor_weight must be non-negative and finite, got -1",
    ),
    "a weight negative": (
        lambda: ltood_fast.psd_loss(z32(), neighbor_weight=torch.tensor([1.0, -2] * 4)),
        ValueError,
        r"neighbor_weight must be non-negative and finite, got \[-2.0, 1.0\]",
    ),
    "weight integer": (
        lambda: ltood_fast.psd_loss(z32(), neighbor_weight=ids64),
        TypeError,
        "neighbor_weight must be a number or a float tensor, got torch.int64",
    ),
    "weight shape": (
        lambda: ltood_fast.psd_loss(z32(), neighbor_weight=torch.ones(3)),
        ValueError,
        r"neighbor_weight must be a number or of shape \[8\]",
    ),
    "domain length": (lambda: ltood_fast.stage1_loss(z32(), DOMAIN[:3]), ValueError, r"domain must be of shape \[8\]"),
    "alpha": (
        lambda: ltood_fast.stage1_loss(z32(), DOMAIN, alpha=-0.1),
        ValueError,
        "stage1_loss: alpha must be non-negative and finite, got -0.1",
    ),
    "kind": (lambda: ltood_fast.domain_loss(z32(), DOMAIN, kind="mmd"), ValueError, "kind must be one of supcon, bce"),
    "head missing": (
        lambda: ltood_fast.domain_loss(z32(), DOMAIN, kind="bce"),
        TypeError,
        r"weight must be a float tensor of shape \[3\] for kind='bce', got NoneType",
    ),
    "head shape": (
        lambda: ltood_fast.domain_loss(z32(), DOMAIN, kind="bce", weight=torch.ones(3), bias=torch.ones(1)),
        ValueError,
        r"bias must be a float tensor of shape \[\] for kind='bce', got shape \(1,\)",
    ),
    "head unused": (
        lambda: ltood_fast.domain_loss(z32(), DOMAIN, weight=torch.ones(3)),
        ValueError,
        "weight must be None for kind='supcon'",
    ),
    "bce domain": (
        lambda: ltood_fast.domain_loss(z32(), DOMAIN + 1, kind="bce", weight=torch.ones(3), bias=torch.tensor(0.0)),
        ValueError,
        r"domain must be in \[0, 2\), got \[1, 2\]",
    ),
    "bce lse": (
        lambda: losses.DomainLoss(kind="bce", dim=D, return_lse=True)(z32(), DOMAIN),
        ValueError,
        "return_lse must be False for kind='bce'",
    ),
    "module tau": (lambda: losses.NTXentLoss(-1), ValueError, "NTXentLoss: temperature must be positive and finite"),
    "module reduction": (lambda: losses.SupConLoss(reduction="max"), ValueError, "SupConLoss: reduction must be one"),
    "module backend": (lambda: losses.NTXentLoss(backend="tpu"), ValueError, "NTXentLoss: backend must be one of"),
    "module k": (lambda: losses.PSDLoss(k=0), ValueError, "PSDLoss: k must be at least 1, got 0"),
    "module weight": (lambda: losses.Stage1Loss(neighbor_weight=-1), ValueError, "Stage1Loss: neighbor_weight must be"),
    "module alpha": (lambda: losses.Stage1Loss(alpha=-1), ValueError, "Stage1Loss: alpha must be non-negative"),
    "module dim missing": (lambda: losses.DomainLoss(kind="bce"), ValueError, "DomainLoss: dim must be given for"),
    "module dim unused": (lambda: losses.DomainLoss(dim=3), ValueError, "DomainLoss: dim must be None for kind='sup"),
    "module kind": (lambda: losses.DomainLoss(kind="mmd"), ValueError, "DomainLoss: kind must be one of supcon, bce"),
}


@pytest.mark.parametrize(("call", "error", "sentence"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_told_in_one_sentence(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


def test_modules_call_their_functions():
    z, bank, ids = z32(), z32(Q), IDS["lonely"]
    lam = torch.rand(N)
    pairs = [
        (losses.NTXentLoss(0.4)(z, ids), ltood_fast.nt_xent(z, 0.4, instance_ids=ids)),
        (losses.SupConLoss(0.4, reduction="sum")(z, ids), ltood_fast.supcon(z, ids, 0.4, reduction="sum")),
        (losses.DomainLoss(0.4, normalize=False)(z, DOMAIN), ltood_fast.domain_loss(z, DOMAIN, 0.4, normalize=False)),
        (losses.PSDLoss(k=3)(z, bank=bank, domain=DOMAIN), ltood_fast.psd_loss(z, k=3, bank=bank, domain=DOMAIN)),
        (
            losses.PSDLoss(neighbor_weight=0.5)(z, neighbor_weight=lam),
            ltood_fast.psd_loss(z, neighbor_weight=lam),
        ),
        (
            losses.Stage1Loss(alpha=0.9, k=2, neighbor_weight=0.5, same_domain=False)(z, DOMAIN).total,
            ltood_fast.stage1_loss(z, DOMAIN, alpha=0.9, k=2, neighbor_weight=0.5, same_domain=False).total,
        ),
    ]
    for actual, expected in pairs:
        assert torch.equal(actual, expected)


def test_module_learns_its_temperature_and_its_head():
    temperature = torch.nn.Parameter(torch.tensor(0.3))
    loss = losses.NTXentLoss(temperature)
    assert [name for name, _ in loss.named_parameters()] == ["temperature"]
    loss(z32()).backward()
    assert temperature.grad != 0
    head = losses.DomainLoss(kind="bce", dim=D)
    assert {name: p.shape for name, p in head.named_parameters()} == {"weight": (D,), "bias": ()}
    head(z32(), DOMAIN).backward()
    assert head.weight.grad.abs().sum() > 0
    assert head.bias.grad != 0


def test_module_shows_its_hyper_parameters():
    shown = repr(losses.Stage1Loss(0.1, alpha=0.5, k=4))
    assert "temperature=0.1" in shown
    assert "alpha=0.5" in shown
    assert "k=4" in shown
    assert "parameter 0.3" in repr(losses.NTXentLoss(torch.nn.Parameter(torch.tensor(0.3))))

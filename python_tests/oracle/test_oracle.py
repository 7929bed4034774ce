"""The oracle itself: gradients against differences of its losses, losses against 60-digit sums, ties, the judge."""

from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch

from python_tests.ops.op_table import OPS, sample, truth
from python_tests.oracle import clusters, contrastive, guided
from python_tests.oracle.arithmetic import EXACT, Rounded, Rows, best_first, lse_weights, row_weights, wide
from python_tests.oracle.judge import compare

mpmath.mp.dps = 60
CASES = [
    pytest.param(op, variant, id=f"{op.name}, {variant.why}")
    for op in OPS.values()
    for variant in op.variants
    if op.differentiable
]


def objective(found):
    """What the closed-form gradients are of."""
    loss = found["loss"]
    total = (loss * row_weights(len(loss))).sum() if loss.ndim else loss
    return total + (found["lse"] * lse_weights(found["lse"].shape[-1])).sum() if "lse" in found else total


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(
    ("op", "variant", "normalize"),
    [
        pytest.param(*case.values, n, id=f"{case.id}, normalize={n}")
        for case in CASES
        for n in ((True, False) if case.values[0].normalize is not None else (True,))
    ],
)
def test_gradients_are_differences_of_losses(op, variant, normalize, reduction):
    options = {"reduction": reduction, **({"normalize": normalize} if op.normalize is not None else {})}
    case = sample(op, variant, 7, 3, torch.float64, 0, **options)
    exact = truth(op, case)
    for name in set(op.differentiable) & case.tensors.keys():
        x, h = case.tensors[name], 2.0**-14
        for place in np.ndindex(*x.shape):
            ends = []
            for step in (-2 * h, -h, h, 2 * h):
                moved = x.clone()
                moved[place] += step
                tensors = {**case.tensors, name: moved}
                ends.append(objective(truth(op, type(case)(tensors, frozen_targets(op, case)))))
            slope = (ends[0] - 8 * ends[1] + 8 * ends[2] - ends[3]) / (12 * wide(h))
            assert abs(slope - exact[f"grad {name}"][place]) < 1e-10, (name, place)


def frozen_targets(op, case):
    """Options under which a difference sees what the gradient sees: targets and the teacher's temperature are fixed."""
    if op.name == "cluster_kl":
        return {**case.options, "target": clusters.target(**chosen(case, "z", "centroids", "nu", "normalize"))}
    if case.options.get("pairing") == "cross" and "bank" not in case.tensors:
        return {**case.options, "targets": case.tensors["z"].clone()}
    if op.name in ("relational_distill", "stage2_loss"):
        return {"teacher_temperature": float(case.tensors["temperature"]), **case.options}
    return case.options


def chosen(case, *names):
    given = {**case.tensors, **case.options}
    return {name: given[name] for name in names if name in given}


def exactly(x):
    return [[mpmath.mpf(Fraction(float(v)).numerator) / Fraction(float(v)).denominator for v in row] for row in x]


def unit(rows):
    return [[v / mpmath.sqrt(sum(w * w for w in row)) for v in row] for row in rows]


def dot(a, b):
    return sum(p * q for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e300])
def test_nt_xent_has_sixty_digit_value(scale):
    """At temperature 0.05 with views that all but agree, for rows of any length."""
    z = torch.randn(4, 6, dtype=torch.float64)
    z = torch.cat([z, z + 1e-3 * torch.randn(4, 6, dtype=torch.float64)]) * scale
    u = unit(exactly(z))
    rows = []
    for i in range(8):
        s = [dot(u[i], u[j]) / mpmath.mpf(0.05) for j in range(8)]
        rows.append(mpmath.log(sum(mpmath.exp(s[j]) for j in range(8) if j != i)) - s[(i + 4) % 8])
    found = contrastive.nt_xent(z, 0.05, reduction="none")["loss"]
    for actual, expected in zip(found, rows, strict=True):
        assert abs(mpmath.mpf(str(actual)) - expected) <= 1e-16 + 1e-15 * abs(expected)


def test_cluster_kl_has_sixty_digit_value():
    """Rows 1e20 from the centroids: squares of 1e40."""
    z, mu = 1e20 * torch.randn(5, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    rows, centers = exactly(z), exactly(mu)
    q = [[1 / (1 + sum((a - b) ** 2 for a, b in zip(x, c, strict=True))) for c in centers] for x in rows]
    q = [[v / sum(row) for v in row] for row in q]
    mass = [sum(row[j] for row in q) for j in range(3)]
    p = [[v * v / f for v, f in zip(row, mass, strict=True)] for row in q]
    p = [[v / sum(row) for v in row] for row in p]
    loss = sum(a * mpmath.log(a / b) for ps, qs in zip(p, q, strict=True) for a, b in zip(ps, qs, strict=True)) / 5
    # the terms are near 0.3 and cancel to the 18th digit
    assert abs(mpmath.mpf(str(clusters.cluster_kl(z, mu)["loss"])) - loss) < 1e-17


def test_relational_distill_has_sixty_digit_value():
    z, e = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    s, t = unit(exactly(z)), unit(exactly(e))
    total = mpmath.mpf(0)
    for i in range(6):
        a = {j: mpmath.exp(dot(t[i], t[j]) / mpmath.mpf(0.25)) for j in range(6) if j != i}
        b = {j: mpmath.exp(dot(s[i], s[j]) / mpmath.mpf(0.5)) for j in range(6) if j != i}
        a, b = ({j: v / sum(x.values()) for j, v in x.items()} for x in (a, b))
        total += sum(a[j] * mpmath.log(a[j] / b[j]) for j in a) / 6
    found = guided.relational_distill(z, e, 0.5, teacher_temperature=0.25)["loss"]
    assert abs(mpmath.mpf(str(found)) / total - 1) < 1e-16


def test_ties_that_no_float_sees_go_to_lower_index():
    """Equal rows, multiples of three of a row, and a row with its features in another order have one exact cosine."""
    x = torch.tensor([[1.0, 1.0], [3.0, 1.0], [1.0, 3.0], [9.0, 3.0], [3.0, 1.0]], dtype=torch.float64)
    rows = Rows.of(x, True, EXACT)
    others = ~np.eye(5, dtype=bool)
    assert best_first(rows, rows, others, 4)[0].tolist() == [1, 2, 3, 4]
    assert best_first(rows, rows, others, 3)[1].tolist() == [3, 4, 0]


def test_disturbed_rows_that_were_equal_stay_equal():
    x = wide(torch.randn(3, 4, dtype=torch.float64))[[0, 1, 0, 2, 1]]
    moved = Rounded(1e-3, 0).rows(x)
    assert np.array_equal(moved[0], moved[2])
    assert np.array_equal(moved[1], moved[4])
    assert 0 < abs(moved / x - 1).max() <= 1e-3


@pytest.mark.parametrize(
    ("actual", "exact", "wrong"),
    [
        ([1.0, 2.0], [1.0, 2.0 + 1e-6], False),
        ([1.0, 2.0], [1.0, 2.0 + 1e-4], True),
        ([1.0, 2.0], [1.0, np.nan], True),
        ([1.0, np.nan], [1.0, 2.0], True),
        ([np.inf, 2.0], [1e39, 2.0], False),
        ([0.0, 0.0], [0.0, 1e-39], False),
        ([0.0, 0.0], [0.0, 1e-30], True),
    ],
)
def test_judge_tells_right_from_wrong(actual, exact, wrong):
    truths = [wide(np.array(exact, dtype=np.longdouble))] * 4
    found = compare("loss", torch.tensor(actual), truths, torch.float32, unit=wide(1.0), finite=True)
    assert bool(found) == wrong, found

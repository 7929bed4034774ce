"""Every op of the table against the oracle: shapes, dtypes, layouts, magnitudes, ties, NaN, empty and single rows."""

import pytest
import torch

from ltood_fast import Distill
from python_tests.ops.op_table import (
    DTYPES,
    OPS,
    REFUSALS,
    at_magnitude,
    call,
    changed,
    disagreement,
    named_outputs,
    run,
    sample,
    truth,
)
from python_tests.oracle.arithmetic import wide

CASES = [pytest.param(op, v, id=f"{op.name}, {v.why}") for op in OPS.values() for v in op.variants]


def is_steady(op, variant):
    """Whether differences of the loss are its gradient: not where a target without gradient moves with z."""
    moves = op.name == "cluster_kl" or (variant.options.get("pairing") == "cross" and "bank" not in variant.tensors)
    return op.differentiable and not moves


NORMALIZED = [  # both ways where the op has the choice
    pytest.param(*case.values, n, id=f"{case.id}, normalize={n}")
    for case in CASES
    for n in ((True, False) if case.values[0].normalize is not None else (True,))
]
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)

SHAPES = {
    "the smallest batch with a pair, one feature": (2, 1),
    "odd, fewer rows and features than a vector": (3, 2),
    "just above a vector of floats": (17, 3),
    "several tiles of features": (40, 70),
}
LAYOUTS = {
    "columns first": lambda x: x.t().contiguous().t(),
    "every second row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "every second column": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "columns of a wider matrix": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "from the second number of a buffer": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    "one row expanded": lambda x: x[:1].expand(len(x), -1),
}
# Rows below the eps of 1e-12 have cosines of (norm / eps)^2, which underflow a float32 from 1e-30 on. The largest rows
# have a norm that the dtype holds.
MAGNITUDES = {
    torch.float64: (1e-30, 1e-13, 1e8, 1e30, 1e160, 4e307),
    torch.float32: (1e-20, 1e-13, 1e4, 1e10, 1e15, 1e19, 1e30, 1e38),
    torch.bfloat16: (1e-20, 1e-13, 1e4, 1e10, 1e19, 1e30, 1e38),
    torch.float16: (6e-8, 1e-6, 1e-4, 1e2, 1e4, 65504.0),
}
# Squared distances, and the inner products that knn returns of rows as given, have to fit the type: docs/numerics.md.
LARGEST = {torch.float64: 1e100, torch.float32: 1e15, torch.bfloat16: 1e15, torch.float16: 65504.0}


def magnitudes(op, dtype, normalize):
    bounded = op.name.startswith(("cluster_kl", "refine_centroids")) or (op.name.startswith("knn") and not normalize)
    return [m for m in MAGNITUDES[dtype] if not bounded or m <= LARGEST[dtype]]


def options(op, **given):
    """Those of the options that the op has."""
    missing = {"reduction"} if not op.reduction else set()
    missing |= {"normalize"} if op.normalize is None else set()
    return {name: value for name, value in {"reduction": "none", **given}.items() if name not in missing}


def disagreement_or_refusal(op, case, says):
    """The verdict, where an error of this op that says so is right too."""
    try:
        return disagreement(op, case)
    except ValueError as refusal:
        text = str(refusal)
        return "" if text.startswith(f"{op.name.split()[0]}: ") and says in text else text


@ALL_DTYPES
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(("op", "variant"), CASES)
def test_right_in_every_shape_and_dtype(op, variant, shape, dtype):
    for reduction in ("none", "mean", "sum") if op.reduction else ("none",):
        case = sample(op, variant, *shape, dtype, seed=0, **options(op, reduction=reduction))
        wrong = disagreement(op, case)
        assert not wrong, reduction


@pytest.mark.parametrize("tau", [0.005, 0.02, 0.07, 100.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("op", "variant"), [case for case in CASES if "temperature" in case.values[0].tensors])
def test_right_for_converged_views(op, variant, dtype, tau):
    """Two views that all but agree: the loss of nt_xent falls to 1e-3 and below, and differences show."""
    case = sample(op, variant, 40, 32, dtype, seed=1, tau=tau, **options(op))
    case = changed(case, op.rows[0], lambda z: _near(case, z))
    wrong = disagreement(op, case)
    assert not wrong


def _near(case, rows):
    """Rows near their positives."""
    if "positive_key" not in case.tensors:
        return rows[:20].repeat(2, 1) + 0.1 * rows
    positive = case.tensors["positive_key"]
    return positive[case.tensors.get("target", torch.arange(40))] + 0.1 * rows


@pytest.mark.parametrize(("tau", "noise"), [(0.01, 1.0), (0.02, 0.9), (0.05, 0.8), (0.07, 0.6)])
def test_no_worse_than_float32_cross_entropy(tau, noise):
    """The judge allows what rounding explains; here no more is allowed than torch loses on the same rows, or than one
    rounding of the largest similarity, 1 / tau, to float32 moves the loss by.
    The true losses are 3e-3 to 1e-2: those of converged batches."""
    op = OPS["nt_xent"]
    case = sample(op, op.variants[0], 64, 32, torch.float32, seed=9, tau=tau, reduction="mean")
    case = changed(case, "z", lambda z: z[:32].repeat(2, 1) + noise * z)
    exact, found = truth(op, case), run(op, case)
    z = case.tensors["z"].detach().requires_grad_()
    u = torch.nn.functional.normalize(z, dim=1)
    s = (u @ u.T / tau).fill_diagonal_(-torch.inf)
    loss = torch.nn.functional.cross_entropy(s, torch.arange(64).roll(32))
    theirs = {"loss": loss, "grad z": torch.autograd.grad(loss, z)[0]}
    for name, value in theirs.items():
        size = abs(exact[name]).max()
        ours, torchs = (abs(wide(x) - exact[name]).max() / size for x in (found[name], value))
        assert ours <= max(2 * torchs, 2e-6), f"{name}: {float(ours):.1e}, cross_entropy {float(torchs):.1e}"


@pytest.mark.parametrize(("op", "variant", "normalize"), [case for case in NORMALIZED if is_steady(*case.values[:2])])
def test_gradcheck(op, variant, normalize):
    """cluster_kl and pairs across views are left to the oracle: a difference sees their targets move, which have no
    gradient."""
    case = sample(op, variant, 6, 3, torch.float64, seed=2, **options(op, normalize=normalize))
    if op.name == "relational_distill":
        case.options.setdefault("teacher_temperature", 0.2)
    elif op.name == "stage2_loss" and "distill" not in case.options:
        case.options["distill"] = Distill("relational", 0.2)
    named = [name for name in op.differentiable if name in case.tensors]
    leaves = [case.tensors[name].requires_grad_() for name in named]

    def losses(*values):
        tensors = {**case.tensors, **dict(zip(named, values, strict=True))}
        moved = type(case)(tensors, case.options)
        found = named_outputs(op, moved, call(op, moved))
        return found["loss"]

    assert torch.autograd.gradcheck(losses, leaves)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize(("op", "variant"), CASES)
def test_right_in_every_layout(op, variant, layout):
    case = sample(op, variant, 18, 12, torch.float32, seed=3, **options(op))
    for name in op.rows:
        if name in case.tensors:
            case = changed(case, name, layout)
    wrong = disagreement(op, case)
    assert not wrong


@pytest.mark.parametrize("who", ["all rows", "one row"])
@ALL_DTYPES
@pytest.mark.parametrize(("op", "variant", "normalize"), NORMALIZED)
def test_right_at_every_magnitude(op, variant, dtype, normalize, who):
    """Rows as given may be refused at a norm that cannot be handled, with a sentence that names the op."""
    case = sample(op, variant, 12, 5, dtype, seed=4, **options(op, normalize=normalize))
    wrong = []
    for largest in magnitudes(op, dtype, normalize):
        for name in op.rows:
            if name not in case.tensors:
                continue
            rows = slice(None) if who == "all rows" else slice(1, 2)
            scaled = changed(case, name, lambda x, rows=rows, largest=largest: at_magnitude(x, largest, rows))
            found = disagreement(op, scaled) if normalize else disagreement_or_refusal(op, scaled, name)
            wrong += [f"{name} at {largest}: {found}"] * bool(found)
    assert not wrong, "\n".join(wrong)


@ALL_DTYPES
@pytest.mark.parametrize(("op", "variant", "normalize"), NORMALIZED)
def test_right_with_ties(op, variant, dtype, normalize):
    """Among equal rows the lower index is the neighbour; the others are as far as their values say."""
    case = sample(op, variant, 34, 7, dtype, seed=5, **options(op, normalize=normalize))
    for name in op.rows:
        if name in case.tensors:
            case = changed(case, name, lambda x: x[torch.arange(len(x)) * 5 % min(len(x), 3)])
    wrong = disagreement(op, case)
    assert not wrong


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@ALL_DTYPES
@pytest.mark.parametrize(("op", "variant"), CASES)
def test_never_finite_where_nan_or_inf_came_in(op, variant, dtype, value):
    """A refusal names the row or says that the argument must be finite. Which losses a broken guide reaches is the
    reference's to say: it may choose that row as a neighbour, and forces of 1 do not read it."""
    for name in op.rows:
        if name == "guide" and op.name.startswith(("guided_contrastive", "stage2_loss")):
            continue
        case = sample(op, variant, 12, 5, dtype, seed=6, **options(op))
        if name not in case.tensors:
            continue
        case.tensors[name][1, 2] = value
        wrong = disagreement_or_refusal(op, case, "finite")
        assert not wrong, name


@ALL_DTYPES
@pytest.mark.parametrize(("op", "variant"), CASES)
def test_one_row_is_right_or_refused(op, variant, dtype):
    case = sample(op, variant, 1, 5, dtype, seed=7, **options(op))
    wrong = disagreement_or_refusal(op, case, "")
    assert not wrong


@pytest.mark.parametrize(("op", "variant"), CASES)
def test_no_rows_are_refused(op, variant):
    given = {"budget": 1} if op.name == "sample_ood" else {}
    case = sample(op, variant, 0, 5, torch.float32, seed=8, **options(op, **given))
    with pytest.raises(REFUSALS, match=rf"^{op.name.split()[0]}: .*non-empty"):
        call(op, case)

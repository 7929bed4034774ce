"""The CUDA kernels of the contrastive family, executed: losses, log-sum-exp, neighbours and gradients."""

import numpy as np
import pytest
import torch
from cuda_sim.contrastive_sim import Simulated
from tolerances import GRADIENT, LOSS, relative_error

from ltood_fast.reference import contrastive as reference

SOURCES = (
    "csrc/ops/contrastive/cuda/launch.cu",
    "csrc/ops/contrastive/cuda/sm90/launch.cu",
    "csrc/cuda/operand.cu",
    "csrc/cuda/segment_sums.cu",
)
TAU = 0.2


@pytest.fixture
def device(simulate):
    return lambda **options: simulate(*SOURCES, **{"seed": 1, "sm_count": 4, **options})


def tensor(x):
    return None if x is None else torch.as_tensor(np.asarray(x))


def expected(problem, z, tau):
    """Row losses of both parts, lse and neighbours as the reference has them, in float64."""
    o = problem.options
    shared = {"normalize": problem.normalize, "reduction": "none"}
    ids, bank = tensor(o.get("instance_ids")), o.get("bank")
    instance = classes = indices = None
    if o.get("views", True) and o.get("k", 0):
        lam = o.get("neighbor_weights", o.get("neighbor_weight", 1.0))
        instance, lse, _, indices = reference.psd_loss(
            z, tau, k=o["k"], neighbor_weight=lam if isinstance(lam, float) else tensor(lam), instance_ids=ids,
            domain=tensor(o.get("domain")), bank=None if bank is None else torch.from_numpy(problem.bank_rows),
            return_lse=True, return_neighbors=True, **shared,
        )  # fmt: skip
    elif o.get("views", True):
        instance, lse = reference.nt_xent(z, tau, instance_ids=ids, return_lse=True, **shared)
    if o.get("labels") is not None:
        classes, lse = reference.supcon(z, tensor(o["labels"]), tau, return_lse=True, **shared)
    return instance, classes, lse, indices


def check(problem, rng):
    """Forward and, for random weights on all outputs, backward against the reference."""
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[problem.kind]
    z = torch.from_numpy(problem.prepared.rows).requires_grad_()
    tau = torch.tensor(problem.temperature, dtype=torch.float64, requires_grad=True)
    instance, classes, lse, indices = expected(problem, z, tau)
    found = problem.forward()
    total = 0.0
    gradients = {}
    for name, ours, ref in zip(("instance", "class", "lse"), found[:3], (instance, classes, lse), strict=True):
        assert (ours is None) == (ref is None)
        if ref is None:
            continue
        error = relative_error(torch.from_numpy(ours), ref)
        assert error <= LOSS[kind], f"{name} off by {error:.1e}"
        gradients[f"grad_{name}"] = rng.standard_normal(len(ours))
        total = total + (ref * torch.from_numpy(gradients[f"grad_{name}"])).sum()
    if indices is not None:
        assert np.array_equal(found[3], indices.numpy())
    grad, grad_tau = problem.backward(**gradients)
    total.backward()
    error = relative_error(torch.from_numpy(grad.astype(np.float64)), z.grad)
    assert error <= GRADIENT[kind], f"grad_z off by {error:.1e}"
    error = abs(grad_tau - tau.grad.item()) / max(abs(tau.grad.item()), 1e-3 * z.grad.norm().item())
    assert error <= GRADIENT[kind], f"grad_temperature off by {error:.1e}"


def rows(rng, n, d):
    return rng.standard_normal((n, d)).astype(np.float32)


# Three tiles each way, none of them full. D: a k_tile and a bit; one k_tile; rows that do not stay in shared memory.
@pytest.mark.parametrize(("kind", "n", "d"), [("bfloat16", 300, 100), ("float16", 270, 64), ("float32", 258, 160)])
def test_nt_xent(device, kind, n, d):
    rng = np.random.default_rng(0)
    check(Simulated(device(), rows(rng, n, d), TAU, kind), rng)


def pairs_that_agree(rng, n, d):
    return (np.tile(rng.standard_normal((n // 2, d)), (2, 1)) + 0.1 * rng.standard_normal((n, d))).astype(np.float32)


PAIRS = {  # views by default, by ids, classes; running maxima
    "views": {},
    "ids": {"instance_ids": np.arange(270) % 135},
    "classes": {"views": False, "labels": np.arange(270) % 135},
    "online": {"online": True},
}


@pytest.mark.parametrize("options", PAIRS.values(), ids=PAIRS)
def test_small_losses_keep_their_digits(device, options):
    """True losses of some 1e-3, differences of a log-sum-exp and a similarity of 19."""
    rng = np.random.default_rng(3)
    check(Simulated(device(), pairs_that_agree(rng, 270, 40), 0.05, "float32", **options), rng)


@pytest.mark.parametrize(
    ("kind", "d", "options"),
    [
        ("float16", 40, {"online": True}),
        ("float16", 80, {}),
        ("float32", 80, {"online": True}),
        ("float32", 80, {"normalize": False}),
    ],
)
def test_the_other_shapes_of_the_backward(device, kind, d, options):
    rng = np.random.default_rng(12)
    check(Simulated(device(), rows(rng, 258, d) / np.float32(d**0.5), TAU, kind, **options), rng)


def test_stage1(device):
    """Everything at once: views, a nearest neighbour of the own domain with a weight a row, and the domains' part."""
    rng = np.random.default_rng(1)
    domain = np.tile(rng.integers(0, 2, 135), 2)
    options = {"k": 1, "domain": domain, "labels": domain, "neighbor_weights": rng.uniform(0, 2, 270)}
    check(Simulated(device(), rows(rng, 270, 40), TAU, "float32", **options), rng)


def test_instances_and_classes(device):
    """Ids of one, two and five rows; a class of one row, one that spans the pieces of the segment sums."""
    rng = np.random.default_rng(2)
    ids = rng.permutation(np.r_[np.repeat(np.arange(25) * 7, 5), np.arange(50).repeat(2) + 1000, np.arange(46) - 99])
    labels = rng.permutation(np.r_[np.zeros(200, int), np.full(70, -3), [5]])
    problem = Simulated(device(), rows(rng, 271, 33), TAU, "bfloat16", instance_ids=ids, labels=labels, k=1)
    check(problem, rng)


@pytest.mark.parametrize(
    ("kind", "options", "tau"),
    [
        ("float32", {"k": 1}, 0.01),
        ("bfloat16", {"normalize": False}, 4.0),
        ("float16", {"normalize": False, "device_temperature": True}, 10.0),
    ],
)
def test_online_form(device, kind, options, tau):
    rng = np.random.default_rng(3)
    z = rows(rng, 260, 48) * (1 if options.get("normalize", True) else rng.uniform(0.1, 9, (260, 1)).astype(np.float32))
    check(Simulated(device(), z, tau, kind, **options), rng)


@pytest.mark.parametrize("online", [False, True])
def test_work_tiles_of_many_tiles(device, online):
    """Strips of two rows of tiles, chunks of three: five tiles a side, so that work tiles are cut at the edge."""
    rng = np.random.default_rng(4)
    plan = {"row_tiles": 2, "col_tiles": 3, "strips": 3, "chunks": 2, "work_tiles": 4, "blocks": 3}
    extra = 2 * 2 * 128 * (8 if online else 4) + 2 * 2 * 128 * 8
    problem = Simulated(device(arch="80"), rows(rng, 560, 16), TAU, "bfloat16", k=1, online=online)
    problem.options["plan"] = {**plan, "shared_bytes": 16384 * 4 + 2 * 3 * 128 * 16 + extra}
    _, _, lse, indices = problem.forward()
    _, _, lse_ref, indices_ref = expected(problem, torch.from_numpy(problem.prepared.rows), TAU)
    assert relative_error(torch.from_numpy(lse), lse_ref) <= LOSS[torch.bfloat16] / 1000
    assert np.array_equal(indices, indices_ref.numpy())


def test_a_device_with_little_shared_memory(device):
    """99 KiB a block (sm_86): rows are streamed; where no room is left, another kernel looks for the nearest row."""
    rng = np.random.default_rng(11)
    for online, kept in ((False, 1), (True, 0)):
        problem = Simulated(device(arch="86"), rows(rng, 140, 264), TAU, "bfloat16", k=1, online=online)
        plan = problem.plan_only()
        assert (plan.nearest, plan.plan.resident) == (kept, 0)
        assert plan.plan.shared_bytes <= 99 * 1024
    check(Simulated(device(arch="86"), rows(rng, 140, 264), TAU, "bfloat16", online=True), rng)


def test_split_columns(device):
    rng = np.random.default_rng(5)
    check(Simulated(device(), rows(rng, 258, 20), TAU, "bfloat16", bwd_plan={"k_splits": 3}), rng)


def test_neighbors_of_another_search(device):
    """k > 1 in the batch, some places empty, and rows of a bank, as the top-k kernel finds them."""
    rng = np.random.default_rng(6)
    z, bank = rows(rng, 140, 24), rows(rng, 37, 24)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (z.astype(np.float64), bank.astype(np.float64))]
    inside = unit[0] @ unit[0].T
    same = np.arange(140) % 70
    inside[same[:, None] == same] = -np.inf
    for cosines, options in ((inside, {}), (unit[0] @ unit[1].T, {"bank": bank})):
        best = np.argsort(-cosines, axis=1, kind="stable")[:, :3]
        found = np.take_along_axis(cosines, best, axis=1), best.copy()
        problem = Simulated(device(), z, TAU, "float32", k=3, neighbors=found, neighbor_weight=0.7, **options)
        problem.bank_rows = bank.astype(np.float64)
        check(problem, rng)


def test_ties_go_to_the_lower_row(device):
    rng = np.random.default_rng(7)
    z = rows(rng, 20, 8)[rng.integers(0, 20, 300)]
    problem = Simulated(device(), z, TAU, "float32", k=1)
    indices = problem.forward()[3][:, 0]
    equal = (z[:, None] == z[None]).all(2) & (np.arange(300)[:, None] % 150 != np.arange(300) % 150)
    assert equal.any(1).all()
    assert np.array_equal(indices, equal.argmax(1))


def test_rows_that_are_zero_or_not_finite(device):
    rng = np.random.default_rng(8)
    z = rows(rng, 140, 8)
    z[3] = 0
    check(Simulated(device(), z, TAU, "float32"), rng)
    z[5, 2] = np.nan
    assert np.isnan(Simulated(device(), z, TAU, "float32").forward()[2]).all()


def test_a_row_alone(device):
    rng = np.random.default_rng(9)
    problem = Simulated(device(), rows(rng, 1, 8), TAU, "float32", instance_ids=np.array([4]))
    loss, _, lse, _ = problem.forward()
    assert loss[0] == 0
    assert lse[0] == -np.inf
    grad, grad_tau = problem.backward(grad_instance=np.ones(1), grad_lse=np.ones(1))
    assert not grad.any()
    assert grad_tau == 0


def test_the_schedule_changes_no_bit(device):
    rng = np.random.default_rng(10)
    z = rows(rng, 290, 16)
    results = []
    for seed in (1, 2):
        problem = Simulated(device(seed=seed), z, TAU, "bfloat16", k=1)
        problem.forward()
        grad = problem.backward(grad_instance=np.ones(290))[0]
        results.append((problem.dev.get(problem.lse), problem.dev.get(problem.indices), grad))
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))

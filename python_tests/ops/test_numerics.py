"""Hard numbers: converged batches, long and degenerate rows. The judge is an oracle in float64 or mpmath on small N;
long rows, far rows and double banks are compared with the float64 reference on ordinary rows or of a wider type."""

import pytest
import torch
import torch.nn.functional as F

import ltood_fast as lt
from python_tests.oracle import contrastive as oracle
from python_tests.oracle.arithmetic import wide
from python_tests.tolerances import GRADIENT

BACKENDS = ["cpu", "reference"]


def converged(n: int, d: int, noise: float, seed: int) -> torch.Tensor:
    """[2 n, d] float32: two views of n images that nearly agree."""
    generator = torch.Generator().manual_seed(seed)
    images = F.normalize(torch.randn(n, d, generator=generator), dim=1)
    return torch.cat([images + noise * torch.randn(n, d, generator=generator) / d**0.5 for _ in range(2)])


def sole_losses(z: torch.Tensor, partner: torch.Tensor, temperature: float) -> torch.Tensor:
    """log(1 + sum_{j != i, p} exp(s_ij - s_ip)) in float64, p = partner: no digit is lost where it is small."""
    u = z.double() / z.double().norm(dim=1, keepdim=True)
    s = u @ u.T / temperature
    gaps = s - s.gather(1, partner[:, None])
    gaps = gaps.masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf).scatter(1, partner[:, None], -torch.inf)
    return gaps.logsumexp(dim=1).exp().log1p()


def views_of(z: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(z)).roll(len(z) // 2)


def with_gradient(loss, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(row losses, the gradient of their mean), float64."""
    z = z.detach().clone().requires_grad_()
    rows = loss(z)
    (gradient,) = torch.autograd.grad(rows.mean(), z)
    return rows.detach().double(), gradient.double()


def cross_entropy_rows(z: torch.Tensor, temperature: float) -> torch.Tensor:
    u = F.normalize(z, dim=1)
    logits = (u @ u.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, views_of(z), reduction="none")


def off_by(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


SOLE = {  # every way to one positive: (loss, ids that make row i and i + N/2 each other's only positive)
    "nt_xent": lambda z, ids, **options: lt.nt_xent(z, **options),
    "nt_xent ids": lambda z, ids, **options: lt.nt_xent(z, instance_ids=ids, **options),
    "supcon": lambda z, ids, **options: lt.supcon(z, ids, **options),
    "psd neighbour alone": lambda z, ids, **options: lt.psd_loss(z, instance_ids=torch.arange(len(z)), **options),
    "psd weight 0": lambda z, ids, **options: lt.psd_loss(z, neighbor_weight=0.0, **options),
}


@pytest.mark.parametrize("temperature", [0.1, 0.07, 0.05, 0.01])
@pytest.mark.parametrize("name", SOLE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_converged_rows_keep_their_digits(backend, name, temperature):
    """Row losses of 1e-2 down to 1e-38: no worse than float32 cross-entropy of the same rows, and never negative."""
    ours, theirs = [], []
    for seed in range(2):
        z = converged(32, 64, 0.2, seed)
        truth = with_gradient(lambda x: sole_losses(x, views_of(x), temperature), z.double())
        ids = torch.arange(len(z)) % (len(z) // 2)
        options = {"temperature": temperature, "reduction": "none", "backend": backend}
        loss, gradient = with_gradient(lambda x: SOLE[name](x, ids, **options), z)  # noqa: B023
        assert (loss >= 0).all()
        ours.append((off_by(loss, truth[0]), off_by(gradient, truth[1])))
        plain = with_gradient(lambda x: cross_entropy_rows(x, temperature), z)
        theirs.append((off_by(plain[0], truth[0]), off_by(plain[1], truth[1])))
    (loss, gradient), (plain_loss, plain_gradient) = (torch.tensor(x).mean(dim=0) for x in (ours, theirs))
    assert loss <= max(plain_loss, 2e-6), f"loss off by {loss:.1e}, cross-entropy by {plain_loss:.1e}"
    # Below a loss of 1e-12 the rounding of lse in float64 is left: the gradient is then as cross-entropy has it.
    assert gradient <= max(1.00001 * plain_gradient, 1e-5), f"gradient off by {gradient:.1e}, {plain_gradient:.1e}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_parallel_rows_have_loss_zero(backend):
    z = torch.tensor([[0.3, 0.4, 1.7], [0.6, 0.8, 3.4]])
    for temperature in (0.5, 0.07, 0.01):
        loss, gradient = with_gradient(lambda x: lt.nt_xent(x, temperature, backend=backend), z)  # noqa: B023
        assert loss.item() == 0
        assert not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_converged_stage1_with_pairs_in_both_parts(backend):
    """Classes of two rows that are not views: a row has a sole positive in either part."""
    z, temperature = converged(32, 64, 0.2, 5), 0.07
    labels = torch.arange(64) // 2
    partner = torch.arange(64) ^ 1

    def total(x):
        psd = sole_losses(x, views_of(x), temperature)
        return psd + 0.3 * sole_losses(x, partner, temperature)

    truth = with_gradient(total, z.double())
    options = {"neighbor_weight": 0.0, "same_domain": False, "reduction": "none", "backend": backend}
    loss, gradient = with_gradient(lambda x: lt.stage1_loss(x, labels, temperature, **options).total, z)
    psd = lt.stage1_loss(z, labels, temperature, **options).psd.double()
    assert off_by(psd, sole_losses(z, views_of(z), temperature)) < 2e-6
    assert off_by(loss, truth[0]) < 1e-6
    assert off_by(gradient, truth[1]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_rows_reach_a_sole_positive(backend, value):
    z = converged(4, 8, 0.2, 0)
    z[1, 3] = value
    for normalize in (True, False):
        rows = lt.nt_xent(z, 0.1, normalize=normalize, reduction="none", backend=backend)
        assert not rows[[1, 5]].isfinite().any()


def guided_inputs(n: int = 16, d: int = 8) -> tuple[torch.Tensor, ...]:
    guide, clusters, far = torch.randn(n, d), torch.arange(n) % 4, torch.tensor([2, 3, 0, 1])
    return torch.randn(n, d), guide, clusters, far


LOSSES = {  # every loss that normalises its rows, of (z, guide, clusters, far)
    "nt_xent": lambda z, e, c, f, **o: lt.nt_xent(z, 0.2, **o),
    "supcon": lambda z, e, c, f, **o: lt.supcon(z, c, 0.2, **o),
    "psd_loss": lambda z, e, c, f, **o: lt.psd_loss(z, 0.2, **o),
    "psd bank": lambda z, e, c, f, **o: lt.psd_loss(z, 0.2, bank=e, k=2, **o),
    "domain_loss": lambda z, e, c, f, **o: lt.domain_loss(z, c % 2, 0.2, **o),
    "stage1_loss": lambda z, e, c, f, **o: lt.stage1_loss(z, c % 2, 0.2, **o).total,
    "guided": lambda z, e, c, f, **o: lt.guided_contrastive(z, e, c, f, 0.2, k=2, **o),
    "relational": lambda z, e, c, f, **o: lt.relational_distill(z, e, 0.2, **o),
    "feature": lambda z, e, c, f, **o: lt.feature_distill(z, e, **o),
    "stage2_loss": lambda z, e, c, f, **o: lt.stage2_loss(z, e, c, f, 0.2, k=2, **o).total,
    "cluster_kl": lambda z, e, c, f, **o: lt.cluster_kl(z, e[:4].clone(), normalize=True, **o),
}


BACKENDS_AND_LOSSES = pytest.mark.parametrize(  # feature_distill has no kernel
    ("backend", "name"), [(b, n) for b in BACKENDS for n in LOSSES if (b, n) != ("cpu", "feature")]
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@BACKENDS_AND_LOSSES
def test_a_long_row_is_a_direction(backend, name, dtype):
    """A row of any norm up to the largest number gives the loss of its direction, and the other rows their gradient."""
    z, guide, clusters, far = guided_inputs()
    z = z.to(dtype)
    z[3] = torch.randint(1, 5, (8,)).to(dtype)
    z[5] = -z[3]
    long = z.clone()
    top = {torch.float32: 125, torch.bfloat16: 125, torch.float64: 1021}[dtype]
    long[3] *= 2.0**top  # exact: 4 * 2^125 is the largest power of two
    long[5] *= 2.0 ** (top // 2 + 2)
    truth = with_gradient(lambda x: LOSSES[name](x, guide, clusters, far, backend="reference"), z.double())
    loss, gradient = with_gradient(lambda x: LOSSES[name](x, guide, clusters, far, backend=backend), long)
    others = torch.arange(16) != 3
    others[5] = False
    assert off_by(loss, truth[0]) < (1e-10 if dtype == torch.float64 else 1e-5)
    assert off_by(gradient[others], truth[1][others]) < GRADIENT[dtype]
    assert gradient.isfinite().all()


@pytest.mark.parametrize("norm", [0.0, 6e-8, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@BACKENDS_AND_LOSSES
def test_a_dead_16_bit_row_has_a_finite_gradient(backend, name, dtype, norm):
    z, guide, clusters, far = guided_inputs()
    z[3] = 0
    z[3, 0] = norm
    z = z.to(dtype)
    _, gradient = with_gradient(lambda x: LOSSES[name](x, guide, clusters, far, backend=backend), z)
    assert gradient.isfinite().all()
    if dtype == torch.float16:  # 1 / norm is beyond 65504
        assert not gradient[3].any()
    assert gradient[torch.arange(16) != 3].any(dim=1).sum() > 8


@pytest.mark.parametrize("norm", [1e5, 1e7, 1e10, 1e15, 1e30])
@pytest.mark.parametrize("name", ["nt_xent", "supcon", "psd_loss", "relational", "guided", "stage2_loss"])
def test_rows_as_given_beyond_float64_are_refused(name, norm):
    """float64 carries exponents up to 3.4e10; beyond that the softmax would be a guess."""
    z, guide, clusters, far = guided_inputs()
    with pytest.raises(ValueError, match=r"z must be of rows with .* up to 3\.4e10.*got"):
        LOSSES[name](norm * z, guide, clusters, far, normalize=False, backend="cpu")


@pytest.mark.parametrize("norm", [1.0, 1e2, 1e4])
def test_rows_as_given_of_middling_norm_are_right(norm):
    """Repeated rows: equal exponents of 1e9, a softmax that one rounding would decide. Judged with 60 digits."""
    import mpmath

    mpmath.mp.dps = 60
    z = F.normalize(torch.randn(6, 5), dim=1)
    z = norm * torch.cat([z[:2], z[:2], z[2:]])
    exact = [[mpmath.mpf(v) for v in row] for row in z.tolist()]
    s = [[mpmath.fdot(a, b) / mpmath.mpf("0.2") for b in exact] for a in exact]
    n = len(z)
    lse = [
        mpmath.log(mpmath.fsum(mpmath.exp(s[i][j] - s[i][i]) for j in range(n) if j != i)) + s[i][i] for i in range(n)
    ]
    truth = torch.tensor([float(lse[i] - s[i][(i + n // 2) % n]) for i in range(n)], dtype=torch.float64)
    rows = lt.nt_xent(z, 0.2, normalize=False, reduction="none", backend="cpu").double()
    assert (rows - truth).abs().max() <= 1e-5 * truth.abs().max()


@pytest.mark.parametrize("nu", [1.0, 2.5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_cluster_kl_of_far_rows_is_finite(backend, nu):
    z, mu = torch.randn(12, 4), torch.randn(3, 4)
    z[:4] *= 1e20
    z[4] *= 1e37

    def loss(x):
        return lt.cluster_kl(x, mu.to(x.dtype), nu=nu, reduction="none", backend=backend)

    truth = with_gradient(
        lambda x: lt.cluster_kl(x, mu.double(), nu=nu, reduction="none", backend="reference"), z.double()
    )
    rows, gradient = with_gradient(loss, z)
    assert rows.isfinite().all()
    assert gradient.isfinite().all()
    if backend == "cpu":
        assert off_by(rows, truth[0]) < 1e-5
        assert off_by(gradient, truth[1]) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_double_bank_of_long_rows(backend):
    """Norms of 1e100 fit in float64 alone: the rows are normalised before they are narrowed."""
    z, bank = torch.randn(16, 8), torch.randn(20, 8, dtype=torch.float64)
    truth = with_gradient(lambda x: lt.psd_loss(x, 0.2, bank=bank, k=3, backend="reference"), z.double())
    loss, gradient = with_gradient(lambda x: lt.psd_loss(x, 0.2, bank=1e100 * bank, k=3, backend=backend), z)
    assert off_by(loss, truth[0]) < 1e-6
    assert off_by(gradient, truth[1]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_knn_density_names_a_broken_row(backend):
    x = torch.randn(12, 4)
    x[7, 1] = float("nan")
    for call in (
        lambda: lt.knn_density(x, 3, backend=backend),
        lambda: lt.cluster_tailness(x, torch.arange(12) % 2, 2, backend=backend),
    ):
        with pytest.raises(ValueError, match="row 7"):
            call()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_rows_tie_to_the_lower_index(backend, dtype):
    """Three directions, repeated: the neighbours are the lowest indices of a row's own direction."""
    kinds = torch.randn(3, 37, dtype=dtype)
    which = torch.randint(0, 3, (101,))
    _, found = lt.knn(kinds[which], 4, backend=backend)
    for row in range(101):
        same = [j for j in range(101) if which[j] == which[row] and j != row]
        assert found[row].tolist() == same[:4]


@pytest.mark.parametrize("name", ["nt_xent", "supcon"])
@pytest.mark.parametrize("norm", [1e2, 1e4])
def test_reference_takes_long_rows_as_given(name, norm):
    """Logits of up to 1e5, which float32 would round by 1e-2."""
    z = torch.nn.functional.normalize(torch.randn(12, 5)) * norm
    z[1] = z[0] * (1 - 1e-6)  # their logits differ by 0.1
    z[6:] = z[:6]
    given = {"temperature": norm**2 / 1e5, "normalize": False}
    if name == "supcon":
        given["labels"] = torch.arange(12) % 6
    truth = getattr(oracle, name)(z=z, **given)
    loss, gradient = with_gradient(lambda x: getattr(lt, name)(x, **given, backend="reference"), z)
    assert abs(wide(loss) - truth["loss"]) <= 1e-6 * abs(truth["loss"])
    assert (abs(wide(gradient) - truth["grad z"])).max() <= 1e-6 * abs(truth["grad z"]).max()


def test_reference_refuses_rows_as_given_beyond_float64():
    sentence = r"^stage1_loss: z must be of rows with \|z_i\| \|z_j\| / temperature up to 3.4e10"
    with pytest.raises(ValueError, match=sentence):
        lt.stage1_loss(1e6 * torch.randn(8, 4), torch.arange(8) % 2, normalize=False, backend="reference")

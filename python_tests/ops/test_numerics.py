"""Hard numbers: converged batches, long and degenerate rows. The judge is an oracle in float64 or mpmath, on small N,
that shares no code with the reference or the kernels."""

import pytest
import torch
import torch.nn.functional as F

import ltood_fast as lt

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
    assert gradient <= max(plain_gradient, 1e-5), f"gradient off by {gradient:.1e}, {plain_gradient:.1e}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_parallel_rows_have_loss_zero(backend):
    z = torch.tensor([[0.3, 0.4, 1.7], [0.6, 0.8, 3.4]])
    for temperature in (0.5, 0.07, 0.01):
        loss, gradient = with_gradient(lambda x: lt.nt_xent(x, temperature, backend=backend), z)  # noqa: B023
        assert loss.item() == 0 and not gradient.any()


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
    assert off_by(loss, truth[0]) < 1e-6 and off_by(gradient, truth[1]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_rows_reach_a_sole_positive(backend, value):
    z = converged(4, 8, 0.2, 0)
    z[1, 3] = value
    for normalize in (True, False):
        rows = lt.nt_xent(z, 0.1, normalize=normalize, reduction="none", backend=backend)
        assert not rows[[1, 5]].isfinite().any()

"""COLT's defining equations: NumPy loops after the published code against what the trainer does."""

import numpy as np
import pytest
import torch
from made_up import train

from ltood_fast.train.config import ConfigError, load_config
from ltood_fast.train.loop import Stage
from ltood_fast.train.methods import colt_tailness
from ltood_fast.train.methods.colt_tailness import ColtTailness, head_scores
from ltood_fast.train.recipes import recipe

COLT = {key.replace(".", "__"): value for key, value in recipe("colt").items() if not key.startswith("stages")}
COLT |= {"stages": "stage1", "stage1__clusters": 3, "stage1__tailness_k": 4}


def loop_scores(z, tau, k):
    """[B] of views z [2B, D], rows i and i + B of one image."""
    z = z.double().numpy()
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    n = len(z) // 2
    similarity = np.exp(z @ z.T / tau)
    scores = []
    for image in range(n):
        views = (image, image + n)
        others = [j for j in range(2 * n) if j not in views]
        share = np.zeros(len(others))
        for view, partner in (views, views[::-1]):
            negatives = similarity[view, others]
            share += negatives / (similarity[view, partner] + negatives.sum()) / 2
        scores.append(np.sort(share)[::-1][:k].sum())
    return np.array(scores)


@pytest.mark.parametrize(("n", "k"), [(9, 4), (9, 1), (3, 10)])  # the last: more than there are
def test_scores_are_the_largest_shares_of_the_denominator(n, k, monkeypatch):
    monkeypatch.setattr(colt_tailness, "IMAGES", 4)  # more than one block
    z = torch.randn(2 * n, 5, dtype=torch.float64) * torch.rand(2 * n, 1)
    found = head_scores(z, 0.2, k, 0, n)
    assert np.allclose(found.numpy(), loop_scores(z, 0.2, k), rtol=1e-10)


def test_scores_of_a_ranks_images_are_over_the_batch_of_all():
    ranks = [torch.randn(2 * n, 5, dtype=torch.float64) for n in (4, 4)]
    one, other = (part.chunk(2) for part in ranks)
    expected = loop_scores(torch.cat([one[0], other[0], one[1], other[1]]), 0.2, 3)
    everyone = torch.cat(ranks)
    found = torch.cat([head_scores(everyone, 0.2, 3, first, 4) for first in (0, 8)])
    assert np.allclose(found.numpy(), expected, rtol=1e-10)


def test_an_image_that_was_never_seen_counts_as_the_mean():
    scores = ColtTailness(4, 0.9, torch.device("cpu"))
    scores.update(torch.tensor([2, 9, 0, 4]), torch.tensor([0.5, 7.0, 0.1, 7.0]))  # 4 and 9 are OOD images
    assert scores.tailness().tolist() == pytest.approx([-0.1, -0.3, -0.5, -0.3])
    scores.update(torch.tensor([2, 1]), torch.tensor([1.0, 0.7]))
    assert scores.tailness().tolist() == pytest.approx([-0.1, -0.7, -0.55, -0.45])


def test_the_momentum_score_of_a_run_is_the_loops(make_session, monkeypatch):
    stage = Stage.open("stage1", make_session(**COLT, stage1__epochs=4))
    seen, real = [], stage.method.loss_of
    monkeypatch.setattr(
        stage.method,
        "loss_of",
        lambda z, views, rows, epoch: (seen.append((z.detach(), rows, epoch)), real(z, views, rows, epoch))[1],
    )
    stage.run()
    shadow = {}
    for z, rows, epoch in seen:
        for row, score in zip(rows.tolist(), loop_scores(z, 0.2, 4), strict=True):
            if row < 48:  # OOD images are negatives and have no score
                shadow[row] = score if epoch == 0 else 0.97 * shadow[row] + 0.03 * score
    assert any((rows >= 48).any() for _, rows, _ in seen)
    assert len(shadow) == 48
    assert np.allclose(stage.method.tailness.scores.state().numpy(), [shadow[row] for row in range(48)], rtol=1e-4)


def test_budgets_are_the_softmax_of_the_z_scores_of_the_clusters(make_session, tmp_path, monkeypatch):
    stage = Stage.open("stage1", make_session(**COLT, stage1__warmup_epochs=2, stage1__epochs=3))
    at_sampling, real = [], stage.method.resample
    monkeypatch.setattr(
        stage.method,
        "resample",
        lambda epoch: (at_sampling.append(stage.method.tailness.scores.state().clone()), real(epoch))[1],
    )
    stage.run()
    (scores,) = at_sampling
    saved = torch.load(tmp_path / "stage1" / "resample_0002.pt", weights_only=True)
    means = np.array([scores[saved["assignments"] == c].double().mean() for c in range(3)])
    assert np.allclose(saved["tailness"].numpy(), -means, rtol=1e-5)
    z = (-means - (-means).mean()) / means.std()
    exact = 20 * np.exp(z) / np.exp(z).sum()
    budgets = np.floor(exact).astype(int)
    budgets[np.argsort(budgets - exact, kind="stable")[: 20 - budgets.sum()]] += 1
    assert torch.bincount(saved["index_clusters"], minlength=3).tolist() == budgets.tolist()
    assert len(set(budgets)) > 1


@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_the_loss_is_nt_xent_and_supcon_of_the_domains(alpha, make_session):
    stage = Stage.open("stage1", make_session(**{**COLT, "stage1__alpha": alpha}))
    method = stage.method
    method.chosen = torch.arange(20)
    rows = torch.tensor([3, 50, 7, 11, 61, 48, 20, 5])
    z = torch.randn(16, 6, dtype=torch.float64, requires_grad=True)
    loss, parts = method.loss_of(z, torch.zeros(16, 1, 8, 8), rows, 1)
    unit = torch.nn.functional.normalize(z, dim=1)
    s = unit @ unit.T / 0.2
    eye, domain = torch.eye(16, dtype=torch.bool), (rows >= 48).repeat(2)
    log_share = s - s.masked_fill(eye, -torch.inf).logsumexp(1, keepdim=True)
    instance = -log_share[torch.arange(16), (torch.arange(16) + 8) % 16].mean()
    same = (domain[:, None] == domain[None, :]) & ~eye
    supervised = -((log_share * same).sum(1) / same.sum(1)).mean()
    expected = instance + alpha * supervised
    assert torch.allclose(loss, expected, rtol=1e-6)  # the weights of the neighbours are float32
    found, wanted = (torch.autograd.grad(value, z, retain_graph=True)[0] for value in (loss, expected))
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-8)


def test_a_run_that_is_resumed_ends_in_the_same_scores(make_session, tmp_path):
    whole, parts = (make_session(run_dir=tmp_path / run, **COLT) for run in ("whole", "parts"))
    expected = train(whole, "stage1")
    for _ in range(5):
        train(parts, "stage1", epochs=1)
    found = Stage.open("stage1", parts)
    assert torch.equal(found.method.tailness.scores.state(), expected.method.tailness.scores.state())
    assert torch.equal(found.method.chosen, expected.method.chosen)


def test_a_score_needs_epochs_before_the_first_sampling():
    with pytest.raises(ConfigError) as error:
        load_config("smoke", {"stage1.tailness": "momentum", "stage1.warmup_epochs": 0})
    assert str(error.value) == (
        "config: stage1.warmup_epochs must be at least 1 with stage1.tailness momentum, which scores what was trained "
        "on, got 0"
    )

"""Linear probe: how well a linear classifier on frozen features tells the classes apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import _check
from .scores import Scores, check_classification

METHODS = ("logistic", "sgd")


@dataclass(frozen=True)
class Probe:
    """How a linear probe is fitted."""

    method: str = "logistic"
    standardize: bool | None = None
    """Subtract each feature's mean over the training rows and divide by its standard deviation (a constant feature
    becomes 0). None: yes for "logistic", where it makes the fit well conditioned; no for "sgd", as in the source."""
    l2: float = 1e-3
    """"logistic" only: the loss is mean cross-entropy + l2 / 2 * ||W||^2, positive."""
    lr: float = 30.0
    """This and all that follows: "sgd" only."""
    momentum: float = 0.9
    weight_decay: float = 0.0
    epochs: int = 30
    milestones: tuple[int, ...] = (10, 20)
    """Epochs after which the rate is divided by 10."""
    batch_size: int = 128
    seed: int = 0
    """Seed of the order of the batches. The same seed gives the same answer."""


@dataclass(frozen=True)
class EpochwiseProbe:
    """The baselines' way to train a probe [SDCLR, COLT]; with "sgd" alone."""

    features_of: Callable[[int], Tensor]
    """Features [M, F] of the training images in an epoch, of views that are drawn anew."""
    labels: Tensor
    """int64 [M] of these images; they take the place of the training set."""
    validation_features: Tensor
    """[V, F]"""
    validation_labels: Tensor
    """int64 [V]. The classifier after the epoch that is best on them counts, of equal ones the first."""


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    n_classes: int,
    probe: Probe = Probe(),
    epochwise: EpochwiseProbe | None = None,
) -> Scores:
    """Trains a linear classifier on frozen features and scores it on a test set.

    ``method="sgd"`` is the source's protocol [paper]: SGD with learning rate 30, no weight decay, 30 epochs, the rate
    divided by 10 after epochs 10 and 20, batches of 128; momentum 0.9, zero start [ltood_fast]. With `epochwise`
    it learns from views drawn anew each epoch and picks an epoch on held-out images, as the baselines' code does.
    ``method="logistic"`` (default) fits multinomial logistic regression to convergence [ltood_fast], on the CPU, with
    scikit-learn's ``LogisticRegression`` (L-BFGS): the package already needs scikit-learn, its solver has a line
    search and a stopping rule, which ``torch.optim.LBFGS`` leaves to the caller, and it needs no learning rate.

    Args:
        train_features: float [N, F]. train_labels: int64 [N] in [0, n_classes).
        test_features: float [T, F]. test_labels: int64 [T] in [0, n_classes).
        n_classes: C.
        probe: how it is fitted.
        epochwise: views of each epoch and held-out images.

    Returns:
        `Scores`: ``accuracy``, ``per_class_accuracy`` [C], ``confusion`` [C, C].

    Raises:
        ValueError, TypeError: empty sets, lengths or widths that differ, labels out of range, features that are not
            finite, training labels of a single class, an option out of range.
    """
    op = "linear_probe"
    check_classification(op, train_features, train_labels, test_features, test_labels, n_classes)
    _check.choice(op, "method", probe.method, METHODS)
    _check.positive_number(op, "l2", probe.l2)
    _check.count(op, "epochs", probe.epochs, 1)
    _check.count(op, "batch_size", probe.batch_size, 1)
    plain = epochwise is None or (probe.method == "sgd" and not probe.standardize)
    _check.require(plain, op, "epochwise", "None but for method sgd without standardize", probe.method)
    several = bool((train_labels != train_labels[0]).any())
    _check.require(several, op, "train_labels", "of at least two classes", f"class {int(train_labels[0])} only")
    train, test = train_features.detach().float(), test_features.detach().float()
    if probe.standardize if probe.standardize is not None else probe.method == "logistic":
        train, test = _standardized(train, test)
    if probe.method == "logistic":
        answers = _fit_logistic(train, train_labels, test, probe.l2)
    else:
        answers = _fit_sgd((train, train_labels), test, n_classes, probe, epochwise)
    return Scores.of(test_labels, answers, n_classes)


def few_shot_rows(labels: Tensor, n_classes: int, per_class: int, seed: int = 0) -> Tensor:
    """`per_class` rows of every class, drawn by the seed, in ascending order.

    Raises:
        ValueError: a class has fewer rows.
    """
    op, generator = "few_shot_rows", torch.Generator().manual_seed(seed)
    _check.count(op, "per_class", per_class, 1)
    chosen = []
    for c in range(n_classes):
        rows = (labels == c).nonzero().flatten().cpu()
        allowed = f"at most the {len(rows)} images of class {c}"
        _check.require(len(rows) >= per_class, op, "per_class", allowed, per_class)
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[:per_class]])
    return torch.cat(chosen).sort().values


def _standardized(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0)
    scale = torch.where(std > 1e-6 * (1 + mean.abs()), 1 / std, 0.0)  # rounding noise on a constant is no feature
    return (train - mean) * scale, (test - mean) * scale


def _fit_logistic(train: Tensor, labels: Tensor, test: Tensor, l2: float) -> Tensor:
    from sklearn.linear_model import LogisticRegression

    # scikit-learn minimises C * sum of losses + ||W||^2 / 2: C = 1 / (N * l2) gives the mean with l2.
    fit = LogisticRegression(C=1.0 / (len(train) * l2), max_iter=1000, tol=1e-4)
    fit.fit(train.cpu().numpy(), labels.cpu().numpy())
    return torch.from_numpy(fit.predict(test.cpu().numpy())).long()


@torch.enable_grad()
def _fit_sgd(
    train_set: tuple[Tensor, Tensor], test: Tensor, n_classes: int, probe: Probe, epochwise: EpochwiseProbe | None
) -> Tensor:
    train, labels = train_set
    weight = torch.zeros(n_classes, train.shape[1], device=train.device, requires_grad=True)
    bias = torch.zeros(n_classes, device=train.device, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=probe.lr, momentum=probe.momentum, weight_decay=probe.weight_decay)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(probe.milestones), gamma=0.1)
    generator = torch.Generator().manual_seed(probe.seed)
    if epochwise is not None:
        labels = epochwise.labels
    answers, best = None, -1
    for epoch in range(probe.epochs):
        if epochwise is not None:
            train = epochwise.features_of(epoch).float()
        order = torch.randperm(len(labels), generator=generator).to(train.device)
        for batch in order.split(probe.batch_size):
            loss = F.cross_entropy(F.linear(train[batch], weight, bias), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        if epochwise is not None:
            held_out = F.linear(epochwise.validation_features.float(), weight, bias).argmax(dim=1)
            right = int((held_out == epochwise.validation_labels).sum())
            if right > best:
                answers, best = F.linear(test, weight, bias).detach().argmax(dim=1), right
    return F.linear(test, weight, bias).detach().argmax(dim=1) if answers is None else answers

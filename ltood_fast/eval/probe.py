"""Linear probe: how well a linear classifier on frozen features tells the classes apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import _check
from .scores import Scores, check_classification

METHODS = ("logistic", "sgd")


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    n_classes: int,
    *,
    method: str = "logistic",
    standardize: bool | None = None,
    l2: float = 1e-3,
    lr: float = 30.0,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    epochs: int = 30,
    milestones: tuple[int, ...] = (10, 20),
    batch_size: int = 128,
    seed: int = 0,
) -> Scores:
    """Trains a linear classifier on frozen features and scores it on a test set.

    ``method="sgd"`` is the source's protocol [paper]: SGD with learning rate 30, no weight decay, 30 epochs, the rate
    divided by 10 after epochs 10 and 20, batches of 128; momentum 0.9, zero start, no augmentation [ltood_fast].
    ``method="logistic"`` (default) fits multinomial logistic regression to convergence [ltood_fast], on the CPU, with
    scikit-learn's ``LogisticRegression`` (L-BFGS): the package already needs scikit-learn, its solver has a line
    search and a stopping rule, which ``torch.optim.LBFGS`` leaves to the caller, and it needs no learning rate.

    Args:
        train_features: float [N, F]. train_labels: int64 [N] in [0, n_classes).
        test_features: float [T, F]. test_labels: int64 [T] in [0, n_classes).
        n_classes: C.
        standardize: subtract each feature's mean over the training rows and divide by its standard deviation (a
            constant feature becomes 0). Default: yes for ``logistic``, where it makes the fit well conditioned; no for
            ``sgd``, as in the source.
        l2: ``logistic`` only: the loss is mean cross-entropy + l2 / 2 * ||W||^2, positive.
        lr, momentum, weight_decay, epochs, milestones, batch_size: ``sgd`` only.
        seed: ``sgd`` only: of the order of the batches. The same seed gives the same answer.

    Returns:
        `Scores`: ``accuracy``, ``per_class_accuracy`` [C], ``confusion`` [C, C].

    Raises:
        ValueError, TypeError: empty sets, lengths or widths that differ, labels out of range, features that are not
            finite, training labels of a single class, an option out of range.
    """
    op = "linear_probe"
    check_classification(op, train_features, train_labels, test_features, test_labels, n_classes)
    _check.choice(op, "method", method, METHODS)
    _check.positive_number(op, "l2", l2)
    _check.count(op, "epochs", epochs, 1)
    _check.count(op, "batch_size", batch_size, 1)
    several = bool((train_labels != train_labels[0]).any())
    _check.require(several, op, "train_labels", "of at least two classes", f"class {int(train_labels[0])} only")
    train, test = train_features.detach().float(), test_features.detach().float()
    if standardize if standardize is not None else method == "logistic":
        train, test = _standardized(train, test)
    if method == "logistic":
        answers = _fit_logistic(train, train_labels, test, l2)
    else:
        schedule = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        answers = _fit_sgd(train, train_labels, test, n_classes, schedule, epochs, milestones, batch_size, seed)
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
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    n_classes: int,
    schedule: dict[str, float],
    epochs: int,
    milestones: tuple[int, ...],
    batch_size: int,
    seed: int,
) -> Tensor:
    weight = torch.zeros(n_classes, train.shape[1], device=train.device, requires_grad=True)
    bias = torch.zeros(n_classes, device=train.device, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], **schedule)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(milestones), gamma=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(train), generator=generator).to(train.device)
        for batch in order.split(batch_size):
            loss = F.cross_entropy(F.linear(train[batch], weight, bias), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    return F.linear(test, weight, bias).detach().argmax(dim=1)

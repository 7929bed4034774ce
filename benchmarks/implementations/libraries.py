"""Losses of public libraries that run on any device: optional, imported when measured."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .base import Implementation, load_file, partners, unit, views


def _lightly() -> Callable:
    from lightly.loss import NTXentLoss

    def nt_xent(z: Tensor, temperature: float) -> Tensor:
        return NTXentLoss(temperature, memory_bank_size=0)(*views(z))

    return nt_xent


def _solo() -> Callable:
    simclr_loss_func = load_file("solo", "losses/simclr.py").simclr_loss_func

    def nt_xent(z: Tensor, temperature: float) -> Tensor:
        return simclr_loss_func(*views(z), temperature=temperature)

    return nt_xent


def _metric_learning_supcon() -> Callable:
    from pytorch_metric_learning.losses import SupConLoss

    return lambda z, labels, temperature: SupConLoss(temperature)(z, labels)


def _metric_learning_views() -> Callable:
    supcon = _metric_learning_supcon()

    def nt_xent(z: Tensor, temperature: float) -> Tensor:
        return supcon(z, partners(z) % (len(z) // 2), temperature)

    return nt_xent


def _metric_learning_ntxent() -> Callable:
    from pytorch_metric_learning.losses import NTXentLoss

    return lambda z, temperature: NTXentLoss(temperature)(z, partners(z) % (len(z) // 2))


def _open_clip() -> Callable:
    loss = load_file("open_clip", "loss.py").ClipLoss(cache_labels=True)
    return lambda x, y, temperature: loss(unit(x), unit(y), 1 / temperature)


IMPLEMENTATIONS = (
    Implementation(
        "lightly",
        {"nt_xent": _lightly},
        "lightly.loss.NTXentLoss(temperature, memory_bank_size=0): no bank, no gathering",
        package="lightly",
        dtypes=("float32",),
    ),
    Implementation(
        "solo-learn",
        {"nt_xent": _solo},
        "solo.losses.simclr.simclr_loss_func(z1, z2, temperature) of the published release",
        package="solo-learn",
        dtypes=("float32",),
    ),
    Implementation(
        "pml-supcon",
        {"supcon": _metric_learning_supcon, "nt_xent": _metric_learning_views},
        "pytorch-metric-learning SupConLoss; for nt_xent with an image's two views as a class of their own, which is "
        "the same loss and far cheaper than the library's NTXentLoss",
        package="pytorch-metric-learning",
        dtypes=("float32",),
    ),
    Implementation(
        "pml-ntxent",
        {"nt_xent": _metric_learning_ntxent},
        "pytorch-metric-learning NTXentLoss as published; N (N - 2) negatives for each of N pairs, so its tables take "
        "N³ elements, 4 GB each at N = 1,024: measured up to N = 256",
        package="pytorch-metric-learning",
        dtypes=("float32",),
        most_rows=256,
    ),
    Implementation(
        "open_clip",
        {"clip": _open_clip},
        "open_clip ClipLoss(cache_labels=True) on unit rows: cross-modal, so it is compared on the case clip alone",
        package="open-clip-torch",
        dtypes=("float32",),
    ),
)

"""An adapter and the class of the library on the same inputs: the same value and the same gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def value_and_gradients(loss: Callable[..., Tensor], leaves: list[Tensor], *others: object) -> list[Tensor]:
    given = [x.detach().clone().requires_grad_(x.requires_grad) for x in leaves]
    value = loss(*given, *others)
    value = value if isinstance(value, Tensor) else value["contrastive_loss"]
    (value.sum() if value.dim() else value).backward()
    return [value.detach(), *(x.grad for x in given if x.requires_grad)]


def assert_same(ours: Callable, theirs: Callable, leaves: list[Tensor], *others: object) -> None:
    found = value_and_gradients(ours, leaves, *others)
    expected = value_and_gradients(theirs, leaves, *others)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        single = a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-4 if single else 1e-8, atol=2e-6 if single else 1e-10)


def rows(n: int, d: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, d, dtype=dtype).requires_grad_()

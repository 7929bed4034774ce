"""Which calls of an adapter the ops served, and which went to the library, with the reason."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

SERVED = "served"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class CountsCalls:
    """``calls`` of a class: ``{"served": 12, "a process group": 1}``. A subclass has its own."""

    calls: Counter[str] = Counter()

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.calls = Counter()

    def count(self, reason: str) -> bool:
        """Counts a call that is served (no reason) or not; says whether it is."""
        type(self).calls[reason or SERVED] += 1
        return not reason


def unusual(*embeddings: Tensor) -> str:
    """Why rows of embeddings cannot be served, "" if they can: what the ops would refuse the library may take."""
    first = embeddings[0]
    if any(not isinstance(x, Tensor) or x.dim() != 2 or x.numel() == 0 for x in embeddings):
        return "no matrices of embeddings"
    if any(x.dtype not in DTYPES or x.shape[1] != first.shape[1] or x.device != first.device for x in embeddings):
        return "embeddings of other dtypes, widths or devices"
    return ""

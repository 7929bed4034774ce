"""InfoNCE and info_nce of info-nce-pytorch."""

from __future__ import annotations

from numbers import Real

import info_nce as peer
from torch import Tensor

from ..ops import info_nce as ops
from ._calls import CountsCalls, unusual


def _unserved(query: Tensor, keys: list[Tensor], temperature: float, negative_mode: str) -> str:
    if negative_mode == "paired" and len(keys) > 1:
        return "negatives of each query (negative_mode='paired')"
    if not isinstance(temperature, Real) or not temperature > 0:
        return "a temperature that is no positive number"
    return unusual(query, *keys) or ("" if len(query) == len(keys[0]) else "rows that do not pair up")


class InfoNCE(CountsCalls, peer.InfoNCE):
    """``info_nce.InfoNCE`` without the N×M logits; negatives of each query are the library's."""

    def forward(self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None) -> Tensor:
        keys = [positive_key] if negative_keys is None else [positive_key, negative_keys]
        if not self.count(_unserved(query, keys, self.temperature, self.negative_mode)):
            return super().forward(query, positive_key, negative_keys)
        return ops.info_nce(query, *keys, temperature=float(self.temperature), reduction=self.reduction)


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
) -> Tensor:
    """``info_nce.info_nce``; its calls count as those of :class:`InfoNCE`."""
    return InfoNCE(temperature, reduction, negative_mode)(query, positive_key, negative_keys)

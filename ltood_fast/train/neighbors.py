"""Rows that neighbours are searched among, when not in the batch: a queue of recent batches, or the whole data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class NeighborBank:
    """Embeddings without gradient, the image of each and its domain."""

    z: Tensor
    """[Q, D]"""
    ids: Tensor
    """int64 [Q]"""
    domain: Tensor
    """int64 [Q], 0 = ID, 1 = OOD"""

    def state_dict(self) -> dict[str, Tensor]:
        return {"z": self.z, "ids": self.ids, "domain": self.domain}


class EmbeddingQueue:
    """The last `size` embeddings, first in first out, as they were when their batch was trained on (no momentum)."""

    def __init__(self, size: int):
        self.size = size
        self.rows: NeighborBank | None = None

    def push(self, z: Tensor, ids: Tensor, domain: Tensor) -> None:
        """z [B, D], ids [B], domain [B]; the oldest rows leave."""
        new = NeighborBank(z.detach(), ids, domain)
        old = self.rows
        if old is not None:
            new = NeighborBank(
                torch.cat([old.z, new.z]), torch.cat([old.ids, new.ids]), torch.cat([old.domain, new.domain])
            )
        self.rows = NeighborBank(new.z[-self.size :], new.ids[-self.size :], new.domain[-self.size :])

    def bank(self) -> NeighborBank | None:
        """The rows, oldest first; None before the first batch."""
        return self.rows

    def state_dict(self) -> dict[str, Any]:
        return {} if self.rows is None else {name: x.clone() for name, x in self.rows.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = NeighborBank(**state) if state else None

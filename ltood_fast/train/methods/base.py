"""The interface between the loop and a method."""

from __future__ import annotations

import math
from typing import Any, Protocol

from torch import Tensor, nn

from ..config import BaseConfig, Config
from ..session import Session

Loss = tuple[Tensor, dict[str, Tensor]]
"""The loss of a batch, 0-d, and its parts for the log."""


def temperature_in(base: BaseConfig, constant: float, epoch: int) -> float:
    """The temperature of the stages simclr, stage1 and joint: their constant, or the cosine of [Kukleva 2023]."""
    if base.temperature_schedule == "constant":
        return constant
    low, high = base.temperature_low, base.temperature_high
    return low + (high - low) * (1.0 + math.cos(2.0 * math.pi * epoch / base.temperature_period)) / 2.0


class Method(Protocol):
    epochs: int
    lr_scale: float

    @staticmethod
    def check(session: Session) -> None:
        """Raises ValueError where the data cannot serve the stage; called before the first stage starts."""

    @staticmethod
    def epochs_of(config: Config) -> int:
        """The epochs that the stage is to have, `epochs` of its instances."""

    def begin_epoch(self, epoch: int) -> Tensor:
        """int64 rows of the epoch's images, in [0, N_id + N_ood) as `Session.images` counts them."""

    def loss(self, network: nn.Module, views: Tensor, rows: Tensor, epoch: int) -> Loss:
        """views [2B, C, H, W] of the rows [B]; rows i and i + B are two views of one image.

        On several ranks views and rows are this rank's part of the batch, the loss and its parts are those of all.
        """

    def images_in(self, epoch: int) -> int:
        """How many images an epoch shows, of one that is yet to come as well."""

    def facts(self) -> dict[str, int]:
        """Numbers of the ended epoch, for the log."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

"""The baseline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import ltood_fast

from ..config import Config
from ..model import ContrastiveModel
from ..session import Session
from .base import Loss, temperature_in


class SimCLR:
    """Instance discrimination on the ID images alone: the baseline [Chen 2020]."""

    lr_scale = 1.0

    def __init__(self, session: Session, model: ContrastiveModel):
        self.epochs = self.epochs_of(session.config)
        self.base, self.temperature = session.config.base, session.config.simclr.temperature
        self.group = session.group
        self.rows = torch.arange(len(session.data.train))

    @staticmethod
    def check(session: Session) -> None:
        pass  # any images will do

    @staticmethod
    def epochs_of(config: Config) -> int:
        return config.simclr.epochs

    def begin_epoch(self, epoch: int) -> Tensor:
        return self.rows

    def images_in(self, epoch: int) -> int:
        return len(self.rows)

    def facts(self) -> dict[str, int]:
        return {}

    def loss(self, network: nn.Module, views: Tensor, rows: Tensor, epoch: int) -> Loss:
        temperature = temperature_in(self.base, self.temperature, epoch)
        return ltood_fast.nt_xent(network(views), temperature, group=self.group), {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

"""Stage 2: ID images alone, under a frozen guide."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config
from ..model import ContrastiveModel
from ..session import Session
from .base import Loss
from .guide import Guide


class Stage2:
    """ID images alone: a student that starts as the guide, guided_contrastive + beta * distillation.

    The guide is the network of stage 1, its clusters those of the clean images.
    """

    def __init__(self, session: Session, model: ContrastiveModel):
        options = session.config.stage2
        self.epochs, self.lr_scale = self.epochs_of(session.config), options.lr_scale
        self.rows = torch.arange(len(session.data.train))
        network = session.new_model()
        network.load_state_dict(model.state_dict())
        self.guide = Guide(session, network)
        self.guide.cluster(session.embed_part(network, session.data.train.images)[1], session.config.seed)

    @staticmethod
    def check(session: Session) -> None:
        Guide.check(session)

    @staticmethod
    def epochs_of(config: Config) -> int:
        return config.stage2.epochs

    def begin_epoch(self, epoch: int) -> Tensor:
        return self.rows

    def images_in(self, epoch: int) -> int:
        return len(self.rows)

    def facts(self) -> dict[str, int]:
        return {}

    def loss(self, network: nn.Module, views: Tensor, rows: Tensor, epoch: int) -> Loss:
        return self.guide.loss(network(views), views, rows.to(views.device).repeat(2))

    def state_dict(self) -> dict[str, Any]:
        return self.guide.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.guide.load_state_dict(state)

"""Both stages in one, what the source holds to be worse than one after the other."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from ..model import ContrastiveModel
from ..session import Session
from .base import Loss
from .guide import Guide
from .stage1 import Stage1


class Joint(Stage1):
    """L_PSD + alpha L_DD on ID and OOD images, and guided_contrastive + beta * distillation on the ID ones among them.

    The pace, the sampling and the first two losses are of `stage1`, the other two of `stage2`. The guide is a copy of
    the network, frozen in eval mode, its clusters those of the clean ID images; both are renewed at each re-sampling
    [ltood_fast], so that the guided losses begin where the warm-up ends.
    """

    name = "joint"

    def __init__(self, session: Session, model: ContrastiveModel):
        super().__init__(session, model)
        self.guide: Guide | None = None

    @staticmethod
    def check(session: Session) -> None:
        Stage1.check(session)
        Guide.check(session)

    def resample(self, epoch: int) -> Tensor:
        clean = super().resample(epoch)
        self.guide = Guide(self.session, copy.deepcopy(self.model))
        self.guide.cluster(clean, self.session.config.seed + epoch)
        return clean

    def loss_of(self, z: Tensor, views: Tensor, rows: Tensor, epoch: int) -> Loss:
        total, parts = super().loss_of(z, views, rows, epoch)
        own = rows < self.n_id
        if self.guide is None or not self._enough(own):
            return total, parts
        places = own.repeat(2).nonzero()[:, 0].to(z.device)  # both views, in the order of the views
        guided, more = self.guide.loss(z[places], views[places], rows[own].repeat(2).to(z.device))
        return total + guided, {**parts, **more}

    def _enough(self, own: Tensor) -> bool:
        """ID images in the batch for k neighbours, and on every rank one; a batch by chance without goes without."""
        counts = own.sum().view(1)
        if self.session.group is not None:
            counts = self.session.gather(counts.to(self.session.device))
        return int(counts.min()) > 0 and 2 * int(counts.sum()) > self.session.config.stage2.k

    def state_dict(self) -> dict[str, Any]:
        guide = self.guide
        joint = guide and {**guide.state_dict(), "guide": guide.network.state_dict(), "clean": guide.clean}
        return {**super().state_dict(), "joint": joint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if state["joint"] is not None:
            own = self.session.fabric.to_device(state["joint"])
            network = copy.deepcopy(self.model)
            network.load_state_dict(own["guide"])
            self.guide = Guide(self.session, network)
            self.guide.load_state_dict(own)
            self.guide.clean = own["clean"]

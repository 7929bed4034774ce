"""Both stages in one, what the source holds to be worse than one after the other."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

import ltood_fast

from ...sampling.resample import cluster_embeddings
from ..model import ContrastiveModel
from ..session import Session
from .base import Loss
from .stage1 import Stage1


class Joint(Stage1):
    """L_PSD + alpha L_DD on ID and OOD images, and guided_contrastive + beta * distillation on the ID ones among them.

    The pace, the sampling and the first two losses are of `stage1`, the other two of `stage2`. The guide is a copy of
    the network, frozen in eval mode, its clusters those of the clean ID images; both are renewed at each re-sampling
    [ours], so that the guided losses begin where the warm-up ends.
    """

    name = "joint"

    def __init__(self, session: Session, model: ContrastiveModel):
        super().__init__(session, model)
        if session.config.stage2.clusters > self.n_id:
            clusters = session.config.stage2.clusters
            raise ValueError(f"train: stage2.clusters must be at most the {self.n_id} ID images, got {clusters}")
        self.guide: ContrastiveModel | None = None
        self.clean: Tensor | None = None  # [N_id, D], what the guide makes of the clean images, if it is to see those

    def resample(self, epoch: int) -> Tensor:
        clean = super().resample(epoch)
        self._take_guide(self.model.state_dict())
        session, s1, s2 = self.session, self.session.config.stage1, self.session.config.stage2
        clusters = cluster_embeddings(
            clean,
            s2.clusters,
            refine_steps=s1.refine_steps,
            refine_lr=s1.refine_lr,
            seed=session.config.seed + epoch,
            group=session.group,
        )
        self.clean = session.gather(clean) if s2.guide_views == "clean" else None
        self.clusters = session.gather(clusters.assignments)
        self.far = ltood_fast.farthest_cluster(clusters.centroids)
        return clean

    def _take_guide(self, weights: dict[str, Tensor]) -> None:
        self.guide = copy.deepcopy(self.model)
        self.guide.load_state_dict(weights)
        self.guide.eval().requires_grad_(False)

    def loss_of(self, z: Tensor, views: Tensor, rows: Tensor, epoch: int) -> Loss:
        total, parts = super().loss_of(z, views, rows, epoch)
        own = rows < self.n_id
        if self.guide is None or not self._enough(own):
            return total, parts
        options = self.session.config.stage2
        places = own.repeat(2).nonzero()[:, 0].to(z.device)  # both views, in the order of the views
        ids = rows[own].repeat(2).to(z.device)
        losses = ltood_fast.stage2_loss(
            z[places],
            self._guide_rows(views[places], ids),
            self.clusters[ids],
            self.far,
            options.temperature,
            beta=options.beta,
            distill=options.distill,
            k=options.k,
            weighted=options.weighted,
            gamma=options.gamma,
            group=self.session.group,
        )
        return total + losses.total, {**parts, "guided": losses.guided, "distill": losses.distill}

    def _enough(self, own: Tensor) -> bool:
        """ID images in the batch for k neighbours, and on every rank one; a batch by chance without goes without."""
        counts = own.sum().view(1)
        if self.session.group is not None:
            counts = self.session.gather(counts.to(self.session.device))
        return int(counts.min()) > 0 and 2 * int(counts.sum()) > self.session.config.stage2.k

    def _guide_rows(self, views: Tensor, ids: Tensor) -> Tensor:
        if self.clean is not None:
            return self.clean[ids]
        part = 2 * self.session.config.optim.micro_batch or len(views)
        with torch.no_grad(), self.session.fabric.autocast():
            return torch.cat([self.guide(some).float() for some in views.split(part)])

    def state_dict(self) -> dict[str, Any]:
        joint = None
        if self.guide is not None:
            joint = {"guide": self.guide.state_dict(), "clean": self.clean, "clusters": self.clusters, "far": self.far}
        return {**super().state_dict(), "joint": joint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if state["joint"] is not None:
            own = self.session.fabric.to_device(state["joint"])
            self._take_guide(own["guide"])
            self.clean, self.clusters, self.far = own["clean"], own["clusters"], own["far"]

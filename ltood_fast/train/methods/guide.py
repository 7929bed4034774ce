"""The frozen network that guides, and the losses that it guides: stage 2's, and half of the joint stage's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ltood_fast

from ...sampling.resample import cluster_embeddings
from ..model import ContrastiveModel
from ..session import Session
from .base import Loss


class Guide:
    """A network f, frozen in eval mode, and the clusters of the clean ID images as it sees them."""

    def __init__(self, session: Session, network: ContrastiveModel):
        self.session, self.options = session, session.config.stage2
        self.network = network.eval().requires_grad_(False)
        self.check(session)

    @staticmethod
    def check(session: Session) -> None:
        n_id, clusters = session.n_id, session.config.stage2.clusters
        if clusters > n_id:
            raise ValueError(f"train: stage2.clusters must be at most the {n_id} ID images, got {clusters}")

    def cluster(self, clean: Tensor, seed: int) -> None:
        """clean: f of this rank's part of the clean ID images, as `Session.embed_part` gives it."""
        s1 = self.session.config.stage1
        found = cluster_embeddings(
            clean,
            self.options.clusters,
            refine_steps=s1.refine_steps,
            refine_lr=s1.refine_lr,
            refine_batch=s1.refine_batch,
            refine_nu=s1.refine_nu,
            seed=seed,
            group=self.session.group,
        )
        # [N_id, D], if that is what it is to see
        self.clean = self.session.gather(clean) if self.options.guide_views == "clean" else None
        self.clusters = self.session.gather(found.assignments)
        self.far = ltood_fast.farthest_cluster(found.centroids)

    def loss(self, z: Tensor, views: Tensor, ids: Tensor) -> Loss:
        """guided_contrastive + beta * distillation of the student's z [2B, D] of views of the ID images ids [2B]."""
        options = self.options
        losses = ltood_fast.stage2_loss(
            z,
            self._rows(views, ids),
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
        return losses.total, {"guided": losses.guided, "distill": losses.distill}

    def _rows(self, views: Tensor, ids: Tensor) -> Tensor:
        if self.clean is not None:
            return self.clean[ids]
        part = 2 * self.session.config.optim.micro_batch or len(views)
        with torch.no_grad(), self.session.fabric.autocast():
            return torch.cat([self.network(some).float() for some in views.split(part)])

    def state_dict(self) -> dict[str, Any]:
        return {"clusters": self.clusters, "far": self.far}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clusters, self.far = self.session.fabric.to_device((state["clusters"], state["far"]))

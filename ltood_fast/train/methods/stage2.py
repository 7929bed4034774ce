"""Stage 2: ID images alone, under a frozen guide."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import ltood_fast

from ...sampling.resample import cluster_embeddings
from ..model import ContrastiveModel
from ..session import Session
from .base import Loss


class Stage2:
    """ID images alone: a student that starts as the guide, guided_contrastive + beta * distillation.

    The guide f is the network of stage 1, frozen, in eval mode. Its clusters are those of the clean images.
    """

    def __init__(self, session: Session, model: ContrastiveModel):
        self.session, self.options = session, session.config.stage2
        self.epochs, self.lr_scale = self.options.epochs, self.options.lr_scale
        self.rows = torch.arange(len(session.data.train))
        self.guide = session.new_model()
        self.guide.load_state_dict(model.state_dict())
        self.guide.eval().requires_grad_(False)
        clean = session.embed_part(self.guide, session.data.train.images)[1]
        s1 = session.config.stage1
        clusters = cluster_embeddings(
            clean,
            self.options.clusters,
            refine_steps=s1.refine_steps,
            refine_lr=s1.refine_lr,
            seed=session.config.seed,
            group=session.group,
        )
        self.clean = session.gather(clean)
        self.clusters = session.gather(clusters.assignments)
        self.far = ltood_fast.farthest_cluster(clusters.centroids)

    def begin_epoch(self, epoch: int) -> Tensor:
        return self.rows

    def loss(self, network: nn.Module, views: Tensor, rows: Tensor, epoch: int) -> Loss:
        options = self.options
        rows = rows.to(views.device).repeat(2)
        if options.guide_views == "augmented":
            part = 2 * self.session.config.optim.micro_batch or len(views)
            with torch.no_grad(), self.session.fabric.autocast():
                guide = torch.cat([self.guide(some).float() for some in views.split(part)])
        else:
            guide = self.clean[rows]
        losses = ltood_fast.stage2_loss(
            network(views),
            guide,
            self.clusters[rows],
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

    def state_dict(self) -> dict[str, Any]:
        return {"clusters": self.clusters, "far": self.far}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clusters = self.session.fabric.to_device(state["clusters"])
        self.far = self.session.fabric.to_device(state["far"])

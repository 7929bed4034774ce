"""Stage 1: ID images and the OOD images that are sampled for their tail.

`Stage1` is put together from a sampler (which OOD images), a tailness (of which ID images) and positives (which
neighbours), each a small class of a registry that the configuration names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import ltood_fast

from ...data import ImageSet
from ...sampling.resample import Sample
from ..checkpoint import save_tensors
from ..config import Config
from ..model import ContrastiveModel
from ..ranks import on_first_rank
from ..session import Session
from .base import Loss, temperature_in
from .positives import POSITIVES, Embedded, Purity
from .samplers import sampler_of
from .tailness import tailness_of

# Where the state of a checkpoint written before the parts had states of their own belongs: old key -> (part, key).
OLD_STATE_KEYS = {
    "row_weight": ("positives", "weight"),
    "bank": ("positives", "bank"),
    "queue": ("positives", "bank"),  # one of the two was None
    "scores": ("tailness", "scores"),
}


class Stage1:
    """ID images and sampled OOD images: NT-Xent while warming up, then L_PSD + alpha L_DD; new OOD every T epochs."""

    name = "stage1"
    lr_scale = 1.0

    def __init__(self, session: Session, model: ContrastiveModel):
        self.check(session)
        self.session, self.model, self.options = session, model, session.config.stage1
        self.epochs, self.n_id = self.epochs_of(session.config), session.n_id
        sampler = sampler_of(self.options)
        self.sampler = sampler and sampler(self.options, session.group)  # None: ID images alone
        self.tailness = tailness_of(self.options)(session)
        self.positives = POSITIVES[self.options.neighbors](session)
        self.purity = Purity(session)
        self.chosen = torch.empty(0, dtype=torch.int64)  # of the OOD pool
        self.seen = torch.zeros(session.n_ood, dtype=torch.bool)  # which of the pool were ever trained on

    @staticmethod
    def check(session: Session) -> None:
        """Raises ValueError where the data cannot serve the sampler."""
        options, n_id, n_ood = session.config.stage1, session.n_id, session.n_ood
        if sampler_of(options) is None:
            return
        if options.clusters > n_id:
            raise ValueError(f"train: stage1.clusters must be at most the {n_id} ID images, got {options.clusters}")
        if n_ood == 0:
            strategy = options.ood_strategy
            raise ValueError(f"train: stage1.ood_strategy must be none without an OOD set, got {strategy}")
        if options.budget > n_ood:
            allowed = f"at most the {n_ood} images of the OOD set"
            raise ValueError(f"train: stage1.budget must be {allowed}, got {options.budget}")

    @staticmethod
    def epochs_of(config: Config) -> int:
        return config.stage1.epochs

    def begin_epoch(self, epoch: int) -> Tensor:
        since_warmup = epoch - self.options.warmup_epochs
        if since_warmup >= 0 and since_warmup % self.options.resample_every == 0:
            self.resample(epoch)
        elif since_warmup >= 0 and self.options.bank_renewal == "epoch":
            self._renew_positives()
        return self._rows()

    def _rows(self) -> Tensor:
        return torch.cat([torch.arange(self.n_id), self.n_id + self.chosen])

    def resample(self, epoch: int) -> Tensor:
        """Embeds both sets, lets the sampler choose OOD images, and renews what depends on the embeddings.

        Embeddings lie on the ranks in parts; of the OOD ones only the chosen come together. Returns this rank's part of
        the ID projections.
        """
        session = self.session
        id_images = self._embed(session.data.train)
        chosen = Embedded(id_images.space[:0], id_images.z[:0])
        if self.sampler is not None:
            pool = self._embed(session.data.ood)
            seed = session.config.seed + epoch
            sample = self.sampler.sample(id_images.space, pool.space, self.tailness.of_own_part(), seed)
            self._save(sample, epoch)
            self.chosen = sample.indices.cpu()
            self.seen[self.chosen] = True
            chosen = Embedded(*(session.fetch(part, sample.indices) for part in (pool.space, pool.z)))
        self.positives.renew(id_images, chosen, self._rows().to(session.device))
        return id_images.z

    def _renew_positives(self) -> None:
        """As the network sees the images now; on every rank the chosen OOD ones, as after a re-sampling."""
        session = self.session
        id_images = self._embed(session.data.train)
        chosen = Embedded(id_images.space[:0], id_images.z[:0])
        if len(self.chosen):
            features, z = session.embed(self.model, session.data.ood.images[self.chosen])
            chosen = Embedded(features if self.options.cluster_space == "features" else z, z)
        self.positives.renew(id_images, chosen, self._rows().to(session.device))

    def _embed(self, images: ImageSet) -> Embedded:
        features, z = self.session.embed_part(self.model, images.images)
        return Embedded(features if self.options.cluster_space == "features" else z, z)

    def _save(self, sample: Sample, epoch: int) -> None:
        """`resample_<epoch>.pt`, for the report."""
        tensors = {
            "assignments": self.session.gather(sample.clusters.assignments),
            "centroids": sample.clusters.centroids,
            "tailness": sample.tailness,
            "indices": sample.indices,
            "index_clusters": sample.index_clusters,
            **({} if sample.targets is None else {"targets": sample.targets}),
        }
        path = self.session.run_dir / self.name / f"resample_{epoch:04d}.pt"
        state = {"epoch": epoch, **{name: value.cpu() for name, value in tensors.items()}}
        on_first_rank(lambda: save_tensors(path, state))

    def temperature(self, epoch: int) -> float:
        return temperature_in(self.session.config.base, self.options.temperature, epoch)

    def loss(self, network: nn.Module, views: Tensor, rows: Tensor, epoch: int) -> Loss:
        return self.loss_of(network(views), views, rows, epoch)

    def loss_of(self, z: Tensor, views: Tensor, rows: Tensor, epoch: int) -> Loss:
        """The loss of the embeddings [2B, D] of the views."""
        n = len(rows)
        ids = rows.to(z.device).repeat(2)
        domain = (ids >= self.n_id).long()
        self.tailness.observe(z, ids[:n])
        if epoch < self.options.warmup_epochs:
            result = ltood_fast.nt_xent(z, self.temperature(epoch), group=self.session.group), {}
        else:
            result = self._psd_and_domain(z, ids, domain, epoch)
        self.positives.observe(z[:n], ids[:n], domain[:n])
        return result

    def _psd_and_domain(self, z: Tensor, ids: Tensor, domain: Tensor, epoch: int) -> Loss:
        options, temperature = self.options, self.temperature(epoch)
        shared = {**self.positives.arguments(ids), "group": self.session.group, "pairing": options.pairing}
        if epoch < options.neighbor_start_epoch:
            shared["neighbor_weight"] = torch.zeros_like(shared["neighbor_weight"])
        elif not options.ood_neighbors:
            shared["neighbor_weight"] = shared["neighbor_weight"] * (domain == 0)
        kind = self.positives.own_kind(ids, domain)
        if len(self.chosen) == 0:  # one domain: nothing to tell apart
            total, _, columns = ltood_fast.psd_loss(z, temperature, domain=kind, **shared)
            parts = {"psd": total}
        elif kind is not None and kind is not domain:  # neighbours by another rule than the domains' loss
            psd, _, columns = ltood_fast.psd_loss(z, temperature, domain=kind, **shared)
            apart = ltood_fast.domain_loss(z, domain, temperature, group=self.session.group)
            total, parts = psd + options.alpha * apart, {"psd": psd, "domain": apart}
        else:
            losses, _, columns = ltood_fast.stage1_loss(
                z, domain, temperature, alpha=options.alpha, same_domain=options.same_domain, **shared
            )
            total, parts = losses.total, {"psd": losses.psd, "domain": losses.domain}
        found = shared["bank"].ids if "bank" in shared else self.session.gather(ids)
        return total, {**parts, **self.purity.of(ids, columns, found)}

    def images_in(self, epoch: int) -> int:
        with_ood = self.sampler is not None and epoch >= self.options.warmup_epochs
        return self.n_id + (self.options.budget if with_ood else 0)

    def facts(self) -> dict[str, int]:
        """How many OOD images were trained on so far, each counted once: random choices are drawn anew and see more."""
        return {} if self.sampler is None else {"ood_distinct": int(self.seen.sum())}

    def state_dict(self) -> dict[str, Any]:
        return {
            "chosen": self.chosen,
            "seen": self.seen,
            "tailness": self.tailness.state_dict(),
            "positives": self.positives.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = _by_part(state)
        self.chosen = state["chosen"]
        self.seen = state.get("seen", self.seen)
        self.seen[self.chosen] = True
        self.tailness.load_state_dict(state["tailness"])
        self.positives.load_state_dict(state["positives"])


def _by_part(state: dict[str, Any]) -> dict[str, Any]:
    """The state with old keys moved to the part that they belong to."""
    parts: dict[str, Any] = {"tailness": {}, "positives": {"bank": None}, **state}
    for old, (part, key) in OLD_STATE_KEYS.items():
        if (value := parts.pop(old, None)) is not None:
            parts[part] = {**parts[part], key: value}
    return parts

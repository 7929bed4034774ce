"""Stage 1: ID images and the OOD images that are sampled for their tail."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

import ltood_fast

from ...eval.groups import split_groups
from ...ops._shards import add
from ...sampling.resample import (
    Sample,
    choose_for_samples,
    choose_ood,
    cluster_embeddings,
    density_weights,
    gate_weights,
    mutual_weights,
)
from ..checkpoint import save_tensors
from ..model import ContrastiveModel
from ..neighbors import EmbeddingQueue, NeighborBank
from ..ranks import on_first_rank, own_part
from ..session import Session
from .base import Loss
from .tail_scores import TailScores, head_scores


class Stage1:
    """ID images and sampled OOD images: NT-Xent while warming up, then L_PSD + alpha L_DD; new OOD every T epochs."""

    name = "stage1"
    lr_scale = 1.0

    def __init__(self, session: Session, model: ContrastiveModel):
        self.session, self.model, self.options = session, model, session.config.stage1
        self.epochs = self.options.epochs
        self.n_id = len(session.data.train)
        n_ood = len(session.data.ood) if session.data.ood is not None else 0
        self._check_pool(n_ood)
        self.n_rows = self.n_id + n_ood
        self.labels, self.is_few = session.fabric.to_device(self._labels())
        self.chosen = torch.empty(0, dtype=torch.int64)  # of the OOD pool
        self.row_weight = torch.full((self.n_rows,), self.options.neighbor_weight, device=session.device)
        self.bank: NeighborBank | None = None
        self.queue = EmbeddingQueue(self.options.queue_size) if self.options.neighbors == "queue" else None
        self.scores: TailScores | None = None
        if self.options.ood_strategy == "tailness" and self.options.tailness == "momentum":
            self.scores = TailScores(self.n_id, self.options.tailness_momentum, session.device)
        self.resample_seconds = 0.0

    def _check_pool(self, n_ood: int) -> None:
        """Now rather than after the warm-up."""
        strategy, budget, clusters = self.options.ood_strategy, self.options.budget, self.options.clusters
        if strategy == "none":
            return
        if clusters > self.n_id:
            raise ValueError(f"train: stage1.clusters must be at most the {self.n_id} ID images, got {clusters}")
        if n_ood == 0:
            raise ValueError(f"train: stage1.ood_strategy must be none without an OOD set, got {strategy}")
        if budget > n_ood:
            raise ValueError(f"train: stage1.budget must be at most the {n_ood} images of the OOD set, got {budget}")

    def _labels(self) -> tuple[Tensor, Tensor]:
        """Class of each row, -1 for OOD images, and whether each class is a few class."""
        train = self.session.data.train
        labels = torch.full((self.n_rows,), -1)
        labels[: self.n_id] = train.labels
        counts = [int(count) for count in train.class_counts()]
        few = torch.zeros(len(counts), dtype=torch.bool)
        few[split_groups(counts, self.session.config.eval.groups)["few"]] = True
        return labels, few

    def begin_epoch(self, epoch: int) -> Tensor:
        self.resample_seconds = 0.0
        since_warmup = epoch - self.options.warmup_epochs
        if since_warmup >= 0 and since_warmup % self.options.resample_every == 0:
            start = time.perf_counter()
            self.resample(epoch)
            self.resample_seconds = time.perf_counter() - start
        return torch.cat([torch.arange(self.n_id), self.n_id + self.chosen])

    def resample(self, epoch: int) -> Tensor:
        """Embeds both sets, clusters the ID one, chooses OOD images, and renews what depends on the embeddings.

        Embeddings lie on the ranks in parts; of the OOD ones only the chosen come together. Returns this rank's part of
        the ID projections.
        """
        session, options = self.session, self.options
        id_features, id_z = session.embed_part(self.model, session.data.train.images)
        by_features = options.cluster_space == "features"
        id_space = id_features if by_features else id_z
        chosen_space, chosen_z = id_space[:0], id_z[:0]
        if options.ood_strategy != "none":
            ood_features, ood_z = session.embed_part(self.model, session.data.ood.images)
            ood_space = ood_features if by_features else ood_z
            sample = self._sample(id_space, ood_space, epoch)
            self.chosen = sample.indices.cpu()
            chosen_space, chosen_z = (session.fetch(part, sample.indices) for part in (ood_space, ood_z))
        rows = torch.cat([torch.arange(self.n_id), self.n_id + self.chosen]).to(session.device)
        if options.neighbors == "dataset":
            self.bank = NeighborBank(torch.cat([session.gather(id_z), chosen_z]), rows, (rows >= self.n_id).long())
        if options.neighbor_weighting != "none":  # among the images of its own domain
            weight = options.neighbor_weight
            if self.n_id > 1:
                self.row_weight[rows[: self.n_id]] = weight * self._weights(id_space, id_z, session.group)
            if len(chosen_space) > 1:
                self.row_weight[rows[self.n_id :]] = weight * self._weights(chosen_space, chosen_z)
        return id_z

    def _weights(self, space: Tensor, z: Tensor, group: ProcessGroup | None = None) -> Tensor:
        """[N] in [0, 1] of all rows; `space` is where tails are looked for, `z` where neighbours are."""
        options = self.options
        if options.neighbor_weighting == "gate":
            return gate_weights(space, options.gate, options.tailness_k, group=group)
        if options.neighbor_weighting == "mutual":
            return mutual_weights(z, group=group)
        return density_weights(space, options.tailness_k, group=group)

    def _sample(self, id_space: Tensor, ood_space: Tensor, epoch: int) -> Sample:
        if self.options.ood_strategy == "tailness" and self.options.targets == "samples":
            sample, targets = self._sample_for_samples(id_space, ood_space, epoch)
        else:
            sample, targets = self._sample_for_clusters(id_space, ood_space, epoch), None
        tensors = {
            "assignments": self.session.gather(sample.clusters.assignments),
            "centroids": sample.clusters.centroids,
            "tailness": sample.tailness,
            "indices": sample.indices,
            "index_clusters": sample.index_clusters,
            **({} if targets is None else {"targets": targets}),
        }
        path = self.session.run_dir / self.name / f"resample_{epoch:04d}.pt"
        state = {"epoch": epoch, **{name: value.cpu() for name, value in tensors.items()}}
        on_first_rank(lambda: save_tensors(path, state))
        return sample

    def _sample_for_samples(self, id_space: Tensor, ood_space: Tensor, epoch: int) -> tuple[Sample, Tensor]:
        options = self.options
        return choose_for_samples(
            id_space,
            ood_space,
            options.target_samples,
            options.budget,
            tailness_k=options.tailness_k,
            density=self._tailness(),
            seed=self.session.config.seed + epoch,
            group=self.session.group,
        )

    def _sample_for_clusters(self, id_space: Tensor, ood_space: Tensor, epoch: int) -> Sample:
        options, seed = self.options, self.session.config.seed + epoch
        clusters = cluster_embeddings(
            id_space,
            options.clusters,
            refine_steps=options.refine_steps,
            refine_lr=options.refine_lr,
            seed=seed,
            group=self.session.group,
        )
        return choose_ood(
            id_space,
            ood_space,
            clusters,
            options.budget,
            tailness_k=options.tailness_k,
            density=self._tailness(),
            temperature=options.budget_temperature,
            strategy=options.ood_strategy,
            seed=seed,
            group=self.session.group,
        )

    def _tailness(self) -> Tensor | None:
        """Of this rank's ID images; None: their sparsity."""
        return None if self.scores is None else self.scores.tailness()[own_part(self.n_id)]

    def loss(self, network: nn.Module, views: Tensor, rows: Tensor, epoch: int) -> Loss:
        return self.loss_of(network(views), views, rows, epoch)

    def loss_of(self, z: Tensor, views: Tensor, rows: Tensor, epoch: int) -> Loss:
        """The loss of the embeddings [2B, D] of the views."""
        ids = rows.to(z.device).repeat(2)
        if self.scores is not None:
            self._score(z, ids[: len(rows)])
        domain = (ids >= self.n_id).long()
        if epoch < self.options.warmup_epochs:
            result = ltood_fast.nt_xent(z, self.options.temperature, group=self.session.group), {}
        else:
            result = self._psd_and_domain(z, ids, domain)
        if self.queue is not None:
            self.queue.push(*(self.session.gather(x.detach()[: len(rows)]) for x in (z, ids, domain)))
        return result

    def _score(self, z: Tensor, ids: Tensor) -> None:
        session, options = self.session, self.options
        everyone = session.gather(z.detach().float())
        first = 0 if session.group is None else session.rank * len(z)
        scores = head_scores(everyone, options.temperature, options.tailness_k, first, len(ids))
        ids, scores = session.gather(ids), session.gather(scores)
        self.scores.update(ids, scores)

    def _psd_and_domain(self, z: Tensor, ids: Tensor, domain: Tensor) -> Loss:
        options = self.options
        bank = self.bank if self.queue is None else self.queue.bank()
        shared: dict[str, Any] = {
            "k": options.k,
            "neighbor_weight": self.row_weight[ids],
            "return_neighbors": True,
            "group": self.session.group,
        }
        if bank is not None and len(bank.ids) >= options.k:
            shared |= {"bank": bank.z, "bank_ids": bank.ids, "instance_ids": ids}
            shared["bank_domain"] = bank.domain if options.same_domain else None
        if len(self.chosen) == 0:  # one domain: nothing to tell apart
            own_domain = domain if options.same_domain else None
            psd, _, columns = ltood_fast.psd_loss(z, options.temperature, domain=own_domain, **shared)
            total, parts = psd, {"psd": psd}
        else:
            losses, _, columns = ltood_fast.stage1_loss(
                z, domain, options.temperature, alpha=options.alpha, same_domain=options.same_domain, **shared
            )
            total = losses.total
            parts = {"psd": losses.psd, "domain": losses.domain}
        found = shared["bank_ids"] if "bank" in shared else self.session.gather(ids)
        return total, {**parts, **self._purity(ids, columns, found)}

    def _purity(self, ids: Tensor, columns: Tensor, found: Tensor) -> dict[str, Tensor]:
        """Share of the pseudo-positives that are of the row's own class, over all ID rows and over those of few
        classes; NaN where there is no labelled one. For the log: no label is part of a loss."""
        own = self.labels[ids].unsqueeze(1).expand_as(columns)
        right = own == self.labels[found[columns.clamp(min=0)]]
        counted = (own >= 0) & (columns >= 0)
        few = counted & self.is_few[own.clamp(min=0)]
        sums = torch.stack([mask.sum() for mask in (right & counted, counted, right & few, few)])
        if self.session.group is not None:
            add(sums, self.session.group)
        return {"neighbor_purity": sums[0] / sums[1], "neighbor_purity_few": sums[2] / sums[3]}

    def state_dict(self) -> dict[str, Any]:
        return {
            "chosen": self.chosen,
            "row_weight": self.row_weight,
            "bank": None if self.bank is None else self.bank.state_dict(),
            "queue": None if self.queue is None else self.queue.state_dict(),
            **({} if self.scores is None else {"scores": self.scores.state()}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        to_device = self.session.fabric.to_device
        self.chosen = state["chosen"]
        self.row_weight = to_device(state["row_weight"])
        if state["bank"] is not None:
            self.bank = NeighborBank(**to_device(state["bank"]))
        if self.queue is not None:
            self.queue.load_state_dict(to_device(state["queue"]))
        if self.scores is not None:
            self.scores.load(state["scores"])

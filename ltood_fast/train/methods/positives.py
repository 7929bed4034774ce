"""The pseudo-positives of stage 1: where an image's neighbours are searched and how much they weigh.

`POSITIVES` is the registry of the places, name -> class; `WEIGHTINGS` that of the weights, name -> function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

import ltood_fast

from ...eval.groups import split_groups
from ...ops._shards import add
from ...sampling.resample import density_weights, gate_weights, mutual_weights
from ..config import Stage1Config
from ..neighbors import EmbeddingQueue, NeighborBank
from ..session import Session


@dataclass(frozen=True)
class Embedded:
    """Clean images as the network sees them at a re-sampling."""

    space: Tensor
    """[N, F]: the embeddings that clusters and tailness are measured in."""
    z: Tensor
    """[N, D]: the projections that neighbours are searched in."""


Weighting = Callable[[Embedded, Stage1Config, ProcessGroup | None], Tensor]
WEIGHTINGS: dict[str, Weighting] = {
    "density": lambda images, options, group: density_weights(images.space, options.tailness_k, group=group),
    "gate": lambda images, options, group: gate_weights(images.space, options.gate, options.tailness_k, group=group),
    "mutual": lambda images, options, group: mutual_weights(images.z, group=group),
}
"""[N] in [0, 1] of the images of all ranks, from this rank's part; "none" leaves every weight at lam."""


class InBatch:
    """Neighbours among the other images of the batch."""

    def __init__(self, session: Session):
        self.session, self.options = session, session.config.stage1
        self.weight = torch.full((session.n_id + session.n_ood,), self.options.neighbor_weight, device=session.device)

    def bank(self) -> NeighborBank | None:
        """Rows to search instead of the batch; None: the batch."""
        return None

    def own_kind(self, ids: Tensor, domain: Tensor) -> Tensor | None:
        """[N]: a row's neighbours are of its kind; None: of any kind."""
        return domain if self.options.same_domain else None

    def observe(self, z: Tensor, ids: Tensor, domain: Tensor) -> None:
        """First views of this rank's part of a batch that was trained on: z [B, D], ids [B], domain [B]."""

    def renew(self, id_images: Embedded, chosen: Embedded, rows: Tensor) -> None:
        """After a re-sampling: the weights, among the images of each domain.

        Args:
            id_images: this rank's part of the ID images.
            chosen: the OOD images that are trained on, on every rank; of length 0 if there are none.
            rows: [N_id + chosen], the images of an epoch as `Session.images` counts them.
        """
        options, n_id = self.options, self.session.n_id
        if options.neighbor_weighting == "none":
            return
        weights_of = WEIGHTINGS[options.neighbor_weighting]
        if n_id > 1:
            self.weight[rows[:n_id]] = options.neighbor_weight * weights_of(id_images, options, self.session.group)
        if len(chosen.z) > 1:
            self.weight[rows[n_id:]] = options.neighbor_weight * weights_of(chosen, options, None)

    def arguments(self, ids: Tensor) -> dict[str, Any]:
        """The neighbours' part of the arguments of `psd_loss` and `stage1_loss`, for rows of the images ids [N]."""
        bank, options = self.bank(), self.options
        arguments: dict[str, Any] = {"k": options.k, "neighbor_weight": self.weight[ids], "return_neighbors": True}
        if bank is not None and len(bank.ids) >= options.k:
            own_domain = bank.domain if options.same_domain else None
            arguments |= {"bank": ltood_fast.Bank(bank.z, bank.ids, own_domain), "instance_ids": ids}
        return arguments

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "bank": None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight = self.session.fabric.to_device(state["weight"])


class InQueue(InBatch):
    """Neighbours among the images of the last batches, the warm-up's included."""

    def __init__(self, session: Session):
        super().__init__(session)
        self.queue = EmbeddingQueue(self.options.queue_size)

    def bank(self) -> NeighborBank | None:
        return self.queue.bank()

    def observe(self, z: Tensor, ids: Tensor, domain: Tensor) -> None:
        self.queue.push(*(self.session.gather(x.detach()) for x in (z, ids, domain)))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "bank": self.queue.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.queue.load_state_dict(self.session.fabric.to_device(state["bank"]))


class InDataSet(InBatch):
    """Neighbours among all images of the epoch, as the network saw them at the last re-sampling."""

    def __init__(self, session: Session):
        super().__init__(session)
        self.images: NeighborBank | None = None

    def bank(self) -> NeighborBank | None:
        return self.images

    def renew(self, id_images: Embedded, chosen: Embedded, rows: Tensor) -> None:
        z = torch.cat([self.session.gather(id_images.z), chosen.z])
        self.images = NeighborBank(z, rows, (rows >= self.session.n_id).long())
        super().renew(id_images, chosen, rows)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "bank": None if self.images is None else self.images.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if state["bank"] is not None:
            self.images = NeighborBank(**self.session.fabric.to_device(state["bank"]))


class Oracle(InBatch):
    """Neighbours among the images of the row's own class in the batch, as the labels have it: the positive control of
    experiments, what pseudo-positives that are all right would do. OOD images count as one more class."""

    def __init__(self, session: Session):
        super().__init__(session)
        kinds = torch.full((session.n_id + session.n_ood,), len(session.data.train.class_names))
        kinds[: session.n_id] = session.data.train.labels
        self.kinds = session.fabric.to_device(kinds)

    def own_kind(self, ids: Tensor, domain: Tensor) -> Tensor | None:
        return self.kinds[ids]


POSITIVES: dict[str, type[InBatch]] = {
    "in_batch": InBatch,
    "queue": InQueue,
    "dataset": InDataSet,
    "oracle": Oracle,
}


class Purity:
    """How many pseudo-positives are of the row's own class. For the log: no label is part of a loss."""

    def __init__(self, session: Session):
        self.group, train = session.group, session.data.train
        labels = torch.full((session.n_id + session.n_ood,), -1)  # -1 for OOD images
        labels[: session.n_id] = train.labels
        counts = [int(count) for count in train.class_counts()]
        few = torch.zeros(max(len(counts), 1), dtype=torch.bool)  # without labels it is looked up, and counts nowhere
        if counts:
            few[split_groups(counts, session.config.eval.groups)["few"]] = True
        self.labels, self.is_few = session.fabric.to_device((labels, few))

    def of(self, ids: Tensor, columns: Tensor, found: Tensor) -> dict[str, Tensor]:
        """The share over all ID rows and over those of few classes; NaN where there is no labelled one.

        Args:
            ids: [N], the images of the rows.
            columns: [N, k], the neighbours as places in `found`, -1 for none.
            found: [Q], the images that were searched.
        """
        own = self.labels[ids].unsqueeze(1).expand_as(columns)
        right = own == self.labels[found[columns.clamp(min=0)]]
        counted = (own >= 0) & (columns >= 0)
        few = counted & self.is_few[own.clamp(min=0)]
        sums = torch.stack([mask.sum() for mask in (right & counted, counted, right & few, few)])
        if self.group is not None:
            add(sums, self.group)
        return {"neighbor_purity": sums[0] / sums[1], "neighbor_purity_few": sums[2] / sums[3]}

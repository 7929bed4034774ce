"""How far an ID image is in the tail, for the sampler. `TAILNESS` is the registry: name -> class.

A tailness sees every batch that is trained on and answers at a re-sampling.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..config import Stage1Config
from ..ranks import own_part
from ..session import Session
from .colt_tailness import ColtTailness, head_scores


class Sparsity:
    """The mean cosine distance to the nearest ID images; the sampler measures it in the embeddings that it is given."""

    def __init__(self, session: Session):
        pass

    def observe(self, z: Tensor, ids: Tensor) -> None:
        """z [2B, D] of the views of this rank's part of a batch, and the images that they show [B]."""

    def of_own_part(self) -> Tensor | None:
        """[n] of this rank's part of the ID images, high = tail; None: their sparsity."""
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Momentum(Sparsity):
    """COLT's score: how little the neighbours of an image competed with its other view in the last epochs."""

    def __init__(self, session: Session):
        self.session, self.options = session, session.config.stage1
        self.scores = ColtTailness(session.n_id, self.options.tailness_momentum, session.device)

    def observe(self, z: Tensor, ids: Tensor) -> None:
        session, options = self.session, self.options
        everyone = session.gather(z.detach().float())
        first = 0 if session.group is None else session.rank * len(z)
        scores = head_scores(everyone, options.temperature, options.tailness_k, first, len(ids))
        self.scores.update(session.gather(ids), session.gather(scores))

    def of_own_part(self) -> Tensor:
        return self.scores.tailness()[own_part(self.session.n_id)]

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores.load(state["scores"])


TAILNESS: dict[str, type[Sparsity]] = {"sparsity": Sparsity, "momentum": Momentum}


def tailness_of(options: Stage1Config) -> type[Sparsity]:
    """The class in `TAILNESS`: a sampler that does not look at tailness needs no scores of the batches."""
    return TAILNESS[options.tailness if options.ood_strategy == "tailness" else "sparsity"]

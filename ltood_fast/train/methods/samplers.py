"""Which images of the OOD pool join the training set. `SAMPLERS` is the registry: name -> class."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from torch.distributed import ProcessGroup

from ...sampling.resample import Budget, Sample, choose_for_samples, choose_ood, cluster_embeddings
from ..config import Stage1Config


class Sampler(Protocol):
    clusters_images: bool
    """Whether it needs k-means."""

    def __init__(self, options: Stage1Config, group: ProcessGroup | None): ...

    def sample(self, id_space: Tensor, ood_space: Tensor, density: Tensor | None, seed: int) -> Sample:
        """The OOD images of the next epochs.

        Args:
            id_space: [N, F], this rank's part of the embeddings of the ID images.
            ood_space: [M, F], the same of the OOD pool.
            density: [N], high = tail; None: the sparsity in `id_space`.
            seed: of k-means and of random choices.
        """


class ClusterSampler:
    """The nearest to the centroids of ID clusters, more of them for a cluster of higher tailness [paper]."""

    clusters_images = True
    strategy = "tailness"

    def __init__(self, options: Stage1Config, group: ProcessGroup | None):
        self.options, self.group = options, group

    def sample(self, id_space: Tensor, ood_space: Tensor, density: Tensor | None, seed: int) -> Sample:
        options = self.options
        clusters = cluster_embeddings(
            id_space,
            options.clusters,
            refine_steps=options.refine_steps,
            refine_lr=options.refine_lr,
            refine_batch=options.refine_batch,
            refine_nu=options.refine_nu,
            seed=seed,
            group=self.group,
        )
        return choose_ood(
            id_space,
            ood_space,
            clusters,
            Budget(options.budget, options.budget_temperature, self.strategy, seed),
            tailness_k=options.tailness_k,
            density=density,
            group=self.group,
        )


class RandomSampler(ClusterSampler):
    """Drawn at random, the baseline of the sampling [paper]; the clusters are for the report."""

    strategy = "random"


class TargetSampler:
    """The nearest to the sparsest ID images themselves [ltood_fast]."""

    clusters_images = False

    def __init__(self, options: Stage1Config, group: ProcessGroup | None):
        self.options, self.group = options, group

    def sample(self, id_space: Tensor, ood_space: Tensor, density: Tensor | None, seed: int) -> Sample:
        return choose_for_samples(
            id_space,
            ood_space,
            self.options.target_samples,
            self.options.budget,
            tailness_k=self.options.tailness_k,
            density=density,
            seed=seed,
            group=self.group,
        )


SAMPLERS: dict[str, type[Sampler]] = {
    "random": RandomSampler,
    "clusters": ClusterSampler,
    "samples": TargetSampler,
}


def sampler_of(options: Stage1Config) -> type[Sampler] | None:
    """The class in `SAMPLERS`, by the strategy, or by its targets for the strategy tailness; None: ID images alone."""
    if options.ood_strategy == "none":
        return None
    return SAMPLERS[options.targets if options.ood_strategy == "tailness" else options.ood_strategy]

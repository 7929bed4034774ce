"""The definitions in plain PyTorch: every op by its own name, obvious rather than quick, without checks of arguments.

They take the arguments of the op except ``group``, ``exchange`` and ``backend``.
"""

from .clustering import cluster_kl, refine_centroids
from .contrastive import domain_loss, nt_xent, psd_loss, stage1_loss, supcon
from .guided import farthest_cluster, feature_distill, guided_contrastive, relational_distill, stage2_loss
from .neighbors import cluster_tailness, knn, knn_density
from .sampling import sample_ood
from .two_sets import clip_loss, info_nce, sigmoid_loss

__all__ = [
    "clip_loss",
    "cluster_kl",
    "cluster_tailness",
    "domain_loss",
    "farthest_cluster",
    "feature_distill",
    "guided_contrastive",
    "info_nce",
    "knn",
    "knn_density",
    "nt_xent",
    "psd_loss",
    "refine_centroids",
    "relational_distill",
    "sample_ood",
    "sigmoid_loss",
    "stage1_loss",
    "stage2_loss",
    "supcon",
]

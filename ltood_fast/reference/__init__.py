"""The definition of every op in plain PyTorch: slow, obvious, right in float64. The kernels are tested against it."""

from .cluster_kl import cluster_kl, refine_centroids
from .contrastive import domain_loss, nt_xent, psd_loss, stage1_loss, supcon
from .guided import farthest_cluster, feature_distill, guided_contrastive, relational_distill, stage2_loss
from .knn import cluster_tailness, knn, knn_density
from .sampling import sample_ood

__all__ = [
    "cluster_kl",
    "cluster_tailness",
    "domain_loss",
    "farthest_cluster",
    "feature_distill",
    "guided_contrastive",
    "knn",
    "knn_density",
    "nt_xent",
    "psd_loss",
    "refine_centroids",
    "relational_distill",
    "sample_ood",
    "stage1_loss",
    "stage2_loss",
    "supcon",
]

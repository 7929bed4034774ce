from .kmeans import kmeans
from .ood import sample_ood

__all__ = ["kmeans", "sample_ood"]

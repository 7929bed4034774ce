"""FAISS is optional: it is imported when a function needs it, and its absence is one sentence."""

from __future__ import annotations

import warnings
from importlib import import_module, metadata
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

PACKAGES = ("faiss-cpu", "faiss-gpu")  # both install the folder `faiss`
MOST_SELECTED_ON_GPU = 2048  # neighbours or lists of one search: faiss/gpu/utils/DeviceDefs.cuh, GPU_MAX_SELECTION_K


def load_faiss(op: str) -> ModuleType:
    clash = _clash()
    try:
        import faiss
    except ImportError as error:
        advice = f"; {clash}" if clash else ": install it with `pip install faiss-cpu`"
        raise ImportError(f"{op}: FAISS cannot be imported ({error}){advice}") from error
    if clash:
        warnings.warn(f"{op}: {clash}", stacklevel=3)
    return faiss


def _clash() -> str:
    """One sentence where two packages have written the same folder, else empty."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    if len(found) < 2:
        return ""
    both = " ".join(PACKAGES)
    return f"{' and '.join(found)} overwrite each other's files: `pip uninstall {both}`, then install one of them"


def on_gpu(rows: Tensor) -> bool:
    return rows.is_cuda


def gpu_searches(faiss: ModuleType, rows: Tensor, selects: int = 1) -> bool:
    """Whether FAISS can search for the `selects` nearest of the rows on the GPU that holds them."""
    return on_gpu(rows) and selects <= MOST_SELECTED_ON_GPU and faiss.get_num_gpus() > 0


class FaissIndex:
    """A FAISS index that takes and returns tensors: on the GPU that holds its rows, if this FAISS has GPUs, else on the
    CPU.

    On a GPU nothing is copied to the host, and FAISS works in torch's current stream.

    Args:
        faiss: of `load_faiss`.
        kind: of `faiss.index_factory`.
        rows: float32 [N, D]; any rows of the width and on the device of those that are added and searched.
        inner_product: instead of squared Euclidean distances.
        selects: the most neighbours, or lists, that a search selects. More than FAISS can select on a GPU are selected
            on the CPU.
    """

    def __init__(self, faiss: ModuleType, kind: str, rows: Tensor, *, inner_product: bool, selects: int = 1):
        metric = faiss.METRIC_INNER_PRODUCT if inner_product else faiss.METRIC_L2
        self.faiss: Any = faiss.index_factory(rows.shape[1], kind, metric)
        self.on_gpu = gpu_searches(faiss, rows, selects)
        if self.on_gpu:
            import_module("faiss.contrib.torch_utils")  # from then on indices take tensors too
            with torch.cuda.device_of(rows):
                self.faiss = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), rows.get_device(), self.faiss)

    def train(self, rows: Tensor) -> None:
        with torch.cuda.device_of(rows):
            self.faiss.train(self._given(rows))

    def add(self, rows: Tensor) -> None:
        with torch.cuda.device_of(rows):
            self.faiss.add(self._given(rows))

    def search(self, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(distances or products [n, k], indices [n, k]) of the k best, -1 where fewer are found."""
        with torch.cuda.device_of(rows):
            found = self.faiss.search(self._given(rows), k)
        if self.on_gpu:
            return found
        values, indices = (torch.from_numpy(array).to(rows.device) for array in found)
        return values, indices

    def _given(self, rows: Tensor) -> Any:
        return rows.contiguous() if self.on_gpu else rows.cpu().numpy()

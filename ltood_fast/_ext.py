"""The only loader of ltood_fast._C, and what the build and this machine offer."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def missing_extension(folder: Path, error: ImportError) -> ImportError:
    """Says why `_C` cannot be loaded from the package in `folder`, and what to do."""
    if not list(folder.glob("_C*.so")):
        return ImportError(
            f"ltood_fast was imported from {folder}, which holds no compiled extension. If it is installed, Python "
            "found this source folder first: run from another folder. Otherwise build it in place: "
            "`pip install --no-build-isolation -e .`"
        )
    return ImportError(
        f"ltood_fast._C cannot be loaded ({error}): build it for this torch ({torch.__version__}) with "
        "`pip install --no-build-isolation .`"
    )


try:
    from . import _C
except ImportError as error:
    raise missing_extension(Path(__file__).resolve().parent, error) from error

# Public function -> the dispatcher op that serves it. An op without a kernel for a device runs its reference there.
OP_OF_FUNCTION = {
    "nt_xent": "contrastive",
    "supcon": "contrastive",
    "psd_loss": "contrastive",
    "domain_loss": "contrastive",
    "stage1_loss": "contrastive",
    "guided_contrastive": "guided",
    "relational_distill": "guided",
    "stage2_loss": "guided",
    "feature_distill": "feature_distill",  # nothing to fuse: no kernel
    "cluster_kl": "cluster_kl",
    "refine_centroids": "cluster_kl",
    "knn": "knn",
    "knn_density": "knn",
    "cluster_tailness": "knn",
    "info_nce": "info_nce",
    "clip_loss": "info_nce",
    "sigmoid_loss": "sigmoid_loss",
}

# Ops without a public function of their own: what the losses over a process group are made of.
_INNER_OPS = ("contrastive_partial", "guided_partial")


def _minor_version(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


def check_torch_version(built_for: str, running: str) -> None:
    """A torch extension is bound to the minor version of torch that it was built for."""
    if _minor_version(built_for) != _minor_version(running):
        raise ImportError(
            f"ltood_fast was built for torch {built_for} but runs on torch {running}: "
            "build it again with `pip install --no-cache-dir --no-build-isolation .`"
        )


check_torch_version(_C.build_info()["torch"], torch.__version__)


def cuda_path(asked: str | None, archs: str) -> str:
    """Which CUDA kernels a device of compute capability 9.0 runs: "sm80", or "sm90" where LTOOD_CUDA_PATH asks for it.

    The Hopper kernels (wgmma, TMA) of the contrastive family and of knn are not yet verified on hardware, so they must
    be asked for. The other kernels run the calls that these do not take: small temperatures,
    unnormalised rows, large D.
    """
    if asked not in (None, "", "sm80", "sm90"):
        raise ImportError(f"LTOOD_CUDA_PATH must be sm80 or sm90, got {asked!r}")
    if asked == "sm90" and "9.0a" not in archs:
        raise ImportError(
            f"LTOOD_CUDA_PATH=sm90 needs a build with TORCH_CUDA_ARCH_LIST containing 9.0a, got {archs or 'no CUDA'}"
        )
    return asked or "sm80"


cuda_path(os.environ.get("LTOOD_CUDA_PATH"), _C.build_info().get("cuda_archs", ""))


# Asked once: the dispatcher cannot be asked while torch.compile traces.
_KERNELS = frozenset(
    (op, device)
    for op in (*OP_OF_FUNCTION.values(), *_INNER_OPS)
    for device in ("cpu", "cuda")
    if hasattr(torch.ops.ltood_fast, op)
    and torch._C._dispatch_has_kernel_for_dispatch_key(f"ltood_fast::{op}", device.upper())
)


def has_kernel(op: str, device_type: str) -> bool:
    """Whether `torch.ops.ltood_fast.<op>` has a kernel for "cpu" or "cuda" in this build."""
    return (op, device_type) in _KERNELS


def build_info() -> dict[str, Any]:
    """Facts about this build and this machine.

    Returns:
        A dict of plain values: ``version``; ``torch`` (built for) and ``torch_running``; ``compiler``; ``cpu_isa`` (of
        the loops that this processor runs: "avx512", "avx2" or "baseline"); ``cuda`` (whether the CUDA kernels were
        compiled), ``cuda_reason``, ``cuda_archs``, ``cuda_runtime``, ``cuda_path`` (see `cuda_path`); ``cuda_devices``
        (names of the devices at hand); ``kernels``: for every public function and device type, ``"kernel"`` or
        ``"reference"``, which is what ``backend="auto"`` runs.
    """
    info = {"version": metadata_version(), **_C.build_info(), "torch_running": torch.__version__}
    if info["cuda"]:
        info["cuda_path"] = cuda_path(os.environ.get("LTOOD_CUDA_PATH"), info["cuda_archs"])
    info["cuda_devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    info["kernels"] = {
        function: {device: "kernel" if has_kernel(op, device) else "reference" for device in ("cpu", "cuda")}
        for function, op in OP_OF_FUNCTION.items()
    }
    return info


def metadata_version() -> str:
    """The installed version, or "0+source" when the package runs from a checkout that was only built in place."""
    try:
        return metadata.version("ltood_fast")
    except metadata.PackageNotFoundError:
        return "0+source"

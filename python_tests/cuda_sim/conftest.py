"""Tests here run the launchers of csrc/ops/<family> on the CPU, in the PTX simulator (see ../ptxsim)."""

from functools import cache

import pytest
from ptxsim import Device, Library, have_nvcc

LAUNCHERS = [
    "csrc/ops/contrastive/cuda/launch.cu", "csrc/ops/contrastive/cuda/sm90/launch.cu",
    "csrc/cuda/operand.cu", "csrc/cuda/segment_sums.cu", "csrc/ops/contrastive/cuda/partial_launch.cu",
    "csrc/cuda/topk/launch.cu",
    "csrc/cuda/topk/sm90/launch.cu", "csrc/ops/guided/cuda/launch.cu",
    "csrc/ops/guided/cuda/sm90/launch.cu", "csrc/ops/cluster_kl/cuda/launch.cu",
    "csrc/ops/cluster_kl/cuda/bwd_launch.cu", "csrc/cuda/probe.cu",
]  # fmt: skip
GLUE = [
    "csrc/ops/contrastive/cuda/glue.cpp", "csrc/ops/guided/guided.cpp", "csrc/ops/guided/cuda/glue.cpp",
    "csrc/ops/knn/cuda/glue.cpp", "csrc/cuda/operand_torch.cpp", "csrc/ops/cluster_kl/cuda/glue.cpp",
]  # fmt: skip
OPERATORS = (
    "contrastive", "contrastive_bwd", "contrastive_partial", "contrastive_partial_bwd", "guided", "guided_bwd",
    "guided_partial", "guided_partial_bwd", "knn", "cluster_kl", "cluster_kl_bwd",
)  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def _needs_nvcc():
    if not have_nvcc():
        pytest.skip("nvcc is needed to compile the kernels to PTX")


@cache
def _library(sources: tuple[str, ...], arch: str, defines: tuple[tuple[str, str], ...]) -> Library:
    return Library(sources, arch, dict(defines))


@pytest.fixture(scope="session")
def simulate():
    """Opens a Device on launcher files: simulate("csrc/cuda/topk/launch.cu", seed=1). Libraries are shared."""

    def open_device(*sources: str, arch: str = "80", defines: dict[str, str] | None = None, **options) -> Device:
        return Device(_library(sources, arch, tuple(sorted((defines or {}).items()))), **options)

    return open_device


@pytest.fixture(scope="session")
def simulated():
    from ptxsim.torch_glue import TorchDevice

    device = TorchDevice(LAUNCHERS, GLUE, arch="90a", defines={"LTOOD_SM90A": "1"}, seed=3, sm_count=4)
    device.define(*OPERATORS)
    return device


@pytest.fixture
def served(simulated):
    simulated.launches.clear()
    with simulated.serving(*OPERATORS):
        yield simulated
    assert simulated.launches, "no kernel ran"

"""Tests here run the launchers of csrc/ops/<family> on the CPU, in the PTX simulator (see ../ptxsim)."""

from functools import cache

import pytest
from ptxsim import Device, Library, have_nvcc


@pytest.fixture(scope="session", autouse=True)
def _needs_nvcc():
    if not have_nvcc():
        pytest.skip("nvcc is needed to compile the kernels to PTX")


@cache
def _library(sources: tuple[str, ...], arch: str, defines: tuple[tuple[str, str], ...]) -> Library:
    return Library(sources, arch, dict(defines))


@pytest.fixture(scope="session")
def simulate():
    """Opens a Device on launcher files: simulate("csrc/ops/knn/knn_launch.cu", seed=1). Libraries are shared."""

    def open_device(*sources: str, arch: str = "80", defines: dict[str, str] | None = None, **options) -> Device:
        return Device(_library(sources, arch, tuple(sorted((defines or {}).items()))), **options)

    return open_device

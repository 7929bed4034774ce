"""Executes the PTX of our CUDA kernels on the CPU, launched by their real host launchers. See README.md."""

from .build import have_nvcc
from .errors import SimError
from .runtime import Buffer, Device, Library

__all__ = ["Buffer", "Device", "Library", "SimError", "have_nvcc"]

"""What an implementation is, and pieces that several adapters share."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import Case

SIXTEEN_BITS = ("bfloat16", "float16")


@dataclass(frozen=True)
class Implementation:
    name: str
    loaders: Mapping[str, Callable[[], Callable]]
    """op -> a function that imports (compiles) what is needed and returns the callable, which takes the op's inputs."""
    settings: str
    """How it is called, and why that is its fairest setting."""
    kind: str = "rival"
    """"baseline", "rival" or "ours"."""
    package: str = ""
    """The distribution whose version a result names."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32", *SIXTEEN_BITS)
    most_rows: int | None = None
    """Larger cases are left out: `settings` says why."""
    graphed: bool = False
    """Replay the whole call from a CUDA graph."""
    tested_on: str = "cpu"
    """Where its adapter has run: "cpu", "interpreter" (Triton's), "nowhere". Look twice at what another device says."""

    def serves(self, case: Case) -> bool:
        return (
            case.op in self.loaders
            and case.device in self.devices
            and case.dtype in self.dtypes
            and (self.most_rows is None or self.most_rows >= case.N)
        )

    def version(self) -> str | None:
        try:
            return metadata.version(self.package) if self.package else None
        except metadata.PackageNotFoundError:
            return None


def load_file(package: str, path: str) -> ModuleType:
    """One file of an installed package without the package: their __init__ files import trainers and tokenizers."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {package!r}")
    file = Path(next(iter(spec.submodule_search_locations)), path)
    spec = importlib.util.spec_from_file_location(f"_{package}_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def views(z: Tensor) -> tuple[Tensor, Tensor]:
    """The two views of a batch, as libraries take them."""
    half = len(z) // 2
    return z[:half], z[half:]


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1)


def partners(z: Tensor) -> Tensor:
    """[N] the row of the other view of each row's image."""
    return torch.arange(len(z), device=z.device).roll(len(z) // 2)

"""Packages that only some options need: imported when one does, and their absence is one sentence."""

from __future__ import annotations

import importlib
from types import ModuleType


def import_extra(module: str, op: str, what: str, extra: str) -> ModuleType:
    """The module, or an ImportError that says which option needs it and how to get it."""
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as error:  # a build for another torch fails in any of these ways
        reason = " ".join(str(error).split())
        package = module.partition(".")[0]
        raise ImportError(
            f"{op}: {what} needs {package}, which cannot be imported ({reason}): pip install {package}, or install "
            f"ltood_fast with its extra [{extra}]"
        ) from error

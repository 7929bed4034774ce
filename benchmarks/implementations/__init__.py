"""The registry of implementations: everyone who computes an op, with the settings that are fairest to them.

`IMPLEMENTATIONS` maps a name to who it is. Rivals are optional: they are imported when they are first measured, and one
that cannot be imported becomes a row with its message.
"""

from __future__ import annotations

from ..cases import Case
from . import libraries, native, search, triton_kernels
from .base import Implementation

IMPLEMENTATIONS: dict[str, Implementation] = {
    implementation.name: implementation
    for module in (native, libraries, search, triton_kernels)
    for implementation in module.IMPLEMENTATIONS
}

__all__ = ["IMPLEMENTATIONS", "Implementation", "of_case"]


def of_case(case: Case, registry: dict[str, Implementation] | None = None) -> list[Implementation]:
    """Who computes a case: its op, on its device, in its dtype and direction; ours last."""
    found = [i for i in (IMPLEMENTATIONS if registry is None else registry).values() if i.serves(case)]
    return sorted(found, key=lambda i: i.kind == "ours")

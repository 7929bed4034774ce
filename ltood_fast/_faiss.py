"""FAISS is optional: it is imported when a function needs it, and its absence is one sentence."""

from __future__ import annotations

from types import ModuleType


def load_faiss(op: str) -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            f"{op}: FAISS cannot be imported ({error}): install it with `pip install faiss-cpu`"
        ) from error
    return faiss

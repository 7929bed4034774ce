"""Progress bars of long steps, which a run shows or hides as a whole: `run.progress`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

DELAY = 2.0  # seconds before a bar shows: a short step has none
_shown: ContextVar[bool] = ContextVar("shown", default=True)


@contextlib.contextmanager
def progress_shown(shown: bool) -> Iterator[None]:
    """Whether the bars that are made within it are shown."""
    before = _shown.set(shown)
    try:
        yield
    finally:
        _shown.reset(before)


def progress_bar(total: int, what: str, unit: str = " images") -> Any:
    """A tqdm bar, which goes away when it is done."""
    from tqdm import tqdm

    interval = 0.5 if sys.stderr.isatty() else 15.0
    hidden = not _shown.get()
    return tqdm(total=total, desc=what, unit=unit, disable=hidden, delay=DELAY, mininterval=interval, leave=False)

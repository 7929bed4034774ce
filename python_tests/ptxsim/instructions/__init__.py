"""The instruction set, one module per kind. Importing it fills the registry."""

from . import (  # noqa: F401
    arithmetic,
    async_copy,
    bits,
    bulk_copy,
    convert,
    mbarrier,
    memory,
    tensor,
    warp,
    wgmma,
)

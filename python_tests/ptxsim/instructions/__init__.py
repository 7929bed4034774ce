"""The instruction set, one module per kind. Importing it fills the registry."""

from . import arithmetic, async_copy, bits, convert, memory, tensor, warp  # noqa: F401

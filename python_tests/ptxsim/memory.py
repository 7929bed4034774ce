"""Device memory and shared memory: bytes, which of them were ever written, and the bounds of every allocation.

Generic addresses are told apart by windows, as on the device: shared memory, a thread's local memory, the parameters
and everything else, which is global."""

import bisect

import numpy as np

from .errors import SimError
from .masks import every

GLOBAL_BASE = 0x1000_0000_0000
SHARED_WINDOW = 0x0100_0000_0000
LOCAL_WINDOW = 0x0200_0000_0000
PARAM_WINDOW = 0x0300_0000_0000
WINDOW_SIZE = 1 << 32

RED_ZONE = 256  # bytes between allocations that belong to nobody
POISON = 0xFF  # NaN in every float format
SHARED_BASE = 1024  # shared addresses start here, as on sm_90: address 0 stays invalid


class GlobalMemory:
    """Device memory as one growing array; addresses are GLOBAL_BASE + offset."""

    def __init__(self, capacity: int = 16 << 20):
        self.bytes = np.zeros(capacity, np.uint8)
        self.written = np.zeros(capacity, bool)
        self._starts: list[int] = []  # addresses of the allocations, ascending
        self._sizes: list[int] = []
        self._top = RED_ZONE

    @property
    def extent(self) -> int:
        """Bytes from GLOBAL_BASE to the end of the last allocation."""
        return self._top

    def allocate(self, size: int) -> int:
        offset = self._top
        self._top = (offset + size + RED_ZONE + 255) // 256 * 256
        if self._top > len(self.bytes):
            grown = max(self._top, 2 * len(self.bytes))
            for name in ("bytes", "written"):
                old = getattr(self, name)
                new = np.zeros(grown, old.dtype)
                new[: len(old)] = old
                setattr(self, name, new)
        self.bytes[offset : offset + size] = POISON
        self._starts.append(GLOBAL_BASE + offset)
        self._sizes.append(size)
        return GLOBAL_BASE + offset

    def free(self, address: int):
        index = self._starts.index(address)
        del self._starts[index], self._sizes[index]

    def offset(self, address: int, size: int, what: str) -> int:
        """Offset of a host-side access (memcpy, memset), checked."""
        self.check(np.array([address]), size, what)
        return address - GLOBAL_BASE

    def check(self, addresses: np.ndarray, size: int, where: str, describe=None):
        """Every access of size bytes must lie inside one allocation. describe(i) names the thread of access i."""
        low, high = int(np.minimum.reduce(addresses)), int(np.maximum.reduce(addresses)) + size
        index = bisect.bisect_right(self._starts, low) - 1
        if index >= 0 and high <= self._starts[index] + self._sizes[index]:
            return
        starts = np.array(self._starts, np.int64)
        ends = starts + np.array(self._sizes, np.int64)
        slot = np.searchsorted(starts, addresses, "right") - 1
        inside = (slot >= 0) & (addresses + size <= ends[slot]) if len(starts) else np.zeros(len(addresses), bool)
        if not every(inside):
            bad = int(np.flatnonzero(~inside)[0])
            thread = f"{describe(bad)}: " if describe else ""
            raise SimError(f"{where}: {thread}global memory out of bounds: {self._explain(int(addresses[bad]), size)}")

    def _explain(self, address: int, size: int) -> str:
        index = bisect.bisect_right(self._starts, address) - 1
        if index < 0:
            return f"{size} bytes at {address:#x}, which is in no allocation"
        offset = address - self._starts[index]
        return f"{size} bytes at byte {offset} of an allocation of {self._sizes[index]} bytes"


class SharedMemory:
    """Shared memory of one block. Static variables first, dynamic memory behind them, as on the device."""

    def __init__(self, variables, dynamic_size: int):
        """variables: the kernel's shared ptx.Variables; the unsized extern ones all name the dynamic memory."""
        self.symbols: dict[str, int] = {}
        self._ranges: list[tuple[int, int]] = []
        top = SHARED_BASE
        for variable in (v for v in variables if v.size):
            top = -(-top // variable.align) * variable.align
            self._place(variable.name, top, variable.size)
            top += variable.size + 16  # a red zone, which hardware does not have
        unsized = [v for v in variables if not v.size]
        align = max([16] + [v.align for v in unsized])
        top = -(-top // align) * align
        for variable in unsized:
            self._place(variable.name, top, dynamic_size)
        if not unsized and dynamic_size:
            self._ranges.append((top, top + dynamic_size))
        self.size = (top + dynamic_size + 64 + 15) // 16 * 16
        self.bytes = np.full(self.size, POISON, np.uint8)
        self.written = np.zeros(self.size, bool)

    def _place(self, name: str, start: int, size: int):
        self.symbols[name] = start
        self._ranges.append((start, start + size))

    def check(self, addresses: np.ndarray, size: int, where: str, describe=None):
        low, high = int(np.minimum.reduce(addresses)), int(np.maximum.reduce(addresses)) + size
        if any(start <= low and high <= end for start, end in self._ranges):
            return
        inside = np.zeros(len(addresses), bool)
        for start, end in self._ranges:
            inside |= (start <= addresses) & (addresses + size <= end)
        if not every(inside):
            bad = int(np.flatnonzero(~inside)[0])
            thread = f"{describe(bad)}: " if describe else ""
            ranges = ", ".join(f"[{start}, {end})" for start, end in self._ranges) or "none"
            raise SimError(
                f"{where}: {thread}shared memory out of bounds: {size} bytes at {int(addresses[bad])}, "
                f"declared: {ranges}"
            )


_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def gather(data: np.ndarray, offsets: np.ndarray, width: int, count: int) -> np.ndarray:
    """count words of width bytes at each offset (a multiple of the width): unsigned [accesses, count]."""
    words = data.view(_WORDS[width])
    index = offsets // width
    if count == 1:
        return words[index][:, None]
    return words[index[:, None] + np.arange(count)]


def scatter(data: np.ndarray, offsets: np.ndarray, values: np.ndarray):
    """Inverse of gather: values [accesses, count], unsigned."""
    words = data.view(values.dtype)
    index = offsets // values.dtype.itemsize
    if values.shape[1] == 1:
        words[index] = values[:, 0]
    else:
        words[index[:, None] + np.arange(values.shape[1])] = values


_ALL_WRITTEN = {1: 0x01, 2: 0x0101, 4: 0x01010101, 8: 0x0101010101010101}


def all_written(written: np.ndarray, offsets: np.ndarray, width: int, count: int) -> np.ndarray:
    """Per access: was every byte of it ever written?"""
    flags = gather(written.view(np.uint8), offsets, width, count)
    return (flags == _ALL_WRITTEN[width]).all(1)


def mark_written(written: np.ndarray, offsets: np.ndarray, width: int, count: int):
    index = offsets // width
    if count > 1:
        index = index[:, None] + np.arange(count)
    written.view(_WORDS[width])[index] = _ALL_WRITTEN[width]

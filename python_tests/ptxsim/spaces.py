"""The state spaces as a block sees them: loads and stores checked for bounds, alignment, initialisation and races."""

import numpy as np

from .errors import SimError
from .masks import every, some
from .memory import (
    GLOBAL_BASE,
    LOCAL_WINDOW,
    PARAM_WINDOW,
    SHARED_WINDOW,
    WINDOW_SIZE,
    all_written,
    gather,
    mark_written,
    scatter,
)
from .race import GridShadow, Shadow


class Space:
    """Shared memory of the block or device memory."""

    name = "?"
    base = 0

    def __init__(self, block, memory, shadow: Shadow):
        self.block, self.memory, self.shadow = block, memory, shadow

    def locate(self, threads: np.ndarray, addresses: np.ndarray, size: int, site: int) -> np.ndarray:
        """Offsets of accesses of size bytes, after the checks of alignment and bounds."""
        where = self.block.program.where[site]
        if np.bitwise_or.reduce(addresses) & (size - 1):
            bad = int(np.flatnonzero(addresses & (size - 1))[0])
            who = self.block.describe(int(threads[bad]))
            raise SimError(f"{where}: {who}: {self.name} address {int(addresses[bad]):#x} is no multiple of {size}")
        self.memory.check(addresses, size, where, lambda i: self.block.describe(int(threads[i])))
        return addresses - self.base if self.base else addresses

    def load(self, threads, addresses, width: int, count: int, site: int, strong: bool = False) -> np.ndarray:
        """Unsigned [accesses, count]. strong: may meet atomics (of other threads)."""
        size = width * count
        offsets = self.locate(threads, addresses, size, site)
        self.require_written(threads, offsets, width, count, site)
        self.note_read(threads, offsets, size, site, strong)
        return gather(self.memory.bytes, offsets, width, count)

    def require_written(self, threads, offsets, width, count, site):
        written = all_written(self.memory.written, offsets, width, count)
        if not every(written):
            bad = int(np.flatnonzero(~written)[0])
            raise SimError(
                f"{self.block.program.where[site]}: {self.block.describe(int(threads[bad]))}: "
                f"read of {self.name} memory that was never written, at {int(offsets[bad]) + self.base:#x}"
            )

    def store(self, threads, addresses, values: np.ndarray, site: int, strong: bool = False):
        width, count = values.dtype.itemsize, values.shape[1]
        offsets = self.locate(threads, addresses, width * count, site)
        clash = self.note_write(threads, offsets, width * count, site, strong)
        scatter(self.memory.bytes, offsets, values)
        mark_written(self.memory.written, offsets, width, count)
        if clash is not None:
            self._same_instruction(clash, threads, offsets, values, site)

    def _same_instruction(self, clash, threads, offsets, values, site):
        """Threads of one instruction wrote the same word: allowed inside a warp if all wrote the same."""
        clashing = clash.reshape(len(threads), -1).any(1)
        final = gather(self.memory.bytes, offsets, values.dtype.itemsize, values.shape[1])
        other = (final != values).any(1)
        winners = (self.shadow.writes[offsets // self.shadow.granule] & 0x7FF) // 32
        bad = np.flatnonzero(clashing & (other | (winners != threads // 32)))
        if len(bad):
            thread = int(threads[bad[0]])
            self.fail_race(site, thread, int(offsets[bad[0]]), "another thread writes it in the same instruction")

    def note_read(self, threads, offsets, size, site, strong=False):
        who, words = self.shadow.expand(threads, offsets, size)
        race = self.shadow.read(self.block.clocks, who, words, site, strong)
        if race:
            self._report(race, who, words, site, "wrote")

    def note_write(self, threads, offsets, size, site, atomic=False):
        who, words = self.shadow.expand(threads, offsets, size)
        race, clash = self.shadow.write(self.block.clocks, who, words, site, atomic)
        if race:
            self._report(race, who, words, site, "accessed")
        return clash

    def _report(self, race, who, words, site, verb):
        index, other_site, other = race
        earlier = (
            f"{self.block.describe(other)} {verb} it at {self.block.program.where[other_site]}, nothing orders the two"
        )
        self.fail_race(site, int(who[index]), int(words[index]) * self.shadow.granule, earlier)

    def fail_race(self, site: int, thread: int, offset: int, why: str):
        where, address = self.block.program.where[site], offset + self.base
        raise SimError(f"{where}: race on {self.name} memory at {address:#x}: {self.block.describe(thread)}; {why}")


class SharedSpace(Space):
    name = "shared"

    def note_engine_write(self, thread: int, words: np.ndarray, site: int):
        """The copy engine writes words on behalf of a thread: ordered after what the thread knows, before nothing."""
        who = np.full(len(words), thread)
        race, _ = self.shadow.write(self.block.clocks, who, words, site)
        if race:
            self._report(race, who, words, site, "accessed")
        self.shadow.assign_to_engine(self.block.clocks, words, site)


class GlobalSpace(Space):
    """Device memory; besides the threads of a block, blocks of a launch race with each other."""

    name = "global"
    base = GLOBAL_BASE
    shadow: GridShadow

    def note_read(self, threads, offsets, size, site, strong=False):
        super().note_read(threads, offsets, size, site, strong)
        who, words = self.shadow.expand(threads, offsets, size)
        foreign = self.shadow.read_by_block(words, strong)
        if foreign is not None:
            self._after_writes(foreign, who, words, site, "wrote")

    def note_write(self, threads, offsets, size, site, atomic=False):
        who, words = self.shadow.expand(threads, offsets, size)
        written, read = self.shadow.write_by_block(words, atomic)
        if some(written):
            self._after_writes(written, who, words, site, "writes")
        if some(read):
            self._after_reads(read, who, words, site)
        self.shadow.writer_block[words] = self.shadow.block
        return super().note_write(threads, offsets, size, site, atomic)

    def _after_writes(self, foreign, who, words, site, verb):
        """Words another block wrote: a race unless fences and atomics order the two."""
        for index in np.flatnonzero(foreign).tolist():
            writer, time, thread = self.shadow.last_write(words[index])
            if not self.block.order.knows_access(int(who[index]), writer, thread, time):
                self._fail_foreign(index, who, words, site, f"block {writer - 1} of the launch {verb} it")

    def _after_reads(self, foreign, who, words, site):
        others = set(range(1, self.block.launch.blocks + 1)) - {self.shadow.block}
        for index in np.flatnonzero(foreign).tolist():
            reader = int(self.shadow.reader_block[words[index]])
            readers = others if reader == GridShadow.SEVERAL else {reader}
            if not readers <= self.block.order.knows_blocks(int(who[index])):
                self._fail_foreign(index, who, words, site, "another block of the launch reads it")

    def _fail_foreign(self, index, who, words, site, why):
        why += ", nothing orders the two"
        self.fail_race(site, int(who[index]), int(words[index]) * self.shadow.granule, why)


class LocalSpace:
    """A thread's own memory: registers the compiler indexes, and what it spills."""

    name = "local"

    def __init__(self, block, size: int, lanes: int):
        self.block, self.size = block, size
        self.bytes = np.zeros(max(size, 1) * lanes, np.uint8)
        self.written = np.zeros(max(size, 1) * lanes, bool)

    def _offsets(self, threads, addresses, size, site):
        bad = (addresses < 0) | (addresses + size > self.size) | (addresses % size != 0)
        if some(bad):
            first = int(np.flatnonzero(bad)[0])
            raise SimError(
                f"{self.block.program.where[site]}: {self.block.describe(int(threads[first]))}: local memory out of "
                f"bounds or misaligned: {size} bytes at {int(addresses[first])} of {self.size}"
            )
        return threads * self.size + addresses

    def load(self, threads, addresses, width, count, site, strong=False):
        offsets = self._offsets(threads, addresses, width * count, site)
        if not every(all_written(self.written, offsets, width, count)):
            raise SimError(f"{self.block.program.where[site]}: read of local memory that was never written")
        return gather(self.bytes, offsets, width, count)

    def store(self, threads, addresses, values, site, strong=False):
        width, count = values.dtype.itemsize, values.shape[1]
        offsets = self._offsets(threads, addresses, width * count, site)
        scatter(self.bytes, offsets, values)
        mark_written(self.written, offsets, width, count)


class ParamSpace:
    """The arguments of the launch: the same bytes for every thread, read only."""

    name = "param"

    def __init__(self, block, data: np.ndarray):
        self.block, self.bytes = block, data

    def load(self, threads, addresses, width, count, site, strong=False):
        if (addresses < 0).any() or int(addresses.max()) + width * count > len(self.bytes):
            raise SimError(f"{self.block.program.where[site]}: read beyond the kernel's parameters")
        return gather(self.bytes, addresses, width, count)

    def store(self, threads, addresses, values, site, strong=False):
        raise SimError(f"{self.block.program.where[site]}: a kernel's parameters are read only")


class GenericSpace:
    """Generic addresses: each access goes to the space of its window."""

    def __init__(self, shared, local, param, device):
        self._windows = [(PARAM_WINDOW, param), (LOCAL_WINDOW, local), (SHARED_WINDOW, shared)]
        self._device = device

    def split(self, addresses: np.ndarray):
        """(indices, space, addresses in that space) of each space concerned."""
        rest = np.ones(len(addresses), bool)
        for base, space in self._windows:
            inside = (addresses >= base) & (addresses < base + WINDOW_SIZE)
            if some(inside):
                rest &= ~inside
                yield np.flatnonzero(inside), space, addresses[inside] - base
        if some(rest):
            yield np.flatnonzero(rest), self._device, addresses[rest]

    def load(self, threads, addresses, width, count, site, strong=False):
        result = np.zeros((len(addresses), count), f"u{width}")
        for index, space, local in self.split(addresses):
            result[index] = space.load(threads[index], local, width, count, site, strong)
        return result

    def store(self, threads, addresses, values, site, strong=False):
        for index, space, local in self.split(addresses):
            space.store(threads[index], local, np.ascontiguousarray(values[index]), site, strong)

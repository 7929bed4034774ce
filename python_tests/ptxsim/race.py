"""Race detection by happens-before, exact and independent of the order in which warps and blocks happen to run.

Time is a counter that steps at every synchronisation. known[u, t] is the time up to which thread u knows what thread
t did: an access of t at time >= known[u, t] is unordered with what u does now. A shadow word remembers the last write
and, per warp, the last read; two unordered accesses, one of them a write and not both atomic, are a race."""

import numpy as np

from .masks import every, some

OWN = np.int64(1) << 62  # a thread always knows what it did itself
MANY = 63  # in place of a lane: several unordered lanes of the warp read the word

# A record packs time (31 bits), instruction (20), atomic (1), thread or lane (11).
_TIME, _SITE, _ATOMIC = 32, 12, 11
_THREAD_MASK, _SITE_MASK = (1 << 11) - 1, (1 << 20) - 1
WARP = 32


class Clocks:
    """Who knows what of whom in one block. Thread number `threads` is the asynchronous copy engine."""

    def __init__(self, threads: int, start: int):
        self.threads, self.warps = threads, threads // WARP
        self.now = start
        self.known = np.full((threads + 1, threads + 1), start, np.int64)
        np.fill_diagonal(self.known, OWN)
        self.floor = start  # whatever is older is known to every thread
        self.warp_floor = np.full(self.warps + 1, start, np.int64)
        self._touched = np.zeros(self.warps, bool)  # accesses since the last synchronisation of the warp

    def touch(self):
        self._touched[:] = True

    def barrier(self, arrived: np.ndarray, released: np.ndarray):
        """Threads `released` learn what the threads `arrived` did (masks over the block)."""
        self.now += 1
        gained = self.known[:-1][arrived].max(0)
        gained[:-1][arrived] = self.now
        members = np.flatnonzero(released)
        self.known[members] = np.maximum(self.known[members], gained)
        self.known[members, members] = OWN
        self._touched[:] = True
        if every(arrived) and every(released):
            self.floor = self.now
        whole = (arrived & released).reshape(-1, WARP).all(1)
        self.warp_floor[:-1][whole] = self.now

    def knowledge(self, threads: np.ndarray) -> np.ndarray:
        """What these threads know and did by now, for others to learn."""
        self.now += 1
        return np.minimum(self.known[threads].max(0), self.now)

    def engine_knowledge(self, thread: int) -> np.ndarray:
        """The same for a copy that the engine makes now on behalf of a thread."""
        known = self.knowledge(np.array([thread]))
        known[-1] = self.now
        return known

    def learn(self, threads: np.ndarray, knowledge: np.ndarray):
        self.known[threads] = np.maximum(self.known[threads], knowledge)
        self.known[threads, threads] = OWN
        self._touched[:] = True

    def synchronise_warps(self, mask: np.ndarray | None):
        """The lanes of each warp in mask learn from each other (__syncwarp, shuffles, votes)."""
        if mask is None:
            warps = self._touched
            if not some(warps):
                return
            self._join(np.flatnonzero(warps), None)
        else:
            lanes = mask.reshape(-1, WARP)
            full = lanes.all(1) & self._touched
            if some(full):
                self._join(np.flatnonzero(full), None)
            for warp in np.flatnonzero(lanes.any(1) & ~lanes.all(1)):
                self._join(np.array([warp]), np.flatnonzero(lanes[warp]))

    def _join(self, warps: np.ndarray, lanes: np.ndarray | None):
        self.now += 1
        if lanes is None:
            view = self.known[:-1].reshape(self.warps, WARP, -1)
            view[warps] = view[warps].max(1, keepdims=True)
            self.warp_floor[warps] = self.now
            self._touched[warps] = False
            lanes = np.arange(WARP)
        else:
            members = warps[0] * WARP + lanes
            self.known[members] = self.known[members].max(0)
        members = warps[:, None] * WARP + lanes
        self.known[members[:, :, None], members[:, None, :]] = self.now
        flat = members.ravel()
        self.known[flat, flat] = OWN


def _unpack(record: int) -> tuple[int, int]:
    """(site, thread or lane) of a record."""
    return record >> _SITE & _SITE_MASK, record & _THREAD_MASK


class Shadow:
    """Last accesses of every word of a memory. A word is as wide as the narrowest access of the kernel."""

    def __init__(self, size: int, granule: int, warps: int):
        self.granule = granule
        self.words = -(-size // granule)
        self.writes = np.zeros(self.words, np.int64)
        self.reads = np.zeros((warps + 1) * self.words, np.int64)

    def expand(self, threads: np.ndarray, offsets: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The words of accesses of size bytes, and the thread of each."""
        count = -(-size // self.granule)
        words = offsets // self.granule
        if count == 1:
            return threads, words
        return np.repeat(threads, count), (words[:, None] + np.arange(count)).ravel()

    def read(self, clocks: Clocks, threads: np.ndarray, words: np.ndarray, site: int, strong: bool = False):
        """Records reads. A race gives (index of the access, site and thread of the earlier write), else None.

        strong: reads that may meet atomics. They leave no trace, so a plain write behind them is not seen as a race."""
        clocks.touch()
        race = self._against_writes(clocks, threads, words, strong)
        if strong:
            return race
        warps = threads // WARP
        slots = warps * self.words + words
        lanes = threads % WARP
        new = (clocks.now << _TIME | site << _SITE) + lanes
        old = self.reads[slots]
        self.reads[slots] = new
        shared_word = self.reads[slots] != new
        recent = old >= clocks.warp_floor[warps] << _TIME
        shared_word |= recent & ((old & MANY) != lanes)
        if some(shared_word):
            self.reads[slots[shared_word]] |= MANY
        return race

    def write(self, clocks: Clocks, threads: np.ndarray, words: np.ndarray, site: int, atomic: bool = False):
        """Records writes. Gives (race as in read, accesses that clash with another of the same instruction)."""
        clocks.touch()
        race = self._against_writes(clocks, threads, words, atomic)
        race = race or self._against_reads(clocks, threads, words)
        new = (clocks.now << _TIME | site << _SITE | int(atomic) << _ATOMIC) + threads
        self.writes[words] = new
        clash = None
        if not atomic:
            clash = self.writes[words] != new
            clash = clash if some(clash) else None
        return race, clash

    def assign_to_engine(self, clocks: Clocks, words: np.ndarray, site: int):
        """The last write of these words is the copy engine's."""
        self.writes[words] = (clocks.now << _TIME | site << _SITE) + clocks.threads

    def _against_writes(self, clocks, threads, words, atomic):
        last = self.writes[words]
        suspicious = last >= clocks.floor << _TIME
        if atomic:
            suspicious &= (last >> _ATOMIC & 1) == 0
        if not some(suspicious):
            return None
        index = np.flatnonzero(suspicious)
        last = last[index]
        unordered = (last >> _TIME) >= clocks.known[threads[index], last & _THREAD_MASK]
        if not some(unordered):
            return None
        first = np.flatnonzero(unordered)[0]
        return int(index[first]), *_unpack(int(last[first]))

    def _against_reads(self, clocks, threads, words):
        rows = self.reads.reshape(-1, self.words)[:, words]
        suspicious = rows >= clocks.floor << _TIME
        if not some(suspicious):
            return None
        warps, index = np.nonzero(suspicious)
        records = rows[warps, index]
        times, lanes = records >> _TIME, records & MANY
        writers = threads[index]
        known = clocks.known[writers, np.minimum(warps * WARP + lanes, clocks.threads)]
        many = lanes == MANY
        if some(many):
            whole = clocks.known[:, :-1].reshape(clocks.threads + 1, -1, WARP).min(2)
            known = np.where(many, whole[writers, np.minimum(warps, clocks.warps - 1)], known)
        unordered = times >= known
        if not some(unordered):
            return None
        first = np.flatnonzero(unordered)[0]
        site, lane = _unpack(int(records[first]))
        return int(index[first]), site, int(warps[first]) * WARP + (lane if lane < WARP else 0)


class GridShadow(Shadow):
    """Shadow of device memory for one launch: also knows which block touched a word. Blocks are unordered."""

    NONE, SEVERAL = 0, -1

    def __init__(self, size: int, granule: int, warps: int):
        super().__init__(size, granule, warps)
        self.writer_block = np.zeros(self.words, np.int32)
        self.reader_block = np.zeros(self.words, np.int32)
        self.block = 0  # number of the running block, from 1

    def read_by_block(self, words: np.ndarray, strong: bool) -> np.ndarray | None:
        """Records reads of the running block; accesses to words another block wrote."""
        writers = self.writer_block[words]
        foreign = (writers != self.NONE) & (writers != self.block)
        if strong:
            foreign &= (self.writes[words] >> _ATOMIC & 1) == 0
        else:
            readers = self.reader_block[words]
            own = (readers == self.NONE) | (readers == self.block)
            self.reader_block[words] = np.where(own, self.block, self.SEVERAL)
        return foreign if some(foreign) else None

    def write_by_block(self, words: np.ndarray, atomic: bool) -> tuple[np.ndarray, np.ndarray]:
        """Accesses to words that another block (wrote, read) before. The caller then sets writer_block."""
        writers, readers = self.writer_block[words], self.reader_block[words]
        written = (writers != self.NONE) & (writers != self.block)
        if atomic:
            written &= (self.writes[words] >> _ATOMIC & 1) == 0
        read = (readers != self.NONE) & (readers != self.block)
        return written, read

    def last_write(self, word: int) -> tuple[int, int, int]:
        """(block, time, thread)."""
        record = int(self.writes[word])
        return int(self.writer_block[word]), record >> _TIME, record & _THREAD_MASK

"""What orders two blocks of a launch: a fence and then an atomic in one, an atomic on the same address and then a fence
in the other (the pattern of "the last block sums up"). Nothing else does."""

from dataclasses import dataclass

import numpy as np

from .race import Clocks


@dataclass(frozen=True)
class Published:
    """What an atomic made known: accesses of `block` by thread t before time until[t]."""

    block: int
    until: np.ndarray


class BlockOrder:
    """The fences and atomics of one running block; `published` (address -> list) is shared by the launch."""

    def __init__(self, clocks: Clocks, block: int, published: dict[int, list[Published]]):
        self.clocks, self.block, self.published = clocks, block, published
        self.fence_time = np.zeros(clocks.threads, np.int64)
        self.at_fence = np.zeros((clocks.threads, clocks.threads), np.int64)  # what a thread knew at its last fence
        self.seen: list[tuple[int, int, list[Published]]] = []  # (thread, time) of an atomic and what it may acquire
        self.acquired: list[tuple[int, int, Published]] = []  # (thread, time) of the fence behind it

    def fence(self, threads: np.ndarray):
        clocks = self.clocks
        clocks.now += 1
        self.fence_time[threads] = clocks.now
        self.at_fence[threads] = np.minimum(clocks.known[threads, :-1], clocks.now)
        for thread in threads if self.seen else ():
            for other, time, entries in self.seen:
                if self._after(thread, other, time):
                    self.acquired += [(int(thread), clocks.now, entry) for entry in entries]

    def atomic(self, threads: np.ndarray, addresses: np.ndarray):
        clocks = self.clocks
        clocks.now += 1
        for thread, address in zip(threads.tolist(), addresses.tolist(), strict=True):
            entries = self.published.setdefault(address, [])
            if any(entry.block != self.block for entry in entries):
                self.seen.append((thread, clocks.now, [entry for entry in entries if entry.block != self.block]))
            fenced = self.fence_time > 0
            ordered = fenced & (clocks.known[thread, :-1] > self.fence_time)
            until = np.maximum(np.where(ordered, self.fence_time, 0), self.at_fence[thread])
            if until.any():
                entries.append(Published(self.block, until))
                entries += [entry for _, _, entry in self._known_to(thread)]

    def _after(self, thread: int, other: int, time: int) -> bool:
        """Is `thread` now ordered after what `other` did at `time`?"""
        return thread == other or self.clocks.known[thread, other] > time

    def _known_to(self, thread: int):
        return [item for item in self.acquired if self._after(thread, item[0], item[1])]

    def knows_access(self, thread: int, block: int, other: int, time: int) -> bool:
        """Is the access of thread `other` of `block` at `time` ordered before what `thread` does now?"""
        return any(entry.block == block and entry.until[other] > time for _, _, entry in self._known_to(thread))

    def knows_blocks(self, thread: int) -> set[int]:
        return {entry.block for _, _, entry in self._known_to(thread)}

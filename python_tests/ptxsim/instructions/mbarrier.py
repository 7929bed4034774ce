"""mbarrier: arrivals and bytes that complete a phase, and threads that poll for it (sm_90)."""

from dataclasses import dataclass, field

import numpy as np

from ..errors import SimError
from .registry import implements, unsupported


@dataclass
class MBarrier:
    count: int  # arrivals that a phase takes
    pending: int
    transactions: int = 0  # bytes announced and not yet there
    phase: int = 0
    gathered: np.ndarray | None = None  # what the arrivals of this phase knew (see race.Clocks)
    completed: list[np.ndarray] = field(default_factory=list)  # the same of the phases that are over

    def arrive(self, block, where: str, arrivals: int, knowledge: np.ndarray | None):
        if knowledge is not None:
            self.gathered = knowledge if self.gathered is None else np.maximum(self.gathered, knowledge)
        self.pending -= arrivals
        if self.pending < 0:
            raise SimError(f"{where}: more arrivals at an mbarrier than its count of {self.count}")
        if self.pending == 0 and self.transactions == 0:
            self.phase += 1
            self.pending = self.count
            self.completed.append(self.gathered)
            self.gathered = None
            block.progress += 1


def barrier_at(block, address: int, where: str) -> MBarrier:
    if address not in block.mbarriers:
        raise SimError(f"{where}: no mbarrier was initialised at {address:#x}")
    return block.mbarriers[address]


def _groups(block, mask, addresses: np.ndarray, site: int):
    """(address, threads) for every barrier that threads of the mask name."""
    threads = block.every_thread if mask is None else np.flatnonzero(mask)
    block.shared_space.locate(threads, addresses[threads], 8, site)
    for address in np.unique(addresses[threads]):
        yield int(address), threads[addresses[threads] == address]


@implements("mbarrier.init")
def compile_init(instruction, operands):
    address, count = operands.address(instruction.operands[0]), operands.bits(instruction.operands[1], np.uint32)
    site = operands.site

    def run(block, mask):
        for at, threads in _groups(block, mask, address(block), site):
            expected = int(count(block)[threads[0]])
            block.mbarriers[at] = MBarrier(expected, expected)
            block.shared_space.note_write(threads, np.full(len(threads), at), 8, site)

    return run


@implements("mbarrier.inval")
def compile_inval(instruction, operands):
    address, site = operands.address(instruction.operands[0]), operands.site

    def run(block, mask):
        for at, _ in _groups(block, mask, address(block), site):
            barrier_at(block, at, instruction.where)
            del block.mbarriers[at]

    return run


@implements("mbarrier.arrive", "mbarrier.expect_tx")
def compile_arrive(instruction, operands):
    """arrive [b]{, count}; arrive.expect_tx [b], bytes; expect_tx [b], bytes (which is no arrival)."""
    parts, names = instruction.parts, list(instruction.operands)
    if {"noComplete", "release.cluster", "shared_cluster"} & set(parts):
        raise unsupported(instruction)
    arrives, expects = parts[1] == "arrive", "expect_tx" in parts
    if arrives and names.pop(0) != "_":
        raise unsupported(instruction, "the state an arrival returns")
    address, site = operands.address(names[0]), operands.site
    amount = operands.bits(names[1], np.uint32) if len(names) > 1 else None

    def run(block, mask):
        for at, threads in _groups(block, mask, address(block), site):
            barrier = barrier_at(block, at, instruction.where)
            amounts = amount(block)[threads].tolist() if amount else [1] * len(threads)
            if expects:
                barrier.transactions += sum(amounts)
            if arrives:
                arrivals = len(threads) if expects else sum(amounts)
                barrier.arrive(block, instruction.where, arrivals, block.clocks.knowledge(threads))

    return run


@implements("mbarrier.try_wait", "mbarrier.test_wait")
def compile_wait(instruction, operands):
    if "parity" not in instruction.parts:
        raise unsupported(instruction, "a wait for a state")
    write = operands.write_bits(instruction.operands[0])
    address, parity = operands.address(instruction.operands[1]), operands.bits(instruction.operands[2], np.uint32)
    site = operands.site

    def run(block, mask):
        done = np.zeros(block.lanes, bool)
        parities = parity(block) & np.uint32(1)
        for at, threads in _groups(block, mask, address(block), site):
            barrier = barrier_at(block, at, instruction.where)
            over = threads[parities[threads] != barrier.phase & 1]
            done[over] = True
            if barrier.completed and len(over) and barrier.completed[-1] is not None:
                block.clocks.learn(over, barrier.completed[-1])
        write(block, mask, done)
        waiting = ~done if mask is None else mask & ~done
        if waiting.any():
            block.spinning = waiting

    return run


@implements("elect.sync", collective=True)
def compile_elect(instruction, operands):
    """The lowest lane of the member mask leads."""
    destination, _, predicate = instruction.operands[0].partition("|")
    member = operands.bits(instruction.operands[1], np.uint32)
    write, write_predicate = operands.write_bits(destination.strip()), operands.write_bits(predicate.strip())

    def run(block, mask):
        members = member(block)
        leader = np.bitwise_count((members & -members) - np.uint32(1)).astype(np.uint32)
        write(block, mask, leader)
        write_predicate(block, mask, block.every_thread % 32 == leader)

    return run


@implements("setmaxnreg")
def compile_register_budget(instruction, operands):
    return lambda block, mask: None

"""cp.async: copies that land when the thread that issued them waits for them.

Until then the destination counts as never written, so a read that comes too early is caught whatever the schedule."""

import numpy as np

from ..masks import every, some
from .registry import implements, unsupported


class PendingCopies:
    """Copies in flight of one block. A copy belongs to the group its thread commits next."""

    def __init__(self, lanes: int):
        self.committed = np.zeros(lanes, np.int64)
        self.records: list[tuple] = []  # threads, offsets, data [n, size] of uint8, group of each, site

    def issue(self, threads, offsets, data, site):
        self.records.append((threads, offsets, data, self.committed[threads].copy(), site))

    def commit(self, mask):
        if mask is None:
            self.committed += 1
        else:
            self.committed[mask] += 1

    def land(self, block, mask, groups_left: int | None):
        """Lands what the threads of mask wait for: all but their latest groups_left groups; None: everything."""
        kept = []
        for record in self.records:
            threads, offsets, data, group, site = record
            landing = np.ones(len(threads), bool) if mask is None else mask[threads]
            if groups_left is not None:
                landing &= group < self.committed[threads] - groups_left
            if some(landing):
                _write(block, threads[landing], offsets[landing], data[landing], site)
            if not every(landing):
                stay = ~landing
                kept.append((threads[stay], offsets[stay], data[stay], group[stay], site))
        self.records = kept


def _write(block, threads, offsets, data, site):
    space = block.shared_space
    size = data.shape[1]
    clash = space.note_write(threads, offsets, size, site)
    if clash is not None:
        space.fail_race(site, int(threads[0]), int(offsets[0]), "two threads copy to it")
    index = offsets[:, None] + np.arange(size)
    space.memory.bytes[index] = data
    space.memory.written[index] = True


@implements("cp.async.ca", "cp.async.cg")
def compile_copy(instruction, operands):
    """cp.async dst, src, size{, src_size}: bytes beyond src_size become zero and their source is not touched."""
    destination = operands.address(instruction.operands[0])
    source = operands.address(instruction.operands[1])
    size, site = int(instruction.operands[2], 0), operands.site
    if size not in (4, 8, 16) or (instruction.parts[2] == "cg" and size != 16) or len(instruction.operands) > 4:
        raise unsupported(instruction, "this size")
    limit = operands.bits(instruction.operands[3], np.uint32) if len(instruction.operands) > 3 else None

    def run(block, mask):
        threads = block.every_thread if mask is None else np.flatnonzero(mask)
        space = block.shared_space
        offsets = space.locate(threads, destination(block)[threads], size, site)
        data = np.zeros((len(threads), size), np.uint8)
        counts = np.full(len(threads), size) if limit is None else limit(block)[threads].astype(np.int64)
        for count in np.unique(counts[counts > 0]):
            chosen = np.flatnonzero(counts == count)
            data[chosen, :count] = _fetch(
                block, threads[chosen], source(block)[threads[chosen]], int(count), size, site
            )
        clash = space.note_write(threads, offsets, size, site)
        if clash is not None:
            space.fail_race(site, int(threads[0]), int(offsets[0]), "two threads copy to it")
        index = offsets[:, None] + np.arange(size)
        space.memory.bytes[index] = 0xFF
        space.memory.written[index] = False
        block.copies.issue(threads, offsets, data, site)

    return run


def _fetch(block, threads, addresses, count, size, site):
    device = block.device_space
    where = block.program.where[site]
    if count > size:
        raise block.failure(where, threads[:1], f"copies {count} bytes into {size}")
    if (addresses % size).any():
        raise block.failure(where, threads[addresses % size != 0][:1], f"source is no multiple of {size}")
    device.memory.check(addresses, count, where, lambda i: block.describe(int(threads[i])))
    offsets = addresses - device.base
    granule = next(width for width in (8, 4, 2, 1) if count % width == 0)
    device.require_written(threads, offsets, granule, count // granule, site)
    device.note_read(threads, offsets, count, site)
    return device.memory.bytes[offsets[:, None] + np.arange(count)]


@implements("cp.async.commit_group")
def compile_commit(instruction, operands):
    return lambda block, mask: block.copies.commit(mask)


@implements("cp.async.wait_group")
def compile_wait_group(instruction, operands):
    groups_left = int(instruction.operands[0], 0)
    return lambda block, mask: block.copies.land(block, mask, groups_left)


@implements("cp.async.wait_all")
def compile_wait_all(instruction, operands):
    return lambda block, mask: block.copies.land(block, mask, None)

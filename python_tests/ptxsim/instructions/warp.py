"""Instructions that the lanes of a warp execute together: shuffles, votes, reductions, __syncwarp.

A member mask that names a lane which is neither here nor finished makes the warp wait for that lane."""

import numpy as np

from ..masks import every
from .arithmetic import operand_type
from .registry import implements, unsupported

WARP = 32
_LANE = np.arange(WARP)


def _members(read):
    """Lanes named by the member masks of the warps concerned."""

    def members(block, mask):
        bits = (read(block).reshape(-1, WARP)[:, :, None] >> _LANE.astype(np.uint32) & np.uint32(1)).astype(bool)
        here = np.ones(bits.shape[:2], bool) if mask is None else mask.reshape(-1, WARP)
        return (bits & here[:, :, None]).any(1).ravel()

    return members


def _collective(run, read):
    def synchronised(block, mask):
        block.clocks.synchronise_warps(mask)
        run(block, mask)

    synchronised.members = _members(read)
    return synchronised


@implements("bar.warp", collective=True)
def compile_syncwarp(instruction, operands):
    return _collective(lambda block, mask: None, operands.bits(instruction.operands[0], np.uint32))


def _shuffle_source(mode: str, lane, b, limit, segment):
    """Source lane and whether it is inside the segment, as the manual's pseudo code has it."""
    maximum = (lane & segment) | (limit & ~segment)
    if mode == "up":
        source = lane - b
        return source, source >= maximum
    if mode == "down":
        source = lane + b
    elif mode == "bfly":
        source = lane ^ b
    else:
        source = (lane & segment) | (b & ~segment)
    return source, source <= maximum


@implements("shfl", collective=True)
def compile_shuffle(instruction, operands):
    if instruction.parts[1] != "sync":
        raise unsupported(instruction, "a shuffle without .sync")
    mode = instruction.parts[2]
    destination, _, predicate = (part.strip() for part in instruction.operands[0].partition("|"))
    value, b, c, member = (operands.bits(name, np.uint32) for name in instruction.operands[1:5])
    write = operands.write_bits(destination)
    write_predicate = operands.write_bits(predicate) if predicate else None

    def run(block, mask):
        lane = np.arange(block.lanes, dtype=np.int64) % WARP
        clamp = c(block).astype(np.int64)
        segment, limit = clamp >> 8 & 31, clamp & 31
        source, inside = _shuffle_source(mode, lane, (b(block) & np.uint32(31)).astype(np.int64), limit, segment)
        source = np.where(inside, source, lane)
        thread = np.arange(block.lanes) // WARP * WARP + source
        if mask is not None and not every(mask[thread[mask]]):
            raise block.failure(instruction.where, mask & ~mask[thread], "reads a lane that does not take part")
        write(block, mask, value(block)[thread])
        if write_predicate:
            write_predicate(block, mask, inside)

    return _collective(run, member)


def _ballot(values: np.ndarray, mask) -> np.ndarray:
    """One word per warp: bit l is the value of lane l."""
    values = values if mask is None else values & mask
    weights = np.uint32(1) << _LANE.astype(np.uint32)
    return (values.reshape(-1, WARP) * weights).sum(1, dtype=np.uint32)


@implements("vote", collective=True)
def compile_vote(instruction, operands):
    mode = instruction.parts[2]
    source = operands.bits(instruction.operands[1], bool)
    member = operands.bits(instruction.operands[2], np.uint32)
    write = operands.write_bits(instruction.operands[0])

    def run(block, mask):
        values = source(block)
        ballot = _ballot(values, mask)
        if mode != "ballot":
            everyone = _ballot(np.ones(block.lanes, bool), mask)
            outcome = {"any": ballot != 0, "all": ballot == everyone, "uni": (ballot == everyone) | (ballot == 0)}
            ballot = outcome[mode]
        write(block, mask, np.repeat(ballot, WARP))

    return _collective(run, member)


@implements("match", collective=True)
def compile_match(instruction, operands):
    if instruction.parts[1] != "any":
        raise unsupported(instruction)
    source = operands.bits(instruction.operands[1], f"u{int(operand_type(instruction)[1:]) // 8}")
    member = operands.bits(instruction.operands[2], np.uint32)
    write = operands.write_bits(instruction.operands[0])

    def run(block, mask):
        values = source(block).reshape(-1, WARP)
        here = np.ones(values.shape, bool) if mask is None else mask.reshape(-1, WARP)
        equal = (values[:, :, None] == values[:, None, :]) & here[:, None, :]
        write(block, mask, (equal * (np.uint32(1) << _LANE.astype(np.uint32))).sum(2, dtype=np.uint32).ravel())

    return _collective(run, member)


_REDUCE = {
    "add": (np.add, 0), "min": (np.minimum, None), "max": (np.maximum, None),
    "and": (np.bitwise_and, -1), "or": (np.bitwise_or, 0), "xor": (np.bitwise_xor, 0),
}  # fmt: skip


@implements("redux", collective=True)
def compile_redux(instruction, operands):
    type_name = operand_type(instruction)
    function, neutral = _REDUCE[instruction.parts[2]]
    source = operands.read(instruction.operands[1], type_name)
    member = operands.bits(instruction.operands[2], np.uint32)
    write = operands.write(instruction.operands[0], type_name)

    def run(block, mask):
        values = source(block).reshape(-1, WARP)
        if neutral is None:
            limits = np.iinfo(values.dtype)
            start = limits.max if function is np.minimum else limits.min
        else:
            start = values.dtype.type(0) if neutral == 0 else ~values.dtype.type(0)
        if mask is not None:
            values = np.where(mask.reshape(-1, WARP), values, values.dtype.type(start))
        write(block, mask, np.repeat(function.reduce(values, axis=1, dtype=values.dtype), WARP))

    return _collective(run, member)


@implements("activemask")
def compile_activemask(instruction, operands):
    write = operands.write_bits(instruction.operands[0])
    return lambda block, mask: write(block, mask, np.repeat(_ballot(np.ones(block.lanes, bool), mask), WARP))

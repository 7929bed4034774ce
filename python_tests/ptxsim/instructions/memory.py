"""Loads, stores, atomics and fences."""

import numpy as np

from ..ptx import SCALAR_SIZES
from ..values import CODECS
from .arithmetic import operand_type
from .registry import implements, unsupported

_SPACES = ("global", "shared", "local", "param", "const")


def space_of(instruction) -> str:
    """Attribute of the block that serves the instruction's state space."""
    for part in instruction.parts[1:]:
        name = part.split("_")[0]
        if name in _SPACES:
            return {"const": "device_space"}.get(name, f"{name}_space").replace("global_space", "device_space")
    return "generic_space"


def is_strong(instruction) -> bool:
    """Accesses that may meet atomics and each other. In shared memory volatile is no excuse for a missing barrier."""
    parts = set(instruction.parts)
    return bool(parts & {"relaxed", "acquire", "release"}) or ("volatile" in parts and "global" in parts)


def participants(block, mask):
    return block.every_thread if mask is None else np.flatnonzero(mask)


@implements("ld", "ldu")
def compile_load(instruction, operands):
    type_name = operand_type(instruction)
    width = SCALAR_SIZES[type_name]
    members = operands.vector(instruction.operands[0])
    writes = [operands.write_bits(name) for name in members]
    space, site, count, lanes = space_of(instruction), operands.site, len(members), operands.lanes
    base = instruction.operands[1].strip("[] ").split("+")[0]
    if space == "param_space" and not operands.is_register(base) and not operands.is_parameter(base):
        space = "local_space"  # the result of a call
    bits = CODECS[type_name].bits
    # A narrow load into a wider register is extended by sign or by zero.
    unsigned = np.dtype(f"u{bits.itemsize}")
    address = operands.address(instruction.operands[1])
    access = (width, count, site, is_strong(instruction))
    if space == "param_space" and operands.is_parameter(base):
        return _load_parameter(address, writes, unsigned, bits, site)

    def run(block, mask):
        addresses = address(block)
        if mask is None:
            values = getattr(block, space).load(block.every_thread, addresses, *access)
        else:
            threads = np.flatnonzero(mask)
            values = np.zeros((lanes, count), unsigned)
            values[threads] = getattr(block, space).load(threads, addresses[threads], *access)
        for index, write in enumerate(writes):
            write(block, mask, np.ascontiguousarray(values[:, index]).view(bits))

    return run


def _load_parameter(address, writes, unsigned, bits, site):
    def run(block, mask):
        first = address(block)[:1]
        values = block.param_space.load(block.every_thread[:1], first, unsigned.itemsize, len(writes), site)
        for index, write in enumerate(writes):
            write(block, mask, np.repeat(values[:, index], len(block.every_thread)).view(bits))

    return run


@implements("st")
def compile_store(instruction, operands):
    width = SCALAR_SIZES[operand_type(instruction)]
    reads = [operands.bits(name, f"u{width}") for name in operands.vector(instruction.operands[1])]
    space, site = space_of(instruction).replace("param_space", "local_space"), operands.site  # an argument of a call
    address = operands.address(instruction.operands[0])
    strong = is_strong(instruction)

    def run(block, mask):
        values = np.stack([read(block) for read in reads], 1) if len(reads) > 1 else reads[0](block)[:, None]
        addresses = address(block)
        if mask is None:
            getattr(block, space).store(block.every_thread, addresses, values, site, strong)
        else:
            threads = np.flatnonzero(mask)
            getattr(block, space).store(threads, addresses[threads], values[threads], site, strong)

    return run


def _wrap_increment(old, limit):
    return old.dtype.type(0) if old >= limit else old + old.dtype.type(1)


def _wrap_decrement(old, limit):
    return limit if old == 0 or old > limit else old - old.dtype.type(1)


_ATOMIC = {
    "add": lambda old, value: old + value, "and": lambda old, value: old & value, "or": lambda old, value: old | value,
    "xor": lambda old, value: old ^ value, "min": min, "max": max, "exch": lambda old, value: value,
    "inc": _wrap_increment, "dec": _wrap_decrement,
}  # fmt: skip


@implements("atom", "red")
def compile_atomic(instruction, operands):
    """One thread after the other, in an order drawn from the seed."""
    parts = instruction.parts
    returns = parts[0] == "atom"
    type_name = operand_type(instruction)
    operation = next((part for part in parts[1:] if part in _ATOMIC or part == "cas"), None)
    if operation is None or type_name.endswith("x2") or (len(operands.vector(instruction.operands[-1])) > 1):
        raise unsupported(instruction)
    space, site = space_of(instruction), operands.site
    codec = CODECS[type_name]
    address = operands.address(instruction.operands[1 if returns else 0])
    first, *rest = instruction.operands[2 if returns else 1 :]
    value = operands.read(first, type_name)
    swap = operands.read(rest[0], type_name) if operation == "cas" else None
    write = operands.write(instruction.operands[0], type_name) if returns else None
    width = codec.bits.itemsize
    releases, acquires = bool({"release", "acq_rel"} & set(parts)), bool({"acquire", "acq_rel"} & set(parts))

    def run(block, mask):
        threads = participants(block, mask)
        if releases:
            block.fence(mask)
        addresses, values = address(block), value(block)
        swaps = swap(block) if swap else None
        results = np.zeros_like(values)
        for space_threads, memory, offsets in block.atomic_targets(space, threads, addresses[threads], width, site):
            words = memory.view(codec.bits)
            slots = offsets // width
            for position in block.random_order(len(space_threads)):
                thread, slot = space_threads[position], slots[position]
                old = codec.decode(words[slot : slot + 1])[0] if codec.decode else words[slot]
                results[thread] = old
                if swap:
                    new = swaps[thread] if old == values[thread] else old
                else:
                    new = _ATOMIC[operation](old, values[thread])
                words[slot] = codec.encode(np.array([new]))[0] if codec.encode else new
        if acquires:
            block.fence(mask)
        if write:
            write(block, mask, results)

    return run


@implements("membar", "fence")
def compile_fence(instruction, operands):
    return lambda block, mask: block.fence(mask)


@implements("prefetch", "prefetchu", "nanosleep", "discard", "applypriority", "pmevent", "griddepcontrol")
def compile_hint(instruction, operands):
    return lambda block, mask: None

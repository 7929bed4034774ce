"""Which function compiles which opcode.

A compiler takes (instruction, operands) and returns run(block, mask): mask is a bool array over the threads of the
block, or None when every thread takes part. An opcode that has no compiler is an error that names it."""

from collections.abc import Callable

from ..errors import SimError
from ..operands import Operands
from ..ptx import Instruction

Run = Callable  # (block, mask | None) -> None

COMPILERS: dict[str, Callable[[Instruction, Operands], Run]] = {}
COLLECTIVE: set[str] = set()


def implements(*roots: str, collective: bool = False):
    """Registers a compiler for opcodes that start with one of the roots ("ld" covers "ld.global.f32").

    collective: the lanes of a warp run it together; its run function carries members(block, mask), the lanes that have
    to be there, or None for all live lanes of the warps concerned."""

    def register(compiler):
        for root in roots:
            COMPILERS[root] = compiler
            if collective:
                COLLECTIVE.add(root)
        return compiler

    return register


def find(instruction: Instruction) -> tuple[str, Callable]:
    """The longest registered root of the opcode and its compiler."""
    parts = instruction.opcode.split(".")
    for length in range(len(parts), 0, -1):
        root = ".".join(parts[:length])
        if root in COMPILERS:
            return root, COMPILERS[root]
    raise SimError(f"{instruction.where}: opcode not modelled: {instruction.opcode}")


def unsupported(instruction: Instruction, what: str = "this form") -> SimError:
    operands = ", ".join(instruction.operands)
    return SimError(f"{instruction.where}: {what} is not modelled: {instruction.opcode} {operands}")

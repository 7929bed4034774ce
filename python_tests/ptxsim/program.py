"""A kernel compiled for one block shape: every instruction a step with a function that runs it."""

import re
from dataclasses import dataclass

from . import instructions  # noqa: F401  (fills the registry)
from .errors import SimError
from .instructions.memory import space_of
from .instructions.registry import COLLECTIVE, find
from .operands import Operands
from .ptx import SCALAR_SIZES, Instruction, Kernel, elements

PLAIN, GATHERED, BRANCH, EXIT, BARRIER, SWITCH, TRAP = range(7)
_ACCESS_ROOTS = ("ld", "st", "atom", "red")


@dataclass
class Step:
    kind: int
    run: object = None
    predicate: int | None = None  # slot of the guarding register
    negated: bool = False
    target: object = None


class Program:
    def __init__(self, kernel: Kernel, block_dim: tuple[int, int, int]):
        self.kernel = kernel
        self.operands = Operands(kernel, block_dim)
        self.where = [instruction.where for instruction in kernel.instructions]
        self.steps = []
        for site, instruction in enumerate(kernel.instructions):
            self.operands.where, self.operands.site = instruction.where, site
            step = self._compile(instruction)
            if instruction.predicate is not None:
                step.predicate, step.negated = self.operands.slot(instruction.predicate), instruction.negated
            self.steps.append((step.kind, step.run, step.predicate, step.negated, step.target))
        self.where.append("the end of the kernel")
        self.steps.append((EXIT, None, None, False, None))
        self.local_size, self.local_symbols = self._local_layout()
        self.parameter_offsets, self.parameter_size = self._parameter_layout()
        self.granules = {"shared": self._granule("shared_space"), "global": self._granule("device_space")}

    def _compile(self, instruction: Instruction) -> Step:
        parts = instruction.parts
        root = parts[0]
        if root == "bra":
            return Step(BRANCH, target=self._label(instruction, instruction.operands[0]))
        if root in ("ret", "exit"):
            return Step(EXIT)
        if root == "trap":
            return Step(TRAP)
        if root == "brx":
            return self._switch(instruction)
        if root in ("bar", "barrier") and parts[1] not in ("warp", "cluster"):
            return self._barrier(instruction, [part for part in parts if part not in ("cta", "aligned")][1])
        name, compiler = find(instruction)
        return Step(GATHERED if name in COLLECTIVE else PLAIN, compiler(instruction, self.operands))

    def _label(self, instruction: Instruction, name: str) -> int:
        if name not in self.kernel.labels:
            raise SimError(f"{instruction.where}: no label {name}")
        return self.kernel.labels[name]

    def _switch(self, instruction: Instruction) -> Step:
        names = self.kernel.branch_targets[instruction.operands[1]]
        targets = [self._label(instruction, name) for name in names]
        return Step(SWITCH, run=self.operands.bits(instruction.operands[0], "u4"), target=targets)

    def _barrier(self, instruction: Instruction, mode: str) -> Step:
        if mode not in ("sync", "arrive"):
            raise SimError(f"{instruction.where}: opcode not modelled: {instruction.opcode}")
        reads = [self.operands.bits(name, "u4") for name in instruction.operands[:2]]
        return Step(BARRIER, run=reads, target=mode == "sync")

    def _local_layout(self) -> tuple[int, dict[str, int]]:
        offsets, top = {}, 0
        for variable in self.kernel.variables.values():
            if variable.space in ("local", "param"):
                top = -(-top // max(variable.align, 16)) * max(variable.align, 16)
                offsets[variable.name] = top
                top += variable.size
        return -(-top // 16) * 16, offsets

    def _parameter_layout(self) -> tuple[dict[str, int], int]:
        offsets, top = {}, 0
        for parameter in self.kernel.parameters:
            top = -(-top // parameter.align) * parameter.align
            offsets[parameter.name] = top
            top += parameter.size
        return offsets, -(-top // 8) * 8

    def _granule(self, space: str) -> int:
        """Width in bytes of the narrowest access to a space, at most 16: the resolution of its race shadow."""
        narrowest = 16
        for instruction in self.kernel.instructions:
            root = instruction.parts[0]
            if root in _ACCESS_ROOTS and space_of(instruction) in (space, "generic_space"):
                vector = instruction.operands[0 if root == "ld" else -1]
                count = len(elements(vector)) if root in ("ld", "st") else 1
                narrowest = min(narrowest, count * _width(instruction))
            elif instruction.opcode.startswith(("cp.async.ca", "cp.async.cg")):
                size = int(instruction.operands[2], 0)
                narrowest = min(narrowest, size if len(instruction.operands) < 4 else 4)
            elif instruction.opcode.startswith(("mbarrier", "wgmma", "cp.async.bulk")):
                narrowest = min(narrowest, 2)
        return narrowest


def _width(instruction: Instruction) -> int:
    types = [part for part in instruction.parts if re.fullmatch(r"[busf]f?\d+(x2)?", part)]
    return SCALAR_SIZES[types[-1]]

"""Whether machine code leaves the registers of unfinished wgmma alone.

The way through a kernel is followed, both sides of every branch and loops until nothing new is learnt. An HGMMA marked
``gsb0`` closes a group; ``WARPGROUP.DEPBAR.LE gsb0, N`` leaves the youngest N closed groups in flight, and an open one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from .sass import Function, Instruction

_REGISTER = re.compile(r"(?<![\w.])R(\d+)(\.64)?(?!\w)")
_SHAPE = re.compile(r"64x(\d+)x16")
_WIDTHS = {"128": 4, "64": 2, "32": 1}
_LOADS_AND_STORES = ("LDG", "LDS", "LD", "LDL", "LDC", "STG", "STS", "ST", "STL", "ATOM", "ATOMG", "ATOMS", "RED")
# Instructions whose first operand is no register they write.
_WRITE_NOTHING = {
    "ST", "STG", "STS", "STL", "RED", "STSM", "SYNCS", "UTMALDG", "CCTL", "BAR", "ISETP", "FSETP", "DSETP", "HSETP2",
    "BRA", "R2UR", "WARPSYNC", "NANOSLEEP", "BRX", "RET", "CALL", "EXIT", "BSSY", "BSYNC", "R2P", "PLOP3", "BREAK",
    "BMOV", "ERRBAR", "MEMBAR", "FENCE", "DEPBAR", "WARPGROUP", "NOP", "YIELD", "UBLKCP", "ARRIVES", "LDGSTS",
    "LDGDEPBAR", "WARPGROUPSET", "USETMAXREG", "R2B", "BPT", "KILL",
}  # fmt: skip
_MOST_GROUPS = 4  # told apart; more are kept as if the oldest two were one, which only retires them later


def _mask(first: int, count: int) -> int:
    return ((1 << count) - 1) << first if first < 255 else 0


def _width(x: Instruction, operand: str) -> int:
    """Registers that a register operand names the first of."""
    modifiers = x.opcode.split(".")[1:]
    if x.name in _LOADS_AND_STORES or x.name in ("CS2R", "LDSM", "STSM"):
        if "[" in operand:
            return 2 if ".64" in operand else 1
        if x.name == "CS2R":
            return 1 if "32" in modifiers else 2
        if x.name in ("LDSM", "STSM"):
            return next((int(m) for m in modifiers if m in ("2", "4")), 1)
        return next((_WIDTHS[m] for m in modifiers if m in _WIDTHS), 1)
    double = x.pipe == "double" or "F64" in modifiers or "S64" in modifiers or "U64" in modifiers
    return 2 if double or ".64" in operand or "WIDE" in modifiers else 1


class Use:
    """The registers of an instruction, as bit masks."""

    def __init__(self, x: Instruction):
        self.x = x
        self.product = x.name == "HGMMA"
        self.closes = "gsb0" in x.operands and self.product
        self.pending = None
        if x.opcode.startswith("WARPGROUP.DEPBAR"):
            self.pending = int(re.search(r"gsb0,\s*(0x[0-9a-f]+)", x.operands)[1], 16)
        operands = [o.strip() for o in x.operands.split(",")]
        self.accumulators = self.a = self.touches = self.writes = 0
        if self.product:
            columns = int(_SHAPE.search(x.opcode)[1])
            if found := _REGISTER.match(operands[0]):
                self.accumulators = _mask(int(found[1]), columns // 2)
            if found := _REGISTER.match(operands[1]):
                self.a = _mask(int(found[1]), 4)
            return
        target = None if x.name in _WRITE_NOTHING else self._target(operands)
        for i, operand in enumerate(operands):
            for found in _REGISTER.finditer(operand):
                registers = _mask(int(found[1]), 2 if found[2] else _width(x, operand))
                self.touches |= registers
                if i == target and "[" not in operand:
                    self.writes |= registers

    @staticmethod
    def _target(operands: list[str]) -> int:
        """The first operand, or the second behind a predicate that is written too."""
        return 1 if re.match(r"U?P\w$", operands[0]) else 0


@dataclass(frozen=True)
class Fault:
    kind: str
    address: int
    text: str


@dataclass(frozen=True)
class Flight:
    """(accumulators, registers of A) of the groups in flight, and of the open one."""

    closed: tuple[tuple[int, int], ...] = ()
    opened: tuple[int, int] = (0, 0)

    @cached_property
    def accumulators(self) -> int:
        total = self.opened[0]
        for group in self.closed:
            total |= group[0]
        return total

    @cached_property
    def a(self) -> int:
        total = self.opened[1]
        for group in self.closed:
            total |= group[1]
        return total

    def issue(self, use: Use) -> Flight:
        opened = self.opened[0] | use.accumulators, self.opened[1] | use.a
        if not use.closes:
            return Flight(self.closed, opened)
        closed = (*self.closed, opened)
        if len(closed) > _MOST_GROUPS:
            merged = closed[0][0] | closed[1][0], closed[0][1] | closed[1][1]
            closed = (merged, *closed[2:])
        return Flight(closed)

    def wait(self, pending: int) -> Flight:
        return Flight(self.closed[-pending:] if pending else (), self.opened)


def _faults_of(use: Use, flight: Flight, dirty: int) -> list[str]:
    if use.product:
        found = []
        if any(g[0] & use.accumulators and use.accumulators & ~g[0] for g in (*flight.closed, flight.opened)):
            found.append("overlaps the accumulators of another shape in flight")
        if use.a & flight.accumulators or use.accumulators & flight.a:
            found.append("reads or overwrites what another product in flight writes or reads")
        if dirty & (use.accumulators | use.a):
            found.append("has no fence behind a write to its registers")
        return found
    if use.touches & flight.accumulators:
        return ["touches an accumulator in flight"]
    if use.writes & flight.a:
        return ["overwrites a register of A in flight"]
    if use.x.name in ("EXIT", "RET") and flight.accumulators and use.x.always:
        return ["ends with products in flight"]
    return []


def faults(function: Function) -> list[Fault]:
    """Every instruction that does with a register of an unfinished product what it must not."""
    uses = [Use(x) for x in function.instructions]
    products = 0
    for use in uses:
        products |= use.accumulators | use.a
    found: dict[tuple[str, int], Fault] = {}
    seen: dict[tuple[int, Flight], int] = {}
    work = [(0, Flight(), 0)]  # block, products in flight, registers written since the last fence
    while work:
        block, flight, dirty = work.pop()
        known = seen.get((block, flight))
        if known is not None and known | dirty == known:
            continue
        dirty |= known or 0
        seen[block, flight] = dirty
        for i in function.blocks[block]:
            use = uses[i]
            for kind in _faults_of(use, flight, dirty):
                found[kind, use.x.address] = Fault(kind, use.x.address, f"{use.x.opcode} {use.x.operands}")
            if use.product:
                flight = flight.issue(use)
            elif use.pending is not None:
                flight = flight.wait(use.pending)
            elif use.x.opcode.startswith("WARPGROUP.ARRIVE"):
                dirty = 0
            dirty |= use.writes & products
        work += [(s, flight, dirty) for s in function.successors[block]]
    return list(found.values())

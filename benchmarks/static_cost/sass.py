"""Machine code as nvdisasm prints it: instructions, basic blocks, loops, and the cheapest way around a loop."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

_SECTION = re.compile(r"^\s*\.section\s+(\S+?),")
_LABEL = re.compile(r"^(\.L_[\w$]+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+\{?\s*(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\((\.L_[\w$]+)\)")
_PREDICATE = re.compile(r"(?<![\w.])!?U?P\d")

PIPES = {
    "tensor": "HGMMA HMMA",
    "fma": "FFMA FMUL FADD FFMA32I FMUL32I FADD32I FFMA2 FMUL2 FADD2 HFMA2 HADD2 HMUL2",
    "imad": "IMAD",
    "special": "MUFU F2I I2F F2F FRND POPC FLO BREV I2I F2IP I2FP",
    "double": "DADD DMUL DFMA DSETP DMNMX",
    "shared": "SHFL LDS STS LDSM STSM ATOMS MATCH",
    "global": "LDG STG LD ST RED ATOMG ATOM LDGSTS LDC LDGDEPBAR UTMALDG UBLKCP CCTL",
    "local": "LDL STL",
    "uniform": "R2UR S2UR S2R REDUX VOTEU CREDUX",
    "control": "BRA BRX BRXU BSSY BSYNC CALL RET EXIT JMP JMX BREAK BMOV BPT RPCMOV BAR SYNCS WARPGROUP DEPBAR "
    "WARPSYNC MEMBAR ERRBAR FENCE USETMAXREG YIELD NANOSLEEP ELECT CGAERRBAR ARRIVES WARPGROUPSET NOP KILL",
}
_PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names.split()}
_ENDS = ("BRA", "BRX", "BRXU", "JMP", "JMX", "EXIT", "RET")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    opcode: str  # with its modifiers
    operands: str

    @cached_property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @cached_property
    def pipe(self) -> str:
        """Where it executes; comparisons, logic and integer additions are ``alu``."""
        return _PIPE_OF.get(self.name) or ("uniform" if self.name.startswith("U") else "alu")

    @property
    def target(self) -> str | None:
        found = _TARGET.search(self.operands)
        return found and found[1]

    @property
    def always(self) -> bool:
        """A jump or exit that no predicate guards."""
        apart = {"DIV", "CONV"} & set(self.opcode.split("."))
        return not self.predicate and not apart and not _PREDICATE.search(_TARGET.sub("", self.operands))


@dataclass
class Function:
    name: str  # mangled
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # index of the instruction behind

    @cached_property
    def blocks(self) -> list[range]:
        """Ranges of instructions that are only entered at the first and left at the last."""
        ends = {i + 1 for i, x in enumerate(self.instructions) if x.name in _ENDS}
        cuts = sorted({0, len(self.instructions)} | set(self.labels.values()) | ends)
        return [range(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]

    @cached_property
    def successors(self) -> list[list[int]]:
        starts = {block.start: i for i, block in enumerate(self.blocks)}
        result = []
        for i, block in enumerate(self.blocks):
            last, to = self.instructions[block[-1]], []
            if last.name in ("BRA", "JMP") and last.target in self.labels:
                to += [starts[at] for at in (self.labels[last.target],) if at in starts]
            if not (last.name in _ENDS and last.always) and i + 1 < len(self.blocks):
                to.append(i + 1)
            result.append(to)
        return result

    @cached_property
    def order(self) -> list[int]:
        """Blocks in reverse postorder."""
        seen, done, stack = {0}, [], [(0, iter(self.successors[0]))] if self.blocks else []
        while stack:
            block, rest = stack[-1]
            following = next((s for s in rest if s not in seen), None)
            if following is None:
                done.append(stack.pop()[0])
            else:
                seen.add(following)
                stack.append((following, iter(self.successors[following])))
        return done[::-1]

    @cached_property
    def predecessors(self) -> dict[int, list[int]]:
        before: dict[int, list[int]] = {b: [] for b in self.order}
        for b in self.order:
            for s in self.successors[b]:
                before[s].append(b)
        return before

    @cached_property
    def dominators(self) -> dict[int, set[int]]:
        before = self.predecessors
        result = {b: set(self.order) for b in self.order}
        result[0] = {0}
        changed = True
        while changed:
            changed = False
            for b in self.order[1:]:
                new = set.intersection(*(result[p] for p in before[b])) | {b}
                changed, result[b] = changed or new != result[b], new
        return result

    @cached_property
    def loops(self) -> dict[int, set[int]]:
        """Header -> blocks of the natural loops; those of one header are one loop."""
        before = self.predecessors
        result: dict[int, set[int]] = {}
        for b in self.order:
            for header in (s for s in self.successors[b] if s in self.dominators[b]):
                body, stack = {header}, [b]
                while stack:
                    x = stack.pop()
                    if x not in body:
                        body.add(x)
                        stack += before[x]
                result.setdefault(header, set()).update(body)
        return result

    def of(self, block: int) -> list[Instruction]:
        return [self.instructions[i] for i in self.blocks[block]]

    def along(self, blocks: Iterable[int]) -> list[Instruction]:
        return [x for b in blocks for x in self.of(b)]

    def count(self, blocks: Iterable[int], wanted: Callable[[Instruction], bool]) -> int:
        return sum(wanted(x) for b in blocks for x in self.of(b))

    def way_around(
        self, header: int, wanted: Callable[[Instruction], bool], share: float, free: frozenset[int] = frozenset()
    ) -> list[int]:
        """The cheapest way from a loop's header back to it that does the loop's work.

        A branch may skip the work, take a slow version of it, or do what is rarely needed. Of the ways around that
        execute at least ``share`` as many ``wanted`` instructions as the one with most, this is the one with the fewest
        instructions; blocks in ``free`` cost nothing. An inner loop is passed once.
        """
        body = self.loops[header]
        inside = [b for b in self.order if b in body]
        position = {b: i for i, b in enumerate(self.order)}
        # For every block: wanted instructions so far -> (cost, way). Ways that do more and cost less win.
        best: dict[int, dict[int, tuple[int, tuple]]] = {header: {0: (0, ())}}
        ends: dict[int, tuple[int, tuple]] = {}
        for b in inside:
            gain, cost = self.count([b], wanted), 0 if b in free else len(self.blocks[b])
            states = {n + gain: (c + cost, (way, b)) for n, (c, way) in best.get(b, {}).items()}
            for s in self.successors[b]:
                if s != header and (s not in body or position[s] <= position[b]):
                    continue
                into = ends if s == header else best.setdefault(s, {})
                for n, state in states.items():
                    if n not in into or state[0] < into[n][0]:
                        into[n] = state
        if not ends:
            return []
        most = max(ends)
        _, chain = min((s for n, s in ends.items() if n >= share * most), key=lambda state: state[0])
        way = []
        while chain:
            chain, block = chain
            way.append(block)
        return way[::-1]


def parse(text: str) -> Iterator[Function]:
    """The functions in the output of ``nvdisasm -c``."""
    function: Function | None = None
    for line in text.splitlines():
        if section := _SECTION.match(line):
            if function and function.instructions:
                yield function
            function = Function(section[1].removeprefix(".text.")) if section[1].startswith(".text.") else None
        elif function is None:
            continue
        elif label := _LABEL.match(line):
            function.labels[label[1]] = len(function.instructions)
        elif found := _INSTRUCTION.match(line):
            address, predicate, opcode, operands = found.groups()
            function.instructions.append(Instruction(int(address, 16), predicate or "", opcode, operands))
    if function and function.instructions:
        yield function


def pipes(instructions: list[Instruction]) -> Counter[str]:
    return Counter(x.pipe for x in instructions)

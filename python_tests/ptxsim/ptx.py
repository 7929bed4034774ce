"""Reads the PTX text that nvcc emits into kernels: parameters, variables, registers and a flat list of instructions."""

import re
from dataclasses import dataclass, field, replace
from pathlib import PurePath

from .errors import SimError

SCALAR_SIZES = {
    "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2,
    "b32": 4, "u32": 4, "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8, "pred": 1,
}  # fmt: skip

_LABEL = re.compile(r"([$\w]+):(?!:)")
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)(?:[^\n]*?inlined_at\s+(\d+)\s+(\d+))?[^\n]*\n?")
_VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak|common)\s+)*\.(?P<space>global|const|shared|local|param)\s+(?:\.align\s+(?P<align>\d+)\s+)?"
    r"\.(?P<type>\w+)\s+(?P<name>[$%\w]+)(?P<array>(?:\[\d*\])*)\s*(?:=\s*(?P<init>.*))?$",
    re.S,
)
_REGISTER = re.compile(r"\.reg\s+\.(\w+)\s+(.*)$", re.S)
_NAME = re.compile(r"[%$]?[A-Za-z_][\w$]*(?:@\d+)?(?:#\d+)*")


@dataclass(frozen=True)
class Variable:
    """A module or function variable, or a kernel parameter."""

    name: str
    space: str
    type: str
    align: int
    size: int  # bytes; 0 for the unsized extern array of dynamic shared memory
    initial: bytes | None = None


@dataclass(frozen=True)
class Instruction:
    opcode: str  # as written, without predicate: "ld.global.v4.f32"
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool
    where: str  # "kernel.cuh:57 (ld.global.v4.f32)"

    @property
    def parts(self) -> list[str]:
        return self.opcode.replace("::", "_").split(".")


@dataclass
class Kernel:
    """One .entry or .func: its body flattened, scoped names made unique."""

    name: str
    module: "Module"
    parameters: list[Variable]
    results: list[Variable]
    variables: dict[str, Variable] = field(default_factory=dict)  # .shared, .local and call parameters of the body
    registers: dict[str, str] = field(default_factory=dict)  # name or "prefix<" -> type
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    branch_targets: dict[str, list[str]] = field(default_factory=dict)
    threads_limit: int = 1024

    def register_type(self, name: str) -> str | None:
        exact = self.registers.get(name)
        return exact or self.registers.get(name.rstrip("0123456789") + "<")


def split_operands(text: str) -> list[str]:
    """Splits at commas outside of {}, [] and ()."""
    operands, depth, start = [], 0, 0
    for position, character in enumerate(text):
        if character in "{[(":
            depth += 1
        elif character in "}])":
            depth -= 1
        elif character == "," and depth == 0:
            operands.append(text[start:position].strip())
            start = position + 1
    if text[start:].strip():
        operands.append(text[start:].strip())
    return operands


def elements(operand: str) -> list[str]:
    """The members of a vector operand {a, b, c}; a scalar is a vector of one."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


def _initial_bytes(text: str, type_name: str, size: int) -> bytes:
    width = SCALAR_SIZES[type_name]
    data = bytearray()
    for item in re.findall(r"[^\s,{}]+", text):
        if item.startswith(("0f", "0d")):
            data += bytes.fromhex(item[2:])[::-1]
            continue
        try:
            data += (int(item, 0) % (1 << 8 * width)).to_bytes(width, "little")
        except ValueError as error:
            raise SimError(f"an initialiser that is no number is not modelled: {item!r}") from error
    return bytes(data) + bytes(size - len(data)) if size else b""


def parse_variable(text: str) -> Variable | None:
    match = _VARIABLE.match(text.strip())
    if not match:
        return None
    width = SCALAR_SIZES.get(match["type"])
    if width is None:
        raise SimError(f"variable type not modelled: {text.strip()[:80]}")
    dims = re.findall(r"\[(\d*)\]", match["array"])
    size = width
    for dim in dims:
        size *= int(dim or 0)
    initial = _initial_bytes(match["init"], match["type"], size) if match["init"] else None
    return Variable(match["name"], match["space"], match["type"], int(match["align"] or width), size, initial)


class Module:
    """A whole PTX file. Kernels are parsed when they are first asked for."""

    _FUNCTION = re.compile(
        r"(?:\.(?:visible|weak|extern|noreturn)\s+)*\.(entry|func)\s+(?:\.noreturn\s+)?(?:\((?P<results>[^)]*)\)\s*)?"
        r"(?P<name>[$\w]+)\s*\((?P<params>.*?)\)(?P<head>[^{;]*?)(?P<end>[{;])",
        re.S,
    )

    def __init__(self, text: str):
        self.files = {int(index): name for index, name in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text)}
        # The debug sections of -lineinfo hold data after the code; comments would confuse the tokeniser.
        text = re.sub(r"//[^\n]*", "", text.split("\n\t.section")[0])
        text = re.sub(r"\.file\s+\d+\s+\"[^\"]*\"[^\n]*", "", text)
        self.variables: dict[str, Variable] = {}
        self._sources: dict[str, tuple[re.Match, str]] = {}
        self._parsed: dict[str, Kernel] = {}
        position = 0
        while match := self._FUNCTION.search(text, position):
            self._declare(text[position : match.start()])
            position = match.end()
            if match["end"] == "{":
                end = _matching_brace(text, match.end())
                self._sources[match["name"]] = (match, text[match.end() : end])
                position = end + 1
        self._declare(text[position:])

    def kernel(self, name: str) -> Kernel:
        if name not in self._parsed:
            if name not in self._sources:
                raise SimError(f"no kernel {name} in this module")
            match, body = self._sources[name]
            self._parsed[name] = _BodyParser(self, match, body).kernel
        return self._parsed[name]

    def has(self, name: str) -> bool:
        return name in self._sources

    def location(self, file_index: int, line: int) -> str:
        return f"{PurePath(self.files.get(file_index, '?')).name}:{line}"

    def _declare(self, text: str):
        for statement in text.split(";"):
            start = re.search(r"(?:\.(?:visible|extern|weak|common)\s+)*\.(?:global|const|shared)\b", statement)
            variable = parse_variable(statement[start.start() :]) if start else None
            if variable:
                self.variables[variable.name] = variable


def _matching_brace(text: str, position: int) -> int:
    depth = 1
    for brace in re.finditer(r"[{}]", text[position:]):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return position + brace.start()
    raise SimError("the PTX text ends inside a function")


class _BodyParser:
    """Walks over a body statement by statement. Inline assembly opens scopes whose registers may share a name: a
    declaration in an inner scope is renamed to name@scope and so is every use of it."""

    def __init__(self, module: Module, match: re.Match, body: str):
        declared = {
            kind: [parse_variable(text) for text in split_operands(match[kind] or "")] for kind in ("params", "results")
        }
        self.kernel = Kernel(match["name"], module, declared["params"], declared["results"])
        limit = re.search(r"\.maxntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", match["head"])
        if limit:
            sizes = [int(size) for size in limit.groups() if size]
            self.kernel.threads_limit = 1
            for size in sizes:
                self.kernel.threads_limit *= size
        self.scopes: list[dict[str, str]] = [{}]
        self.scope_count = self.call_count = 0
        self.where = "?"
        self._walk(body)

    def _walk(self, body: str):
        position, end = 0, len(body)
        while position < end:
            character = body[position]
            if character.isspace() or character == ";":
                position += 1
            elif character == "{":
                self._open_scope(body[position + 1 : _matching_brace(body, position + 1)])
                position += 1
            elif character == "}":
                self.scopes.pop()
                position += 1
            elif loc := _LOC.match(body, position):
                self.where = self._location(*(int(number) for number in loc.groups() if number))
                position = loc.end()
            elif label := _LABEL.match(body, position):
                position = self._label(body, label)
            else:
                stop = body.index(";", position)
                self._statement(body[position:stop].strip())
                position = stop + 1

    def _location(self, file: int, line: int, *inlined_at: int) -> str:
        inner = self.kernel.module.location(file, line)
        return f"{inner}, inlined at {self.kernel.module.location(*inlined_at)}" if inlined_at else inner

    def _open_scope(self, text: str):
        self.scope_count += 1
        labels = re.findall(r"(?:^|[\s;{}])([A-Za-z_]\w*):(?!:)", text)  # a jump may come before its label
        self.scopes.append({name: f"{name}@{self.scope_count}" for name in labels})

    def _label(self, body: str, label: re.Match) -> int:
        rest = re.compile(r"\s*\.(branchtargets|callprototype)\s+([^;]*);").match(body, label.end())
        if rest:
            self.kernel.branch_targets[label[1]] = split_operands(rest[2])
            return rest.end()
        self.kernel.labels[self._resolve(label[1])] = len(self.kernel.instructions)
        return label.end()

    def _statement(self, text: str):
        if register := _REGISTER.match(text):
            for name in split_operands(register[2]):
                self._declare_register(name, register[1])
        elif text.startswith((".pragma", ".maxn", ".minn")):
            return
        elif text.startswith("."):
            variable = parse_variable(text)
            if variable is None:
                raise SimError(f"{self.where}: directive not understood: {text[:80]}")
            if len(self.scopes) > 1:  # the arguments of a call
                unique = f"{variable.name}@{self.scope_count}"
                self.scopes[-1][variable.name] = unique
                variable = replace(variable, name=unique)
            self.kernel.variables[variable.name] = variable
        else:
            self._instruction(text)

    def _declare_register(self, name: str, type_name: str):
        prefix = re.match(r"([%\w$]+)<\d+>$", name)
        if prefix:
            self.kernel.registers[prefix[1] + "<"] = type_name
        elif len(self.scopes) > 1:
            unique = f"{name}@{self.scope_count}"
            self.scopes[-1][name] = unique
            self.kernel.registers[unique] = type_name
        else:
            self.kernel.registers[name] = type_name

    def _resolve(self, text: str) -> str:
        if len(self.scopes) == 1 or not any(self.scopes):
            return text

        def rename(match: re.Match) -> str:
            for scope in reversed(self.scopes):
                if match.group() in scope:
                    return scope[match.group()]
            return match.group()

        return _NAME.sub(rename, text)

    def _instruction(self, text: str):
        predicate, negated = None, False
        if text.startswith("@"):
            guard, text = text.split(None, 1)
            negated = guard.startswith("@!")
            predicate = self._resolve(guard.lstrip("@!"))
        opcode, _, rest = text.replace("\t", " ").replace("\n", " ").partition(" ")
        operands = tuple(split_operands(self._resolve(rest)))
        where = f"{self.where} ({opcode})"
        instruction = Instruction(opcode, operands, predicate, negated, where)
        if opcode.split(".")[0] == "call":
            self._call(instruction)
        else:
            self.kernel.instructions.append(instruction)

    def _call(self, instruction: Instruction):
        """Puts the body of a device function in the place of its call, under names of its own."""
        module, operands = self.kernel.module, list(instruction.operands)
        results = elements(operands.pop(0).strip("()")) if operands[0].startswith("(") else []
        name = operands.pop(0)
        if name == "__assertfail":
            self.kernel.instructions.append(replace(instruction, opcode="trap", operands=()))
            return
        if not module.has(name) or instruction.predicate or len(operands) > 1:
            raise SimError(f"{instruction.where}: call not modelled: {name}")
        callee = module.kernel(name)
        self.call_count += 1
        suffix = f"#{self.call_count}"
        arguments = elements(operands[0].strip("()")) if operands else []
        names = dict(zip((p.name for p in callee.parameters), arguments, strict=True))
        names |= dict(zip((p.name for p in callee.results), results, strict=True))
        for variable in callee.variables.values():
            if variable.space == "shared":
                self.kernel.variables[variable.name] = variable
            else:
                names[variable.name] = variable.name + suffix
                self.kernel.variables[names[variable.name]] = replace(variable, name=names[variable.name])
        start = len(self.kernel.instructions)
        for label, at in callee.labels.items():
            names[label] = label + suffix
            self.kernel.labels[names[label]] = start + at
        for label, targets in callee.branch_targets.items():
            names[label] = label + suffix
            self.kernel.branch_targets[names[label]] = [target + suffix for target in targets]

        def rename(match: re.Match) -> str:
            found = match.group()
            if found not in names and (type_name := callee.register_type(found)):
                names[found] = found + suffix
                self.kernel.registers[names[found]] = type_name
            return names.get(found, found)

        end = f"end{suffix}"
        for inner in callee.instructions:
            operands = tuple(_NAME.sub(rename, operand) for operand in inner.operands)
            predicate = inner.predicate and _NAME.sub(rename, inner.predicate)
            if inner.opcode.split(".")[0] == "ret":
                inner = replace(inner, opcode="bra", operands=(end,), predicate=predicate)
            else:
                inner = replace(inner, operands=operands, predicate=predicate)
            self.kernel.instructions.append(inner)
        self.kernel.labels[end] = len(self.kernel.instructions)

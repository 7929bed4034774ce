"""The configuration in words: every key with value, range, comment and source; presets and recipes with a line each.

A key's comment is the one behind its line in `train.config`, or behind its line in the preset. Needs no torch.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import io
import math
import re
import tokenize
from pathlib import Path
from typing import Any, get_args, get_origin

from .._keys import did_you_mean
from . import config as config_module
from .config import MOST, PRESETS, ConfigError, config_values, in_range, known_keys, load_config, presets
from .recipes import RECIPES

LONGEST_SUMMARY = 100  # characters
SOURCE_MARK = re.compile(r"\[([^\]]+)\]")


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of the configuration."""

    name: str
    value: str
    allowed: str
    comment: str
    source: str
    """Who gives the value: the preset or the default, and its mark, as in "default, paper"."""


def describe(preset: str | None = None, section: str | None = None) -> list[Key]:
    """The keys of a preset (or YAML file), or the defaults; of one section, or all.

    Raises:
        ConfigError: no such preset or section.
    """
    if section is not None and section not in sections():
        hint = did_you_mean(section, sections())
        raise ConfigError(f"config: section must be one of {', '.join(sections())}, got {section!r}{hint}")
    named = config_values(preset) if preset is not None else {}
    notes, values = ({}, config_module.Config()) if preset is None else (_preset_comments(preset), load_config(preset))
    keys = []
    for name, (field, kind) in known_keys().items():
        own_section, _, key = name.rpartition(".")
        if section not in (None, own_section):
            continue
        value = getattr(getattr(values, own_section) if own_section else values, key)
        note = notes.get(name) or comments()[name]
        own_note = name in notes or value == field.default  # a mark in `train.config` is about the default
        comment = SOURCE_MARK.sub("", note).strip(" ,;:")
        marks = SOURCE_MARK.findall(note) if own_note else []
        source = ", ".join([preset if name in named else "default", *marks])
        keys.append(Key(name, shown(value), allowed_of(field, kind), comment, source))
    return keys


def format_keys(keys: list[Key]) -> str:
    """A table for the terminal; the comment comes last, as it is the longest."""
    head = ("key", "value", "allowed", "source", "comment")
    rows = [head, *((k.name, k.value, k.allowed, k.source, k.comment) for k in keys)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    cells = [[*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[4]] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def sections() -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] for name in known_keys() if "." in name))


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'


def allowed_of(field: dataclasses.Field, kind: Any) -> str:
    """The type and range of a key in words."""
    if choices := field.metadata.get("choices"):
        return "|".join((*choices, *(f"{prefix}NAME" for prefix in field.metadata["prefixes"])))
    if "low" in field.metadata:
        low, high = field.metadata["low"], field.metadata["high"]
        number = "integer" if kind is int else "number"
        return f"{number} >= {low:g}" if high in (math.inf, MOST) else f"{number} {in_range(low, high)}"
    if kind is bool:
        return "true|false"
    if items := field.metadata.get("items"):
        return f"some of {','.join(items)}"
    return "names, with commas" if get_origin(kind) is tuple and get_args(kind)[0] is str else "text"


@functools.cache
def comments() -> dict[str, str]:
    """`{"section.key": comment}`: the comment behind a key's line in `train.config`, or that above it."""
    return comments_of(Path(config_module.__file__).read_text(encoding="utf-8"))


def comments_of(text: str) -> dict[str, str]:
    """The same of the text of a module."""
    by_line = {
        token.start[0]: token.string.lstrip("# ").rstrip()
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    classes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    fields = config_module.Config.__dataclass_fields__.items()
    of_section = {name: type(f.default_factory()).__name__ for name, f in fields if name in sections()}
    found = {}
    for class_name, prefix in [*((name, f"{section}.") for section, name in of_section.items()), ("Config", "")]:
        for node in classes[class_name].body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                lines = range(node.lineno, node.end_lineno + 1)
                behind = [by_line[line] for line in lines if line in by_line]
                found[f"{prefix}{node.target.id}"] = " ".join(behind or _above(node.lineno, by_line, text.splitlines()))
    return found


def _above(line: int, by_line: dict[int, str], texts: list[str]) -> list[str]:
    """The lines of comment alone that end right above a line."""
    found = []
    while line > 1 and texts[line - 2].lstrip().startswith("#"):
        line -= 1
        found.insert(0, by_line[line])
    return found


def _preset_comments(preset: str) -> dict[str, str]:
    """`{"section.key": comment}` of the lines of a preset that have one."""
    path = PRESETS / f"{preset}.yaml"
    section, found = "", {}
    for line in (path if path.is_file() else Path(preset)).read_text(encoding="utf-8").splitlines():
        if match := re.match(r"(\s*)(\w+):[^#]*(?:#\s*(.*))?$", line):
            indent, key, comment = match.groups()
            section = section if indent else key
            if comment:
                found[f"{section}.{key}" if indent else key] = comment
    return found


def preset_summary(name: str) -> str:
    """The first sentence of a preset's head; of a long one the part before the colon."""
    head = []
    for line in (PRESETS / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        head.append(line.lstrip("# "))
    sentence = re.split(r"\. ", " ".join(head), maxsplit=1)[0].rstrip(".")
    return sentence if len(sentence) <= LONGEST_SUMMARY else sentence.partition(": ")[0]


def list_presets_and_recipes() -> str:
    """For `ltood train --help`."""
    width = max(map(len, (*presets(), *RECIPES)))
    lines = ["presets (--config):", *(f"  {name:{width}}  {preset_summary(name)}" for name in presets())]
    lines += ["", "recipes (--recipe):", *(f"  {name:{width}}  {RECIPES[name].summary}" for name in RECIPES)]
    return "\n".join(lines)

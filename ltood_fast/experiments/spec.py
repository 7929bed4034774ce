"""What an experiment is: a claim, the variants that it needs, and how their runs become a table and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..train.config import Config, load_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .outcomes import Outcomes
    from .verdict import Verdict


class ExperimentError(RuntimeError):
    """A sentence about an experiment."""


@dataclass(frozen=True)
class Variant:
    """One way to train; every seed of it is a run of its own, shared by all experiments that name it."""

    name: str
    overrides: Mapping[str, str] = field(default_factory=dict)
    """Of the preset and of what the user overrides."""
    stages: tuple[str, ...] = ("stage1",)
    guide: str = ""
    """The variant whose stage 1, of the same seed, guides stage 2."""
    trunk: str = ""
    """The variant whose network of stage `simclr`, of the same seed, stage 1 starts from."""
    counts_of: str = ""
    """The variant whose class sizes make the groups; empty: its own."""


@dataclass(frozen=True)
class Comparison:
    """The claim that one variant is better than another: higher in an accuracy, lower in `std`."""

    better: str
    worse: str
    measure: str = "overall"

    @property
    def sign(self) -> int:
        return -1 if self.measure == "std" else 1


@dataclass(frozen=True)
class Setting:
    """What the user asked for."""

    preset: str
    output: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    jobs: int = 2
    overrides: Mapping[str, str] = field(default_factory=dict)
    balanced_list: str = ""
    other_ood: str = ""
    other_root: str = ""

    @property
    def preset_name(self) -> str:
        """Of a file, the file's name."""
        return Path(self.preset).name

    @cached_property
    def config(self) -> Config:
        """The preset with the user's overrides: what a variant's own overrides come on top of."""
        return load_config(self.preset, dict(self.overrides))


@dataclass(frozen=True)
class Table:
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Summary:
    """What an experiment found."""

    tables: list[Table]
    draw: Callable[[], Figure]
    verdict: Verdict
    values: dict[str, Any] = field(default_factory=dict)
    """Numbers in addition to those of the runs, for results.json."""


@dataclass(frozen=True)
class Control:
    """A difference that must show, or the runs are too short or too weak to show any gain."""

    comparison: Comparison
    variants: tuple[Variant, ...]
    """The two that it compares; trained with those of the experiment."""


@dataclass(frozen=True)
class Experiment:
    name: str
    question: str
    """One line for a list."""
    claim: str
    """One sentence, as the source makes it (arXiv 2506.12698), or ours where it makes none."""
    variants: Callable[[Setting], list[Variant]]
    """Those with a row, in the order of the table; the guides that they need among them."""
    summarise: Callable[[Setting, Outcomes], Summary]
    control: Control | str
    """Where it does not gain, nothing is concluded; a sentence where nothing that is trained is compared."""

    def with_control(self, variants: list[Variant]) -> list[Variant]:
        """The variants and those of the control that are not among them."""
        known = {variant.name for variant in variants}
        extra = () if isinstance(self.control, str) else self.control.variants
        return [*variants, *(variant for variant in extra if variant.name not in known)]

"""A random call from a seed and a number, and the verdict on it."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from python_tests.ops.op_table import DTYPES, OPS, Op, Sample, at_magnitude, changed, disagreement, sample

# Magnitudes of rows that docs/numerics.md promises for every op; `extreme` goes to the limits of the dtype instead.
PROMISED = {
    torch.float64: (1e-20, 1e60),
    torch.float32: (1e-20, 1e15),
    torch.bfloat16: (1e-20, 1e15),
    torch.float16: (6.2e-5, 65504.0),
}
SPECIAL = ("zero", "equal", "opposite", "huge", "tiny", "power of two")
BROKEN = {"NaN": math.nan, "Inf": math.inf, "-Inf": -math.inf}
LAYOUTS = {
    "contiguous": lambda x: x,
    "columns first": lambda x: x.t().contiguous().t(),
    "every second row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "columns of a wider matrix": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
}


@dataclass(frozen=True)
class Case:
    op: Op
    sample: Sample
    words: tuple[str, ...]  # what is special about it

    @property
    def finite(self) -> bool:
        return not any(word in BROKEN for word in self.words)

    def __str__(self) -> str:
        shapes = {name: tuple(x.shape) for name, x in self.sample.tensors.items() if isinstance(x, Tensor)}
        return f"{self.op.name} {', '.join(self.words)} {shapes} {self.sample.options}"


def make_case(seed: int, number: int, only: str | None = None, extreme: bool = False) -> Case:
    """The same case for the same seed and number on every machine."""
    r = random.Random(f"{seed}/{number}")
    op = OPS[only] if only else r.choice(list(OPS.values()))
    variant = r.choice(op.variants)
    n = r.randint(1, 64) if r.random() < 0.85 else r.randint(65, 200)
    d, dtype = r.choice((1, 2, 3, r.randint(4, 70), r.randint(4, 70))), r.choice(DTYPES)
    tau = math.exp(r.uniform(math.log(0.005), math.log(100)))
    options = {"tau": tau} if "temperature" in op.tensors else {}
    if op.reduction:
        options["reduction"] = r.choice(("none", "none", "mean", "sum"))
    if op.normalize is not None:
        options["normalize"] = r.random() < 0.7
    if "k" in variant.options:
        options["k"] = r.randint(1, 9)
    case = sample(op, variant, n, d, dtype, r.randrange(2**31), **options)
    words = [variant.why, str(dtype).removeprefix("torch.")]
    if "temperature" in case.tensors and r.random() < 0.4:
        case.tensors["temperature"] = tau
    words += ["as given"] * (options.get("normalize", True) is False)
    if r.random() < 0.2 and "guide" in case.tensors and case.tensors["guide"].shape == case.tensors["z"].shape:
        case = changed(case, "guide", lambda x: case.tensors["z"].clone())
        words.append("guide is z")
    if r.random() < 0.15 and op.views and "instance_ids" not in case.tensors:
        noise = 10.0 ** r.uniform(-8, 0)
        case = changed(case, "z", lambda z: (z[: n // 2].repeat(2, 1) + noise * z).to(z.dtype))
        words.append("views that all but agree")
    broken = r.random() < 0.06
    for name in op.rows:
        if name in case.tensors:
            case = changed(case, name, lambda x: _special_rows(x, r, words, broken, extreme))
    return Case(op, case, tuple(dict.fromkeys(words)))


def _special_rows(x: Tensor, r: random.Random, words: list[str], broken: bool, extreme: bool) -> Tensor:
    limits = torch.finfo(x.dtype)
    least, most = (limits.smallest_normal, limits.max) if extreme else PROMISED[x.dtype]
    low, high = math.log10(least), math.log10(most)
    how = r.random()
    if how < 0.15:
        x = at_magnitude(x, 10 ** r.uniform(low, high))
        words.append("one magnitude")
    elif how < 0.3:
        x = torch.cat([at_magnitude(row, 10 ** r.uniform(low, high)) for row in x.split(1)])
        words.append("a magnitude a row")
    elif how < 0.4:
        x = x[torch.arange(len(x)) % r.randint(1, 5) % len(x)].clone()
        words.append("a few rows repeated")
    for _ in range(r.choice((0, 0, 1, 3))):
        i, j, kind = r.randrange(len(x)), r.randrange(len(x)), r.choice(SPECIAL)
        words.append(kind)
        if kind in ("huge", "tiny"):
            largest = most if kind == "huge" else least * 2 ** r.randint(-3 if extreme else 0, 9)
            x = at_magnitude(x, largest, slice(i, i + 1))
        else:
            factor = {"zero": 0.0, "equal": 1.0, "opposite": -1.0, "power of two": 2.0 ** r.randint(-5, 5)}[kind]
            x[i] = x[j] * factor if bool((x[j] * factor).isfinite().all()) else x[j]
    if broken:
        kind = r.choice(list(BROKEN))
        words.append(kind)
        x[r.randrange(len(x)), r.randrange(x.shape[1])] = BROKEN[kind]
    return LAYOUTS[r.choice(list(LAYOUTS))](x)


def verdict(case: Case) -> tuple[str, str]:
    """("right" | "refused" | "wrong", what was said). A call may be refused where too few rows, NaN or Inf came, or
    rows as given, with a sentence that begins with the name of the op."""
    try:
        wrong = disagreement(case.op, case.sample)
    except ValueError as error:
        few = len(case.sample.tensors[case.op.rows[0]]) < 2
        may = few or not case.finite or "as given" in case.words
        if may and str(error).startswith(f"{case.op.name.split()[0]}: "):
            return "refused", str(error)
        return "wrong", f"error: {error}"
    except (RuntimeError, TypeError, ArithmeticError) as error:
        return "wrong", f"error: {type(error).__name__}: {error}"
    return ("wrong", wrong) if wrong else ("right", "")

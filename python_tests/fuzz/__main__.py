"""python -m fuzz --seconds 60 --seed 0 [--op knn] | --seed 0 --cases 300 | --seed 0 --case 17 (one case, in words)"""

from __future__ import annotations

import argparse
import faulthandler
import re
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from python_tests.fuzz.cases import make_case, verdict
from python_tests.ops.op_table import OPS

HANG_SECONDS = 120  # a case that takes longer ends the process with a traceback


@dataclass
class Report:
    seed: int
    counts: Counter = field(default_factory=Counter)
    kinds: dict[tuple[str, str], list[tuple[int, str]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, number: int, op: str, dtype: str, said: str) -> None:
        """Disagreements are of one kind if op, dtype and the sentence without its numbers are."""
        kind = re.sub(r"\[[^]]*\]", "", said.split(", truth")[0].split(" of ")[0])
        self.kinds[(op, f"{dtype} {re.sub(r'-?[0-9.]+(e[-+]?[0-9]+)?', '#', kind)[:70]}")].append((number, said))

    def __str__(self) -> str:
        total, wrong = sum(self.counts.values()), self.counts["wrong"]
        lines = [f"{total} cases, {wrong} disagreements, {self.counts['refused']} refused (seed {self.seed})"]
        for (op, kind), found in sorted(self.kinds.items(), key=lambda item: (item[0][0], -len(item[1]))):
            number, said = found[0]
            lines.append(f"{len(found):5d} {op}, {kind}")
            lines.append(f"      python -m fuzz --seed {self.seed} --case {number}: {said[:160]}")
        return "\n".join(lines)


def fuzz(
    seed: int, *, seconds: float | None = None, cases: int | None = None, op: str | None = None, extreme: bool = False
) -> Report:
    report, start, number = Report(seed), time.monotonic(), 0
    while (cases is None or number < cases) and (seconds is None or time.monotonic() - start < seconds):
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        case = make_case(seed, number, op, extreme)
        outcome, said = verdict(case)
        report.counts[outcome] += 1
        if outcome == "wrong":
            report.add(number, case.op.name, case.words[1], said)
        number += 1
    faulthandler.cancel_dump_traceback_later()
    return report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="how long to go on (60 if no number of cases is given)")
    parser.add_argument("--cases", type=int, help="how many cases to try")
    parser.add_argument("--case", type=int, help="this case alone, described")
    parser.add_argument("--extreme", action="store_true", help="rows up to the limits of the dtype, beyond the promise")
    parser.add_argument("--op", choices=list(OPS), help="calls of this op alone")
    args = parser.parse_args()
    if args.case is not None:
        case = make_case(args.seed, args.case, args.op, args.extreme)
        outcome, said = verdict(case)
        print(f"{case}\n{outcome}: {said}")
        return outcome == "wrong"
    seconds = 60 if args.seconds is None and args.cases is None else args.seconds
    report = fuzz(args.seed, seconds=seconds, cases=args.cases, op=args.op, extreme=args.extreme)
    print(report)
    return report.counts["wrong"] > 0


if __name__ == "__main__":
    sys.exit(main())

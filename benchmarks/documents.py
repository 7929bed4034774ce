"""python -m benchmarks docs: the numbers and pictures of README.md and docs/, from the committed results.

A block between `<!-- numbers: NAME -->` and `<!-- end -->` is replaced by what BLOCKS[NAME] makes of the results; the
pictures in docs/pictures carry the digest of the file that they were drawn from. `--check` changes nothing and names
what is out of date.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from . import experiments_picture, plots, results_file, sampler_picture, scaling, tables
from .machine import ROOT
from .picture_style import SOURCE, look
from .tables import Table, number

RESULTS = ROOT / "benchmarks/results"
RUN, SCALING = RESULTS / "amd-epyc-2-threads.json", RESULTS / "scaling.json"
PICTURES = ROOT / "docs/pictures"
BLOCK = re.compile(r"(?P<head><!-- numbers: (?P<name>[a-z-]+) -->\n).*?(?P<tail><!-- end -->)", re.DOTALL)
SHOWN = {  # README's rows: case -> what it is called there
    "nt_xent N=16384 D=128": "`nt_xent`, N = 16,384",
    "stage1_loss N=4096 D=128": "`stage1_loss`, N = 4,096",
    "guided_contrastive N=4096 D=128 K=10": "`guided_contrastive`, N = 4,096",
    "cluster_kl N=50000 D=128 K=100": "`cluster_kl`, N = 50,000, K = 100",
    "knn N=50000 D=128 k=10 forward": "`knn`, N = 50,000, k = 10 (forward)",
}
SMALLEST = "nt_xent N=256 D=128"
VARIANTS = {  # (experiment, variant) -> its name in docs/experiments.md
    ("simclr-balance", "simclr"): "SimCLR",
    ("simclr-balance", "balanced"): "SimCLR, balanced set of the same size",
    ("ood-sampling", "none"): "stage 1 without OOD images",
    ("ood-sampling", "random"): "stage 1, random OOD images",
    ("ood-sampling", "tailness"): "stage 1, OOD images by tailness",
    ("ablation", "full"): "the same, then stage 2: the full method",
    ("tail-targets", "tailness"): "stage 1 without pseudo-positives, OOD images by tailness",
    ("ablation", "full-no-neighbors"): "the same, then stage 2",
    ("tail-targets", "random"): "stage 1 without them, random OOD images",
    ("tail-targets", "clusters-100"): "stage 1 without them, a hundred clusters",
    ("tail-targets", "samples"): "stage 1 without them, OOD images for the sparsest images",
}


def cell(row: dict) -> str:
    """ms (MiB)"""
    return f"{number(row['median_ms'])} ({number(row['peak_mib'], digits=2)})"


def readme_rows(run: dict[str, Any]) -> str:
    groups, lines = tables.grouped(run["rows"]), []
    for case, title in SHOWN.items():
        rows = groups[case]
        ours, eager, best = tables.timed(rows, "ours"), tables.timed(rows, "eager"), tables.best_others(rows)[0]
        name = look(best["implementation"]).label.split(",")[0]
        lines.append([title, cell(eager), f"{name} {cell(best)}", cell(ours), f"{ours['vs_best_rival']:.1f}x"])
    return Table(["ms (MiB)", "eager PyTorch", "fastest other", "ltood_fast", "faster"], lines).markdown()


def where(run: dict[str, Any]) -> str:
    """The machine, the versions and the commit, and where nothing is gained."""
    machine, smallest = run["machine"], tables.grouped(run["rows"])[SMALLEST]
    other, ours = tables.best_others(smallest)[0], tables.timed(smallest, "ours")
    gain = "Nothing" if ours["median_ms"] >= other["median_ms"] else "Little"
    return (
        f"Forward and backward, float32, D = 128, medians; {machine['threads']} threads of an {machine['device']} "
        f"({machine['cpu_capability']}),\ntorch {machine['torch']}, commit {run['commit'][:7]}, {run['date']}. In "
        f"brackets: peak memory in addition to the inputs.\n{gain} is gained at N = {smallest[0]['N']}: "
        f"`{smallest[0]['op']}` takes {number(ours['median_ms'])} ms, {look(other['implementation']).label} "
        f"{number(other['median_ms'])} ms."
    )


def hero_sentence(run: dict[str, Any]) -> str:
    rows = tables.grouped(run["rows"])["nt_xent N=16384 D=128"]
    ours, eager = tables.timed(rows, "ours"), tables.timed(rows, "eager")
    return (
        f"The kernels never store the N×N similarity matrix. `nt_xent` with N = {ours['N']:,} rows needs "
        f"{number(ours['peak_mib'], digits=2)} MiB,\nwhere eager PyTorch needs "
        f"{number(eager['peak_mib'], digits=2)} MiB."
    )


def rates(run: dict[str, Any]) -> str:
    found = run["rates"]
    return (
        f"Limits measured in the same run: {found['product_flop_per_s'] / 1e9:.0f} GFLOP/s of float32 products, "
        f"{found['copy_bytes_per_s'] / 1e9:.0f} GB/s copied, "
        f"{found['exp_per_s'] / 1e9:.1f} billion exponentials a second."
    )


def steps(run: dict[str, Any]) -> str:
    table, largest = tables.training(run)
    return "\n\n".join([table.markdown(), "\n".join(f"- {line}" for line in largest)])


def resampling(run: dict[str, Any]) -> str:
    setup = run["resampling"]["setup"]
    about = (
        f"{setup['budget']:,} of {setup['candidates']:,} synthetic candidates of {setup['D']} features, "
        f"{setup['K']} clusters of {setup['id_rows']:,} rows; recall is the part of the exact sample that is found."
    )
    return f"{about}\n\n{tables.resampling(run).markdown()}"


def ranks(result: dict[str, Any]) -> str:
    header = ["ranks", "rows a rank", "exchange", "sent: KiB", "by formula: KiB", "peak: MiB", "CPU ms"]
    lines = [
        [str(row["ranks"]), f"{row['rows_a_rank']:,}", row["exchange"], number(row["sent_bytes"] / 1024, digits=4),
         number(row["formula_bytes"] / 1024, digits=4), number(row["peak_mib"]), number(row["cpu_ms"])]
        for row in result["measured"]
    ]  # fmt: skip
    return Table(header, lines).markdown()


def verdicts(experiments: dict[str, dict]) -> str:
    lines = [
        [f"`{name}`", result["claim"].split(":")[0].rstrip("."), result["verdict"]["decision"],
         ", ".join(map(str, result["seeds"])), result["commit"][:7]]
        for name, result in experiments.items()
    ]  # fmt: skip
    return Table(["experiment", "claim", "here", "seeds", "commit"], lines).markdown()


def accuracies(experiments: dict[str, dict]) -> str:
    lines = []
    for (experiment, variant), title in VARIANTS.items():
        measures = experiments[experiment]["variants"][variant]["measures"]
        overall, std = measures["overall"], measures["std"]
        groups = [f"{100 * measures[group]['mean']:.2f}" for group in ("many", "medium", "few")]
        shown = [f"{100 * value['mean']:.2f} ± {100 * value['std']:.2f}" for value in (overall, std)]
        lines.append([title, str(overall["n"]), shown[0], *groups, shown[1]])
    return Table(["", "seeds", "overall", "Many", "Medium", "Few", "std"], lines).markdown()


def differences(experiments: dict[str, dict]) -> str:
    lines = [
        [name, f"{difference['better']} − {difference['worse']}", difference["measure"], str(difference["n"]),
         f"{100 * difference['mean']:+.2f} {_spread(difference)}", difference["decision"]]
        for name, result in experiments.items()
        for difference in result["comparisons"]
    ]  # fmt: skip
    return Table(["experiment", "difference", "of", "seeds", "points", "the first is better"], lines).markdown()


def _spread(difference: dict) -> str:
    """The interval that the verdict uses."""
    return f"[{100 * difference['low']:+.2f}, {100 * difference['high']:+.2f}]"


def load() -> dict[str, Any]:
    """Everything that the pages show, read once."""
    folders = sorted(path.parent.name for path in (RESULTS / "experiments").glob("*/results.json"))
    experiments = {
        name: json.loads((RESULTS / "experiments" / name / "results.json").read_text(encoding="utf-8"))
        for name in folders
    }
    return {
        "run": results_file.read(RUN),
        "scaling": json.loads(SCALING.read_text(encoding="utf-8")),
        "experiments": experiments,
    }


BLOCKS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "hero": ("run", hero_sentence),
    "rows": ("run", readme_rows),
    "where": ("run", where),
    "summary": ("run", lambda run: tables.summary(run).markdown()),
    "rates": ("run", rates),
    "steps": ("run", steps),
    "resampling": ("run", resampling),
    "ranks": ("scaling", ranks),
    "verdicts": ("experiments", verdicts),
    "accuracies": ("experiments", accuracies),
    "differences": ("experiments", differences),
}


def filled(text: str, data: dict[str, Any]) -> str:
    """The text with every block made anew."""

    def block(match: re.Match) -> str:
        if match["name"] not in BLOCKS:
            raise ValueError(f"docs: block must be one of {', '.join(BLOCKS)}, got {match['name']}")
        part, make = BLOCKS[match["name"]]
        return f"{match['head']}{make(data[part])}\n{match['tail']}"

    return BLOCK.sub(block, text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def digest(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def sources() -> dict[str, str]:
    """Picture -> the digest of the results that it shows (of the sampler: of its code)."""
    run, experiments = digest(RUN), digest(*sorted((RESULTS / "experiments").glob("*/results.json")))
    names = ("hero", "sizes", "ratios", "roofline", "training")
    return {
        **dict.fromkeys(names, run),
        "scaling": digest(SCALING),
        "experiments": experiments,
        "sampler": digest(Path(sampler_picture.__file__)),
    }


def drawn(data: dict[str, Any]) -> dict[str, bytes]:
    of = sources()
    pictures = [plots.hero(data["run"], of["hero"]), *plots.draw(data["run"], of["hero"])]
    return {
        **{picture.name: picture.png for picture in pictures},
        "scaling": scaling.draw(data["scaling"], of["scaling"]),
        "experiments": experiments_picture.draw(data["experiments"], of["experiments"]),
        "sampler": sampler_picture.draw(of["sampler"]),
    }


def stale() -> list[str]:
    """Pages and pictures that do not show the committed results."""
    data = load()
    found = [str(page.relative_to(ROOT)) for page in pages() if filled(text := page.read_text("utf-8"), data) != text]
    for name, source in sources().items():
        path = PICTURES / f"{name}.png"
        if not path.exists() or Image.open(path).info.get(SOURCE) != source:
            found.append(str(path.relative_to(ROOT)))
    return found


def main(arguments: argparse.Namespace) -> int:
    if arguments.check:
        found = stale()
        print("\n".join(found) or "README.md, docs and their pictures show the committed results")
        return 1 if found else 0
    data = load()
    for page in pages():
        text = page.read_text("utf-8")
        if (new := filled(text, data)) != text:
            page.write_text(new, encoding="utf-8")
            print(page)
    PICTURES.mkdir(exist_ok=True)
    for name, png in drawn(data).items():
        path = PICTURES / f"{name}.png"
        path.write_bytes(png)
        print(path)
    return 0


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("docs", help="numbers and pictures of README.md and docs/, from the committed results")
    parser.add_argument("--check", action="store_true", help="name what is out of date, exit status 1 if anything is")
    parser.set_defaults(function=main)

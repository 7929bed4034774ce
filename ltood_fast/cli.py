"""The commands: `ltood train | eval | report | embed | export | sample-ood | experiment | config | doctor | info`.

A user's mistake ends as one line on stderr, `ltood: error: ...`, and exit code 2; `--traceback` shows where.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from ._signals import Terminated, sigterm_raises

USER_ERRORS = (ValueError, TypeError, RuntimeError, OSError, ImportError)
EXIT_ERROR, EXIT_INTERRUPTED, EXIT_TERMINATED = 2, 130, 143

RESUME = (
    "go on with the run in --run-dir; keys of stages that have not begun may change, and a stage may get more epochs, "
    "which go on at the rate that the longer schedule has there"
)


OWN_IMAGES = (
    "folder of one's own images, with class folders or without; sizes, batch, budget and clusters by rules, see "
    "docs/own_images.md; ends with report.html, embeddings.npy and network/"
)


KEYS = "Any key that `ltood config` lists is an option: --section.key value, e.g. --stage1.epochs 100."


def presets_and_recipes() -> str:
    """Empty where torch, which the package imports, is missing."""
    try:
        from .train.describe import list_presets_and_recipes
    except ImportError:
        return ""

    return list_presets_and_recipes()


class Parser(argparse.ArgumentParser):
    """Argument errors in one form; no abbreviations, or `--data` would pass for `--data.id`; no option twice."""

    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False)
        self.register("action", None, Once)
        self.listing: Callable[[], str] | None = None  # at the end of --help, made when that is shown

    def format_help(self) -> str:
        listed = self.listing() if self.listing else ""
        return super().format_help() + (f"\n{listed}\n" if listed else "")

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (ltood --help lists the commands)")


def build_parser() -> Parser:
    parser = Parser(prog="ltood", description="Self-supervised learning on long-tailed images with OOD images.")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from (anywhere on the line)")
    parser.add_argument("--version", action=ShowVersion, nargs=0, help="show the version, with the torch it is for")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))

    add_train(commands.add_parser("train", help="train the stages of a configuration, evaluate them, write the report"))

    evaluate = commands.add_parser("eval", help="evaluate a run's stages again and write the report")
    evaluate.add_argument("--run-dir", type=some_path, required=True)

    report = commands.add_parser("report", help="one table over all runs below a folder, mean ± std over seeds")
    report.add_argument("runs", type=some_path, help="folder; the runs' report.json may lie at any depth")
    report.add_argument("--output", type=some_path, help="the table as .md, .json or .csv as well")

    embed = commands.add_parser("embed", help="features of a set of images, as .npy [N, F]")
    embed.add_argument("--checkpoint", type=some_path, help="a stage's last.pt")
    embed.add_argument("--run-dir", type=some_path, help="a run instead, of which the last stage embeds")
    embed.add_argument("--images", type=some_path, help="folder of images; their files are listed in OUTPUT's .csv")
    embed.add_argument("--data", help="a data set instead, e.g. letters, cifar10, folder:/path, list:/path.txt")
    embed.add_argument("--output", type=some_path, required=True)
    embed.add_argument("--projection", action="store_true", help="the projection head's output instead")

    export = commands.add_parser("export", help="the trained network with its preprocessing and a model card")
    export.add_argument("--run-dir", type=some_path, required=True)
    export.add_argument("--stage", choices=("simclr", "stage1", "stage2", "joint"), help="by default the last one")
    export.add_argument("--format", default="torch", choices=("torch", "safetensors", "onnx"))
    export.add_argument("--output", type=some_path, required=True, help="a new folder")

    sample = commands.add_parser("sample-ood", help="choose OOD images from embeddings, as .npy of indices")
    sample.add_argument("--candidates", type=some_path, required=True, help="embeddings of the OOD pool, .npy [M, F]")
    sample.add_argument("--id", type=some_path, required=True, help="embeddings of the ID set, .npy [N, F]")
    sample.add_argument("--budget", type=whole_number(1), required=True, help="images to choose")
    sample.add_argument("--output", type=some_path, required=True)
    sample.add_argument("--clusters", type=whole_number(1), default=10, help="of the ID set (10)")
    sample.add_argument("--tailness-k", type=whole_number(1), default=10, help="neighbours of the sparsity (10)")
    sample.add_argument("--temperature", type=positive, default=1.0, help="of the budget, T_c (1)")
    sample.add_argument("--strategy", default="tailness", choices=("tailness", "random"))
    sample.add_argument("--seed", type=whole_number(0), default=0)

    add_experiment(
        commands.add_parser("experiment", help="test a claim of the method: train its runs, write its table")
    )

    config = commands.add_parser("config", help="the keys of a configuration: value, range, source, comment")
    config.add_argument("names", nargs="*", metavar="PRESET|SECTION", help="a preset or YAML file (the defaults), then "
                        "a section (all)")  # fmt: skip
    commands.add_parser("doctor", help="what was built, what is missing, a kernel's self-check, and what to do")
    commands.add_parser("info", help="what was built and what this machine offers")
    return parser


class ShowVersion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        try:
            print(f"ltood_fast {metadata.version('ltood_fast')}")
        except metadata.PackageNotFoundError:
            print("ltood_fast, not installed: a checkout that was built in place")
        parser.exit()


def add_train(train: Parser) -> None:
    train.add_argument("--images", type=some_path, help=OWN_IMAGES)
    train.add_argument("--ood", type=some_path, help="with --images: folder of OOD images, of which some are chosen")
    train.add_argument("--config", help="preset or YAML file; with --images, what the rules do not set (own_images)")
    train.add_argument("--recipe", help="method by name (simclr, stage1, ...), over the configuration")
    train.add_argument("--run-dir", type=some_path, required=True)
    train.add_argument("--resume", action="store_true", help=RESUME)
    train.epilog = KEYS
    train.listing = presets_and_recipes


def add_experiment(experiment: Parser) -> None:
    experiment.add_argument("name", help="which; --list names them")
    experiment.add_argument("--list", action=ListExperiments, nargs=0, help="name the experiments and end")
    experiment.add_argument("--config", required=True, help="preset or YAML file")
    experiment.add_argument(
        "--output", type=some_path, required=True, help="folder of the runs and of what comes of them"
    )
    experiment.add_argument("--seeds", type=parse_seeds, default="0,1,2", help="commas between them (0,1,2)")
    experiment.add_argument("--jobs", type=whole_number(1), default=2, help="runs at a time (2)")
    experiment.add_argument("--no-train", action="store_true", help="the table of the runs that are done")
    experiment.add_argument("--balanced-list", default="", help="simclr-balance: the balanced set, for data.id list")
    experiment.add_argument("--other-ood", default="", help="ood-relevance: another pool, as data.ood (letters)")
    experiment.add_argument("--other-root", default="", help="folder that its relative paths refer to")
    experiment.epilog = KEYS + " A run that is done is not trained again; a killed experiment goes on."


class Once(argparse.Action):
    """Stores a value; argparse's own action would let the last of several win."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        given = namespace.__dict__.setdefault("given", set())
        if self.dest in given:
            raise argparse.ArgumentError(self, f"must be given once, got it twice, the second time with {values}")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


def some_path(text: str) -> Path:
    """A path; the empty one, what an unset variable leaves, would be the working folder."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"must be a path, got {text!r}")
    return Path(text)


def whole_number(low: int, high: int = 10**9) -> Callable[[str], int]:
    def parse(text: str) -> int:
        allowed = f"an integer in [{low}, {high}]"
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {text!r}") from None
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {number}")
        return number

    return parse


def positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return number


class ListExperiments(argparse.Action):
    """Prints the experiments and ends, whatever else is missing, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from .experiments import list_experiments

        print(list_experiments())
        parser.exit()


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0,1,2`."""
    numbers = [part.strip() for part in text.split(",")]
    if not all(number.isdecimal() for number in numbers) or len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"must be distinct numbers with commas between them, got {text!r}")
    return tuple(map(int, numbers))


def parse_overrides(rest: Sequence[str]) -> dict[str, str]:
    """`--section.key value`, `--section.key=value`; of several values the last one counts, so scripts can add some."""
    overrides, items = {}, iter(rest)
    for item in items:
        if not item.startswith("--"):
            raise ValueError(f"argument must be --section.key value, got {item!r}")
        key, equals, value = item[2:].partition("=")
        if not equals:
            value = next(items, None)
        if value is None:
            raise ValueError(f"argument --{key} must have a value, got none")
        overrides[key] = value
    return overrides


def run_train(args: argparse.Namespace, overrides: dict[str, Any]) -> None:
    from .train.lock import run_lock
    from .train.ranks import launched_ranks
    from .train.recipes import recipe
    from .train.run import open_run, report_run, saved_progress, train_run
    from .train.take_away import take_away

    if args.recipe is not None:
        overrides = {**recipe(args.recipe), **overrides}
    if args.ood is not None and args.images is None:
        raise ValueError("argument --ood must come with --images, got it alone (--data.ood names the pool of a preset)")
    if args.images is not None:
        args.config, overrides = own_images(args, overrides)
    try:
        with run_lock(args.run_dir):
            config = open_run(args.run_dir, args.config, overrides, args.resume)
            session = train_run(config, args.run_dir)
            if session.rank == 0:
                print(report_run(session))
                if args.images is not None:
                    print(take_away(session))
    except KeyboardInterrupt as stop:
        if launched_ranks()[0] == 0:
            print(f"\nltood: {stopped(stop)}; {saved_progress(args.run_dir)}", file=sys.stderr)
        raise SystemExit(exit_code(stop)) from None


def own_images(args: argparse.Namespace, overrides: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """(config, overrides) of `ltood train --images`; a run that is resumed keeps what the rules gave it."""
    from .train.config import config_values
    from .train.own_images import PRESET, own_overrides
    from .train.ranks import launched_ranks

    saved, own = args.run_dir / "config.yaml", f"folder:{args.images.absolute()}"
    if args.resume and saved.is_file():
        before, pool = config_values(str(saved)), args.ood and f"folder:{args.ood.absolute()}"
        for option, key, given in (("--images", "data.id", own), ("--ood", "data.ood", pool)):
            if given is not None and before.get(key) != given:
                wanted = f"the folder of the run in {args.run_dir}, {before.get(key) or 'none'}"
                raise ValueError(f"argument {option} must be {wanted}, got {given}")
        return args.config, overrides
    if args.config is not None:
        overrides = {**config_values(args.config), **overrides}
    for key, option in (("data.id", "--images"), ("data.ood", "--ood")):
        if key in overrides:
            raise ValueError(f"{key} must be left out with --images, got {overrides[key]}: {option} names the folder")
    overrides, said = own_overrides(args.images, args.ood, overrides)
    if launched_ranks()[0] == 0:
        print(f"ltood: {said}", file=sys.stderr)
    return PRESET, overrides


def run_eval(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from .train.run import report_run, saved_config
    from .train.session import Session

    session = Session.open(saved_config(args.run_dir, overrides), args.run_dir)
    if session.rank == 0:
        print(report_run(session))


def run_report(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from .eval.runs import find_runs, format_markdown, mixed_settings, summarize, write_table

    if not args.runs.is_dir():
        raise ValueError(f"report: runs must be an existing folder, got {args.runs}")
    if args.output:
        check_output(args.output)
    runs = find_runs(args.runs)
    rows = summarize(runs)
    if args.output:
        write_table(args.output, rows)
    print(format_markdown(rows))
    for variant, keys in mixed_settings(runs).items():
        warnings.warn(f"report: runs of {variant} are no repetitions, they differ in {', '.join(keys)}", stacklevel=1)


def run_embed(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from .train.export import last_checkpoint
    from .train.run import embed_set
    from .train.take_away import write_csv

    check_output(args.output)
    if args.output.suffix != ".npy":
        raise ValueError(f"embed: output must end in .npy, got {args.output}")
    one_of(args, "checkpoint", "run_dir")
    one_of(args, "images", "data")
    checkpoint = args.checkpoint or last_checkpoint(args.run_dir, op="embed")
    spec = args.data or f"folder:{args.images.absolute()}"
    embedded = embed_set(checkpoint, spec, overrides, projection=args.projection)
    save_array(args.output, embedded.features)
    print(f"{args.output}: {embedded.features.shape[0]} rows of {embedded.features.shape[1]} features")
    if embedded.files:
        table = args.output.with_suffix(".csv")
        write_csv(table, ("row", "file"), list(enumerate(embedded.files)))
        print(f"{table}: the file of each row")


def one_of(args: argparse.Namespace, *names: str) -> None:
    """Exactly one of the options is given."""
    options = [f"--{name.replace('_', '-')}" for name in names]
    given = [option for option, name in zip(options, names, strict=True) if getattr(args, name) is not None]
    if len(given) != 1:
        raise ValueError(f"argument must be one of {', '.join(options)}, got {' and '.join(given) or 'none'}")


def run_export(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from .train.export import export_network, last_checkpoint

    folder = export_network(last_checkpoint(args.run_dir, args.stage), args.format, args.output)
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def run_config(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from .train.describe import describe, format_keys, sections

    names = list(args.names)
    section = names.pop() if names and names[-1] in sections() else None
    if len(names) > 1 and section is None:
        section = names.pop()
    if len(names) > 1:
        raise ValueError(f"config: names must be at most a preset and a section, got {' '.join(args.names)}")
    print(format_keys(describe(names[0] if names else None, section)))


def run_doctor(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from .doctor import examine

    found = examine()
    print(found)
    if not found.healthy:
        raise SystemExit(1)


def run_sample_ood(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    import numpy as np
    import torch

    from .sampling.resample import Budget, choose_ood, cluster_embeddings

    check_output(args.output)
    for option in ("candidates", "id"):
        if args.output.exists() and args.output.samefile(getattr(args, option)):
            raise ValueError(f"sample-ood: --output must be another file than --{option}, got {args.output} for both")
    candidates, ids = load_embeddings(args.candidates), load_embeddings(args.id)
    check_sample(args, candidates.shape, ids.shape)
    id_embeddings = torch.from_numpy(np.ascontiguousarray(ids, dtype=np.float32))
    clusters = cluster_embeddings(id_embeddings, args.clusters, seed=args.seed)
    sample = choose_ood(
        id_embeddings,
        candidates,
        clusters,
        Budget(args.budget, args.temperature, args.strategy, args.seed),
        tailness_k=args.tailness_k,
    )
    save_array(args.output, sample.indices.numpy())
    if args.strategy == "tailness":
        print("cluster  images  tailness  taken")
        for c in range(args.clusters):
            size, taken = int((clusters.assignments == c).sum()), int((sample.index_clusters == c).sum())
            print(f"{c:7d}  {size:6d}  {float(sample.tailness[c]):8.4f}  {taken:5d}")
    print(f"{args.output}: {len(sample.indices)} of {len(candidates)} rows")


def run_experiments(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from .experiments import Setting, run_experiment

    sets = (args.balanced_list, args.other_ood, args.other_root)
    setting = Setting(args.config, args.output, args.seeds, args.jobs, overrides, *sets)
    try:
        print(run_experiment(args.name, setting, train=not args.no_train))
    except KeyboardInterrupt as stop:
        print(f"\nltood: {stopped(stop)}; the same command goes on with the experiment", file=sys.stderr)
        raise SystemExit(exit_code(stop)) from None


def run_info(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from . import build_info

    info = build_info()
    kernels = info.pop("kernels")
    for key, value in info.items():
        print(f"{key:14} {', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}")
    print("\nfunction            cpu        cuda")
    for function, by_device in kernels.items():
        print(f"{function:19} {by_device['cpu']:10} {by_device['cuda']}")


def check_sample(args: argparse.Namespace, pool: tuple[int, int], ids: tuple[int, int]) -> None:
    """The options of sample-ood against the shapes of its two files."""

    def require(condition: bool, option: str, allowed: str, got: object) -> None:
        if not condition:
            raise ValueError(f"sample-ood: --{option} must be {allowed}, got {got}")

    n, width = ids
    require(n > 0, "id", "embeddings of at least one image", "none")
    allowed = f"embeddings of {width} features, as those of --id"
    require(pool[1] == width, "candidates", allowed, pool[1])
    require(args.budget <= pool[0], "budget", f"at most the {pool[0]} rows of --candidates", args.budget)
    require(args.clusters <= n, "clusters", f"at most the {n} rows of --id", args.clusters)


def load_embeddings(path: Path):
    """float [N, F] of a .npy file, mapped into memory; a write into the array, which torch fears, changes no file."""
    import numpy as np

    if path.exists() and not path.is_file():  # a pipe would be waited for, and cannot be mapped
        raise ValueError(f"sample-ood: {path} must be a .npy array, got {'a folder' if path.is_dir() else 'no file'}")
    try:
        array = np.load(path, allow_pickle=False, mmap_mode="c")
    except FileNotFoundError:
        raise
    except Exception as error:  # the header is a Python literal, an archive a zip: damaged, they can raise anything
        raise ValueError(f"sample-ood: {path} must be a .npy array, got something else ({one_line(error)})") from error
    if getattr(array, "ndim", 0) != 2 or array.dtype not in (np.float16, np.float32, np.float64):
        got = f"{array.dtype} {array.shape}" if hasattr(array, "dtype") else "an archive"
        allowed = (
            " (float16, float32 or float64 of this machine's byte order)" if got.lstrip("<>").startswith("f") else ""
        )
        raise ValueError(f"sample-ood: {path} must hold a float matrix [N, F], got {got}{allowed}")
    return array


def check_output(path: Path) -> None:
    """Before the work rather than after it."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        got = "a folder" if path.is_dir() else "one in a folder that does not exist"
        raise ValueError(f"output must be a file in an existing folder, got {got}: {path}")


def save_array(path: Path, array) -> None:
    import numpy as np

    from ._files import write_atomic

    write_atomic(path, lambda file: np.save(file, array))


COMMANDS = {
    "train": run_train,
    "eval": run_eval,
    "report": run_report,
    "embed": run_embed,
    "export": run_export,
    "sample-ood": run_sample_ood,
    "experiment": run_experiments,
    "config": run_config,
    "doctor": run_doctor,
    "info": run_info,
}


TAKE_KEYS = ("train", "eval", "embed", "experiment")  # commands with --section.key value


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in argv
    try:
        args, rest = build_parser().parse_known_args([text for text in argv if text != "--traceback"])
        if rest and args.command not in TAKE_KEYS:
            raise ValueError(f"argument {rest[0]} is unknown to ltood {args.command} (ltood {args.command} --help)")
        overrides = parse_overrides(rest)
        with sigterm_raises(), warnings.catch_warnings():
            warnings.showwarning = show_warning
            COMMANDS[args.command](args, overrides)
    except BrokenPipeError:  # `ltood info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as stop:
        print(f"\nltood: {stopped(stop)}; an output file that was there before is as it was", file=sys.stderr)
        return exit_code(stop)
    except Exception as error:
        if show_traceback:
            traceback.print_exc()
        print(f"ltood: error: {sentence(error, argv)}", file=sys.stderr)
        return EXIT_ERROR
    return 0


def stopped(stop: KeyboardInterrupt) -> str:
    return "terminated" if isinstance(stop, Terminated) else "interrupted"


def exit_code(stop: KeyboardInterrupt) -> int:
    return EXIT_TERMINATED if isinstance(stop, Terminated) else EXIT_INTERRUPTED


def sentence(error: Exception, argv: Sequence[str]) -> str:
    """One line for any error. An error that no check has put into words says with which command it came."""
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if missing not in ("", "torch"):  # without torch the list cannot be imported
        from .doctor import EXTRAS

        if missing in EXTRAS:
            extra = EXTRAS[missing][1]
            return f"{missing} is not installed; it comes with the extra [{extra}]: `pip install 'ltood_fast[{extra}]'`"
    if isinstance(error, USER_ERRORS):
        return one_line(error)
    command = shlex.join(["ltood", *argv])
    if isinstance(error, MemoryError):
        return f"out of memory ({one_line(error)}) in: {command}"
    return f"unexpected {type(error).__name__} ({one_line(error)}) in: {command} (--traceback shows where)"


def show_warning(message: Warning, *_: Any) -> None:
    """One line, without the place in the code that Python adds."""
    print(f"ltood: warning: {one_line(message)}", file=sys.stderr)


def one_line(error: BaseException) -> str:
    """The first line of an error, with the file that a failed system call names."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

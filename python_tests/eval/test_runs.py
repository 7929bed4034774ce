"""The table over runs: where runs are found, what repeats what, and mean ± sample standard deviation."""

import csv
import json
import statistics

import pytest

from ltood_fast.cli import main
from ltood_fast.eval import runs as module
from ltood_fast.eval.runs import Spread, find_runs, format_markdown, mixed_settings, read_report, spread, summarize

from .conftest import make_resampling, make_results, make_stage


def group(overall, **parts):
    return {"overall": overall, "many": 0.5, "medium": 0.25, "few": None, "std": 0.125, "per_class": [overall], **parts}


def write(folder, seed=0, config=None, **stages):
    """A report.json of stages of nothing but their overall accuracy, or of what is given."""
    folder.mkdir(parents=True)
    written = [
        {"name": name, "probe": group(value), "knn": None} if isinstance(value, float) else {"name": name, **value}
        for name, value in stages.items()
    ]
    data = {"schema": "ltood_fast.report", "schema_version": 1, "stages": written, "resamplings": [],
            "config": {"seed": seed, **(config or {})}}  # fmt: skip
    (folder / "report.json").write_text(json.dumps(data))


@pytest.fixture
def grid(tmp_path):
    """Two variants, three seeds and one."""
    for seed, overall in enumerate((0.5, 0.625, 0.75)):
        write(tmp_path / "runs" / "full" / f"seed{seed}", seed, stage2=overall)
    extra = {"probe": group(0.25), "knn": group(0.375), "few_shot": group(0.125), "uniformity": -2.5, "alignment": 0.5,
             "clustering": {"nmi": 0.25, "ari": 0.125}}  # fmt: skip
    write(tmp_path / "runs" / "simclr" / "seed0", simclr=extra)
    return tmp_path


def test_table_by_hand(grid):
    assert format_markdown(summarize(find_runs(grid))).splitlines() == [
        "| run | stage | n | overall | Many | Medium | std | kNN | few-shot | NMI | ARI | uniformity | alignment |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| full | Stage 2 | 3 | 62.50 ± 12.50 | 50.00 ± 0.00 | 25.00 ± 0.00 | 12.50 ± 0.00 | - | - | - | - | - | - |",
        "| simclr | SimCLR | 1 | 25.00 | 50.00 | 25.00 | 12.50 | 37.50 | 12.50 | 0.250 | 0.125 | -2.500 | 0.500 |",
    ]


def test_a_run_says_its_variant_seed_and_numbers(grid):
    found = find_runs(grid)
    assert [(run.variant, run.seed, run.stages) for run in found] == [
        ("full", 0, ["stage2"]), ("full", 1, ["stage2"]), ("full", 2, ["stage2"]), ("simclr", 0, ["simclr"])
    ]  # fmt: skip
    assert found[1].folder == grid / "runs" / "full" / "seed1"
    assert found[1].measures()["overall"] == found[1].measures("stage2")["overall"] == 0.625
    assert found[1].measures()["few"] is None
    assert found[1].measures()["knn"] is None
    with pytest.raises(ValueError, match=r"^runs: stage must be one of stage2 in .*seed1, got stage1$"):
        found[1].measures("stage1")


def test_spread_is_the_sample_standard_deviation():
    values = [0.1, 0.4, 0.3, 0.9]
    assert spread(values) == Spread(statistics.fmean(values), statistics.stdev(values), 4)
    assert spread([0.5, 1.0]).std == pytest.approx(0.5 / 2**0.5)  # n - 1, not n: 0.25
    assert spread([None, 0.5, float("nan")]) == Spread(0.5, None, 1)
    assert spread([None]) is None


def test_a_value_that_not_every_repetition_knows_says_so(tmp_path):
    for seed, knn in enumerate((None, group(0.5), group(0.75))):
        write(tmp_path / f"seed{seed}", seed, simclr={"probe": group(0.5), "knn": knn})
    row = format_markdown(summarize(find_runs(tmp_path))).splitlines()[2]
    assert row.endswith("| 62.50 ± 17.68 (n = 2) |")
    assert row.startswith(f"| {tmp_path.name} | SimCLR | 3 |")


@pytest.mark.parametrize(
    ("folders", "variants"),
    [
        (["a/seed0", "a/seed1", "b/seed0"], ["a", "a", "b"]),
        (["x/runs/a/split1/seed0", "x/runs/a/split2/seed0", "x/runs/b"], ["a", "a", "b"]),
        (["one/a/seed0", "two/a/seed0"], ["one/a", "two/a"]),
        (["x/demo"], ["demo"]),
        (["x/a/seed2", "x/a/seed10", "x/a/seedling"], ["a", "a", "a/seedling"]),
    ],
)
def test_what_repeats_what(folders, variants, tmp_path):
    for folder in folders:
        write(tmp_path / folder, simclr=0.5)
    found = find_runs(tmp_path)
    assert [run.variant for run in found] == variants
    assert [str(run.folder.relative_to(tmp_path)) for run in found] == folders  # seed2 before seed10


def test_stages_of_a_run_are_rows_of_their_own(tmp_path):
    for seed in (0, 1):
        write(tmp_path / f"seed{seed}", seed, simclr=0.25, stage1=0.5 + 0.25 * seed)
    rows = summarize(find_runs(tmp_path))
    assert [(row.stage, row.measures["overall"].mean, row.measures["overall"].n) for row in rows] == [
        ("simclr", 0.25, 2), ("stage1", 0.625, 2)
    ]  # fmt: skip


def test_repetitions_that_are_none_are_named(tmp_path, capsys):
    same = {"data": {"split": "x.npy", "id_list": "x.txt"}, "run": {"device": "cuda"}, "stage1": {"alpha": 0.3}}
    other = {"data": {"split": "y.npy", "id_list": "y.txt"}, "run": {"device": "cpu"}, "stage1": {"alpha": 0.1, "k": 1}}
    for seed, config in enumerate((same, {**other, "stage1": same["stage1"]})):
        write(tmp_path / "a" / f"seed{seed}", seed, config, simclr=0.5)
    write(tmp_path / "b" / "seed0", 0, same, simclr=0.5)
    write(tmp_path / "b" / "seed1", 1, other, simclr=0.5)
    assert mixed_settings(find_runs(tmp_path)) == {"b": ["stage1.alpha"]}
    assert main(["report", str(tmp_path)]) == 0
    expected = "ltood: warning: report: runs of b are no repetitions, they differ in stage1.alpha\n"
    assert capsys.readouterr().err == expected


def test_the_command_prints_the_table_and_writes_it(grid, capsys):
    for name in ("x.md", "x.json", "x.csv"):
        assert main(["report", str(grid), "--output", str(grid / name)]) == 0
    table = capsys.readouterr().out
    assert (grid / "x.md").read_text() * 3 == table

    data = json.loads((grid / "x.json").read_text())
    assert (data["schema"], data["schema_version"]) == ("ltood_fast.runs", 1)
    first = data["rows"][0]
    assert (first["run"], first["stage"], first["n"], first["seeds"]) == ("full", "stage2", 3, [0, 1, 2])
    assert first["measures"]["overall"] == {"mean": 0.625, "std": 0.125, "n": 3}
    assert first["measures"]["knn"] is None

    with open(grid / "x.csv", newline="") as file:
        full, simclr = csv.DictReader(file)
    assert (full["overall_mean"], full["overall_std"], full["knn_mean"]) == ("0.625", "0.125", "")
    assert (simclr["run"], simclr["n"], simclr["overall_std"], simclr["nmi_mean"]) == ("simclr", "1", "", "0.25")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["empty"], "runs: folder must hold a report.json at some depth, got none below"),
        (["."], "read_report: path must be a report.json of ltood_fast.report, got"),
        (["grid", "--output", "x.html"], "report: output must end in .md, .json, .csv, got x.html"),
        (["grid", "--stage1.alpha", "1"], "argument --stage1.alpha is unknown to ltood report"),
    ],
)
def test_what_cannot_be_a_table(argv, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "grid" / "seed0", simclr=0.5)
    (tmp_path / "report.json").write_text("{}")
    assert main(["report", *argv]) == 2
    assert capsys.readouterr().err.startswith(f"ltood: error: {sentence}")


def test_table_of_real_reports(tmp_path):
    """What write_report wrote, here without its page, is what the table reads."""
    from ltood_fast.eval.report import format_table, report_data

    for seed, accuracy in enumerate((0.5, 0.75)):
        results = make_results(stages=[make_stage("simclr", [accuracy] * 10)], resamplings=[make_resampling()])
        (tmp_path / f"seed{seed}").mkdir()
        (tmp_path / f"seed{seed}" / "report.json").write_text(json.dumps(report_data(results, [])))
    assert read_report(tmp_path / "seed1" / "report.json")["name"] == "made-up"
    (row,) = summarize(find_runs(tmp_path))
    assert row.measures["overall"].mean == pytest.approx(0.63)  # of 50 images 25 and 38 are right
    assert row.measures["overall"].std == pytest.approx(0.26 / 2**0.5)
    cells = format_markdown(summarize(find_runs(tmp_path)[1:])).splitlines()[2].split(" | ")[3:]
    assert " ".join(cells).removesuffix(" |").split() == format_table(results).splitlines()[1].split()[1:]


def test_measures_have_each_one_place():
    places = [measure.place for measure in module.MEASURES]
    assert len(set(places)) == len(places)

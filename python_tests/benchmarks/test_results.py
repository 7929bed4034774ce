"""The JSON of a run, what is made of it, and the command line."""

import copy
import json
from functools import partial

import pytest

from benchmarks import compare, machine, plots, report, resampling, results_file, run, tables
from benchmarks.__main__ import main
from benchmarks.cases import FORWARD, Case


def row(name, kind, ms, n=1024, status="ok"):
    case = Case("nt_xent", n)
    made = {**case.labels(), "implementation": name, "kind": kind, "status": status, "checked_N": n}
    if status != "ok":
        return made | {"message": "ModuleNotFoundError: No module named 'lightly'"}
    made |= {f"{quantile}_ms": ms for quantile in ("median", "p10", "p90", "min")}
    made |= {"rounds": 5, "peak_mib": 10.0 * ms, "error": 1e-7, "floor_ms": 1.0, "floor_flop": 1e9, "floor_bytes": 1e6}
    return made | {"of_floor": 1 / ms, "vs_eager": 8 / ms, "vs_best_rival": 4 / ms}


@pytest.fixture
def result():
    rows = [
        row(name, kind, factor * n / 1024, n)
        for n in (1024, 2048, 4096)
        for name, kind, factor in (("eager", "baseline", 8.0), ("compile", "baseline", 4.0), ("ours", "ours", 2.0))
    ]
    step = {"network": "resnet18 32x32", "N": 512, "network_ms": 90.0, "op": "stage1_loss", "implementation": "ours"}
    sampled = {"recall": 0.98, "tailness_s": 0.1, "index_s": 2.0, "search_s": 0.1, "total_s": 2.2, "peak_mib": 100.0}
    return {
        "machine": {"device": "a processor", "threads": 2, "torch": "2.14", "driver": None},
        "commit": "0123456789abcdef",
        "changed": False,
        "date": "2026-01-01",
        "seed": 0,
        "settings": {},
        "rates": {"product_flop_per_s": 1e11, "copy_bytes_per_s": 1e10, "exp_per_s": 1e9},
        "implementations": {"ours": {"kind": "ours", "version": "1", "settings": "as it is", "tested_on": "cpu"}},
        "rows": [*rows, row("lightly", "rival", 0, status="missing")],
        "training": {
            "steps": [{**step, "status": "ok", "loss_ms": 10.0, "share": 0.1}],
            "largest": [
                {
                    "op": "nt_xent",
                    "implementation": "ours",
                    "limit_gib": 8,
                    "N": 9,
                    "peak_mib": 1.0,
                    "beyond": "no more",
                }
            ],
        },
        "resampling": {"setup": vars(resampling.QUICK), "rows": [{"method": "IVF", **sampled}]},
    }


@pytest.fixture
def file(result, tmp_path):
    results_file.write(tmp_path / "run.json", result)
    return tmp_path / "run.json"


def test_a_result_survives_its_file(result, file):
    read = results_file.read(file)
    assert read.pop("schema") == "ltood_fast.benchmarks"
    assert read.pop("version") == 1
    assert read == json.loads(json.dumps(result))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d.update(version=2), "version 2 of the schema, this code reads 1"),
        (lambda d: d.update(schema="other"), "not a result of"),
        (lambda d: d.pop("rates"), "lacks rates"),
        (lambda d: d["rows"][0].pop("dtype"), "lacks dtype in row 0"),
        (lambda d: d["rows"][0].pop("median_ms"), "lacks a time"),
    ],
)
def test_another_schema_is_refused_in_one_sentence(file, change, sentence):
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=sentence):
        results_file.read(file)


def test_the_command_line_refuses_what_is_no_result(tmp_path, capsys):
    (tmp_path / "x.json").write_text("{")
    assert main(["table", str(tmp_path / "x.json")]) == 2
    assert "is no JSON" in capsys.readouterr().err


def changed(result, **values):
    other = copy.deepcopy(result)
    other["rows"][2].update(values)
    return other


def test_the_same_run_has_no_regression(result):
    changes = compare.compare(result, result)
    assert len(changes) == 18
    assert not any(change.regressed for change in changes)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"median_ms": 2.3}, "time"),
        ({"peak_mib": 25.0}, "memory"),
        ({"status": "wrong", "message": "loss off"}, "status"),
        ({"implementation": "theirs"}, "gone"),
    ],
)
def test_regressions_are_flagged(result, values, what):
    flagged = [change for change in compare.compare(result, changed(result, **values)) if change.regressed]
    assert [(change.implementation, change.what) for change in flagged] == [("ours", what)]


def test_a_ratio_below_the_threshold_is_none(result):
    assert not any(c.regressed for c in compare.compare(result, changed(result, median_ms=2.3), time=1.2))
    assert not any(c.regressed for c in compare.compare(result, changed(result, median_ms=1.0)))


def test_a_case_that_was_left_out_is_listed_and_no_regression(result, file, tmp_path, capsys):
    left_out = copy.deepcopy(result)
    left_out["rows"] = [row for row in result["rows"] if row["case"] != result["rows"][0]["case"]]
    results_file.write(tmp_path / "part.json", left_out)
    assert main(["compare", str(file), str(tmp_path / "part.json")]) == 0
    printed = capsys.readouterr().out
    assert "not in the second run" in printed
    assert f"0 regressions in {2 * len(left_out['rows'])} comparisons" in printed


def test_compare_exits_with_one_on_a_regression(result, file, tmp_path, capsys):
    slow = tmp_path / "slow.json"
    results_file.write(slow, changed(result, median_ms=4.0))
    assert main(["compare", str(file), str(slow)]) == 1
    assert "REGRESSION" in capsys.readouterr().out
    assert main(["compare", str(slow), str(file)]) == 0


def test_another_machine_is_said(result):
    other = {**result, "machine": {**result["machine"], "device": "another"}}
    assert compare.different_machines(result, other) == "the runs differ in device a processor and another"
    assert compare.different_machines(result, result) is None


def test_tables_name_the_best_other_and_what_was_not_timed(result):
    summary = tables.summary(result)
    assert summary.lines[0][1:] == ["2.00 (20)", "2.00x", "50 %", "8.00 (80)", "compile 4.00 (40), eager 8.00 (80)"]
    assert tables.problems(result) == [
        "lightly, missing: ModuleNotFoundError: No module named 'lightly' (nt_xent N=1024 D=128)"
    ]
    text = tables.text(result, short=False)
    assert "98.0 %" in text
    assert "| 10 % |" in text


@pytest.mark.parametrize(("value", "shown"), [(0.01234, "0.012"), (1.2345, "1.23"), (1234.5, "1,234"), (None, "")])
def test_numbers(value, shown):
    assert tables.number(value) == shown


def test_pictures_and_page(file, capsys, tmp_path):
    assert main(["plot", str(file), "--output", str(tmp_path / "pictures")]) == 0
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == {
        "sizes.png", "ratios.png", "roofline.png", "training.png",
    }  # fmt: skip
    assert main(["report", str(file)]) == 0
    page = file.with_suffix(".html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "No module named &#39;lightly&#39;" in page
    assert '="http' not in page


def test_a_run_without_our_rows_still_has_a_page(result):
    result["rows"] = [r for r in result["rows"] if r["kind"] != "ours"]
    result.pop("training")
    names = [picture.name for picture in plots.draw(result)]
    assert names == ["sizes"]
    assert "–" in report.page(result)


def test_run_from_the_command_line(tmp_path, capsys, monkeypatch):
    threads = []
    monkeypatch.setattr(run, "_fixed_threads", threads.append)
    monkeypatch.setattr(run, "rates", partial(machine.rates, seconds=0.01))
    monkeypatch.setattr(
        run, "suite", lambda device, quick: [Case("knn", 500, k=3, temperature=None, direction=FORWARD)]
    )
    output = tmp_path / "out.json"
    options = ["--only", "knn", "--parts", "ops", "--seconds", "0.01", "--threads", "1", "--output", str(output)]
    assert main(["run", *options]) == 0
    assert threads == [1]
    read = results_file.read(output)
    assert {r["implementation"] for r in read["rows"]} >= {"eager", "ours", "faiss"}
    assert all(r["status"] in ("ok", "missing") for r in read["rows"])
    assert read["rates"]["product_flop_per_s"] > 1e9
    assert main(["run", "--only", "no such case"]) == 2
    assert "no such case" in capsys.readouterr().err


def test_ivf_finds_most_of_the_exact_sample(monkeypatch):
    pytest.importorskip("faiss")
    small = resampling.Setup(id_rows=500, candidates=3000, D=16, K=5, budget=1500, lists=16, probes=(1, 16))
    monkeypatch.setattr(resampling, "QUICK", small)
    exact, one, every = resampling.run(quick=True)["rows"]
    assert exact["recall"] == 1
    assert one["recall"] <= every["recall"]
    assert every["recall"] > 0.9
    chosen = resampling.by_ivf(resampling.make_data(small), small, 16, {})
    assert len(chosen) == len(chosen.unique()) == small.budget
    assert exact["total_s"] == pytest.approx(exact["tailness_s"] + exact["search_s"])

import json

import pytest
from made_up_runs import finish

from ltood_fast.experiments.command import run_experiment
from ltood_fast.experiments.grid import plan_runs
from ltood_fast.experiments.registry import EXPERIMENTS
from ltood_fast.experiments.rejudge import main, rejudge
from ltood_fast.experiments.spec import ExperimentError


@pytest.fixture
def written(setting):
    """The files of an experiment whose control gains and whose variants differ."""
    experiment = EXPERIMENTS["ood-sampling"]
    gain = {"control-oracle": 0.3, "tailness": 0.25, "none": -0.2}
    for run in plan_runs(setting, experiment.with_control(experiment.variants(setting))):
        level = 0.4 + gain.get(run.variant.name, 0.0) + 0.01 * run.seed
        finish(run, per_class=(level + 0.05, level, level - 0.1), test_images=10_000)
    run_experiment("ood-sampling", setting, train=False)
    return setting.output / "ood-sampling"


def test_results_are_judged_again_from_their_numbers(written):
    """Without a run: the same verdict, table and comparisons."""
    page, before = (written / "table.md").read_text(), json.loads((written / "results.json").read_text())
    assert before["verdict"]["decision"] == "held"
    assert before["control"]["decision"] == "held"
    summary = rejudge(written / "results.json")
    after = json.loads((written / "results.json").read_text())
    assert summary.verdict.decision == "held"
    assert after["comparisons"] == before["comparisons"]
    assert after["runs"] == before["runs"]
    assert (written / "table.md").read_text() == page


def test_what_was_decided_at_first_stays_known(written):
    path = written / "results.json"
    data = json.loads(path.read_text())
    data["comparisons"][0]["decision"] = "refuted"
    data["runs"] = [run for run in data["runs"] if not run["variant"].startswith("control")]
    path.write_text(json.dumps(data))
    for _ in range(2):
        assert main([str(written.parent)]) == 0
        table = (written.parent / "rejudged.md").read_text()
        row = next(line for line in table.splitlines() if "tailness − random | overall" in line)
        assert row.endswith("| refuted | held |")
        assert "concludes nothing, as its positive control" in (written / "table.md").read_text()


@pytest.mark.parametrize("argv", [[], ["nowhere"]])
def test_a_wrong_folder_is_one_sentence(argv, capsys):
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith("ltood: error: ")


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"schema": "other"}')
    with pytest.raises(ExperimentError, match=r"must be a results.json of ltood_fast.experiment, got 'other'"):
        rejudge(path)

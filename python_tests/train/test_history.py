"""Loggers, bars, and the page of a run that trains."""

import csv
import sys
import types

import pytest
import torch
from made_up import session, train

from ltood_fast import _progress
from ltood_fast._progress import progress_bar, progress_shown
from ltood_fast.train import history, live
from ltood_fast.train.checks import check_run
from ltood_fast.train.config import ConfigError, load_config
from ltood_fast.train.history import History, read_history
from ltood_fast.train.loop import Stage
from ltood_fast.train.ranks import TrainingError
from ltood_fast.train.session import embed


def test_csv_has_every_epoch_after_a_resume(tmp_path):
    run = session(tmp_path, run__loggers="csv,tensorboard", simclr__epochs=3)
    opened = History(run, "simclr", 0)
    for epoch in range(3):
        opened.add({"epoch": epoch, "loss": 3.0 - epoch, "parts": {"psd": 1.0}, "lr": None})
    opened = History(run, "simclr", 2)  # as if killed after two epochs
    opened.add({"epoch": 2, "loss": 0.5, "parts": {}, "lr": 0.1})
    opened.close()
    with open(tmp_path / "csv" / "simclr" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["loss"], row["psd"], row["lr"]) for row in rows] == [
        ("0", "3.0", "1.0", ""), ("1", "2.0", "1.0", ""), ("2", "0.5", "", "0.1"),
    ]  # fmt: skip
    assert list((tmp_path / "tensorboard" / "simclr").glob("events.*"))
    assert [line["loss"] for line in read_history(tmp_path / "simclr" / "history.jsonl")] == [3.0, 2.0, 0.5]


def test_no_logger_is_a_choice(tmp_path):
    train(session(tmp_path, run__loggers="none", simclr__epochs=1), "simclr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["simclr", "stage1", "stage2"]


@pytest.mark.parametrize(("name", "kind"), [("wandb", "WandbLogger"), ("mlflow", "MLFlowLogger")])
def test_loggers_of_other_packages_get_the_values(name, kind, tmp_path, monkeypatch):
    seen = []

    class Logger:
        def __init__(self, *arguments, **options):
            seen.append(("opened", options.get("name") or arguments[1]))

        def log_metrics(self, values, step):
            seen.append((step, values))

        def save(self):
            pass

        def finalize(self, status):
            seen.append(status)

        experiment = types.SimpleNamespace(finish=lambda: seen.append("finished"))

    loggers = types.ModuleType("pytorch_lightning.loggers")
    setattr(loggers, kind, Logger)
    for module in (types.ModuleType(name), types.ModuleType("pytorch_lightning"), loggers):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    opened = History(session(tmp_path, run__loggers=name), "simclr", 0)
    opened.add({"epoch": 0, "loss": 2.0, "parts": {"psd": 1.0}, "lr": None})
    opened.close()
    assert seen == [
        ("opened", f"{tmp_path.name}-simclr"),
        (0, {"loss": 2.0, "psd": 1.0}),
        "success",
        *["finished"] * (name == "wandb"),
    ]


def test_a_logger_that_fails_ends_no_run(tmp_path, monkeypatch):
    from lightning_fabric.loggers import CSVLogger

    def gone(self, *_, **__):
        raise ConnectionError("server is gone\nmore")

    monkeypatch.setattr(CSVLogger, "log_metrics", gone)
    with pytest.warns(
        UserWarning, match="run.loggers csv failed at epoch 0 .server is gone more. and is left out"
    ) as said:
        train(session(tmp_path, run__loggers="csv", simclr__epochs=2), "simclr")
    assert len([warning for warning in said if "run.loggers" in str(warning.message)]) == 1
    assert len(read_history(tmp_path / "simclr" / "history.jsonl")) == 2


def test_a_logger_that_does_not_close_ends_no_run(tmp_path, monkeypatch):
    from lightning_fabric.loggers import CSVLogger

    def gone(self, status):
        raise ConnectionError("server is gone")

    monkeypatch.setattr(CSVLogger, "finalize", gone)
    with pytest.warns(UserWarning, match="run.loggers csv could not be closed .server is gone.; history.jsonl has"):
        train(session(tmp_path, run__loggers="csv", simclr__epochs=1), "simclr")


def test_a_logger_that_does_not_open_is_named(tmp_path, monkeypatch):
    def refuses(*_):
        raise LookupError("no such project")

    monkeypatch.setitem(history.LOGGERS, "wandb", refuses)
    with pytest.raises(TrainingError, match="run.loggers must be loggers that open here, got wandb .no such project"):
        History(session(tmp_path, run__loggers="wandb"), "simclr", 0)


def test_a_missing_logger_is_named_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"train: run.loggers wandb needs wandb, .* its extra \[loggers\]"):
        check_run(session(tmp_path, run__loggers="wandb"))


@pytest.mark.parametrize("loggers", ["", "tensorboad", "csv,csv", "csv,none"])
def test_wrong_loggers_are_one_sentence(loggers):
    with pytest.raises(ConfigError, match="config: run.loggers must be "):
        load_config("smoke", {"run.loggers": loggers})


# ---- the page of a run that trains


def test_the_page_shows_the_run_while_it_trains(tmp_path, monkeypatch):
    pages = []
    monkeypatch.setattr(live, "write_atomic", lambda path, page: pages.append((path, page.decode())))
    clock = iter(range(0, 10_000, 40))
    monkeypatch.setattr(live.time, "monotonic", lambda: float(next(clock)))
    train(session(tmp_path, run__report_every=60, simclr__epochs=4), "simclr")
    assert len(pages) in (1, 2)  # not after each of four epochs, 40 to 80 seconds apart
    path, page = pages[0]
    assert path == tmp_path / "report.html"
    assert 'http-equiv="refresh" content="60"' in page
    assert "SimCLR: epoch 2 of 4, about 1 min left in this stage" in page
    assert "data:image/png;base64," in page


def test_no_page_is_a_choice(tmp_path, monkeypatch):
    monkeypatch.setattr(live.time, "monotonic", iter(range(0, 10**9, 10**6)).__next__)
    train(session(tmp_path, run__report_every=0, simclr__epochs=2), "simclr")
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch):
    def full(path, page):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(live, "write_atomic", full)
    monkeypatch.setattr(live.time, "monotonic", iter(range(0, 10**9, 10**6)).__next__)
    with pytest.warns(UserWarning, match="report.html cannot be written while training .No space left"):
        stage = train(session(tmp_path, simclr__epochs=2), "simclr")
    assert stage.finished


# ---- bars


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(_progress, "DELAY", 0.0)


def test_bars_obey_the_run(at_once, capsys):
    for shown in (True, False):
        with progress_shown(shown), progress_bar(10, "decode photos") as bar:
            bar.update(10)
        assert ("decode photos" in capsys.readouterr().err) == shown


@pytest.mark.parametrize("shown", ["true", "false"])
def test_a_re_sampling_shows_how_far_it_is(shown, tmp_path, at_once, capsys):
    run = session(tmp_path, run__progress=shown)
    model = run.new_model()
    run.embed(model, run.data.ood.images)
    assert ("embed" in capsys.readouterr().err) == (shown == "true")


def test_features_are_those_of_batches(tmp_path, monkeypatch):
    run = session(tmp_path)
    model, images = run.new_model().eval(), run.data.ood.images
    monkeypatch.setattr("ltood_fast.train.session.EMBED_BATCH", 7)
    features, z = embed(model, images, run.fabric, run.transform)
    with torch.no_grad():
        torch.testing.assert_close(features, model.embed(run.transform(images)))
    assert len(z) == len(images)
    assert Stage.open("simclr", run).epoch == 0

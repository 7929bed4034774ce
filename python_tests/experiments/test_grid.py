import fcntl
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import yaml
from made_up_runs import finish

from ltood_fast.experiments import grid
from ltood_fast.experiments.grid import collect, plan_runs, train_grid
from ltood_fast.experiments.spec import ExperimentError, Variant
from ltood_fast.experiments.variants import FULL, NO_DISTILLATION, NO_DOMAIN, RANDOM, SIMCLR, TAILNESS
from ltood_fast.train.config import ConfigError, load_config


def names(runs):
    return [run.name for run in runs]


def test_guides_come_before_those_they_guide(setting):
    runs = plan_runs(setting, [FULL, TAILNESS])
    assert names(runs) == ["tailness/seed0", "full/seed0", "tailness/seed1", "full/seed1"]
    guide = setting.output.resolve() / "runs/tailness/seed1/stage1/last.pt"
    assert runs[3].config.stage2.guide == str(guide)
    assert runs[3].config.stages == ("stage2",)
    assert runs[3].config.seed == 1


def test_a_variant_is_the_preset_the_users_options_and_its_own(setting):
    setting = replace(setting, overrides={"stage1.budget": "30", "stage1.alpha": "0.9"})
    config = plan_runs(setting, [NO_DOMAIN])[0].config
    expected = {"stage1.budget": "30", "stage1.alpha": "0", "stages": "stage1", "run.progress": "false"}
    assert config == load_config("smoke", expected)


def test_the_command_is_the_run(setting, monkeypatch):
    """`ltood train` itself reads back the configuration that the grid planned."""
    from ltood_fast import cli

    setting = replace(setting, overrides={"data.id_list": "", "stage1.budget": "30"})
    run = plan_runs(setting, [FULL])[1]
    seen = []
    monkeypatch.setitem(cli.COMMANDS, "train", lambda args, overrides: seen.append((args, overrides)))
    command = grid._command(setting, run)
    assert command[1:3] == ["-m", "ltood_fast"]
    assert cli.main(command[3:]) == 0
    [(args, overrides)] = seen
    assert args.resume
    assert args.run_dir == run.run_dir
    assert load_config(args.config, overrides) == run.config


@pytest.mark.parametrize("key", ["seed", "stages", "stage2.guide"])
def test_what_the_grid_sets_cannot_be_set(setting, key):
    with pytest.raises(ExperimentError, match=f"{key} must be left to the experiment, got 'simclr'"):
        plan_runs(replace(setting, overrides={key: "simclr"}), [SIMCLR])


def test_a_wrong_override_is_refused_before_anything_is_trained(setting):
    with pytest.raises(ConfigError, match=r"stage1\.budget must be at least 1"):
        plan_runs(replace(setting, overrides={"stage1.budget": "0"}), [SIMCLR])
    assert not setting.output.exists()


def test_everything_is_trained_once(setting, quick_training, capsys):
    started, _ = quick_training
    first = train_grid(setting, plan_runs(setting, [TAILNESS, FULL]))
    assert sorted(started()) == ["full/seed0", "full/seed1", "tailness/seed0", "tailness/seed1"]
    assert all(started().index(f"tailness/seed{k}") < started().index(f"full/seed{k}") for k in (0, 1))
    assert not first.failures
    assert "[4/4]" in capsys.readouterr().err

    shared = train_grid(setting, plan_runs(setting, [TAILNESS, NO_DISTILLATION]))  # another experiment
    assert started()[4:] == ["no-distillation/seed0", "no-distillation/seed1"]
    assert shared.reports["tailness", 1] == first.reports["tailness", 1]


def test_a_student_waits_for_its_guide(setting, quick_training, monkeypatch):
    there, real = {}, grid._Job.start.__func__

    def start(cls, setting, run):
        there[run.name] = (setting.output / "runs/tailness" / f"seed{run.seed}" / "report.json").exists()
        return real(cls, setting, run)

    monkeypatch.setattr(grid._Job, "start", classmethod(start))
    setting = replace(setting, jobs=4)
    train_grid(setting, plan_runs(setting, [TAILNESS, FULL]))
    assert there == {"tailness/seed0": False, "tailness/seed1": False, "full/seed0": True, "full/seed1": True}


def test_a_run_that_was_killed_goes_on(setting, quick_training):
    started, _ = quick_training
    runs = plan_runs(setting, [SIMCLR])
    finish(runs[0])
    finish(runs[1])
    (runs[1].run_dir / "report.json").unlink()  # killed before its evaluation
    assert names(runs[1:]) == ["simclr/seed1"]
    assert collect(runs).failures == {("simclr", 1): "not trained"}
    assert train_grid(setting, runs).failures == {}
    assert started() == ["simclr/seed1"]


def test_younger_keys_have_their_default_and_the_place_is_free(setting, quick_training):
    started, _ = quick_training
    runs = plan_runs(replace(setting, seeds=(0,)), [TAILNESS])
    finish(runs[0])
    saved = runs[0].run_dir / "config.yaml"
    values = yaml.safe_load(saved.read_text())
    del values["stage1"]["alpha"], values["stage2"]["guide"]
    values["run"] |= {"threads": 3, "device": "cpu"}
    saved.write_text(yaml.safe_dump(values))
    assert train_grid(setting, runs).reports.keys() == {("tailness", 0)}
    assert started() == []


def test_another_configuration_under_the_name_is_refused(setting, quick_training):
    started, _ = quick_training
    finish(plan_runs(replace(setting, overrides={"stage1.alpha": "0.4", "optim.lr": "0.2"}), [TAILNESS])[0])
    with pytest.raises(ExperimentError) as refused:
        plan_runs(setting, [SIMCLR, TAILNESS])
    message = str(refused.value)
    assert str(setting.output / "runs/tailness/seed0") in message
    assert "differs in optim.lr, stage1.alpha" in message
    assert started() == []


def test_another_guide_is_refused_and_a_moved_folder_is_not(setting, tmp_path):
    run = plan_runs(setting, [FULL])[0]
    finish(run)
    setting.output.rename(tmp_path / "moved")
    moved = replace(setting, output=tmp_path / "moved")
    assert collect(plan_runs(moved, [FULL])).reports.keys() == {("full", 0)}
    with pytest.raises(ExperimentError, match=r"differs in stage2\.guide"):
        plan_runs(moved, [replace(FULL, guide="random")])


def test_another_evaluation_is_done_again(setting, quick_training):
    started, _ = quick_training
    finish(plan_runs(setting, [SIMCLR])[0])
    other = replace(setting, seeds=(0,), overrides={"eval.knn_k": "7"})
    train_grid(other, plan_runs(other, [SIMCLR]))
    assert started() == ["simclr/seed0"]


def test_a_report_of_another_stage_is_not_the_runs(setting):
    runs = plan_runs(replace(setting, seeds=(0,)), [TAILNESS])
    finish(runs[0], stages=["simclr"])
    assert collect(runs).reports == {}


def test_a_failed_run_is_named_and_the_others_go_on(setting, quick_training, capsys):
    started, failing = quick_training
    failing["tailness/seed0"] = "train: loss must be finite, got nan"
    result = train_grid(setting, plan_runs(setting, [TAILNESS, FULL, RANDOM]))
    assert result.reports.keys() == {("tailness", 1), ("full", 1), ("random", 0), ("random", 1)}
    log = setting.output / "runs/tailness/seed0.log"
    assert result.failures["tailness", 0] == f"train: loss must be finite, got nan, see {log}"
    assert result.failures["full", 0] == "its guide tailness/seed0 failed"
    assert "full/seed0" not in started()
    assert "tailness/seed0 failed: train: loss must be finite" in capsys.readouterr().err

    failing.clear()
    assert train_grid(setting, plan_runs(setting, [TAILNESS, FULL, RANDOM])).failures == {}
    assert sorted(started()[5:]) == ["full/seed0", "tailness/seed0"]


def test_a_killed_run_says_so(setting, quick_training, monkeypatch):
    code = "import os; os.kill(os.getpid(), 9)"
    monkeypatch.setattr(grid, "_command", lambda setting, run: [sys.executable, "-S", "-c", code])
    result = train_grid(setting, plan_runs(replace(setting, seeds=(0,)), [SIMCLR]))
    assert result.failures["simclr", 0].startswith("ended by signal 9, see ")


def test_as_many_at_a_time_as_asked(setting, quick_training, monkeypatch):
    alive, most = set(), []
    real = grid._Job.start.__func__

    def start(cls, setting, run):
        job = real(cls, setting, run)
        alive.add(job.process.pid)
        most.append(len(alive))
        return job

    def end(self):
        alive.discard(self.process.pid)
        return real_end(self)

    real_end = grid._Job.end
    monkeypatch.setattr(grid._Job, "start", classmethod(start))
    monkeypatch.setattr(grid._Job, "end", end)
    setting = replace(setting, seeds=(0, 1, 2), jobs=2)
    train_grid(setting, plan_runs(setting, [SIMCLR, TAILNESS]))
    assert max(most) == 2
    assert len(most) == 6


def test_a_run_that_another_process_trains_is_waited_for(setting, quick_training, capsys):
    """Such as the training that a killed grid left behind."""
    started, _ = quick_training
    [run] = plan_runs(replace(setting, seeds=(0,)), [SIMCLR])
    run.run_dir.mkdir(parents=True)
    lock = open(run.run_dir.with_name(".seed0.lock"), "wb")  # noqa: SIM115  closed by the other one
    fcntl.flock(lock, fcntl.LOCK_EX)

    def other_process():
        finish(run)
        lock.close()

    threading.Timer(0.3, other_process).start()
    assert train_grid(setting, [run]).failures == {}
    assert started() == []
    assert "simclr/seed0: another process trains it, waiting" in capsys.readouterr().err


def test_the_lock_outlives_a_killed_grid(setting, monkeypatch):
    [run] = plan_runs(replace(setting, seeds=(0,)), [SIMCLR])
    wait = [sys.executable, "-S", "-c", "import sys; sys.stdin.close(); import time; time.sleep(60)"]
    monkeypatch.setattr(grid, "_command", lambda setting, run: wait)
    job = grid._Job.start(setting, run)
    job.lock.close()  # as if this process were gone
    try:
        assert grid._Job.start(setting, run) is None
    finally:
        job.process.kill()
        job.process.wait()
    again = grid._Job.start(setting, run)
    again.process.kill()
    again.end()


def test_training_ends_with_the_grid(setting, monkeypatch):
    processes = []

    def command(setting, run):
        return [sys.executable, "-S", "-c", "import time; time.sleep(60)"]

    def interrupted(seconds):
        raise KeyboardInterrupt

    real = subprocess.Popen
    monkeypatch.setattr(grid, "_command", command)
    monkeypatch.setattr(grid.subprocess, "Popen", lambda *a, **k: processes.append(real(*a, **k)) or processes[-1])
    monkeypatch.setattr(grid.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_grid(setting, plan_runs(setting, [SIMCLR]))
    assert [process.returncode for process in processes] == [-15, -15]


def test_cores_are_shared_out_unless_the_user_has(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert grid._environment(2)["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert grid._environment(2)["OMP_NUM_THREADS"] == "3"


def test_unknown_overrides_of_a_variant_are_a_sentence(setting):
    with pytest.raises(ConfigError, match="key must be a known one, got 'stage1.nothing'"):
        plan_runs(setting, [Variant("strange", {"stage1.nothing": "1"})])


TRUNK, BRANCH = Variant("trunk", stages=("simclr",)), Variant("branch", stages=("stage1",), trunk="trunk")


def test_branches_start_from_their_trunk(setting, quick_training, tmp_path):
    started, failing = quick_training
    runs = plan_runs(setting, [BRANCH, TRUNK])
    assert names(runs) == ["trunk/seed0", "branch/seed0", "trunk/seed1", "branch/seed1"]
    path = setting.output.resolve() / "runs/trunk/seed1/simclr/last.pt"
    assert runs[3].config.stage1.init_from == str(path)
    failing["trunk/seed0"] = "train: loss must be finite, got nan"
    result = train_grid(setting, runs)
    assert result.failures["branch", 0] == "its trunk trunk/seed0 failed"
    assert result.reports.keys() == {("trunk", 1), ("branch", 1)}
    setting.output.rename(tmp_path / "moved")
    moved = replace(setting, output=tmp_path / "moved")
    assert ("branch", 1) in collect(plan_runs(moved, [BRANCH, TRUNK])).reports
    with pytest.raises(ExperimentError, match=r"differs in stage1\.init_from"):
        plan_runs(moved, [replace(BRANCH, trunk="other")])

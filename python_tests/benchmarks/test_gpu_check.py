"""The steps for a machine with a GPU, without one: they go on after failures and hangs and keep what they know."""

import json

import pytest

from benchmarks import gpu_check
from benchmarks.__main__ import main
from benchmarks.gpu_check import Command


def test_a_step_goes_on_after_a_failure_and_a_hang(tmp_path):
    plan = [
        Command("wrong", "echo before; exit 3", 10),
        Command("hangs", "sleep 30", 1),
        Command("right", "echo path $LTOOD_CUDA_PATH in {results}", 10, "sm90"),
    ]
    outcomes = gpu_check.run_step(4, plan, tmp_path / "results")
    assert [outcome.status for outcome in outcomes] == [3, 124, 0]
    assert outcomes[1].seconds < 10
    assert f"path sm90 in {tmp_path}" in outcomes[2].tail
    written = json.loads((tmp_path / "results/step-4.json").read_text())
    assert [command["status"] for command in written["commands"]] == [3, 124, 0]
    assert written["commands"][0]["tail"] == "before\n"
    assert "| hangs | timed out |" in gpu_check.table(outcomes)


def test_what_is_known_is_written_before_the_end(tmp_path):
    def execute(command, results):
        if command.name == "second":
            assert len(json.loads((results / "step-1.json").read_text())["commands"]) == 1
            raise KeyboardInterrupt
        return gpu_check.Outcome(command.name, command.line, 0, 0.0, "")

    with pytest.raises(KeyboardInterrupt):
        gpu_check.run_step(1, [Command("first", "", 1), Command("second", "", 1)], tmp_path, execute)
    assert len(json.loads((tmp_path / "step-1.json").read_text())["commands"]) == 1


@pytest.mark.parametrize("step", sorted(gpu_check.steps()))
def test_a_step_takes_less_than_ten_minutes(step, capsys):
    plan = gpu_check.steps()[step]
    assert sum(command.seconds + gpu_check.KILL_AFTER for command in plan) <= 600
    assert main(["gpu-check", str(step), "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(plan)

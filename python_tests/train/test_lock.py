"""One process trains in a folder; what it leaves when it is killed or asked to end."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from made_up import SMALL

from ltood_fast.cli import main
from ltood_fast.train import loop
from ltood_fast.train.lock import LockedError, run_lock

ROOT = Path(__file__).resolve().parents[2]
KEYS = [text for key, value in SMALL.items() for text in (f"--{key}", value)]
HOLDER = """
import os, sys, time
from pathlib import Path
from ltood_fast.train.lock import run_lock
with run_lock(Path(sys.argv[1])):
    if os.fork() == 0:  # as a worker that decodes, which outlives its parent
        time.sleep(20)
        os._exit(0)
    print("locked", flush=True)
    time.sleep(60)
"""


def holder(run_dir: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run_dir)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_second_process_is_refused_until_the_first_is_killed(made_up_data, tmp_path, capsys):
    first = holder(tmp_path / "run")
    argv = ["train", "--config", "smoke", "--run-dir", str(tmp_path / "run"), *KEYS, "--stages", "simclr"]
    try:
        assert main(argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"run-dir must be free, got {tmp_path / 'run'}, in which process {first.pid} on " in line
        assert not (tmp_path / "run" / "config.yaml").exists()
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert main(argv) == 0


def test_the_lock_is_taken_again_after_each_command(tmp_path):
    for _ in range(2):
        with run_lock(tmp_path):
            assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
            with pytest.raises(LockedError), run_lock(tmp_path):
                pass
    assert (tmp_path / ".lock").read_text() == ""


def test_only_rank_0_takes_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr("ltood_fast.train.lock.launched_ranks", lambda: (1, 2, 2))
    with run_lock(tmp_path / "run"):
        assert not (tmp_path / "run").exists()


def test_what_killed_writers_left_is_removed(tmp_path):
    left = [tmp_path / ".config.yaml.7-0a.partial", tmp_path / "simclr" / ".last.pt.7-0a.partial"]
    left[1].parent.mkdir()
    for path in left:
        path.write_bytes(b"half")
    with run_lock(tmp_path):
        assert not any(path.exists() for path in left)


def test_a_refused_start_leaves_no_folder(tmp_path, capsys):
    assert main(["train", "--config", "smoke", "--run-dir", str(tmp_path / "a" / "b"), "--seed", "x"]) == 2
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert main(["train", "--config", "smoke", "--run-dir", str(tmp_path / "file")]) == 2
    assert f"run-dir must be a folder, got {tmp_path / 'file'}, where" in capsys.readouterr().err


def terminate(after: Path) -> None:
    """Sends SIGTERM to this process once the file is there."""
    while not after.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_says_what_is_saved_and_ends_with_143(made_up_data, tmp_path, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    last = tmp_path / "simclr" / "last.pt"
    real = loop.Stage.train_epoch

    def slow(self, bar):
        if last.exists():
            time.sleep(5)
        return real(self, bar)

    monkeypatch.setattr(loop.Stage, "train_epoch", slow)
    thread = threading.Thread(target=terminate, args=(last,))
    thread.start()
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", "smoke", "--run-dir", str(tmp_path), *KEYS])
    thread.join()
    assert ended.value.code == 143
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ltood: ")]
    assert line == (
        f"ltood: terminated; 1 epochs of simclr are saved in {last}, "
        f"go on with: ltood train --run-dir {tmp_path} --resume"
    )
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_before_the_first_epoch_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ltood_fast.data.load_data", lambda config: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", "smoke", "--run-dir", str(tmp_path / "run"), *KEYS])
    assert ended.value.code == 143
    assert "ltood: terminated; n" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_every_command_in_one_line(name, code, capsys, monkeypatch):
    from ltood_fast import cli

    monkeypatch.setitem(cli.COMMANDS, "info", lambda *_: os.kill(os.getpid(), getattr(signal, name)))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell job ignores it
    try:
        assert main(["info"]) == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(capsys.readouterr().err.strip().splitlines()) == 1

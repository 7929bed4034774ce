"""`ltood config`, `ltood doctor` and the lists of --help."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ltood_fast import doctor
from ltood_fast.cli import main
from ltood_fast.train import config
from ltood_fast.train.config import PRESETS, known_keys, presets
from ltood_fast.train.describe import comments, comments_of, describe, preset_summary
from ltood_fast.train.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[2]


def test_every_key_has_a_comment():
    assert [key for key in known_keys() if not comments()[key]] == []


def test_a_comment_may_stand_above_its_key():
    text = Path(config.__file__).read_text()
    moved = text.replace(
        "    k: int = _number(1, 1)  # neighbours that are positives\n",
        "    # neighbours that\n    # are positives\n    k: int = _number(1, 1)\n",
    )
    assert moved != text
    assert comments_of(moved) == comments_of(text)


def test_a_preset_is_listed_with_its_own_words():
    keys = {key.name: key for key in describe("cifar10_lt")}
    assert keys.keys() == known_keys().keys()
    rate, k = keys["optim.lr"], keys["stage1.k"]
    assert (rate.value, rate.allowed, rate.source) == ("0.5", "number >= 0", "cifar10_lt, paper")
    assert (k.value, k.allowed, k.source) == ("1", "integer >= 1", "default")
    assert k.comment == "neighbours that are positives"
    assert keys["data.imbalance"].comment.startswith("--data.split takes an official index split")


def test_a_mark_of_the_default_is_not_one_of_another_value():
    """The paper's N_b is 10,000; smoke's 40 is not the paper's."""
    (budget,) = (key for key in describe("smoke", "stage1") if key.name == "stage1.budget")
    assert (budget.value, budget.source) == ("40", "smoke")


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("model.encoder", "resnet18|resnet50|small_resnet|tiny_conv|torchvision:NAME|timm:NAME"),
        ("optim.momentum", "number in [0, 1]"),
        ("seed", "integer in [0, 1000000000]"),
        ("run.progress", "true|false"),
        ("run.loggers", "some of tensorboard,csv,wandb,mlflow,none"),
        ("data.id", "text"),
    ],
)
def test_ranges_in_words(key, allowed):
    assert next(k.allowed for k in describe() if k.name == key) == allowed


def test_the_command_lists_presets_files_and_sections(tmp_path, capsys):
    (tmp_path / "own.yaml").write_text("optim:\n  lr: 0.25  # half of it [mine]\n")
    for argv, first, n in [
        (["optim"], "optim.name", 10),
        (["smoke", "base"], "base.name", 6),
        ([str(tmp_path / "own.yaml"), "optim"], "optim.name", 10),
    ]:
        assert main(["config", *argv]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["key", "value", "allowed", "source", "comment"]
        assert lines[1].startswith(first)
        assert len(lines) == n + 1
    assert any(line.split()[:2] == ["optim.lr", "0.25"] and line.endswith("half of it") for line in lines)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["smok"], "got 'smok', did you mean smoke?"),
        ([""], "config must be a preset ("),
        (["smoke", "optm"], "section must be one of data, augment, model, optim, base, simclr, stage1, stage2, eval, "
         "run, got 'optm', did you mean optim?"),
        (["smoke", "optim", "run"], "names must be at most a preset and a section, got smoke optim run"),
    ],
)  # fmt: skip
def test_a_wrong_name_is_one_sentence(argv, sentence, capsys):
    assert main(["config", *argv]) == 2
    assert sentence in capsys.readouterr().err


def test_help_has_a_line_for_each_preset_and_recipe(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    lines = capsys.readouterr().out.splitlines()
    for name in (*presets(), *RECIPES):
        (line,) = (line for line in lines if line.split()[:1] == [name])
        assert 20 < len(line) < 130
    assert preset_summary("smoke") == "Seconds: every part of a run once, for tests"
    assert len(list(PRESETS.glob("*.yaml"))) == len(presets())


def test_the_lists_need_no_torch():
    script = """
import sys, types
sys.modules["torch"] = None
package = types.ModuleType("ltood_fast")
package.__path__ = ["ltood_fast"]
sys.modules["ltood_fast"] = package
from ltood_fast.train.describe import describe, list_presets_and_recipes
print(len(describe()), list_presets_and_recipes()[:7])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == [str(len(known_keys())), "presets"], done.stderr


# ---- ltood doctor


def test_the_doctor_finds_a_healthy_machine(capsys):
    assert main(["doctor"]) == 0
    page = capsys.readouterr().out
    assert f"runs on torch {torch.__version__}" in page
    assert torch.backends.cpu.get_cpu_capability() in page
    assert "  cpu   ok, largest relative error" in page
    assert page.split("to do:\n")[1].strip()


def test_the_doctor_tells_what_is_missing_or_broken(monkeypatch):
    def fails(name):
        if name == "kornia":
            raise ModuleNotFoundError("No module named 'kornia'", name="kornia")
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist\nmore")
        if name == "faiss":
            raise ModuleNotFoundError("No module named 'packaging'", name="packaging")
        return torch

    monkeypatch.setattr(doctor.importlib, "import_module", fails)
    advice = doctor.examine().advice
    assert "kornia is missing (augmentation): pip install kornia." in advice
    assert any(line.startswith("torchvision cannot be imported (operator torchvision::nms") for line in advice)
    assert "faiss-cpu is there but lacks packaging: pip install packaging." in advice


def test_a_wrong_kernel_is_no_health(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "kernel_error", lambda device: 0.5)
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    assert ended.value.code == 1
    assert "The cpu kernel is wrong here" in capsys.readouterr().out


def test_the_doctor_compares_with_the_reference(monkeypatch):
    import ltood_fast

    real = ltood_fast.nt_xent
    monkeypatch.setattr(ltood_fast, "nt_xent", lambda z, t, backend: real(z, t * (2 if backend == "auto" else 1)))
    assert doctor.kernel_error("cpu") > 0.01


@pytest.mark.parametrize(
    ("info", "said", "advice"),
    [
        ({"cuda": False, "cuda_reason": "no nvcc", "cuda_devices": ["H100"]}, "no kernels (no nvcc)", "LTOOD_CUDA=1"),
        ({"cuda": True, "cuda_archs": "9.0", "cuda_devices": []}, "kernels for 9.0; devices: none", "nvidia-smi"),
        ({"cuda": True, "cuda_archs": "9.0", "cuda_devices": ["H100"]}, "kernels for 9.0; devices: H100", ""),
    ],
)
def test_kernels_without_a_device_and_the_other_way_round(info, said, advice):
    found = []
    assert doctor._cuda(info, found).startswith(said)
    assert advice in "".join(found)
    assert bool(found) == bool(advice)

"""Users' code type-checks: mypy and Pyright, both strict, over a script that uses every loss and every Module."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
START = """
from typing import assert_type

import torch
from torch import Tensor

import ltood_fast as lt

z, guide = torch.randn(8, 4), torch.randn(8, 5)
labels, far = torch.arange(8) % 2, torch.tensor([1, 0])
flag = bool(labels.any())
"""
RIGHT = """
assert_type(lt.nt_xent(z), Tensor)
assert_type(lt.nt_xent(z, torch.tensor(0.1), instance_ids=labels, reduction="none", backend="cpu"), Tensor)
assert_type(lt.nt_xent(z, return_lse=True), tuple[Tensor, Tensor])
assert_type(lt.nt_xent(z, return_lse=flag), Tensor | tuple[Tensor, Tensor])
assert_type(lt.supcon(z, labels), Tensor)
assert_type(lt.supcon(z, labels, return_lse=True), tuple[Tensor, Tensor])
assert_type(lt.psd_loss(z, k=2, bank=lt.Bank(z)), Tensor)
assert_type(lt.domain_loss(z, labels, kind="supcon"), Tensor)
assert_type(lt.stage1_loss(z, labels, alpha=0.1), lt.Stage1Result)
assert_type(lt.stage1_loss(z, labels).total, Tensor)
assert_type(lt.guided_contrastive(z, guide, labels, far, k=2), Tensor)
assert_type(lt.relational_distill(z, guide, teacher_temperature=0.1), Tensor)
assert_type(lt.feature_distill(z, guide), Tensor)
assert_type(lt.stage2_loss(z, guide, labels, far, distill=lt.Distill("feature")), lt.Stage2Result)
assert_type(lt.stage2_loss(z, guide, labels, far, return_lse=True), tuple[lt.Stage2Result, Tensor])
assert_type(lt.info_nce(z, z), Tensor)
assert_type(lt.info_nce(z, z, return_lse=True), tuple[Tensor, Tensor])
assert_type(lt.info_nce(z, z, exclude=lt.Exclude(labels, labels), denominator=lt.Denominator(True)), Tensor)
assert_type(lt.clip_loss(z, z, 10.0), Tensor)
assert_type(lt.sigmoid_loss(z, z, torch.tensor(10.0), -10.0), Tensor)
assert_type(lt.cluster_kl(z, guide, nu=2.0), Tensor)
assert_type(lt.cluster_kl(z, guide, return_q=True), tuple[Tensor, Tensor])
assert_type(lt.refine_centroids(z, guide), tuple[Tensor, Tensor])
assert_type(lt.knn(z, 2), tuple[Tensor, Tensor])
assert_type(lt.knn_density(z, 2), Tensor)
assert_type(lt.cluster_tailness(z, labels, 2), Tensor)
assert_type(lt.farthest_cluster(z), Tensor)
assert_type(lt.sample_ood(z, guide, far, 2), tuple[Tensor, Tensor])
assert_type(lt.reference.nt_xent(z), Tensor | tuple[Tensor, Tensor])
learned = torch.nn.Parameter(torch.tensor(0.1))
losses: list[Tensor] = [
    lt.nn.NTXentLoss(learned)(z),
    lt.nn.NTXentLoss(reduction="sum")(z, labels),
    lt.nn.SupConLoss(0.1)(z, labels),
    lt.nn.PSDLoss(k=2)(z, bank=guide),
    lt.nn.DomainLoss(kind="bce", dim=4)(z, labels),
    lt.nn.Stage1Loss()(z, labels).total,
    lt.nn.GuidedContrastiveLoss(k=2)(z, guide, labels, far),
    lt.nn.RelationalDistillLoss()(z, guide),
    lt.nn.Stage2Loss(distill="feature")(z, guide, labels, far).total,
    lt.nn.InfoNCELoss(symmetric=True)(z, z, weight=z[:, 0]),
    lt.nn.ClusterKL(z)(z),
]
"""


def mypy(tmp_path: Path, body: str) -> str:
    script = tmp_path / "script.py"
    script.write_text(START + body)
    # As of an installed package, errors within it are not shown.
    options = ["--strict", "--follow-imports=silent", "--no-error-summary", "--cache-dir", str(tmp_path / "cache")]
    run = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(script)],
        env={**os.environ, "MYPYPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert not run.stderr, run.stderr
    assert run.returncode in (0, 1)
    return run.stdout


def pyright(tmp_path: Path, body: str) -> list[dict]:
    pytest.importorskip("basedpyright")  # Pyright with its own Node.js: nothing is downloaded when it runs
    (tmp_path / "script.py").write_text(START + body)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "strict", "extraPaths": [str(ROOT)]}))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable]
    run = subprocess.run([*command, "-p", str(tmp_path)], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode in (0, 1), run.stderr
    return json.loads(run.stdout)["generalDiagnostics"]


WRONG = ("loss: int = lt.nt_xent(z)", "lt.nt_xent(z, temprature=0.1)", "lt.nn.NTXentLoss(reductoin='sum')")
FIRST_WRONG_LINE = START.count("\n") + 1


def test_a_script_of_all_losses_passes_strict_mypy(tmp_path):
    assert mypy(tmp_path, RIGHT) == ""


def test_a_script_of_all_losses_passes_strict_pyright(tmp_path):
    assert pyright(tmp_path, RIGHT) == []


def test_wrong_arguments_and_types_are_found(tmp_path):
    """One error a line: the types are no Any that would pass everything."""
    found = mypy(tmp_path, "\n".join(WRONG)).splitlines()
    errors = [line for line in found if ": error: " in line]
    assert {int(line.split(":")[1]) - FIRST_WRONG_LINE for line in errors} == {0, 1, 2}, found


def test_pyright_finds_wrong_arguments_and_types(tmp_path):
    found = pyright(tmp_path, "\n".join(WRONG))
    lines = {d["range"]["start"]["line"] + 1 - FIRST_WRONG_LINE for d in found if d["rule"] != "reportUnusedImport"}
    assert lines == {0, 1, 2}, found


def test_the_types_are_shipped():
    """Without the marker, mypy takes an installed package for untyped."""
    assert re.search(r'^ltood_fast = \[.*"py\.typed"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert (ROOT / "ltood_fast/py.typed").exists()

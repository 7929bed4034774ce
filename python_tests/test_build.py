"""What was built says so, and a wrong setting of the build ends in one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ltood_fast
from ltood_fast import _ext

ROOT = Path(__file__).resolve().parent.parent


def run_setup(**settings: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True
    )


def test_build_info_names_every_function_and_backend():
    info = ltood_fast.build_info()
    assert info["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert set(info["kernels"]) == set(_ext.OP_OF_FUNCTION)
    for function, backends in info["kernels"].items():
        op = _ext.OP_OF_FUNCTION[function]
        assert backends == {d: "kernel" if _ext.has_kernel(op, d) else "reference" for d in ("cpu", "cuda")}
    assert info["cuda_reason"]


def test_every_public_function_has_an_op_or_a_reference():
    for function in _ext.OP_OF_FUNCTION:
        assert callable(getattr(ltood_fast, function)), function


def test_a_build_for_another_torch_is_refused():
    _ext.check_torch_version("2.14.1+cu130", "2.14.0")
    with pytest.raises(ImportError, match=r"built for torch 2\.11\.0 but runs on torch 2\.14\.1: .*--no-cache-dir"):
        _ext.check_torch_version("2.11.0", "2.14.1")


def test_the_path_of_the_cuda_kernels():
    assert _ext.cuda_path(None, "8.0+PTX 9.0a") == _ext.cuda_path("sm80", "8.0") == "sm80"
    assert _ext.cuda_path("sm90", "8.0+PTX 9.0a") == "sm90"
    with pytest.raises(ImportError, match="LTOOD_CUDA_PATH must be sm80 or sm90, got 'fast'"):
        _ext.cuda_path("fast", "8.0+PTX 9.0a")
    with pytest.raises(ImportError, match=r"needs a build with TORCH_CUDA_ARCH_LIST containing 9.0a, got 8.0"):
        _ext.cuda_path("sm90", "8.0")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"LTOOD_CUDA": "yes"}, "LTOOD_CUDA must be 0, 1 or auto, got 'yes'"),
        ({"LTOOD_CPU_ISA": "sse"}, "LTOOD_CPU_ISA must be avx512, avx2 or baseline, got 'sse'"),
        ({"LTOOD_CUDA": "0"}, "CUDA kernels left out: LTOOD_CUDA=0"),
    ],
)
def test_settings_of_the_build(settings, sentence):
    result = run_setup(**settings)
    assert sentence in result.stdout + result.stderr
    assert (result.returncode != 0) == ("must be" in sentence)


def test_the_probe_runs_on_a_device():
    if not _ext.build_info()["cuda"]:
        with pytest.raises(AttributeError):
            torch.ops.ltood_fast.cuda_probe  # noqa: B018
        return
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    torch.ops.ltood_fast.cuda_probe(out)
    major, minor = torch.cuda.get_device_capability()
    assert out.item() <= 100 * major + 10 * minor


Z = torch.ones(8, 3)
IDS = torch.zeros(8, dtype=torch.int64)
CALLS = {
    "nt_xent": (Z,),
    "stage1_loss": (Z, IDS),
    "guided_contrastive": (Z, Z, IDS, IDS[:1]),
    "cluster_kl": (Z, Z),
    "knn": (Z, 1),
}


@pytest.mark.parametrize("function", CALLS)
def test_a_cuda_kernel_without_a_device_is_refused(function):
    with pytest.raises(ValueError, match="needs inputs on a cuda device, got cpu") as refusal:
        getattr(ltood_fast, function)(*CALLS[function], backend="cuda")
    assert str(refusal.value) == f"{function}: backend='cuda' needs inputs on a cuda device, got cpu"


def test_a_folder_without_the_extension_says_what_to_do(tmp_path):
    refusal = str(_ext.missing_extension(tmp_path, ImportError("circular import")))
    assert "run from another folder" in refusal
    assert str(tmp_path) in refusal
    (tmp_path / "_C.cpython-311.so").touch()
    assert "cannot be loaded (undefined symbol)" in str(
        _ext.missing_extension(tmp_path, ImportError("undefined symbol"))
    )


def test_a_build_that_cannot_see_torch_names_isolation(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('hidden')")
    result = run_setup(PYTHONPATH=str(tmp_path))
    assert result.returncode
    assert "this build cannot import torch (hidden)" in result.stderr
    assert "pip install --no-build-isolation ." in result.stderr


def test_windows_is_refused_in_one_sentence():
    as_windows = "import setuptools, sys, runpy; sys.platform = 'win32'; runpy.run_path('setup.py')"
    result = subprocess.run([sys.executable, "-c", as_windows], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("ltood_fast does not run on Windows")
    assert result.stderr.count("\n") == 1


def test_the_instruction_set_is_one_that_the_processor_has():
    """A build for an older processor, or by another compiler, may have fewer clones than the processor could run."""
    isa = ltood_fast.build_info()["cpu_isa"]
    needs = {"avx512": " avx512f ", "avx2": " avx2 ", "baseline": ""}
    assert needs[isa] in Path("/proc/cpuinfo").read_text()


def test_a_wheel_needs_the_torch_that_it_was_built_for(tmp_path):
    """pip then names the conflict when torch is changed, which would otherwise show at import."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    requires = (tmp_path / "ltood_fast.egg-info/requires.txt").read_text().splitlines()
    assert "torch=={}.{}.*".format(*torch.__version__.split(".")) in requires


def test_a_wheel_is_named_after_its_torch():
    result = subprocess.run([sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True)
    major, minor = torch.__version__.split(".")[:2]
    assert result.stdout.splitlines()[-1].startswith(f"0.1.0+torch{major}.{minor}.")

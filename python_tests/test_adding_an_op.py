"""docs/adding_an_op.md names files and functions that exist."""

import re
from pathlib import Path

import ltood_fast
from ltood_fast import _ext
from ltood_fast.ops import _schema

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs/adding_an_op.md").read_text()
FAMILIES = sorted(folder.name for folder in (ROOT / "csrc/ops").iterdir() if folder.is_dir())


def test_named_files_exist():
    for path in set(re.findall(r"`((?:csrc|ltood_fast|python_tests)/[\w/.]+\.\w+)`", TEXT)):
        assert (ROOT / path).exists(), path


def test_every_family_has_the_files_of_the_list():
    for family in FAMILIES:
        folder = ROOT / "csrc/ops" / family
        assert (folder / f"{family}.h").exists(), family
        assert list((folder / "cpu").glob("*.cpp")), family
        assert (folder / "cuda/glue.cpp").exists() == (folder / "cuda").exists(), family
        assert (ROOT / "ltood_fast/ops" / f"{family}.py").exists(), family


def test_named_functions_exist():
    for name in ("call", "overload", "Arguments", "differentiable", "varying"):
        assert f"`{name}" in TEXT or f"{name}(" in TEXT, name
        assert hasattr(_schema, name), name


def test_schemas_follow_the_convention():
    """A backward takes the gradients of the outputs first and all inputs of its forward last."""
    for op in set(_ext.OP_OF_FUNCTION.values()) - {"feature_distill", "knn"}:
        forward, backward = (_schema.overload(name)._schema for name in (op, f"{op}_bwd"))
        takes = [argument.name for argument in backward.arguments if not argument.kwarg_only]
        inputs = [argument.name for argument in forward.arguments if not argument.kwarg_only]
        assert takes[-len(inputs) :] == inputs, op
        assert takes[0].startswith("grad_"), op
        assert [result.name for result in backward.returns][0] == f"grad_{inputs[0]}", op


def test_public_functions_are_exported_and_have_a_reference():
    assert set(_ext.OP_OF_FUNCTION) <= set(ltood_fast.__all__)
    for function in _ext.OP_OF_FUNCTION:
        assert callable(getattr(ltood_fast.reference, function, None)), function

"""The libraries are optional: a test of one that is not installed is not collected (`make conformance` has all)."""

from importlib.util import find_spec

NEEDS = {
    "test_info_nce_pytorch.py": "info_nce",
    "test_lightly.py": "lightly",
    "test_open_clip.py": "open_clip",
    "test_pytorch_metric_learning.py": "pytorch_metric_learning",
}
collect_ignore = [file for file, package in NEEDS.items() if find_spec(package) is None]

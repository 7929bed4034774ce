import os
import sys

import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")


class SkipWithoutFaiss:
    """The last place where a module is looked for: where FAISS is not installed, a test that imports it is skipped."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "faiss":
            pytest.skip("FAISS is not installed", allow_module_level=True)


sys.meta_path.append(SkipWithoutFaiss)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Every device a test of an op runs on."""
    return torch.device(request.param)

import pytest
from ptxsim import have_nvcc


@pytest.fixture(scope="session", autouse=True)
def _needs_nvcc():
    if not have_nvcc():
        pytest.skip("nvcc is needed to compile the kernels to PTX")

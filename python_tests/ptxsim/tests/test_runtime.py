"""The fake runtime: launchers run as they are, with their arguments, and its complaints reach Python."""

import numpy as np
import pytest
from ptxsim import Device, Library, SimError

KERNELS = "python_tests/ptxsim/kernels"


@pytest.mark.parametrize("launcher", ["launch_scale", "launch_scale_ex"])
def test_a_launcher_runs_its_kernel(launcher):
    device = Device(Library([f"{KERNELS}/scale.cu"]), seed=1)
    x = np.arange(200, dtype=np.float32)
    y = device.empty(200)
    assert device.call(launcher, device.put(x), y, 200, 3.0, None) == 0
    np.testing.assert_array_equal(device.get(y), 3 * x)


def test_reading_what_was_never_written_is_an_error():
    device = Device(Library([f"{KERNELS}/scale.cu"]))
    with pytest.raises(SimError, match="global memory that was never written"):
        device.call("launch_scale", device.empty(64), device.empty(64), 64, 1.0, None)
    with pytest.raises(SimError, match="never written"):
        device.get(device.empty(3))

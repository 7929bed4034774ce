"""Kernels as nvcc compiles them, through their launchers: the language, the memories, the fake runtime."""

import ctypes

import numpy as np
import pytest
from ptxsim import Device, Library, SimError
from ptxsim.values import bf16_to_f32, f32_to_bf16

INVALID_VALUE, INVALID_CONFIGURATION = 1, 9


@pytest.fixture(scope="module")
def library():
    return Library(["python_tests/ptxsim/kernels/language.cu"])


@pytest.fixture
def device(library):
    return Device(library, seed=3, sm_count=7, blocks_per_sm=2)


def collatz(n):
    steps = 0
    while n != 1:
        n = 3 * n + 1 if n % 2 else n // 2
        steps += 1
    return steps


def test_calls_and_divergent_loops(device):
    n = np.arange(1, 65, dtype=np.int32)
    steps = device.empty(64, np.int32)
    device.call("launch_calls", device.put(n), steps)
    assert device.get(steps).tolist() == [collatz(x) * 1000 + collatz(x + 1) for x in n.tolist()]


def test_local_arrays_constants_and_module_variables(device):
    picks = np.arange(64, dtype=np.int32) * 7 % 23
    y = device.empty(64)
    device.call("launch_local_array", device.put(picks), y, 3)
    table = np.array([0.5, -1, 2, 0.25] * 2) * [2, 3, 5, 7, 11, 13, 17, 19]
    np.testing.assert_array_equal(device.get(y), table[picks % 8] + 1)


def test_grids_and_blocks_of_three_dimensions(device):
    seen = device.empty(12 * 48, np.int32)
    device.call("launch_grid", seen)
    np.testing.assert_array_equal(device.get(seen), [b * 1000 + t for b in range(12) for t in range(48)])


def test_types(device):
    x = np.linspace(0, 9, 50)
    octets = np.arange(50, dtype=np.uint8) * 5
    y, out = device.empty(50, np.float64), device.empty(50, np.int8)
    halves, brains = device.empty(50, np.float16), device.empty(50, np.uint16)
    device.call("launch_types", device.put(x), device.put(octets), y, out, halves, brains)
    np.testing.assert_allclose(device.get(y), np.sqrt(x) / 3 + np.exp(-x), rtol=1e-15)
    np.testing.assert_array_equal(device.get(out), (octets.astype(int) - 128).astype(np.int8))
    np.testing.assert_array_equal(device.get(halves), x.astype(np.float16) * np.float16(2))
    rounded = bf16_to_f32(f32_to_bf16(x.astype(np.float32)))
    np.testing.assert_array_equal(device.get(brains), f32_to_bf16(rounded + 1))


class Table(ctypes.Structure):
    _fields_ = [("values", ctypes.c_float * 16), ("n", ctypes.c_int)]


def test_a_struct_by_value_can_be_indexed(device):
    y = device.empty(32)
    device.call("launch_parameter", Table((ctypes.c_float * 16)(*range(16)), 11), y)
    np.testing.assert_array_equal(device.get(y), np.arange(32) % 11)


def test_atomics(device):
    x = np.random.default_rng(0).integers(-999, 999, 192).astype(np.int32)
    sums, best, total = device.empty(4, np.int32), device.empty(1, np.uint64), device.zeros(1)
    locks = device.empty(1, np.uint32)
    device.call("launch_atomics", device.put(x), sums, best, total, locks)
    bits = np.bitwise_or.reduce(1 << (x & 7))
    np.testing.assert_array_equal(device.get(sums), [x.sum(), min(0, x.min()), max(0, x.max()), bits])
    winner = int(np.flatnonzero(x == x.max())[-1])
    assert int(device.get(best)[0]) == (int(x.max()) + 1000) << 32 | winner
    np.testing.assert_allclose(device.get(total), 0.5 * x.sum(), rtol=1e-6)
    assert device.get(locks)[0] == x.max() + 1000


def shared(device, threads, size, asks_for=0):
    x = np.arange(threads, dtype=np.float32)
    y = device.empty(threads)
    error = device.call("launch_shared", device.put(x), y, threads, size, asks_for)
    return error, x, y


def test_dynamic_and_static_shared_memory(device):
    error, x, y = shared(device, 64, 64 * 4)
    assert error == 0
    np.testing.assert_array_equal(device.get(y), np.zeros(64))  # what the two arrays hold cancels


def test_shared_memory_has_bounds(device):
    with pytest.raises(SimError, match=r"thread 32 of block 0: shared memory out of bounds"):
        shared(device, 64, 32 * 4)


def test_large_shared_memory_must_be_asked_for(device):
    assert shared(device, 64, 60_000)[0] == INVALID_VALUE
    assert "60000 bytes of dynamic shared memory, allowed are 49152" in device.complaint
    assert device.launches == []
    assert shared(device, 64, 60_000, asks_for=60_000)[0] == 0
    assert shared(device, 64, 64, asks_for=164 * 1024)[0] == INVALID_VALUE


@pytest.mark.parametrize("threads", [0, 2048])
def test_an_impossible_block_is_refused(device, threads):
    y = device.empty(1)
    assert device.call("launch_shared", y, y, threads, 0, 0) == INVALID_CONFIGURATION


def test_the_device_is_as_described(device):
    values = (ctypes.c_int * 4)()
    assert device.call("device_properties", values) == 0
    assert list(values) == [7, 163 * 1024, 8, 2]


def test_a_misspelt_launcher_is_named(device):
    with pytest.raises(SimError, match="no function launch_nothing"):
        device.call("launch_nothing")


def test_an_unknown_opcode_is_named_with_its_line(tmp_path):
    source = tmp_path / "odd.cu"
    source.write_text(
        '__global__ void k(float* y) {\n  asm volatile("dp4a.u32.u32 %0, %1, %1, %1;" : "=r"(*(int*)y) : "r"(0));\n}\n'
        'extern "C" int go(float* y) {\n  k<<<1, 32>>>(y);\n  return 0;\n}\n'
    )
    device = Device(Library([source]))
    with pytest.raises(SimError, match=r"odd.cu:2 .*opcode not modelled: dp4a.u32.u32"):
        device.call("go", device.zeros(32))


def test_what_the_fake_runtime_lacks_fails_the_build(tmp_path):
    source = tmp_path / "lacks.cu"
    source.write_text('#include <cuda_runtime.h>\nextern "C" int go() { return cudaDeviceSynchronize(); }\n')
    with pytest.raises(SimError, match="undefined reference to .*cudaDeviceSynchronize"):
        Library([source])

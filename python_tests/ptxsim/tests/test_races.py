"""Every kind of race and barrier mistake is found, whatever the schedule, and the correct form passes."""

import numpy as np
import pytest
from ptxsim import Device, Library, SimError

SEEDS = range(6)


@pytest.fixture(scope="module")
def library():
    return Library(["python_tests/ptxsim/kernels/races.cu"])


def last_block(library, seed, fence=1, second=1, barrier=1):
    device = Device(library, seed=seed)
    x = np.arange(256, dtype=np.float32)
    total = device.zeros(1)
    counter = device.zeros(1, np.uint32)
    device.call("launch_last_block", fence, second, barrier, device.put(x), device.empty(256), counter, total, 4)
    return device.get(total)[0], x.sum()


@pytest.mark.parametrize("seed", SEEDS)
def test_fences_and_atomics_order_blocks(library, seed):
    got, want = last_block(library, seed)
    assert got == want


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("missing", ["fence", "second", "barrier"])
def test_a_missing_fence_is_a_race_between_blocks(library, seed, missing):
    with pytest.raises(SimError, match="race on global memory.*block . of the launch wrote it"):
        last_block(library, seed, **{missing: 0})


@pytest.mark.parametrize("seed", SEEDS)
def test_every_thread_may_fence_before_the_barrier(library, seed):
    got, want = last_block(library, seed, fence=2)
    assert got == want
    with pytest.raises(SimError, match="race on global memory.*block . of the launch wrote it"):
        last_block(library, seed, fence=2, barrier=0)


def exchange(library, seed, fixed):
    device = Device(library, seed=seed)
    x, y = np.arange(64, dtype=np.float32), device.empty(64)
    device.call("launch_lane_exchange", fixed, device.put(x), y)
    return device.get(y), x[np.arange(64) ^ 1]


def second_exchange(library, seed, fixed):
    device = Device(library, seed=seed)
    x, y = np.arange(64, dtype=np.float32), device.empty(64)
    device.call("launch_second_exchange", fixed, device.put(x), y)
    return device.get(y), 2 * x[np.arange(64) ^ 3]


def count(library, seed, fixed):
    device = Device(library, seed=seed)
    total = device.empty(1, np.int32)
    device.call("launch_count", fixed, total)
    return device.get(total), [64]


def overlap(library, seed, fixed):
    device = Device(library, seed=seed)
    y = device.empty(192 if fixed else 176)
    device.call("launch_overlap", fixed, y, 3)
    return device.get(y), 1


def named_barrier(library, seed, fixed):
    device = Device(library, seed=seed)
    x, y = np.arange(32, dtype=np.float32), device.empty(32)
    device.call("launch_named_barrier", fixed, device.put(x), y)
    return device.get(y), x[::-1]


CASES = {
    "lanes of a warp without __syncwarp": (exchange, "race on shared memory|never written"),
    "lanes that write again what others read": (second_exchange, "race on shared memory.*accessed it"),
    "one word, many writers": (count, "race on shared memory.*same instruction"),
    "blocks that overlap": (overlap, "race on global memory.*of the launch writes it"),
    "warps without a named barrier": (named_barrier, "race on shared memory|never written"),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES)
def test_a_race_is_found_and_its_fix_passes(library, seed, case):
    run, message = CASES[case]
    np.testing.assert_array_equal(*run(library, seed, 1))
    with pytest.raises(SimError, match=message):
        run(library, seed, 0)


def barrier(library, kind):
    device = Device(library, seed=1)
    y = device.zeros(128, np.int32)
    device.call("launch_barrier", kind, y)
    return device.get(y)[:64]


def test_barriers_that_do_not_meet(library):
    np.testing.assert_array_equal(barrier(library, 0), np.arange(64) // 32)
    with pytest.raises(SimError, match=r"deadlock: warps \[0\] wait at barrier 1"):
        barrier(library, 2)
    with pytest.raises(SimError, match="divergent barrier"):
        barrier(library, 1)
    with pytest.raises(SimError, match="diverged warp 0"):
        barrier(library, 3)

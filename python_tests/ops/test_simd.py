"""The vectorised exponential of csrc/common/simd.h keeps the error that it states, compiled with and without clones."""

import ctypes
import os
import platform
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

ISAS = ["baseline", "avx2", "avx512"]
CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCE = """
#include "common/simd.h"
template <typename T>
LTOOD_INLINE void all(T* x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] = ltood::exp2_simd(x[i]);
}
extern "C" {
const char* isa() { return ltood::cpu_isa(); }
LTOOD_CLONES void cloned_float(float* x, int64_t n) { all(x, n); }
LTOOD_CLONES void cloned_double(double* x, int64_t n) { all(x, n); }
void plain_float(float* x, int64_t n) { all(x, n); }
void plain_double(double* x, int64_t n) { all(x, n); }
}
"""


@pytest.fixture(scope="module", params=ISAS)
def library(request, tmp_path_factory):
    """Clones up to an instruction set; only those that this processor has run."""
    folder = tmp_path_factory.mktemp("simd")
    (folder / "simd.cpp").write_text(SOURCE)
    limit = ISAS.index(request.param)
    flags = ["-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC", f"-I{CSRC}", f"-DLTOOD_CPU_ISA={limit}"]
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, *flags, str(folder / "simd.cpp"), "-o", str(folder / "simd.so")], check=True)
    library = ctypes.CDLL(str(folder / "simd.so"))
    library.limit = request.param
    return library


def exp2(library, build, values):
    kind = {np.dtype(np.float32): "float", np.dtype(np.float64): "double"}[values.dtype]
    out = values.copy()
    getattr(library, f"{build}_{kind}")(out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(out.size))
    return out


@pytest.mark.skipif(platform.machine() != "x86_64", reason="clones are for x86-64")
def test_the_limit_picks_the_clones(library):
    """Clones are compiled up to the limit; the best one that the processor has runs."""
    symbols = Path(library._name).read_bytes()
    compiled = {level for level in (3, 4) if re.search(rb"cloned_float.arch_x86.64.v%d" % level, symbols)}
    assert compiled == {"baseline": set(), "avx2": {3}, "avx512": {3, 4}}[library.limit]
    flags = Path("/proc/cpuinfo").read_text()
    able = {level for level, flag in ((3, " avx2 "), (4, " avx512vl ")) if flag in flags}
    library.isa.restype = ctypes.c_char_p
    assert library.isa() == {3: b"avx2", 4: b"avx512"}.get(max(compiled & able, default=0), b"baseline")


@pytest.mark.parametrize("build", ["cloned", "plain"])
@pytest.mark.parametrize(("dtype", "end", "error"), [(np.float32, 126.4, 1.5e-7), (np.float64, 1022.4, 2.8e-16)])
def test_error_is_what_the_header_states(library, build, dtype, end, error):
    values = np.concatenate([np.linspace(-end, end, 400_001), np.linspace(-1, 1, 400_001)]).astype(dtype)
    truth = np.exp2(values.astype(np.longdouble))
    worst = float(np.abs(exp2(library, build, values) / truth - 1).max())
    assert worst <= error


@pytest.mark.parametrize("build", ["cloned", "plain"])
@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 128), (np.float64, 1024)])
def test_limits(library, build, dtype, limit):
    values = np.array([np.nan, np.inf, -np.inf, limit, -limit, 1e30, -1e30, 0, 1, -limit + 2] * 5, dtype=dtype)
    expected = [np.nan, np.inf, 0, np.inf, 0, np.inf, 0, 1, 2, 2.0 ** (-limit + 2)] * 5
    np.testing.assert_allclose(exp2(library, build, values), np.array(expected, dtype=dtype), rtol=1e-6)

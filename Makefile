# make demo | test | docs | faults | ptx-test | lint | format | fuzz | sanitize | sanitize-fuzz | isa-test | wheel | bench | rivals | conformance | gpu-check | clean
# TORCH picks another torch:    make test TORCH="torch torchvision"
# PYTHON, VENV pick the interpreter and the environment; VENV= (empty) uses PYTHON as it is and installs nothing.
PYTHON ?= python3
VENV ?= .venv
# torchvision's wheels import only beside the CUDA build of torch, which also runs without a GPU: one environment for both.
TORCH ?= torch==2.14.1 torchvision==0.29.1
EXTRAS ?= train,dev,docs
RUN_DIR ?= runs/demo
TEST_JOBS ?= 2

ifeq ($(VENV),)
BIN :=
PY := $(PYTHON)
READY :=
else
BIN := $(VENV)/bin/
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
endif
CXX_FILES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
TEST_CXX_FILES := $(shell find python_tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
SOURCES := $(CXX_FILES) csrc/sources.txt setup.py pyproject.toml

.PHONY: demo test docs faults ptx-test lint format fuzz sanitize sanitize-build sanitize-fuzz isa-test isa-avx2 isa-baseline wheel gpu-check gpu-1 gpu-2 gpu-3 gpu-4 gpu-5 gpu-6 gpu-bench gpu-autotune gpu-method bench rivals conformance clean

demo: $(READY)
	$(PY) -m ltood_fast train --config demo --run-dir $(RUN_DIR) $(DEMO_ARGS)

# Files are shared out among processes: most of the time goes into simulated kernels, which use one core each.
test: $(READY)
	$(PY) -m pytest -n $(TEST_JOBS) --dist loadfile --cov --cov-report=term $(PYTEST_ARGS)

# The site, into build/site: a broken link or a page outside the navigation is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --site-dir build/site

# Every operation of every write of a run fails once, and the process ends once at each: 3 minutes. `make test` takes the
# operations of one stage.
faults: $(READY)
	LTOOD_FAULTS= $(PY) -m pytest -q -rP python_tests/train/test_faults.py $(PYTEST_ARGS)

# The CUDA kernels, executed on the CPU from their PTX: needs nvcc, no GPU.
ptx-test: $(READY)
	$(PY) -m pytest -n $(TEST_JOBS) --dist loadfile python_tests/ptxsim python_tests/cuda_sim $(PYTEST_ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(BIN)clang-format --dry-run --Werror $(CXX_FILES) $(TEST_CXX_FILES)

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(BIN)clang-format -i $(CXX_FILES) $(TEST_CXX_FILES)

# Random calls of all ops, judged by an oracle in 80-bit floats: make fuzz SECONDS=1800 SEED=7. A disagreement prints
# the line that repeats it; FUZZ_ARGS="--op knn" tries one op alone.
SECONDS ?= 60
SEED ?= 0
FUZZ = -m fuzz --seconds $(SECONDS) --seed $(SEED) $(FUZZ_ARGS)
fuzz: $(READY)
	PYTHONPATH=python_tests $(PY) $(FUZZ)

# The op tests under the address and undefined-behaviour sanitizers, in a copy: the normal build stays as it is. Left out
# are compiled graphs, whose code is loaded without the sanitizer, and opcheck and export, which test Python alone.
SANITIZE_DIR := build/sanitize
SANITIZERS = $(shell $${CXX:-c++} -print-file-name=libasan.so) $(shell $${CXX:-c++} -print-file-name=libubsan.so)
SANITIZE_PY = $(if $(VENV),$(abspath $(PY)),$(PY))
SANITIZED = cd $(SANITIZE_DIR) && LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1
sanitize: sanitize-build
	$(SANITIZED) $(SANITIZE_PY) -m pytest python_tests/ops -k 'not compile and not export and not opcheck' $(PYTEST_ARGS)

sanitize-fuzz: sanitize-build
	$(SANITIZED) PYTHONPATH=.:python_tests $(SANITIZE_PY) $(FUZZ)

COPIED := csrc ltood_fast python_tests setup.py pyproject.toml README.md LICENSE
sanitize-build: $(READY)
	mkdir -p $(SANITIZE_DIR)
	tar -c --exclude='*.so' $(COPIED) | tar -x -C $(SANITIZE_DIR)
	cd $(SANITIZE_DIR) && LTOOD_CUDA=0 LTOOD_SANITIZE=1 $(SANITIZE_PY) setup.py -q build_ext --inplace

# The op tests as on a processor without AVX-512 and on one without AVX2, each with a build of its own in a copy: the
# first variable limits the loops of this package, the others torch and oneDNN.
isa-test: isa-avx2 isa-baseline

isa-avx2: export ISA_LIMITS = ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
isa-baseline: export ISA_LIMITS = ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41
isa-avx2 isa-baseline: isa-%: $(READY)
	mkdir -p build/$@
	tar -c --exclude='*.so' $(COPIED) | tar -x -C build/$@
	cd build/$@ && LTOOD_CUDA=0 LTOOD_CPU_ISA=$* $(SANITIZE_PY) setup.py -q build_ext --inplace
	cd build/$@ && env $(ISA_LIMITS) $(SANITIZE_PY) -m pytest python_tests/ops -k 'not compile and not export and not opcheck' $(PYTEST_ARGS)

# On a machine with a GPU, nvcc and a CUDA build of torch, without a network: make gpu-1 VENV=, ... gpu-6, or all of them
# by make gpu-check VENV=. A step takes less than ten minutes, goes on after a failure, and leaves step-N.json in
# GPU_RESULTS/gpu; `python -m benchmarks gpu-check N --list` prints its commands. None has run on hardware yet.
GPU_RESULTS ?= benchmarks/results
GPU_STEPS := gpu-1 gpu-2 gpu-3 gpu-4 gpu-5 gpu-6
gpu-check:
	failed=0; for step in $(GPU_STEPS); do $(MAKE) $$step || failed=1; done; exit $$failed

$(GPU_STEPS): gpu-%: $(READY)
	$(PY) -m benchmarks gpu-check $* --results $(GPU_RESULTS)/gpu

gpu-bench: $(READY)
	PYTHONPATH=$(RIVALS_DIR) $(PY) -m benchmarks run --device cuda --results $(GPU_RESULTS) $(BENCH_ARGS)

gpu-autotune: $(READY)
	mkdir -p build $(GPU_RESULTS)
	$(PY) -m benchmarks autotune > build/tile_sizes_sm90.txt
	mv build/tile_sizes_sm90.txt $(GPU_RESULTS) && cat $(GPU_RESULTS)/tile_sizes_sm90.txt

# Pairings and OOD images as branches of one ResNet-18, half an hour a seed: the rate is measured for 20 s, the plan is
# printed and shrinks to the time, a call takes less than ten minutes and the next one goes on, and each seed leaves
# build/method/pairing_seed<k>.json; files of several days add up (--merge). METHOD_ARGS says where the images are, e.g.
# METHOD_ARGS="--seeds 0,1 --data.root /data --data.split /COLT/split/... --stage1.budget 4000". Not in gpu-check: it
# needs data.
gpu-method: $(READY)
	$(PY) -m ltood_fast.experiments.timed --config cifar10_lt --output build/method $(METHOD_ARGS)

# All ops against the rivals that are there, on the CPU. Pictures and a page from the JSON: python -m benchmarks plot|report
bench: $(READY)
	PYTHONPATH=$(RIVALS_DIR) $(PY) -m benchmarks run $(BENCH_ARGS)

# dist/*.whl for this Python and the torch that is installed. torch and the OpenMP library that it loads stay outside: a
# second copy of either would be a second runtime. LTOOD_CUDA and TORCH_CUDA_ARCH_LIST choose what is in it.
WHEEL_PATH := $(if $(BIN),$(abspath $(BIN)):)
wheel: $(READY)
	rm -rf build/wheel
	$(PY) -m pip wheel -q --no-build-isolation --no-deps -w build/wheel .
	PATH="$(WHEEL_PATH)$$PATH" $(PY) -m auditwheel repair $(OUTSIDE) -w dist build/wheel/*.whl
	ls -l dist
OUTSIDE := --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libgomp*'

# Needs a network, once: the rivals' packages, in a folder that can be carried to a machine without one.
RIVALS_DIR := build/rivals
rivals: $(READY)
	$(PY) -m pip install -q --no-deps --upgrade --target $(RIVALS_DIR) -r benchmarks/rivals.txt

# Needs a network, once: ltood_fast.integrations against the classes of the libraries that they replace.
conformance: $(READY)
	$(PY) -m pip install -q --no-build-isolation -e '.[conformance]'
	$(PY) -m pytest -q python_tests/integrations

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q $(TORCH) numpy ninja 'setuptools>=77' wheel pybind11
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(VENV)/bin/pip install -q --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf build dist *.egg-info ltood_fast/*.so

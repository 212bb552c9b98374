# `make demo` and `make test` are all a newcomer types; each sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
BUILD := build/dev
BIN := $(VENV)/bin
PY := $(BIN)/python
# One compile job needs up to 1.5 GiB (CUDA); never more jobs than cores.
JOBS ?= $(shell free_kib=$$(awk '/MemAvailable/ {print $$2}' /proc/meminfo 2>/dev/null || echo 4000000); \
  cores=$$(getconf _NPROCESSORS_ONLN); fit=$$((free_kib / 1500000)); [ $$fit -lt 1 ] && fit=1; \
  [ $$fit -lt $$cores ] && echo $$fit || echo $$cores)
CUDA ?= AUTO
# With a GPU: its own architecture. Without: one, to show that the kernels compile and link.
CUDA_ARCHITECTURES ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | \
  sed 's/\.//; s/^90$$/90a/' | grep . || echo 80)
export PYTHONPATH := $(CURDIR)/python
export ARIMG_LIBRARY_DIR := $(CURDIR)/$(BUILD)

CMAKE_FLAGS = -G Ninja -DARIMG_CUDA=$(CUDA) -DPython_EXECUTABLE=$(CURDIR)/$(PY) -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
  -DARIMG_CUDA_ARCHITECTURES="$(CUDA_ARCHITECTURES)"

.PHONY: demo test bench gpu lint setup build build-tests clean

demo: build  ## pictures from the bundled model, on the CPU
	mkdir -p out
	$(PY) -m arimg generate --class smileys/fluent --n 16 --seed 3 -o out/smileys.png
	$(PY) -m arimg generate --class smileys/fluent --n 4 --seed 3 --steps-grid -o out/steps.png
	@echo "Look at out/smileys.png and out/steps.png"

test: build-tests  ## the whole test suite, CUDA kernels in the emulator included
	ARIMG_REQUIRE_EMULATOR=1 $(PY) -m pytest tests -q

bench: build  ## benchmarks with peers on this machine
	$(BIN)/pip install -q -r requirements-bench.txt
	OMP_NUM_THREADS=1 $(PY) -m pytest bench -q --benchmark-only

gpu:  ## on a machine with a GPU: build there, test, sanitize, measure
	tests/cuda/run_on_gpu.sh

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/*.h' 'tests/*.cpp' 'tests/*.cu' | xargs $(BIN)/clang-format --dry-run -Werror

setup: $(VENV)/.ready

$(VENV)/.ready: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

build: setup
	$(BIN)/cmake -S . -B $(BUILD) $(CMAKE_FLAGS) > /dev/null
	$(BIN)/cmake --build $(BUILD) -j $(JOBS)

build-tests: CMAKE_FLAGS += -DARIMG_EMULATOR=ON
build-tests: build

clean:
	rm -rf build out

# make demo: see a trained Swin pruned.  make test: run the tests.  make help: the rest.
# All of it lives in .venv; a second run installs nothing.

PYTHON ?= python3
TORCH ?= torch==2.14.1
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt pyproject.toml
FORMATTED := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet  # its warnings are not ours to answer

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-large lint format docs wheel wheels abi second-torch sanitize arm spills bench bench-files clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# The build sees the installed torch: an isolated one would download it again.
$(VENV)/.torch: Makefile
	@echo "== a virtual environment in $(VENV), with torch and the build tools (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install "$(TORCH)" torchvision timm "scikit-build-core>=0.11" "pybind11>=2.13" ninja "cmake>=3.21"
	@touch $@

$(VENV)/.dimap: $(VENV)/.torch $(SOURCES)
	@echo "== building dimap (C++ and, where nvcc is found, CUDA)"
	@$(PIP) uninstall --yes dimap  # what another project calls so, and this one was called
	@$(PIP) install --no-build-isolation --editable . --config-settings=cmake.define.DIMAP_WERROR=ON
	@$(BIN)/python -c "import dimap; print('   ', dimap.build_info())"
	@touch $@

$(VENV)/.test: $(VENV)/.dimap
	@echo "== test dependencies"
	@$(PIP) install pytest pytest-xdist hypothesis transformers peft accelerate lightning monai einops matplotlib tensorboard onnx onnxscript tqdm "pillow<13"
	@touch $@

$(VENV)/.lint: $(VENV)/.torch
	@echo "== lint tools"
	@$(PIP) install ruff==0.17.6 mypy==2.4.1 clang-format==19.1.7 import-linter==2.17 torch-abi-audit
	@touch $@

demo: $(VENV)/.dimap  ## Prune a trained Swin at 55 % and show what it costs
	@echo "== the demo"
	@$(BIN)/python examples/demo/demo.py

# A file stays in one worker, with what its tests share. Idle threads of one do not spin on the other's core.
WORKERS ?= 2
test: $(VENV)/.test docs  ## Build the documentation, and run the tests (WORKERS=2 of them at a time)
	@echo "== tests"
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest tests -n $(WORKERS) --dist loadfile

test-large: $(VENV)/.test  ## Run the tests of more than 2^31 weights (minutes, 16 GiB)
	@echo "== tests that take minutes"
	@$(BIN)/python -m pytest tests -m large

lint: $(VENV)/.lint $(VENV)/.dimap  ## ruff, mypy, the layers of imports, clang-format
	@echo "== lint"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache --no-logo
	@$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: $(VENV)/.lint  ## Format all sources
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .
	@$(BIN)/clang-format -i $(FORMATTED)

PYTHONS ?= python3.10 python3.11 python3.12 python3.13 python3.14
wheels:  ## Build manylinux wheels in dist/ for those of PYTHONS that are here (CUDAARCHS=all where nvcc is)
	@echo "== wheels for $(PYTHONS)"
	@rm -rf dist build/wheels
	@CUDAARCHS=$${CUDAARCHS:-all} .ci/wheels $(PYTHONS)
	@ls -l dist

wheel: $(VENV)/.torch  ## Build a wheel in dist/
	@echo "== wheel"
	@rm -rf dist
	@$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .
	@ls -l dist

abi: wheel $(VENV)/.lint  ## Check that the operator libraries use torch's stable ABI only
	@echo "== stable ABI"
	@rm -rf build/wheel && $(BIN)/python -m zipfile -e dist/*.whl build/wheel
	@$(BIN)/torch-abi-audit --verbose --check torch build/wheel/dimap

second-torch: wheel  ## Run the same wheel beside another torch
	@echo "== the wheel built beside $(TORCH), run beside torch 2.13.0"
	@test -x $(VENV)-second/bin/python || $(PYTHON) -m venv $(VENV)-second
	@$(VENV)-second/bin/python -m pip --disable-pip-version-check --quiet --quiet install torch==2.13.0 numpy pydantic rich safetensors typer
	@$(VENV)-second/bin/python -m pip --disable-pip-version-check --quiet --quiet install --no-deps --force-reinstall dist/*.whl
	@cd tests && ../$(VENV)-second/bin/python smoke.py

sanitize:  ## The kernels under address, undefined-behaviour and thread sanitizers
	@cmake -S tests/kernels -B build/sanitize -G Ninja
	@cmake --build build/sanitize
	@ctest --test-dir build/sanitize --output-on-failure

arm:  ## The kernels as ARM processors run them (needs g++-aarch64-linux-gnu and qemu-user)
	@if command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null; then \
		cmake -S tests/kernels -B build/arm -G Ninja -DSANITIZERS=NONE -DCMAKE_SYSTEM_NAME=Linux \
			-DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
			-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64 && \
		cmake --build build/arm && ctest --test-dir build/arm --output-on-failure; \
	else echo "no compiler for ARM or no emulator: skipped"; fi

spills: $(VENV)/.torch  ## Compile the CUDA kernels for every architecture; fail on register spills
	@if command -v nvcc >/dev/null; then $(BIN)/python tests/cuda/check_spills.py; else echo "no nvcc: skipped"; fi

bench: $(VENV)/.dimap  ## Measure, and write benchmarks/results/
	@$(BIN)/python benchmarks/bench_select.py --save
	@$(BIN)/python benchmarks/bench_score.py --save
	@$(BIN)/python benchmarks/bench_engine.py --save
	@$(BIN)/python benchmarks/table.py --write

BENCH_FOLDER ?= .
BENCH_SIZE ?= 12
bench-files: $(VENV)/.dimap  ## Measure streams and bitmask files (BENCH_FOLDER with room for 2 x BENCH_SIZE GB)
	@$(BIN)/python benchmarks/bench_stream.py --save --folder $(BENCH_FOLDER) --dtype float32
	@$(BIN)/python benchmarks/bench_stream.py --save --folder $(BENCH_FOLDER) --dtype bfloat16
	@$(BIN)/python benchmarks/bench_stream.py --save --folder $(BENCH_FOLDER) --dtype bfloat16 --size $(BENCH_SIZE) --rounds 3
	@$(BIN)/python benchmarks/bench_bitmask.py --save --folder $(BENCH_FOLDER)
	@$(BIN)/python benchmarks/bench_commands.py --save
	@$(BIN)/python benchmarks/table.py --write

$(VENV)/.docs: $(VENV)/.dimap
	@echo "== documentation tools"
	@$(PIP) install --quiet "sphinx>=8.1" "myst-parser>=4" furo sphinx-copybutton
	@touch $@

docs: $(VENV)/.docs  ## Build the documentation in build/site; a warning or a broken link is an error
	@echo "== documentation"
	@$(BIN)/python -m sphinx -c docs -b html -W --keep-going -q . build/site
	@echo "    build/site/index.html"

clean:  ## Remove what was built (.venv too)
	rm -rf build dist $(VENV) $(VENV)-second demo-out

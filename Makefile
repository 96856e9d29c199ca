# Everything sets itself up in .venv; only Python >= 3.11 (with venv) and make are needed.
#   make bench                 the benchmarks, with tables
#   make test                  style, types and tests
#   PYTHON=python3.12 make ... another interpreter
# `make gpu` alone uses the packages of $(PYTHON) itself: GPU machines come with their own build of PyTorch.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Two worker processes with one thread each: the tests are small, and threads that share cores only slow each other down.
WORKERS ?= 2
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help venv bench test test-aot test-ptx test-triton test-video test-soak lint format types check-python gpu clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(READY)  ## set up .venv

# The stamp is the last thing written: an interrupted set-up starts over, on top of what pip already has.
$(READY): setup.py pyproject.toml constraints.txt
	@$(MAKE) --silent --no-print-directory check-python
	@echo "setting up $(VENV) ..."
	@if [ -e $(VENV) ] && ! $(BIN)/python -m pip --version >/dev/null 2>&1; then rm -rf $(VENV); fi
	@[ -e $(VENV) ] || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

check-python:
	@command -v $(PYTHON) >/dev/null || { echo "error: no '$(PYTHON)' found; set PYTHON to a Python >= 3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1), expected Python >= 3.11; set PYTHON to a newer one" >&2; exit 1; }

bench: $(READY)  ## run the benchmarks and print the tables (ARGS="--save-as NAME" to keep the results)
	$(BIN)/python -m pytest benchmarks --ignore benchmarks/gpu $(ARGS)

test: lint types  ## style, types and all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n $(WORKERS) --dist worksteal --durations=15 $(ARGS)

# `make test` compiles a random sample of the kernels and checks that the table of all of them is of today's code.
test-aot: $(READY)  ## compile every kernel ahead of time, for six GPUs, in a quarter of an hour
	HPDM_AOT=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/kernels/test_aot.py -n $(WORKERS) $(ARGS)

# `make test` executes a few configurations of each op and tries a sample of the mutations.
test-ptx: $(READY)  ## execute every compiled kernel on the CPU, instruction by instruction, for two GPUs
	HPDM_PTX=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/kernels/test_executed_ptx.py \
		-n $(WORKERS) --dist worksteal $(ARGS)

# The versions of PyTorch's own wheels, each in a folder: test -e tells whether pip is done.
TRITONS := 3.6.0 3.7.1
test-triton: $(READY)  ## compile and execute every kernel with other versions of Triton, in a quarter of an hour
	for v in $(TRITONS); do test -e $(VENV)/tritons/$$v/triton-$$v.dist-info/RECORD \
		|| $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/tritons/$$v triton==$$v \
		|| exit 1; done
	HPDM_TRITONS=$(VENV)/tritons OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/kernels/test_other_tritons.py \
		-n $(WORKERS) --dist worksteal $(ARGS)

# `make test` reads the hardest files of the corpus and a random draw of the others.
test-video: $(READY)  ## read every file of the video corpus, each frame and each window against a sequential decode
	HPDM_VIDEO=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/video -n $(WORKERS) --dist worksteal $(ARGS)

# `make test` tries each of these a few times, and takes the hardest of the hostile files.
test-soak: $(READY)  ## kill, damage, signal and fuzz at length: what happens once in a thousand times
	HPDM_SOAK=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/reliability tests/hostile tests/data/test_worker_kills.py \
		tests/kernels/test_fuzz.py -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(READY)  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## mypy
	$(BIN)/mypy

format: $(READY)  ## apply ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Resumable: what is complete for these sources is not run again (ARGS=--fresh: run all, ARGS=--list: say what there is).
gpu: check-python  ## all that this machine's CUDA device can show, in 9 minutes, with the installed packages
	$(PYTHON) -m benchmarks.gpu $(ARGS)

clean:  ## remove .venv, caches and local results
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks benchmarks/results/local
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Every target sets up what it needs: a virtual environment in .venv, installed once and again
# whenever pyproject.toml or constraints-cpu.txt changes. `make` alone lists the targets.

VENV ?= .venv
# Interpreters tried in this order; the first one that is Python 3.11 or newer makes the environment.
PYTHON ?= python3 python3.13 python3.12 python3.11
# Where the CPU build of torch is published; configured package indexes and mirrors are used as well.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
PYTEST_ARGS ?=
# Tests of different files at once; with PYTEST_ARGS="-n 0 --pdb" the debugger can be used.
PYTEST := -m pytest -n 2 --dist loadfile

BIN := $(VENV)/bin
READY := $(VENV)/.ready
EXTRAS := test,prep,huggingface,monitoring
# Without this, DeepSpeed's source package would want a compiler; its ops are not needed here.
export DS_BUILD_OPS := 0

# Prints "VERSION FOLDER" of a CUDA build of torch that this project can use, and nothing otherwise.
FIND_CUDA_TORCH := import os, torch; \
  usable = torch.version.cuda and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11); \
  print(torch.__version__, os.path.dirname(os.path.dirname(torch.__file__))) if usable else None

.PHONY: help setup demo test test-all lint bench clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' Makefile

setup: $(READY) ## make the virtual environment (every other target does it by itself)

demo: $(READY) ## prepare a small corpus, train on 2 ranks, evaluate, draw the curves
	$(BIN)/rxt demo

# The tests compare ranks and restarts bit by bit: CPU only and one thread, on every machine.
test test-all: export DS_ACCELERATOR := cpu
test test-all: export CUDA_VISIBLE_DEVICES :=
test test-all: export OMP_NUM_THREADS := 1

test: $(READY) ## unit tests and a covering part of every matrix (11 minutes on 2 cores)
	$(BIN)/python $(PYTEST) -m "not slow and not gpu" $(PYTEST_ARGS)

test-all: $(READY) ## every test that needs no GPU
	$(BIN)/python $(PYTEST) -m "not gpu" $(PYTEST_ARGS)

lint: $(READY) ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) ## measure the data path, monitoring and optimizer steps at small sizes (2 minutes)
	$(BIN)/python -m benchmarks.data --tokens 2000000 --pieces 200000
	$(BIN)/python -m benchmarks.observe_overhead
	$(BIN)/python -m benchmarks.train_step --config tiny --steps 20 --warmup 5

clean: ## remove the virtual environment, caches and built packages (runs and datasets stay)
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints-cpu.txt
	@set -eu; \
	python=; \
	for candidate in $(abspath $(BIN)/python) $(PYTHON); do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    python=$$candidate; break; \
	  fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "error: Python 3.11 or newer is needed; tried: $(PYTHON). Name one with: make PYTHON=/path/to/python3" >&2; \
	  exit 1; \
	fi; \
	cuda_torch=$$("$$python" -c '$(FIND_CUDA_TORCH)' 2>/dev/null || true); \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1 \
	    && ! "$$python" -m venv --clear $${cuda_torch:+--system-site-packages} $(VENV); then \
	  echo "error: $$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; \
	  exit 1; \
	fi; \
	if [ -n "$$cuda_torch" ]; then \
	  echo "setup: using torch $${cuda_torch%% *} of $$python"; \
	  packages=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	  printf '%s\n' "$${cuda_torch#* }" > "$$packages/existing-torch.pth"; \
	  printf 'torch==%s\n' "$${cuda_torch%% *}" > $(VENV)/constraints.txt; \
	else \
	  echo "setup: installing the CPU build of torch"; \
	  cp constraints-cpu.txt $(VENV)/constraints.txt; \
	  $(BIN)/python -m pip install --quiet --no-deps --retries 2 --extra-index-url $(TORCH_CPU_INDEX) \
	    --constraint $(VENV)/constraints.txt torch; \
	fi; \
	echo "setup: installing the other packages into $(VENV), a few minutes the first time"; \
	$(BIN)/python -m pip install --quiet --use-pep517 --constraint $(VENV)/constraints.txt \
	  --editable '.[$(EXTRAS)]'; \
	touch $@

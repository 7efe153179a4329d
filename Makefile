# make setup | quickstart | test | checks | format | chaos | gpu | grid | clean
PYTHON ?= python3
BIN := .venv/bin
TORCH := torch==2.13.0
PIP := $(BIN)/python -m pip --disable-pip-version-check
THREADS := OMP_NUM_THREADS=1
# Test processes: three where there are four cores. A file stays in one process (it shares its fixtures).
WORKERS := $(shell [ $$(nproc) -ge 4 ] && echo 3 || echo 2)

.PHONY: setup dev quickstart test checks format chaos gpu grid clean
setup: .venv/.installed
dev: .venv/.dev

# On a CPU machine torch comes first and with pip: an open range, or another installer, fetches gigabytes of
# CUDA. On a GPU machine the torch that is there is kept (the environment sees the system's packages).
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "rayft needs Python 3.11 or newer; say: make setup PYTHON=python3.12"; exit 2; }
	@if command -v nvidia-smi >/dev/null 2>&1; then \
		$(PYTHON) -m venv --system-site-packages .venv && \
		{ $(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install -q torch; }; \
	else \
		$(PYTHON) -m venv .venv && $(PIP) install -q $(TORCH); \
	fi
	$(PIP) install -q -c constraints.txt -e .
	@touch $@
	@echo "installed: $(BIN)/rayft"

.venv/.dev: .venv/.installed
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: setup
	@$(BIN)/python experiments/quickstart/run.py

test: dev
	$(THREADS) $(BIN)/python -m pytest -m "not gpu" -n $(WORKERS) --dist loadfile

checks: dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/basedpyright --pythonpath $(BIN)/python && $(BIN)/lint-imports

# Faults against rayft, hours of them: make chaos SEED=2 SCALE=0.1 STORMS="single damage" CHAOS=--json
SEED ?= 1
SCALE ?= 1
chaos: dev
	@$(BIN)/python experiments/chaos/run.py --seed $(SEED) --scale $(SCALE) $(STORMS:%=--storm %) $(CHAOS)

# What only a GPU can show, in 9 minutes, without a network: make gpu WHEELS=folder GPU="--commit abc1234". The
# environment if there is one, else the system's Python: on a machine that is lent nothing can be installed.
WHEELS ?=
gpu:
	@WHEELS="$(WHEELS)" $$(test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON)) experiments/gpu/run.py $(GPU)

# Every combination of the menu trains or is refused: one line each.
grid: dev
	@$(THREADS) $(BIN)/python -m tests.grid

format: dev
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

clean:
	rm -rf .venv runs build dist *.egg-info

# One command for each job; CI calls the same ones. `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin
PY := $(BIN)/python
STAMP := .venv/.installed
DEMO ?= demo
PIP_FLAGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow check format lint types imports bench docs build clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@echo "installing into .venv (once; a minute or two)"
	@$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_FLAGS) --editable '.[trainer,dev]'
	@# Alone: it names torchvision, whose build on PyPI does not load beside torch's CPU build.
	@$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_FLAGS) --no-deps torch-fidelity
	@touch $(STAMP)

install: $(STAMP)  ## Set up .venv with everything (the other targets do it when needed)

demo: $(STAMP)  ## Train, track, synthesize, sweep and plot on handwritten digits (about 5 minutes on 2 cores)
	$(BIN)/phema demo --out $(DEMO)

test: $(STAMP)  ## Run the test suite (without the slow tests and the benchmarks)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n logical --maxprocesses 4 --dist loadfile -m "not slow and not benchmarks"; code=$$?; \
	if [ $$code -eq 5 ]; then echo "no test was collected: that is a failure, not a success"; exit 1; fi; exit $$code

test-slow: $(STAMP)  ## Run the slow tests: kills and resumes, the must-show figures at full scale
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow

check: $(STAMP) format lint types imports  ## Formatting, lint, types, import layers: what a commit must pass

format: $(STAMP)
	$(BIN)/ruff format --check .

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

imports: $(STAMP)
	$(BIN)/lint-imports

bench: $(STAMP)  ## Run the benchmarks; figures are ratios measured side by side
	$(PY) -m pytest -m benchmarks --benchmark-disable -s tests/benchmarks

docs: $(STAMP)  ## Rewrite the generated pages (command line reference) from the code
	$(PY) docs/generate.py

build: $(STAMP)  ## Build the wheel and the source distribution into dist/
	$(PY) -m build --outdir dist .

clean:  ## Remove .venv and everything that is built
	rm -rf .venv dist build demo .mypy_cache .ruff_cache .pytest_cache .hypothesis

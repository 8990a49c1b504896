# Every target does the set-up that it needs; what is there already is not done again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
PIP_INSTALL := $(PIP) install --quiet --constraint constraints.txt
# Processes that run tests: most tests wait for others more than they compute.
WORKERS ?= 2
SOURCES := megamoe launcher data_tools slurm slurm/testbed tests benchmarks

.PHONY: help install demo test chaos ladder lint clean
.DEFAULT_GOAL := help

help: ## Show these lines
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

install: $(INSTALLED) ## Install MegaMoE with its pinned dependencies into .venv

demo: $(INSTALLED) ## Make shards, train a small model on 4 processes, kill one, evaluate, write the report
	$(BIN)/megamoe demo

test: $(INSTALLED) ## Run all tests but those marked nightly
	$(BIN)/python -m pytest -q -n $(WORKERS) --no-loadscope-reorder

chaos: $(INSTALLED) ## Run 100 trainings under random faults (hours; goes on where it was); rewrite docs/chaos.md
	$(BIN)/python -m benchmarks.chaos --json data/chaos/results.json --page docs/chaos.md

ladder: $(INSTALLED) ## Tests on a real SLURM that take minutes, then a run under ten random failures: how long each stops it
	$(BIN)/python -m pytest -q -m nightly tests/slurm
	$(BIN)/python -m benchmarks.ladder

lint: $(INSTALLED) ## Check style, format, types and which part imports which
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

clean: ## Remove .venv and caches; runs/ and data/ stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch comes first: deepspeed and fairscale are source distributions whose build imports it, so they are built
# without isolation. DS_BUILD_OPS=0 leaves DeepSpeed's C++/CUDA ops to be compiled at first use.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	    sys.exit(None if v >= (3, 11) else f"MegaMoE needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}; run: make PYTHON=python3.12 $(or $(MAKECMDGOALS),install)")'
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch numpy setuptools wheel ninja packaging
	DS_BUILD_OPS=0 $(PIP_INSTALL) --no-build-isolation deepspeed fairscale
	$(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@

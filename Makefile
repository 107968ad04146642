# Needs python3 and make; g++ for the C++ extension. `make` lists the targets.
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"   the small CPU build of torch
#   make test TORCH=torch                                                              the newest torch

PYTHON ?= python3
TORCH ?= torch==2.13.0#  the tested version; installed first, so that nothing else chooses it
OLDEST ?= torch==2.11.0#  that pyproject.toml allows
PYTEST_ARGS ?= -n 2

PIP := .venv/bin/pip --disable-pip-version-check install -q
SOURCES := pyproject.toml setup.py $(shell find csrc kernels sparsebilevel -type f -not -path '*/__pycache__/*')
# setuptools packs what an earlier build left there, removed files too. Objects (build/temp*) are kept: ninja checks them.
CLEAN_BUILD := rm -rf build/lib* build/bdist* *.egg-info

.PHONY: help demo test test-all lint format bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: .venv/.demo ## install into .venv and train the demo; results in runs/demo
	.venv/bin/sparsebilevel demo --output-dir runs/demo

test: .venv/.dev ## run the fast tests on an installed copy
	@.venv/bin/pytest -p no:benchmark $(PYTEST_ARGS)

test-all: .venv/.dev .venv-oldest/.dev .venv-latest/.dev ## slow tests too; oldest torch; newest triton; no extension
	@.venv/bin/pytest -p no:benchmark $(PYTEST_ARGS) --run-slow
	@.venv-oldest/bin/pytest -p no:benchmark $(PYTEST_ARGS)
	@.venv-latest/bin/pytest -p no:benchmark $(PYTEST_ARGS)
	@$(CLEAN_BUILD)
	@rm .venv-latest/.dev
	@SPARSEBILEVEL_NO_EXT=1 .venv-latest/bin/pip install -q --no-deps .
	@.venv-latest/bin/pytest -p no:benchmark $(PYTEST_ARGS)

lint: .venv/.dev ## ruff, and mypy on the installed copy
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@cd .venv && bin/mypy --config-file ../pyproject.toml -p sparsebilevel

format: .venv/.dev ## let ruff rewrite the sources
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

bench: .venv/.dev ## run the benchmarks
	@.venv/bin/pytest benchmarks

clean: ## remove environments, builds and caches
	rm -rf .venv .venv-oldest .venv-latest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

.venv/.torch:
	@echo "creating .venv with $(TORCH)"
	@$(PYTHON) -m venv .venv
	@$(PIP) $(TORCH)
	@touch $@

# Plain installs, not editable ones: the tests see what a user gets.
.venv/.demo: .venv/.torch $(SOURCES)
	@$(CLEAN_BUILD)
	@$(PIP) ".[log,report]"
	@touch $@

.venv/.dev: .venv/.torch $(SOURCES)
	@$(CLEAN_BUILD)
	@$(PIP) ".[test,dev]"
	@touch $@ .venv/.demo

.venv-oldest/.dev: $(SOURCES)
	@$(PYTHON) -m venv .venv-oldest
	@$(CLEAN_BUILD)
	@.venv-oldest/bin/pip install -q "$(OLDEST)" ".[test]"
	@touch $@

# The test extra pins the tested triton; here the newest replaces it. Only here are the trainers of docs/trainers.md.
.venv-latest/.dev: $(SOURCES)
	@$(PYTHON) -m venv .venv-latest
	@.venv-latest/bin/pip install -q $(TORCH)
	@$(CLEAN_BUILD)
	@.venv-latest/bin/pip install -q ".[test]" lightning accelerate transformers
	@.venv-latest/bin/pip install -q --upgrade triton numpy
	@touch $@

# The first use of a target builds .venv with the versions in .ci/constraints.txt, which were tried; a change of that
# file, of setup.cfg, of this one or of the Python builds it anew. Nothing has to be installed but Python 3.11, 3.12 or
# 3.13 with its venv module. Where it is not on the PATH, or to choose one:  make demo PYTHON=/path/to/python3.12
# To keep an environment for each:  make test PYTHON=python3.13 VENV=.venv-3.13

IS_OURS := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c '$(IS_OURS)' 2>/dev/null && echo $$p && break; done)
VENV := .venv
NEWEST := .venv-newest
BIN := $(VENV)/bin
LOCK := .ci/constraints.txt
# What an environment was built by and of: the Python's version, and the contents of these files.
VERSION := "$(PYTHON)" -c 'import sys; print(sys.version)'
digest = $(firstword $(shell { $(VERSION); cat $(1); } 2>/dev/null | sha256sum))
STAMP := $(VENV)/installed-$(call digest,$(LOCK) setup.cfg Makefile)
NEWEST_STAMP := $(NEWEST)/made-$(call digest,Makefile)
# The second name is that of newer pips for what packages are built with; older ones take the first for both.
LOCKED := PIP_CONSTRAINT=$(LOCK) PIP_BUILD_CONSTRAINT=$(LOCK)
PIP := python -m pip --disable-pip-version-check --quiet install
PYTEST := python -m pytest --numprocesses 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-newest lint wheel-check clean python

help:
	@echo "make demo         train, release and ask under encryption; results in runs/demo"
	@echo "make test         all tests"
	@echo "make test-newest  all tests with the newest versions that setup.cfg allows, in $(NEWEST)"
	@echo "make lint         format, style and types"
	@echo "make wheel-check  build the wheel and use it in an empty environment"
	@echo "make clean        remove the environments and what builds and tests leave"
	@echo "PYTHON=/path/to/python3.12 chooses the Python: 3.11, 3.12 or 3.13"

demo: $(STAMP)
	$(BIN)/securemtk demo

test: $(STAMP)
	$(BIN)/$(PYTEST)

# Every call looks for newer versions: what is new today is what it is for.
test-newest: $(NEWEST_STAMP)
	@$(NEWEST)/bin/$(PIP) --upgrade --upgrade-strategy eager --editable '.[test,sklearn]'
	$(NEWEST)/bin/python -m pip --disable-pip-version-check check
	$(NEWEST)/bin/$(PYTEST)

lint: $(STAMP)
	$(BIN)/python tests/support/lock.py $(LOCK)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy protocols securemtk
	$(BIN)/lint-imports --no-cache

wheel-check: $(STAMP)
	@PYTHON="$(PYTHON)" .ci/wheel-check $(BIN)/python

python:
	@"$(PYTHON)" -c '$(IS_OURS)' || { echo "securemtk needs Python 3.11, 3.12 or 3.13 with venv and ensurepip" \
		"(Debian: python3-venv); got '$(PYTHON)': make PYTHON=/path/to/python3.11" >&2; exit 1; }

$(STAMP): | python
	@echo "building $(VENV): some minutes, 2 GB, or 6 GB where torch comes with CUDA"
	@"$(PYTHON)" -m venv --clear $(VENV)
	@$(LOCKED) $(BIN)/$(PIP) --editable '.[test,sklearn]'
	@touch $@

$(NEWEST_STAMP): | python
	@"$(PYTHON)" -m venv --clear $(NEWEST)
	@touch $@

clean:
	rm -rf $(VENV) $(NEWEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The first use of a target builds .venv; a change of setup.cfg builds it anew. Nothing has to be installed but Python
# 3.11 with its venv module. Where it is not on the PATH:  make demo PYTHON=/path/to/python3.11

IS_OURS := import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 11))
PYTHON ?= $(shell for p in python3.11 python3 python; do $$p -c '$(IS_OURS)' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed-$(firstword $(shell sha256sum setup.cfg))

.DEFAULT_GOAL := help
.PHONY: help demo test lint wheel-check clean

help:
	@echo "make demo         train, release and ask under encryption; results in runs/demo"
	@echo "make test         all tests"
	@echo "make lint         format, style and types"
	@echo "make wheel-check  build the wheel and use it in an empty environment"
	@echo "make clean        remove .venv and what builds and tests leave"

demo: $(STAMP)
	$(BIN)/securemtk demo

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy protocols securemtk

wheel-check: $(STAMP)
	@PYTHON="$(PYTHON)" .ci/wheel-check $(BIN)/python

$(STAMP):
	@"$(PYTHON)" -c '$(IS_OURS)' || { echo "securemtk needs Python 3.11 with venv and ensurepip (Debian: python3.11-venv);" \
		"got '$(PYTHON)': make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "building $(VENV): a few minutes, about 2 GB"
	@"$(PYTHON)" -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[test,sklearn]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

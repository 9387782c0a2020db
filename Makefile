# Everything happens in $(VENV); nothing outside this folder is touched.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BUILD_INPUTS := pyproject.toml CMakeLists.txt $(wildcard csrc/*)

.PHONY: demo test coverage lint peers clean

demo: $(VENV)/.installed
	$(BIN)/optlm generate "Once upon a time" --max-tokens 120 --temperature 0.6 --top-p 0.9 --seed 7

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

coverage: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The engines that benchmarks/ measures beside ours, in environments of their own; some gigabytes.
peers: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/peers.py install

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python $(BUILD_INPUTS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-dev: $(BIN)/python $(BUILD_INPUTS) constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]" \
	  --constraint constraints.txt
	@touch $@ $(VENV)/.installed

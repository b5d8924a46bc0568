# `make quickstart` and `make test` set themselves up in .venv, once, from nothing.
# PYTHON3 names another Python to create .venv with; pip's own configuration decides where packages come from.

VENV := .venv
BIN := $(VENV)/bin
NATIVE_SOURCES := setup.py $(shell find csrc tests/native/onebit -type f 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint typecheck check-imports pytest setup clean

help:
	@echo "make quickstart   search, pack, verify and time a small network on real digits"
	@echo "make test         lint, types, import directions, doctests, tests, GPU kernels compiled"
	@echo "make lint         ruff: rules and format"
	@echo "make clean        remove what was built, keep $(VENV)"

quickstart: setup
	$(BIN)/lbs quickstart

test: lint typecheck check-imports pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: setup
	$(BIN)/mypy

check-imports: setup
	$(BIN)/lint-imports

# The default suite and some hundreds of GPU kernels compiled, a process for each core.
pytest: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal -m 'not slow and not gpu'

setup: $(VENV)/.installed $(VENV)/.native

# Everything but the native modules. The project goes in last, editable, with the build tools already there.
$(VENV)/.installed: pyproject.toml constraints.txt tools/make_venv.sh
	tools/make_venv.sh $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools pybind11 ninja
	LBS_BUILD_CPU=0 LBS_BUILD_CUDA=0 $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	rm -f $(VENV)/.native
	touch $@

# In place and incremental: only what changed is compiled again. Where there was no compiler, the next make tries again.
$(VENV)/.native: $(VENV)/.installed $(NATIVE_SOURCES)
	LBS_BUILD_TESTS=auto $(BIN)/python setup.py -q build_ext --inplace
	if ls lbs_kernels/_cpu*.so >/dev/null 2>&1; then touch $@; fi

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	rm -f lbs_kernels/_cpu*.so lbs_kernels/_cuda*.so lbs_kernels/*.part lbs_kernels/_build_report.json $(VENV)/.native
	rm -f tests/native/*.so tests/native/*.part
	find lbs lbs_kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

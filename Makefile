# `make quickstart` and `make test` set themselves up in .venv, once, from nothing.
# PYTHON3 names another Python to create .venv with; pip's own configuration decides where packages come from, and
# locks/ which files they may be (LBS_LOCK=no: any of the same versions).

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --no-compile -c constraints.txt
AUDIT := build/audit
NATIVE_SOURCES := setup.py $(shell find csrc tests/native/cuda -type f 2>/dev/null)

# What does not wait for one another runs at once: packages beside the native build, mypy beside the tests.
MAKEFLAGS += --jobs=4
# A command whose words come in one piece when it ends, whatever else writes meanwhile.
whole = @words=$$($(1) 2>&1); code=$$?; printf '%s\n' "$(1)" "$$words"; exit $$code
# Of the 46 s of processor time that pip takes, 24 are for bytecode of modules that nobody imports; a module that is
# imported writes its own, where the environment does not forbid it.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint typecheck check-imports docs pytest setup lock audit clean

help:
	@echo "make quickstart   search, pack, verify and time a small network on real digits"
	@echo "make test         lint, types, import directions, docs, doctests, tests, GPU kernels compiled"
	@echo "make docs         these pages and the API's as HTML, in build/docs"
	@echo "make lint         ruff: rules and format"
	@echo "make lock         write locks/ anew, after a change of what is depended on"
	@echo "make audit        ask for known vulnerabilities of what is depended on"
	@echo "make clean        remove what was built, keep $(VENV)"

quickstart: setup
	$(BIN)/lbs quickstart

test: lint typecheck check-imports docs pytest

lint: $(VENV)/.installed
	$(call whole,$(BIN)/ruff check .)
	$(call whole,$(BIN)/ruff format --check .)

typecheck: $(VENV)/.installed
	$(call whole,$(BIN)/mypy)

check-imports: $(VENV)/.installed
	$(call whole,$(BIN)/lint-imports)

# Warnings are errors. Pages come from docstrings too, which need no native modules.
docs: $(VENV)/.installed
	$(call whole,$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs)

# The default suite and some hundreds of GPU kernels compiled, a process for each core, one thread for each process: threads
# that wait for one another on processors that are taken make milliseconds of microseconds. Builds that tests start are not
# part of this make.
pytest: setup
	MAKEFLAGS= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal -m 'not slow and not gpu'

setup: $(VENV)/.installed $(VENV)/.native

# The environment with all that the native build takes.
$(VENV)/.tools: locks/build.txt tools/make_venv.sh tools/install_locked.sh
	tools/make_venv.sh $(VENV)
	tools/install_locked.sh $(BIN)/python build
	touch $@

# Everything but the native modules, which are built meanwhile. The project goes in last, editable.
$(VENV)/.installed: $(VENV)/.tools $(wildcard locks/*.txt) pyproject.toml
	tools/install_locked.sh $(BIN)/python dev
	LBS_BUILD_NATIVE=0 $(PIP) --no-deps --no-build-isolation -e .
	touch $@

# In place and incremental: only what changed is compiled again. Where there was no compiler, the next make tries again.
$(VENV)/.native: $(VENV)/.tools $(NATIVE_SOURCES)
	LBS_BUILD_TESTS=auto MAKEFLAGS= $(BIN)/python setup.py -q build_ext --inplace
	if ls lbs_kernels/_cpu*.so >/dev/null 2>&1; then touch $@; fi

lock: $(VENV)/.installed
	$(PIP) uv
	$(BIN)/python tools/lock.py

# In an environment of its own: what audits is no part of what is audited.
audit:
	tools/make_venv.sh $(AUDIT)
	tools/install_locked.sh $(AUDIT)/bin/python audit
	$(AUDIT)/bin/python tools/audit.py

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	rm -f lbs_kernels/*.so lbs_kernels/lbs.h lbs_kernels/*.part lbs_kernels/_build_report.json $(VENV)/.native
	rm -f tests/native/*.so tests/native/*.part
	find lbs lbs_kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# make quick   a first look: a tiny network on MNIST, in about a minute
# make train   trains the default model on MNIST (ARGS="--rounds=5" adds flags)
# make test    checks format, lint and types, runs the tests     make test-slow   runs the long tests
# make lint    checks format, lint and types                     make bench       compares with PyTorch (installs it)
# make docs    builds docs/_build/html; warnings are errors
# make clean   removes the environment and caches                PYTHON=python3.12 chooses the interpreter
PYTHON ?= python3
ARGS ?=
BENCH ?= training_speed
BIN := .venv/bin
# Python compiles a module at its first import. Most modules are never imported, so pip does not compile them.
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt
NEW_ENOUGH = $(shell $(PYTHON) -c 'import sys; print(sys.version_info >= (3, 11))')
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4
# Without bytecode files every process would compile all its imports again, which takes seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quick train test test-slow lint docs bench clean
.DELETE_ON_ERROR:

quick: .venv/runtime.stamp
	$(BIN)/python -m launch.train --preset=quick $(ARGS)

train: .venv/runtime.stamp
	$(BIN)/python -m launch.train --preset=mnist $(ARGS)

# Lint runs beside the tests, and its output comes at the end. A failure of either fails the target.
test: .venv/test.stamp
	@$(MAKE) --no-print-directory lint > .venv/lint.log 2>&1 & lint=$$!; \
	$(PYTEST) --dist worksteal $(ARGS); tests=$$?; \
	wait $$lint; linted=$$?; cat .venv/lint.log; exit $$((tests ? tests : linted))

# A few files take half of the time, so workers share single tests, and the longest are told. Exit status 5 means that
# there was nothing to run.
test-slow: .venv/test.stamp .venv/docs.stamp
	$(PYTEST) --dist worksteal -m slow --durations=30 $(ARGS) || [ $$? -eq 5 ]

lint: .venv/test.stamp .venv/lint.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright --pythonpath $(BIN)/python

docs: .venv/docs.stamp
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html $(ARGS)
	@echo "written: docs/_build/html/index.html"

bench: .venv/benchmark.stamp
	$(BIN)/python -m benchmarks.$(BENCH) $(ARGS)

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist docs/_build
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/python.stamp:
	$(if $(filter True,$(NEW_ENOUGH)),,$(error sfl_jax needs Python 3.11 or newer; PYTHON=$(PYTHON) is not: try make PYTHON=python3.12))
	@$(PYTHON) -m venv .venv
	@$(PIP) editables hatchling setuptools wheel
	@touch $@

# Installs only the tools of the extra "lint", not the package, which running tests may be importing.
.venv/lint.stamp: .venv/python.stamp pyproject.toml constraints.txt
	@$(PIP) basedpyright ruff
	@touch $@

# Each stamp marks an installed extra; the larger extras include the runtime.
.venv/%.stamp: .venv/python.stamp pyproject.toml constraints.txt
	@echo "installing into .venv ($*), once"
	@$(PIP) --no-build-isolation --editable '$(patsubst .[runtime],.,.[$*])'
	@touch .venv/runtime.stamp $@

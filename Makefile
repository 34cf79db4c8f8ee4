# make quick   a first look: a tiny network on MNIST, in about a minute
# make train   trains the default model on MNIST (ARGS="--rounds=5" adds flags)
# make test    formatting, lint, types, tests        make test-slow   the long tests
# make lint    the first three alone                 make bench       against peers, installs PyTorch
# make clean   removes the environment and caches    PYTHON=python3.12 chooses the interpreter
PYTHON ?= python3
ARGS ?=
BENCH ?= training_speed
BIN := .venv/bin
# What is imported is compiled then; most of it never is.
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt
NEW_ENOUGH = $(shell $(PYTHON) -c 'import sys; print(sys.version_info >= (3, 11))')
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4
# Without what is compiled once, every process would compile all that it imports: seconds each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quick train test test-slow lint bench clean
.DELETE_ON_ERROR:

quick: .venv/runtime.stamp
	$(BIN)/python -m launch.train --preset=quick $(ARGS)

train: .venv/runtime.stamp
	$(BIN)/python -m launch.train --preset=mnist $(ARGS)

# Lint runs beside the tests; what it finds is said at the end, and either fails it.
test: .venv/test.stamp
	@$(MAKE) --no-print-directory lint > .venv/lint.log 2>&1 & lint=$$!; \
	$(PYTEST) --dist worksteal $(ARGS); tests=$$?; \
	wait $$lint; linted=$$?; cat .venv/lint.log; exit $$((tests ? tests : linted))

# Some of its files take half of its time, so they are shared out test by test. Exit status 5 says that there was
# nothing to run.
test-slow: .venv/test.stamp
	$(PYTEST) --dist worksteal -m slow $(ARGS) || [ $$? -eq 5 ]

lint: .venv/test.stamp .venv/lint.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright --pythonpath $(BIN)/python

bench: .venv/benchmark.stamp
	$(BIN)/python -m benchmarks.$(BENCH) $(ARGS)

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/python.stamp:
	$(if $(filter True,$(NEW_ENOUGH)),,$(error sfl_jax needs Python 3.11 or newer; PYTHON=$(PYTHON) is not: try make PYTHON=python3.12))
	@$(PYTHON) -m venv .venv
	@$(PIP) editables hatchling setuptools wheel
	@touch $@

# The extra "lint" without the package itself, which tests may be importing meanwhile.
.venv/lint.stamp: .venv/python.stamp pyproject.toml constraints.txt
	@$(PIP) basedpyright ruff
	@touch $@

# Each stamp stands for an installed extra; the larger ones contain the runtime.
.venv/%.stamp: .venv/python.stamp pyproject.toml constraints.txt
	@echo "installing into .venv ($*), once"
	@$(PIP) --no-build-isolation --editable '$(patsubst .[runtime],.,.[$*])'
	@touch .venv/runtime.stamp $@

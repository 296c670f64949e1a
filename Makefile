# The two commands of the README, `make demo` and `make test`, and what a contributor needs beside them.
# Wants Python 3.10 or newer, a C++ compiler and pip; everything else lands in .venv. `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
ARGS ?=
CHROMIUM ?= /usr/bin/chromium
SECONDS_EACH ?= 25
QUICK ?=
TESTERS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CODE := $(shell find csrc -type f 2>/dev/null)
CORE := CMakeLists.txt $(CODE)

.DEFAULT_GOAL := help
.PHONY: help install demo reinforce test slow browser docs soak fuzz tables lint format bench wheels clean

help: ## this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  PYTHON=python3.12 chooses the interpreter, ARGS='...' is handed on to demo, test and bench"

install: $(STAMP) ## build the package into .venv with every dependency at its tested version

$(STAMP): pyproject.toml setup.py constraints.txt $(CORE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python %d.%d: pyunictokens needs 3.10 or newer; try make PYTHON=python3.12" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) 2>/dev/null || $(PYTHON) -m venv --clear --without-pip $(VENV)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m pip install --quiet --target \
	  "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" pip
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## teach the toy model one concept, start to finish, and write demo/report.html
	$(BIN)/pyunictokens demo --out demo $(ARGS)

reinforce: $(STAMP) ## reinforce the toy model on a list of prompts; the curve on held-out ones: reinforce/curve.png
	$(BIN)/pyunictokens demo --prompts --out reinforce $(ARGS)

test: $(STAMP) ## the test suite (without the tests that need a GPU or minutes), a process a core and one for those that wait
	$(BIN)/python -m pytest -q -n $(TESTERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder -m "not gpu and not slow and not soak and not fuzz and not browser" $(ARGS)

slow: $(STAMP) ## the tests that take minutes: kernels under the interpreter, a rehearsal of the GPU script, many processes
	$(BIN)/python -m pytest -q -n logical --maxprocesses 8 -m "slow and not gpu and not soak and not fuzz and not browser" $(ARGS)

browser: $(STAMP) ## the studio's pages in Chromium (CHROMIUM=/usr/bin/chromium)
	CHROMIUM=$(CHROMIUM) $(BIN)/python -m pytest -q -m browser tests/serve $(ARGS)

docs: $(STAMP) ## the documentation site in build/site, strict, its links checked, the notebook run
	bash .ci/docs.sh $(ARGS)

soak: $(STAMP) ## runs that are killed, disks that are full: what docs/reliability.md promises, for minutes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'ray>=2.40'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s -m soak tests/soak $(ARGS)

fuzz: $(STAMP) ## random bytes for everything that reads foreign bytes, twenty minutes in all (SECONDS_EACH=25 a reader)
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS_EACH) $(ARGS)

tables: $(STAMP) ## the paper's tables in miniature, with figures: docs/experiments.md (QUICK=1: one seed of three)
	$(BIN)/python -m experiments.tables $(if $(QUICK),--quick) $(ARGS)

lint: $(STAMP) ## ruff (rules and format), clang-format and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CODE)
	$(BIN)/mypy

format: $(STAMP) ## rewrite the sources in the one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CODE)

bench: $(STAMP) ## the benchmark suite; results go to benchmarks/results/
	$(BIN)/pyunictokens bench $(ARGS)

wheels: $(STAMP) ## a wheel for each CPython from 3.10 to 3.13 that is here, in dist/, below 20 MB and checked
	bash .ci/wheels.sh

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) build dist *.egg-info pyunictokens/_core*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

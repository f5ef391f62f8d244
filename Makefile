PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint requirements.lock

.DEFAULT_GOAL := help
.PHONY: help demo install test test-slow test-frameworks lint format docs lock clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "PYTHON=python3.12 chooses the interpreter, VENV=folder the environment."

demo: install  ## train, attack and explain a small network (a minute and a half on 2 cores)
	$(BIN)/python launch.py --config=configs/default.py --workdir=runs/demo

install: $(VENV)/installed  ## make .venv with all that launch.py needs

$(VENV)/installed: setup.cfg requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "error: Python 3.11, 3.12 or 3.13 is needed, not %d.%d; name one: make PYTHON=python3.12 …" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .[train]
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) --editable .[train,test,notebooks]
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(PIP) --editable .[train,docs]
	@touch $@

test: $(VENV)/installed-test lint  ## lint, types and the suite
	$(BIN)/python -m pytest --numprocesses=2

test-slow: $(VENV)/installed-test  ## the tests that take longer; some install packages
	$(BIN)/python -m pytest -m slow

test-frameworks:  ## docs/attack_your_model.md with Haiku, Keras and torch, in an environment of its own
	$(PYTHON) -m venv --clear $(VENV)-frameworks
	$(VENV)-frameworks/bin/python -m pip install --quiet --editable .[train,test,frameworks]
	$(VENV)-frameworks/bin/python -m pytest -m "" tests/test_frameworks.py tests/test_docs.py tests/test_benchmarks.py

lint: $(VENV)/installed-test  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-test  ## correct the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed-docs  ## the site, in build/docs/index.html; warnings are errors
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --builder html docs build/docs
	@echo "build/docs/index.html"

# The lock serves Python 3.11 to 3.13, each with its newest JAX. UPGRADE= keeps the versions that it has.
UPGRADE ?= --upgrade
lock:  ## pin the newest versions in requirements.lock (needs uv: pip install uv)
	uv pip compile setup.cfg --extra train --extra test --extra notebooks --extra docs --universal \
		--python-version 3.11 --no-annotate $(UPGRADE) --output-file requirements.lock

clean:  ## remove the environment and everything built
	rm -rf $(VENV) $(VENV)-frameworks build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

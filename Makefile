# make demo: train, attack and explain a small network.  make test: the whole suite.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock

.PHONY: demo install test test-slow lint format lock clean

demo: install
	$(BIN)/python launch.py --config=configs/default.py --workdir=runs/demo

install: $(VENV)/installed

$(VENV)/installed: setup.cfg requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "error: Python 3.11, 3.12 or 3.13 is needed, not %d.%d; name one: make PYTHON=python3.12 …" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) --editable .[test,notebooks]
	@touch $@

test: $(VENV)/installed-test lint
	$(BIN)/python -m pytest --numprocesses=2

test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Needs uv (pip install uv). The lock serves Python 3.11 to 3.13, each with its newest JAX.
lock:
	uv pip compile setup.cfg --extra test --extra notebooks --universal --python-version 3.11 \
		--no-annotate --upgrade --output-file requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

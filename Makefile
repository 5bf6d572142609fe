# Each target does all of its own set-up: a virtual environment in .venv, then exactly the versions in constraints.txt.
#   make demo   the main job, on this machine          make test   the tests
#   make lint   ruff and mypy                          make clean  remove the virtual environment and the caches
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
# setuptools comes first and build isolation is off, so that the constraints also hold for what builds the package.
INSTALL = $(PIP) install --quiet --constraint constraints.txt
LOCAL = $(INSTALL) --no-build-isolation --editable
PINS = setup.py pyproject.toml constraints.txt

.PHONY: demo test lint bench clean

demo: $(VENV)/.demo
	$(VENV)/bin/shflnb demo

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/.test
	$(VENV)/bin/python -m pytest benchmarks

$(VENV)/.base:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "shflnb needs Python 3.10 or newer; choose one with: make PYTHON=python3.x"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	    { echo "$(PYTHON) cannot make virtual environments; install its venv package (Debian: python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools
	@touch $@

$(VENV)/.demo: $(VENV)/.base $(PINS)
	$(LOCAL) '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.base $(PINS)
	$(LOCAL) '.[test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(LOCAL) '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks

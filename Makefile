# make demo   train on four ranks, out of core, with no GPU and no data needed
# make test   ruff, mypy and the tests
# make docs   the documentation, in docs/_build
# make sanitize   the C extension under gcc's sanitizers
# Each makes .venv and installs what it needs there first. PYTHON=… chooses the interpreter.

VENV := .venv
SHELL := /bin/bash
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

# The first interpreter that is there and not too old.
PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11 python,$(shell \
	$(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))

INSTALL := python -m pip install -q --disable-pip-version-check
# What an install depends on: the extension is built anew when its sources change.
INSTALLED := pyproject.toml setup.py $(wildcard backend/*.py) $(wildcard chainer_ooc/swap/devices/ram/*.[ch])

.PHONY: demo test docs sanitize clean

demo: $(VENV)/.demo
	mpiexec -n 4 python examples/imagenet/train.py --ooc

test: $(VENV)/.test
	ruff check .
	ruff format --check .
	mypy
	python -m pytest

sanitize: $(VENV)/.test
	tests/native/sanitize.sh

docs: $(VENV)/.docs
	sphinx-build -q -W --keep-going -b html docs docs/_build

clean:
	rm -rf $(VENV) result build docs/_build *.egg-info chainer_ooc/swap/devices/ram/*.so

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or later found; install one or call make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(INSTALLED) | $(VENV)/bin/python
	$(INSTALL) -e '.[mpi,examples]'
	touch $@

$(VENV)/.test: $(INSTALLED) | $(VENV)/bin/python
	$(INSTALL) -e '.[mpi,examples,dev]'
	touch $@ $(VENV)/.demo

$(VENV)/.docs: $(INSTALLED) | $(VENV)/bin/python
	$(INSTALL) -e '.[docs]'
	touch $@

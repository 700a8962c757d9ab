# make demo   train on four ranks, out of core, with no GPU and no data needed
# make test   ruff, mypy and the tests
# make test-cuda   real CuPy without a GPU; CUPY="cupy-cuda12x==13.*" is another one, in an environment of its own
# make gpu-check   what only a GPU can tell, in eight minutes; PYTHON=… has CuPy. ARGS=--on-double tries it without a GPU
# make coverage   the tests, and which lines of chainer_ooc/ they run
# make matrix   the tests on every supported Python that is here, with the oldest and the newest NumPy
# make exhaustive   what make test leaves out: hours
# make docs   the documentation, in docs/_build
# Each makes .venv and installs what it needs there first. PYTHON=… chooses the interpreter, ARGS=… is for pytest.

VENV := .venv
SHELL := /bin/bash
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

# The first interpreter that is there and not too old.
PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11 python,$(shell \
	$(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))

# A worker for each core, up to 8; ARGS="-n 0" is for none.
PYTEST := python -m pytest -n auto --dist worksteal

INSTALL := python -m pip install -q --disable-pip-version-check
# What an install depends on: the extension is built anew when its sources change.
INSTALLED := pyproject.toml setup.py $(wildcard backend/*.py) $(shell find chainer_ooc -name '*.[ch]')

.PHONY: demo test test-cuda gpu-check coverage matrix exhaustive marked sanitize installs mutants chainer-suite docs clean
.NOTPARALLEL:

demo: $(VENV)/.demo
	mpiexec -n 4 python examples/imagenet/train.py --ooc

test: $(VENV)/.test
	ruff check .
	ruff format --check .
	mypy
	lint-imports --no-logo
	$(PYTEST) $(ARGS)

# CuPy as a user has it, on tests/doubles/cuda_runtime, where it finds a GPU that computes nothing. With a GPU it is the GPU.
CUPY ?=
CUPY_NAME := $(firstword $(subst ==, ,$(CUPY)))
CUDA_VENV := .venv-cuda$(if $(CUPY),-$(subst .*,,$(subst ==,-,$(CUPY))))

test-cuda: $(CUDA_VENV)/.test
	CUPY_CACHE_DIR=$(CURDIR)/$(CUDA_VENV)/kernels $(CUDA_VENV)/bin/$(PYTEST) tests/gpu tests/real_cupy $(ARGS)

gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(ARGS)

# Watching begins before chainer_ooc's hook, when Python starts, also in the processes that the tests start. What measures
# time or memory may fail: watching takes both.
coverage: $(VENV)/.test
	coverage erase
	export COVERAGE_FILE=$(CURDIR)/.coverage; COVERAGE_PROCESS_START=$(CURDIR)/pyproject.toml $(PYTEST) $(ARGS); \
	status=$$?; coverage combine -q; coverage report; exit $$status

matrix: $(VENV)/.test
	nox -- $(ARGS)

# What make test leaves out, in this order; `make -k exhaustive` goes on after a failure. Times are on two idle cores.
exhaustive: sanitize installs marked mutants chainer-suite

# The C extension under gcc's sanitizers: about half an hour.
sanitize: $(VENV)/.test
	tests/native/sanitize.sh

# Every way to install, with each pip that matters and uv: about a quarter of an hour.
installs: $(VENV)/.test
	python tests/install_matrix.py

# Thousands of random programs, every error in the engine for GPUs, networks at full size: about
# four hours, of which the programs take 45 minutes.
marked: $(VENV)/.test
	python -m pytest --exhaustive -m exhaustive $(ARGS)

# Every generic error, one at a time, in the package: an hour or two.
mutants: $(VENV)/.test
	python tests/mutation/run.py --generic all

# Chainer's own tests, as they are and with everything moving: up to an hour each. CHAINER=… is a checkout of v7.8.1.
CHAINER ?= .cache/chainer
chainer-suite: $(VENV)/.test | $(CHAINER)
	python tests/chainer_suite/run.py $(CHAINER)
	python tests/chainer_suite/run.py $(CHAINER) --force-copies

.cache/chainer:
	git clone -q --depth 1 --branch v7.8.1 https://github.com/chainer/chainer $@

docs: $(VENV)/.docs
	sphinx-build -q -W --keep-going -b html docs docs/_build

clean:
	rm -rf $(VENV) .venv-cuda* .nox .coverage* result build docs/_build *.egg-info chainer_ooc/swap/devices/ram/*.so

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

$(CUDA_VENV)/.test: $(INSTALLED)
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or later found; install one or call make PYTHON=/path/to/python3" >&2; exit 1; }
	test -e $(CUDA_VENV)/bin/python || $(PYTHON) -m venv $(CUDA_VENV)
ifeq ($(CUPY),)
	$(CUDA_VENV)/bin/$(INSTALL) -e '.[dev,dev-cuda]'
else
	$(CUDA_VENV)/bin/$(INSTALL) -e '.[dev]' '$(CUPY)' 'cuda-toolkit[cudart,nvrtc]==$(patsubst cupy-cuda%x,%,$(CUPY_NAME)).*'
endif
	touch $@

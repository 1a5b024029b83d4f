# Everything runs in .venv, which each target makes by itself; PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PACKAGING := setup.py pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help quickstart test test-all fuzz soak bench-test sass trainers packages versions sanitize bench recipes lint format types install clean

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# One stamp per extra: a target installs what it needs, and again only when the packaging changes.
$(VENV)/%.stamp: $(PACKAGING) | $(BIN)/python
	$(PIP) install -q -c constraints.txt setuptools
	$(PIP) install -q -c constraints.txt --no-build-isolation ".[$*]"
	@touch $@

# An ordinary install, not an editable one, so that what is tested is what users get. setuptools never removes a deleted
# module from build/, and a wheel would still carry it; the compiled extension stays in build/native.
install: $(BIN)/python
	@rm -rf build/lib* build/bdist*
	$(PIP) install -q --no-deps --no-build-isolation .

quickstart: $(VENV)/demo.stamp  ## train, compress and fold LeNet-300-100 on MNIST; ARGS="--quick" for a short run
	@$(MAKE) -s install
	$(BIN)/python examples/quickstart.py $(ARGS)

# The console script, not `python -m pytest`: the latter puts the repository on sys.path, before the installed package.
test: $(VENV)/test.stamp  ## run tests and doctests against the installed package; ARGS="-k name" selects
	@$(MAKE) -s install
	$(BIN)/pytest -n 2 --dist worksteal $(ARGS)

test-all: $(VENV)/test.stamp  ## the same with all cases instead of some of each kind (CI)
	@$(MAKE) -s install
	$(BIN)/pytest -n 2 --dist worksteal --exhaustive $(ARGS)

fuzz: $(VENV)/test.stamp  ## tests/optim/test_fuzz.py on 10 000 new cases (CI has 500 fixed ones)
	@$(MAKE) -s install
	SYMOPT_FUZZ=10000 $(BIN)/pytest tests/optim/test_fuzz.py $(ARGS)

soak: $(VENV)/test.stamp  ## 100 000 steps of each optimizer in flat memory (CI has 400)
	@$(MAKE) -s install
	SYMOPT_SOAK=100000 $(BIN)/pytest tests/optim/test_processes.py -k memory $(ARGS)

bench: $(VENV)/bench.stamp  ## time the native step against its peers; ARGS="--quick" for a short run
	@$(MAKE) -s install
	$(BIN)/python -m benchmarks --json out/bench.json --markdown out/bench.md --plot out/bench.png $(ARGS)
	$(BIN)/python -m benchmarks.steps.gpu

sass: $(VENV)/test.stamp  ## compile the Triton step for GPUs that need not be there and count its instructions
	@$(MAKE) -s install
	$(BIN)/python tests/support/machine_code.py $(ARGS)

trainers: $(VENV)/trainers.stamp  ## trainers and export (docs/compatibility.md): Transformers, Accelerate, Lightning, ONNX Runtime, safetensors
	@$(MAKE) -s install
	$(BIN)/pytest -c compatibility/pytest.ini compatibility --ignore compatibility/test_packages.py \
	    --ignore compatibility/test_versions.py $(ARGS)

packages: $(VENV)/packages.stamp  ## sdist and wheel in clean environments (docs/compatibility.md); ARGS="--python PATH" adds a Python
	$(BIN)/pytest -c compatibility/pytest.ini compatibility/test_packages.py $(ARGS)

# RELEASES are pairs INTERPRETER=TORCH. Other releases than the pinned one bring their CUDA libraries: 5 GB each, removed
# at the end.
versions: $(VENV)/packages.stamp  ## the whole suite with other releases (docs/compatibility.md); RELEASES="python3.13=2.14.1 ..."
	$(BIN)/pytest -c compatibility/pytest.ini compatibility/test_versions.py $(RELEASES:%=--release %) $(ARGS)

bench-test: $(VENV)/test.stamp $(VENV)/bench.stamp  ## run the benchmarks' own tests (their checks, not their times)
	@$(MAKE) -s install
	$(BIN)/pytest -n 2 benchmarks --benchmark-disable $(ARGS)

# The same tests on a library that checks every access; libstdc++ is preloaded too, or ASan misses its exceptions.
SANITIZE := -O1 -g -w -fsanitize=address,undefined -fno-sanitize-recover=all
sanitize: $(VENV)/test.stamp  ## run the kernel's tests under AddressSanitizer and UndefinedBehaviorSanitizer (g++)
	@$(MAKE) -s install
	SYMOPT_CXXFLAGS="$(SANITIZE)" $(BIN)/python setup.py -q build_ext --build-lib build/sanitize --build-temp build/sanitize
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	    SYMOPT_NATIVE=$(CURDIR)/build/sanitize/symopt_kernels/native $(BIN)/pytest -n 2 tests/kernels/native $(ARGS)

recipes: $(BIN)/python  ## bring the files that CONTRIBUTING.md shows up to date
	$(BIN)/python tests/support/includes.py

lint: $(VENV)/lint.stamp  ## ruff
	$(BIN)/ruff check .

format: $(VENV)/lint.stamp  ## sort imports, fix what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/lint.stamp $(VENV)/demo.stamp  ## mypy --strict
	@$(MAKE) -s install
	$(BIN)/mypy

clean:  ## remove .venv and everything built
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

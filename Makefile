# `make demo` and `make test` each set up .venv first; VENV=path uses another one.
# Without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu saves the gigabytes of CUDA that torch brings along.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test gpu-test lint types imports clean

# the package and what it needs to run
$(VENV)/.minimal: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) -e .
	touch $@

# what tests and linters need besides
$(VENV)/.dev: $(VENV)/.minimal
	$(PIP) -e '.[dev]'
	touch $@

demo: $(VENV)/.minimal
	$(BIN)/mambacus demo --out runs/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

gpu-test: $(VENV)/.dev
	MAMBACUS_REQUIRE_GPU=1 $(BIN)/python -m pytest -m gpu

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.dev
	$(BIN)/mypy

# every module imports with nothing but the package's own dependencies, whatever else is in .venv (Triton's kernels need
# Triton, the server its extra; both are left out)
imports: $(VENV)/.minimal
	$(BIN)/python .ci/minimal.py -c "import importlib, pkgutil, mambacus; \
	names = [m.name for m in pkgutil.walk_packages(mambacus.__path__, 'mambacus.')]; \
	[importlib.import_module(n) for n in names if '.gpu_triton' not in n and '.serving.' not in n and not n.endswith('.__main__')]; print(len(names), 'modules')"

clean:
	rm -rf $(VENV) runs build dist *.egg-info

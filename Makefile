# `make demo` and `make test` each set up .venv first; VENV=path uses another one.
# Without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu saves the gigabytes of CUDA that torch brings along.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test gpu-test lint types imports pages clean

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

# the committed pages, drawn anew from all committed records; a test holds every page to its records
REPORT := $(BIN)/python -m mambacus report --overwrite
# records of BACKEND-PART-*; the efficiency pages have all but those of studies
RECORDS = $(sort $(wildcard benchmarks/$(1)-*.json))
EFFICIENCY = $(filter-out $(foreach part,controlled methods cs5242,$(call RECORDS,$(1)-$(part))),$(call RECORDS,$(1)))

pages: $(VENV)/.minimal
	$(REPORT) $(call EFFICIENCY,gpu) --out benchmarks/gpu-efficiency.html --title "Efficiency on one H100"
	$(REPORT) $(call EFFICIENCY,cpu) --out benchmarks/cpu-efficiency.html --title "Efficiency on two CPU cores"
	$(REPORT) $(call RECORDS,gpu-controlled) --out benchmarks/gpu-controlled.html --title "Mamba against a Transformer of equal size, on one H100"
	$(REPORT) $(call RECORDS,cpu-controlled) --out benchmarks/cpu-controlled.html --title "Mamba against a Transformer of equal size: a trial on a CPU"
	$(REPORT) $(call RECORDS,gpu-methods) --out benchmarks/gpu-methods.html --title "Methods of fine-tuning compared"

clean:
	rm -rf $(VENV) runs build dist *.egg-info

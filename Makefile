# make demo    pare a real model down by a recipe, then generate with the result
# make test    ruff, mypy and the tests
# Both make .venv first, with all that is needed. Other Python: make demo PYTHON=python3.12

PYTHON ?= python3
# Installed first and by version: where the pip configuration offers a CPU build of it (2.13.0+cpu),
# that one sorts above the plain build, which on Linux brings gigabytes of CUDA. To take another: TORCH=torch
TORCH ?= torch==2.13.0
BIN := .venv/bin
INSTALLED := .venv/installed
ROOMS := cli engine modifiers pipeline recipes zoo
DEMO := out/smollm2-sparse50-w8a8

.PHONY: demo test test-elsewhere build lint types clean

# A finished run is not repeated: `recipe apply` shows what it found.
demo: build
	$(BIN)/recipe apply recipes/library/smollm2-sparse50-w8a8.yaml --output $(DEMO)
	$(BIN)/recipe generate $(DEMO) "In Python, a class is" --max-tokens 64 --temperature 0.6 --top-p 0.9 --seed 7

test: build lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# Minutes: kernel rows for Arm under qemu, and under sanitizers all rows of this machine and the tests of the engine.
test-elsewhere: build
	PARING_SLOW_TESTS=1 $(BIN)/python -m pytest -rs tests/engine/test_kernels_elsewhere.py

build: $(INSTALLED)
	$(BIN)/python setup.py -q build_ext --inplace

$(INSTALLED): pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q "setuptools>=77" "pybind11>=2.13" "$(TORCH)"
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[dev]"
	touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy wants a folder called paring, and the clone may have any name.
types: $(INSTALLED)
	mkdir -p build/mypy/paring
	ln -sfn $(addprefix ../../../,$(filter-out setup.py,$(wildcard *.py)) $(wildcard $(ROOMS))) build/mypy/paring
	$(BIN)/mypy

clean:
	rm -rf build dist out *.egg-info engine/_core.*.so .mypy_cache .pytest_cache .ruff_cache

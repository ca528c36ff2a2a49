PYTHON ?= python3
BIN := .venv/bin

.PHONY: build

build:
	$(BIN)/python setup.py -q build_ext --inplace

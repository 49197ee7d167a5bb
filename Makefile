# make install | demo | test | gpu | lint | bench | gpu-bench | clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo

.PHONY: help install dev demo test gpu lint bench gpu-bench clean

help:
	@echo "make install   create .venv and install sslcli into it"
	@echo "make demo      train with the default settings, then evaluate (at most 4 minutes on 2 cores)"
	@echo "make test      install the test dependencies, lint, type-check, run all tests"
	@echo "make gpu       on a machine with a GPU: run the GPU tests and six short rows of gpu-bench (at most 8 minutes)"
	@echo "make lint      check formatting, ruff and mypy"
	@echo "make bench     benchmark sslcli, lightly and stable-pretraining on the same tasks"
	@echo "make gpu-bench benchmark rows on a GPU: ROWS='step/simclr/* lars'; OUT=directory, SECONDS=90 per row, DEVICE=cpu for a try without a GPU"
	@echo "make clean     remove .venv, caches and runs"

# Stamp file: install again only after a change of the package metadata or the C sources.
$(VENV)/installed: setup.cfg setup.py pyproject.toml $(wildcard sslcli/kernels/*.c)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[dev,hf,timm,export]"
	touch $@

install: $(VENV)/installed

dev: $(VENV)/installed-dev

demo: install
	$(BIN)/ssl-train run_dir=$(DEMO)
	$(BIN)/ssl-eval run=$(DEMO) protocol=knn > $(DEMO)/knn.log
	$(BIN)/ssl-eval run=$(DEMO) protocol=linear

lint: dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# Serial: the tests measure and limit the memory of the GPU.
gpu: dev
	@$(BIN)/python -m pytest -m gpu --device cuda --session-timeout 330
	@$(BIN)/python scripts/bench/gpu.py --short --sides sslcli --seconds 25 $(GPU_OUT)

bench: install
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	$(BIN)/python -m pip install --quiet --editable ".[bench-stable]" || echo "stable-pretraining cannot be installed: its benchmarks are skipped"
	$(BIN)/python scripts/bench/run.py $(BENCH)

DEVICE ?= cuda
SECONDS ?= 90
GPU_OUT = $(if $(OUT),--out "$(OUT)")

gpu-bench: install
	@set -f; $(BIN)/python scripts/bench/gpu.py $(ROWS) --device $(DEVICE) --seconds $(SECONDS) $(GPU_OUT)

clean:
	rm -rf $(VENV) build dist *.egg-info sslcli/kernels/*.so sslcli/kernels/*.sharedlib .mypy_cache .pytest_cache .ruff_cache runs

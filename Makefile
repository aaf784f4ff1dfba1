# make demo: the main job on real tissue. make test: all tests. Both set everything up first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test lint bench bench-gpu

setup: .venv/.setup-done

.venv/.setup-done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "featstore needs Python >= 3.11, found: $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/featstore demo demo

# A file's tests stay in one process: they share what is slow to make.
WORKERS ?= 2
test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python tests/bench/bench_scan.py
	$(BIN)/python tests/bench/bench_extract.py
	$(BIN)/python -m tests.bench.bench_store
	$(BIN)/python tests/bench/bench_scale.py
	$(BIN)/python -m tests.bench.bench_import
	$(BIN)/featstore bench train

# On a machine with a GPU; the results stay in $(GPU_RESULTS)/.
GPU_RESULTS ?= build/bench-gpu
bench-gpu: setup
	$(BIN)/python tests/bench/bench_gpu.py --out $(GPU_RESULTS)
	$(BIN)/python -m tests.bench.bench_finetune --step --memory --device cuda --out $(GPU_RESULTS)/finetune.json
	$(BIN)/python tests/bench/bench_vae.py --steps-per-second --device cuda --json $(GPU_RESULTS)/vae.json

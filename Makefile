# `make` lists the targets. Everything runs in .venv, which `make install` builds and every other target keeps current.

PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.DEFAULT_GOAL := help
.PHONY: help install demo serve test test-slow test-gpu test-multigpu bench-gpu bench-train bench-io bench-checkpoint bench-decode bench-serve bench-server lint format check-wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## build .venv (another Python: make install PYTHON=python3.12)

demo: $(INSTALLED) ## train a small early-exit model on this machine's CPUs or GPUs, check it and decode with it
	@PYTHON=$(CURDIR)/$(BIN)/python scripts/demo.sh

serve: $(INSTALLED) ## serve the model of `make demo` on this machine; its page is http://127.0.0.1:8000
	@test -d runs/demo/checkpoints || { echo "there is no model yet: make demo trains one" >&2; exit 2; }
	@PYTHON=$(CURDIR)/$(BIN)/python scripts/serve.sh configs/serve/demo.yaml

# One thread per process: tests start several processes, and tiny tensors gain nothing from more.
test: $(INSTALLED) ## run the tests, WORKERS files of them beside each other (2)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --no-loadscope-reorder

test-slow: $(INSTALLED) ## run the long sweeps, which `make test` leaves out
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

test-gpu: $(INSTALLED) ## run the tests that need GPUs, and say which were skipped for want of them
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/gpu -rs

test-multigpu: $(INSTALLED) ## of those, the ones that need several GPUs
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/gpu/test_multigpu.py -rs

bench-gpu: $(INSTALLED) ## measure training and decoding on one GPU, into runs/bench/gpu.json (a few minutes)
	@$(BIN)/python tools/bench_gpu.py

bench-train: $(INSTALLED) ## measure pipelines, memory and speed of training on CPUs, into runs/bench/train.json (minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python tools/bench_train.py

bench-io: $(INSTALLED) ## measure checkpoints beside the bare disk, data and start-up, into runs/bench/io.json (minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python tools/bench_io.py

bench-checkpoint: $(INSTALLED) ## train the model that bench-decode, bench-serve and bench-server take, for a quarter of an hour; stopped, it goes on where it was
	@$(BIN)/python tools/bench_checkpoint.py

bench-decode: $(INSTALLED) ## measure decoding beside Hugging Face's, and exits, into runs/bench/decode.json (minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python tools/bench_decode.py

bench-serve: $(INSTALLED) ## measure which rows run together, beside lockstep and the simulator, into runs/bench/serve.json (minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python tools/bench_serve.py

bench-server: $(INSTALLED) ## measure a server beside its model, and others beside slowdown prompts, into runs/bench/server.json (minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python tools/bench_server.py

lint: $(INSTALLED) ## check style, spelling, types, shell scripts and the Dockerfile
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/shellcheck scripts/*.sh scripts/*.slurm .ci/run
	$(BIN)/hadolint Dockerfile

format: $(INSTALLED) ## rewrite the code in the house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

check-wheel: ## build the wheel, install it into a clean environment with each extra, train with it
	@PYTHON=$(PYTHON) scripts/check_wheel.sh

clean: ## remove caches and build leftovers (runs/ and .venv/ stay)
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# torch goes first and alone, pinned: a looser requirement would let pip pass over the build that its settings lead to.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "megatron_ee needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
	    "name another: make install PYTHON=python3.12" >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "$$(grep '^torch==' constraints.txt)" --constraint constraints.txt
	$(BIN)/python -m pip install --editable '.[dev]' --constraint constraints.txt
	@touch $@

# Everything a newcomer types. `make help` lists it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
LOCK   := deploy/requirements.lock
# Where torch's wheel comes from, when the default index has only one with CUDA, e.g.
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
TORCH  := $(shell sed -n 's/^\(torch==.*\)$$/\1/p' $(LOCK))
STUBS  := esper_core/pb/descriptors.binpb
PROTOS := $(shell find protos -name '*.proto') protos/generate.py

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help setup proto up down status demo demo-invent test check bench bench-exec bench-growth bench-strangers clean

help: ## What can be typed here
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 15

setup: $(READY) ## Build .venv from the lock (once)

$(READY): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Esper needs Python 3.11 or newer: make PYTHON=python3.12 setup" >&2; exit 1; }
	@echo "Building $(VENV) (a few minutes the first time) ..." >&2
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)" >&2
	@$(BIN)/pip install -q -r $(LOCK) >&2
	@$(BIN)/pip install -q --no-deps --no-build-isolation -e . >&2
	@touch $@ $(STUBS)

proto: $(READY) ## Generate the Python stubs and the descriptor image
	@$(BIN)/python protos/generate.py

$(STUBS): $(PROTOS) | $(READY)
	@$(BIN)/python protos/generate.py >&2

up: $(READY) $(STUBS) ## Start the platform on this machine
	@$(BIN)/esperctl up

down: $(READY) ## Stop it; the data stay
	@$(BIN)/esperctl down

status: $(READY) ## How it is
	@$(BIN)/esperctl status

demo: $(READY) $(STUBS) ## Start everything, grow a network on real data, show what it brought
	@sh deploy/demo.sh $(BIN)/esperctl

demo-invent: $(READY) $(STUBS) ## Let Karn invent kernels for a network that trains, and see one become part of it
	@$(BIN)/python deploy/invent.py $(BIN)/esperctl

test: $(READY) $(STUBS) ## Run the test suite
	@$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(READY) $(STUBS) ## Format, lint, types, layers, contracts
	@$(BIN)/ruff format --check -q .
	@$(BIN)/ruff check -q .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/buf lint $(STUBS) --config buf.yaml --exclude-path google --exclude-path buf
	@sh deploy/breaking.sh $(BIN)
	@echo "check: all clean"

bench: $(READY) $(STUBS) ## Measure; prints ratios with their spread and the machine
	@$(BIN)/python -m tests.bench

bench-exec: $(READY) $(STUBS) ## Only what the execution layer costs; on a GPU: make bench-exec DEVICE=cuda
	@$(BIN)/python -m tests.bench exec $(if $(DEVICE),--device $(DEVICE))

bench-growth: $(READY) $(STUBS) ## Does growing pay? Every arm on every task, ten paired seeds; goes on where it was broken off
	@$(BIN)/python -m tests.bench.growth --report tests/bench/GROWTH.md

bench-strangers: $(READY) $(STUBS) ## Does it pay on tasks that growing was not developed on?
	@$(BIN)/python -m tests.bench.growth --suite strangers --seeds 6 --arms esper,none,static-flops,planted,random --report tests/bench/STRANGERS.md

clean: ## Remove what can be built again
	rm -rf $(VENV) build dist esper_core/pb

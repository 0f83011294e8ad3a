# Every target that needs the environment builds it first; when it is up to date that costs
# well under a second. Versions are pinned in launch/pins/.

PYTHON ?= python3
DEVICE ?= auto
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint types format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "Variables: PYTHON=$(PYTHON) (3.10 to 3.12), DEVICE=$(DEVICE) (auto, cpu or cuda)"

setup:  ## create or repair .venv with the pinned versions
	@$(PYTHON) launch/setup_env.py --venv $(VENV) --device $(DEVICE)

demo: setup  ## draw data, plan, train and evaluate on two workers (about a minute)
	$(BIN)/shardemb data synth configs/demo.yaml --train-rows 1000000 --test-rows 100000 --overwrite
	$(BIN)/shardemb plan configs/demo.yaml
	$(BIN)/shardemb train configs/demo.yaml

test: setup  ## run the tests, without those marked slow
	$(BIN)/python -m pytest -m "not slow"

test-all: setup  ## run all tests
	$(BIN)/python -m pytest

lint: setup  ## check style
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: setup  ## check types
	$(BIN)/python -m mypy

format: setup  ## rewrite the files in the project's style
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:  ## remove caches and build outputs; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench zoo clean

help:  ## Show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[all,dev]'
	touch $(READY)

demo: $(READY)  ## Train, prune, shrink and verify a small network on handwritten digits
	$(BIN)/gumbel-prune run configs/digits.yaml --output runs/digits --force

test: $(READY)  ## Run the whole test suite
	$(BIN)/pytest

lint: $(READY)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## Measure the mask layer (docs/speed.md)
	$(BIN)/python benchmarks/sampling.py

zoo: $(READY)  ## Shrink every torchvision model at random and compare (hours; docs/zoo.md)
	$(BIN)/python benchmarks/zoo.py --kind all --json docs/data/zoo.json --output docs/zoo.md

clean:  ## Remove the virtual environment and run folders
	rm -rf $(VENV) runs

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast matrix lint docs bench zoo nni-conformance clean

help:  ## Show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[all,dev,docs]'
	touch $(READY)

demo: $(READY)  ## Train, prune, shrink and verify a small network on handwritten digits
	$(BIN)/gumbel-prune run configs/digits.yaml --output runs/digits --force

test: $(READY)  ## Run the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile

test-fast: $(READY)  ## Run the tests that are not marked slow, while you work
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto -m "not slow"

# Which pairs of torch and torchvision: all, or for instance PAIRS="py311-torch2.14". pyenv's Pythons are used where it is.
PAIRS ?= py311-torch2.13 py311-torch2.14 py312-torch2.11 py313-torch2.14 py310-torch2.6
NOX := .nox/.tool/bin/nox
PYTHONS := $(shell pyenv versions --bare 2>/dev/null | grep -E '^3\.1[0-9]\.[0-9]+$$' | paste -sd: -)

matrix: $(NOX)  ## Run the suite on several Pythons, torches and torchvisions (docs/compatibility.md)
	PYENV_VERSION=$(PYTHONS) $(NOX) --session $(foreach pair,$(PAIRS),"suite($(pair))")

$(NOX):
	$(PYTHON) -m venv .nox/.tool
	.nox/.tool/bin/pip install --quiet nox

lint: $(READY)  ## Check style, types, and that every room keeps its place
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/pytest tests/test_structure.py

docs: $(READY)  ## Build the documentation into build/docs, without warnings
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: $(READY)  ## Measure the mask layer (docs/speed.md)
	$(BIN)/python benchmarks/sampling.py

nni-conformance: $(READY)  ## What NNI promises of every pruner, asked of ours and its own (docs/nni_conformance.md)
	NNI_CONFORMANCE=docs/nni_conformance.md $(BIN)/pytest tests/gumbel_nni/test_conformance.py

zoo: $(READY)  ## Shrink every torchvision model at random and compare (hours; docs/zoo.md; SOURCE=timm: another package)
	$(BIN)/python benchmarks/zoo.py $(if $(SOURCE),--source $(SOURCE),--kind all)

clean:  ## Remove the virtual environment and run folders
	rm -rf $(VENV) runs

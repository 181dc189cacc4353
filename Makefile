# make tune   tune paged attention for an H100: measured if one is here, else replayed from its recorded landscape
# make test   lint, types and all tests; those of tests/gpu run only where there is a GPU
# make figures   the README's tables, from results/

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: tune test lint figures clean

tune: $(VENV)/ready
	$(BIN)/patune run --gpu h100

test: lint
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=10

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

figures: $(VENV)/ready
	$(BIN)/python tools/figures.py

# Where torch is installed already it is used as it is. Else: with an NVIDIA GPU, torch with CUDA and the Triton that
# comes with it; without one, the pair that the tests run with, so that a CPU build is taken where there is one.
$(VENV)/ready: pyproject.toml
	if $(PYTHON) -c 'import torch, triton' 2>/dev/null; then \
	  $(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
	  $(PYTHON) -m venv $(VENV); \
	  if nvidia-smi -L >/dev/null 2>&1; then $(BIN)/pip install -q torch; \
	  else $(BIN)/pip install -q torch==2.13.0 && $(BIN)/pip install -q triton==3.7.1; fi; \
	fi
	$(BIN)/pip install -q -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info

# make            a virtual environment with metadist in it
# make train      the main job: MAML on sinusoids through Ray; ARGS="outer.meta_steps=100" for more or less of it
# make test       every test that fits in minutes; make test-long the rest
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
BIN    := $(VENV)/bin
# The pins need Python 3.11; on 3.10 the newest versions that still support it are taken.
PINS   := $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")')

.PHONY: all train test test-long lint clean
all: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PINS) -e '.[dev]'
	@touch $@

train: all
	$(BIN)/metadist train sinusoid_maml --workers 2 $(ARGS)

test: all
	$(BIN)/python -m pytest -n 2 -m 'not long' $(ARGS)

test-long: all
	$(BIN)/python -m pytest --timeout 3600 $(ARGS)

lint: all
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info

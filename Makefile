# make demo | test | lint | bench: each makes what it needs, in $(VENV), once.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --editable

.PHONY: demo test lint bench clean

demo: $(VENV)/installed  ## answer a question about a picture with the embedded model
	$(BIN)/python -m jaxspec generate

test: $(VENV)/installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

bench: $(VENV)/installed
	$(BIN)/python -m jaxspec bench

clean:
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A stamp is older than pyproject.toml when the dependencies have changed; then pip looks again.
$(VENV)/installed: pyproject.toml | $(BIN)/python
	$(INSTALL) .
	touch $@

$(VENV)/installed-test: pyproject.toml | $(BIN)/python
	$(INSTALL) '.[test,plot]'
	touch $@

$(VENV)/installed-dev: pyproject.toml | $(BIN)/python
	$(INSTALL) '.[dev]'
	touch $@

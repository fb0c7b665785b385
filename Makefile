# make demo | serve | test | test-full | test-core | test-tpu | lint | bench: each makes what it needs, in $(VENV), once.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
SERVE_ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --editable

# What has to hold on every Python and JAX, in a few minutes and without torch: decoding, sampling and trees, loading,
# training and resuming, the commands.
CORE := $(addprefix tests/,speculation/test_families.py speculation/test_tree.py drafters/test_medusa.py \
	test_compilations.py speculation/test_penalised_decoding.py \
	training/test_loop.py training/test_together.py training/test_medusa.py data/test_unusable.py \
	cli/test_generate.py test_quantization.py)

.PHONY: demo serve test test-full test-core test-tpu lint bench clean

demo: $(VENV)/installed  ## answer a question about a picture with the embedded model
	$(BIN)/python -m jaxspec generate

serve: $(VENV)/installed-serve  ## answer OpenAI's chat completions with the embedded model; SERVE_ARGS are its flags
	$(BIN)/python serve.py --web-page $(SERVE_ARGS)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-full: $(VENV)/installed-test  ## every combination, where `test` has every pair of values
	$(BIN)/python -m pytest --full $(PYTEST_ARGS)

test-core: $(VENV)/installed-test-core
	$(BIN)/python -m pytest $(CORE) $(PYTEST_ARGS)

test-tpu: $(VENV)/installed-test-tpu  ## kernels compile for TPUs; no TPU is needed, Python 3.12 or newer is
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest tests/kernels/test_compiled.py $(PYTEST_ARGS)

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

$(VENV)/installed-serve: pyproject.toml | $(BIN)/python
	$(INSTALL) '.[serve]'
	touch $@

$(VENV)/installed-test: pyproject.toml | $(BIN)/python
	$(INSTALL) '.[test,plot]'
	touch $@

$(VENV)/installed-test-core: pyproject.toml | $(BIN)/python
	$(INSTALL) '.[test-core]'
	touch $@

$(VENV)/installed-test-tpu: pyproject.toml | $(BIN)/python
	$(INSTALL) '.[test-core]' libtpu
	touch $@

$(VENV)/installed-dev: pyproject.toml | $(BIN)/python
	$(INSTALL) '.[dev]'
	touch $@

# Everything runs from a virtual environment in the checkout, made on first use and kept up to date with pyproject.toml.
#   make serve ARGS="--port 9000"      make test PYTEST_ARGS="-k budget"      make test MARKS=   (the slow ones too)
VENV := .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
PYTEST := $(VENV)/bin/python -m pytest
MARKS ?= not slow
SPEC := pyproject.toml setup.py constraints.txt $(wildcard kernels/dspark_kernels/cpu/*)
RUNTIME := $(VENV)/.installed
TESTING := $(VENV)/.installed-test

.PHONY: install serve test test-docker lint clean

install: $(RUNTIME)

serve: $(RUNTIME)
	@exec $(VENV)/bin/dspark-serve serve $(ARGS)

# The default model comes first, so that parallel test workers do not each fetch it. Two workers of one thread each use
# two cores best; a sample of the exactness tests runs before them as a server does, with all threads in one process.
test: lint
	@$(VENV)/bin/python -c "from dspark_serve.models.loader import resolve; resolve('smollm2-135m-instruct')"
ifndef PYTEST_ARGS
	$(PYTEST) -q tests/test_exactness.py -k "smollm2-0.8-ngram and (batch or chunk7)"
endif
	$(PYTEST) -n 2 --dist worksteal -m "$(MARKS)" $(PYTEST_ARGS)

# Builds the CPU image's content in a Debian root and serves from it: needs root and debootstrap, minutes and gigabytes.
# Where podman and podman-compose are, they do the same by README.md's own lines, then start configs/compose.yaml.
# TORCH_INDEX names the index of torch's CPU wheels; empty, it comes from where pip looks, with CUDA or without.
test-docker: $(TESTING)
	REPLAY=1 $(PYTEST) -n 0 tests/docker $(PYTEST_ARGS)

lint: $(TESTING)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV)

# A stamp is written only after pip succeeded; `venv` on an existing environment repairs it and keeps its packages.
$(RUNTIME): $(SPEC)
	@echo "Installing dspark-serve into $(VENV) (first time: a few minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -e .
	@touch $@

$(TESTING): $(SPEC)
	@echo "Installing dspark-serve and its test tools into $(VENV) (first time: a few minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -e '.[test]'
	@touch $(RUNTIME) $@

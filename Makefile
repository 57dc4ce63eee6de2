# Two commands do everything: `make demo` and `make test`. They make their own environment in .venv on first use;
# PYTHON=python uses the interpreter and the environment that you already have.

VENV := .venv
RUN := $(or $(PYTHON),$(VENV)/bin/python)
# Torch first, in its pinned version: whatever depends on torch then finds it satisfied.
TORCH := $(shell grep '^torch==' constraints.txt)
PIP := $(RUN) -m pip install --disable-pip-version-check -q
install = $(PIP) $(TORCH) && $(PIP) -c constraints.txt -e '.[$(1)]'

.PHONY: demo test docs bench guarantees clean

demo: $(VENV)/.demo  ## train the quickstart recipe on real data, offline, and print its report
	$(RUN) train.py fit --config recipes/digits_lamp.yaml

test: $(VENV)/.dev  ## lint, types, tests
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest -n auto

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.dev  ## the documentation, into site/; a warning is an error
	$(RUN) -m mkdocs build --strict

bench: $(VENV)/.demo  ## the measured results of the quickstart recipe, three seeds each
	$(RUN) benchmarks/recipes.py digits_lamp

guarantees: $(VENV)/.dev  ## runs every guarantee with every method and every peer, and writes the README's table
	$(RUN) -m benchmarks.guarantees

ifdef PYTHON
# In an environment of yours, pip looks each time: the stamp of one environment says nothing of another.
.PHONY: $(VENV)/.demo $(VENV)/.dev
$(VENV)/.demo:
	$(call install,demo)
$(VENV)/.dev:
	$(call install,dev)
else
$(VENV)/bin/python:
	python3 -m venv $(VENV)
$(VENV)/.demo: setup.cfg pyproject.toml constraints.txt | $(VENV)/bin/python
	$(call install,demo)
	touch $@
$(VENV)/.dev: setup.cfg pyproject.toml constraints.txt | $(VENV)/bin/python
	$(call install,dev)
	touch $@
endif

clean:
	rm -rf $(VENV) *.egg-info build dist site .mypy_cache .ruff_cache .pytest_cache

VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: help install quickstart lint test chaos clean

help:
	@echo "make quickstart  install into $(VENV), train, export and prove a small decoder"
	@echo "make test        lint and run every test"
	@echo "make chaos       kill runs a hundred times, LONG=1 five hundred; figures to docs/reliability.md"
	@echo "make lint        ruff, mypy --strict on the host, the import contracts"
	@echo "make install     make $(VENV) with everything in it"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("raytx needs Python 3.11 or newer, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

install: $(VENV)/installed

quickstart: install
	$(RUN)/raytx train examples/quickstart.yaml

lint: install
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports

test: lint
	$(RUN)/pytest -m "not long"

chaos: install
	RAYTX_CHAOS_LONG=$(LONG) $(RUN)/pytest -m chaos
	$(RUN)/python tests/chaos/campaign.py $(if $(LONG),--kills 500 --each 25 --at-once 2,--kills 100)
	$(RUN)/python docs/make.py

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# `make check` before a push; .ci/run does the same from a clean checkout, installation included.
VENV ?= .venv
export VENV

.PHONY: help install check format lint types layers tests smoke reference constraints

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ \t/'

install:  ## an environment for development in .venv
	python3 -m venv $(VENV) && $(VENV)/bin/pip install -e '.[train,cpu,dev]' -c constraints.txt

check: format lint types layers tests  ## all that is quick; smoke is not

format:  ## formatting is as ruff would do it
	$(VENV)/bin/ruff format --check .

lint:
	$(VENV)/bin/ruff check .

types:
	$(VENV)/bin/mypy

layers:  ## who may import whom
	$(VENV)/bin/lint-imports

tests:
	$(VENV)/bin/pytest

smoke:  ## the quickstart at reduced size, twice
	.ci/smoke

reference:  ## docs/reference.md, from the code
	{ sed '/^```text$$/q' docs/reference.md && $(VENV)/bin/pipeline stages && printf '```\n'; } > docs/reference.new \
	  && mv docs/reference.new docs/reference.md

constraints:  ## constraints.txt, anew (needs uv)
	uv pip compile pyproject.toml --extra train --extra cpu --extra dev --universal --python-version 3.10 \
	  --no-header --no-annotate --no-emit-index-url --no-emit-find-links --upgrade -o constraints.txt

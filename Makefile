# The words that people and CI use. `make quickstart` and `make test` need nothing but Python >= 3.10; both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder

.PHONY: install format check docs test test-slow test-slurm test-gpu test-kernels test-oldest test-wheel bench quickstart quickstart-alitok clean

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

# Both systems on scanned digits, step by step. A chain that was cut off goes on where it stopped.
quickstart: install
	$(BIN)/aligntok chain chains/quickstart.yaml

quickstart-alitok: install
	$(BIN)/aligntok chain chains/quickstart_alitok.yaml

format: install
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

check: install
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) docs

# The documentation as a site, in build/site. Warnings are errors.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

test: install
	$(PYTEST) -m "not slow and not gpu and not slurm"

# What rounding could tip, with other kernels of the processor and with one thread.
test-kernels: install
	ATEN_CPU_CAPABILITY=default $(PYTEST) -m "kernels and not slow and not gpu"
	ATEN_CPU_CAPABILITY=avx2 $(PYTEST) -m "kernels and not slow and not gpu"
	ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) -m "kernels and not slow and not gpu"
	OMP_NUM_THREADS=1 $(PYTEST) -m "kernels and not slow and not gpu"

test-slow: install
	$(BIN)/pytest -m "slow and not gpu and not slurm"

# Signals, kills and hangs under a Slurm of two virtual nodes, from Debian's packages; as root. About ten minutes.
test-slurm: install
	$(BIN)/pytest -m slurm tests/slurm

test-gpu: install
	$(BIN)/pytest -m gpu

# With the lower bounds of pyproject.toml. Warnings of old packages are no errors.
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check -c .ci/oldest.txt -e '.[dev]'
	.venv-oldest/bin/pytest -n 2 --dist loadscope --no-loadscope-reorder -o filterwarnings=default -m "not slow and not gpu and not slurm"

# The built wheel in an empty environment: what README shows, from an empty folder, at a debug size.
test-wheel:
	$(PYTHON) .ci/wheel.py

# The short benchmarks; benchmarks/README.md lists the long ones.
bench: install
	$(BIN)/python benchmarks/data_path.py
	$(BIN)/python benchmarks/training_step.py

clean:
	rm -rf runs/quickstart runs/quickstart_alitok .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

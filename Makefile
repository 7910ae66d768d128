# Three commands for everyone: `make demo`, `make serve` and `make test`. They make their own virtual environment in .venv.

PYTHON ?= python3
BIN := .venv/bin
PINNED := -c constraints.txt
SOURCES := $(shell find src -type f -not -path '*/__pycache__/*' -not -path '*.egg-info/*')

# The environment holds either the installed package (demo) or an editable one with the tools (test). Stamps say which, so
# that repeated calls do nothing and the two commands may follow each other in any order.
INSTALLED := .venv/.installed
EDITABLE := .venv/.editable

# One process per core, each with one thread: most tests are too small for two. Many cores take no more memory than four.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 4 --dist worksteal

.PHONY: demo serve test test-slow lint clean

demo: $(INSTALLED)
	$(BIN)/onestepsr upscale examples/ -o outputs/demo --overwrite
	@echo
	@echo "Done: compare the pictures in examples/ with those in outputs/demo/ (four times the size)."

# Either environment does; one that is there is used.
serve: | $(BIN)/pip
	@$(BIN)/python -c 'import fastapi, uvicorn, prometheus_client, python_multipart, onestepsr' 2>/dev/null || \
	  $(BIN)/pip install $(PINNED) '.[serve]'
	$(BIN)/onestepsr serve

# The second run is as on a processor with AVX2 only.
test: lint
	$(PYTEST) -m "not slow"
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(PYTEST) -m "numeric and not slow"

test-slow: $(EDITABLE)
	$(PYTEST) -m slow

lint: $(EDITABLE)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis outputs/demo

$(INSTALLED): pyproject.toml constraints.txt $(SOURCES) | $(BIN)/pip
	rm -rf build
	$(BIN)/pip install $(PINNED) .
	rm -rf build $(EDITABLE)
	touch $@

$(EDITABLE): pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install $(PINNED) -e '.[test]'
	touch $(INSTALLED) $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "onestepsr needs Python 3.11 or newer; '$(PYTHON)' is not. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "No virtual environment could be made; on Debian and Ubuntu: apt install python3-venv"; exit 1; }

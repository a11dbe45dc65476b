# `make demo` and `make test` set up .venv themselves. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Packages are installed without byte code, which is written at the first import, and there are many fresh processes.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test fuzz lint floor latest wheel docs clean
.DELETE_ON_ERROR:

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip<26.2"
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[dev]"
	touch $@

# So that glibc keeps large blocks instead of returning them after each use, which would cost a fifth of the time.
demo: export MALLOC_MMAP_MAX_ := 0
demo: export MALLOC_TRIM_THRESHOLD_ := 8000000000
demo: $(VENV)/.installed  ## compress a real Whisper on real speech; see `research/demo.py --help`
	$(BIN)/python research/demo.py $(ARGS)

test: $(VENV)/.installed  ## unit tests, without network
	$(BIN)/python -m pytest $(ARGS)

fuzz: $(VENV)/.installed  ## thousands of generated broken inputs; docs/fuzzing.md has the counts
	$(BIN)/python -m pytest -n 0 -m fuzz tests/fuzz $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

floor: pyproject.toml constraints-floor.txt  ## the tests with the oldest versions that pyproject.toml allows
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/python -m pip install --quiet --constraint constraints-floor.txt --editable ".[dev]"
	.venv-floor/bin/python -m pytest $(ARGS)

latest: pyproject.toml  ## the tests with the newest versions that pyproject.toml allows
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable ".[dev]"
	.venv-latest/bin/python -m pytest $(ARGS)

wheel: $(VENV)/.installed
	$(BIN)/python -m build --wheel --outdir dist .

docs: .venv-docs/.installed  ## the site in site/; docstrings are read from the source, so that torch is not needed
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. .venv-docs/bin/mkdocs build --strict

.venv-docs/.installed: docs/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --requirement docs/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-docs .venv-floor .venv-latest build dist site *.egg-info

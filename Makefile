# `make demo` and `make test` set up .venv themselves. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint wheel clean
.DELETE_ON_ERROR:

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip<26.2"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# So that glibc keeps large blocks instead of returning them after each use, which would cost a fifth of the time.
demo: export MALLOC_MMAP_MAX_ := 0
demo: export MALLOC_TRIM_THRESHOLD_ := 8000000000
demo: $(VENV)/.installed  ## compress a real Whisper on real speech; see `research/demo.py --help`
	$(BIN)/python research/demo.py $(ARGS)

test: $(VENV)/.installed  ## unit tests, without network
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(VENV)/.installed
	$(BIN)/python -m build --wheel --outdir dist .

.PHONY: docs
docs: .venv-docs/.installed  ## the site in site/; docstrings are read from the source, so that torch is not needed
	PYTHONPATH=. .venv-docs/bin/mkdocs build --strict --quiet

.venv-docs/.installed: docs/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --requirement docs/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info

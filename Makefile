# make demo    install into .venv, run weak -> mim -> clip -> eval, print a table and the path of a report
# make test    install into .venv what the tests need too, run them
# make coverage    the tests again, with the lines and branches of w2s/ that none of them reaches, in htmlcov/
# make check   lint, format, types and layers
# make docs    the site, in site/: pages of docs/, of every command and every key; a dead link ends it
# make showcase-data    install into .venv, build the larger data set of real drawings (apt-get, dpkg-deb and npm are used)
#
# PYTHON=python3.12 chooses the interpreter, VENV=folder the environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The webdataset that open_clip's training code asks for, beside the one of the environment.
OLDEST := $(VENV)/webdataset-0.2.86

.DEFAULT_GOAL := help
.PHONY: help demo showcase-data test coverage check docs format clean

help:
	@sed -n '/^#/!q; s/^# //p' Makefile

demo: $(VENV)/.demo
	$(BIN)/w2s run

showcase-data: $(VENV)/.demo
	$(BIN)/w2s data build showcase

# A thread for each process: more of them wait for one another on the cores that the processes share.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.dev $(OLDEST)
	$(TESTS)
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest tests/data/shards/test_webdataset.py

coverage: $(VENV)/.dev
	$(TESTS) --cov --cov-report=term --cov-report=html

check: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy w2s
	$(BIN)/lint-imports

# The theme's advertisement of its successor is not about these pages.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(OLDEST): | $(VENV)/.dev
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ webdataset==0.2.86

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is missing or older than 3.11: install it, or say make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "error: $(PYTHON) cannot make $(VENV): install its venv module (Debian: python3-venv)" >&2; exit 2; }

# A stamp file a set of extras: installed again only when setup.cfg has changed.
$(VENV)/.demo: EXTRAS := demo
$(VENV)/.dev: EXTRAS := demo,dev
$(VENV)/.docs: EXTRAS := docs
$(VENV)/.demo $(VENV)/.dev $(VENV)/.docs: $(BIN)/python setup.cfg
	@echo "installing w2s[$(EXTRAS)] into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]' || \
		{ echo "error: the packages cannot be installed: is the package index reachable (see pip's lines above, and pip config list)?" >&2; exit 2; }
	@touch $@

# make demo | test | check | bench | bench-data | soak. PYTHON=python3.12 works in a virtual environment of its own.
PYTHON ?= python3
SUFFIX := $(if $(filter python3,$(PYTHON)),,$(patsubst python%,-%,$(notdir $(PYTHON))))
VENV := .venv$(SUFFIX)
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: demo test check bench bench-data soak

demo: $(READY)
	$(BIN)/python -u examples/demo/demo.py

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	shellcheck -x conf/arguments.sh examples/post_training/modelopt/*.sh .ci/run

bench: bench-data

bench-data: $(READY)
	$(BIN)/python bench/data.py

soak: $(READY)
	for test in tests/soak/*.py; do $(BIN)/python $$test || exit 1; done

$(READY): setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then $(BIN)/pip install -q torch==2.13.0; fi
	$(BIN)/pip install -q -e .[test,demo]
	touch $@

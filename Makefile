# make demo | model | test | check | bench | bench-data | soak    [PYTHON=python3.12]
# A PYTHON of another version than python3's works in a virtual environment of its own, such as .venv-3.12.
PYTHON ?= python3
VERSION_OF = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VERSION := $(call VERSION_OF,$(PYTHON))
VENV := .venv$(if $(filter $(VERSION),$(call VERSION_OF,python3)),,-$(VERSION))
BIN := $(VENV)/bin
READY := $(VENV)/.installed
MODEL := demo/SmolLM2-135M-Instruct
SHELL_FILES := .ci/run bench/gpu.sh $(wildcard conf/*.sh conf/*/*.sh examples/post_training/modelopt/*.sh examples/slurm/*.sbatch)

ifeq ($(VERSION),)
$(error $(PYTHON) does not run. Name a Python of at least 3.11: make PYTHON=/path/to/python3.11 ...)
endif

.PHONY: demo model test check bench bench-data soak

demo: $(MODEL)/config.json
	$(BIN)/python -u examples/demo/demo.py

test: $(MODEL)/config.json
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest tests --ignore=tests/soak --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations=15

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources $(SHELL_FILES)

bench: $(MODEL)/config.json
	$(BIN)/python bench/train.py --model $(MODEL)
	$(BIN)/python bench/generate.py $(MODEL)
	$(BIN)/python bench/convert.py
	$(BIN)/python bench/checkpoint.py
	$(BIN)/python bench/loss.py
	$(BIN)/python bench/log.py --model $(MODEL)
	$(BIN)/python bench/experts.py

ROWS ?= examples/data/gsm8k_train_400.jsonl
TOKENIZER ?= $(MODEL)
bench-data: $(MODEL)/config.json
	$(BIN)/python bench/data.py --rows $(ROWS) --tokenizer $(TOKENIZER)

soak: $(MODEL)/config.json
	for test in tests/soak/*.py; do PYTHONPATH=. $(BIN)/python $$test || exit 1; done

model: $(MODEL)/config.json

$(MODEL)/config.json: | $(READY)
	$(BIN)/python -u examples/demo/get_model.py $(MODEL)

$(READY): setup.py pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("expected Python 3.11 or later" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar off --editable '.[test,demo]'
	touch $@

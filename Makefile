# make setup   a virtual environment in .venv with the tested versions
# make check   linter, formatter and type checker
# make test    the tests
# make demo    render, encode, train, sample, evaluate: ends in outputs/demo/report.html
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The demo's batch of 16 needs a power of two: of the GPUs, or two CPU ranks on a machine without.
GPUS := $(shell nvidia-smi -L 2>/dev/null | wc -l)
RANKS ?= $(shell for n in 16 8 4 2 1; do [ $$n -le $(GPUS) ] && echo $$n && exit; done; echo 2)
# The tensors of tests and demo are small: more threads than one a process only wait for each other.
test demo: export OMP_NUM_THREADS = 1

.PHONY: setup check test demo tiny

setup: $(VENV)/.ready

$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

demo: setup
	$(BIN)/python -m pipelines.encode --input shapes
	$(BIN)/deepspeed --num_gpus $(RANKS) pipelines/train.py --config configs/train/shapes.yaml
	$(BIN)/python -m pipelines.sample --config configs/sample/shapes.yaml
	$(BIN)/python -m pipelines.evaluate --config configs/evaluate/shapes.yaml

# Makes the embedded VAE, text encoder and tokenizer again.
tiny: setup
	$(BIN)/python -m stages.make_tiny

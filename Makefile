# hetu: every target that needs an environment makes its own first, in .venv, and keeps it.

PYTHON ?= python3
VENV ?= .venv
# On a machine without an NVIDIA GPU this torch is installed before anything asks for one, so that a CPU build
# is taken where your package index offers it. To name an index of CPU builds: make TORCH_ARGS="--index-url ...".
TORCH ?= torch==2.13.0
TORCH_ARGS ?=
# Arguments for pytest, say: make test PYTEST_ARGS="-k layout"
PYTEST_ARGS ?=
# Processes of make train-torch, each with a GPU of its own where there are any
RANKS ?= $(shell nvidia-smi --list-gpus 2>/dev/null | wc -l | sed 's/^0$$/2/')

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo train train-torch test lint docs format bench clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

demo: $(VENV)/.demo  ## one graph over real documents under four parallel strategies
	$(BIN)/python examples/documents.py

train: $(VENV)/.demo  ## a language model under another strategy at every step; draws train_lm.png
	$(BIN)/python examples/train_lm.py

train-torch: $(VENV)/.demo $(VENV)/.transformers  ## a Llama of transformers in two processes: FSDP2 and context parallelism
	$(BIN)/torchrun --standalone --nproc-per-node $(RANKS) examples/train_hf.py

# The documentation is built beside mypy: each takes one core. Bytecode is kept whatever the environment says: every
# process of the tests would compile hetu again.
test:  ## ruff, mypy, the import direction, the documentation, then every test
	$(MAKE) --jobs=2 lint docs
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/.dev  ## ruff, mypy and the import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/import_direction.py

docs: $(VENV)/.dev  ## the documentation as a site in build/site, with warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

format: $(VENV)/.dev  ## rewrites the code as ruff wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.demo  ## the host's part of a run, a training step against plain torch, attention on one GPU and on two
	$(BIN)/python benchmarks/host.py
	$(BIN)/python benchmarks/training.py
	if command -v nvidia-smi >/dev/null; then \
		$(BIN)/python benchmarks/attention.py && $(BIN)/python benchmarks/parallel_work.py; fi
	if [ "$$(nvidia-smi --list-gpus 2>/dev/null | wc -l)" -ge 2 ]; then \
		$(BIN)/torchrun --nproc-per-node 2 benchmarks/parallel.py; fi

clean:  ## removes .venv and everything that tools left
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find hetu tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +

# The stamp is written last: an installation that was cut short is taken up again.
$(VENV)/.demo $(VENV)/.dev $(VENV)/.transformers: $(VENV)/.%: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --editable '.[$*]'
	touch $@

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hetu needs Python 3.11: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	command -v nvidia-smi >/dev/null || $(PIP) install --quiet $(TORCH_ARGS) '$(TORCH)'
	touch $@

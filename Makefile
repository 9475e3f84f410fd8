# Everything runs in .venv; the first target that needs it builds it.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

.PHONY: demo test check lint types docs bench setup clean help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/pip.done: constraints.txt
	@echo "Setting up $(VENV) (once, about a minute) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) --upgrade pip
	@touch $@

$(VENV)/run.done: $(VENV)/pip.done pyproject.toml
	@$(PIP_INSTALL) -e '.[vision]'
	@touch $@

$(VENV)/dev.done: $(VENV)/pip.done pyproject.toml
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/run.done

setup: $(VENV)/dev.done ## build the development environment

demo: $(VENV)/run.done ## fine-tune the bundled vision transformer on real digits
	@$(BIN)/veneer demo

test: $(VENV)/dev.done ## run the whole test suite
	@$(BIN)/python -m pytest -n 2 --dist worksteal

check: lint types docs ## lint, types, import arrows, docs examples, generated docs up to date

lint: $(VENV)/dev.done ## formatting and lint
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

types: $(VENV)/dev.done ## static types
	@$(BIN)/mypy

docs: $(VENV)/dev.done ## import arrows, docs examples, generated docs up to date
	@$(BIN)/python scripts/make_docs.py --check
	@$(BIN)/python -m pytest -q tests/house src

# The step in other number types and models, one block each: a name, and its options.
STEPS := bfloat16:--dtype=bfloat16:--batch=4 autocast:--autocast:--batch=4 dinov2-large:--model=dinov2-large:--batch=4
FEW := --methods "LoRA r16" "DoRA r16" "OFT 32"

bench: $(VENV)/dev.done ## measure, and fail when a stated limit is missed
	@status=0; results=benchmarks/results; \
	for b in step eval attach compiled many_adapters hold; do \
		echo "== $$b"; $(BIN)/python benchmarks/$$b.py --out $$results/$$b-latest.json || status=1; \
	done; \
	for s in $(STEPS); do \
		echo "== step, $${s%%:*}"; $(BIN)/python benchmarks/step.py --layers 1 --repeats 5 $$(echo $${s#*:} | tr : ' ') --out $$results/step-$${s%%:*}-latest.json || status=1; \
	done; \
	echo "== step, all-bfloat16"; $(BIN)/python benchmarks/step.py --dtype bfloat16 --narrow --layers 1 --batch 4 --repeats 5 $(FEW) --out $$results/step-all-bfloat16-latest.json || status=1; \
	echo "== step, llama-2048"; $(BIN)/python benchmarks/step.py --model llama-2048 --layers 1 --batch 1 --repeats 3 $(FEW) --out $$results/step-llama-2048-latest.json || status=1; \
	exit $$status

clean: ## remove the environment and caches
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

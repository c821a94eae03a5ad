# SPDX-License-Identifier: Apache-2.0
# The menu: `make` lists it. Each target is one command; all but `help` and `clean` complete the environment first.
PYTHON ?= python3
ENV := .venv/bin/python
COMPLETE = PYTHONPATH=scripts $(PYTHON) -m patchset.environment

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help env env-unsloth apply-patches status export-patches check-patches upgrade bundle compatibility lint format \
	test bench export-model clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

env: ## make or complete .venv and vendor/ (a no-op when up to date) [EXTRA=unsloth: with what Unsloth needs]
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 7) and "env: error: this Python is too old: 3.11 is needed")'
	@$(COMPLETE) $(addprefix --extra=,$(EXTRA))

env-unsloth: env
	@$(COMPLETE) --extra=unsloth

apply-patches: ## fetch the upstreams and lay patches/ and overlay/ on vendor/
	@PYTHONPATH=scripts $(PYTHON) -m patchset apply

status: ## per upstream: pristine, patched, edited or stale
	@PYTHONPATH=scripts $(PYTHON) -m patchset status

export-patches: ## write the edits committed in vendor/ back to patches/
	@PYTHONPATH=scripts $(PYTHON) -m patchset export

check-patches: env ## lint, apply to pristine trees, compare, import [UPSTREAM=x AGAINST=version: try another release]
	@$(ENV) -m patchset check $(if $(UPSTREAM),--upstream $(UPSTREAM)) $(if $(AGAINST),--against $(AGAINST))

upgrade: env ## UPSTREAM=x VERSION=y: move a pin, by a rebase in vendor/
	@$(ENV) -m patchset upgrade $(if $(UPSTREAM),--upstream $(UPSTREAM)) $(if $(VERSION),--version $(VERSION))

bundle: env ## dist/: complete diffs and patched wheels, usable without this repository
	@$(ENV) -m patchset bundle

compatibility: env ## write docs/compatibility.md: the series against the newest releases
	@$(ENV) -m patchset compatibility

lint: env ## ruff and mypy on our own code
	@$(ENV) -m ruff check
	@$(ENV) -m ruff format --check
	@$(ENV) -m mypy

format: env ## let ruff write the formatting and the simple fixes
	@$(ENV) -m ruff check --fix
	@$(ENV) -m ruff format

test: env-unsloth ## the whole test suite, tests/unsloth in a process of its own: importing Unsloth patches the other libraries
	@$(ENV) -m pytest -n 2 --dist loadfile
	@$(ENV) -m pytest tests/unsloth

bench: env ## rollout, memory and policy pass of each mode, of ASLR and of hyper-connections over plain; soft thoughts by size; gates
	@$(ENV) benchmarks/rollout.py
	@$(ENV) benchmarks/policy_pass.py
	@$(ENV) benchmarks/thoughts.py
	@$(ENV) benchmarks/aslr.py
	@$(ENV) benchmarks/hyper_connections.py
	@$(ENV) benchmarks/gates.py

export-model: env ## CHECKPOINT=runs/x/final OUT=dir [DTYPE=bfloat16] [ASLR=off] [GATING=off]: merge LoRA, write a standalone model
	@$(if $(and $(CHECKPOINT),$(OUT)),,echo "error: give both, e.g. make export-model CHECKPOINT=runs/x/final OUT=dir" >&2; exit 2;) \
		$(ENV) -m m3po_lab.export_model "$(CHECKPOINT)" "$(OUT)" --dtype "$(or $(DTYPE),float32)" --aslr "$(or $(ASLR),on)" \
		--gating "$(or $(GATING),on)"

clean: ## remove caches (scripts/rebuild_env.sh renews .venv and vendor/)
	@rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis

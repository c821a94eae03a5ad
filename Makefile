# SPDX-License-Identifier: Apache-2.0
# The menu: `make` lists it. Each target is one command; all but `help` and `clean` complete the environment first.
# PYTHON=python3.12 says which Python makes .venv; it stays that one until scripts/rebuild_env.sh.
ENV := . scripts/isolated.sh; .venv/bin/python
TOOL := bash scripts/overlay_tool.sh
BENCH := . scripts/isolated.sh; PYTHONPATH=benchmarks .venv/bin/python benchmarks

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help env env-docs env-unsloth apply-patches status export-patches check-patches upgrade bundle compatibility lint format \
	reference docs test test-vllm test-quick bench export-model clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

env: ## make or complete .venv and vendor/ (a no-op when up to date) [PYTHON=python3.12, EXTRA=unsloth, vllm or docs]
	@$(TOOL) patchset.environment $(addprefix --extra=,$(EXTRA))

env-docs: env
	@$(TOOL) patchset.environment --extra=docs

env-unsloth: env
	@$(TOOL) patchset.environment --extra=unsloth

apply-patches: ## fetch the upstreams and lay patches/ and overlay/ on vendor/
	@$(TOOL) patchset apply

status: ## per upstream: pristine, patched, edited or stale
	@$(TOOL) patchset status

export-patches: ## write the edits committed in vendor/ back to patches/
	@$(TOOL) patchset export

check-patches: env ## lint, apply to pristine trees, compare, import [UPSTREAM=x AGAINST=version or latest: try another release]
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

reference: env ## write the tables of docs/flags.md and docs/metrics.md from the code
	@$(ENV) -m m3po_lab.documentation.reference

docs: env-docs ## site/: the pages as a site with search; a dead link or anchor is an error
	@. scripts/isolated.sh; NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --quiet --strict

test: env-unsloth ## the whole test suite, tests/unsloth in a process of its own: importing Unsloth patches the other libraries
	@$(ENV) -m pytest -n 2 --dist loadfile
	@$(ENV) -m pytest tests/unsloth

test-vllm: env ## the tests of the plugin of vLLM, in an environment with the extra vllm (CPUs)
	@$(TOOL) patchset.environment --extra=vllm
	@$(ENV) -m pytest tests/vllm_plugin

test-quick: env ## the tests of the overlay but those marked slow, for the inner loop: about 3 minutes, one family, no download
	@$(ENV) -m pytest -n 2 --dist loadfile -m "not slow" tests/transformers tests/trl tests/invariants

bench: env ## rollout, memory and policy pass of each mode, of ASLR and of hyper-connections over plain; soft thoughts by size; gating functions
	@$(BENCH)/rollout.py
	@$(BENCH)/policy_pass.py
	@$(BENCH)/thoughts.py
	@$(BENCH)/aslr.py
	@$(BENCH)/hyper_connections.py
	@$(BENCH)/gates.py

export-model: env ## CHECKPOINT=runs/x/final OUT=dir [DTYPE=bfloat16] [ASLR=off] [GATING=off]: merge LoRA, write a standalone model
	@$(if $(and $(CHECKPOINT),$(OUT)),,echo "error: give both, e.g. make export-model CHECKPOINT=runs/x/final OUT=dir" >&2; exit 2;) \
		$(ENV) -m m3po_lab.export_model "$(CHECKPOINT)" "$(OUT)" --dtype "$(or $(DTYPE),float32)" --aslr "$(or $(ASLR),on)" \
		--gating "$(or $(GATING),on)"

clean: ## remove caches (scripts/rebuild_env.sh renews .venv and vendor/)
	@rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis

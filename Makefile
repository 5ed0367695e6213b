# Everything runs in .venv, which `make install` makes. A variable can follow a target: make test ARGS="-k salience"
SHELL := bash
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
ARGS ?=

.PHONY: help install demo test lint format-check ruff types layers format bench docs pins clean

help: ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-13s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## make .venv with the pinned dependencies and this package, editable

$(VENV)/.installed: pyproject.toml constraints/pins.txt tools/setup.sh
	@tools/setup.sh

demo: install ## train a small model and its twin (minutes), tell a story, draw a brain scan
	@$(BIN)/ncn demo $(ARGS)

# Both always run, so that one red run shows everything; pytest's summary comes last.
test: install ## lint, then the tests
	@failed=; $(MAKE) -k --no-print-directory lint || failed=lint; \
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup $(ARGS) || failed="$$failed tests"; \
	[ -z "$$failed" ] || { echo "failed: $$failed" >&2; exit 1; }

lint: format-check ruff types layers ## format, ruff, mypy and the layers of modules, as CI and pre-commit check them

format-check: install
	@$(BIN)/ruff format --check --quiet . || { echo "ruff format: these files are not formatted (make format):"; $(BIN)/ruff format --check .; }

ruff: install
	@$(BIN)/ruff check --quiet .

types: install
	@$(BIN)/mypy --no-error-summary

layers: install
	@out=$$($(BIN)/lint-imports 2>&1) || { echo "$$out"; exit 1; }

format: install ## rewrite the files as lint wants them
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: install ## measure speed and memory and write the tables of benchmarks/
	@$(BIN)/python -m benchmarks $(ARGS)

docs: install ## write docs/commands.md from the command line's own help and check every link
	@$(BIN)/python tools/build_docs.py

pins: install ## write the versions that are installed now to constraints/pins.txt
	@$(BIN)/python -m pip freeze --all --exclude-editable | grep -v '^pip==' | sed 's/+.*//' > constraints/pins.txt.new
	@mv constraints/pins.txt.new constraints/pins.txt

clean: ## remove caches and build products; .venv and what was trained stay
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

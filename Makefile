# What one does with tokentrail. `make` alone lists it.
#
#   PYTHON=…   the Python to make .venv with (3.11 or newer), instead of the first that is found
#   ARGS=…     more for the program that a target runs: make test ARGS="-k embedded"

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help run test test-matrix newcomer check gate chaos fuzz fuzz-decoder bench client lock compose-env system-packages clean

BIN := .venv/bin
PYTHON_OF_ATHERIS := python3.11
FUZZ_SECONDS ?= 60
PIP := $(BIN)/python -m pip install --disable-pip-version-check
LOCK := $(BIN)/uv pip compile pyproject.toml --universal --generate-hashes --no-config \
	--no-emit-index-url --no-emit-find-links --no-header --quiet --python-version 3.11 $(ARGS)

# pip, and on a terminal how far it is, for this takes half a minute. What it says of trouble it says in any case.
watched = if [ -t 1 ]; then \
		rm -f .venv/failed; { $(1) || echo $$? > .venv/failed; } | awk -v all="$$(grep -c '^[a-z].*==' $(lastword $(1)))" ' \
			/^(Collecting|Processing|Ignoring|Requirement already)/ { printf "\r  %d of %d packages", ++n, all; fflush() } \
			/^Installing collected/ { printf ", unpacking them"; fflush() } \
			END { print "" }'; \
		test ! -e .venv/failed; \
	else $(1) --quiet; fi

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | while IFS='|' read -r target what; do \
		printf '  make %-16s %s\n' "$$target" "$$what"; done

run: .venv/runtime ## the whole system with a small demo economy, until Ctrl-C; needs no other server
	@exec $(BIN)/tokentrail up --demo $(ARGS)

test: .venv/development ## every test, on servers of its own, or those of DATABASE_URL and BROKER_URL if that Redis is empty
	@$(BIN)/python -m pytest --numprocesses 3 --dist loadscope --no-loadscope-reorder $(ARGS)

test-matrix: .venv/development ## the tests on the oldest and newest Python at hand, with embedded and with Debian's servers
	@.ci/test-matrix $(ARGS)

newcomer: ## how long it takes from `git clone` to the first history, as an ordinary user with nothing of ours
	@.ci/newcomer.py

check: gate test ## what a change has to pass: formats, rules, types, imports, migrations, tests

gate: .venv/development ## check without the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/alembic upgrade head --sql > .venv/migrations.sql
	$(BIN)/squawk .venv/migrations.sql

chaos: .venv/development ## the long tests in which processes are killed and servers go away
	@TOKENTRAIL_CHAOS=long $(BIN)/python -m pytest tests/chaos --capture=no $(ARGS)

fuzz: .venv/development ## messages that nobody would send, for as long as it takes; then the decoder, for a minute
	@TOKENTRAIL_FUZZ=long $(BIN)/python -m pytest -o faulthandler_timeout=0 -n0 -s tests/fuzz $(ARGS)
	@if $(PYTHON_OF_ATHERIS) -c '' 2>/dev/null; then $(MAKE) --no-print-directory fuzz-decoder; else \
		echo "The decoder is not fuzzed by coverage: atheris needs Python 3.11, and there is none as python3.11."; fi

fuzz-decoder: .venv/development .venv-fuzz/made ## the decoder alone, for FUZZ_SECONDS (60); needs Python 3.11
	@cd tests && ../$(BIN)/python -m fuzz.corpus ../.venv-fuzz/corpus
	@PYTHONPATH=. .venv-fuzz/bin/python tests/fuzz/decoder.py -max_total_time=$(FUZZ_SECONDS) -max_len=8192 \
		-timeout=20 -rss_limit_mb=2048 -verbosity=0 -print_final_stats=1 -artifact_prefix=.venv-fuzz/ \
		.venv-fuzz/found .venv-fuzz/corpus

.venv-fuzz/made: requirements.lock tests/fuzz/requirements.txt
	@echo "Making .venv-fuzz with $$($(PYTHON_OF_ATHERIS) --version)"
	@$(PYTHON_OF_ATHERIS) -m venv --clear .venv-fuzz
	@.venv-fuzz/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes \
		--requirement requirements.lock --requirement tests/fuzz/requirements.txt
	@mkdir -p .venv-fuzz/found && touch $@

bench: .venv/development ## measure, beside the worker that most people would write
	@$(BIN)/python -m bench $(ARGS)

client: .venv/runtime ## the wheel with which other Python projects send events, in dist/
	@$(BIN)/python -m pip wheel --disable-pip-version-check --quiet --no-deps --no-build-isolation --wheel-dir dist ./client
	@ls -t dist/tokentrail_client-*.whl | head -n 1

lock: .venv/development ## write both lock files anew for pyproject.toml; ARGS=--upgrade for newer versions
	@$(LOCK) --group build --output-file requirements.lock
	@$(LOCK) --group dev --constraint requirements.lock --output-file requirements-dev.lock

compose-env: ## the passwords of docker-compose.yml, made once, in .env; what is there stays
	@umask 077; touch .env && chmod 600 .env || exit; \
	[ -z "$$(tail -c 1 .env)" ] || echo >> .env; \
	for name in POSTGRES_PASSWORD VALKEY_PASSWORD FLOWER_PASSWORD; do \
		if grep -q "^$$name=" .env; then echo ".env has $$name already: it stays."; else \
			printf '%s=%s\n' "$$name" "$$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')" >> .env; \
			echo "Wrote $$name to .env."; \
		fi; \
	done

system-packages: ## what the tests drive besides: a browser, Debian's servers (root on Debian)
	@.ci/system-packages

clean: ## remove .venv and every cache; the data of `make run` in .tokentrail stays
	@rm -rf .venv .venv-matrix .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/runtime: .venv/made-in requirements.lock pyproject.toml
	@echo "Installing what requirements.lock names"
	@$(call watched,$(PIP) --require-hashes --requirement requirements.lock)
	@$(PIP) --quiet --no-deps --no-build-isolation --editable .
	@touch $@

.venv/development: .venv/made-in requirements-dev.lock pyproject.toml
	@echo "Installing what requirements-dev.lock names"
	@$(call watched,$(PIP) --require-hashes --requirement requirements-dev.lock)
	@$(PIP) --quiet --no-deps --no-build-isolation --editable .
	@touch .venv/runtime $@

# A .venv works only where it was made and as long as its Python is there; else it is made again.
ifneq "$(shell $(BIN)/python -c '' 2>/dev/null && cat .venv/made-in 2>/dev/null)" "$(CURDIR)"
.PHONY: .venv/made-in
endif
.venv/made-in:
	@if [ -n "$$PYTHON" ]; then set -- "$$PYTHON"; \
		else set -- python3 python3.14 python3.13 python3.12 python3.11; fi; \
	for python; do \
		"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
		found="$$python"; \
		"$$python" -c 'import ensurepip, venv' 2>/dev/null || continue; \
		echo "Making .venv with $$("$$python" -c 'import platform, sys; \
			print("Python", platform.python_version(), "of", sys.executable)')"; \
		"$$python" -m venv --clear .venv && pwd -P > $@; \
		exit; \
	done; \
	if [ -n "$$found" ]; then \
		echo "$$found comes without venv: install it (Debian: apt-get install python3-venv)," \
			"or name another Python: make PYTHON=/path/to/python3." >&2; \
	else \
		echo "There is no Python 3.11 or newer as $$*: install one," \
			"or name yours: make PYTHON=/path/to/python3." >&2; \
	fi; \
	exit 1

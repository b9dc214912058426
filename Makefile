# The commands of this repository; `make` lists them.
#
#   PYTHON=…   Python (3.11 or newer) to make .venv with, instead of the first one found
#   ARGS=…     further arguments for the program that a target runs: make test ARGS="-k embedded"

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help run test test-matrix newcomer check gate chaos fuzz mutants bench client lock compose-env system-packages clean

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
LOCK := $(BIN)/uv pip compile pyproject.toml --universal --generate-hashes --no-config \
	--no-emit-index-url --no-emit-find-links --no-header --quiet --python-version 3.11 $(ARGS)

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | while IFS='|' read -r target text; do \
		printf '  make %-16s %s\n' "$$target" "$$text"; done

run: .venv/runtime ## run the whole system with a small demo economy until Ctrl-C; needs no other server
	@exec $(BIN)/tokentrail up --demo $(ARGS)

test: .venv/development ## run every test, on its own servers or on those of DATABASE_URL and BROKER_URL (an empty Redis)
	@$(BIN)/python -m pytest --numprocesses 3 --dist loadscope --no-loadscope-reorder $(ARGS)

test-matrix: .venv/development ## run the tests on the oldest and newest Python here, with embedded and with Debian's servers
	@.ci/test-matrix $(ARGS)

newcomer: ## measure the time from `git clone` to the first history, as an ordinary user with empty caches
	@.ci/newcomer.py

check: gate test ## run all that a change must pass: the gate and every test

gate: .venv/development ## check format, lint rules, types, imports and migrations
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/alembic upgrade head --sql > .venv/migrations.sql
	$(BIN)/squawk .venv/migrations.sql

chaos: .venv/development ## run the long fault tests: processes are killed, servers crash, connections break
	@TOKENTRAIL_CHAOS=long $(BIN)/python -m pytest tests/chaos tests/migrations/test_migrations.py::test_no_writer_waits_for_the_migration_of_many_burns --capture=no $(ARGS)

fuzz: .venv/development ## run the long tests with hostile messages
	@TOKENTRAIL_FUZZ=long $(BIN)/python -m pytest -o faulthandler_timeout=0 -n0 -s tests/fuzz $(ARGS)

mutants: .venv/development ## change the ledger and the schema in small ways, of which a test must notice each; takes an hour
	@$(BIN)/python tests/kit/with_external_servers.py env -u BROKER_URL $(BIN)/mutmut run --max-children 2 $(ARGS)
	@$(BIN)/mutmut results

bench: .venv/development ## measure throughput and latency, beside a plain Celery worker
	@$(BIN)/python -m bench $(ARGS)

client: .venv/runtime ## build the wheel for Python producers, in dist/
	@$(BIN)/python -m pip wheel --disable-pip-version-check --quiet --no-deps --no-build-isolation --wheel-dir dist ./client
	@ls -t dist/tokentrail_client-*.whl | head -n 1

lock: .venv/development ## write both lock files from pyproject.toml; ARGS=--upgrade for newer versions
	@$(LOCK) --group build --output-file requirements.lock
	@$(LOCK) --group dev --constraint requirements.lock --output-file requirements-dev.lock

compose-env: ## make the passwords of docker-compose.yml in .env; passwords that exist are kept
	@umask 077; touch .env && chmod 600 .env || exit; \
	[ -z "$$(tail -c 1 .env)" ] || echo >> .env; \
	for name in POSTGRES_PASSWORD VALKEY_PASSWORD FLOWER_PASSWORD; do \
		if grep -q "^$$name=" .env; then echo ".env already has $$name."; else \
			printf '%s=%s\n' "$$name" "$$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')" >> .env; \
			echo "Wrote $$name to .env."; \
		fi; \
	done

system-packages: ## install what the tests also use: a browser, Debian's servers (as root on Debian)
	@.ci/system-packages

clean: ## remove .venv and all caches; the data of `make run` in .tokentrail stays
	@rm -rf .venv .venv-matrix .mypy_cache .ruff_cache .pytest_cache .hypothesis mutants .import_linter_cache build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/runtime: .venv/made-in requirements.lock pyproject.toml
	@echo "Installing requirements.lock into .venv (about half a minute)"
	@$(PIP) --require-hashes --requirement requirements.lock
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

.venv/development: .venv/made-in requirements-dev.lock pyproject.toml
	@echo "Installing requirements-dev.lock into .venv (about a minute)"
	@$(PIP) --require-hashes --requirement requirements-dev.lock
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch .venv/runtime $@

# A .venv works only in the folder it was made in, and only while its Python exists; otherwise it is made again.
ifneq "$(shell $(BIN)/python -c '' 2>/dev/null && cat .venv/made-in 2>/dev/null)" "$(CURDIR)"
.PHONY: .venv/made-in
endif
.venv/made-in:
	@set -- python3 python3.14 python3.13 python3.12 python3.11; \
	[ -z "$$PYTHON" ] || set -- "$$PYTHON"; \
	for python; do \
		"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
		version=$$("$$python" -c 'import platform, sys; print("Python", platform.python_version(), "of", sys.executable)'); \
		if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
			echo "$$version has no venv module; on Debian: apt-get install python3-venv" >&2; continue; \
		fi; \
		echo "Making .venv with $$version"; \
		"$$python" -m venv --clear .venv && pwd -P > $@; \
		exit; \
	done; \
	echo "No usable Python 3.11 or newer found. Install one, or name one: make PYTHON=/path/to/python3" >&2; \
	exit 1

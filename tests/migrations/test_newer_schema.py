"""A deployment half-way: the schema is that of a later release, and this code's processes run on."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.kit.cli import run, started
from tests.kit.events import accrual, burn
from tests.kit.http import status
from tests.kit.servers import free_port
from tests.kit.wait import eventually
from worker.config import ROOT

#: What a later release may add to each table that workers write to.
NEXT = '''"""add notes

Why: a migration that this code does not know.
Deploy: any time, under load.
"""

from alembic import op

from migrations.steps import add_constraint, add_index, with_short_lock, steps

revision = "0003"
down_revision = "0002"

TABLES = ("account", "transaction_record", "accrual_record", "burned_credit", "rejected_event", "dead_letter",
          "global_token_balance", "token_flow")


def upgrade():
    with steps():
        with_short_lock("CREATE TABLE IF NOT EXISTS note (user_id text NOT NULL, text text NOT NULL)")
        for table in TABLES:
            with_short_lock(
                f"ALTER TABLE {table} ADD COLUMN IF NOT EXISTS note text,"
                " ADD COLUMN IF NOT EXISTS notes integer NOT NULL DEFAULT 0",
                on=table,
            )
        add_constraint("account", "ck_account_notes_not_negative", "CHECK (notes >= 0)")
        add_index("transaction_record", "ix_transaction_record_note", "(note) WHERE note IS NOT NULL")


def downgrade():
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} DROP COLUMN note, DROP COLUMN notes")
    op.execute("DROP TABLE note")
'''

NEWER = "The schema is at 0003, newer than this code (0002)"


@pytest.fixture
def newer_code(tmp_path):
    """A clone of a later release."""
    folder = tmp_path / "newer code"
    for name in ("migrations", "schema", "worker"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(ROOT / "celeryconfig.py", folder)
    (folder / "migrations" / "versions" / "0003_add_notes.py").write_text(NEXT)
    return folder


@pytest.fixture
def environment(stage):
    return {"DATABASE_URL": stage.database_url, "BROKER_URL": stage.broker_url}


def test_workers_and_commands_run_on_with_a_newer_schema(stage, environment, newer_code, tmp_path, tokentrail):
    old, new = stage.start(burn_patience=0), stage.publisher
    new.publish_all([accrual("ann", 10, "a-1"), burn("ann", 1, "b-1")])
    eventually(lambda: stage.balance("ann") == 9)

    refused = "The schema is at 0002 and this code needs 0003: run `tokentrail migrate`."
    assert run("worker", cwd=newer_code, **environment) == (1, "", f"tokentrail: {refused}\n")
    assert run("migrate", cwd=newer_code, **environment) == (0, "Migrated the schema from 0002 to 0003.\n", "")

    # The worker that runs already.
    new.publish_all(
        [accrual("ann", 1, "a-2"), burn("ann", 2, "b-2"), burn("ann", 100, "b-3"), accrual("ann", 5, "a-2")]
    )
    new.publish_all([accrual("bob", 3, "a-1")])
    eventually(lambda: stage.balance("bob") == 3 and stage.in_redis() == 0)
    assert stage.balance("ann") == 8
    assert [stage.count(table) for table in ("transaction_record", "rejected_event", "dead_letter")] == [5, 1, 1]
    assert old.stop() == 0

    # One that starts now.
    log = tmp_path / "said"
    with log.open("w") as output, started("worker", output=output, **environment):
        new.publish_all([burn("bob", 1, "b-1"), accrual("cid", 4, "a-1")])
        eventually(lambda: stage.balance("cid") == 4 and stage.balance("bob") == 2)
    assert log.read_text().startswith(f"{NEWER}; deploy the newer code soon.\n")
    assert stage.broken() == []

    # The commands (those of `migrate`: test_migrations.py).
    history = json.loads(tokentrail("history", "bob", "--json", **environment).out)
    assert [each["balanceAfter"] for each in history["transactions"]] == ["2", "3"]
    assert stage.rows("SELECT version_num FROM alembic_version") == [("0003",)]


def test_the_api_answers_from_a_newer_schema_and_warns_once(stage, environment, newer_code, tmp_path):
    assert run("migrate", cwd=newer_code, **environment)[0] == 0
    port = free_port()
    log = tmp_path / "said"
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as output, started("api", "--port", port, output=output, **environment) as api:
        eventually(lambda: status(f"{url}/readyz") == 200 or api.poll() is not None)
        paths = ("/readyz", "/api/account/transaction-history?userId=ann", "/readyz")
        assert [status(f"{url}{path}") for path in paths] == [200] * 3
    assert log.read_text().count("the schema is newer than this code, answering from it") == 1
    assert log.read_text().count(f"{NEWER}; deploy the newer code soon.") == 1

"""An older backup is restored and all events are published again with the same keys: nothing is lost or doubled."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import psycopg
import pytest

from tests.kit.events import accrual, burn
from tests.kit.wait import eventually
from worker.local.embedded.binaries import postgres_folder

USERS = [f"user-{n}" for n in range(7)]

BALANCES = "SELECT user_id, balance, sequence, rejections FROM account ORDER BY user_id"
RECORDS = """
    SELECT user_id, sequence, idempotency_key, type, amount, balance_before, balance_after
    FROM transaction_record ORDER BY user_id, sequence
"""
REJECTIONS = "SELECT user_id, number, idempotency_key, amount, reason FROM rejected_event ORDER BY user_id, number"
HASHES = "SELECT user_id, hash FROM transaction_record UNION ALL SELECT user_id, hash FROM rejected_event"


@pytest.fixture
def program(requires_program, database_url):
    """`program("pg_dump")`: of the server's major version, because an older one cannot read a newer server."""
    with psycopg.connect(database_url) as connection:
        major = connection.info.server_version // 10_000

    def find(name):
        folders = [postgres_folder(), *map(Path, os.environ["PATH"].split(os.pathsep))]
        fitting = [str(folder) for folder in folders if version(folder / name) == str(major)]
        return requires_program(name, path=os.pathsep.join(fitting) or str(postgres_folder() / "none"))

    return find


def version(program):
    """The major version; None when there is no such program."""
    if not os.access(program, os.X_OK):
        return None
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"\) (\d+)", said)[1]


def economy(begin, end):
    """Events of all users in turn; some burns exceed the balance and are rejected."""
    for n in range(begin, end):
        user = USERS[n % len(USERS)]
        if n // len(USERS) % 3 == 0:
            yield accrual(user, f"{10 + n}.000000000000000001", f"key-{n}")
        elif n % 5 == 0:
            yield burn(user, 1_000_000, f"key-{n}")
        else:
            yield burn(user, f"0.{n + 1}", f"key-{n}")


def test_after_an_older_backup_all_that_is_published_again_with_its_keys_counts_once(
    stage, program, empty_database_url, tmp_path
):
    dump = str(tmp_path / "tokens.dump")
    first, second, third = list(economy(0, 210)), list(economy(210, 420)), list(economy(420, 630))
    worker = stage.start(burn_patience=0)
    stage.publisher.publish_all(first)
    eventually(lambda: decided(stage) == len(first))
    with subprocess.Popen([program("pg_dump"), "--format=custom", f"--file={dump}", stage.database_url]) as backup:
        stage.publisher.publish_all(second)  # it holds any number of them
        assert backup.wait(60) == 0
    stage.publisher.publish_all(third)
    eventually(lambda: decided(stage) == 630 and stage.in_redis() == 0)
    worker.stop()
    lost, records, rejections = stage.rows(BALANCES), stage.rows(RECORDS), stage.rows(REJECTIONS)
    assert records
    assert rejections

    subprocess.run(
        [program("pg_restore"), "--exit-on-error", "--no-owner", f"--dbname={empty_database_url}", dump],
        check=True,
        timeout=60,
    )
    stage.database_url = empty_database_url
    kept = stage.rows(HASHES)
    assert len(first) <= decided(stage) <= len(first) + len(second)
    assert stage.rows(BALANCES) != lost
    assert stage.broken() == []

    stage.start(burn_patience=0)
    stage.publisher.publish_all([*first, *second, *third])
    eventually(lambda: decided(stage) == 630 and stage.in_redis() == 0)

    assert stage.rows(BALANCES) == lost
    assert stage.rows(RECORDS) == records
    assert stage.rows(REJECTIONS) == rejections
    assert set(kept) <= set(stage.rows(HASHES)), "what the backup held is as it was"
    assert stage.count("dead_letter") == 0
    assert stage.broken() == []


def decided(stage):
    return stage.count("transaction_record") + stage.count("rejected_event")

"""The latency of one event, from publish to commit, beside a bare commit and a bare write to Valkey."""

from __future__ import annotations

import time

from schema.publisher import Publisher

from .report import Report, Table, percentile
from .stage import BenchmarkError, Stage, tokentrail_worker
from .workload import events, open_accounts

USERS = 100
WARM_UP = 20
PAUSE = 0.05  # seconds between two events, so that the worker is idle
TIMEOUT = 60  # seconds; an idle worker takes milliseconds


def latency(stage: Stage, *, scale: float = 1.0) -> Report:
    count = max(int(300 * scale), 5)
    committed: list[float] = []
    commits: list[float] = []
    writes: list[float] = []
    sent = events(WARM_UP + count, USERS)
    with stage.run() as run:
        open_accounts(run.database_url, USERS)
        run.owner.execute("CREATE TABLE scratch (n int)")
        with run.workers(tokentrail_worker(), consumers=1), Publisher(stage.broker_url) as publisher:
            for number, event in enumerate(sent):
                began = time.perf_counter()
                publisher.publish(event)
                while (
                    run.owner.execute(
                        "SELECT FROM transaction_record WHERE user_id = %s AND idempotency_key = %s",
                        (event.user_id, event.idempotency_key),
                    ).fetchone()
                    is None
                ):
                    if time.perf_counter() - began > TIMEOUT:
                        raise BenchmarkError(f"An idle worker did not apply an event within {TIMEOUT} s.")
                    time.sleep(0.0005)
                read = time.perf_counter()
                run.owner.execute("INSERT INTO scratch VALUES (1)")
                durable = time.perf_counter()
                run.redis.set("scratch", 1)
                written = time.perf_counter()
                if number >= WARM_UP:
                    committed.append((read - began) * 1000)
                    commits.append((durable - read) * 1000)
                    writes.append((written - durable) * 1000)
                time.sleep(PAUSE)
        run.verify()
    measured = {
        "published → committed": committed,
        "PostgreSQL: one row, one commit": commits,
        "Valkey: one write": writes,
    }
    return Report(
        "latency",
        f"{count} events one at a time to an idle worker; the record is polled for every half millisecond",
        [
            Table(
                "milliseconds",
                ("", "p50", "p99"),
                [
                    (name, f"{percentile(values, 50):.1f}", f"{percentile(values, 99):.1f}")
                    for name, values in measured.items()
                ],
            )
        ],
        [],
        dict(measured),
    )

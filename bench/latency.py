"""One event at a time: from publishing until it can be read, beside what the servers alone take."""

from __future__ import annotations

import time

from schema.publisher import Publisher

from .report import Report, Table, percentile
from .stage import BenchmarkError, Stage, tokentrail_worker
from .workload import events, open_accounts

USERS = 100
WARM_UP = 20
_PAUSE = 0.05  # seconds between two events: the worker is idle again


def latency(stage: Stage, *, scale: float = 1.0) -> Report:
    """An idle worker's answer, a bare commit and a bare write to Valkey, in turn."""
    count = max(int(300 * scale), 5)
    committed: list[float] = []
    commits: list[float] = []
    writes: list[float] = []
    wanted = events(WARM_UP + count, USERS)
    with stage.run() as run:
        open_accounts(run.database_url, USERS)
        run.owner.execute("CREATE TABLE scratch (n int)")
        with run.workers(tokentrail_worker(), consumers=1), Publisher(stage.broker_url) as publisher:
            for number, event in enumerate(wanted):
                began = time.perf_counter()
                publisher.publish(event)
                while (
                    run.owner.execute(
                        "SELECT FROM transaction_record WHERE user_id = %s AND idempotency_key = %s",
                        (event.user_id, event.idempotency_key),
                    ).fetchone()
                    is None
                ):
                    if time.perf_counter() - began > 60:  # noqa: PLR2004 - an idle worker takes milliseconds
                        raise BenchmarkError("An idle worker did not apply an event within 60 s.")
                    time.sleep(0.0005)
                seen = time.perf_counter()
                run.owner.execute("INSERT INTO scratch VALUES (1)")
                durable = time.perf_counter()
                run.redis.set("scratch", 1)
                written = time.perf_counter()
                if number >= WARM_UP:
                    committed.append((seen - began) * 1000)
                    commits.append((durable - seen) * 1000)
                    writes.append((written - durable) * 1000)
                time.sleep(_PAUSE)
        run.verify()
    measured = {
        "published → committed": committed,
        "PostgreSQL: one row, one commit": commits,
        "Valkey: one write": writes,
    }
    return Report(
        "latency",
        f"{count} events one at a time to an idle worker; seen by polling every half millisecond",
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

"""How the look-up finds its rows: on tables that nobody has analysed, and on large ones."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import psycopg

from worker.ledger import store
from worker.ledger.deliveries import Delivery

from .report import Report, Table
from .stage import Run, Stage
from .workload import events, open_accounts

USERS = 10_000
KEYS = 500


class _Noted(psycopg.Cursor[Any]):
    """A cursor that keeps what it was asked."""

    asked: tuple[Any, Any]

    def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        self.asked = (query, params)
        return super().execute(query, params, **options)


def plans(stage: Stage, *, scale: float = 1.0) -> Report:
    """The plan and the time of one look-up of 500 keys."""
    many = max(int(1_000_000 * scale), 1000)
    timing = Table("one look-up of 500 new keys, milliseconds", ("records", "statistics", "median of 20", "highest"))
    plan = Table("the plan: nodes that read tables", ("records, statistics", "node"))
    figures: dict[str, Any] = {}
    with stage.run() as run:
        for table in ("transaction_record", "rejected_event"):
            run.owner.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)".encode())
        open_accounts(run.database_url, USERS)
        for records, analysed in ((0, False), (many, False), (many, True)):
            if records and not analysed:
                _fill(run, records)
            if analysed:
                run.owner.execute("ANALYZE")
            statistics = "analysed" if analysed else "never analysed"
            milliseconds, nodes = _look(run)
            timing.rows.append((f"{records:,}", statistics, f"{median(milliseconds):.1f}", f"{max(milliseconds):.1f}"))
            plan.rows += [(f"{records:,}, {statistics}", node) for node in nodes]
            figures[f"{records}, {statistics}"] = {"milliseconds": milliseconds, "nodes": nodes}
    return Report("plans", "the engine's own statement in a session as a worker has it", [timing, plan], [], figures)


def _look(run: Run) -> tuple[list[float], list[str]]:
    deliveries = [Delivery.of(event) for event in events(KEYS, USERS)]
    milliseconds = []
    with run.ledger_connection() as connection:
        for _ in range(20):
            began = time.perf_counter()
            with connection.cursor() as cursor:
                store.look_up(cursor, deliveries)
            milliseconds.append((time.perf_counter() - began) * 1000)
        with _Noted(connection) as noted:
            store.look_up(noted, deliveries)
            query, params = noted.asked
        lines = [row[0] for row in connection.execute(f"EXPLAIN (COSTS OFF) {query}".encode(), params)]
    nodes = [line.strip().removeprefix("->  ") for line in lines]
    return milliseconds, [node for node in nodes if "Scan" in node and " on " in node and "unnest" not in node]


def _fill(run: Run, count: int) -> None:
    """So many records, without the triggers and foreign keys that have no part in a look-up."""
    with run.owner.transaction():
        run.owner.execute("SET LOCAL session_replication_role = replica")
        run.owner.execute(
            """
            INSERT INTO transaction_record
            SELECT 'user-' || n %% %s, n / %s + 1, md5(n::text), 'accrual', 1, 0, 1, NULL, NULL, now(), sha256('p'),
                sha256('h'), 1
            FROM generate_series(0, %s) AS n
            """,
            (USERS, USERS, count - 1),
        )

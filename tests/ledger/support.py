"""Helpers of the ledger's tests."""

from __future__ import annotations

import contextlib
import queue
import threading
from concurrent.futures import wait
from datetime import UTC, datetime

from hypothesis import HealthCheck, settings
from structlog.testing import capture_logs

from schema.events import event_json
from tests.kit.wait import PATIENCE, eventually
from worker.config import Settings
from worker.ledger.deliveries import Delivery, IfShort, Origin
from worker.ledger.invariants import check
from worker.ledger.settle import Ledger

NOON = datetime(2026, 1, 31, 12, 0, 0, 123456, tzinfo=UTC)

TABLES = (
    "account",
    "transaction_record",
    "accrual_record",
    "burned_credit",
    "rejected_event",
    "dead_letter",
    "token_flow",
)

#: The same examples at every run. An example empties the tables itself, so one database serves them all.
repeatable = settings(
    deadline=None, derandomize=True, print_blob=False, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def settings_for(url, **changes):
    """Not validated, so that a test can provoke a statement timeout during a lock wait, which Settings rule out."""
    return Settings(DATABASE_URL=url).model_copy(update=changes)


def sent(*events, if_short=IfShort.REJECT):
    """Each event in a message of its own; the same event again is the same message again."""
    return [
        Delivery.of(event, Origin(f"tokens.{event.type}", body=event_json(event).encode()), if_short=if_short)
        for event in events
    ]


def told(outcomes):
    return [str(outcome) for outcome in outcomes]


def broken(connection):
    """The sentences of the invariants that do not hold."""
    return {found.sentence for found in check(connection)}


def assert_books_balance(connection):
    assert check(connection) == []


@contextlib.contextmanager
def as_forger(connection):
    """The owner's way past the triggers."""
    connection.execute("SET session_replication_role = replica")
    try:
        yield
    finally:
        connection.execute("RESET session_replication_role")


def empty(connection):
    with as_forger(connection), connection.transaction():
        for table in TABLES:
            connection.execute(f"DELETE FROM {table}")
        connection.execute("DELETE FROM global_token_balance WHERE issued IS NOT NULL")


def rows(connection):
    """Everything that is stored but surrogate numbers, table by table."""
    found = {}
    for table in (*TABLES, "global_token_balance"):
        number = " - 'id'" if table in {"dead_letter", "burned_credit"} else ""
        query = f"SELECT (to_jsonb(t){number})::text FROM {table} t ORDER BY 1"
        found[table] = [row[0] for row in connection.execute(query)]
    return found


def count(connection, table, where="true"):
    return connection.execute(f"SELECT count(*) FROM {table} WHERE {where}").fetchone()[0]


def pid(connection):
    return connection.info.backend_pid


def waiting_for(observer, holder):
    """The backends that wait for a lock that the connection `holder` has, as PostgreSQL says it."""
    observer.execute("SELECT pg_stat_clear_snapshot()")  # else a transaction sees the activity of its first look
    found = observer.execute(
        "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND %s = ANY(pg_blocking_pids(pid))",
        (pid(holder),),
    )
    return [row[0] for row in found]


@contextlib.contextmanager
def holding(connection, *users):
    """The accounts' rows, locked by this connection meanwhile."""
    with connection.transaction():
        connection.execute("SELECT FROM account WHERE user_id = ANY(%s) ORDER BY user_id FOR UPDATE", (list(users),))
        yield


class Watched(Ledger):
    """A ledger that runs in the background, counts its transactions, and keeps what it reports and logs."""

    def __init__(self, url, submit, *, stripe=1, **settings):
        self.stop = threading.Event()
        self.reports = queue.Queue()
        self.said = []
        self.attempts = 0  # transactions
        self.waits = 0  # times it has waited for better times
        self._submit = submit
        self._running = []
        super().__init__(settings_for(url, **settings), stripe=stripe, stop=self.stop, degraded=self._keep)
        attempt, wait = self.session.attempt, self.session.wait

        def counted_attempt(deliveries, letters):
            self.attempts += 1
            return attempt(deliveries, letters)

        def counted_wait(error, pause):
            self.waits += 1
            return wait(error, pause)

        self.session.attempt, self.session.wait = counted_attempt, counted_wait

    def _keep(self, report):
        self.said.append(report)
        self.reports.put(report)

    def begin(self, deliveries, letters=()):
        """Settle in the background; a future of the outcomes."""
        self._running.append(self._submit(self.settle, deliveries, letters))
        return self._running[-1]

    def next_report(self):
        return self.reports.get(timeout=PATIENCE)

    def wait_again(self, times=2):
        """Until it has tried so many times more, and is waiting again."""
        enough = self.waits + times
        eventually(lambda: self.waits >= enough, f"wait no. {enough} of the ledger")

    def finish(self):
        wait(self._running, PATIENCE)
        self.close()


@contextlib.contextmanager
def logged():
    """The events logged meanwhile, by whatever thread."""
    with capture_logs() as entries:
        yield entries

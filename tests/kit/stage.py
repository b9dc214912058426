"""A database, a broker and real workers of a test's own, and the task events that Flower would receive."""

from __future__ import annotations

import threading
from decimal import Decimal
from typing import Any, Self

import psycopg
from celery import Celery
from celery.events import EventReceiver

from schema.broker import connect
from schema.publisher import Publisher
from tests.kit.workers import Worker
from worker.ledger.invariants import check

#: The path from which Flower's own page loads all tasks, as JSON.
LISTED = "/tasks/datatable?draw=1&start=0&length=20000&order[0][column]=0&columns[0][data]=name&order[0][dir]=asc"


class Stage:
    """One test's database, broker and workers."""

    def __init__(self, database_url: str, broker_url: str, folder: Any) -> None:
        self.database_url = database_url
        self.broker_url = broker_url
        self.publisher = Publisher(broker_url)
        self.redis = connect(broker_url)
        self.workers: list[Worker] = []
        self._folder = folder

    def start(self, *arguments: str, **settings: Any) -> Worker:
        """A worker that consumes. Settings are those of `worker.config`, by their names."""
        environment = {f"TOKENTRAIL_{name.upper()}": str(value) for name, value in settings.items()}
        environment |= {"DATABASE_URL": self.database_url, "BROKER_URL": self.broker_url}
        worker = Worker(f"worker-{len(self.workers)}", self._folder, environment, *arguments)
        self.workers.append(worker)
        return worker.ready()

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self._folder.glob("*.log")))

    def rows(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            return connection.execute(query, parameters).fetchall()

    def count(self, table: str) -> int:
        return int(self.rows(f"SELECT count(*) FROM {table}")[0][0])

    def balance(self, user_id: str) -> Decimal | None:
        rows = self.rows("SELECT balance FROM account WHERE user_id = %s", user_id)
        return rows[0][0] if rows else None

    def in_redis(self) -> int:
        return self.redis.llen("tokens") + self.redis.hlen("unacked") + self.redis.zcard("unacked_index")

    def broken(self) -> list[str]:
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            return [broken.sentence for broken in check(connection)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.publisher.close()
        self.redis.close()


class Watcher:
    """Receives every task event, as Flower does; by task id."""

    def __init__(self, broker_url: str) -> None:
        self.events: dict[str, list[dict[str, Any]]] = {}
        self._connection = Celery(broker=broker_url).connection_for_read()
        self._receiver = EventReceiver(self._connection, handlers={"*": self._note})
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._receiver.capture(limit=None, timeout=0.2, wakeup=False)
            except TimeoutError:
                continue

    def _note(self, event: dict[str, Any]) -> None:
        if event["type"].startswith("task-"):
            self.events.setdefault(event["uuid"], []).append(event)

    def last(self, task_id: str, field: str) -> Any:
        return self.events.get(task_id, [{}])[-1].get(field)

    def types(self, task_id: str) -> list[str]:
        return [event["type"] for event in self.events.get(task_id, [])]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(10)
        self._connection.release()

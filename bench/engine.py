"""The ledger's engine beside raw COPY: the same rows into the same tables, constraints and triggers on, in turn."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import psycopg

from worker.ledger import store
from worker.ledger.deliveries import Delivery
from worker.ledger.settle import Ledger

from .report import Report, Table, Target, rate, ratio
from .stage import Run, Stage
from .workload import events, open_accounts

ACCOUNTS = (1, 10, 10_000)
WARM_UP = 2  # batches, not timed

#: Events a batch → batches a run.
BATCHES = {1: 120, 50: 40, 500: 20}

_KEYS = "unnest(%(users)s::text[], %(keys)s::text[]) WITH ORDINALITY AS x (u, k, place)"


@dataclass
class Pair:
    """Seconds of each batch, the engine's and COPY's."""

    size: int
    users: int
    engine: list[float] = field(default_factory=list)
    copy: list[float] = field(default_factory=list)

    @property
    def engine_rate(self) -> float:
        return self.size * len(self.engine) / sum(self.engine)

    @property
    def copy_rate(self) -> float:
        return self.size * len(self.copy) / sum(self.copy)


def engine(stage: Stage, *, repetitions: int = 3, scale: float = 1.0) -> Report:
    """Batches of 1, 50 and 500 events over 1, 10 and 10,000 accounts."""
    kinds = [(size, users) for size in BATCHES for users in ACCOUNTS]
    found: dict[tuple[int, int], list[Pair]] = {kind: [] for kind in kinds}
    for repetition in range(repetitions):
        for size, users in kinds[:: 1 if repetition % 2 == 0 else -1]:
            batches = max(int(BATCHES[size] * scale), 2)
            found[size, users].append(measure(stage, size, users, batches, seed=repetition))
    table = Table(
        f"one connection, events/s, median of {repetitions}",
        ("events a batch", "accounts", "engine", "raw COPY", "engine ÷ COPY"),
        [
            (
                str(size),
                f"{users:,}",
                rate([pair.engine_rate for pair in pairs]),
                rate([pair.copy_rate for pair in pairs]),
                ratio([pair.engine_rate / pair.copy_rate for pair in pairs]),
            )
            for (size, users), pairs in found.items()
        ],
    )
    hot = [one.engine_rate / many.engine_rate for one, many in zip(found[500, 1], found[500, 10_000], strict=True)]
    return Report(
        "engine",
        "Ledger.settle, hash chain included, and raw COPY of the rows it wrote, batch by batch in turn; commits synced",
        [table],
        [
            *(
                Target(
                    f"batches of 500 over {users:,} accounts ÷ raw COPY",
                    median([pair.engine_rate / pair.copy_rate for pair in found[500, users]]),
                    0.35,
                )
                for users in ACCOUNTS
            ),
            Target("one hot account ÷ 10,000 accounts, batches of 500", median(hot), 1),
        ],
        {
            f"{size} a batch, {users} accounts": [
                {"engine": pair.engine_rate, "copy": pair.copy_rate} for pair in pairs
            ]
            for (size, users), pairs in found.items()
        },
    )


def measure(stage: Stage, size: int, users: int, batches: int, *, seed: int = 0) -> Pair:
    """One run on two fresh databases of one server: each batch on the one, then its rows on the other."""
    wanted = events((batches + WARM_UP) * size, users, seed=seed)
    pair = Pair(size, users)
    with stage.run() as ours, stage.run() as raw:
        open_accounts(ours.database_url, users)
        open_accounts(raw.database_url, users)
        ledger = Ledger(ours.settings(), stripe=1)
        try:
            with raw.ledger_connection() as connection:
                for number in range(batches + WARM_UP):
                    batch = wanted[number * size : (number + 1) * size]
                    deliveries = [Delivery.of(event) for event in batch]
                    began = time.perf_counter()
                    ledger.settle(deliveries)
                    between = time.perf_counter()
                    rows = _rows(ours, [event.user_id for event in batch], [event.idempotency_key for event in batch])
                    resumed = time.perf_counter()
                    copy(connection, rows)
                    ended = time.perf_counter()
                    if number >= WARM_UP:
                        pair.engine.append(between - began)
                        pair.copy.append(ended - resumed)
        finally:
            ledger.close()
        ours.verify()
        assert ours.records() == raw.records() == len(wanted)
    return pair


def copy(connection: psycopg.Connection[Any], rows: dict[str, bytes]) -> None:
    """What no engine can beat: rows that are there already, table by table, in one transaction."""
    with connection.transaction(), connection.cursor() as cursor:
        for table, lines in rows.items():
            with cursor.copy(f"COPY {table} ({store.RECORDED[table]}) FROM STDIN".encode()) as writing:
                writing.write(lines)


def _rows(run: Run, users: list[str], keys: list[str]) -> dict[str, bytes]:
    """What the engine wrote for these keys, as COPY reads it, in the order it was written."""
    found = {}
    for table in ("transaction_record", "accrual_record", "burned_credit"):
        columns = ", ".join(f"r.{column}" for column in store.RECORDED[table].split(", "))
        of_keys = (
            f"SELECT {columns} FROM {_KEYS} JOIN transaction_record t ON t.user_id = x.u AND t.idempotency_key = x.k"
            f" JOIN {table} r ON r.user_id = t.user_id AND r.sequence = t.sequence ORDER BY x.place"
        )
        with run.owner.cursor() as cursor:
            statement = f"COPY ({of_keys}) TO STDOUT".encode()
            with cursor.copy(statement, {"users": users, "keys": keys}) as reading:
                if lines := b"".join(bytes(part) for part in reading):
                    found[table] = lines
    return found

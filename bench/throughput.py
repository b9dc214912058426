"""Workers beside `naive.py`, on the same servers, with the same messages: published → committed and acknowledged."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from schema.events import Event
from schema.publisher import Publisher, bulks

from .report import Report, Table, Target, rate, ratio, spread
from .stage import Run, Stage, tokentrail_worker
from .workload import events, open_accounts

NAIVE: Final = (
    *(sys.executable, "-W", "ignore:You're running the worker with superuser privileges", "-m", "celery", "--quiet"),
    *("-A", "bench.naive", "worker", "-P", "prefork", "-c", "2", "-E"),
)
WARM_UP: Final = 40  # events
SHORTEST: Final = 0.01  # of the full length, that is worth every contender's start


@dataclass(frozen=True)
class Contender:
    """A way to get events applied."""

    name: str
    events: int
    users: int
    processes: int | None = None  # None: naive.py
    bulk: bool = False


def throughput(stage: Stage, *, repetitions: int = 3, scale: float = 1.0) -> Report:
    """All contenders in turn, in another order each time; of a run too short to measure anything, one of each kind."""
    some, many, bulk = (max(int(count * scale), 40) for count in (500, 20_000, 50_000))
    naive = Contender("naive.py, prefork, 2 children", some, 10_000)
    one, two = (Contender(f"ours, {n} process{'es' * (n > 1)}", many, 10_000, n) for n in (1, 2))
    hot_one, hot_two = (Contender(f"ours, {n} process{'es' * (n > 1)}", many, 1, n) for n in (1, 2))
    bulk_one, bulk_two = (
        Contender(f"ours, {n} process{'es' * (n > 1)}, apply_many of 500", bulk, 10_000, n, bulk=True) for n in (1, 2)
    )
    contenders = [naive, one, two, hot_one, hot_two, bulk_one, bulk_two]
    if scale < SHORTEST:
        contenders = [naive, one, bulk_one]
    found: dict[Contender, list[float]] = {contender: [] for contender in contenders}
    for repetition in range(repetitions):
        for contender in contenders[:: 1 if repetition % 2 == 0 else -1]:
            found[contender].append(measure(stage, contender, seed=repetition))

    def over(contender: Contender, other: Contender) -> list[float]:
        return [rate / base for rate, base in zip(found[contender], found[other], strict=True)]

    table = Table(
        f"published → committed and acknowledged, events/s, median of {repetitions}",
        ("", "accounts", "events/s", "lowest … highest", "× naive"),
        [
            (
                contender.name,
                f"{contender.users:,}",
                rate(found[contender]),
                spread(found[contender]),
                ratio(over(contender, naive)),
            )
            for contender in contenders
        ],
    )
    return Report(
        "throughput",
        "one event a message (but for apply_many), task events on, every commit and every write to Valkey synced",
        [table],
        [
            Target(name, median(over(contender, other)), wanted)
            for name, contender, other, wanted in (
                ("2 processes × naive", two, naive, 30),
                ("1 process × naive", one, naive, 15),
                ("apply_many of 500, 1 process × naive", bulk_one, naive, 55),
                ("one hot account ÷ 10,000 accounts, 1 process", hot_one, one, 1),
                ("one hot account ÷ 10,000 accounts, 2 processes", hot_two, two, 1),
            )
            if contender in found
        ],
        {f"{contender.name}, {contender.users} accounts": rates for contender, rates in found.items()},
    )


def measure(stage: Stage, contender: Contender, *, seed: int = 0) -> float:
    """Events per second of one run, its worker started and warm beforehand."""
    wanted = events(WARM_UP + contender.events, contender.users, seed=seed)
    with stage.run() as run:
        open_accounts(run.database_url, contender.users)
        run.owner.execute("INSERT INTO global_token_balance (id, issued, burned) VALUES (1, 0, 0)")
        processes = contender.processes
        command = NAIVE if processes is None else tokentrail_worker("--processes", str(processes))
        with (
            run.workers(command, consumers=processes or 1),
            Publisher(stage.broker_url) as publisher,
        ):
            for event in wanted[:WARM_UP]:
                publisher.publish(event)
            run.await_applied(WARM_UP)
            began = time.perf_counter()
            _publish(publisher, wanted[WARM_UP:], bulk=contender.bulk)
            run.await_applied(len(wanted))
            seconds = time.perf_counter() - began
        _check(run, contender.processes)
    return contender.events / seconds


def _publish(publisher: Publisher, wanted: Sequence[Event], *, bulk: bool) -> None:
    if bulk:
        for part in bulks(wanted):
            publisher.publish_bulk(part)
    else:
        publisher.publish_all(wanted)


def _check(run: Run, processes: int | None) -> None:
    if processes is not None:  # naive.py keeps neither hashes nor hours
        run.verify()

"""Workers beside `naive.py`, on the same servers and with the same messages: published → committed and acknowledged."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from schema.publisher import Publisher, bulks

from .report import Report, Table, Target, rate, ratio, spread
from .stage import Stage, tokentrail_worker
from .workload import events, open_accounts

NAIVE: Final = (
    *(sys.executable, "-W", "ignore:You're running the worker with superuser privileges", "-m", "celery", "--quiet"),
    *("-A", "bench.naive", "worker", "-P", "prefork", "-c", "2", "-E"),
)
WARM_UP: Final = 40  # events


@dataclass(frozen=True)
class Contender:
    """A way to get events applied. `name` selects it on the command line."""

    name: str
    title: str
    events: int
    users: int = 10_000
    processes: int | None = None  # None: naive.py
    bulk: bool = False


CONTENDERS: Final = (
    Contender("naive", "naive.py, prefork, 2 children", 500),
    Contender("1", "1 process", 20_000, processes=1),
    Contender("2", "2 processes", 20_000, processes=2),
    Contender("hot-1", "1 process", 20_000, 1, 1),
    Contender("hot-2", "2 processes", 20_000, 1, 2),
    Contender("bulk-1", "1 process, apply_many of 500", 50_000, processes=1, bulk=True),
    Contender("bulk-2", "2 processes, apply_many of 500", 50_000, processes=2, bulk=True),
)
NAMES: Final = tuple(contender.name for contender in CONTENDERS)

#: Sentence, contender, the other contender, the least ratio of their rates.
TARGETS: Final = (
    ("2 processes × naive", "2", "naive", 30),
    ("1 process × naive", "1", "naive", 15),
    ("apply_many of 500, 1 process × naive", "bulk-1", "naive", 55),
    ("one hot account ÷ 10,000 accounts, 1 process", "hot-1", "1", 1),
    ("one hot account ÷ 10,000 accounts, 2 processes", "hot-2", "2", 1),
)


def throughput(stage: Stage, *, turns: int = 3, scale: float = 1.0, only: Sequence[str] = NAMES) -> Report:
    """The contenders named in `only` in turn, in the reverse order every other turn."""
    contenders = [contender for contender in CONTENDERS if contender.name in only]
    rates: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for turn in range(turns):
        for contender in contenders[:: 1 if turn % 2 == 0 else -1]:
            rates[contender.name].append(measure(stage, contender, scale, seed=turn))

    def ratios(name: str, other: str) -> list[float]:
        return [rate / base for rate, base in zip(rates[name], rates[other], strict=True)]

    return Report(
        "throughput",
        "one event a message (but for apply_many), task events on, every commit and every write to Valkey synced",
        [
            Table(
                f"published → committed and acknowledged, events/s, median of {turns}",
                ("", "accounts", "events/s", "lowest … highest", "× naive"),
                [
                    (
                        contender.title,
                        f"{contender.users:,}",
                        rate(rates[contender.name]),
                        spread(rates[contender.name]),
                        ratio(ratios(contender.name, "naive")) if "naive" in rates else "",
                    )
                    for contender in contenders
                ],
            )
        ],
        [
            Target(sentence, median(ratios(name, other)), at_least)
            for sentence, name, other, at_least in TARGETS
            if name in rates and other in rates
        ],
        {f"{contender.title}, {contender.users} accounts": rates[contender.name] for contender in contenders},
    )


def measure(stage: Stage, contender: Contender, scale: float, *, seed: int = 0) -> float:
    """Events per second; the worker has started and applied some events before."""
    count = max(int(contender.events * scale), 40)
    sent = events(WARM_UP + count, contender.users, seed=seed)
    with stage.run() as run:
        open_accounts(run.database_url, contender.users)
        run.owner.execute("INSERT INTO global_token_balance (id, issued, burned) VALUES (1, 0, 0)")
        processes = contender.processes
        command = NAIVE if processes is None else tokentrail_worker("--processes", str(processes))
        with run.workers(command, consumers=processes or 1), Publisher(stage.broker_url) as publisher:
            for event in sent[:WARM_UP]:
                publisher.publish(event)
            run.await_applied(WARM_UP)
            began = time.perf_counter()
            if contender.bulk:
                for part in bulks(sent[WARM_UP:]):
                    publisher.publish_bulk(part)
            else:
                publisher.publish_all(sent[WARM_UP:])
            run.await_applied(len(sent))
            seconds = time.perf_counter() - began
        if processes is not None:  # naive.py writes no hashes and no hours
            run.verify()
    return count / seconds

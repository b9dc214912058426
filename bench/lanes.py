"""One process and four, while a trigger adds 40 ms to each transaction between its locks and its commit."""

from __future__ import annotations

import time
from statistics import median

from schema.publisher import Publisher

from .report import Report, Table, Target, rate, ratio
from .stage import Run, Stage, tokentrail_worker
from .workload import events, open_accounts

LANES = 4
USERS = 10_000

#: Events in a batch. Two processors manage some 4,000 events/s however many processes there are, and four processes
#: reach that with batches of 100, so batches of 500 have no target.
SIZES = (50, 100, 500)
SIZES_WITH_TARGET = (50, 100)

#: Like a slow disk or a distant standby: after the balances are written, before the stripe's row is locked.
_SLOW = """
    CREATE FUNCTION take_40_ms() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM pg_sleep(0.04);
        RETURN NULL;
    END $$;
    CREATE TRIGGER slow AFTER UPDATE ON account FOR EACH STATEMENT EXECUTE FUNCTION take_40_ms()
"""


def lanes(stage: Stage, *, turns: int = 3, scale: float = 1.0) -> Report:
    """One process for four lanes, and four processes of one lane each. A short run has one size of batches."""
    count = max(int(8000 * scale), 40)
    sizes = SIZES if scale >= 1 else SIZES[:1]
    rates: dict[tuple[int, int], list[float]] = {}
    for turn in range(turns):
        for batch_size in sizes:
            for processes in (1, LANES)[:: 1 if turn % 2 == 0 else -1]:
                measured = measure(stage, processes, count, batch_size, seed=turn)
                rates.setdefault((batch_size, processes), []).append(measured)
    ratios = {
        size: [many / one for one, many in zip(rates[size, 1], rates[size, LANES], strict=True)] for size in sizes
    }
    return Report(
        "lanes",
        "40 ms added to each batch between lock and commit; disjoint lanes",
        [
            Table(
                f"events/s, median of {turns}",
                ("events a batch", "1 process", f"{LANES} processes", "ratio"),
                [(str(size), rate(rates[size, 1]), rate(rates[size, LANES]), ratio(ratios[size])) for size in sizes],
            )
        ],
        [
            Target(f"4 processes ÷ one, batches of at most {size}", median(ratios[size]), 2.5)
            for size in SIZES_WITH_TARGET
            if size in ratios
        ],
        {f"{size} a batch, {processes} processes": values for (size, processes), values in rates.items()},
    )


def measure(stage: Stage, processes: int, count: int, batch_size: int, *, seed: int = 0) -> float:
    """Events per second."""
    sent = events(count + LANES, USERS, seed=seed)
    queues = ["tokens", *(f"tokens.{lane}" for lane in range(LANES))]
    commands = (
        [tokentrail_worker("--lanes", f"0-{LANES - 1}")]
        if processes == 1
        else [tokentrail_worker("--lanes", str(lane)) for lane in range(LANES)]
    )
    with stage.run() as run:
        open_accounts(run.database_url, USERS)
        _slow_down(run)
        with (
            run.workers(*commands, consumers=processes, batch_size=str(batch_size)),
            Publisher(stage.broker_url, lanes=LANES) as publisher,
        ):
            publisher.publish_all(sent[:LANES])
            run.await_applied(LANES, queues)
            began = time.perf_counter()
            publisher.publish_all(sent[LANES:])
            run.await_applied(len(sent), queues)
            seconds = time.perf_counter() - began
        run.verify()
    return count / seconds


def _slow_down(run: Run) -> None:
    run.owner.execute(_SLOW.encode())

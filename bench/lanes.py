"""Several processes while each transaction takes 40 ms more between its locks and its commit."""

from __future__ import annotations

import time
from statistics import median

from schema.publisher import Publisher

from .report import Report, Table, Target, rate, ratio
from .stage import Run, Stage, tokentrail_worker
from .workload import events, open_accounts

LANES = 4
USERS = 10_000

#: Events a batch. Two processors are busy with some 4,000 events/s however many processes there are, and four come
#: near that with batches of 100; those of 500 have no target.
SIZES = (50, 100, 500)
AIMED_AT = (50, 100)

#: A slow disk, a standby far away: after the balances are written, before the rows of the stripe are taken.
_SLOW = """
    CREATE FUNCTION take_40_ms() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM pg_sleep(0.04);
        RETURN NULL;
    END $$;
    CREATE TRIGGER slow AFTER UPDATE ON account FOR EACH STATEMENT EXECUTE FUNCTION take_40_ms()
"""


def lanes(stage: Stage, *, repetitions: int = 3, scale: float = 1.0) -> Report:
    """One process for four lanes, and four for one each; the same events. A short run has one size of batches."""
    count = max(int(8000 * scale), 40)
    sizes = SIZES if scale >= 1 else SIZES[:1]
    found: dict[tuple[int, int], list[float]] = {}
    for repetition in range(repetitions):
        for batch_size in sizes:
            for processes in (1, LANES)[:: 1 if repetition % 2 == 0 else -1]:
                rates = found.setdefault((batch_size, processes), [])
                rates.append(measure(stage, processes, count, batch_size, seed=repetition))
    ratios = {
        size: [many / one for one, many in zip(found[size, 1], found[size, LANES], strict=True)] for size in sizes
    }
    return Report(
        "lanes",
        "40 ms added to each batch between lock and commit; disjoint lanes",
        [
            Table(
                f"events/s, median of {repetitions}",
                ("events a batch", "1 process", f"{LANES} processes", "ratio"),
                [(str(size), rate(found[size, 1]), rate(found[size, LANES]), ratio(ratios[size])) for size in sizes],
            )
        ],
        [
            Target(f"4 processes ÷ one, batches of at most {size}", median(ratios[size]), 2.5)
            for size in AIMED_AT
            if size in ratios
        ],
        {f"{size} a batch, {processes} processes": rates for (size, processes), rates in found.items()},
    )


def measure(stage: Stage, processes: int, count: int, batch_size: int, *, seed: int = 0) -> float:
    """Events per second of one run."""
    wanted = events(count + LANES, USERS, seed=seed)
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
            publisher.publish_all(wanted[:LANES])
            run.await_applied(LANES, queues)
            began = time.perf_counter()
            publisher.publish_all(wanted[LANES:])
            run.await_applied(len(wanted), queues)
            seconds = time.perf_counter() - began
        run.verify()
    return count / seconds


def _slow_down(run: Run) -> None:
    run.owner.execute(_SLOW.encode())

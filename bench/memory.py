"""The memory of one worker over many events: it must not grow."""

from __future__ import annotations

import os
from pathlib import Path

from schema.publisher import Publisher

from .report import Report, Table, Target
from .stage import RUN_TIMEOUT, Stage, tokentrail_worker
from .workload import events, open_accounts

USERS = 10_000
PART = 10_000  # events published at a time, which bounds the backlog in Valkey


def memory(stage: Stage, *, scale: float = 1.0) -> Report:
    """Resident memory after each part; the target compares the last half with the first tenth."""
    parts = max(int(50 * scale), 4)
    part = PART if scale >= 1 else max(int(PART * scale), 40)
    resident: list[float] = []
    with stage.run() as run:
        open_accounts(run.database_url, USERS)
        with run.workers(tokentrail_worker(), consumers=1) as pids, Publisher(stage.broker_url) as publisher:
            for number in range(parts):
                publisher.publish_all(events(part, USERS, seed=number))
                run.await_applied((number + 1) * part)
                resident.append(_resident(pids[0]))
        run.verify()
    early, late = resident[max(parts // 10 - 1, 0)], max(resident[parts // 2 :])
    return Report(
        "memory",
        f"{parts * part:,} events through one worker, {part:,} at a time, at most {RUN_TIMEOUT:.0f} s each",
        [
            Table(
                "resident memory of the worker, MiB",
                ("events", "MiB"),
                [
                    (f"{(number + 1) * part:,}", f"{mebibytes:.1f}")
                    for number, mebibytes in enumerate(resident)
                    if (number + 1) % max(parts // 10, 1) == 0
                ],
            )
        ],
        [Target("after a tenth ÷ maximum of the second half", early / late, 0.95)],
        {"resident_mib": resident},
    )


def _resident(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

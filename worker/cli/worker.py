"""`tokentrail worker`: Celery workers that apply events, one or several under one parent."""

from __future__ import annotations

import os
import re
import sys
from typing import Annotated, Final

import typer

from worker.cli.usage import Misused
from worker.config import HOME, ROOT, settings
from worker.processes import Child, Family
from worker.readiness import look_at_servers

#: How every worker is started. One thread: the batch is the unit of work, and events of a worker share it.
CELERY: Final = (
    *("celery", "--quiet", "-A", "worker.app", "worker"),
    *("-P", "threads", "-c", "1"),
    "-E",  # events, so that Flower shows every task
    *("--without-mingle", "--without-gossip"),  # chatter between workers, which share nothing
)
#: Celery warns of running as root because messages may be pickled code. Ours are JSON, and nothing else is read.
_NO_WARNING: Final = ("-W", "ignore:You're running the worker with superuser privileges")
_LANES: Final = re.compile(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", re.ASCII)


def worker(
    processes: Annotated[int, typer.Option(min=1, max=256, help="Worker processes under one parent.")] = 1,
    lanes: Annotated[
        str | None, typer.Option(help="Also take these lanes of the queue, such as 0-3 or 0,2.", show_default=False)
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Its name in Flower; a number is appended to each of several.", show_default=False),
    ] = None,
) -> None:
    """Apply events until SIGTERM or SIGINT, which lets the batch under way finish.

    Several processes share one parent, which starts one that has ended again.
    """
    numbers = _lanes(lanes) if lanes is not None else []
    found = settings()
    for warning in look_at_servers(found):
        typer.echo(warning, err=True)
    name = name or f"worker-{os.getpid()}"
    command = [sys.executable, *_NO_WARNING, "-m", *CELERY, "--loglevel", found.log_level]
    if numbers:
        command += ["--queues", ",".join([found.queue, *(f"{found.queue}.{lane}" for lane in numbers)])]
    # Celery finds its settings in ROOT; there a relative folder would name other servers than those just looked at.
    environment = {**os.environ, "TOKENTRAIL_HOME": str(HOME.absolute())}
    if processes == 1:
        os.chdir(ROOT)
        os.execve(command[0], [*command, "--hostname", f"{name}@%h"], environment)  # noqa: S606 - our own interpreter
    _supervise(
        [
            Child(f"{name}-{n}", [*command, "--hostname", f"{name}-{n}@%h"], env=environment, cwd=ROOT)
            for n in range(1, processes + 1)
        ]
    )


def _supervise(children: list[Child]) -> None:
    """Keep all of them running until we are asked to stop; then let each finish its batch, however long that takes."""
    family = Family()
    with family.signals():
        for child in children:
            family.add(child)
        while not family.stopping:
            for dead in family.step(0.5):
                typer.echo(
                    f"{dead.name} {dead.last_words}; it is started again in {dead.restart_later():.0f} s.", err=True
                )
        family.stop(children, grace=None)


def _lanes(text: str) -> list[int]:
    if not _LANES.fullmatch(text):
        raise Misused("--lanes must be numbers and ranges such as 0-3 or 0,2.")
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if int(last or first) < int(first):
            raise Misused(f"--lanes: {part} ends before it begins.")
        found.update(range(int(first), int(last or first) + 1))
    return sorted(found)

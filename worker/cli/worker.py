"""`tokentrail worker`: one Celery worker that applies events, or several under one parent."""

from __future__ import annotations

import os
import re
import sys
from typing import Annotated, Final

import typer

from worker.cli.usage import UsageError
from worker.config import HOME, ROOT, load_settings
from worker.processes import Child, Family
from worker.readiness import check_servers

#: How every worker is started. Mingle and gossip are messages between workers, which need none; the rest is in
#: celeryconfig.py.
CELERY: Final = ("celery", "--quiet", "-A", "worker.app", "worker", "--without-mingle", "--without-gossip")
#: Celery warns of running as root because a pickled message is code. tokentrail accepts only JSON.
_NO_WARNING: Final = ("-W", "ignore:You're running the worker with superuser privileges")
_LANES: Final = re.compile(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", re.ASCII)


def worker(
    processes: Annotated[int, typer.Option(min=1, max=256, help="Worker processes under one parent.")] = 1,
    lanes: Annotated[
        str | None, typer.Option(help="Also serve these lanes of the queue, such as 0-3 or 0,2.", show_default=False)
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="The worker's name in Flower; each of several gets a number appended.", show_default=False),
    ] = None,
) -> None:
    """Apply events until SIGTERM or SIGINT; the batch in progress is finished first.

    With several processes, a parent restarts any that exits.
    """
    numbers = _parse_lanes(lanes) if lanes is not None else []
    settings = load_settings()
    for warning in check_servers(settings):
        typer.echo(warning, err=True)
    name = name or f"worker-{os.getpid()}"
    command = [sys.executable, *_NO_WARNING, "-m", *CELERY, "--loglevel", settings.log_level]
    if numbers:
        command += ["--queues", ",".join([settings.queue, *(f"{settings.queue}.{lane}" for lane in numbers)])]
    # Celery needs ROOT as its current folder to find celeryconfig.py; a relative TOKENTRAIL_HOME would change there.
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
    """Keep all of them running until this process is asked to stop; then wait until each has finished its batch."""
    family = Family()
    with family.signals():
        for child in children:
            family.add(child)
        while not family.stopping:
            for child in family.step(0.5):
                typer.echo(f"worker {child.ending}; restarting in {child.restart_later():.0f} s", err=True)
        family.stop(children, grace=None)


def _parse_lanes(text: str) -> list[int]:
    if not _LANES.fullmatch(text):
        raise UsageError("--lanes must be numbers and ranges such as 0-3 or 0,2.")
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if int(last or first) < int(first):
            raise UsageError(f"--lanes: {part} ends before it begins.")
        numbers.update(range(int(first), int(last or first) + 1))
    return sorted(numbers)

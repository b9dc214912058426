"""`python -m bench [NAMES]`: measure, print tables, and say which targets are met."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from worker.output import console as make_console

from .engine import engine
from .lanes import lanes
from .latency import latency
from .memory import memory
from .plans import plans
from .report import Report
from .stage import Stage
from .throughput import throughput

#: Name → benchmark; its argument is how much of the full length to run.
BENCHMARKS: Final[dict[str, Callable[[Stage, float], Report]]] = {
    "engine": lambda stage, scale: engine(stage, repetitions=_repetitions(scale), scale=scale),
    "plans": lambda stage, scale: plans(stage, scale=scale),
    "throughput": lambda stage, scale: throughput(stage, repetitions=_repetitions(scale), scale=scale),
    "latency": lambda stage, scale: latency(stage, scale=scale),
    "lanes": lambda stage, scale: lanes(stage, repetitions=_repetitions(scale), scale=scale),
    "memory": lambda stage, scale: memory(stage, scale=scale),
}
#: What takes too long to be run without being asked for.
ON_REQUEST: Final = ("memory",)
QUICK: Final = 0.2


def _repetitions(scale: float) -> int:
    return 3 if scale >= 1 else 1


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Some of: {', '.join(BENCHMARKS)}.")] = None,
    quick: Annotated[bool, typer.Option(help="A fifth of the events, once: to see that it works.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here, too.")] = None,
) -> None:
    """Measure on servers of our own that sync every commit and every write."""
    wanted = names or [name for name in BENCHMARKS if name not in ON_REQUEST]
    if unknown := set(wanted) - BENCHMARKS.keys():
        raise typer.BadParameter(f"There is no {', '.join(sorted(unknown))}: {', '.join(BENCHMARKS)}.")
    console = make_console()
    with Stage.of_its_own() as stage:
        reports = run(stage, wanted, QUICK if quick else 1.0, console)
    if json_file:
        found = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "processors": os.cpu_count(),
            "python": platform.python_version(),
            "quick": quick,
            "reports": [report.as_json() for report in reports],
        }
        json_file.write_text(json.dumps(found, indent=1) + "\n")


def run(stage: Stage, names: list[str], scale: float, console: Console) -> list[Report]:
    """The reports of these benchmarks, shown one after the other."""
    reports = []
    for name in names:
        report = BENCHMARKS[name](stage, scale)
        report.show(console)
        reports.append(report)
    return reports


if __name__ == "__main__":
    typer.run(main)

"""`python -m bench [NAMES]`: measure, print tables, and compare them with the targets."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
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
from .throughput import NAMES, throughput

BENCHMARKS: Final[dict[str, Callable[..., Report]]] = {
    "engine": engine,
    "plans": plans,
    "throughput": throughput,
    "latency": latency,
    "lanes": lanes,
    "memory": memory,
}
#: Benchmarks that report the median of several turns.
REPEATED: Final = {"engine", "throughput", "lanes"}
#: Benchmarks that run only when they are named, because they take long.
ON_REQUEST: Final = {"memory"}
QUICK_SCALE: Final = 0.2


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Some of: {', '.join(BENCHMARKS)}.")] = None,
    quick: Annotated[bool, typer.Option(help="A fifth of the events, one turn.")] = False,
    only: Annotated[list[str] | None, typer.Option(help=f"Of throughput: some of {', '.join(NAMES)}.")] = None,
    turns: Annotated[int | None, typer.Option(min=1, help="Turns of each measurement, instead of 3.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write each single figure to this file.")] = None,
) -> None:
    """Measure on servers of its own that sync every commit and every write."""
    chosen = names or [name for name in BENCHMARKS if name not in ON_REQUEST]
    if unknown := set(chosen) - BENCHMARKS.keys():
        raise typer.BadParameter(f"There is no {', '.join(sorted(unknown))}: {', '.join(BENCHMARKS)}.")
    if unknown := set(only or ()) - set(NAMES):
        raise typer.BadParameter(f"There is no {', '.join(sorted(unknown))}: {', '.join(NAMES)}.")
    with Stage.start() as stage:
        reports = run(stage, chosen, QUICK_SCALE if quick else 1.0, make_console(), turns=turns, only=only or NAMES)
    if json_file:
        figures = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "processors": os.cpu_count(),
            "python": platform.python_version(),
            "quick": quick,
            "reports": [report.as_json() for report in reports],
        }
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


def run(
    stage: Stage,
    names: Sequence[str],
    scale: float,
    console: Console,
    *,
    turns: int | None = None,
    only: Sequence[str] = NAMES,
) -> list[Report]:
    """Run these benchmarks one after the other and print their reports; `scale` 1 is the full length."""
    reports = []
    for name in names:
        benchmark = partial(BENCHMARKS[name], stage, scale=scale)
        if name in REPEATED:
            benchmark = partial(benchmark, turns=turns or (3 if scale >= 1 else 1))
        if name == "throughput":
            benchmark = partial(benchmark, only=only)
        reports.append(benchmark())
        reports[-1].print(console)
    return reports


if __name__ == "__main__":
    typer.run(main)

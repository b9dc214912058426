"""The report of a benchmark: tables with medians and ratios, and targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable


@dataclass
class Table:
    """Formatted figures; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)


@dataclass
class Target:
    """A ratio within one run, and the least that it must be."""

    sentence: str
    measured: float
    at_least: float

    @property
    def met(self) -> bool:
        return self.measured >= self.at_least


@dataclass
class Report:
    """The results of one benchmark. `figures` holds each single measurement."""

    name: str
    method: str
    tables: list[Table] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The whole report as a JSON object."""
        return {**asdict(self), "targets": [{**asdict(target), "met": target.met} for target in self.targets]}

    def print(self, console: Console) -> None:
        console.print(f"\n{self.name}: {self.method}", style="bold")
        for table in self.tables:
            rich_table = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD)
            for number, column in enumerate(table.columns):
                rich_table.add_column(column, justify="right" if number else "left")
            for row in table.rows:
                rich_table.add_row(*row)
            console.print(rich_table)
        for target in self.targets:
            verdict = "met" if target.met else "missed"
            console.print(
                f"  {verdict:6}  {target.sentence}: {target.measured:.2f}, target {target.at_least:g}",
                style="green" if target.met else "red",
            )


def rate(values: Sequence[float]) -> str:
    """The median of rates per second."""
    return f"{median(values):,.0f}"


def ratio(values: Sequence[float]) -> str:
    """The median of ratios."""
    middle = median(values)
    return f"{middle:.1f}" if middle >= 10 else f"{middle:.2f}"  # noqa: PLR2004 - three digits are plenty


def spread(values: Sequence[float]) -> str:
    """The lowest and the highest rate."""
    return f"{min(values):,.0f} … {max(values):,.0f}"


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` per cent of the values are."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)]

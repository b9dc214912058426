"""`tokentrail dead-letters`: messages without an outcome, looked at, replayed, discarded; their bodies purged."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import getpass
import json
import os
import re
import socket
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Final

import psycopg
import typer
from rich.table import Table

from schema.reasons import DEAD_LETTER_REASONS
from schema.tables import DEAD_LETTER_STATES
from worker.cli.usage import Misused, interruptible
from worker.config import settings
from worker.db import connect
from worker.ledger import letterbox
from worker.ledger.letterbox import DeadLetter, Filter, Message
from worker.output import console, count, moment, printable, progress, table
from worker.queue.replay import Report, refusal
from worker.queue.replay import replay as replay_letters
from worker.schema_version import check_schema

if TYPE_CHECKING:
    from worker.config import Settings

app = typer.Typer(
    help="Look at messages without an outcome, replay or discard them, purge their bodies.", no_args_is_help=True
)

_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_AGE: Final = re.compile(r"([0-9]{1,6})([smhdw])", re.ASCII)

#: Letters that were not replayed and are named; of more only the number is said.
_NAMED: Final = 10

#: Characters of a message that `show` prints; --json has all of it.
_SHOWN: Final = 4_000

Reasons = Annotated[
    list[str] | None,
    typer.Option("--reason", help=f"Of this reason: {', '.join(DEAD_LETTER_REASONS)}. Can be given several times."),
]
User = Annotated[str | None, typer.Option(help="Of this user.", show_default=False)]
Since = Annotated[
    str | None,
    typer.Option(help="Seen since then: an age such as 90m, 12h or 7d, or a time such as 2026-01-31T12:00:00Z."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable.")]
By = Annotated[str | None, typer.Option(help="Who does this, for the record. Default: the user of this machine.")]


@app.command("list")
def list_(
    reason: Reasons = None,
    user: User = None,
    since: Since = None,
    state: Annotated[str, typer.Option(help=f"In this state: {', '.join(DEAD_LETTER_STATES)}, or all.")] = "open",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many.")] = 20,
    before: Annotated[int | None, typer.Option(min=1, help="Only letters numbered lower: the next page.")] = None,
    as_json: AsJson = False,
) -> None:
    """List dead letters, newest first."""
    which = _filter([] if state == "all" else [state], reason, user, since)
    with _connection() as connection:
        found = letterbox.newest(connection, which, limit + 1, before)
    more, found = len(found) > limit, found[:limit]
    if as_json:
        typer.echo(json.dumps([_fields(kept) for kept in found], ensure_ascii=False, indent=2))
        return
    if not found:
        console().print("There are no such dead letters.")
        return
    console().print(_table(found))
    if more:
        console().print(f"There are more: --before {found[-1].id}")


@app.command()
def show(
    number: Annotated[int, typer.Argument(metavar="ID", help="As listed.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Show a dead letter with all that is kept of its message, and whether it could be replayed now."""
    found_settings = settings()
    with _connection() as connection:
        found = letterbox.find(connection, number)
    if found is None:
        raise Misused(f"There is no dead letter {number}.")
    kept, message = found
    why_not = refusal(kept, message, found_settings.max_amount)
    if as_json:
        typer.echo(
            json.dumps(_fields(kept) | _whole(message) | {"cannot_replay": why_not}, ensure_ascii=False, indent=2)
        )
        return
    made = table(f"Dead letter {number}", field="left", value="left")
    for name, value in _fields(kept).items():
        if value is not None:
            made.add_row(name.replace("_", " "), printable(str(value)))
    made.add_row("reason means", DEAD_LETTER_REASONS.get(kept.reason, ""))  # type: ignore[call-overload]
    for name, value in _readable(message).items():
        made.add_row(name, printable(value))
    if kept.state != "discarded":
        made.add_row("replay", "possible" if why_not is None else printable(f"not possible: {why_not}"))
    console().print(made)


@app.command()
def replay(
    numbers: Annotated[list[int] | None, typer.Argument(metavar="ID...", help="As listed.", show_default=False)] = None,
    reason: Reasons = None,
    user: User = None,
    since: Since = None,
    again: Annotated[
        bool, typer.Option("--again", help="Also letters that were replayed before and did not come back.")
    ] = False,
    by: By = None,
) -> None:
    """Publish the events of dead letters again: of those named, or of all open ones that the options describe.

    However often one is replayed, each of its events is applied once. Exit code 1 if a letter cannot be replayed.
    """
    if bool(numbers) == bool(reason or user or since):
        raise Misused("Name either letters by ID, or all of a --reason, a --user or a time (--since).")
    found = settings()
    states = ["open", "replayed"] if again else ["open"]
    which = _filter(states, reason, user, since)
    who = _who(by)
    with found.publisher() as publisher, _connection() as connection:
        wanted = list(dict.fromkeys(numbers)) if numbers else letterbox.numbers(connection, which)
        safe = "replaying again is safe, for each event counts once."
        with interruptible(lambda: safe), progress("replaying", len(wanted), console(stderr=True)) as advance:
            report = replay_letters(
                connection,
                publisher,
                wanted,
                states=frozenset(states),
                by=who,
                max_amount=found.max_amount,
                advance=advance,
            )
    _tell(report, found)
    if report.refused:
        raise typer.Exit(1)


@app.command()
def discard(
    numbers: Annotated[list[int], typer.Argument(metavar="ID...", help="As listed.", show_default=False)],
    reason: Annotated[str, typer.Option(help="Why they need no outcome, for the record.", show_default=False)],
    by: By = None,
) -> None:
    """Close open dead letters that need no outcome. They stay on record, and cannot be replayed any more."""
    if not reason.strip():
        raise Misused("--reason must say why.")
    _refuse_untypable("--reason", reason)
    wanted = list(dict.fromkeys(numbers))
    with _connection() as connection:
        done = letterbox.discard(connection, wanted, _who(by), reason)
        left = {number: letterbox.find(connection, number) for number in wanted if number not in done}
    typer.echo(f"Discarded {count(len(done), 'dead letter')}.")
    for number, found in left.items():
        if found is None:
            typer.echo(f"{number} was not: there is no such letter.", err=True)
        else:
            typer.echo(f"{number} was not: it is {found[0].state}, and only open ones can be.", err=True)
    if left:
        raise typer.Exit(1)


@app.command()
def purge(
    older_than: Annotated[
        str, typer.Option(help="An age such as 90d, by when they were last seen.", show_default=False)
    ],
) -> None:
    """Remove the bodies of old dead letters. Everything else about them is kept for ever.

    The body of an open letter that nothing else is kept of stays: discard the letter first.
    """
    age = _age(older_than)
    if age is None:
        raise Misused("--older-than must be an age such as 90d, 12h or 0s.")
    with _connection() as connection:
        total, spared = letterbox.purgeable(connection, age)
        purged = 0
        rest = "bodies removed by now are gone; purge again for the rest."
        with interruptible(lambda: rest), progress("purging", total, console(stderr=True)) as advance:
            for some in letterbox.purge(connection, age):
                purged += some
                advance(some)
    typer.echo(f"Purged the bodies of {count(purged, 'dead letter')}.")
    if spared:
        typer.echo(f"Kept the bodies of {spared:,} open ones that nothing else is kept of: discard these first.")


@contextlib.contextmanager
def _connection() -> Iterator[psycopg.Connection]:
    found = settings()
    with connect(found.database(), found, name="tokentrail cli") as connection:
        check_schema(connection)
        yield connection


def _filter(states: Sequence[str], reasons: Sequence[str] | None, user: str | None, since: str | None) -> Filter:
    for state in states:
        if state not in DEAD_LETTER_STATES:
            raise Misused(f"--state must be {', '.join(DEAD_LETTER_STATES)} or all.")
    for reason in reasons or ():
        if reason not in DEAD_LETTER_REASONS:
            raise Misused(f"--reason must be one of {', '.join(DEAD_LETTER_REASONS)}.")
    if user is not None:
        _refuse_untypable("--user", user)
    return Filter(states, list(reasons or ()), user, None if since is None else _since(since))


def _refuse_untypable(option: str, text: str) -> None:
    """Raise Misused for what PostgreSQL's text cannot hold: NUL, and bytes that the shell gave and are no UTF-8."""
    if "\x00" in text:
        raise Misused(f"{option} must not hold a NUL character.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise Misused(f"{option} must be UTF-8.")


def _since(text: str) -> datetime:
    if (age := _age(text)) is not None:
        return datetime.now(UTC) - age
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise Misused("--since must be an age such as 12h or 7d, or a time such as 2026-01-31T12:00:00Z.") from None
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _age(text: str) -> timedelta | None:
    found = _AGE.fullmatch(text)
    if not found:
        return None
    age = timedelta(**{_UNITS[found[2]]: int(found[1])})
    return min(age, timedelta(days=365 * 100))  # what datetime can subtract from today


def _who(by: str | None) -> str:
    """Who does this: as said, or as the machine says."""
    if by is not None:
        if not by.strip():
            raise Misused("--by must name somebody.")
        _refuse_untypable("--by", by)
        return by
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may run as a number without a name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def _tell(report: Report, found: Settings) -> None:
    what = f"{count(report.events, 'event')} of {count(report.letters, 'dead letter')}"
    typer.echo(f"Published {what} to the queue {found.queue}.")
    if not report.refused:
        return
    typer.echo(f"{count(len(report.refused), 'dead letter')} cannot be replayed:", err=True)
    for number, why in list(report.refused.items())[:_NAMED]:
        typer.echo(f"  {number}: {why}", err=True)
    if len(report.refused) > _NAMED:
        typer.echo(f"  and {len(report.refused) - _NAMED:,} more", err=True)


def _table(found: Sequence[DeadLetter]) -> Table:
    made = table(
        "Dead letters",
        id="right",
        last_seen="left",
        reason="left",
        state="left",
        user="left",
        key="left",
        deliveries="right",
        detail="left",
    )
    for kept in found:
        made.add_row(
            str(kept.id),
            moment(kept.last_seen_at),
            kept.reason,
            kept.state,
            printable(kept.user_id or ""),
            printable(kept.idempotency_key or ""),
            str(kept.deliveries),
            printable(kept.detail),
        )
    return made


def _fields(kept: DeadLetter) -> dict[str, Any]:
    """A row as JSON can hold it."""
    return {
        name: value.isoformat() if isinstance(value, datetime) else value.hex() if isinstance(value, bytes) else value
        for name, value in dataclasses.asdict(kept).items()
    }


def _whole(message: Message) -> dict[str, Any]:
    body = None if message.body is None else base64.b64encode(message.body).decode()
    return {"event": message.event, "headers": message.headers, "body_base64": body}


def _readable(message: Message) -> dict[str, str]:
    """What a person can read of the message, and how long the rest is."""
    parts = {
        "event": message.event,
        "headers": None if message.headers is None else json.dumps(message.headers, ensure_ascii=False),
        "body": None if message.body is None else message.body.decode(errors="replace"),
    }
    return {
        name: text if len(text) <= _SHOWN else f"{text[:_SHOWN]} … {len(text) - _SHOWN:,} characters more: --json"
        for name, text in parts.items()
        if text is not None
    }

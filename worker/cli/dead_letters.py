"""`tokentrail dead-letters`: list, show, replay and discard dead letters, and purge their bodies."""

from __future__ import annotations

import base64
import dataclasses
import getpass
import json
import os
import re
import socket
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final

import typer
from rich.table import Table

from schema.reasons import DEAD_LETTER_REASONS, DEAD_LETTER_STATES
from schema.text import is_storable
from worker.cli.ledger import connection as ledger_connection
from worker.cli.usage import UsageError, interruptible
from worker.config import load_settings
from worker.ledger import dead_letters
from worker.ledger.dead_letters import DeadLetter, Filter, StoredMessage
from worker.output import console, count, moment, printable, progress, table
from worker.queue.replay import Report, refusal
from worker.queue.replay import replay as replay_letters

app = typer.Typer(help="List dead letters, replay or discard them, and purge their bodies.", no_args_is_help=True)

_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_AGE: Final = re.compile(r"([0-9]{1,6})([smhdw])", re.ASCII)

_MAX_REFUSED: Final = 10  # letters that cannot be replayed and are listed one by one
_MAX_CHARACTERS: Final = 4_000  # of a message that `show` prints; --json has all of it

Reasons = Annotated[
    list[str] | None,
    typer.Option("--reason", help=f"With this reason: {', '.join(DEAD_LETTER_REASONS)}. Can be given several times."),
]
User = Annotated[str | None, typer.Option(help="Of this user.", show_default=False)]
Since = Annotated[
    str | None,
    typer.Option(help="Last seen since then: an age such as 90m, 12h or 7d, or a time such as 2026-01-31T12:00:00Z."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable.")]
By = Annotated[str | None, typer.Option(help="Your name, for the record. Default: user@machine.")]


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
    selection = _filter([] if state == "all" else [state], reason, user, since)
    with ledger_connection() as connection:
        letters = dead_letters.newest(connection, selection, limit + 1, before)
    more, letters = len(letters) > limit, letters[:limit]
    if as_json:
        typer.echo(json.dumps([_fields(letter) for letter in letters], ensure_ascii=False, indent=2))
    elif not letters:
        console().print("There are no such dead letters.")
    else:
        console().print(_table(letters))
        if more:
            console().print(f"There are more: --before {letters[-1].id}")


@app.command()
def show(
    number: Annotated[int, typer.Argument(metavar="ID", help="As listed.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Show a dead letter, the stored parts of its message, and whether it can be replayed now."""
    max_amount = load_settings().max_amount
    with ledger_connection() as connection:
        stored = dead_letters.find(connection, number)
    if stored is None:
        raise UsageError(f"There is no dead letter {number}.")
    letter, message = stored
    obstacle = refusal(letter, message, max_amount)
    if as_json:
        fields = _fields(letter) | _whole(message) | {"cannot_replay": obstacle}
        typer.echo(json.dumps(fields, ensure_ascii=False, indent=2))
        return
    rendered = table(f"Dead letter {number}", field="left", value="left")
    for name, value in _fields(letter).items():
        if value is not None:
            rendered.add_row(name.replace("_", " "), printable(str(value)))
    rendered.add_row("reason means", DEAD_LETTER_REASONS.get(letter.reason, ""))  # type: ignore[call-overload]
    for name, value in _readable(message).items():
        rendered.add_row(name, printable(value))
    if letter.state != "discarded":
        rendered.add_row("replay", "possible" if obstacle is None else printable(f"not possible: {obstacle}"))
    console().print(rendered)


@app.command()
def replay(
    numbers: Annotated[list[int] | None, typer.Argument(metavar="ID...", help="As listed.", show_default=False)] = None,
    reason: Reasons = None,
    user: User = None,
    since: Since = None,
    again: Annotated[
        bool, typer.Option("--again", help="Also letters that were replayed before and are not open again.")
    ] = False,
    by: By = None,
) -> None:
    """Publish the events of dead letters again: of the given ones, or of all open ones that the options select.

    However often a letter is replayed, each of its events is applied once. Exit code 1 if a letter cannot be replayed.
    """
    if bool(numbers) == bool(reason or user or since):
        raise UsageError("Give letter IDs, or select with --reason, --user or --since.")
    settings = load_settings()
    states = ["open", "replayed"] if again else ["open"]
    selection = _filter(states, reason, user, since)
    operator = _operator(by)
    with settings.publisher() as publisher, ledger_connection() as connection:
        ids = list(dict.fromkeys(numbers)) if numbers else dead_letters.ids(connection, selection)
        safe = "replaying again is safe, for each event counts once."
        with interruptible(lambda: safe), progress("replaying", len(ids), console(stderr=True)) as advance:
            report = replay_letters(
                connection,
                publisher,
                ids,
                states=frozenset(states),
                by=operator,
                max_amount=settings.max_amount,
                advance=advance,
            )
    _print_report(report, settings.queue)
    if report.refused:
        raise typer.Exit(1)


@app.command()
def discard(
    numbers: Annotated[list[int], typer.Argument(metavar="ID...", help="As listed.", show_default=False)],
    reason: Annotated[str, typer.Option(help="Why they need no outcome, for the record.", show_default=False)],
    by: By = None,
) -> None:
    """Close open dead letters that need no outcome. They stay on record and can no longer be replayed."""
    if not reason.strip():
        raise UsageError("--reason must say why.")
    _check_storable("--reason", reason)
    ids = list(dict.fromkeys(numbers))
    with ledger_connection() as connection:
        done = dead_letters.discard(connection, ids, _operator(by), reason)
        left = {number: dead_letters.find(connection, number) for number in ids if number not in done}
    typer.echo(f"Discarded {count(len(done), 'dead letter')}.")
    for number, stored in left.items():
        reason_why = "there is no such letter" if stored is None else f"it is {stored[0].state}, not open"
        typer.echo(f"{number} was not discarded: {reason_why}.", err=True)
    if left:
        raise typer.Exit(1)


@app.command()
def purge(
    older_than: Annotated[
        str, typer.Option(help="An age such as 90d, by when they were last seen.", show_default=False)
    ],
) -> None:
    """Remove the bodies of old dead letters. Everything else about them is kept for ever.

    Bodies of open letters of which nothing else was stored are kept; discard those letters first.
    """
    age = _age(older_than)
    if age is None:
        raise UsageError("--older-than must be an age such as 90d, 12h or 0s.")
    with ledger_connection() as connection:
        total, kept = dead_letters.count_purgeable(connection, age)
        purged = 0
        rest = "the bodies removed so far are gone; purge again for the rest."
        with interruptible(lambda: rest), progress("purging", total, console(stderr=True)) as advance:
            for some in dead_letters.purge(connection, age):
                purged += some
                advance(some)
    typer.echo(f"Purged the bodies of {count(purged, 'dead letter')}.")
    if kept:
        typer.echo(f"Kept the bodies of {kept:,} open ones of which nothing else was stored: discard these first.")


def _filter(states: Sequence[str], reasons: Sequence[str] | None, user: str | None, since: str | None) -> Filter:
    for state in states:
        if state not in DEAD_LETTER_STATES:
            raise UsageError(f"--state must be {', '.join(DEAD_LETTER_STATES)} or all.")
    for reason in reasons or ():
        if reason not in DEAD_LETTER_REASONS:
            raise UsageError(f"--reason must be one of {', '.join(DEAD_LETTER_REASONS)}.")
    if user is not None:
        _check_storable("--user", user)
    return Filter(states, list(reasons or ()), user, None if since is None else _since(since))


def _check_storable(option: str, text: str) -> None:
    """Raise UsageError for text that PostgreSQL cannot store: NUL, and bytes of the shell that are not UTF-8."""
    if not is_storable(text):
        raise UsageError(f"{option} must be UTF-8 without NUL characters.")


def _since(text: str) -> datetime:
    if (age := _age(text)) is not None:
        return datetime.now(UTC) - age
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError("--since must be an age such as 12h or 7d, or a time such as 2026-01-31T12:00:00Z.") from None
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _age(text: str) -> timedelta | None:
    match = _AGE.fullmatch(text)
    if not match:
        return None
    age = timedelta(**{_UNITS[match[2]]: int(match[1])})
    return min(age, timedelta(days=365 * 100))  # datetime cannot subtract much more from today


def _operator(by: str | None) -> str:
    """The operator's name: --by, or user@machine."""
    if by is not None:
        if not by.strip():
            raise UsageError("--by must not be empty.")
        _check_storable("--by", by)
        return by
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # in a container, a number without a name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def _print_report(report: Report, queue: str) -> None:
    published = f"{count(report.events, 'event')} of {count(report.letters, 'dead letter')}"
    typer.echo(f"Published {published} to the queue {queue}.")
    if not report.refused:
        return
    typer.echo(f"{count(len(report.refused), 'dead letter')} cannot be replayed:", err=True)
    for number, why in list(report.refused.items())[:_MAX_REFUSED]:
        typer.echo(f"  {number}: {why}", err=True)
    if len(report.refused) > _MAX_REFUSED:
        typer.echo(f"  and {len(report.refused) - _MAX_REFUSED:,} more", err=True)


def _table(letters: Sequence[DeadLetter]) -> Table:
    rendered = table(
        "Dead letters",
        id="right",
        **{"last seen (UTC)": "left"},
        reason="left",
        state="left",
        user="left",
        key="left",
        deliveries="right",
        detail="left",
    )
    for letter in letters:
        rendered.add_row(
            str(letter.id),
            moment(letter.last_seen_at),
            letter.reason,
            letter.state,
            printable(letter.user_id or ""),
            printable(letter.idempotency_key or ""),
            str(letter.deliveries),
            printable(letter.detail),
        )
    return rendered


def _fields(letter: DeadLetter) -> dict[str, Any]:
    """The row for JSON."""
    return {
        name: value.isoformat() if isinstance(value, datetime) else value.hex() if isinstance(value, bytes) else value
        for name, value in dataclasses.asdict(letter).items()
    }


def _whole(message: StoredMessage) -> dict[str, Any]:
    body = None if message.body is None else base64.b64encode(message.body).decode()
    return {"event": message.event, "headers": message.headers, "body_base64": body}


def _readable(message: StoredMessage) -> dict[str, str]:
    """The message as text, shortened."""
    parts = {
        "event": message.event,
        "headers": None if message.headers is None else json.dumps(message.headers, ensure_ascii=False),
        "body": None if message.body is None else message.body.decode(errors="replace"),
    }
    return {
        name: text
        if len(text) <= _MAX_CHARACTERS
        else f"{text[:_MAX_CHARACTERS]} … {len(text) - _MAX_CHARACTERS:,} characters more: --json"
        for name, text in parts.items()
        if text is not None
    }

"""The examples that `--help` shows for each command and group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    import typer

EXIT_CODES: Final = "Exit codes: 0 done, 1 failed or a server is unreachable, 2 bad command or setting, 130 Ctrl-C."

#: Command or group → one or several calls; the first entry is the program itself. A test checks that every command is
#: here, and that the command line parses every example; it runs none.
EXAMPLES: Final[Mapping[str, tuple[str, ...]]] = {
    "": (
        "tokentrail up --demo",
        "tokentrail publish --type accrual --user alice --amount 12.5 --source purchase --key order-4711",
        "tokentrail history alice",
    ),
    "up": ("tokentrail up", "tokentrail up --demo"),
    "demo": ("tokentrail demo", "tokentrail demo --events 300 --seed 7 --run monday"),
    "worker": ("tokentrail worker", "tokentrail worker --processes 4 --lanes 0-3"),
    "api": ("tokentrail api", "tokentrail api --port 8080"),
    "flower": ("tokentrail flower", "tokentrail flower --port 5556 -- --max-tasks=50000"),
    "publish": (
        "tokentrail publish --type accrual --user alice --amount 12.5 --source purchase --key order-4711",
        "tokentrail publish --type burn --user alice --amount 0.000777 --action embedding --key request-1",
        "tokentrail publish events.jsonl --bulk",
    ),
    "history": ("tokentrail history alice", "tokentrail history alice --page 2 --limit 50 --json"),
    "receipt": ("tokentrail receipt alice order-4711", "tokentrail receipt alice order-4711 --json"),
    "supply": ("tokentrail supply", "tokentrail supply --json"),
    "settings": ("tokentrail settings", "tokentrail settings --json"),
    "migrate": ("tokentrail migrate", "tokentrail migrate --sql --from 0001"),
    "migrate status": ("tokentrail migrate status",),
    "migrate new": ("tokentrail migrate new add_note_to_account",),
    "migrate stamp": ("tokentrail migrate stamp",),
    "migrate downgrade": ("tokentrail migrate downgrade", "tokentrail migrate downgrade --drop-history"),
    "dead-letters": (
        "tokentrail dead-letters list",
        "tokentrail dead-letters show 17",
        "tokentrail dead-letters replay 17",
    ),
    "dead-letters list": ("tokentrail dead-letters list", "tokentrail dead-letters list --reason conflict --since 7d"),
    "dead-letters show": ("tokentrail dead-letters show 17", "tokentrail dead-letters show 17 --json"),
    "dead-letters replay": (
        "tokentrail dead-letters replay 17 18",
        "tokentrail dead-letters replay --reason unknown_task --since 12h",
    ),
    "dead-letters discard": ('tokentrail dead-letters discard 17 --reason "a test message"',),
    "dead-letters purge": ("tokentrail dead-letters purge --older-than 90d",),
}


def show_examples(app: typer.Typer) -> None:
    """Put examples at the end of every help text, and the exit codes at the end of the program's."""
    app.info.epilog = f"{_epilog('')}\n\n{EXIT_CODES}"
    _show(app, "")


def _show(app: typer.Typer, prefix: str) -> None:
    for command in app.registered_commands:
        command.epilog = _epilog(f"{prefix}{_name(command)}")
    for group in app.registered_groups:
        assert group.typer_instance is not None
        group.epilog = _epilog(f"{prefix}{group.name}")
        _show(group.typer_instance, f"{prefix}{group.name} ")


def _name(command: typer.models.CommandInfo) -> str:
    assert command.callback is not None
    return command.name or command.callback.__name__


def _epilog(name: str) -> str | None:
    if name not in EXAMPLES:
        return None
    # typer joins lines to paragraphs; an empty line keeps them apart.
    return "\n\n".join(["Examples:" if len(EXAMPLES[name]) > 1 else "Example:", *EXAMPLES[name]])

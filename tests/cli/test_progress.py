"""What a terminal shows of something that takes a while, and that files and pipes get none of it."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import threading
from contextlib import closing, contextmanager
from typing import NamedTuple

import psycopg
import pytest

from schema.events import event_json
from schema.messages import ACCRUE
from tests.kit.events import accrual
from tests.kit.wait import eventually
from worker.config import ROOT, Settings
from worker.ledger.deliveries import Origin
from worker.ledger.settle import Ledger
from worker.migration import migrate
from worker.queue.parsing import letter_for

TOKENTRAIL = (sys.executable, "-m", "worker.cli")
PATIENCE = 60  # seconds within which everything a test waits for must happen

MIGRATORS = """
    SELECT count(*) FROM pg_stat_activity
    WHERE application_name = 'tokentrail migrate' AND datname = current_database()
"""


@pytest.fixture
def environment(database_url, broker_url):
    """Of a process: a terminal that can do what most can, wide enough for a statement."""
    return {
        **{name: value for name, value in os.environ.items() if name != "NO_COLOR"},
        "DATABASE_URL": database_url,
        "BROKER_URL": broker_url,
        "TERM": "xterm-256color",
        "COLUMNS": "200",
        "FORCE_COLOR": "1",  # as in many a CI, and no reason to draw a bar into a log
    }


class Terminal(NamedTuple):
    process: subprocess.Popen
    shown: bytearray
    reader: threading.Thread

    def shows(self, text):
        """Eventually, whatever was shown before and after it."""
        eventually(lambda: text in self.text() or not self.reader.is_alive())
        assert text in self.text()

    def text(self):
        """Without colours and the movements of the cursor, and with one space where there are several."""
        return re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.shown.decode(errors="replace")))


@contextmanager
def on_a_terminal(environment, *arguments):
    """The command, with a terminal of its own; killed in the end if it has not ended by then."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*TOKENTRAIL, *arguments], cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    shown = bytearray()

    def read():
        try:
            while said := os.read(ours, 4096):
                shown.extend(said)
        except OSError:  # nobody has the terminal open any more
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield Terminal(process, shown, reader)
        process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait()
        reader.join()
        os.close(ours)


@contextmanager
def on_a_pipe(environment, *arguments):
    """The command, as a log or another program hears of it; killed in the end if it has not ended by then."""
    with subprocess.Popen(
        [*TOKENTRAIL, *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_migration_shows_its_statement_and_that_it_waits_for_a_lock(environment, empty_database_url):
    """And prints nothing to a pipe while it runs."""
    migrate(empty_database_url, "0001")
    environment |= {"DATABASE_URL": empty_database_url}
    with psycopg.connect(empty_database_url) as reader, psycopg.connect(empty_database_url) as watcher:
        watcher.autocommit = True
        reader.execute("SELECT FROM burned_credit")
        with on_a_terminal(environment, "migrate") as terminal:
            terminal.shows("waiting for a lock: ALTER TABLE burned_credit")
            with on_a_pipe(environment, "migrate") as second:
                eventually(lambda: watcher.execute(MIGRATORS).fetchone() == (2,))
                reader.commit()
                terminal.shows("Migrated the schema from 0001 to 0002.")
                assert second.communicate(timeout=PATIENCE) == (
                    "The schema is at 0002 already: nothing to do.\n",
                    "another migration is running; waiting for it to end\n",
                )
    assert terminal.process.returncode == 0


def test_publishing_a_file_shows_how_far_it_is(environment, tmp_path):
    file = tmp_path / "events.jsonl"
    file.write_text("".join(f"{event_json(accrual('ann', 1, str(n)))}\n" for n in range(1_200)))

    with on_a_terminal(environment, "publish", str(file)) as terminal:
        terminal.shows("Published 1,200 events to the queue tokens.")
    assert re.search(r"checking \S+ 0/1200 ", terminal.text())
    assert re.search(r"publishing \S+ 0/1200 ", terminal.text())
    assert re.search(r"publishing \S+ 1200/1200 ", terminal.text())

    with on_a_pipe(environment, "publish", str(file)) as published:
        assert published.communicate(timeout=PATIENCE) == ("Published 1,200 events to the queue tokens.\n", "")


def test_replaying_dead_letters_shows_how_far_it_is(environment, database_url):
    letters = [
        letter_for(
            json.loads(event_json(accrual("ann", 1, str(n)))), "revoked", "It was revoked.", Origin(ACCRUE, str(n))
        )
        for n in range(3)
    ]
    with closing(Ledger(Settings(DATABASE_URL=database_url), stripe=1)) as ledger:
        ledger.settle([], letters)

    with on_a_terminal(environment, "dead-letters", "replay", "--user", "ann") as terminal:
        terminal.shows("Published 3 events of 3 dead letters to the queue tokens.")
    assert re.search(r"replaying \S+ 0/3 ", terminal.text())
    assert re.search(r"replaying \S+ 3/3 ", terminal.text())

    with on_a_pipe(environment, "dead-letters", "replay", "--user", "ann", "--again") as replayed:
        said = "Published 3 events of 3 dead letters to the queue tokens.\n"
        assert replayed.communicate(timeout=PATIENCE) == (said, "")

#!/usr/bin/env python3
"""From `git clone` to the first history on the screen, as somebody meets us who has never heard of us.

An ordinary user, a folder with a space in its name, an empty pip cache, no variable of tokentrail, and nobody
to answer a question. What is cloned is what is committed. Prints how many seconds it took; leaves nothing running.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOBODY = 65_534

#: Seconds in which README says it is done.
SAID = 120
#: Seconds after which something hangs.
PATIENCE = 900
#: make hands Ctrl-C on as it got it; where the signal is ignored, as after nohup, `tokentrail up` ends with 0 for it.
ENDED_BY_CTRL_C = (0, -signal.SIGINT)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="tokentrail newcomer ") as name:
        folder = Path(name)
        subprocess.run(
            ["git", "bundle", "create", "--quiet", folder / "tokentrail.bundle", "HEAD"], cwd=ROOT, check=True
        )
        (folder / "home").mkdir()
        user = {}
        if os.geteuid() == 0:
            user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
            for path in (folder, *folder.iterdir()):
                os.chown(path, NOBODY, NOBODY)
        environment = {"PATH": os.environ["PATH"], "HOME": str(folder / "home"), "PIP_NO_CACHE_DIR": "1"}
        log = folder / "screen"
        with log.open("w") as screen:
            began = time.monotonic()
            running = subprocess.Popen(
                ["/bin/sh", "-ec", "git clone --quiet tokentrail.bundle tokentrail; cd tokentrail; exec make run"],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=screen,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **user,
            )
        try:
            shown(log, running, "History of ", began)
            seconds = time.monotonic() - began
            shown(log, running, "tokentrail is running", began)
            look_at_its_pages(log.read_text())
        finally:
            code = stopped(running)
        left = that_name(folder)
        print(log.read_text())
        python = re.search(r"Making \.venv with (Python \S+)", log.read_text())
        print(f"From git clone to the first history: {seconds:.0f} s, with {python[1] if python else 'a Python'}.")
        if seconds > SAID:
            print(f"README says {SAID} s.")
        if code not in ENDED_BY_CTRL_C:
            print(f"make run ended with {code} after Ctrl-C.")
        if left:
            print(f"Still running: {left}")
        return 1 if code not in ENDED_BY_CTRL_C or left else 0


def shown(log: Path, running: subprocess.Popen[bytes], words: str, began: float) -> None:
    while words not in (said := log.read_text()):
        if running.poll() is not None or time.monotonic() > began + PATIENCE:
            sys.exit(f"{said}\n{words!r} was never shown; make run ended with {running.poll()}.")
        time.sleep(0.05)


def look_at_its_pages(said: str) -> None:
    """Those that it says it has. Raises unless each answers 200."""
    addresses = re.findall(r"^ +(?:history|API|Flower) +(http\S+)$", said, re.MULTILINE)
    assert len(addresses) == len(("history", "API", "Flower")), said
    local = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for address in addresses:
        with local.open(address, timeout=30) as answer:
            answer.read()


def stopped(running: subprocess.Popen[bytes]) -> int:
    """As Ctrl-C does it, and what make exited with."""
    if running.poll() is None:
        os.killpg(running.pid, signal.SIGINT)
    try:
        return running.wait(60)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()


def that_name(folder: Path) -> list[str]:
    """The processes that are left of what we started: of a program or data in the folder, whatever their session."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,args="], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if str(folder) in line]


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Measure the time from `git clone` to the first history on the screen, for a new user.

An ordinary user, a folder with a space in its name, an empty pip cache, no variables of tokentrail, no terminal. Clones
what is committed. Prints the seconds; exits with 1 if something is left running.
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

#: Seconds that README promises.
PROMISED_SECONDS = 120
#: Seconds after which it counts as hanging.
MAX_SECONDS = 900
#: make ends by the signal; where SIGINT is ignored, as under nohup, `tokentrail up` handles it and exits with 0.
EXIT_CODES = (0, -signal.SIGINT)


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
            wait_for(log, running, "History of ", began)
            seconds = time.monotonic() - began
            wait_for(log, running, "tokentrail is running", began)
            open_pages(log.read_text())
        finally:
            code = stop(running)
        left = processes_of(folder)
        print(log.read_text())
        python = re.search(r"Making \.venv with (Python \S+)", log.read_text())
        print(f"From git clone to the first history: {seconds:.0f} s, with {python[1] if python else 'a Python'}.")
        if seconds > PROMISED_SECONDS:
            print(f"README says {PROMISED_SECONDS} s.")
        if code not in EXIT_CODES:
            print(f"make run ended with {code} after Ctrl-C.")
        if left:
            print(f"Still running: {left}")
        return 1 if code not in EXIT_CODES or left else 0


def wait_for(log: Path, running: subprocess.Popen[bytes], text: str, began: float) -> None:
    while text not in (output := log.read_text()):
        if running.poll() is not None or time.monotonic() > began + MAX_SECONDS:
            sys.exit(f"{output}\n{text!r} was not printed; make run ended with {running.poll()}.")
        time.sleep(0.05)


def open_pages(output: str) -> None:
    """Open the printed URLs. Raises unless each answers 200."""
    addresses = re.findall(r"^ +(?:history|API|Flower) +(http\S+)$", output, re.MULTILINE)
    assert len(addresses) == len(("history", "API", "Flower")), output
    local = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for address in addresses:
        with local.open(address, timeout=30) as answer:
            answer.read()


def stop(running: subprocess.Popen[bytes]) -> int:
    """Stop it as Ctrl-C does; returns the exit code of make."""
    if running.poll() is None:
        os.killpg(running.pid, signal.SIGINT)
    try:
        return running.wait(60)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()


def processes_of(folder: Path) -> list[str]:
    """The processes whose program or data is in the folder."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,args="], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if str(folder) in line]


if __name__ == "__main__":
    sys.exit(main())

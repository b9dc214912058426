"""Private words that a reader would have to learn: the glossary in ARCHITECTURE.md has others for the same things."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: Regular expression → what to write instead.
INSTEAD = {
    r"sign of life": "heartbeat",
    r"in hand\b": "in flight",
    r"(put|puts|give|gives|gave|hand|hands|handed) (it |them |messages )?back\b": "requeue or restore",
    r"before the trail": "legacy",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\b(stand|stands|stood|standing|waits?|seconds) in line\b": "wait for the row lock",
    r"let(s)? go of": "release",
    r"\bweather\b": "transient error",
    r"\bwhose hands\b": "lock holder",
    r"\bof ours\b": "our, or tokentrail's",
    r"\banew\b": "again",
    r"\bnobody knows\b": "unknown",
    r"\bwhoever\b": "a noun: the producer, the operator, the worker",
}


def test_private_words_stand_nowhere():
    files = subprocess.run(["git", "ls-files", "--", *SCOPE], cwd=ROOT, capture_output=True, text=True, check=True)
    found = [
        f"{name}:{number}: {match[0]} → {plain}"
        for name in files.stdout.split()
        if Path(name) != Path(__file__).relative_to(ROOT) and not name.endswith((".lock", ".svg"))
        for number, line in enumerate((ROOT / name).read_text().splitlines(), 1)
        for word, plain in INSTEAD.items()
        if (match := re.search(word, line, re.IGNORECASE))
    ]
    assert found == []


SCOPE = ["bench", "client", "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"]

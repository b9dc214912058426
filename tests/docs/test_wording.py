"""Private words that a reader would have to learn: the glossary in ARCHITECTURE.md has others for the same things."""

from __future__ import annotations

import re
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


FOLDERS = ("schema", "worker", "migrations", "client", "bench", "docs", "tests")
FILES = [
    *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".lua", ".md"}),
    *(path for pattern in ("*.md", "*.py", "*.yml", "Makefile") for path in ROOT.glob(pattern)),
]


def test_private_words_stand_nowhere():
    private = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]} → {plain}"
        for path in FILES
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for word, plain in INSTEAD.items()
        if (match := re.search(word, line, re.IGNORECASE))
    ]
    assert private == []

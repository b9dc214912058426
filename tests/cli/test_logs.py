"""Each warning and error of the program is a sentence, is explained in docs/operating.md, and is met by a test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LEVELS = {"warning": "warning", "error": "error", "exception": "error", "critical": "critical"}

#: What no test brings about, and why.
NOT_MET = {
    "could not read a message": "a message that our own code fails on would be mended, not kept for a test",
}


def in_code():
    """Each event with its level; what differs from line to line is …"""
    for top in ("worker", "schema"):
        for path in sorted((ROOT / top).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                match node:
                    case ast.Call(ast.Attribute(ast.Name("log" | "logger"), level), [said, *_]) if level in LEVELS:
                        assert isinstance(said, ast.Constant), f"{path}:{node.lineno} says what no table can list"
                        yield re.sub(r"%[sdr]", "…", said.value), LEVELS[level]


def in_the_table():
    levels = "|".join(sorted({*LEVELS.values()}))
    text = (ROOT / "docs" / "operating.md").read_text()
    return re.findall(rf"^\| `([^`]+)` \| ({levels}) \| \S", text, re.MULTILINE)


def in_tests():
    """Every text in the tests, but for this module."""
    for path in {*(ROOT / "tests").rglob("*.py")} - {Path(__file__)}:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_each_warning_and_error_is_a_sentence():
    events = [event for event, _ in in_code()]
    assert len(events) > 20
    assert [event for event in events if len(event.split()) < 4 or "_" in event] == []


def test_the_table_lists_each_warning_and_error_and_nothing_else():
    assert sorted(in_the_table()) == sorted({*in_code()})


def test_each_warning_and_error_is_met_by_a_test():
    events = {event for event, _ in in_code()}
    assert events - {*in_tests()} == {*NOT_MET}

"""tests/README.md: the tests that stand behind each promise are there."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROWS = [line for line in (TESTS / "README.md").read_text().splitlines() if "`test_" in line and line.startswith("| ")]


def test_each_test_that_the_table_of_promises_names_exists():
    existing = {
        name
        for module in TESTS.rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", module.read_text(), re.MULTILINE)
    }
    named = {name for row in ROWS for name in re.findall(r"`(test_\w+)`", row)}
    assert named - existing == set()
    assert len(ROWS) >= 25

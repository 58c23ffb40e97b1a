"""docs/security.md names a test for each promise: each is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_test_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/security.md").read_text()))
    tests = "".join(path.read_text() for path in ROOT.glob("tests/*/test_*.py"))
    assert len(named) > 30
    assert named <= set(re.findall(r"^def (test_\w+)", tests, re.MULTILINE))

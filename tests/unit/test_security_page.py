"""docs/security.md and docs/operations.md name a test for each promise: each is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("page", "least"), [("security.md", 30), ("operations.md", 10)])
def test_every_test_that_the_page_names_exists(page: str, least: int) -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / page).read_text()))
    tests = "".join(path.read_text() for path in ROOT.glob("tests/*/test_*.py"))
    assert len(named) > least
    assert named <= set(re.findall(r"^def (test_\w+)", tests, re.MULTILINE))

"""Nothing that a test starts outlives it, however it ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import running


@pytest.fixture(autouse=True)
def no_agent_outlives_its_test() -> Iterator[None]:
    yield
    while running.all_started:
        running.all_started.pop().kill()

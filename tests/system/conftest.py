"""Nothing that a test starts outlives it, however it ends; a client of ours for the tests that need one."""

from __future__ import annotations

import collections
from collections.abc import Iterator

import pytest
import running
from proxy import Proxy

from agent_client import AgentConn


@pytest.fixture(autouse=True)
def no_agent_outlives_its_test() -> Iterator[None]:
    yield
    while running.all_started:
        running.all_started.pop().kill()


@pytest.fixture
def conn(box: running.RunningAgent) -> Iterator[AgentConn]:
    """Our own client's connection to the agent that a module's tests call box."""
    with AgentConn.dial(box.addr, running.TOKEN) as connection:
        yield connection


@pytest.fixture
def proxy(box: running.RunningAgent) -> Iterator[Proxy]:
    """In front of that agent."""
    started = Proxy(box.addr)
    yield started
    started.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many connections were cut, and how, and how many hostile inputs were sent: from what tests record."""
    counts: collections.Counter[str] = collections.Counter()
    inputs: collections.Counter[str] = collections.Counter()
    total = 0
    for report in [report for reports in terminalreporter.stats.values() for report in reports]:
        for name, value in getattr(report, "user_properties", ()) if getattr(report, "when", "") == "teardown" else ():
            if name == "inputs":
                inputs[value[0]] += value[1]
            if name == "cuts":
                how, place, direction, count = value
                total += count
                counts.update({how: count, place: count, direction: count})
    if total:
        words = "; ".join(f"{count} {what}" for what, count in counts.most_common())
        terminalreporter.write_sep("=", "connections that were cut")
        terminalreporter.write_line(f"{total} in all: {words}")
    if inputs:
        terminalreporter.write_sep("=", "hostile inputs")
        for what, count in inputs.items():
            terminalreporter.write_line(f"{count} {what}")

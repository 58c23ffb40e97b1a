"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from certificates import Authority
from support import Agent, RawClient


@pytest.fixture
def start_agent(tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    """Start agents of the test's own; each is stopped, by its own PID, at the end."""
    agents: list[Agent] = []

    def start(*flags: str, **options: Any) -> Agent:
        directory = tmp_path / f"agent{len(agents)}"
        directory.mkdir()
        agents.append(Agent(directory, *flags, **options))
        return agents[-1]

    yield start
    try:
        for agent in agents:
            agent.stop()
    finally:
        for agent in agents:
            agent.kill()


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """An agent without a main process, for all tests of a module."""
    agent = Agent(tmp_path_factory.mktemp("agent"))
    yield agent
    assert agent.stop() == 0
    assert "unexpected error" not in agent.log, agent.log


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Whom the tests of TLS trust."""
    return Authority(tmp_path_factory.mktemp("ours"), "ours")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Whom nobody trusts."""
    return Authority(tmp_path_factory.mktemp("theirs"), "theirs")


@pytest.fixture(scope="module")
def server_pem(ours: Authority) -> str:
    """A certificate with its key for a server on the loopback interface."""
    return ours.issue("server.pem", "127.0.0.1", "localhost")


@pytest.fixture
def connect() -> Iterator[Callable[..., RawClient]]:
    """Open connections to an agent; each is closed at the end."""
    clients: list[RawClient] = []

    def open_connection(agent: Agent, **options: Any) -> RawClient:
        options.setdefault("token", agent.token)
        clients.append(RawClient(agent.url, **options))
        return clients[-1]

    yield open_connection
    for client in clients:
        client.close()


@pytest.fixture
def client(agent: Agent, connect: Callable[..., RawClient]) -> RawClient:
    """A connection to the module's agent."""
    return connect(agent)

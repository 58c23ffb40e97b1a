"""Agents with a main process, a gateway in front of them, and Docker's client at a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from docking import ROOT, Gateway, Terminal
from support import Agent, need

sys.path.insert(0, str(ROOT / "scripts"))  # docker_gateway, for the tests of its parts

MAIN = (
    "trap 'exit 21' TERM; trap 'echo hup >&2' HUP; echo ready; echo warning >&2; "
    'while read -r line; do echo "got $line"; done; exit 9'
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.once)


@pytest.fixture(scope="session", autouse=True)
def docker_client() -> None:
    need("docker")


def main_agent(directory: Path, *flags: str) -> Agent:
    return Agent(directory, *flags, "--keep-alive", "--", "bash", "-c", MAIN)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """An agent with a main process, for all tests of a module that leave that alone."""
    agent = main_agent(tmp_path_factory.mktemp("web"))
    yield agent
    agent.kill()
    assert "unexpected error" not in agent.log, agent.log


@pytest.fixture(scope="module")
def gateway(web: Agent, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway in front of it, where it is called web."""
    started = Gateway(tmp_path_factory.mktemp("gateway"), f"--agent=web={web.address}")
    started.wait_for_log("agent web: connected")
    yield started
    assert started.stop() == 0
    assert "unexpected error" not in started.log, started.log


@pytest.fixture
def start_gateway(tmp_path: Path) -> Iterator[Callable[..., Gateway]]:
    """Start gateways of the test's own."""
    started: list[Gateway] = []

    def start(*flags: str, **options: Any) -> Gateway:
        directory = tmp_path / f"gateway{len(started)}"
        directory.mkdir()
        started.append(Gateway(directory, *flags, **options))
        return started[-1]

    yield start
    for gateway in started:
        gateway.kill()
        assert "unexpected error" not in gateway.log, gateway.log


@pytest.fixture
def box(tmp_path: Path, start_gateway: Callable[..., Gateway]) -> Iterator[tuple[Agent, Gateway]]:
    """An agent with a main process, called box, and its gateway, for one test that may end it."""
    directory = tmp_path / "box"
    directory.mkdir()
    agent = main_agent(directory)
    try:
        gateway = start_gateway(f"--agent=box={agent.address}")
        gateway.wait_for_log("agent box: connected")
        yield agent, gateway
    finally:
        agent.kill()


@pytest.fixture
def open_terminal() -> Iterator[Callable[..., Terminal]]:
    """Run Docker's client on a terminal."""
    terminals: list[Terminal] = []

    def start(gateway: Gateway, *words: str, **options: Any) -> Terminal:
        terminals.append(Terminal(gateway, words, **options))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()

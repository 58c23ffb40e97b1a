"""Faults that strike while twenty sessions stream: none loses a byte, and afterwards all is as before."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from streams import LEAN_MALLOC, MAIN, Streams, metric, numbered, scrape
from support import DEADLINE, TOKEN, Agent, RawClient, as_user, eventually, need, need_root, run_agent, wait_gone

from agent_client import AgentConn, AgentProcess, ClientError, SessionError

StartAgent = Callable[..., Agent]
Connect = Callable[..., RawClient]


def streams_on(agent: Agent, lost: str = "") -> Streams:
    return Streams(agent.url, agent.pid, agent.address, lost=lost)


@contextlib.contextmanager
def limited(pid: int, which: int, soft: int) -> Iterator[None]:
    """Lower a limit of a process that runs, and raise it again."""
    before = resource.prlimit(pid, which)
    resource.prlimit(pid, which, (soft, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, which, before)


def highest_descriptor(pid: int) -> int:
    return max(int(name) for name in os.listdir(f"/proc/{pid}/fd"))


def start_cat(conn: AgentConn) -> AgentProcess:
    """A cat that has started."""
    process = conn.popen(["cat"])
    process.stdin.write(b"x")
    assert process.stdout.read(1) == b"x"
    return process


def end_cat(process: AgentProcess) -> None:
    process.stdin.close()
    assert process.stdout.read() == b""
    assert process.wait(DEADLINE) == 0


def fill(conn: AgentConn) -> tuple[list[AgentProcess], str]:
    """Start commands until the agent refuses one: those, and what it says."""
    started = []
    while len(started) < 200:
        try:
            started.append(start_cat(conn))
        except SessionError as exc:
            return started, str(exc)
    pytest.fail("nothing was refused")


def why_not_connected(agent: Agent) -> str:
    """What a client is told that cannot connect, or whose connection is closed at once."""
    try:
        with AgentConn.dial(agent.address, TOKEN, patience=0) as conn:
            conn.run(["true"])
    except ClientError as exc:
        return str(exc)
    return ""


def connects_again(agent: Agent) -> None:
    eventually(lambda: not why_not_connected(agent), "a client that connects")


def tries(call: Callable[..., Any], *args: Any) -> Any:
    """What ``call`` returns, None if the agent refuses it."""
    try:
        return call(*args)
    except SessionError:
        return None


# Descriptors.


def test_at_the_limit_of_descriptors_new_work_is_refused_and_all_else_goes_on(start_agent: StartAgent) -> None:
    agent = start_agent(*MAIN, env=LEAN_MALLOC)
    with streams_on(agent) as streams, AgentConn.dial(agent.address, TOKEN) as conn:
        with limited(agent.pid, resource.RLIMIT_NOFILE, highest_descriptor(agent.pid) + 60):
            more, error = fill(conn)
            assert "too many open files" in error
            assert len(more) > 3
            assert "HTTP status 503: the agent cannot serve more: too many open files" in why_not_connected(agent)
            assert agent.health()["status"] == "ok"  # of the last descriptors, which are kept for such
            streams.wait_for_progress()
            end_cat(more.pop())
            eventually(lambda: tries(start_cat, conn), "a place that has become free is taken")
        connects_again(agent)
    agent.wait_for_log("cannot serve a connection: Too many open files")
    assert "unexpected error" not in agent.log


def test_without_a_single_descriptor_left_clients_wait_and_are_let_in_afterwards(start_agent: StartAgent) -> None:
    agent = start_agent(*MAIN, env=LEAN_MALLOC)
    with streams_on(agent) as streams:
        with limited(agent.pid, resource.RLIMIT_NOFILE, 20):
            calls = concurrent.futures.ThreadPoolExecutor(1)
            caller = calls.submit(AgentConn.dial, agent.address, TOKEN)
            agent.wait_for_log("cannot accept connections, trying again: Too many open files")
            streams.wait_for_progress()
        with calls, caller.result(DEADLINE) as conn:
            assert conn.run(["true"]).returncode == 0
    agent.wait_for_log("connections are accepted again, after [0-9]+ tries")
    assert agent.log.count("cannot accept connections") == 1
    assert "unexpected error" not in agent.log

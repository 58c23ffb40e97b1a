"""Who has a session as its connection ends: that one, another that takes it over, or nobody any more."""

from __future__ import annotations

import signal
import subprocess
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from proxy import Proxy
from running import TOKEN, RunningAgent
from support import DEADLINE, eventually, need, need_root
from test_least_privilege import NOBODY
from test_version_2 import Client

import agent
from agent import Cause, Reaper, Record, Runtime, SessionRegistry, TerminalPump, ThreadPool, load_config
from agent_client import AgentConn, SessionError

Dial = Callable[[], Client]


@pytest.fixture
def registry() -> SessionRegistry:
    """Of the server in this process."""
    return SessionRegistry(100)


@pytest.fixture
def dial(registry: SessionRegistry) -> Iterator[Dial]:
    """Connect to a server in this process, whose sessions have no resume window."""
    config = load_config(["--addr", "127.0.0.1:0", "--resume-window", "0"], {})
    server = agent.Server(Runtime(config, ThreadPool(), Reaper(), TerminalPump()), registry, None)
    server.start()
    where = types.SimpleNamespace(url=f"ws://{server.address}/ws", token="")
    clients: list[Client] = []

    def connect() -> Client:
        clients.append(Client(where))  # type: ignore[arg-type]
        return clients[-1]

    yield connect
    for client in clients:
        client.cut()
    server.close()


def test_a_connection_that_ends_leaves_a_session_alone_that_another_has_taken_over(
    registry: SessionRegistry, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is held up where it is about to end its sessions, until the other has had its answer."""
    leaving, answered = threading.Event(), threading.Event()
    because = Record.because

    def wait_before(record: Record, cause: Cause) -> None:
        if cause is Cause.CONNECTION:
            leaving.set()
            answered.wait(DEADLINE)
        because(record, cause)

    monkeypatch.setattr(Record, "because", wait_before)
    first, second = dial(), dial()
    first.send("archive_put", id="s", path="/", secret="a" * 16, connection=1)
    session = first.expect("s")
    first.until(lambda: session.started)
    first.cut()
    assert leaving.wait(DEADLINE)
    second.resume(session)
    second.until(lambda: session.resumed or session.errors)
    answered.set()
    eventually(lambda: len(registry.peers()) == 1, "the end of the first connection")
    second.send("sessions", id="q")
    second.until(lambda: second.lists)
    alive = [entry["id"] for entry in second.lists[0]]
    if session.errors:
        assert (session.errors[0]["reason"], alive) == ("unknown_session", [])
    else:
        assert alive == ["s"]


def test_without_a_window_the_end_of_the_connection_ends_its_sessions(dial: Dial, registry: SessionRegistry) -> None:
    first, second = dial(), dial()
    first.send("archive_put", id="s", path="/", secret="a" * 16, connection=1)
    session = first.expect("s")
    first.until(lambda: session.started)
    first.cut()
    eventually(lambda: len(registry.peers()) == 1, "the end of the first connection")
    second.resume(session)
    second.until(lambda: session.errors)
    assert session.errors[0]["reason"] == "unknown_session"
    second.send("archive_put", id="s", path="/", secret="a" * 16, connection=2)  # the same request starts no second one
    second.until(lambda: len(session.errors) > 1)
    assert session.errors[1]["reason"] == "unknown_session"


def test_a_session_goes_on_after_a_cut_when_the_lifetime_has_expired(tmp_path: Path) -> None:
    """Nothing is started any more, and what runs has what time the platform gives it."""
    running = RunningAgent(tmp_path, "--lifetime", "1h", "--lifetime-signal", "USR1")
    proxy = Proxy(running.addr)
    with AgentConn.dial(proxy.addr, TOKEN) as conn, conn.popen(["cat"]) as process:
        process.stdin.write(b"before\n")
        assert process.stdout.readline() == b"before\n"
        running.process.send_signal(signal.SIGUSR1)
        assert conn.lifetime_expired.wait(DEADLINE)
        proxy.cut()
        process.stdin.write(b"after\n")
        assert process.stdout.readline() == b"after\n"
        with pytest.raises(SessionError, match="lifetime has expired"):
            conn.run(["true"])
        process.stdin.close()
        assert process.wait(DEADLINE) == 0
    proxy.close()
    assert running.stop() == 0


@pytest.mark.root
def test_a_cut_needs_no_thread_that_the_system_might_refuse(tmp_path: Path) -> None:
    need("setpriv", "prlimit", "unshare", "mount")
    need_root()
    running = RunningAgent(tmp_path, prefix=NOBODY)  # root has no limit of threads

    def limit_threads(soft: str) -> None:
        """As that user: root may not everywhere."""
        as_nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
        subprocess.run([*as_nobody, "prlimit", f"--nproc={soft}", "--pid", str(running.process.pid)], check=True)

    proxy = Proxy(running.addr)
    with AgentConn.dial(proxy.addr, TOKEN) as conn, conn.popen(["cat"]) as process:
        process.stdin.write(b"before\n")
        assert process.stdout.readline() == b"before\n"
        limit_threads("1:")
        proxy.refusing = True
        proxy.cut()
        running.wait_for_log("connection lost.*1 sessions were running")
        limit_threads("1000:")
        proxy.refusing = False
        process.stdin.write(b"after\n")
        assert process.stdout.readline() == b"after\n"
        process.stdin.close()
        assert process.wait(DEADLINE) == 0
    proxy.close()
    assert running.stop() == 0
    assert "Traceback" not in running.log

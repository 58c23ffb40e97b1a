"""Want of memory at one place each: a real agent, in which the place fails when it meets a certain word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from streams import LEAN_MALLOC, MAIN, Streams
from support import AGENT, DEADLINE, TOKEN, Agent, RawClient
from test_faults_streaming import end_cat, start_cat

from agent_client import AgentConn, SessionError

WORD = "xyzzy-no-memory"
FAILING = f"""
import sys
sys.path.insert(0, {str(AGENT.parent)!r})
import agent

WORD = {WORD!r}
once = []


def fail(owner, name, meets, always=True):
    real = getattr(owner, name)

    def failing(*args, **options):
        if meets(*args) and (always or not once):
            once.append(1)
            raise MemoryError
        return real(*args, **options)

    setattr(owner, name, failing)


PLACES = {{
    "keep": lambda: [fail(sink, "put", lambda self, stream, data: WORD.encode() in data)
                     for sink in (agent.Channel, agent.Flow)],
    "frame": lambda: fail(agent._Turn, "frame",
                          lambda self, masked: any(WORD.encode() in chunk for chunk in self.chunks), always=False),
    "follow": lambda: fail(agent.Cursor, "read", lambda *rest: True),
    "resolve": lambda: fail(agent, "make_command", lambda cmd, *rest: WORD in cmd),
    "open": lambda: fail(agent.Input, "open", lambda self, *rest: True, always=False),
    "note": lambda: fail(agent.Record, "start", lambda self, *rest: WORD in getattr(self._request, "cmd", ())),
    "begin": lambda: fail(agent.ExecSession, "__init__",
                          lambda self, runtime, host, request, *rest: WORD in request.cmd),
}}
PLACES[sys.argv.pop(1)]()
agent.main()
"""


@pytest.fixture
def failing(start_agent: Callable[..., Agent], tmp_path: Path) -> Callable[[str], Agent]:
    """Start an agent that has no memory at one place."""

    def start(place: str) -> Agent:
        program = tmp_path / "failing.py"
        program.write_text(FAILING.replace("sys.argv.pop(1)", repr(place)))
        return start_agent(*MAIN, program=program, env=LEAN_MALLOC)

    return start


SAYS = ["sh", "-c", 'echo "$0"; exec sleep 300', WORD]


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("keep", "the command is killed: its output is lost: out of memory"),
        ("note", "the command is killed: its output is lost: out of memory"),
        ("resolve", "sh: cannot start: out of memory"),
        ("begin", "cannot start a session: out of memory"),
    ],
)
def test_a_session_without_memory_is_told_and_all_others_go_on(
    failing: Callable[[str], Agent], connect: Callable[..., RawClient], place: str, words: str
) -> None:
    agent = failing(place)
    with Streams(agent.url, agent.pid, agent.address) as streams:
        with AgentConn.dial(agent.address, TOKEN) as conn:
            for tty in (False, True):
                with pytest.raises(SessionError, match=words):
                    conn.popen(SAYS, tty=tty).wait(DEADLINE)
            end_cat(start_cat(conn))
        client = connect(agent)
        session = client.exec(SAYS)
        assert words in session.wait_error()
        if words.startswith("the command"):
            while session.exit is None:
                client.receive_one()
            assert session.exit["code"] == 137
        client.close()
        streams.wait_for_progress()


def test_a_connection_without_memory_for_a_frame_is_made_again(failing: Callable[[str], Agent]) -> None:
    agent = failing("frame")
    with Streams(agent.url, agent.pid, agent.address) as streams, AgentConn.dial(agent.address, TOKEN) as conn:
        outages: list[Any] = []
        conn.on_outage = outages.append
        echo = start_cat(conn)
        echo.stdin.write(WORD.encode() + b"\n")
        assert echo.stdout.readline() == WORD.encode() + b"\n"
        end_cat(echo)
        assert outages == [True, False]
        agent.wait_for_log("connection lost while sending: out of memory")
        streams.wait_for_progress()


def test_an_attachment_without_memory_is_told_and_its_command_goes_on(
    failing: Callable[[str], Agent], connect: Callable[..., RawClient]
) -> None:
    agent = failing("follow")
    words = "detached, since output is lost: out of memory"
    with AgentConn.dial(agent.address, TOKEN) as conn:
        with pytest.raises(SessionError, match=words):
            conn.attach().wait(DEADLINE)
        assert words in connect(agent).attach().wait_error()
        assert [(entry["kind"], entry.get("code")) for entry in conn.sessions()] == [("main", None)]


def test_a_command_that_runs_as_memory_ends_is_killed_and_told(failing: Callable[[str], Agent]) -> None:
    agent = failing("open")  # of the first command, which is the main process
    agent.wait_for_log("a process cannot be seen to, and is killed")
    agent.wait_for_log("main process ended: exit code 137")
    with AgentConn.dial(agent.address, TOKEN) as conn:
        end_cat(start_cat(conn))
    assert agent.stop() == 137

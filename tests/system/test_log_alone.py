"""The log alone tells what happened: who was refused, whose connection was lost, what was killed, and why."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import pytest
from support import TOKEN, Agent, RawClient, eventually
from test_audit import local_address
from test_http import UPGRADE, exchange, request
from test_version_2 import Client

Line = dict[str, Any]


class Log:
    """An agent's log in JSON, as a person or a program reads it afterwards."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def lines(self, **fields: str) -> list[Line]:
        lines = [json.loads(line) for line in self._agent.log.splitlines()]
        return [line for line in lines if all(line.get(name) == value for name, value in fields.items())]

    def wait_for(self, text: str, **fields: str) -> Line:
        """The first line that holds ``text`` and has these fields."""
        return eventually(
            lambda: next((line for line in self.lines(**fields) if text in line["message"]), None),
            f"{text!r} with {fields} in {self._agent.log}",
        )


@pytest.fixture
def logged(start_agent: Callable[..., Agent]) -> Callable[..., tuple[Agent, Log]]:
    def start(*flags: str) -> tuple[Agent, Log]:
        agent = start_agent("--log-format", "json", *flags)
        return agent, Log(agent)

    return start


# ── a refused client ──────────────────────────────────────────────────────────


def ask(agent: Agent, head: str) -> str:
    """Send a request; returns the address from which it came."""
    host, _, port = agent.address.rpartition(":")
    with socket.create_connection((host, int(port))) as sock:
        name = "{}:{}".format(*sock.getsockname())
        sock.sendall(head.encode())
        while sock.recv(4096):
            pass
    return name


@pytest.mark.parametrize(
    ("head", "why"),
    [
        ("GET /ws?token=wr0ng HTTP/1.1\r\nHost: h\r\n\r\n", "client refused: missing or wrong bearer token"),
        ("GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n", "client refused: missing or wrong bearer token"),
        ("GET /nothing?token=wr0ng HTTP/1.1\r\nHost: h\r\n\r\n", "GET /nothing: HTTP status 404"),
        ("POST /ws HTTP/1.1\r\nHost: h\r\n\r\n", "client refused: HTTP status 405"),
        (f"GET /ws?token={TOKEN} HTTP/1.1\r\nHost: h\r\n\r\n", "GET /ws: HTTP status 426"),
        ("nonsense\r\n\r\n", "client refused: HTTP status 400"),
    ],
    ids=["token", "metrics", "path", "method", "upgrade", "garbage"],
)
def test_a_refused_client_is_named_and_told_why(logged: Callable[..., tuple[Agent, Log]], head: str, why: str) -> None:
    agent, log = logged()
    name = ask(agent, head)
    log.wait_for(why, peer=name)
    assert "wr0ng" not in agent.log
    assert TOKEN not in agent.log
    assert "Traceback" not in agent.log


def test_a_web_page_of_another_host_is_named(start_agent: Callable[..., Agent]) -> None:
    agent = start_agent("--log-format", "json", token="")
    assert request(agent, "GET", "/ws", {**UPGRADE, "Origin": "http://evil.example"})[0] == 403
    line = Log(agent).wait_for("client refused: web pages of another host may not connect")
    assert line["peer"].startswith("127.0.0.1:")


def test_a_refused_session_is_told_with_its_client(
    logged: Callable[..., tuple[Agent, Log]], connect: Callable[..., RawClient]
) -> None:
    agent, log = logged("--max-sessions", "1")
    client = connect(agent)
    client.exec(["cat"], id="one")
    client.exec(["cat"], id="two").wait_last()
    who = local_address(client)
    log.wait_for("refused: too many sessions: the connection's limit is 1", peer=who, session="two")
    client.sessions["one"].close_stdin()
    assert client.sessions["one"].wait() == 0
    client.run(["/no/such"], id="three")
    log.wait_for("exec failed: /no/such: ", peer=who, session="three")


# ── a lost connection ─────────────────────────────────────────────────────────


def test_a_lost_connection_is_told_with_what_ran_on_it(
    logged: Callable[..., tuple[Agent, Log]], connect: Callable[..., RawClient]
) -> None:
    agent, log = logged()
    client, other = connect(agent), connect(agent)
    who = local_address(client)
    for name in ("a", "b"):
        client.exec(["sh", "-c", "echo up; exec sleep 1000"], id=name).wait_for(b"up")
    client.cut()
    lost = log.wait_for("connection lost", peer=who)
    assert "2 sessions were running" in lost["message"]
    for name in ("a", "b"):
        log.wait_for("exec ended: exit code 129, by SIGHUP (its connection ended)", peer=who, session=name)
    other_who = local_address(other)
    other.close()
    log.wait_for("connection closed by the peer; 0 sessions were running", peer=other_who)


def test_a_session_that_outlives_its_connection_is_told_to_its_end(logged: Callable[..., tuple[Agent, Log]]) -> None:
    agent, log = logged("--resume-window", "1s")
    first = Client(agent)
    who = local_address(first)
    session = first.exec(["cat"], id="a")
    while session.started is None:
        first.receive()
    first.ws.close_socket()
    log.wait_for("connection lost", peer=who)
    log.wait_for("it can be resumed for 1 s", peer=who, session="a")
    second = Client(agent)
    second.resume(session)
    log.wait_for("session resumed", peer=local_address(second), session="a")
    then = local_address(second)
    second.ws.close()
    log.wait_for("nobody resumed the session in time: it is ended", peer=then, session="a")
    log.wait_for("exec ended: exit code 129, by SIGHUP (nobody resumed it in time)", peer=then, session="a")


# ── a killed session ──────────────────────────────────────────────────────────


def test_who_killed_a_session_is_told(
    logged: Callable[..., tuple[Agent, Log]], connect: Callable[..., RawClient]
) -> None:
    agent, log = logged("--stdin-limit", "1k")
    client = connect(agent)
    who = local_address(client)
    up = ["sh", "-c", "echo $$; exec sleep 1000"]

    # By its client, with a signal.
    session = client.exec(up, id="signalled")
    session.wait_for(b"\n")
    session.signal("TERM")
    session.wait()
    log.wait_for("signal SIGTERM", peer=who, session="signalled")
    log.wait_for("exec ended: exit code 143, by SIGTERM", peer=who, session="signalled")

    # By its client, for good.
    session = client.exec(up, id="ended")
    session.wait_for(b"\n")
    session.send("end")
    session.wait()
    log.wait_for("exec ended: exit code 129, by SIGHUP (ended by its client)", peer=who, session="ended")

    # By somebody else: there is a signal, and nothing of the agent's doing.
    session = client.exec(up, id="murdered")
    os.kill(int(session.wait_for(b"\n")), signal.SIGKILL)
    session.wait()
    line = log.wait_for("exec ended: exit code 137, by SIGKILL", peer=who, session="murdered")
    assert line["message"].endswith("by SIGKILL")
    assert not [line for line in log.lines(session="murdered") if "signal" in line["message"]]

    # By the agent, for its client's flood.
    session = client.exec(up, id="flooded")
    session.wait_for(b"\n")
    session.write(bytes(1 << 20))
    while session.exit is None:
        client.receive_one()
    log.wait_for("exec killed: the command has not read its stdin", peer=who, session="flooded")
    log.wait_for("exec ended: exit code 137, by SIGKILL (its stdin overflowed)", peer=who, session="flooded")

    # By the agent's end.
    client.exec(up, id="last").wait_for(b"\n")
    agent.stop()
    log.wait_for("(the agent ended)", peer=who, session="last")


# ── every line ────────────────────────────────────────────────────────────────


def test_every_line_about_a_session_names_it_and_its_client(
    logged: Callable[..., tuple[Agent, Log]], connect: Callable[..., RawClient]
) -> None:
    agent, log = logged("--log-level", "debug", "--keep-alive", "--", "sleep", "1000")
    client = connect(agent)
    client.run(["cat"], stdin=b"x" * 100, id="one")
    client.run(["/no/such"], id="two")
    client.attach(id="three").send("end")
    client.send({"type": "resize", "id": "nobody", "width": 1, "height": 1})
    client.wait_error()
    client.close()
    log.wait_for("sessions were running")
    # Of what is neither about a session nor about a connection there is only this.
    own = ("main process started", "listening on", "health")
    for line in log.lines():
        if not line["message"].startswith(own):
            assert line.get("peer"), line
        if line["message"].startswith(("exec", "attach", "signal", "request", "refused", "session", "archive")):
            assert line.get("session"), line
    assert {"one", "two", "three", "nobody"} <= {line.get("session") for line in log.lines()}


def test_debug_shows_what_is_asked_for_but_no_acks_and_no_secrets(logged: Callable[..., tuple[Agent, Log]]) -> None:
    agent, log = logged("--log-level", "debug")
    client = Client(agent)
    session = client.exec(["sh", "-c", "head -c 300000 /dev/zero; cat"], id="a", env=["PASSWORD=hunter2"])
    while session.started is None or session.received < 300_000:
        client.receive()
    client.write(session, b"12345")
    client.send("resize", id="a", width=90, height=30)
    client.send("signal", id="a", signal="TERM")
    while session.exit is None:
        client.receive()
    client.send("end", id="a")
    client.ws.close()
    log.wait_for("connection closed")
    requests = [line["message"].removeprefix("request: ") for line in log.lines(session="a", level="debug")]
    assert requests == [
        "exec, command 'sh', arguments 2, variables 1, tty False, detach False",
        "stdin, 5 bytes",
        "resize, width 90, height 30",
        "signal, signal 'TERM'",
        "end",
    ]
    assert "hunter2" not in agent.log
    assert session.started["secret"] not in agent.log
    assert "ack" not in agent.log


def test_a_client_that_talks_nonsense_leaves_no_traceback(logged: Callable[..., tuple[Agent, Log]]) -> None:
    agent, log = logged()
    exchange(agent, b"\x00" * 100 + b"\r\n\r\n")
    log.wait_for("client refused: HTTP status 400")
    assert "Traceback" not in agent.log

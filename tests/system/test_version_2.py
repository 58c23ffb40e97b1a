"""Version 2 of the protocol, as the agent speaks it: binary, flow-controlled, and sessions that can be resumed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support import DEADLINE, Agent, RawClient, eventually, is_alive, killed_afterwards, need_root, wait_gone
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect as websocket

from agent import DEFAULT_WINDOW_SIZE, SUBPROTOCOL

NAMES = {1: "stdout", 2: "stderr"}


class Session:
    """What a client knows of a session, over all its connections."""

    def __init__(self, session_id: str) -> None:
        self.id = session_id
        self.stdout, self.stderr = bytearray(), bytearray()
        self.received = 0  # bytes of both
        self.started: dict[str, Any] | None = None
        self.exit: dict[str, Any] | None = None
        self.errors: list[dict[str, Any]] = []
        self.acked = 0  # of its stdin
        self.resumed: dict[str, Any] | None = None
        self.lost: list[dict[str, Any]] = []

    def take(self, stream: int, data: bytes) -> None:
        assert self.exit is None
        (self.stdout if stream == 1 else self.stderr).extend(data)
        self.received += len(data)


class Client:
    """A version 2 client that shares no code with ours; used by one thread."""

    def __init__(self, agent: Agent, acking: bool = True) -> None:
        self.ws = websocket(
            agent.url,
            subprotocols=[SUBPROTOCOL],
            additional_headers={"Authorization": f"Bearer {agent.token}"},
            compression=None,
            max_size=None,
            ping_interval=None,
            proxy=None,
            close_timeout=1,
            open_timeout=DEADLINE,
        ).__enter__()
        assert self.ws.subprotocol == SUBPROTOCOL
        self.acking = acking
        self.sessions: dict[str, Session] = {}
        self.errors: list[dict[str, Any]] = []
        self.lists: list[list[dict[str, Any]]] = []

    def send(self, kind: str, **fields: object) -> None:
        self.ws.send(json.dumps({"type": kind, **fields}))

    def expect(self, id: str) -> Session:
        """A session that is started by hand."""
        return self.sessions.setdefault(id, Session(id))

    def exec(self, cmd: Sequence[str], id: str = "s", **fields: object) -> Session:
        self.sessions[id] = Session(id)
        self.send("exec", id=id, cmd=list(cmd), **fields)
        return self.sessions[id]

    def write(self, session: Session, data: bytes) -> None:
        self.ws.send(bytes((0, len(session.id))) + session.id.encode() + data)

    def ack(self, session: Session) -> None:
        self.send("ack", id=session.id, offset=session.received)

    def resume(self, session: Session, offset: int | None = None, secret: str | None = None) -> None:
        self.sessions[session.id] = session
        session.resumed = None
        assert session.started is not None
        self.send(
            "resume",
            id=session.id,
            secret=session.started["secret"] if secret is None else secret,
            offset=session.received if offset is None else offset,
        )

    def receive(self, timeout: float = DEADLINE) -> None:
        message = self.ws.recv(timeout)
        if isinstance(message, bytes):
            session = self.sessions[message[2 : 2 + message[1]].decode()]
            session.take(message[0], message[2 + message[1] :])
            if self.acking:
                self.ack(session)
            return
        event = json.loads(message)
        if event["type"] == "sessions":
            self.lists.append(event["sessions"])
            return
        found = self.sessions.get(event.get("id", ""))
        if found is None:
            assert event["type"] == "error", event
            self.errors.append(event)
        elif event["type"] == "started":
            found.started = event
        elif event["type"] == "exit":
            assert found.exit is None
            found.exit = event
        elif event["type"] == "error":
            found.errors.append(event)
        elif event["type"] == "ack":
            assert event["offset"] >= found.acked or found.resumed
            found.acked = max(event["offset"], found.acked)
        elif event["type"] == "resumed":
            found.resumed = event
        elif event["type"] == "lost":
            found.lost.append(event)
        else:
            pytest.fail(f"unexpected event {event}")

    def until(self, check: Callable[[], object]) -> None:
        while not check():
            self.receive()

    def wait(self, session: Session) -> int:
        self.until(lambda: session.exit or session.errors)
        assert session.exit is not None, session.errors
        return int(session.exit["code"])

    def idle(self) -> None:
        """Receive until nothing more comes for a while."""
        with contextlib.suppress(TimeoutError):
            while True:
                self.receive(0.3)

    def cut(self) -> None:
        """RST: what is under way in either direction is gone."""
        with contextlib.suppress(OSError):
            self.ws.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.ws.socket.close()
        with contextlib.suppress(Exception):
            self.ws.close_socket()


Dial = Callable[..., Client]


@pytest.fixture
def dial(agent: Agent) -> Iterator[Dial]:
    clients: list[Client] = []

    def start(to: Agent | None = None, **options: Any) -> Client:
        clients.append(Client(to or agent, **options))
        return clients[-1]

    yield start
    for client in clients:
        client.ws.close()


# Messages.


def test_a_command_is_started_writes_and_ends(dial: Dial) -> None:
    client = dial()
    session = client.exec(["sh", "-c", "echo $$; echo err >&2; read x; echo got $x; exit 5"])
    client.until(lambda: b"\n" in session.stdout)
    assert session.started is not None
    assert session.started["pid"] == int(session.stdout)
    assert len(session.started["secret"]) >= 32
    client.write(session, b"typed\n")
    assert client.wait(session) == 5
    assert session.stdout.endswith(b"\ngot typed\n")
    assert session.stderr == b"err\n"


def test_a_version_1_client_notices_nothing(client: RawClient) -> None:
    assert client.ws.subprotocol is None
    for kind in ("ack", "resume", "sessions"):
        client.send({"type": kind, "id": "x"})
        assert f"unknown message type '{kind}'" in client.wait_error()
    session = client.exec(["cat"], stdin=False, window=1, detach=1, user=7)  # all unknown to it, so ignored
    session.write(b"text")
    session.close_stdin()
    assert session.wait() == 0
    assert session.stdout == b"text"


def test_what_cannot_start_says_so_and_its_id_is_free(dial: Dial) -> None:
    client = dial()
    for _ in range(2):
        session = client.exec(["no-such-command"])
        client.until(lambda session=session: session.errors)
        assert session.errors[0]["reason"] == "not_found"
        assert session.started is None
    assert client.wait(client.exec(["true"])) == 0


NONSENSE = {
    "empty": b"",
    "no stream like that": b"\x07\x01sx",
    "no id": b"\x00\x00x",
    "an id cut off": b"\x00\x09s",
    "an id that is not UTF-8": b"\x00\x01\xff",
    "not stdin": b"\x01\x01sx",
    "an unknown id": b"\x00\x07unknownx",
}


@pytest.mark.parametrize("frame", NONSENSE.values(), ids=NONSENSE)
def test_a_data_frame_that_makes_no_sense_is_an_error_and_all_goes_on(dial: Dial, frame: bytes) -> None:
    client = dial()
    session = client.exec(["cat"])
    client.ws.send(frame)
    client.until(lambda: client.errors or session.errors)
    client.write(session, b"on")
    client.send("close_stdin", id="s")
    session.errors.clear()
    assert client.wait(session) == 0
    assert session.stdout == b"on"


@pytest.mark.parametrize(
    "message",
    [
        {"type": "ack", "id": "s", "offset": 10**9},
        {"type": "ack", "id": "s", "offset": -1},
        {"type": "ack", "id": "nobody", "offset": 0},
        {"type": "resume", "id": "s", "secret": "guess", "offset": 0},
        {"type": "resume", "id": "other", "secret": "guess", "offset": 0},
        {"type": "exec", "id": "x" * 300, "cmd": ["true"]},
        {"type": "exec", "id": "t", "cmd": ["true"], "user": "no such user"},
        {"type": "exec", "id": "t", "cmd": ["true"], "user": "root:no such group"},
        {"type": "exec", "id": "t", "cmd": ["true"], "width": 70000},
        {"type": "exec", "id": "t", "cmd": ["true"], "stdin": "no"},
    ],
    ids=lambda message: json.dumps(message)[:50],
)
def test_a_message_that_makes_no_sense_is_an_error_and_all_goes_on(dial: Dial, message: dict[str, Any]) -> None:
    client = dial()
    session = client.exec(["cat"])
    client.ws.send(json.dumps(message))
    client.until(lambda: client.errors or session.errors)
    client.send("close_stdin", id="s")
    session.errors.clear()
    assert client.wait(session) == 0


# Options of exec.


def test_stdin_false_is_an_empty_stdin(dial: Dial) -> None:
    client = dial()
    session = client.exec(["cat"], stdin=False)
    assert client.wait(session) == 0


def test_stdin_false_is_empty_whatever_comes_before_the_start(dial: Dial) -> None:
    client = dial()
    session = client.exec(["cat"], stdin=False)
    client.write(session, b"too early")
    assert client.wait(session) == 0
    assert session.stdout == b""


def test_stdin_right_behind_the_exec_is_acknowledged(dial: Dial) -> None:
    client = dial()
    for number in range(20):
        session = client.exec(["sleep", "300"], id=f"e{number}", tty=number % 2 == 0)
        client.write(session, b"hi\n")
        client.until(lambda session=session: session.acked == 3)
        client.send("signal", id=session.id, signal="KILL")


def test_started_comes_before_the_output(dial: Dial) -> None:
    client = dial()
    sessions = [client.exec(["echo", "x"], id=f"e{number}", tty=number % 2 == 0) for number in range(40)]
    for session in sessions:
        while not session.started:
            assert not session.received
            client.receive()
        assert client.wait(session) == 0


def test_a_terminal_has_its_size_from_the_first_byte(dial: Dial) -> None:
    client = dial()
    session = client.exec(["stty", "size"], tty=True, width=123, height=45)
    assert client.wait(session) == 0
    assert session.stdout == b"45 123\r\n"


@pytest.mark.root
@pytest.mark.parametrize("tty", [False, True])
@pytest.mark.parametrize(
    ("user", "seen"),
    [("nobody", "65534 65534 65534"), ("54321", "54321 0 0"), ("54321:12345", "54321 12345 12345"),
     ("nobody:root", "65534 0 0")],
)  # fmt: skip
def test_a_command_runs_as_another_user(dial: Dial, user: str, seen: str, tty: bool) -> None:
    need_root()
    client = dial()
    script = "echo $(id -u) $(id -g) $(id -G); grep -c . /proc/self/status >/dev/null && grep Sig[BI] /proc/self/status"
    session = client.exec(["sh", "-c", script], user=user, tty=tty)
    assert client.wait(session) == 0
    lines = session.stdout.decode().split("\r\n" if tty else "\n")
    assert lines[0] == seen
    # All but 32 and 33, the C library's own, which it lets nobody change.
    assert [int(line.split()[1], 16) & ~(3 << 31) for line in lines[1:3]] == [0, 0]


@pytest.mark.root
def test_another_users_command_has_a_controlling_terminal_and_can_be_ended(dial: Dial) -> None:
    need_root()
    client = dial()
    session = client.exec(["sh", "-c", "echo tty >/dev/tty; echo $$; exec sleep 300"], user="nobody", tty=True)
    client.until(lambda: session.stdout.count(b"\n") == 2)
    assert session.stdout.startswith(b"tty\r\n")
    client.send("signal", id="s", signal="TERM")
    assert client.wait(session) == 143
    session = client.exec(["sh", "-c", "exit 9"], id="t", user="nobody", workdir="/tmp")
    assert client.wait(session) == 9
    session = client.exec(["/etc/passwd"], id="u", user="nobody")
    client.until(lambda: session.errors)
    assert session.errors[0]["reason"] == "not_executable"


# Flow control.


@pytest.mark.parametrize("tty", [False, True])
def test_no_more_than_the_window_comes_without_an_ack(dial: Dial, tty: bool) -> None:
    client = dial(acking=False)
    session = client.exec(["sh", "-c", "stty raw 2>/dev/null; exec yes"], window=100_000, tty=tty)
    client.until(lambda: session.received >= 100_000)
    client.idle()
    assert session.received == 100_000
    client.send("ack", id="s", offset=1)
    client.until(lambda: session.received > 100_000)
    client.idle()
    assert session.received == 100_001
    client.ack(session)
    client.until(lambda: session.received >= 200_000)
    client.send("signal", id="s", signal="KILL")
    client.acking = True
    client.ack(session)
    assert client.wait(session) == 137
    assert session.stdout == (b"y\n" * session.received)[: session.received]


def test_50_paused_readers_cost_one_that_reads_nothing(start_agent: Callable[..., Agent], dial: Dial) -> None:
    agent = start_agent()
    client = dial(agent, acking=False)
    client.wait(client.exec(["true"], id="warm"))
    status = Path(f"/proc/{agent.pid}/status")

    def resident() -> int:
        return int(status.read_text().partition("VmRSS:")[2].split()[0]) << 10

    before = resident()
    paused = [client.exec(["sh", "-c", "seq 1 300000; exit 3"], id=f"p{number}") for number in range(50)]
    client.until(lambda: all(session.received >= DEFAULT_WINDOW_SIZE for session in paused))
    runner = client.exec(["head", "-c", "100M", "/dev/zero"], id="runner")
    while runner.exit is None:
        client.receive()
        client.ack(runner)
    assert len(runner.stdout) == 100 << 20
    assert all(session.received == DEFAULT_WINDOW_SIZE for session in paused)
    # Each keeps its window, and what was read beyond it: 256 KiB at most.
    assert resident() - before < 50 * (DEFAULT_WINDOW_SIZE + (512 << 10)) + (64 << 20)
    client.acking = True
    for session in paused:
        client.ack(session)
    expected = "".join(f"{number}\n" for number in range(1, 300001)).encode()
    for session in paused:
        assert client.wait(session) == 3
        assert session.stdout == expected


def test_stdin_is_acknowledged_as_the_command_reads_it(dial: Dial, tmp_path: Path) -> None:
    client = dial()
    script = f"echo up; while [ ! -e {tmp_path}/go ]; do sleep 0.02; done; exec cat >/dev/null"
    session = client.exec(["sh", "-c", script])
    client.until(lambda: session.stdout)
    client.write(session, b"x" * 1_000_000)
    client.idle()
    assert session.acked < 200_000  # what the pipe holds
    client.write(session, b"y" * 1_000_000)
    (tmp_path / "go").touch()
    client.until(lambda: session.acked == 2_000_000)
    client.send("close_stdin", id="s")
    assert client.wait(session) == 0


# Sessions that outlive their connection.


def test_a_session_goes_on_after_a_cut_to_the_byte(dial: Dial) -> None:
    client = dial()
    session = client.exec(["sh", "-c", "seq 1 200000; echo err >&2; exit 7"])
    for count in range(1, 20):
        with contextlib.suppress(ConnectionClosed):
            client.until(lambda count=count: session.received > count * 60_000 or session.exit)
        client.cut()
        client = dial()
        client.resume(session)
    assert client.wait(session) == 7
    assert session.stdout == "".join(f"{number}\n" for number in range(1, 200001)).encode()
    assert session.stderr == b"err\n"


def test_what_ended_meanwhile_is_told(dial: Dial, agent: Agent, tmp_path: Path) -> None:
    client = dial()
    script = f"echo up; while [ ! -e {tmp_path}/go ]; do sleep 0.02; done; echo done; exit 11"
    session = client.exec(["sh", "-c", script])
    client.until(lambda: session.stdout and session.started)
    client.cut()
    (tmp_path / "go").touch()
    assert session.started is not None
    wait_gone(session.started["pid"])
    client = dial()
    client.resume(session)
    assert client.wait(session) == 11
    assert session.stdout == b"up\ndone\n"
    # Kept until the client says that it has it.
    client.cut()
    session.exit = None
    client = dial()
    client.resume(session)
    assert client.wait(session) == 11
    client.send("end", id="s")
    assert client.wait(client.exec(["true"])) == 0


def test_stdin_goes_on_where_the_agent_has_it(dial: Dial) -> None:
    data = random.Random(5).randbytes(3_000_000)
    client = dial()
    session = client.exec(["sh", "-c", "exec sha256sum"])
    client.until(lambda: session.started)
    sent = 0
    chances = random.Random(6)
    while sent < len(data):
        size = chances.randrange(1, 200_000)
        with contextlib.suppress(ConnectionClosed, OSError):
            client.write(session, data[sent : sent + size])
        sent += size
        if chances.random() < 0.3:
            client.cut()
            client = dial()
            client.resume(session)
            client.until(lambda: session.resumed)
            assert session.resumed is not None
            sent = session.resumed["stdin"]
    client.send("close_stdin", id="s")
    assert client.wait(session) == 0
    import hashlib

    assert session.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()


def test_a_live_connection_can_be_taken_over(dial: Dial) -> None:
    first, second = dial(), dial()
    session = first.exec(["cat"])
    first.until(lambda: session.started)
    second.resume(session)
    second.until(lambda: session.resumed)
    second.write(session, b"text")
    second.send("close_stdin", id="s")
    assert second.wait(session) == 0
    assert session.stdout == b"text"
    # The first one has lost it, and its id.
    first.sessions.clear()
    assert first.wait(first.exec(["true"])) == 0


def test_what_is_resumed_while_the_old_connections_loss_is_noticed_goes_on(
    start_agent: Callable[..., Agent], dial: Dial
) -> None:
    agent = start_agent("--max-sessions", "400", "--keep-alive", "--", "cat")
    client = dial(agent)
    ids = [f"a{number}" for number in range(300)]
    for id in ids:
        client.sessions[id] = Session(id)
        client.send("attach", id=id)
    client.until(lambda: all(session.started for session in client.sessions.values()))
    for number in range(0, 50, 10):
        another = dial(agent)
        for id in reversed(ids[-number - 1 :]):  # against the order in which the agent lets go of them
            another.resume(client.sessions[id])
        client.cut()
        for id in reversed(ids[: -number - 1]):
            another.resume(client.sessions[id])
        another.until(lambda another=another: all(another.sessions[id].resumed for id in ids))
        before = another.sessions[ids[0]].received
        another.write(another.sessions[ids[0]], b"x" * 10)
        another.until(lambda another=another, before=before: all(
            another.sessions[id].received == before + 10 for id in ids
        ))  # fmt: skip
        client = another


def test_only_the_secret_resumes(dial: Dial) -> None:
    client = dial()
    session = client.exec(["cat"])
    client.until(lambda: session.started)
    client.cut()
    thief = dial()
    for secret in ("", "guess", "0" * 32):
        thief.resume(session, secret=secret)
        thief.until(lambda: session.errors)
        assert session.errors.pop()["reason"] == "unknown_session"
    thief.resume(session)
    thief.until(lambda: session.resumed)


SECRET = "a secret of the client's own"


def test_a_request_that_is_sent_again_starts_nothing_twice(dial: Dial, tmp_path: Path) -> None:
    command = ["sh", "-c", f"echo once >>{tmp_path}/log; read x; echo $x; exit 3"]
    first = dial()
    session = first.exec(command, secret=SECRET, connection=1)
    first.write(session, b"ty")
    first.until(lambda: session.started)
    assert session.started is not None
    assert session.started["secret"] == SECRET
    second = dial()
    again = second.exec(command, secret=SECRET, connection=2)
    second.until(lambda: again.resumed and again.started)
    assert again.resumed is not None
    assert (again.resumed["offset"], again.resumed["stdin"]) == (0, 2)
    second.write(again, b"ped\n")
    assert second.wait(again) == 3
    assert again.stdout == b"typed\n"
    # Once more, when it is over: late, or by mistake.
    second.send("end", id="s")
    third = dial()
    late = third.exec(command, secret=SECRET, connection=3)
    third.until(lambda: late.errors)
    assert late.errors[0]["reason"] == "unknown_session"
    assert (tmp_path / "log").read_text() == "once\n"


def test_what_comes_late_on_an_earlier_connection_takes_nothing_over(dial: Dial) -> None:
    first, second = dial(), dial()
    session = first.exec(["cat"], secret=SECRET + "2", connection=1)
    first.until(lambda: session.started)
    session = second.exec(["cat"], secret=SECRET + "2", connection=2)
    second.until(lambda: session.resumed)
    late = first.sessions["s"]
    first.send("exec", id="s", cmd=["cat"], secret=SECRET + "2", connection=1)
    first.until(lambda: late.errors)
    assert late.errors.pop()["reason"] == "duplicate_session"
    first.send("resume", id="s", secret=SECRET + "2", offset=0, connection=1)
    first.until(lambda: late.errors)
    assert late.errors.pop()["reason"] == "duplicate_session"
    first.write(late, b"late")  # to nobody
    first.send("close_stdin", id="s")
    assert first.wait(first.exec(["true"], id="t")) == 0
    second.write(session, b"text")
    second.send("close_stdin", id="s")
    assert second.wait(session) == 0
    assert session.stdout == b"text"


def test_a_numbered_signal_is_delivered_once(dial: Dial) -> None:
    client = dial()
    script = (
        "import signal\n"
        "wanted = set(range(signal.SIGRTMIN, signal.SIGRTMIN + 8))\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, wanted)\n"
        "print('up', flush=True)\n"
        "while True:\n"
        "    print(signal.sigwait(wanted) - signal.SIGRTMIN, flush=True)\n"
    )
    session = client.exec([sys.executable, "-I", "-S", "-c", script])
    client.until(lambda: session.stdout)
    for number in (1, 1, 1, 2, 1, 2, 7):  # real-time signals queue, and come in order
        client.send("signal", id="s", signal=f"RTMIN+{number}", number=number)
    client.until(lambda: session.stdout.endswith(b"7\n"))
    assert session.stdout == b"up\n1\n2\n7\n"
    client.send("signal", id="s", signal="KILL")
    assert client.wait(session) == 137


def test_a_secret_ends_a_session_from_any_connection(dial: Dial) -> None:
    first, second = dial(), dial()
    session = first.exec(["sleep", "300"], id="mine", secret=SECRET + "3")
    first.until(lambda: session.started)
    second.send("end", id="mine", secret=SECRET + "4")  # another: ignored
    second.send("end", id="mine", secret=SECRET + "3")
    assert first.wait(session) == 129
    second.send("end", id="mine", secret=SECRET + "3")
    second.send("sessions")
    second.until(lambda: second.lists)
    assert "mine" not in {entry["id"] for entry in second.lists[0]}


def test_the_end_of_an_earlier_session_leaves_the_one_that_has_its_id_now(dial: Dial) -> None:
    client = dial()
    session = client.exec(["cat"], secret=SECRET + "7")
    client.until(lambda: session.started)
    client.send("end", id="s", secret=SECRET + "6")
    client.write(session, b"still here")
    client.send("close_stdin", id="s")
    assert client.wait(session) == 0
    assert session.stdout == b"still here"


def test_the_window_of_a_resumed_session_counts_from_what_was_read(dial: Dial) -> None:
    client = dial(acking=False)
    session = client.exec(["yes"], window=100_000)
    client.until(lambda: session.received >= 100_000)
    assert session.started is not None
    client.cut()
    client = dial(acking=False)
    client.sessions["s"] = session
    client.send("resume", id="s", secret=session.started["secret"], offset=100_000, acked=40_000, window=100_000)
    client.until(lambda: session.received >= 140_000)
    client.idle()
    assert session.received == 140_000
    client.send("end", id="s")


def test_a_short_secret_is_refused(dial: Dial) -> None:
    client = dial()
    session = client.exec(["true"], secret="guessable")
    client.until(lambda: session.errors)
    assert session.errors[0]["reason"] == "bad_request"


def test_sessions_of_closed_connections_do_not_count(start_agent: Callable[..., Agent], dial: Dial) -> None:
    agent = start_agent("--resume-window", "0", "--max-total-sessions", "3")
    for _ in range(8):
        client = dial(agent)
        session = client.exec(["sleep", "300"])
        client.until(lambda session=session: session.started)
        client.cut()
        assert session.started is not None
        wait_gone(session.started["pid"])


def test_past_its_time_a_session_is_ended(start_agent: Callable[..., Agent], dial: Dial) -> None:
    agent = start_agent("--resume-window", "300ms")
    client = dial(agent)
    session = client.exec(["sh", "-c", "setsid sleep 300 & echo $!; wait"])
    client.until(lambda: session.stdout and session.started)
    pid = int(session.stdout)
    client.cut()
    with killed_afterwards(pid):
        wait_gone(pid)
    agent.wait_for_log("nobody resumed the session in time")
    client = dial(agent)
    client.resume(session)
    client.until(lambda: session.errors)
    assert "its time is over" in session.errors[0]["message"]


def test_with_a_window_of_0_a_session_ends_with_its_connection(start_agent: Callable[..., Agent], dial: Dial) -> None:
    agent = start_agent("--resume-window", "0")
    client = dial(agent)
    session = client.exec(["sleep", "300"])
    client.until(lambda: session.started)
    assert session.started is not None
    client.cut()
    wait_gone(session.started["pid"])


def test_a_blocked_command_stays_blocked_while_nobody_is_there(dial: Dial, tmp_path: Path) -> None:
    client = dial(acking=False)
    session = client.exec(["sh", "-c", f"seq 1 1000000; touch {tmp_path}/written"])
    client.until(lambda: session.received >= DEFAULT_WINDOW_SIZE)
    client.cut()
    client = dial()
    assert not (tmp_path / "written").exists()
    client.resume(session)
    assert client.wait(session) == 0
    assert session.stdout == "".join(f"{number}\n" for number in range(1, 1000001)).encode()


def test_the_agents_end_leaves_no_parked_session(start_agent: Callable[..., Agent], dial: Dial) -> None:
    agent = start_agent()
    client = dial(agent)
    session = client.exec(["sleep", "300"])
    client.until(lambda: session.started)
    client.cut()
    agent.wait_for_log("1 sessions were running")
    assert session.started is not None
    assert is_alive(session.started["pid"])
    assert agent.stop() == 0
    assert not is_alive(session.started["pid"])


def test_attach_is_resumed_too(start_agent: Callable[..., Agent], dial: Dial) -> None:
    agent = start_agent("--keep-alive", "--", "sh", "-c", "echo ready; read x; seq 1 100000; exit 6")
    client = dial(agent)
    session = client.sessions["a"] = Session("a")
    client.send("attach", id="a")
    client.until(lambda: session.stdout)
    client.write(session, b"go\n")
    client.until(lambda: session.received > 100_000)
    client.cut()
    client = dial(agent)
    client.resume(session)
    assert client.wait(session) == 6
    assert session.stdout == b"ready\n" + "".join(f"{number}\n" for number in range(1, 100001)).encode()


def test_an_attacher_that_falls_behind_is_told_where(start_agent: Callable[..., Agent], dial: Dial) -> None:
    agent = start_agent(
        "--replay-size", "64k", "--keep-alive", "--", "sh", "-c", "echo up; read x; seq 1 300000; exit 2"
    )
    client = dial(agent, acking=False)
    session = client.sessions["a"] = Session("a")
    client.send("attach", id="a", window=50_000)
    client.until(lambda: session.stdout)
    client.write(session, b"go\n")
    eventually(lambda: agent.health()["exited"], "the main process, which waits for nobody")
    client.acking = True
    client.ack(session)
    assert client.wait(session) == 2
    total = sum(len(f"{number}\n") for number in range(1, 300001)) + len("up\n")
    assert session.received + sum(lost["bytes"] for lost in session.lost) == total
    assert session.lost
    assert session.stdout.endswith(b"299999\n300000\n")


def test_what_runs_is_listed(start_agent: Callable[..., Agent], dial: Dial) -> None:
    agent = start_agent()
    first, second = dial(agent), dial(agent)
    cut = first.exec(["sleep", "300"], id="cut")
    first.until(lambda: cut.started)
    first.cut()
    runs = second.exec(["cat"], id="runs", tty=True)
    done = second.exec(["sh", "-c", "exit 4"], id="done")
    second.until(lambda: runs.started and done.exit)
    agent.wait_for_log("1 sessions were running")
    second.send("sessions")
    second.until(lambda: second.lists)
    listed = {entry["id"]: entry for entry in second.lists[0]}
    assert runs.started is not None
    assert abs(listed["runs"].pop("started_at") - time.time()) < DEADLINE
    assert listed["runs"] == {
        "id": "runs", "kind": "exec", "pid": runs.started["pid"], "cmd": ["cat"], "tty": True, "user": "",
        "connected": True,
    }  # fmt: skip
    assert listed["done"]["code"] == 4
    assert listed["cut"]["connected"] is False
    assert "secret" not in json.dumps(second.lists[0])


def test_reverse_mode_offers_version_2_and_an_old_backend_does_not_mind(tmp_path: Path) -> None:
    from websockets.sync.server import ServerConnection, serve

    offered: list[str | None] = []
    answers: list[Any] = []
    done = threading.Event()

    def backend(connection: ServerConnection) -> None:
        assert connection.request is not None
        offered.append(connection.request.headers.get("Sec-WebSocket-Protocol"))
        connection.send(json.dumps({"type": "exec", "id": "e", "cmd": ["echo", "hi"]}))
        for text in connection:
            answers.append(json.loads(text))
            if answers[-1]["type"] == "exit":
                done.set()
                done.wait(DEADLINE)

    with serve(backend, "127.0.0.1", 0, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.socket.getsockname()[1]}/?id=x"
        command = [sys.executable, "agent.py", "--pid-file", "", "--callback", url]
        with subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL) as process:
            assert done.wait(DEADLINE)
            process.terminate()
        server.shutdown()
        thread.join()
    assert offered == [SUBPROTOCOL]
    assert base64.b64decode(answers[0]["data"]) == b"hi\n"
    assert answers[-1] == {"type": "exit", "id": "e", "code": 0}


def test_cuts_at_random_lose_and_repeat_nothing(dial: Dial) -> None:
    """A transcript of both directions with connections that are cut at any time: what arrives is what was sent."""
    chances = random.Random(int(os.environ.get("CUTS_SEED", "1")))
    rounds = int(os.environ.get("CUTS", "60"))
    client = dial()
    session = client.exec(["cat"])
    client.until(lambda: session.started)
    data = chances.randbytes(rounds * 20_000)
    sent = 0
    cuts = 0
    deadline = time.monotonic() + 100
    while session.received < len(data):
        assert time.monotonic() < deadline, (session.received, sent, len(data))
        try:
            action = chances.random()
            if action < 0.5 and sent < len(data) and sent - session.acked < 500_000:
                size = chances.randrange(1, 10_000)
                client.write(session, data[sent : sent + size])
                sent = min(sent + size, len(data))
            elif action < 0.85:
                with contextlib.suppress(TimeoutError):
                    client.receive(0.01)
            elif cuts < rounds:
                client.cut()
                raise ConnectionResetError
        except (ConnectionClosed, OSError):
            cuts += 1
            client = dial()
            client.resume(session)
            client.until(lambda: session.resumed)
            assert session.resumed is not None
            sent = session.resumed["stdin"]
    assert bytes(session.stdout) == data
    client.send("close_stdin", id="s")
    assert client.wait(session) == 0
    assert cuts > rounds // 3

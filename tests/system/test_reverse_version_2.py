"""Version 2 in reverse mode: an agent that dials again goes on, and so do clients behind the listener."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from proxy import Proxy
from running import DEADLINE, TOKEN, RunningAgent
from support import eventually
from websockets.sync.client import ClientConnection, connect

from agent import SUBPROTOCOL
from agent_client import AgentConn, ClientError, ConnectionLost, ReverseAgentConn, ReverseListener, SessionError

MAIN = 'echo ready; while read -r line; do echo "got $line"; done; exit 9'
COUNT = "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; exit 7"
COUNTED = b"".join(b"line %d\n" % number for number in range(20000))


class Setting:
    """A listener; an agent that dials it through one proxy; clients that come through another."""

    def __init__(self, tmp_path: Path, *flags: str) -> None:
        self.listener = ReverseListener("127.0.0.1", token=TOKEN)
        self.agent_link = Proxy(f"127.0.0.1:{self.listener.port}")
        self.client_link = Proxy(f"127.0.0.1:{self.listener.port}")
        url = f"http://{self.agent_link.addr}/cb?id=box"
        self.agent = RunningAgent(tmp_path, "--callback", url, *flags)
        self.conn = self.listener.wait_for("box", DEADLINE)
        self.url = f"ws://{self.client_link.addr}/agents/box/ws"

    def dial(self) -> AgentConn:
        return AgentConn.dial(self.url, TOKEN)

    def close(self) -> None:
        self.agent.kill()
        self.agent_link.close()
        self.client_link.close()
        self.listener.close()


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    made = Setting(tmp_path, "--keep-alive", "--", "sh", "-c", MAIN)
    yield made
    made.close()


@pytest.fixture
def raw(setting: Setting) -> Iterator[ClientConnection]:
    """A client of version 2 that shares no code with ours."""
    with connect(
        setting.url,
        subprotocols=[SUBPROTOCOL],
        additional_headers={"Authorization": f"Bearer {TOKEN}"},
        compression=None,
        max_size=None,
        proxy=None,
    ) as connection:
        yield connection


def receive(connection: ClientConnection) -> dict[str, Any] | bytes:
    message = connection.recv(DEADLINE)
    return json.loads(message) if isinstance(message, str) else message


def send(connection: ClientConnection, kind: str, /, **fields: object) -> None:
    connection.send(json.dumps({"type": kind, **fields}))


def another(setting: Setting) -> ClientConnection:
    """One more client of that kind."""
    return connect(
        setting.url,
        subprotocols=[SUBPROTOCOL],
        additional_headers={"Authorization": f"Bearer {TOKEN}"},
        compression=None,
        proxy=None,
    )


def ask_and_wait(connection: ClientConnection) -> None:
    """Ask the agent something: once it answers, it has had what was sent before."""
    send(connection, "sessions", id="question")
    message: dict[str, Any] | bytes = {}
    while not (isinstance(message, dict) and message.get("type") == "sessions"):
        message = receive(connection)


def finish(connection: ClientConnection) -> tuple[bytes, int]:
    """The output of the session "mine" from here on, and its exit code."""
    output = b""
    while True:
        message = receive(connection)
        if isinstance(message, bytes):
            output += message[len(b"..mine") :]
        elif message["type"] == "exit":
            return output, message["code"]


def test_an_agent_that_dials_in_speaks_version_2(setting: Setting) -> None:
    assert setting.conn.version == 2
    assert setting.conn.run(["id", "-u"], capture_output=True, text=True).stdout.strip() == "0"
    assert setting.conn.health()["exited"] is False
    assert [entry["kind"] for entry in setting.conn.sessions()] == ["main"]
    with setting.dial() as client:
        assert client.version == 2
        assert client.run(["sh", "-c", "exit 5"]).returncode == 5


def test_sessions_go_on_when_the_agent_dials_again(setting: Setting) -> None:
    conn = setting.conn
    counting = conn.popen(["sh", "-c", COUNT])
    echoing = conn.popen(["cat"])
    main = conn.attach()
    assert main.stdout.readline() == b"ready\n"
    eventually(lambda: echoing.started is not None, "cat runs")
    echoing.stdin.write(b"before ")
    assert counting.stdout.readline() == b"line 0\n"
    for number in range(3):
        setting.agent_link.cut()
        wanted = number + 2
        eventually(lambda wanted=wanted: setting.agent_link.connections >= wanted, "the agent dials again")
    echoing.stdin.write(b"after")
    echoing.stdin.close()
    assert echoing.stdout.read() == b"before after"
    assert echoing.wait(DEADLINE) == 0
    assert counting.stdout.read() == COUNTED[len(b"line 0\n") :]
    assert counting.wait(DEADLINE) == 7
    main.stdin.write(b"word\n")
    assert main.stdout.readline() == b"got word\n"
    assert setting.listener.get("box") is conn
    main.detach()


def test_an_idle_agent_that_dials_again_is_a_new_connection(setting: Setting) -> None:
    setting.agent_link.cut()
    eventually(lambda: setting.listener.get("box") not in (None, setting.conn), "the agent dials again")
    assert setting.listener.wait_for("box", DEADLINE).run(["true"]).returncode == 0


@pytest.mark.parametrize("which", ["client", "agent", "both"])
def test_a_client_behind_the_listener_goes_on_after_a_cut(setting: Setting, which: str) -> None:
    with setting.dial() as client:
        counting = client.popen(["sh", "-c", COUNT])
        echoing = client.popen(["cat"])
        digest = hashlib.sha256()

        def feed() -> None:
            for number in range(200):
                block = number.to_bytes(2, "big") * 10_000
                digest.update(block)
                echoing.stdin.write(block)
            echoing.stdin.close()

        feeder = threading.Thread(target=feed)
        feeder.start()
        echoed = hashlib.sha256()
        received = 0
        for number in range(4):
            while received < (number + 1) * 500_000:
                data = echoing.stdout.read(65536)
                assert data
                echoed.update(data)
                received += len(data)
            if which in ("client", "both"):
                setting.client_link.cut()
            if which in ("agent", "both"):
                setting.agent_link.cut()
        while data := echoing.stdout.read(65536):
            echoed.update(data)
        feeder.join(DEADLINE)
        assert echoing.wait(DEADLINE) == 0
        assert echoed.digest() == digest.digest()
        assert counting.stdout.read() == COUNTED
        assert counting.wait(DEADLINE) == 7
        eventually(lambda: [entry["kind"] for entry in client.sessions()] == ["main"], "nothing is left")


def test_an_agent_that_is_lost_during_a_clients_handshake_costs_the_client_nothing(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, asked = ReverseAgentConn.current_link, []

    def lost_for_a_moment(conn: ReverseAgentConn) -> Any:
        asked.append(conn)
        return None if len(asked) == 2 else really(conn)  # the first time is for the request, then for the response

    with setting.dial() as client:
        echoing = client.popen(["cat"])
        echoing.stdin.write(b"before\n")
        echoing.stdin.flush()
        assert echoing.stdout.readline() == b"before\n"
        monkeypatch.setattr(ReverseAgentConn, "current_link", lost_for_a_moment)
        setting.client_link.cut()
        echoing.stdin.write(b"after\n")
        echoing.stdin.close()
        assert echoing.stdout.read() == b"after\n"
        assert echoing.wait(DEADLINE) == 0
        assert len(asked) > 2


def test_many_clients_share_an_agent(setting: Setting) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(setting.dial()) for _ in range(8)]
        processes = [
            (number, client.popen(["sh", "-c", f"cat; exit {number}"])) for number, client in enumerate(clients)
        ]
        for number, process in processes:
            process.stdin.write(b"%d" % number * 100_000)
            process.stdin.close()
        for number, process in processes:
            assert process.stdout.read() == b"%d" % number * 100_000
            assert process.wait(DEADLINE) == number


def test_what_a_client_does_not_read_holds_back_its_own_command_alone(setting: Setting) -> None:
    with setting.dial() as client:
        paused = [client.popen(["sh", "-c", "head -c 8000000 /dev/zero; echo end"]) for _ in range(10)]
        for _ in range(3):
            assert client.run(["sh", "-c", "head -c 3000000 /dev/zero"], capture_output=True).stdout == bytes(3_000_000)
        assert len(setting.conn.run(["head", "-c", "3000000", "/dev/zero"], capture_output=True).stdout) == 3_000_000
        for process in paused:
            assert process.stdout.read() == bytes(8_000_000) + b"end\n"
            assert process.wait(DEADLINE) == 0


def test_a_version_1_client_gets_all_of_a_version_2_agents_output(setting: Setting) -> None:
    """More than the window: what the client reads is acknowledged for it."""
    import base64

    with connect(
        setting.url,
        additional_headers={"Authorization": f"Bearer {TOKEN}"},
        compression=None,
        max_size=None,
        proxy=None,
    ) as connection:
        assert connection.subprotocol is None
        send(connection, "exec", id="a", cmd=["sh", "-c", "head -c 9000000 /dev/zero; exit 3"])
        received = 0
        while (event := receive(connection))["type"] == "stdout":  # type: ignore[index]
            received += len(base64.b64decode(event["data"]))  # type: ignore[index]
        assert event == {"type": "exit", "id": "a", "code": 3}
        assert received == 9_000_000


def test_a_session_is_no_other_clients_without_its_secret(setting: Setting, raw: ClientConnection) -> None:
    send(raw, "exec", id="mine", cmd=["cat"])
    started = receive(raw)
    assert isinstance(started, dict)
    assert started["type"] == "started"
    with connect(
        setting.url,
        subprotocols=[SUBPROTOCOL],
        additional_headers={"Authorization": f"Bearer {TOKEN}"},
        compression=None,
        proxy=None,
    ) as other:
        for kind, fields in (
            ("resume", {"secret": "guessed", "offset": 0}),
            ("signal", {"signal": "KILL"}),
            ("end", {}),
            ("close_stdin", {}),
        ):
            send(other, kind, id="mine", **fields)
            error = receive(other)
            assert isinstance(error, dict)
            assert (error["type"], error["id"], error["reason"]) == ("error", "mine", "unknown_session")
        other.send(bytes((0, 4)) + b"mine" + b"stolen")
        error = receive(other)
        assert isinstance(error, dict)
        assert error["reason"] == "unknown_session"
        send(other, "exec", id="mine", cmd=["true"])
        error = receive(other)
        assert isinstance(error, dict)
        assert error["reason"] == "duplicate_session"
        # The first client has noticed nothing.
        raw.send(bytes((0, 4)) + b"mine" + b"hello")
        while not isinstance(message := receive(raw), bytes):
            assert message["type"] == "ack"
        assert message == bytes((1, 4)) + b"minehello"
        # Who shows the secret takes it over, with what has not been acknowledged.
        send(other, "resume", id="mine", secret=started["secret"], offset=0)
        resumed = receive(other)
        assert isinstance(resumed, dict)
        assert (resumed["type"], resumed["offset"], resumed["stdin"]) == ("resumed", 0, 5)
        while not isinstance(message := receive(other), bytes):
            assert message["type"] in ("ack", "started")
        assert message == bytes((1, 4)) + b"minehello"
        send(raw, "signal", id="mine", signal="KILL")  # late, and harmless
        send(other, "close_stdin", id="mine")
        while not (isinstance(message := receive(other), dict) and message["type"] == "exit"):
            pass
        assert message["code"] == 0


def test_a_secret_ends_no_other_clients_session_of_the_same_id(setting: Setting, raw: ClientConnection) -> None:
    send(raw, "exec", id="mine", cmd=["cat"], secret="a" * 16)
    assert receive(raw)["type"] == "started"
    with another(setting) as other:
        for connection in (other, raw):
            send(connection, "end", id="mine", secret="b" * 16)
            ask_and_wait(connection)  # the agent has had the end
    raw.send(bytes((0, 4)) + b"mine" + b"hello")
    send(raw, "close_stdin", id="mine")
    assert finish(raw) == (b"hello", 0)


def test_an_id_that_no_data_frame_can_hold_is_refused_and_all_goes_on(setting: Setting, raw: ClientConnection) -> None:
    with another(setting) as other:
        for connection in (other, raw):
            for kind in ("exec", "resume"):
                send(connection, kind, id="x" * 256, cmd=["true"], secret="a" * 16, offset=0)
                error = receive(connection)
                assert isinstance(error, dict)
                assert (error["id"], error["reason"]) == ("x" * 256, "bad_request" if kind == "exec" else "bad_message")
    assert not setting.conn._routes


@pytest.mark.parametrize("kind", ["exec", "resume"])
def test_what_comes_late_on_an_earlier_connection_takes_nothing_over(
    setting: Setting, raw: ClientConnection, kind: str
) -> None:
    send(raw, "exec", id="mine", cmd=["cat"], secret="a" * 16, connection=2)
    while receive(raw)["type"] != "started":
        pass
    with another(setting) as late:
        send(late, kind, id="mine", cmd=["cat"], secret="a" * 16, offset=0, connection=1)
        error = receive(late)
        assert (error["type"], error["id"], error["reason"]) == ("error", "mine", "duplicate_session")
    raw.send(bytes((0, 4)) + b"mine" + b"hello")
    send(raw, "close_stdin", id="mine")
    assert finish(raw) == (b"hello", 0)


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        ("exec", {"cmd": ["nosuch"]}, "not_found"),
        ("exec", {"cmd": ["true"], "workdir": "/nonexistent"}, "start_failed"),
        ("exec", {"cmd": ["nosuch"], "detach": True}, "not_found"),
        ("attach", {"session": "nosuch"}, "no_detached_command"),
        ("resume", {"secret": "b" * 16, "offset": 0}, "unknown_session"),
    ],
)
def test_an_id_is_free_again_once_a_start_has_failed(
    setting: Setting, raw: ClientConnection, kind: str, fields: dict[str, object], reason: str
) -> None:
    """For this client, and for another of the listener."""
    with another(setting) as other:
        for connection in (raw, other, raw):
            send(connection, kind, id="mine", **fields)
            error = receive(connection)
            assert isinstance(error, dict)
            assert (error["type"], error["reason"]) == ("error", reason)
        assert not setting.conn._routes
        send(other, "exec", id="mine", cmd=["sh", "-c", "exit 3"])
        assert finish(other) == (b"", 3)


def test_an_id_is_free_again_once_a_command_is_detached(setting: Setting, raw: ClientConnection) -> None:
    send(raw, "exec", id="mine", cmd=["true"], detach=True)
    started = receive(raw)
    assert isinstance(started, dict)
    assert started["type"] == "started"
    assert not setting.conn._routes
    with another(setting) as other:
        send(other, "attach", id="mine", session="mine")
        assert finish(other) == (b"", 0)


@pytest.mark.parametrize(
    ("request_of_other", "words"),
    [
        ({"offset": 5}, "offset 5 is not from 1 to 4"),
        ({"offset": 0}, "offset 0 is not from 1 to 4"),
        ({"offset": 2, "acked": 3}, "3 bytes are acknowledged, and 2 received"),
        ({"cmd": ["cat"]}, "offset 0 is not from 1 to 4"),
    ],
)
def test_a_resume_that_makes_no_sense_disturbs_nobody(
    setting: Setting, raw: ClientConnection, request_of_other: dict[str, object], words: str
) -> None:
    secret = "a" * 16
    send(raw, "exec", id="mine", cmd=["cat"], secret=secret)
    raw.send(bytes((0, 4)) + b"mine" + b"four")
    while receive(raw) != bytes((1, 4)) + b"minefour":
        pass
    send(raw, "ack", id="mine", offset=1)
    ask_and_wait(raw)
    kind = "exec" if "cmd" in request_of_other else "resume"
    with another(setting) as other:
        send(other, kind, id="mine", secret=secret, **request_of_other)
        error = receive(other)
        assert isinstance(error, dict)
        assert (error["type"], error["reason"], error["message"]) == ("error", "bad_request", f"resume: {words}")
        raw.send(bytes((0, 4)) + b"mine" + b"more")
        while receive(raw) != bytes((1, 4)) + b"minemore":
            pass
        (session,) = [entry for entry in setting.conn.sessions() if entry["kind"] == "exec"]
        assert session["connected"]
        # One that makes sense takes it over, of course.
        send(other, "resume", id="mine", secret=secret, offset=6, acked=5)
        resumed = receive(other)
        assert isinstance(resumed, dict)
        assert (resumed["type"], resumed["offset"]) == ("resumed", 6)
        send(other, "close_stdin", id="mine")
        assert finish(other) == (b"re", 0)


def test_a_session_that_is_asked_for_as_the_link_is_lost_leaves_no_route(
    setting: Setting, raw: ClientConnection
) -> None:
    send(raw, "exec", id="mine", cmd=["cat"])
    receive(raw)
    (client,) = setting.conn._clients
    # The route that the client's thread makes once the others are forgotten, and before the client is told.
    client.link_lost()
    assert not setting.conn._routes


def test_questions_keep_the_ids_that_their_askers_gave(setting: Setting, raw: ClientConnection) -> None:
    send(raw, "sessions")
    answer = receive(raw)
    assert isinstance(answer, dict)
    assert answer["type"] == "sessions"
    assert "id" not in answer
    send(raw, "sessions", id="q1")
    send(raw, "health", id="q2")
    send(raw, "archive_stat", id="q3", path="/nowhere")
    send(raw, "stats", id="q4")
    answers = {}
    while len(answers) < 4:
        answer = receive(raw)
        assert isinstance(answer, dict)
        answers[answer["id"]] = answer
    assert [answers[f"q{number}"]["type"] for number in (1, 2, 3, 4)] == ["sessions", "health", "error", "stats"]
    assert answers["q3"]["reason"] == "no_such_path"
    assert answers["q4"]["stats"]["sessions"][0]["kind"] == "main"


def test_a_client_that_vanishes_may_come_back_within_the_window_and_not_after_it(tmp_path: Path) -> None:
    setting = Setting(tmp_path, "--resume-window", "2s")
    try:
        client = setting.dial()
        process = client.popen(["sh", "-c", "read line; echo got $line; exec sleep 300"])
        eventually(lambda: process.started is not None, "it has started")
        setting.client_link.refusing = True
        setting.client_link.cut()
        eventually(
            lambda: [entry["connected"] for entry in setting.conn.sessions()] == [False], "the session is parked"
        )
        setting.client_link.refusing = False
        process.stdin.write(b"back\n")
        assert process.stdout.readline() == b"got back\n"
        setting.client_link.refusing = True
        setting.client_link.cut()
        eventually(lambda: setting.conn.sessions() == [], "the session is over")
        setting.client_link.refusing = False
        with pytest.raises(ConnectionLost, match="session lost"):
            process.wait(DEADLINE)
        client.close()
    finally:
        setting.close()


def test_health_and_the_end_of_the_lifetime_reach_those_behind_the_listener(tmp_path: Path) -> None:
    healthy = tmp_path / "healthy"
    setting = Setting(
        tmp_path, "--health-cmd", f"test -e {healthy}", "--health-interval", "50ms", "--health-retries", "1",
        "--lifetime-signal", "USR1",
    )  # fmt: skip
    try:
        with setting.dial() as client:
            own: list[dict[str, Any]] = []
            theirs: list[dict[str, Any]] = []
            setting.conn.on_health, client.on_health = own.append, theirs.append
            client.health()
            healthy.touch()
            eventually(lambda: own and theirs and theirs[-1]["health"]["status"] == "healthy", "both have heard of it")
            assert own[-1]["health"]["status"] == "healthy"
            setting.agent.process.send_signal(10)
            assert client.lifetime_expired.wait(DEADLINE)
            with pytest.raises(SessionError):
                client.run(["true"])
    finally:
        setting.close()


def test_nothing_of_a_client_is_left_at_the_listener(setting: Setting) -> None:
    for _ in range(20):
        with setting.dial() as client:
            assert client.run(["echo", "x"], capture_output=True).stdout == b"x\n"
            client.stats()
            process = client.popen(["sleep", "300"])
            eventually(lambda process=process: process.started is not None, "it has started")
    eventually(lambda: not setting.conn._routes and not setting.conn._clients, "the listener has forgotten them")
    eventually(lambda: [entry["kind"] for entry in setting.conn.sessions()] == ["main"], "nothing runs")


def test_an_agent_that_does_not_come_back_ends_what_it_had(setting: Setting) -> None:
    setting.conn._patience = 1.0
    process = setting.conn.popen(["sleep", "300"])
    with setting.dial() as client:
        client._patience = 1.0
        other = client.popen(["sleep", "300"])
        eventually(lambda: process.started is not None and other.started is not None, "both have started")
        setting.agent_link.refusing = True
        setting.agent.process.kill()
        for waiting in (process, other):
            with pytest.raises(ConnectionLost):
                waiting.wait(DEADLINE)
    eventually(lambda: len(setting.listener) == 0, "the agent has left")
    with pytest.raises(ClientError, match="no such agent"):
        setting.dial()


def test_an_agent_that_dials_again_as_it_is_given_up_is_not_kept_waiting(setting: Setting) -> None:
    conn = setting.conn
    conn._patience = 0.5
    forget, adopted = conn._on_closed, []
    assert forget is not None

    def dial_again(conn: ReverseAgentConn) -> None:
        adopted.append(conn.adopt(conn._connection))
        forget(conn)

    conn._on_closed = dial_again
    process = conn.popen(["sleep", "300"])
    eventually(lambda: process.started is not None, "it has started")
    setting.agent_link.refusing = True
    setting.agent_link.cut()
    with pytest.raises(ConnectionLost):
        process.wait(DEADLINE)
    assert adopted == [False]

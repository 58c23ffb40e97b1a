"""The gateway's API as bytes on a socket: what Docker's clients do not show, and what other clients do."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from by_hand import UPGRADE, Connection
from docking import Gateway
from support import Agent, eventually, need, need_root, wait_gone


@pytest.fixture
def dial(gateway: Gateway) -> Iterator[Callable[[], Connection]]:
    """Connect to the module's gateway."""
    with contextlib.ExitStack() as stack:

        def connect() -> Connection:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(gateway.path))
            return Connection(sock)

        yield connect


@pytest.fixture
def connection(dial: Callable[[], Connection]) -> Connection:
    return dial()


# ── HTTP ──────────────────────────────────────────────────────────────────────


def test_ping_says_who_is_there(connection: Connection) -> None:
    for method in ("GET", "HEAD"):
        connection.send(method, "/_ping")
        status, headers = connection.read_head()
        assert status == 200 and connection.read(2 if method == "GET" else 0) in (b"OK", b"")
        assert headers["api-version"] == "1.47" and headers["docker-experimental"] == "false"
        assert headers["ostype"] == "linux" and headers["server"].startswith("sockerless-agent/")
        assert headers["content-type"] == "text/plain; charset=utf-8" and headers["content-length"] == "2"


def test_errors_are_dockers_json_and_leave_the_connection_usable(connection: Connection) -> None:
    for method, path, status, message in (
        ("GET", "/nonsense", 404, "page not found"),
        ("GET", "/v1.47/containers/nobody/json", 404, "No such container: nobody"),
        ("GET", "/v1.99/_ping", 400, "client version 1.99 is too new. Maximum supported API version is 1.47"),
        ("GET", "/containers/json?filters=nonsense", 400, "invalid filters: 'nonsense'"),
        ("POST", "/containers/create", 501, "POST /containers/create: containers are created by the platform"),
        ("POST", "/containers/web/restart", 501, "restart: the platform that runs the agents does that, not an agent"),
        ("POST", "/containers/nobody/restart", 404, "No such container: nobody"),
        ("POST", "/containers/web/kill?signal=NONSENSE", 400, "Invalid signal: NONSENSE"),
        ("GET", "/exec/123/json", 404, "No such exec instance: 123"),
        ("POST", "/containers/web/attach?stream=1&detachKeys=ctrl-", 400, "Invalid detach keys (ctrl-) provided"),
        ("GET", "/containers/web/logs", 400, "Bad parameters: you must choose at least one stream"),
        ("GET", "/containers/web/archive", 400, "bad parameter: path cannot be empty"),
        ("GET", "/events?until=nan", 400, "invalid value for 'until': 'nan'"),
        ("GET", "/containers/web/logs?stdout=1&since=inf", 400, "invalid value for 'since': 'inf'"),
        ("GET", "/containers/web/top?ps_args=%22", 501, "top: '\"': No closing quotation"),
    ):
        found, answer = connection.ask(method, path)
        assert (found, answer["message"][: len(message)]) == (status, message)
    for body, message in (
        ([], "an object is wanted"),
        ({"Cmd": []}, "No exec command specified"),
        ({"Cmd": None}, "No exec command specified"),
        ({"Cmd": ["ls"], "ConsoleSize": [float("inf"), 80]}, "invalid console size: [inf, 80]"),
    ):
        found, answer = connection.ask("POST", "/containers/web/exec", body)
        assert found == 400 and message in answer["message"]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("Cmd", "ls", "string into Go struct field ExecOptions.Cmd of type []string"),
        ("Cmd", 5, "number into Go struct field ExecOptions.Cmd of type []string"),
        ("cmd", ["ls", 5], "number into Go struct field ExecOptions.Cmd of type string"),
        ("Cmd", [["ls"]], "array into Go struct field ExecOptions.Cmd of type string"),
        ("Env", "x", "string into Go struct field ExecOptions.Env of type []string"),
        ("Env", {"A": "1"}, "object into Go struct field ExecOptions.Env of type []string"),
        ("Env", [True], "bool into Go struct field ExecOptions.Env of type string"),
        ("WorkingDir", 1.5, "number into Go struct field ExecOptions.WorkingDir of type string"),
        ("User", 0, "number into Go struct field ExecOptions.User of type string"),
        ("Tty", "yes", "string into Go struct field ExecOptions.Tty of type bool"),
        ("AttachStdin", 1, "number into Go struct field ExecOptions.AttachStdin of type bool"),
        ("AttachStdout", [], "array into Go struct field ExecOptions.AttachStdout of type bool"),
        ("AttachStderr", {}, "object into Go struct field ExecOptions.AttachStderr of type bool"),
        ("DetachKeys", False, "bool into Go struct field ExecOptions.DetachKeys of type string"),
        ("Privileged", "false", "string into Go struct field ExecOptions.Privileged of type bool"),
        ("ConsoleSize", "80x24", "string into Go struct field ExecOptions.ConsoleSize of type [2]uint"),
    ],
)
def test_a_field_of_a_wrong_type_is_named(connection: Connection, field: str, value: object, words: str) -> None:
    body = {"Cmd": ["true"], field: value}
    status, answer = connection.ask("POST", "/containers/web/exec", body)
    assert (status, answer["message"]) == (400, f"invalid JSON: json: cannot unmarshal {words}")


def test_a_start_with_a_field_of_a_wrong_type_starts_nothing(connection: Connection) -> None:
    exec_id = connection.create("true")
    for field, value in (("Detach", "no"), ("Tty", 0), ("ConsoleSize", {"h": 1}), ("ConsoleSize", ["24", "80"])):
        status, answer = connection.ask("POST", f"/exec/{exec_id}/start", {field: value})
        assert status == 400 and ("ConsoleSize" in field or f"ExecStartOptions.{field}" in answer["message"])
    assert connection.ask("POST", f"/exec/{exec_id}/start", {"Detach": True, "Tty": None})[0] == 200


def test_what_is_null_is_as_if_it_were_not_there_and_what_is_no_text_is_replaced(
    connection: Connection, dial: Callable[[], Connection]
) -> None:
    fields = ("Env", "WorkingDir", "User", "Tty", "DetachKeys", "Privileged", "ConsoleSize")
    exec_id = connection.create("printf", "%s", "half: \ud800.", **dict.fromkeys(fields))
    started = dial()
    started.send("POST", f"/exec/{exec_id}/start", *UPGRADE, body=b"{}")
    assert started.read_head()[0] == 101
    assert started.frames() == [(1, "half: \ufffd.".encode())]


def test_a_body_may_come_in_chunks(connection: Connection) -> None:
    body = json.dumps({"Cmd": ["true"]}).encode()
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:5], body[5:])) + b"0\r\n\r\n"
    connection.send("POST", "/containers/web/exec", "Transfer-Encoding: chunked", body=chunks)
    assert connection.read_answer()[0] == 201
    assert connection.ask("GET", "/info")[0] == 200


def test_what_is_no_http_is_refused_and_harms_nobody(dial: Callable[[], Connection]) -> None:
    for data in (
        b"nonsense\r\n\r\n",
        b"GET /_ping HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    ):
        connection = dial()
        connection.sock.sendall(data)
        assert b"message" in connection.read_rest()
    for chunk in (b"zz\r\n", b"-5\r\nhello\r\n", b"0x5\r\nhello\r\n", b"f" * 30 + b"\r\n"):
        connection = dial()
        connection.send("POST", "/containers/web/exec", "Transfer-Encoding: chunked", body=chunk)
        assert connection.read_answer()[0] == 400
    for length in ("-1", "+2", "1_0", "9" * 30, "two"):
        connection = dial()
        connection.send("POST", "/containers/web/exec", f"Content-Length: {length}")
        status, _, answer = connection.read_answer()
        assert status == 400 and b"invalid Content-Length" in answer
    connection = dial()
    connection.send("POST", "/containers/web/exec", body=b"[" * 100_000)
    status, _, answer = connection.read_answer()
    assert status == 400 and b"invalid JSON" in answer
    assert dial().ask("GET", "http://[/_ping")[0] == 400
    assert dial().ask("GET", "/info")[0] == 200


def test_web_pages_are_refused(connection: Connection) -> None:
    status, answer = connection.ask("POST", "/containers/web/exec", {"Cmd": ["true"]}, "Origin: http://localhost:2375")
    assert (status, answer["message"]) == (403, "web pages may not use this endpoint")


# ── hijacked connections ──────────────────────────────────────────────────────

SCRIPT = "cat; echo err >&2; exit 3"


@pytest.mark.parametrize(
    ("headers", "version", "status", "content_type"),
    [
        (UPGRADE, "", 101, "application/vnd.docker.multiplexed-stream"),
        (UPGRADE, "/v1.41", 101, "application/vnd.docker.raw-stream"),
        ((), "", 200, "application/vnd.docker.raw-stream"),
    ],
)
def test_a_command_has_the_connection_to_itself(
    connection: Connection, headers: tuple[str, ...], version: str, status: int, content_type: str
) -> None:
    exec_id = connection.create("sh", "-c", SCRIPT, AttachStdin=True)
    connection.send("POST", f"{version}/exec/{exec_id}/start", *headers, body=b'{"Detach":false,"Tty":false}')
    found, answered = connection.read_head()
    assert (found, answered["content-type"]) == (status, content_type)
    assert ("upgrade" in answered) == (status == 101) and "content-length" not in answered
    connection.sock.sendall(b"hello")
    connection.sock.shutdown(socket.SHUT_WR)
    assert sorted(connection.frames()) == [(1, b"hello"), (2, b"err\n")]


def test_stdin_may_come_right_behind_the_request(connection: Connection) -> None:
    exec_id = connection.create("sh", "-c", SCRIPT, AttachStdin=True)
    body = b"{}"
    head = [f"POST /exec/{exec_id}/start HTTP/1.1", "Host: docker", *UPGRADE, f"Content-Length: {len(body)}", "", ""]
    connection.sock.sendall("\r\n".join(head).encode() + body + b"early")
    connection.sock.shutdown(socket.SHUT_WR)
    assert connection.read_head()[0] == 101
    assert sorted(connection.frames()) == [(1, b"early"), (2, b"err\n")]


def test_a_terminal_is_raw_and_has_its_size_from_the_first_byte(
    connection: Connection, dial: Callable[[], Connection]
) -> None:
    for where in ("create", "start"):
        size = {"ConsoleSize": [33, 111]}
        exec_id = connection.create("sh", "-c", "stty size", Tty=True, **(size if where == "create" else {}))
        started = dial()
        body = {"Tty": True, **(size if where == "start" else {})}
        started.send("POST", f"/exec/{exec_id}/start", *UPGRADE, body=json.dumps(body).encode())
        status, headers = started.read_head()
        assert (status, headers["content-type"]) == (101, "application/vnd.docker.raw-stream")
        assert started.read_rest() == b"33 111\r\n"


def test_only_the_wanted_streams_are_sent(connection: Connection, dial: Callable[[], Connection]) -> None:
    for wanted, expected in (({"AttachStderr": False}, [(1, b"out\n")]), ({"AttachStdout": False}, [(2, b"err\n")])):
        exec_id = connection.create("sh", "-c", "echo out; echo err >&2", **wanted)
        started = dial()
        started.send("POST", f"/exec/{exec_id}/start", *UPGRADE, body=b"{}")
        assert started.read_head()[0] == 101
        assert started.frames() == expected


def test_a_failure_to_start_is_output_and_an_exit_code(connection: Connection, dial: Callable[[], Connection]) -> None:
    exec_id = connection.create("nosuch")
    started = dial()
    started.send("POST", f"/exec/{exec_id}/start", *UPGRADE, body=b"{}")
    assert started.read_head()[0] == 101
    ((stream, words),) = started.frames()
    assert stream == 1 and words.endswith(b'exec: "nosuch": executable file not found in $PATH: unknown\r\n')
    status, state = connection.ask("GET", f"/exec/{exec_id}/json")
    assert (status, state["Running"], state["ExitCode"]) == (200, False, 127)
    status, answer = connection.ask("POST", f"/exec/{exec_id}/start", {})
    assert (status, answer["message"]) == (409, f"Error: Exec command {exec_id} has already run")


def test_attach_can_ask_for_what_was_and_for_what_will_be(dial: Callable[[], Connection], web: Agent) -> None:
    first = dial()
    first.send("POST", "/containers/web/attach?logs=1&stdout=1", *UPGRADE)
    assert first.read_head()[0] == 101
    assert first.frames()[0] == (1, b"ready\n")
    live = dial()
    live.send("POST", "/containers/web/attach?stream=1&stdout=1&stdin=1", *UPGRADE)
    assert live.read_head()[0] == 101
    live.sock.sendall(b"from the socket\n")
    assert live.read(8 + 20) == struct.pack(">BxxxL", 1, 20) + b"got from the socket\n"
    neither = dial()
    neither.send("POST", "/containers/web/attach?stdout=1", *UPGRADE)
    assert neither.read_head()[0] == 101
    assert neither.frames() == []


def test_wait_answers_with_its_head_at_once(connection: Connection) -> None:
    connection.send("POST", "/containers/web/wait?condition=next-exit")
    status, headers = connection.read_head()
    assert (status, headers["content-type"], headers["transfer-encoding"]) == (200, "application/json", "chunked")


# ── TCP ───────────────────────────────────────────────────────────────────────


@pytest.fixture
def tcp(web: Agent, start_gateway: Callable[..., Gateway]) -> tuple[Gateway, tuple[str, int]]:
    """A gateway that listens on TCP, too, and where."""
    gateway = start_gateway("-H", "tcp://127.0.0.1:0", f"--agent=web={web.address}")
    gateway.wait_for_log("agent web: connected")
    host, port = gateway.wait_for_log(r"clients on (127\.0\.0\.1):(\d+)").groups()
    return gateway, (host, int(port))


def test_tcp_is_served_as_a_unix_socket_is(tcp: tuple[Gateway, tuple[str, int]]) -> None:
    gateway, (host, port) = tcp
    result = gateway.docker(
        "-H", f"tcp://{host}:{port}", "exec", "-i", "web", "sh", "-c", SCRIPT, data=b"hello", env={"DOCKER_HOST": ""}
    )
    assert result == (3, b"hello", b"err\n")


QUICK_NETWORK = 'ip link set lo up && echo 1 > /proc/sys/net/ipv4/tcp_fin_timeout && exec "$@"'


@pytest.mark.root
def test_a_client_on_tcp_that_is_killed_leaves_nothing_running(
    start_agent: Callable[..., Agent], start_gateway: Callable[..., Gateway], tmp_path: Path
) -> None:
    """It has closed its stdin before, so that the connection looks no different until the client's kernel forgets it.

    That is after a minute, in a network of its own after a second.
    """
    need("unshare", "nsenter", "ip")
    need_root()
    agent = start_agent("--addr", f"unix:{tmp_path}/agent.sock")
    prefix = ("unshare", "--net", "sh", "-c", QUICK_NETWORK, "sh")
    gateway = start_gateway("-H", "tcp://127.0.0.1:2375", f"--agent=web={agent.address}", prefix=prefix)
    gateway.wait_for_log("agent web: connected")
    gateway.wait_for_log("clients on 127.0.0.1:2375")
    enter = ("nsenter", "--net", "--target", str(gateway.process.pid), "docker", "-H", "tcp://127.0.0.1:2375")
    for number, words in enumerate((["exec"], ["exec", "-i"])):
        path = tmp_path / f"pid{number}"
        command = (*enter, *words, "web", "sh", "-c", f"echo $$ > {path}; exec sleep 1000")
        with subprocess.Popen(command, env={**gateway.environ, "DOCKER_HOST": ""}, stdin=subprocess.PIPE) as process:
            pid = read_pid(path)
            process.kill()
        wait_gone(pid)


def read_pid(path: Path) -> int:
    """The PID that a command has written to a file."""
    return int(eventually(lambda: path.exists() and path.read_text().strip(), f"a PID in {path}"))


def test_a_slow_reader_holds_up_its_own_command_only(
    dial: Callable[[], Connection], gateway: Gateway, tmp_path: Path
) -> None:
    slow = dial()
    counter = tmp_path / "count"
    script = f"i=0; while [ $i -lt 64 ]; do head -c 1048576 /dev/zero; i=$((i+1)); echo $i > {counter}; done"
    exec_id = slow.create("sh", "-c", script)
    slow.send("POST", f"/exec/{exec_id}/start", *UPGRADE, body=b"{}")
    assert slow.read_head()[0] == 101
    eventually(lambda: counter.exists(), "its first MiB")
    for _ in range(3):
        assert gateway.output("exec", "web", "echo", "quick") == "quick\n"
    assert int(counter.read_text() or 0) < 64
    assert sum(len(data) for _, data in slow.frames()) == 64 << 20


def test_many_clients_may_watch_at_once(dial: Callable[[], Connection], gateway: Gateway) -> None:
    watching = [dial() for _ in range(20)]
    for connection in watching:
        connection.send("GET", '/events?filters={"event":["exec_die"]}')
        assert connection.read_head()[0] == 200
    gateway.output("exec", "web", "true")
    seen = []
    for connection in watching:
        size = int(connection.read_line(), 16)
        seen.append(json.loads(connection.read(size))["Actor"]["Attributes"]["execID"])
    assert len(set(seen)) == 1 and re.fullmatch("[0-9a-f]{64}", seen[0])


def test_the_gateway_keeps_no_thread_and_no_descriptor_of_clients_that_left(
    gateway: Gateway, dial: Callable[[], Connection]
) -> None:
    def run() -> None:
        for _ in range(10):
            gateway.output("exec", "web", "true")

    def descriptors() -> int:
        return len(list(Path(f"/proc/{gateway.process.pid}/fd").iterdir()))

    run()
    before = descriptors()
    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    eventually(lambda: descriptors() <= before, f"{before} descriptors or less")

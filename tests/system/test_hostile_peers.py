"""A hostile server against the client's command line, a hostile backend against the agent in reverse mode.

Whatever they answer to the handshake or send after it: a clear error, the right exit status, no hang, no traceback.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from running import DEADLINE, TOKEN, RunningAgent
from support import eventually
from websockets.utils import accept_key
from wire import BINARY, CLOSE, CONT, PING, PONG, TEXT, VERSION_2, Wire, close, frame

from agent_client import ReverseListener

pytestmark = pytest.mark.once
ROOT = Path(__file__).resolve().parents[2]
INPUTS = int(os.environ.get("FUZZ_INPUTS", "60"))  # random ones
EVERY_ONE = "FUZZ_INPUTS" in os.environ  # also those that take their time

Record = Callable[[str, object], None]
Behaviour = Callable[[socket.socket, bytes], None]  # what is done with a connection, and the head of its request


class HostileServer:
    """Accepts connections, reads the head of each request, and does its worst; each in a thread."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.dials = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                sock, _ = self._listener.accept()
                self.dials += 1
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):  # the other side has had enough
            sock.settimeout(DEADLINE)
            head = b""
            while b"\r\n\r\n" not in head:
                data = sock.recv(65536)
                if not data:
                    return
                head += data
            self.behaviour(sock, head)
            # What it says first is to count, and not that it closes with something unread.
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass

    def __enter__(self) -> HostileServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def upgraded(head: bytes, *lines: str) -> bytes:
    """The right answer to a handshake."""
    key = re.search(rb"(?i)sec-websocket-key: (\S+)", head)
    assert key is not None
    accept = accept_key(key[1].decode())
    return "\r\n".join(
        ["HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade",
         f"Sec-WebSocket-Accept: {accept}", *lines, "", ""]
    ).encode()  # fmt: skip


def answer(data: bytes) -> Behaviour:
    return lambda sock, head: sock.sendall(data)


def endless(start: bytes, more: bytes) -> Behaviour:
    """An answer that goes on until who dialled hangs up."""

    def send(sock: socket.socket, head: bytes) -> None:
        sock.sendall(start)
        while True:
            sock.sendall(more)

    return send


def reset(sock: socket.socket, head: bytes) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


# Answers to the handshake. None of them is a connection.
HANDSHAKES: dict[str, Behaviour] = {
    "nothing": answer(b""),
    "a reset": reset,
    "half a line": answer(b"HTTP/1.1 1"),
    "an empty line": answer(b"\r\n\r\n"),
    "zeros": answer(bytes(1000)),
    "bytes of all kinds": answer(bytes(range(256)) * 4),
    "TLS": answer(b"\x15\x03\x01\x00\x02\x02\x46"),
    "another protocol": answer(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"),
    "HTTP/1.0": answer(b"HTTP/1.0 200 OK\r\n\r\n"),
    "HTTP/0.9": answer(b"<html></html>"),
    "a status of four digits": answer(b"HTTP/1.1 1011 Odd\r\n\r\n"),
    "a status that is no number": answer(b"HTTP/1.1 abc\r\n\r\n"),
    "a status of 0": answer(b"HTTP/1.1 000 \r\n\r\n"),
    "200": answer(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"),
    "a body that is cut": answer(b"HTTP/1.1 500 Oops\r\nContent-Length: 500\r\n\r\nhello"),
    "a length that is no number": answer(b"HTTP/1.1 500 Oops\r\nContent-Length: many\r\n\r\nhello"),
    "a length that is negative": answer(b"HTTP/1.1 500 Oops\r\nContent-Length: -5\r\n\r\nhello"),
    "chunks": answer(b"HTTP/1.1 404 No\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
    "chunks that are none": answer(b"HTTP/1.1 404 No\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\nhello"),
    "a body with control characters": answer(b"HTTP/1.1 403 No\r\nContent-Length: 9\r\n\r\n\x1b[31m\xff\r\n\0"),
    "headers without end": endless(b"HTTP/1.1 101 Switching Protocols\r\n", b"X-Header: y\r\n" * 100),
    "a header without end": endless(b"HTTP/1.1 101 Switching Protocols\r\nX: ", b"y" * 10_000),
    "a line without end": endless(b"HTTP/1.1 101 ", b"y" * 10_000),
    "a header without a name": answer(b"HTTP/1.1 101 Switching Protocols\r\n: x\r\n\r\n"),
    "a folded header": answer(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade:\r\n websocket\r\n\r\n"),
    "101 without anything": answer(b"HTTP/1.1 101 Switching Protocols\r\n\r\n"),
    "101 for another key": lambda sock, head: sock.sendall(
        upgraded(b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
    ),
    "101 for another protocol": lambda sock, head: sock.sendall(upgraded(head).replace(b"websocket", b"h2c")),
    "101 with an extension that was not offered": lambda sock, head: sock.sendall(
        upgraded(head, "Sec-WebSocket-Extensions: permessage-deflate")
    ),
    "101 with a subprotocol that was not offered": lambda sock, head: sock.sendall(
        upgraded(head, "Sec-WebSocket-Protocol: chat")
    ),
    "101 with two subprotocols": lambda sock, head: sock.sendall(upgraded(head, VERSION_2, VERSION_2)),
    "a redirection to nowhere": answer(b"HTTP/1.1 302 Found\r\nLocation: \r\nContent-Length: 0\r\n\r\n"),
    "a redirection to no URL": answer(b"HTTP/1.1 302 Found\r\nLocation: ws://[::\r\nContent-Length: 0\r\n\r\n"),
    "a redirection to a file": answer(b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n"),
    "a redirection without a place": answer(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n"),
    "a redirection in a circle": answer(b"HTTP/1.1 307 Again\r\nLocation: /ws\r\nContent-Length: 0\r\n\r\n"),
}  # fmt: skip

# Frames of a server that break the protocol, and the close code that they get.
FAULTS: dict[str, tuple[bytes, int]] = {
    "bytes of all kinds": (bytes(range(255, -1, -1)), 1002),
    "a mask": (frame(TEXT, b"{}"), 1002),
    "reserved bits": (frame(TEXT, b"{}", rsv=4, masked=False), 1002),
    "an opcode that there is not": (frame(11, masked=False), 1002),
    "a ping that is too long": (frame(PING, bytes(126), masked=False), 1002),
    "nothing to continue": (frame(CONT, b"x", masked=False), 1002),
    "a message within a message": (frame(TEXT, fin=False, masked=False) + frame(TEXT, masked=False), 1002),
    "a close of one byte": (frame(CLOSE, b"x", masked=False), 1002),
    "close code 1006": (close(1006, masked=False), 1002),
    "not UTF-8": (frame(TEXT, b"\xc0\xaf", masked=False), 1007),
    "not UTF-8, in fragments": (
        frame(TEXT, b"\xed", fin=False, masked=False) + frame(CONT, b"\xa0\x80", masked=False), 1007,
    ),
    "a reason that is not UTF-8": (close(1000, b"\xff", masked=False), 1007),
    "a length of 2^63": (frame(BINARY, length=1 << 63, form=127, masked=False), 1009),
    "a message that is too long": (frame(BINARY, length=(64 << 20) + 1, form=127, masked=False), 1009),
}  # fmt: skip


def run_client(port: int, *options: str) -> tuple[int, str, str]:
    """``agent_client exec`` against a server: exit status, stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "agent_client", "exec", "--addr", f"127.0.0.1:{port}", *options, "--", "true"],
        cwd=ROOT,
        env={**os.environ, "SOCKERLESS_AGENT_TOKEN": TOKEN, "LC_ALL": "C", "PYTHONUTF8": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=DEADLINE,
    )
    return (
        done.returncode,
        done.stdout.decode("utf-8", "backslashreplace"),
        done.stderr.decode("utf-8", "backslashreplace"),
    )


def side_by_side(check: Callable[[str], None], names: list[str]) -> None:
    """Check each, two at a time: most of it is the start of a Python."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for result in [pool.submit(check, name) for name in names]:
            result.result()


def assert_clear(name: str, done: tuple[int, str, str], code: int = 125) -> None:
    status, stdout, stderr = done
    assert status == code, f"{name}: {done}"
    assert stdout == ""
    assert "Traceback" not in stderr and re.fullmatch(r"(\n?agent_client: [^\n]+\n)+", stderr), f"{name}: {stderr}"
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", stderr), f"{name}: {stderr!r}"


@pytest.mark.parametrize("part", [0, 1])
def test_no_answer_to_the_handshake_confuses_the_client(part: int, record_property: Record) -> None:
    def check(name: str) -> None:
        with HostileServer(HANDSHAKES[name]) as server:
            assert_clear(name, run_client(server.port))

    side_by_side(check, list(HANDSHAKES)[part::2])
    record_property("inputs", ("answers to a handshake, for the client", len(list(HANDSHAKES)[part::2])))


@pytest.mark.parametrize("version", [1, 2])
def test_frames_that_break_the_protocol_end_the_client_with_an_error(version: int, record_property: Record) -> None:
    def check(name: str) -> None:
        data, expected = FAULTS[name]
        codes = []

        def behave(sock: socket.socket, head: bytes) -> None:
            sock.sendall(upgraded(head, *[VERSION_2] * (version - 1)))
            wire = Wire(sock, masked=False)
            request = wire.read()
            assert request is not None and b'"exec"' in request[1]
            wire.send(data)
            codes.append(wire.read_all()[1])

        with HostileServer(behave) as server:
            assert_clear(name, run_client(server.port, "--reconnect", "1s"))
            assert server.dials > 1 or version == 1
            assert eventually(lambda: codes, "the end of a connection")[0] == expected, f"{name}: closed with {codes}"

    # In version 2 each is dialled again for as long as --reconnect says.
    chosen = list(FAULTS) if version == 1 or EVERY_ONE else ["bytes of all kinds", "not UTF-8", "a length of 2^63"]
    side_by_side(check, chosen)
    record_property("inputs", ("faults of a server, for the client", len(chosen)))


def served(version: int, replies: Callable[[str], bytes]) -> Behaviour:
    """Answer an exec with what ``replies`` makes of its id."""

    def behave(sock: socket.socket, head: bytes) -> None:
        sock.sendall(upgraded(head, *[VERSION_2] * (version - 1)))
        wire = Wire(sock, masked=False)
        while (message := wire.read()) is not None:
            if b'"exec"' in message[1]:
                wire.send(replies(json.loads(message[1])["id"]))
            elif message[0] == CLOSE:
                wire.send(frame(CLOSE, message[1], masked=False))
                return

    return behave


HUGE = 10**4000
DEEP = b'{"type":"stdout","id":' * 50_000


def nonsense(session: str) -> list[bytes]:
    """Messages that make no sense, and of which none ends a session."""
    mine = {"id": session}
    odd: list[object] = [
        {}, [], None, 7, "x", {"type": None}, {"type": ["exit"]}, {"type": "exit"}, {"type": "exit", "id": 7},
        {"type": "exit", **mine, "code": "1"}, {"type": "exit", **mine, "code": 1.5},
        {"type": "exit", **mine, "code": True}, {"type": "exit", "id": "another", "code": 1},
        {"type": "exit", "id": session + "\ud800", "code": 1}, {"type": "stdout", **mine, "data": "%%%"},
        {"type": "stdout", **mine, "data": 7}, {"type": "error", "message": "\ud800\x1b[31m\r\nforged"},
        {"type": "error", "id": "another", "message": "x" * 100_000}, {"type": "error", "message": 5},
        {"type": "error", **mine, "message": "\udfff", "reason": "bad_message"},
        {"type": "started", **mine, "pid": -HUGE, "secret": "\ud800"}, {"type": "started", **mine, "pid": "x"},
        {"type": "ack", **mine, "offset": HUGE, "heard": HUGE}, {"type": "ack", **mine, "offset": -1},
        {"type": "lost", **mine, "offset": -1, "bytes": -1}, {"type": "lost", "id": "another", "offset": 1, "bytes": 2},
        {"type": "resumed", **mine, "offset": HUGE, "stdin": HUGE, "closed": HUGE, "heard": HUGE},
        {"type": "sessions", "sessions": [{"id": HUGE}]}, {"type": "stats", "stats": {"time": "x"}},
        {"type": "health", "status": "\ud800", "log": "\ud800", "state": {"a": [1]}}, {"type": "archive_stat", **mine},
        {"type": "exec", **mine, "cmd": ["sh"]}, {"type": "no such type", **mine},
    ]  # fmt: skip
    texts = [json.dumps(value).encode() for value in odd]
    texts += [b"", b"{", b"nul", b'{"type":"exit","id":"%b","code":NaN}' % session.encode(), DEEP, b"[" * 100_000,
              b'{"type":"exit","id":"another","id":"third","code":1}', b"9" * 100_000, b"\xef\xbb\xbf{}"]  # fmt: skip
    binaries = [b"", b"\x01", b"\x01\x00", b"\x01\xffshort", b"\x01\x02\xff\xfe", b"\x01\x07anotherx"]
    binaries.append(bytes([7, len(session)]) + session.encode() + b"x")
    return [frame(TEXT, text, masked=False) for text in texts] + [
        frame(BINARY, binary, masked=False) for binary in binaries
    ]


@pytest.mark.parametrize("version", [1, 2])
def test_messages_that_make_no_sense_neither_end_nor_change_a_session(version: int, record_property: Record) -> None:
    def replies(session: str) -> bytes:
        rest = b"".join(
            frame(TEXT, json.dumps(event).encode(), masked=False)
            for event in ({"type": "stdout", "id": session, "data": "aGk="}, {"type": "exit", "id": session, "code": 7})
        )
        return b"".join(nonsense(session)) + frame(PING, masked=False) + frame(PONG, b"?", masked=False) + rest

    with HostileServer(served(version, replies)) as server:
        status, stdout, stderr = run_client(server.port)
    assert (status, stdout) == (7, "hi"), stderr
    assert "Traceback" not in stderr
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", stderr), stderr
    lines = stderr.splitlines()
    assert all(line.startswith("agent_client: ") for line in lines), stderr
    assert "agent_client: ?" in lines, stderr  # half a surrogate pair, in an error of a session that goes on
    record_property("inputs", ("messages that make no sense, for the client", len(nonsense("s"))))


LAST: dict[str, tuple[dict[str, object], int]] = {
    "an error that is no text for a terminal": ({"type": "error", "message": "\ud800 \x1b[2J\r\nagent_client: x"}, 125),
    "not found, of odd characters": ({"type": "error", "message": "\udc80: gone", "reason": "not_found"}, 127),
    "a reason that is not known": ({"type": "error", "message": "m", "reason": "\ud800"}, 125),
    "a code of a signal": ({"type": "exit", "code": 137}, 137),
    "a code that is too large": ({"type": "exit", "code": HUGE}, 255),
    "a code that is a little too large": ({"type": "exit", "code": 256}, 255),
    "a code that is negative": ({"type": "exit", "code": -1}, 255),
}


@pytest.mark.parametrize("version", [1, 2])
def test_whatever_ends_a_session_is_an_exit_status(version: int, record_property: Record) -> None:
    def check(name: str) -> None:
        event, code = LAST[name]

        def replies(session: str) -> bytes:
            return frame(TEXT, json.dumps({**event, "id": session}).encode(), masked=False)

        with HostileServer(served(version, replies)) as server:
            done = run_client(server.port)
        if event["type"] == "error":
            assert_clear(name, done, code)
        else:
            assert done == (code, "", ""), f"{name}: {done}"

    side_by_side(check, list(LAST))
    record_property("inputs", ("ends of a session, for the client", len(LAST)))


def test_a_server_that_always_breaks_off_is_given_up(record_property: Record) -> None:
    """Every dial succeeds, and the connection never holds: that is no reason to dial for ever."""

    def behave(sock: socket.socket, head: bytes) -> None:
        sock.sendall(upgraded(head, VERSION_2))
        Wire(sock, masked=False).read()  # the client's request

    with HostileServer(behave) as server:
        assert_clear("breaks off", run_client(server.port, "--reconnect", "2s"))
        assert server.dials > 2


# Reverse mode.


def dial_once(tmp_path: Path, name: str, port: int) -> RunningAgent:
    directory = tmp_path / re.sub(r"\W", "-", name)
    directory.mkdir()
    return RunningAgent(directory, "--callback", f"http://127.0.0.1:{port}/?id=box", "--callback-retries", "1")


def test_no_answer_to_the_handshake_confuses_the_agent(tmp_path: Path, record_property: Record) -> None:
    def check(name: str) -> None:
        with HostileServer(HANDSHAKES[name]) as server:
            running = dial_once(tmp_path, name, server.port)
            assert running.wait() == 1, f"{name}: {running.log}"
        assert "giving up after 1 tries" in running.log, f"{name}: {running.log}"
        assert not re.search("unexpected|Traceback|\x1b", running.log), f"{name}: {running.log}"
        assert TOKEN not in running.log

    chosen = list(HANDSHAKES)[:: 1 if EVERY_ONE else 3]  # the client has had them all, and it is the same code
    side_by_side(check, chosen)
    record_property("inputs", ("answers to a handshake, for the agent", len(chosen)))


def test_frames_that_break_the_protocol_end_the_agents_connection(tmp_path: Path, record_property: Record) -> None:
    def check(name: str) -> None:
        data, expected = FAULTS[name]
        codes = []

        def behave(sock: socket.socket, head: bytes) -> None:
            sock.sendall(upgraded(head) + data)  # in one piece: nothing is between the answer and the first frame
            codes.append(Wire(sock, masked=False).read_all()[1])

        with HostileServer(behave) as server:
            running = dial_once(tmp_path, name, server.port)
            assert running.wait() == 1, f"{name}: {running.log}"
        assert eventually(lambda: codes, "the connection's end") == [expected], f"{name}: closed with {codes}"
        assert not re.search("unexpected error|Traceback", running.log), f"{name}: {running.log}"

    chosen = list(FAULTS)[:: 1 if EVERY_ONE else 2]
    side_by_side(check, chosen)
    record_property("inputs", ("faults of a backend, for the agent", len(chosen)))


def test_an_agent_outlives_hostile_backends_and_serves_the_next(tmp_path: Path, record_property: Record) -> None:
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    done = threading.Event()

    def behave(sock: socket.socket, head: bytes) -> None:
        if server.dials == 1:
            sock.sendall(rng.randbytes(500))
        else:
            sock.sendall(upgraded(head))
            wire = Wire(sock, masked=False)
            for _ in range(INPUTS * 5):  # messages that no backend sends, on a connection that holds
                kind, session = rng.choice(["exec", "stdin", "exit", "stdout", 7]), rng.choice(["a", 7])
                command = rng.choice([["cat"], [], "x", None])
                text = json.dumps({"type": kind, "id": session, "cmd": command}).encode()
                data = rng.choice([text, text[: rng.randrange(len(text))], rng.randbytes(20).hex().encode()])
                wire.send(frame(rng.choice([TEXT, BINARY]), data, masked=False))
                wire.send(frame(PING, b"?", masked=False))
                while wire.read() != (PONG, b"?"):
                    pass
            wire.send(frame(3, masked=False))
            done.set()
            wire.read_all()

    with HostileServer(behave) as server:
        running = RunningAgent(tmp_path, "--callback", f"http://127.0.0.1:{server.port}/?id=box")
        assert done.wait(DEADLINE), running.log
        port = server.port
    with ReverseListener("127.0.0.1", port, token=TOKEN) as listener:
        conn = listener.wait_for("box", DEADLINE)
        assert conn.run(["echo", "fine"], capture_output=True).stdout == b"fine\n", f"seed {seed}"
        assert not conn.sessions()
        running.stop()
    assert not re.search("unexpected error|Traceback", running.log), running.log
    record_property("inputs", ("messages of a backend, for the agent", INPUTS * 5))


@pytest.fixture(autouse=True)
def nothing_listens_afterwards() -> Iterator[None]:
    yield
    names = {thread.name for thread in threading.enumerate() if thread.name.endswith("(_accept)")}
    for thread in threading.enumerate():
        if thread.name in names:
            thread.join(DEADLINE)
            assert not thread.is_alive()

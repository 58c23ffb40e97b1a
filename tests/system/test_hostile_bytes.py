"""Garbage in the handshake, and frames that break RFC 6455, at every end that accepts connections.

They get an answer or the right close code, nobody else notices, and nothing grows. The numbers are those of the
Autobahn test suite's cases, which scripts/autobahn runs against the same code.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import running
import wire
from support import DEADLINE, Agent, RawClient, eventually
from wire import (
    BINARY,
    CLOSE,
    CONT,
    PING,
    PONG,
    TEXT,
    VERSION_2,
    Baseline,
    Stream,
    Wire,
    close,
    frame,
)

from agent_client import AgentConn

INPUTS = int(os.environ.get("FUZZ_INPUTS", "60"))  # random ones for each end
EVERY_WAY = "FUZZ_INPUTS" in os.environ  # each fault in each way, else they take turns
pytestmark = pytest.mark.once
ROOT = Path(__file__).resolve().parents[2]
LIMIT = 16 << 20  # bytes in a message for an agent
MIB = 1 << 20
SHORT = ("--resume-window", "1s")  # what a broken connection leaves is to be gone soon

Record = Callable[[str, object], None]


class Listener:
    """``agent_client listen`` as a process of its own, and an agent that has dialled it."""

    def __init__(self, directory: Path) -> None:
        self._log = directory / "log"
        command = [sys.executable, "-m", "agent_client", "listen", "--addr", "127.0.0.1:0"]
        environ = {**os.environ, "SOCKERLESS_AGENT_TOKEN": running.TOKEN, "PYTHONPATH": str(ROOT)}
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(command, cwd=directory, env=environ, stdout=log, stderr=log)
        try:
            self.address = self.wait_for_log(r"listening on (127\.0\.0\.1:\d+)")[1]
            url = f"http://{self.address}/connect?id=box"
            self.agent = running.RunningAgent(directory, "--callback", url, *SHORT)
            running.all_started.remove(self.agent)  # it is the module's, and not one test's
            self.wait_for_log("agent box joined")
        except BaseException:
            self.process.kill()
            raise

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_for_log(self, pattern: str) -> re.Match[str]:
        found: re.Match[str] = eventually(lambda: re.search(pattern, self.log), f"{pattern} in the listener's log")
        return found

    def stop(self) -> None:
        self.agent.stop()
        self.process.terminate()
        assert self.process.wait(DEADLINE) == 0
        for log in (self.log, self.agent.log):
            assert not re.search("unexpected error|Traceback", log), log[-5000:]


class End:
    """One of the places where frames arrive.

    Attributes:
        answers: whether a message that makes no sense is answered, which shows that it was taken.
    """

    def __init__(self, address: str, path: str, *lines: str, answers: bool = True) -> None:
        self.address, self.path, self.lines, self.answers = address, path, lines, answers
        self._numbers = itertools.count()  # a second agent of one name would replace the first

    def dial(self, early: bytes = b"") -> Wire:
        path = self.path.format(next(self._numbers))
        peer = Wire.dial(self.address, path, *self.lines, early=early)
        assert peer.status == 101
        return peer


ENDS = ["agent", "agent, version 2", "listener, for an agent", "listener, for a client", "listener, version 2"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    agent = Agent(tmp_path_factory.mktemp("served"), *SHORT)
    yield agent
    assert agent.stop() == 0
    assert not re.search("unexpected error|Traceback", agent.log), agent.log[-5000:]


@pytest.fixture(scope="module")
def listener(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Listener]:
    listener = Listener(tmp_path_factory.mktemp("listener"))
    yield listener
    listener.stop()


@pytest.fixture(params=ENDS)
def end(request: pytest.FixtureRequest, served: Agent, listener: Listener) -> Iterator[End]:
    """Each end. Meanwhile another client has a stream there, which nothing disturbs; afterwards all is as before."""
    name = request.param
    if name.startswith("agent"):
        address, path, pid = served.address, "/ws", served.pid
    else:
        address, path, pid = listener.address, "/agents/box/ws", listener.process.pid
    stream = Stream(AgentConn.dial(f"ws://{address}{path}", running.TOKEN))
    baseline = Baseline(pid)
    lines = [VERSION_2] if "version 2" in name else []
    if name.endswith("an agent"):
        yield End(address, "/connect?id=evil-{}", *lines, answers=False)
    else:
        yield End(address, path, *lines)
    stream.assert_goes_on()
    baseline.assert_back()
    stream.stop()


def text_of(number: object) -> bytes:
    """A message that an agent does not know, and answers with an error about this id."""
    return json.dumps({"type": "echo", "id": str(number)}).encode()


# Garbage in the handshake.

STATUSES = {101, 200, 400, 401, 403, 404, 405, 426, 431}


def garbage(rng: random.Random) -> bytes:
    kinds: list[Callable[[], bytes]] = [
        lambda: rng.randbytes(rng.randrange(1, 300)),
        lambda: bytes(rng.choice(b"\r\n\r\n: GEThtp/1.\0\xff\t;,") for _ in range(rng.randrange(1, 200))),
        lambda: b"A" * rng.choice((1, 8192, 70_000)),
        lambda: b"\r\n" * rng.randrange(1, 5),
        lambda: b"\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(rng.choice((10, 129, 5000)))),
        lambda: b"\r\n" + rng.choice(
            (b" folded", b"No colon", b": no name", b"A b: c", b"Upgrade:\x00websocket", b"Host: a\r\nHost: b",
             b"Sec-WebSocket-Key: ???", b"Sec-WebSocket-Key:", b"Sec-WebSocket-Version: 99999999999999999999",
             b"Sec-WebSocket-Protocol: ,,,\xe9,", b"Sec-WebSocket-Extensions: ;;=\"", b"Origin: http://[",
             b"Connection: \x7f", b"Content-Length: -1", b"Content-Length: 9" + b"9" * 5000, b"Origin: \xff",
             b"Transfer-Encoding: chunked",
             b"Authorization: Bearer \xff\xfe", b"Authorization: Basic !!!", b"Upgrade: h2c", b"Expect: 100-continue")
        ) + b"\r\n",
        lambda: b"\r\n\r\n" + rng.randbytes(rng.randrange(300)),
        lambda: b"\x16\x03\x01\x02\x00" + rng.randbytes(200),
        lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]  # fmt: skip
    return rng.choice(kinds)()


@pytest.mark.parametrize("where", ["agent", "listener"])
def test_garbage_at_any_stage_of_the_handshake_is_answered_or_closed(
    served: Agent, listener: Listener, where: str, record_property: Record
) -> None:
    address = served.address if where == "agent" else listener.address
    client, *paths = {
        "agent": ["/ws", "/ws", "/health", "/ws?token=%ff"],
        "listener": ["/agents/box/ws", "/agents/box/ws", "/agents", "/connect?id=%00%ff"],
    }[where]
    stream = Stream(AgentConn.dial(f"ws://{address}{client}", running.TOKEN))
    baseline = Baseline(served.pid if where == "agent" else listener.process.pid)
    host, _, port = address.rpartition(":")
    seed = random.randrange(1 << 30)
    count = 5 * INPUTS
    for number in range(count):
        rng = random.Random(seed + number)
        whole = wire.request(address, rng.choice(paths))
        cut = rng.choice((0, 1, 4, 9, 20, rng.randrange(len(whole)), len(whole) - 2, len(whole)))
        data = whole[:cut] + garbage(rng) + rng.choice((b"", whole[cut:], b"\r\n\r\n"))
        with Wire(socket.create_connection((host, int(port)), DEADLINE)) as peer:
            peer.send(data, rng.choice((0, 0, 50)))
            peer.end()
            head = peer.read_head()
            assert peer.status in STATUSES or not head, f"seed {seed + number}: {head!r}"
            if peer.status == 101:
                peer.read_all()
    stream.assert_goes_on()
    baseline.assert_back()
    stream.stop()
    record_property("inputs", ("handshakes with garbage", count))


# What breaks RFC 6455 or the agent's limit: what is sent, and the close code that it gets.

UTF_8 = "κόσμε €\U0001f600".encode()
NOT_UTF_8 = {
    "6.3.1 a surrogate": UTF_8 + b"\xed\xa0\x80" + b"edited",
    "6.4.1 beyond U+10FFFF": UTF_8 + b"\xf4\x90\x80\x80" + b"edited",
    "6.6.1 the first of two bytes": b"\xce",
    "6.6.6 cut in its last character": UTF_8[:-1],
    "6.8.1 six bytes": b"\xfc\x84\x80\x80\x80\x80",
    "6.10.2 beyond": b"\xf4\x90\x80\x80",
    "6.12.1 a continuation alone": b"\x80",
    "6.14.1 the start of a character, alone": b"\xdf ",
    "6.18.1 an overlong slash": b"\xc0\xaf",
    "6.19.1 an overlong one": b"\xe0\x9f\xbf",
    "6.20.1 an overlong NUL": b"\xc0\x80",
    "6.21.1 a lone surrogate": b"\xed\xa0\x80",
    "6.21.8 a pair of surrogates": b"\xed\xaf\xbf\xed\xbf\xbf",
    "a byte that is in no UTF-8": b"{}\xff",
}
FAULTS: dict[str, tuple[bytes, int]] = {
    **{f"3.{rsv} reserved bits {rsv}": (frame(TEXT, b"{}", rsv=rsv), 1002) for rsv in range(1, 8)},
    "3.6 reserved bits of a ping": (frame(PING, rsv=6), 1002),
    "3.7 reserved bits of a close": (frame(CLOSE, rsv=7), 1002),
    **{f"4.{op} opcode {op}": (frame(op, b"x" * (op % 3)), 1002) for op in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
    "no mask": (frame(TEXT, b"{}", masked=False), 1002),
    "no mask, ping": (frame(PING, masked=False), 1002),
    "2.5 a ping of 126 bytes": (frame(PING, bytes(126)), 1002),
    "a pong of 70,000 bytes": (frame(PONG, bytes(70_000)), 1002),
    "7.3.6 a close of 126 bytes": (close(1000, b"*" * 124), 1002),
    "5.1 a ping in fragments": (frame(PING, b"1", fin=False) + frame(CONT, b"2"), 1002),
    "5.2 a pong in fragments": (frame(PONG, b"1", fin=False) + frame(CONT, b"2"), 1002),
    "a close in fragments": (frame(CLOSE, b"\x03\xe8", fin=False) + frame(CONT, b"2"), 1002),
    "a ping in fragments within a message": (frame(TEXT, b"{", fin=False) + frame(PING, fin=False), 1002),
    "5.9 nothing to continue": (frame(CONT, b"1") + frame(TEXT, b"{}"), 1002),
    "5.12 nothing to continue, and more to come": (frame(CONT, b"1", fin=False) + frame(TEXT, b"{}"), 1002),
    "5.15 nothing left to continue": (
        frame(TEXT, b"{", fin=False) + frame(CONT, b"}") + frame(CONT, b"1", fin=False) + frame(TEXT, b"{}"),
        1002,
    ),
    "5.18 a message within a message": (frame(TEXT, b"{", fin=False) + frame(TEXT, b"}"), 1002),
    "another within one, of bytes": (frame(BINARY, b"{", fin=False) + frame(CONT, fin=False) + frame(TEXT), 1002),
    "7.1.5 a close within a message": (frame(TEXT, b"{", fin=False) + close() + frame(CONT, b"}"), 1002),
    "7.3.2 a close of one byte": (frame(CLOSE, b"a"), 1002),
    **{
        f"7.9 close code {code}": (close(code), 1002)
        for code in (0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535)
    },
    "7.5.1 a reason that is not UTF-8": (close(1000, NOT_UTF_8["6.3.1 a surrogate"]), 1007),
    **{f"{name}, whole": (frame(TEXT, data), 1007) for name, data in NOT_UTF_8.items()},
    **{
        f"{name}, in fragments": (
            frame(TEXT, data[:1], fin=False)
            + b"".join(frame(CONT, data[at : at + 1], fin=False) + frame(PING) for at in range(1, len(data)))
            + frame(CONT),
            1007,
        )
        for name, data in NOT_UTF_8.items()
    },
    **{f"a length of {name}": (frame(TEXT, length=length, form=127), 1009)
       for name, length in (("2^63", 1 << 63), ("2^64-1", (1 << 64) - 1), ("2^63-1", (1 << 63) - 1), ("4 GiB", 1 << 32),
                            ("64 MiB and a byte", (64 << 20) + 1))},
    "a length of 2^63 in a ping": (frame(PING, length=1 << 63, form=127), 1009),
    "fragments that are too long together": (
        frame(BINARY, b"x", fin=False) + frame(CONT, fin=False, length=64 << 20, form=127), 1009,
    ),
}  # fmt: skip
# What is good, however odd: what is sent, and the close code that it gets when that ends the connection.
ODD: dict[str, tuple[bytes, int]] = {
    "7.3.1 a close without a code": (close(None), 1005),
    "7.3.5 a close with the longest reason": (close(1000, b"*" * 123), 1000),
    **{f"7.7 close code {code}": (close(code), code)
       for code in (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999)},
    "7.1.2 two closes": (close() + close(), 1000),
    "7.1.3 a ping behind a close": (close(3333) + frame(PING), 3333),
    "7.1.4 a message behind a close": (close(3333) + frame(TEXT, text_of(1)), 3333),
    "garbage behind a close": (close(3333) + bytes(range(256)) * 10, 3333),
    "2.7 a pong that nobody asked for": (frame(PONG, b"x" * 125) + close(), 1000),
    "a length of eight bytes for two": (frame(TEXT, b"{}", form=127) + close(4000), 4000),
    "a length of two bytes for two": (frame(TEXT, b"{}", form=126) + close(4000), 4000),
    "a ping with a length of eight bytes": (frame(PONG, b"x", form=127) + close(4000), 4000),
    "1.1.1 a message of nothing": (frame(TEXT) + close(4000), 4000),
    "5.16 an empty message in many fragments": (
        frame(TEXT, fin=False) + frame(CONT, fin=False) * 50 + frame(CONT) + close(4000), 4000),
}  # fmt: skip


WAYS = ("with the request", "byte by byte", "in one piece")


def ways_for(number: int, data: bytes) -> list[str]:
    """How some bytes are sent."""
    if len(data) > 30_000:  # with the request they would be a head that is too long
        return ["in one piece"]
    return list(WAYS) if EVERY_WAY else [WAYS[number % 3]]


def test_what_breaks_the_protocol_is_closed_with_its_code(end: End, record_property: Record) -> None:
    count = 0
    for number, (name, (data, code)) in enumerate({**FAULTS, **ODD}.items()):
        for way in ways_for(number, data):
            with end.dial(data if way == "with the request" else b"") as peer:
                if way != "with the request":
                    peer.send(data, 0 if way == "in one piece" else 1)
                _, got = peer.read_all()
            assert got == code, f"{name}, {way}: closed with {got}"
            count += 1
    record_property("inputs", ("frames that break the protocol, or look like it", count))


def test_the_protocol_broken_in_a_running_session_ends_it_and_no_other(end: End, record_property: Record) -> None:
    if not end.answers:  # who dials in as an agent is asked for sessions, and has none
        return
    count = 0
    for number, (name, (data, code)) in enumerate(FAULTS.items()):
        if not EVERY_WAY and number % 4:
            continue
        session = f"{name[:9]}-{number}"
        with end.dial() as peer:
            peer.send(frame(TEXT, json.dumps({"type": "exec", "id": session, "cmd": ["cat"]}).encode()))
            peer.send(frame(TEXT, json.dumps({"type": "stdin", "id": session, "data": "aGVsbG8="}).encode()))
            answer = b""
            while not re.search(b"hello|aGVsbG8=", answer):
                assert b'"error"' not in answer, answer
                message = peer.read()
                assert message is not None
                answer = message[1]
            peer.send(data)
            assert peer.read_all()[1] == code, name
        count += 1
    record_property("inputs", ("frames that break the protocol in a running session", count))


def test_what_is_odd_and_allowed_is_taken(end: End, record_property: Record) -> None:
    """Each of these is answered in full, then a ping in its place."""
    if not end.answers:
        return
    name = "x" * 4000
    long = text_of(name)
    padded = {size: text_of(size) + b" " * (size - len(text_of(size))) for size in (125, 126, 127, 128, 65535, 65536)}
    cases: dict[str, tuple[bytes, list[bytes]]] = {
        **{f"1.1 a message of {size} bytes": (frame(TEXT, data), [b'"%d"' % size]) for size, data in padded.items()},
        "6.2.2 UTF-8 cut between its bytes": (
            frame(TEXT, b'{"id":"', fin=False)
            + b"".join(frame(CONT, UTF_8[at : at + 1], fin=False) for at in range(len(UTF_8)))
            + frame(CONT, b'","type":"echo"}'),
            [json.dumps(UTF_8.decode()).encode()],
        ),
        "6.22 noncharacters, which are characters": (
            frame(TEXT, '{"id":"\ufffe\uffff\U0010ffff\ufdd0","type":"echo"}'.encode()),
            [rb'"\ufffe\uffff\udbff\udfff\ufdd0"'],
        ),
        "5.6 a ping within a message": (
            frame(TEXT, long[:9], fin=False) + frame(PING, b"within") + frame(CONT, long[9:]),
            [b"within", name.encode()],
        ),
        "5.19 pings within a message of many": (
            b"".join(
                frame(TEXT if at == 0 else CONT, long[at : at + 1], fin=at + 1 == len(long))
                + (frame(PING, b"%d" % at) if at % 1000 == 0 else b"")
                for at in range(len(long))
            ),
            [b"0", b"1000", b"2000", b"3000", b"4000", name.encode()],
        ),
        "2.4 a ping of 125 bytes": (frame(PING, bytes(range(125))), [bytes(range(125))]),
        "2.9 pongs that nobody asked for": (frame(PONG, b"x" * 125) * 100 + frame(PING, b"2.9"), [b"2.9"]),
        "2.10 ten pings": (b"".join(frame(PING, b"%d" % n) for n in range(10)), [b"%d" % n for n in range(10)]),
        "10.1.1 65,536 bytes in fragments of 1,300": (
            b"".join(
                frame(TEXT if at == 0 else CONT, padded[65536][at : at + 1300], fin=at + 1300 >= 65536)
                for at in range(0, 65536, 1300)
            ),
            [b'"65536"'],
        ),
    }
    count = 0
    for number, (case, (data, expected)) in enumerate(cases.items()):
        for way in ways_for(number, data):
            with end.dial(data if way == "with the request" else b"") as peer:
                if way != "with the request":
                    peer.send(data, 0 if way == "in one piece" else 1)
                for answer in expected:
                    message = peer.read()
                    assert message is not None and answer in message[1], f"{case}, {way}: {answer!r}, not {message!r}"
                peer.send(frame(PING, b"after") + close(4321))
                assert peer.read_all() == ([(PONG, b"after")], 4321), f"{case}, {way}"
            count += 1
    record_property("inputs", ("frames that are odd and allowed", count))


# Random ones, and what RFC 6455 makes of them.


class Oracle:
    """What may become of a connection on which these frames are sent: written from RFC 6455, not from the code."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._message: bytearray | None = None  # its fragments so far
        self._text = False
        self.codes: set[int] = set()  # with which it may be closed
        self.over = False  # by now it is

    def take(self, opcode: int, payload: bytes, fin: bool, rsv: int, masked: bool, length: int) -> None:
        if self.over:
            return
        room = self._limit - len(self._message or b"")
        faults = {
            1002: bool(rsv)
            or not masked
            or opcode not in (CONT, TEXT, BINARY, CLOSE, PING, PONG)
            or (opcode >= CLOSE and (not fin or length > 125))
            or (opcode == CONT and self._message is None)
            or (opcode in (TEXT, BINARY) and self._message is not None),
            1009: length > room,
        }
        if any(faults.values()):
            self._end({code for code, present in faults.items() if present})
        elif opcode == CLOSE:
            self._take_close(payload)
        elif opcode < CLOSE:
            if opcode != CONT:
                self._message, self._text = bytearray(), opcode == TEXT
            assert self._message is not None
            self._message += payload
            if fin:
                if self._text:
                    try:
                        self._message.decode()
                    except UnicodeDecodeError:
                        self.codes.add(1007)  # it is noticed at the message's end, or a little later
                self._message = None

    def _take_close(self, payload: bytes) -> None:
        if len(payload) == 1:
            return self._end({1002})
        code = struct.unpack("!H", payload[:2])[0] if payload else 1005
        valid = not payload or (1000 <= code <= 1014 and code not in (1004, 1005, 1006)) or 3000 <= code <= 4999
        codes = {code} if valid else {1002}
        try:
            payload[2:].decode()
        except UnicodeDecodeError:
            codes = {1007} if valid else {1002, 1007}
        if self._message is not None:  # the message that it cuts off counts as broken
            codes.add(1002)
        self._end(codes)

    def _end(self, codes: set[int]) -> None:
        self.codes |= codes
        self.over = True


def random_frames(rng: random.Random, oracle: Oracle, version: int) -> bytes:
    """Some frames, most of them good."""
    sent = bytearray()
    open_ = False
    for _ in range(rng.randrange(1, 12)):
        payload = random_payload(rng, version)
        opcode = CONT if open_ else rng.choice((TEXT, TEXT, BINARY))
        fin, rsv, masked, length, form = rng.random() < 0.6, 0, True, len(payload), 0
        if rng.random() < 0.3:
            opcode, fin, payload = rng.choice((PING, PING, PONG)), True, payload[:125]
            length = len(payload)
        elif rng.random() < 0.05:
            opcode, fin = CLOSE, True
            payload = struct.pack("!H", rng.choice((1000, 1001, 3000, 4999, 999, 1005, 2000))) + payload[:80]
            length = len(payload)
        else:
            open_ = not fin
        chance = rng.random()
        if chance < 0.02:
            rsv = rng.randrange(1, 8)
        elif chance < 0.04:
            opcode = rng.choice((3, 4, 5, 6, 7, 11, 12, 13, 14, 15))
        elif chance < 0.06:
            masked = False
        elif chance < 0.08:
            fin = not fin
        elif chance < 0.10:
            opcode = rng.choice((CONT, TEXT, BINARY, CLOSE, PING, PONG))
        elif chance < 0.11:
            length, form = rng.choice((1 << 63, (64 << 20) + 1, (1 << 64) - 1)), 127
        elif chance < 0.15 and length < 65536:
            form = 127
        oracle.take(opcode, payload, fin, rsv, masked, length)
        sent += frame(opcode, payload, fin=fin, rsv=rsv, masked=masked, length=length, form=form)
        if oracle.over:
            sent += rng.randbytes(rng.choice((0, 0, 3, 500)))
            break
    return bytes(sent)


def random_payload(rng: random.Random, version: int) -> bytes:
    kind = rng.random()
    if kind < 0.3:
        return rng.randbytes(rng.choice((0, 1, 2, 5, 125, 126, 300)))
    if kind < 0.6:
        return text_of(rng.random())
    if kind < 0.8:
        return b"\x00\x01s" + rng.randbytes(rng.randrange(20)) if version == 2 else UTF_8 * rng.randrange(9)
    session = {"type": "exec", "id": f"s{rng.randrange(3)}", "cmd": rng.choice((["cat"], ["true"], [], ["nosuch"], 7))}
    return json.dumps(session).encode()


def test_random_frames_are_taken_or_closed_as_rfc_6455_says(end: End, record_property: Record) -> None:
    seed = random.randrange(1 << 30)
    version = 2 if VERSION_2 in end.lines else 1
    frames = 0
    for number in range(INPUTS):
        rng = random.Random(seed + number)
        oracle = Oracle(64 * MIB if end.path.startswith("/connect") or "agents" in end.path else LIMIT)
        data = random_frames(rng, oracle, version)
        frames += len(data)
        with end.dial() as peer:
            peer.send(data, rng.choice((0, 0, 1, 7)) if len(data) < 4000 else 0)
            if not oracle.over:
                peer.send(close(4444))
                # Within a message a close is a fault for the library, see test_what_breaks_the_protocol...
                oracle._take_close(struct.pack("!H", 4444))
            _, code = peer.read_all()
        assert code in oracle.codes, f"seed {seed + number}: closed with {code}, not {oracle.codes}"
    record_property("inputs", ("random sequences of frames", INPUTS))


# What may grow.


def test_a_message_of_a_million_fragments_is_one_message_and_no_million_objects(served: Agent) -> None:
    baseline = Baseline(served.pid)
    text = text_of("end") + b" " * (1 * MIB)
    rest = b"".join(frame(CONT, text[at : at + 1], fin=False) for at in range(200, MIB))
    with Wire.dial(served.address) as peer:
        peer.send(frame(TEXT, text[:200], fin=False) + rest)
        peer.send(frame(PING, b"so far"))
        assert peer.read() == (PONG, b"so far")
        assert baseline.growth() < 30 << 10, f"{baseline.growth()} KiB for a message of 1,024"
        peer.send(frame(CONT))
        message = peer.read()
        assert message is not None and b'"end"' in message[1]
    baseline.assert_back()


def test_fragments_of_nothing_without_end_take_no_memory(served: Agent, connect: Callable[..., RawClient]) -> None:
    other = connect(served)
    other.assert_quiet()
    with Wire.dial(served.address) as peer:
        peer.send(frame(TEXT, fin=False))
        peer.send(frame(CONT, fin=False) * 20_000)
        baseline = Baseline(served.pid)
        for _ in range(20):
            peer.send(frame(CONT, fin=False) * 20_000)
        other.assert_quiet()
        peer.send(frame(PING))
        assert peer.read() == (PONG, b"")
        assert baseline.growth() < 30 << 10, f"{baseline.growth()} KiB"
        peer.send(frame(CONT))
        message = peer.read()
        assert message is not None and b"not valid JSON" in message[1]


def test_a_flood_of_pings_that_reads_no_pong_grows_nothing(served: Agent, connect: Callable[..., RawClient]) -> None:
    other = connect(served)
    other.assert_quiet()
    with Wire.dial(served.address) as peer:
        baseline = Baseline(served.pid)
        for number in range(200):
            peer.send(frame(PING, b"%0125d" % number) * 1000)
        peer.send(frame(PING, b"the last"))
        other.assert_quiet()
        assert baseline.growth() < 30 << 10, f"{baseline.growth()} KiB"
        pong = peer.read()
        while pong is not None and pong != (PONG, b"the last"):
            pong = peer.read()
        assert pong, "the latest ping was not answered"
        peer.send(close())
        assert peer.read_all() == ([], 1000)
    baseline.assert_back()


def test_frames_that_are_promised_and_do_not_come_take_no_memory(
    served: Agent, connect: Callable[..., RawClient]
) -> None:
    other = connect(served)
    other.assert_quiet()
    baseline = Baseline(served.pid)
    peers = [Wire.dial(served.address) for _ in range(50)]
    try:
        for number, peer in enumerate(peers):
            peer.send(frame(BINARY, bytes(1000), length=LIMIT, form=127)[: 1000 if number % 2 else 9])
        other.assert_quiet()
        assert baseline.growth() < 30 << 10, f"{baseline.growth()} KiB"
    finally:
        for peer in peers:
            peer.close()  # in the middle of a frame
    baseline.assert_back()
    other.assert_quiet()


@pytest.mark.parametrize("version", [1, 2])
def test_whoever_closes_half_of_the_connection_at_any_point_is_let_go(served: Agent, version: int) -> None:
    """No end of the stream is waited for twice: neither is the session that such a client leaves."""
    baseline = Baseline(served.pid)
    lines = [VERSION_2] if version == 2 else []
    session = frame(TEXT, json.dumps({"type": "exec", "id": f"half{version}", "cmd": ["cat"]}).encode())
    whole = wire.request(served.address, "/ws", *lines) + session + frame(TEXT, b"{}") + close()
    answers = set()
    host, _, port = served.address.rpartition(":")
    cuts = [1, 20, len(whole) - 90, *range(len(whole) - 40, len(whole) + 1)]
    for cut in cuts:
        with Wire(socket.create_connection((host, int(port)), DEADLINE)) as peer:
            peer.send(whole[:cut])
            peer.end()
            peer.read_head()
            code = peer.read_all()[1] if peer.status == 101 else None
            answers.add((peer.status, code))
    # Without a request nothing; with one, an end of the stream without a close has no answer but that; and a close has.
    assert answers == {(0, None), (101, None), (101, 1000)}
    baseline.assert_back()

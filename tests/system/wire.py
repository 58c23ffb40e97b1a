"""WebSocket frames by hand, good and bad ones, and who watches that they do no harm."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from support import DEADLINE, TOKEN, eventually

from agent_client import AgentConn

CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
UPGRADE = (
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)
VERSION_2 = "Sec-WebSocket-Protocol: sockerless-agent.v2"
RIGHT = f"Authorization: Bearer {TOKEN}"
KEY = b"\x5a\x01\xfe\x77"

Message = tuple[int, bytes]


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    rsv: int = 0,
    masked: bool = True,
    length: int | None = None,
    form: int = 0,
) -> bytes:
    """A frame, whatever RFC 6455 says of it.

    Args:
        length: what the header promises, if that is not what the payload has.
        form: the length's field: 126 for two bytes, 127 for eight, 0 for the one that it should be.
    """
    length = len(payload) if length is None else length
    form = form or (length if length < 126 else 126 if length < 65536 else 127)
    head = bytes([(0x80 if fin else 0) | rsv << 4 | opcode, (0x80 if masked else 0) | form])
    head += struct.pack("!H", length) if form == 126 else struct.pack("!Q", length) if form == 127 else b""
    if not masked:
        return head + payload
    repeated = KEY * (len(payload) // 4 + 1)
    xored = int.from_bytes(payload, "big") ^ int.from_bytes(repeated[: len(payload)], "big")
    return head + KEY + xored.to_bytes(len(payload), "big")


def close(code: int | None = 1000, reason: bytes = b"", masked: bool = True) -> bytes:
    return frame(CLOSE, b"" if code is None else struct.pack("!H", code) + reason, masked=masked)


def request(host: str, path: str = "/ws", *lines: str) -> bytes:
    """A WebSocket handshake; one of the lines may be VERSION_2."""
    return "\r\n".join([f"GET {path} HTTP/1.1", f"Host: {host}", *UPGRADE, RIGHT, *lines, "", ""]).encode()


class Wire:
    """A WebSocket whose every byte is the test's; used by one thread.

    Attributes:
        status: of the answer to the handshake, 0 if there was none.
        masked: whether the frames that it sends are to be masked.
    """

    def __init__(self, sock: socket.socket, masked: bool = True) -> None:
        self.socket = sock
        self.socket.settimeout(DEADLINE)
        self.masked = masked
        self.status = 0
        self._received = bytearray()

    @classmethod
    def dial(cls, address: str, path: str = "/ws", *lines: str, early: bytes = b"") -> Wire:
        """Connect; ``early`` comes right behind the request, before the answer to it is there."""
        host, _, port = address.rpartition(":")
        wire = cls(socket.create_connection((host, int(port)), DEADLINE))
        wire.send(request(address, path, *lines) + early)
        wire.read_head()
        return wire

    def send(self, data: bytes, piece: int = 0) -> None:
        """Send bytes, in pieces of so many; a peer that has closed meanwhile is no error."""
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(data), piece or len(data) or 1):
                self.socket.sendall(data[start : start + (piece or len(data))])

    def end(self) -> None:
        """Send no more."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def read_head(self) -> bytes:
        while b"\r\n\r\n" not in self._received and self._receive():
            pass
        head, _, rest = bytes(self._received).partition(b"\r\n\r\n")
        self._received = bytearray(rest)
        words = head.split()
        self.status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
        return head

    def _receive(self) -> bool:
        try:
            data = self.socket.recv(1 << 20)
        except ConnectionResetError:  # it has closed with something of ours unread
            return False
        self._received += data
        return bool(data)

    def _need(self, count: int) -> bytes | None:
        while len(self._received) < count:
            if not self._receive():
                return None
        return bytes(self._received[:count])

    def read(self) -> Message | None:
        """The next frame, but for the other side's own pings; None at the end of the stream."""
        while (message := self._read()) == (PING, b""):
            pass
        return message

    def _read(self) -> Message | None:
        head = self._need(2)
        if head is None:
            return None
        size, length = 2, head[1] & 0x7F
        if length > 125:
            size += 2 if length == 126 else 8
            head = self._need(size)
            if head is None:
                return None
            length = int.from_bytes(head[2:size], "big")
        masked = bool(head[1] & 0x80)
        assert masked is not self.masked, "both sides mask, or none"
        size += 4 if masked else 0
        whole = self._need(size + length)
        if whole is None:
            return None
        del self._received[: size + length]
        payload = whole[size:]
        if masked:
            payload = bytes(byte ^ key for byte, key in zip(payload, itertools.cycle(whole[size - 4 : size])))
        return head[0] & 0x0F, payload

    def read_all(self) -> tuple[list[Message], int | None]:
        """Everything that comes until the end, and the close code: 1005 for a frame without one, None for no frame."""
        messages: list[Message] = []
        code = None
        while (message := self.read()) is not None:
            assert code is None, f"{message} came after the close frame"
            if message[0] == CLOSE:
                code = int.from_bytes(message[1][:2], "big") if message[1] else 1005
                self.end()  # who dialled waits for that, whoever was dialled has closed already
            else:
                messages.append(message)
        return messages, code

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def figures(pid: int) -> tuple[int, int, int]:
    """A process's threads, descriptors, and KiB of memory."""
    text = Path(f"/proc/{pid}/status").read_text()
    threads, memory = (int(re.search(rf"{name}:\s+(\d+)", text)[1]) for name in ("Threads", "VmRSS"))  # type: ignore[index]
    return threads, len(os.listdir(f"/proc/{pid}/fd")), memory


class Baseline:
    """What a process has, to be compared with what it has later."""

    IDLE_THREADS = 70  # of the pool, which keeps them for a while: as many as had a step of a handshake at once

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._threads, self._descriptors, self._memory = figures(pid)
        self._open = self._files()

    def _files(self) -> dict[str, str]:
        found = {}
        for name in os.listdir(f"/proc/{self._pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                found[name] = os.readlink(f"/proc/{self._pid}/fd/{name}")
        return found

    def growth(self) -> int:
        """KiB of memory more than before."""
        return figures(self._pid)[2] - self._memory

    def assert_back(self, megabytes: int = 30) -> None:
        try:
            eventually(lambda: figures(self._pid)[1] <= self._descriptors, "the descriptors of before")
            eventually(lambda: figures(self._pid)[0] <= self._threads + self.IDLE_THREADS, "the threads of before")
            eventually(lambda: self.growth() <= megabytes << 10, f"memory of before, and {megabytes} MiB")
        except BaseException:
            print(f"before: {figures(self._pid)}, {self._open}\nnow: {figures(self._pid)}, {self._files()}")
            raise


class Stream:
    """A client in the middle of a stream: it checks every line, and that they go on to come, whatever else happens."""

    def __init__(self, conn: AgentConn) -> None:
        self._conn = conn
        self._process = conn.popen(["sh", "-c", "i=0; while sleep 0.005; do echo $i; i=$((i+1)); done"])
        self.lines = 0
        self._fault = ""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.assert_goes_on()

    def _run(self) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                if line != b"%d\n" % self.lines:
                    self._fault = f"line {self.lines} is {line!r}"
                    return
                self.lines += 1
        except Exception as exc:
            self._fault = f"after line {self.lines}: {exc!r}"

    def assert_goes_on(self) -> None:
        """What came is right, and more comes."""
        seen = self.lines
        eventually(lambda: self._fault or self.lines > seen + 2, "more of a stream that others should not disturb")
        assert not self._fault

    def stop(self) -> None:
        self.assert_goes_on()
        self._process.kill()
        assert self._process.wait(DEADLINE) == 128 + 9
        self._thread.join(DEADLINE)
        assert not self._fault
        self._conn.close()


def in_ways(data: bytes) -> Iterable[tuple[str, Callable[[Wire], None]]]:
    """The ways in which bytes may arrive behind a handshake, for those that do not come with the request."""
    yield "in one piece", lambda wire: wire.send(data)
    yield "byte by byte", lambda wire: wire.send(data, 1)

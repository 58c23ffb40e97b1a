"""HTTP by hand on a connection to a gateway: what Docker's clients do not show, and what other clients do."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import struct
from typing import Any

from support import DEADLINE

UPGRADE = ("Connection: Upgrade", "Upgrade: tcp")


class Connection:
    """One connection to a gateway, and HTTP by hand."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(DEADLINE)
        self._buffer = b""

    def send(self, method: str, path: str, *headers: str, body: bytes = b"") -> None:
        lines = [f"{method} {path} HTTP/1.1", "Host: docker", *headers]
        if body and not any(header.lower().startswith("transfer-encoding") for header in headers):
            lines.append(f"Content-Length: {len(body)}")
        self.sock.sendall("\r\n".join([*lines, "", ""]).encode() + body)

    def _fill(self) -> None:
        data = self.sock.recv(65536)
        assert data, f"the connection ended: {self._buffer!r}"
        self._buffer += data

    def read(self, count: int) -> bytes:
        while len(self._buffer) < count:
            self._fill()
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    def read_line(self) -> bytes:
        while b"\r\n" not in self._buffer:
            self._fill()
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        return line

    def read_head(self) -> tuple[int, dict[str, str]]:
        status = int(self.read_line().split()[1])
        headers = {}
        while line := self.read_line().decode():
            name, _, value = line.partition(": ")
            headers[name.lower()] = value
        return status, headers

    def read_answer(self) -> tuple[int, dict[str, str], bytes]:
        """A whole answer, after which the connection can be used again."""
        status, headers = self.read_head()
        if headers.get("transfer-encoding") != "chunked":
            return status, headers, self.read(int(headers.get("content-length", 0)))
        body = b""
        while size := int(self.read_line(), 16):
            body += self.read(size)
            assert self.read_line() == b""
        assert self.read_line() == b""
        return status, headers, body

    def ask(self, method: str, path: str, body: object = None, *headers: str) -> tuple[int, Any]:
        """Send JSON, get JSON."""
        data = json.dumps(body).encode() if body is not None else b""
        self.send(method, path, "Content-Type: application/json", *headers, body=data)
        status, answered, content = self.read_answer()
        assert answered.get("api-version") == "1.47" and answered.get("ostype") == "linux"
        return status, json.loads(content) if content else None

    def read_rest(self) -> bytes:
        """What comes until the other side closes."""
        parts, self._buffer = [self._buffer], b""
        with contextlib.suppress(ssl.SSLZeroReturnError):  # TLS's goodbye, where this side has said its own
            while part := self.sock.recv(1 << 20):
                parts.append(part)
        return b"".join(parts)

    def frames(self) -> list[tuple[int, bytes]]:
        """The rest as frames of Docker's multiplexed stream."""
        data, start, found = self.read_rest(), 0, []
        while start < len(data):
            stream, size = struct.unpack_from(">BxxxL", data, start)
            found.append((stream, data[start + 8 : start + 8 + size]))
            start += 8 + size
        return found

    def create(self, *cmd: str, **options: object) -> str:
        options = {"AttachStdout": True, "AttachStderr": True, **options}
        status, answer = self.ask("POST", "/containers/web/exec", {"Cmd": list(cmd), **options})
        assert status == 201, answer
        return str(answer["Id"])

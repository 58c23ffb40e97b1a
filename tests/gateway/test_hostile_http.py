"""Requests that are none, or almost: the gateway answers or closes, without an unexpected error, and goes on."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
from collections.abc import Callable
from typing import Any

import pytest
from docking import Gateway
from support import DEADLINE, eventually

INPUTS = int(os.environ.get("FUZZ_INPUTS", "60"))  # random ones
PING = b"GET /_ping HTTP/1.1\r\nHost: docker\r\n\r\n"


def exchange(gateway: Gateway, data: bytes, piece: int = 0) -> bytes:
    """What comes back until the gateway closes."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(DEADLINE)
        sock.connect(str(gateway.path))
        received = b""
        with contextlib.suppress(ConnectionError):
            for at in range(0, len(data), piece or len(data) or 1):
                sock.sendall(data[at : at + (piece or len(data))])
            sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while more := sock.recv(65536):
                received += more
        return received


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"(?:\A|\r\n|\n|})HTTP/1\.1 (\d{3})", answer)]


def post(path: str, body: bytes, *lines: str) -> bytes:
    head = [f"POST {path} HTTP/1.1", "Host: docker", *(lines or [f"Content-Length: {len(body)}"]), "", ""]
    return "\r\n".join(head).encode("latin-1") + body


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00" + bytes(range(256)),
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1.1\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
        b"FROBNICATE / HTTP/1.1\r\n\r\n",
        b"GET /v" + b"9" * 5000 + b".1/_ping HTTP/1.1\r\n\r\n",
        b"GET /v1." + b"9" * 5000 + b"/_ping HTTP/1.1\r\n\r\n",
        b"GET http://[::/_ping HTTP/1.1\r\n\r\n",
        b"GET /containers/%00%ff%zz/json HTTP/1.1\r\n\r\n",
        b"GET /containers/json?filters=%7B HTTP/1.1\r\n\r\n",
        b"GET /containers/json?limit=" + b"9" * 5000 + b" HTTP/1.1\r\n\r\n",
        post("/containers/web/exec", b"[" * 100_000),
        post("/containers/web/exec", b'{"Cmd":' + b"9" * 5000 + b"}"),
        post("/containers/web/exec", b'{"Cmd":{"a":1}}'),
        post("/containers/web/exec", b'{"Cmd":["x"],"Env":7}'),
        post("/containers/web/exec", b'{"Cmd":["x"],"User":7,"WorkingDir":[],"Tty":"x","ConsoleSize":["a"]}'),
        post("/containers/web/exec", b"\xff\xfe\x00"),
        post("/containers/web/exec", b"", "Content-Length: -1"),
        post("/containers/web/exec", b"", "Content-Length: 99999999999999999999"),
        post("/containers/web/exec", b"", "Content-Length: 1e3"),
        post("/containers/web/exec", b"xyz\r\n", "Transfer-Encoding: chunked"),
        post("/containers/web/exec", b"FFFFFFFFFFFFFFFFF\r\n", "Transfer-Encoding: chunked"),
        post("/containers/web/exec", b"-5\r\nhello\r\n", "Transfer-Encoding: chunked"),
        post("/exec/nosuch/start", b'{"Detach":"x"}'),
        post("/containers/web/kill?signal=%00", b""),
        post("/containers/web/resize?h=x&w=", b""),
        post("/containers/web/archive?path=%00", b"not a tar"),
    ],
)  # fmt: skip
def test_a_request_that_makes_no_sense_is_an_error_of_the_clients(gateway: Gateway, data: bytes) -> None:
    answer = exchange(gateway, data)
    assert all(400 <= status <= 505 and status != 500 for status in statuses(answer)), answer[:500]
    assert statuses(exchange(gateway, PING)) == [200]


@pytest.mark.parametrize(
    "lines",
    [
        ["Content-Length: 5", "Content-Length: 6"],
        ["Content-Length: 0", f"Content-Length: {len(PING)}"],
        ["Content-Length: 5", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked", "Transfer-Encoding: identity"],
        ["Transfer-Encoding: xchunked"],
        ["Transfer-Encoding: chunked, gzip"],
        ["Content-Length: 5, 6"],
        ["Content-Length: +5"],
    ],
)
def test_a_body_of_doubtful_length_hides_no_second_request(gateway: Gateway, lines: list[str]) -> None:
    """RFC 9112 §6.3: a proxy might take another one of them for the length."""
    answer = exchange(gateway, post("/containers/web/exec", b"0\r\n\r\n" + PING, *lines))
    assert statuses(answer) == [400], answer


def test_random_requests_are_answered_or_closed(
    gateway: Gateway, record_property: Callable[[str, object], None]
) -> None:
    seed = random.randrange(1 << 30)
    paths = ["/_ping", "/version", "/containers/json?all=1", "/containers/web/json", "/exec/nosuch/json",
             "/containers/nosuch/logs?stdout=1", "/containers/web/top", "/events?until=1", "/images/json"]  # fmt: skip
    for number in range(INPUTS * 3):
        rng = random.Random(seed + number)
        body = json.dumps(random_json(rng)).encode()
        good = rng.choice(
            [
                f"GET {rng.choice(paths)} HTTP/1.1\r\nHost: d\r\n\r\n".encode(),
                post(rng.choice(["/containers/web/exec", "/exec/x/start", "/containers/create"]), body),
            ]
        )
        data = bytearray(good)
        for _ in range(rng.randrange(4)):
            at = rng.randrange(len(data))
            data[at : at + rng.randrange(3)] = rng.choice(
                [b"", b"\0", b"\xff", b"\r\n", b" ", b"%", b"9" * 20, b":", rng.randbytes(3)]
            )
        answer = exchange(gateway, bytes(data), rng.choice((0, 0, 3)))
        assert not answer or answer.startswith((b"HTTP/1.1 ", b"{")), f"seed {seed + number}: {answer[:200]!r}"
        assert 500 not in statuses(answer), f"seed {seed + number}: {answer[:500]!r}"
    assert statuses(exchange(gateway, PING)) == [200]
    eventually(lambda: "unexpected error" not in gateway.log, "a log without an unexpected error")
    record_property("inputs", ("requests to the gateway that are none, or almost", INPUTS * 3))


def random_json(rng: random.Random) -> dict[str, Any]:
    """Options of an exec, some of another type."""
    values: list[Any] = [
        None,
        True,
        0,
        -1,
        2**70,
        1.5,
        "",
        "x",
        "\ud800",
        [],
        ["a"],
        [1],
        [[]],
        {},
        {"a": "b"},
        [24, 80],
    ]
    names = ["Cmd", "Env", "User", "WorkingDir", "Tty", "AttachStdin", "AttachStdout", "DetachKeys", "ConsoleSize",
             "Detach", "Privileged", "cmd", "Image", "HostConfig"]  # fmt: skip
    return {rng.choice(names): rng.choice(values) for _ in range(rng.randrange(6))}

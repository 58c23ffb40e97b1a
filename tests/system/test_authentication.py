"""Who gets in: several tokens, smuggled and repeated ones, guessers, pages of others, and crowds that never ask."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import DEADLINE, TOKEN, Agent, RawClient, eventually
from websockets.exceptions import InvalidStatus

UPGRADE = (
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)
RIGHT = f"Authorization: Bearer {TOKEN}"


def dial(agent: Agent, source: str = "127.0.0.1") -> socket.socket:
    host, _, port = agent.address.rpartition(":")
    return socket.create_connection((host, int(port)), DEADLINE, (source, 0))


def request(agent: Agent, *lines: str, path: str = "/ws") -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", f"Host: {agent.address}", *UPGRADE, *lines, "", ""]).encode("latin-1")


def status(sock: socket.socket) -> int:
    """The status of the answer; 0 for a close without one."""
    with contextlib.suppress(ConnectionResetError):
        line = sock.makefile("rb").readline()
        return int(line.split()[1]) if line else 0
    return 0


def ask(agent: Agent, *lines: str, path: str = "/ws") -> int:
    with dial(agent) as sock:
        sock.sendall(request(agent, *lines, path=path))
        return status(sock)


def everything(sock: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while more := sock.recv(65536):
            received += more
    return received


def figures(agent: Agent) -> tuple[int, int, int]:
    """An agent's threads, descriptors, and KiB of memory."""
    text = Path(f"/proc/{agent.pid}/status").read_text()
    threads, memory = (int(re.search(rf"{name}:\s+(\d+)", text)[1]) for name in ("Threads", "VmRSS"))  # type: ignore[index]
    return threads, len(os.listdir(f"/proc/{agent.pid}/fd")), memory


@pytest.fixture(scope="module")
def many_descriptors() -> Iterator[int]:
    """As many connections as the system lets this process have, 10,000 at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield min(10_000, hard - 500)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Tokens.


def test_several_tokens_are_good_at_once_and_sighup_changes_them(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient], tmp_path: Path
) -> None:
    path = tmp_path / "tokens"
    path.write_text("old-token\n")
    agent = start_agent("--token-file", str(path), token="ignored-where-there-is-a-file")
    old = connect(agent, token="old-token")
    session = old.exec(["cat"])
    session.write(b"before\n")
    session.wait_for(b"before\n")
    for content, good, bad in (
        ("old-token\nnew-token\n", ("old-token", "new-token"), ("ignored-where-there-is-a-file",)),
        ("new-token\n", ("new-token",), ("old-token",)),
    ):
        path.write_text(content)
        agent.process.send_signal(1)
        agent.wait_for_log(f"tokens: {len(good)} are good from now on")
        for token in good:
            connect(agent, token=token).assert_quiet()
        for token in bad:
            with pytest.raises(InvalidStatus, match="401"):
                connect(agent, token=token)
    path.write_text("has white space\n")
    agent.process.send_signal(1)
    agent.wait_for_log("the tokens stay as they are")
    connect(agent, token="new-token").assert_quiet()
    session.write(b"after\n")  # whoever was in before goes on
    session.wait_for(b"after\n")
    agent.stop()
    assert not re.search("old-token|new-token|white space-", agent.log)


@pytest.mark.parametrize(
    "lines",
    [
        ["Authorization : Bearer TOKEN"],
        ["Authorization:\tBasic TOKEN"],
        ["Authorization: Bearer wrong\r\n Bearer TOKEN"],
        ["Authorization: Bearer wrong\nAuthorization: Bearer TOKEN"],
        ["Authorization: Bearer wrong\rAuthorization: Bearer TOKEN"],
        ["Authorization: Bearer wrong\0Bearer TOKEN"],
        ["Authorization: Bearer TOKEN, Bearer wrong"],
        ["Authorization: Bearer TOKEN TOKEN"],
        ["Authorization: Bearer TOKEN", "authorization: Bearer TOKEN"],
        ["X-Authorization: Bearer TOKEN"],
        ["Proxy-Authorization: Bearer TOKEN"],
        ["Cookie: token=TOKEN"],
        ["Sec-WebSocket-Protocol: bearer, TOKEN"],
    ],
)
def test_a_token_in_another_place_or_twice_opens_nothing(agent: Agent, lines: list[str]) -> None:
    assert ask(agent, *(line.replace("TOKEN", TOKEN) for line in lines)) in (400, 401)


@pytest.mark.parametrize(
    "path",
    [
        "/ws?token=wrong&token=TOKEN",
        "/ws?Token=TOKEN",
        "/ws?token=TOKEN%00",
        "/ws?token=%20TOKEN",
        "/ws?x=1;token=TOKEN",
        "/ws?x=1#token=TOKEN",
        "/ws?token[]=TOKEN",
        "/ws#?token=TOKEN",
        "http://127.0.0.1/ws?token=TOKEN",
        "/ws%3Ftoken=TOKEN",
        "/./ws?token=TOKEN",
        "/ws?token=%",
        "/ws?token=\xff\xfe",
    ],
)
def test_a_query_that_only_looks_like_the_token_opens_nothing(agent: Agent, path: str) -> None:
    assert ask(agent, path=path.replace("TOKEN", TOKEN)) in (400, 401, 404)


def test_a_header_wins_over_the_query_right_or_wrong(agent: Agent) -> None:
    assert ask(agent, RIGHT, path="/ws?token=wrong") == 101
    assert ask(agent, "Authorization: Bearer wrong", path=f"/ws?token={TOKEN}") == 401
    assert ask(agent, "Authorization:", path=f"/ws?token={TOKEN}") == 401
    assert ask(agent, "Authorization: Basic eDp5", path=f"/ws?token={TOKEN}") == 401


def test_an_empty_and_a_huge_token_are_refused(agent: Agent, client: RawClient) -> None:
    assert ask(agent, "Authorization: Bearer ") == 401
    assert ask(agent, path="/ws?token=") == 401
    assert ask(agent, f"Authorization: Bearer {'x' * 8000}") == 401
    assert ask(agent, f"Authorization: Bearer {TOKEN * 300}") == 401
    for size in (9_000, 60_000, 1_000_000):
        with dial(agent) as sock:
            with contextlib.suppress(ConnectionError):
                sock.sendall(request(agent, f"Authorization: Bearer {'x' * size}"))
            assert status(sock) in (0, 400, 414, 431)
        with dial(agent) as sock:
            with contextlib.suppress(ConnectionError):
                sock.sendall(request(agent, path=f"/ws?token={'x' * size}"))
            assert status(sock) in (0, 400, 414, 431)
    client.assert_quiet()


# Requests inside of requests.


def test_a_token_behind_the_head_opens_nothing(agent: Agent) -> None:
    assert ask(agent, f"X: y\r\n\r\n{RIGHT}") == 401


def test_a_connection_answers_one_request_and_no_more(agent: Agent) -> None:
    health = f"GET /health HTTP/1.1\r\nHost: {agent.address}\r\n".encode()
    for first in (
        health + b"\r\n",
        health + b"Content-Length: 5\r\n\r\nhello",
        health + b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        health + b"Connection: keep-alive\r\n\r\n",
        request(agent, "Authorization: Bearer wrong"),
    ):
        with dial(agent) as sock:
            sock.sendall(first + request(agent, RIGHT) + b"\x81\x82\0\0\0\0hi")
            answer = everything(sock)
        assert answer.count(b"HTTP/1.1 ") == 1, answer
        assert b"101 Switching" not in answer


def test_frames_right_behind_the_request_are_not_lost(agent: Agent) -> None:
    message = json.dumps({"type": "exec", "id": "e", "cmd": ["echo", "early"]}).encode()
    frame = bytes([0x81, 0x80 | len(message)]) + bytes(4) + message
    with dial(agent) as sock:
        sock.sendall(request(agent, RIGHT) + frame)
        received = b""
        while b'"exit"' not in received:
            more = sock.recv(65536)
            assert more, received
            received += more
    assert b"ZWFybHkK" in received  # early, in base64


# Web pages.


def test_a_page_under_a_name_that_points_here_is_refused_without_a_token(start_agent: Callable[..., Agent]) -> None:
    agent = start_agent(token="")
    port = agent.address.rpartition(":")[2]

    def from_page(host: str, origin: str) -> int:
        lines = ["GET /ws HTTP/1.1", f"Host: {host}", f"Origin: {origin}", *UPGRADE, "", ""]
        with dial(agent) as sock:
            sock.sendall("\r\n".join(lines).encode())
            return status(sock)

    evil = f"rebound.example:{port}"
    assert from_page(evil, f"http://{evil}") == 403
    assert from_page(f"127.0.0.1:{port}", f"http://{evil}") == 403
    assert from_page(f"localhost.rebound.example:{port}", f"http://localhost.rebound.example:{port}") == 403
    assert from_page(f"127.0.0.1.rebound.example:{port}", f"http://127.0.0.1.rebound.example:{port}") == 403
    assert from_page(f"user@localhost:{port}", f"http://user@localhost:{port}") in (101, 400, 403)
    assert from_page(f"localhost:{port}", f"http://localhost:{port}") == 101
    assert from_page(agent.address, f"http://{agent.address}") == 101
    agent.wait_for_log("client refused: web pages of another host may not connect")


# Guessers.


def test_guesses_are_counted_and_do_not_fill_the_log(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    agent = start_agent()
    before = figures(agent)
    guessers = [dial(agent) for _ in range(200)]
    try:
        for number, sock in enumerate(guessers):
            sock.sendall(request(agent, f"Authorization: Bearer guess-{number}"))
        # Whoever has the token gets in and is served, from the guessers' own address.
        for _ in range(3):
            connect(agent).assert_quiet()
        assert figures(agent)[0] <= before[0] + 80  # threads: who waits for an answer has none
        assert {status(sock) for sock in guessers} == {401}
    finally:
        for sock in guessers:
            sock.close()
    connect(agent).assert_quiet()
    agent.wait_for_log("missing or wrong bearer token, 128 times from this address")
    assert agent.log.count("client refused") == 8  # 1, 2, 4 ... 128
    assert "guess-" not in agent.log


def test_who_leaves_before_the_refusal_keeps_nothing_waiting(start_agent: Callable[..., Agent]) -> None:
    agent = start_agent()
    assert ask(agent, "Authorization: Bearer wrong") == 401
    _, before, _ = figures(agent)
    for _ in range(300):
        with dial(agent) as sock:
            sock.sendall(request(agent, "Authorization: Bearer wrong"))
    eventually(lambda: figures(agent)[1] <= before, "the descriptors of before")
    assert ask(agent, RIGHT) == 101


# Crowds.


@pytest.mark.once
def test_10_000_connections_that_never_ask_keep_out_nobody(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient], many_descriptors: int
) -> None:
    agent = start_agent()
    with_a_client = connect(agent)
    with_a_client.assert_quiet()
    threads, descriptors, memory = figures(agent)
    beginnings = (b"", b"G", b"GET /ws HTTP/1.1\r\nHost: x\r\n")
    crowd = []
    try:
        for number in range(many_descriptors):
            crowd.append(dial(agent))
            crowd[-1].sendall(beginnings[number % 3])
        now = figures(agent)
        assert now[0] <= threads + 5, "a thread for who says nothing"
        assert now[1] <= descriptors + 4200, "more guests than there may be"
        assert now[2] <= memory + 40_000, "KiB for who says nothing"
        for _ in range(3):
            newcomer = connect(agent)
            newcomer.assert_quiet()
            newcomer.close()
        assert ask(agent, RIGHT) == 101
        with_a_client.assert_quiet()
    finally:
        for sock in crowd:
            sock.close()
    eventually(lambda: figures(agent)[1] <= descriptors, "the descriptors of before")
    eventually(lambda: figures(agent)[0] <= threads + 5, "the threads of before")
    assert figures(agent)[2] <= memory + 40_000
    with_a_client.assert_quiet()
    assert "error" not in agent.log


def test_a_request_that_comes_byte_by_byte_is_given_up(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    agent = start_agent()
    threads, _, _ = figures(agent)
    crowd = [dial(agent) for _ in range(300)]
    slow = request(agent, RIGHT)
    closed = 0
    at = 0
    deadline = time.monotonic() + DEADLINE
    poller = select.poll()
    by_descriptor = {sock.fileno(): sock for sock in crowd}
    for sock in crowd:
        poller.register(sock, select.POLLIN)
    while by_descriptor:
        assert time.monotonic() < deadline, f"{len(by_descriptor)} of 300 are still there"
        for fd, _ in poller.poll(100):
            sock = by_descriptor.pop(fd)
            poller.unregister(fd)
            assert everything(sock) == b""
            sock.close()
            closed += 1
        for sock in by_descriptor.values():
            with contextlib.suppress(ConnectionError):
                sock.sendall(slow[at % 20 : at % 20 + 1] if at else b"G")
        at += 1
        if at == 5:
            connect(agent).assert_quiet()
            assert figures(agent)[0] <= threads + 8
    assert closed == 300
    connect(agent).assert_quiet()


def test_a_crowd_from_one_address_displaces_nobody_at_another(
    start_agent: Callable[..., Agent], many_descriptors: int
) -> None:
    agent = start_agent()
    crowd: list[socket.socket] = []
    with dial(agent, "127.0.0.2") as waiting:
        waiting.sendall(request(agent, RIGHT)[:-2])  # all but its end
        try:
            crowd += [dial(agent) for _ in range(min(many_descriptors, 6000))]
            waiting.sendall(b"\r\n")
            assert status(waiting) == 101
        finally:
            for sock in crowd:
                sock.close()


def test_more_valid_clients_at_once_than_may_have_a_thread_all_get_in(
    start_agent: Callable[..., Agent], many_descriptors: int
) -> None:
    agent = start_agent()
    clients = [dial(agent) for _ in range(300)]
    try:
        for sock in clients:
            sock.sendall(request(agent, RIGHT))
        assert [status(sock) for sock in clients] == [101] * 300
    finally:
        for sock in clients:
            sock.close()


def test_half_a_request_and_the_end_of_the_agent_do_not_wait_for_each_other(start_agent: Callable[..., Agent]) -> None:
    agent = start_agent()
    with dial(agent) as sock:
        sock.sendall(b"GET /ws HTTP/1.1\r\n")
        ended = threading.Thread(target=agent.stop)
        ended.start()
        assert everything(sock) == b""
        ended.join(DEADLINE)
    assert agent.process.returncode == 0

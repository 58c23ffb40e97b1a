"""Who asks the gateway nothing, or asks it slowly: costs no thread, has its time, and keeps out nobody."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import docker_gateway
import pytest
from by_hand import Connection
from certificates import Authority
from docking import DEADLINE, Gateway
from support import TOKEN, Agent, eventually

import agent
from agent import Address, ServerTLS, make_client_tls

CROWD = 1000  # connections; more than the pool would ever have threads for them in these tests


def threads_of(gateway: Gateway) -> int:
    status = Path(f"/proc/{gateway.process.pid}/status").read_text()
    return int(re.search(r"Threads:\s+(\d+)", status)[1])  # type: ignore[index]


@contextlib.contextmanager
def crowd(where: str | tuple[str, int], said: bytes) -> Iterator[list[socket.socket]]:
    """So many connections, each of which has said that, and says no more."""
    with contextlib.ExitStack() as stack:
        socks = []
        for _ in range(CROWD):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX if isinstance(where, str) else socket.AF_INET))
            sock.settimeout(DEADLINE)
            sock.connect(where)
            sock.sendall(said)
            socks.append(sock)
        yield socks


@pytest.mark.parametrize("said", [b"", b"GET /_ping HTTP/1.1\r\nHost: d"])
def test_a_crowd_that_never_asks_takes_no_threads_and_keeps_out_nobody(gateway: Gateway, said: bytes) -> None:
    gateway.output("ps")
    before = threads_of(gateway)
    with crowd(str(gateway.path), said):
        for _ in range(3):
            assert gateway.output("exec", "web", "echo", "served") == "served\n"
        assert threads_of(gateway) < before + 50


def test_a_crowd_that_was_answered_and_stays_takes_no_threads(gateway: Gateway) -> None:
    before = threads_of(gateway)
    with crowd(str(gateway.path), b"GET /_ping HTTP/1.1\r\nHost: docker\r\n\r\n") as socks:
        for sock in socks:
            assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        eventually(lambda: threads_of(gateway) < before + 100, "fewer threads")  # they retire when they are idle
        for sock in socks[::100]:
            assert Connection(sock).ask("GET", "/info")[0] == 200


def test_a_crowd_that_stalls_in_the_tls_handshake_keeps_out_nobody(
    start_gateway: Callable[..., Gateway], tmp_path: Path
) -> None:
    ours = Authority(tmp_path, "ours")
    pem = ours.issue("server.pem", "127.0.0.1")
    gateway = start_gateway("-H", "tcp://127.0.0.1:0", "--tls-cert", pem, "--tls-client-ca", ours.path)
    port = int(gateway.wait_for_log(r"clients on 127\.0\.0\.1:(\d+) with TLS")[1])
    hello = ssl.MemoryBIO()
    context = make_client_tls(ours.path, ours.issue("client.pem", "alice.example"))
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), hello, server_hostname="127.0.0.1").do_handshake()
    with crowd(("127.0.0.1", port), hello.read()):
        for _ in range(3):
            with context.wrap_socket(
                socket.create_connection(("127.0.0.1", port), DEADLINE), server_hostname="127.0.0.1"
            ) as sock:
                assert Connection(sock).ask("GET", "/info")[0] == 200
        assert threads_of(gateway) < 100


# ── times: in this process, where they can be made short ──────────────────────


@pytest.fixture
def known() -> docker_gateway.Gateway:
    """What the server of this process knows: nothing yet."""
    return docker_gateway.Gateway()


@pytest.fixture(params=["unix", "tls"])
def dial(
    request: pytest.FixtureRequest, known: docker_gateway.Gateway, tmp_path: Path
) -> Iterator[Callable[[], socket.socket]]:
    """Connect to a server of this process."""
    server = docker_gateway.Server(known)
    with contextlib.ExitStack() as stack:
        if request.param == "unix":
            server.listen(Address(path=str(tmp_path / "docker.sock")))

            def connect() -> socket.socket:
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                sock.settimeout(DEADLINE)
                sock.connect(str(tmp_path / "docker.sock"))
                return sock
        else:
            ours = Authority(tmp_path, "ours")
            port = server.listen(Address("127.0.0.1", 0), ServerTLS(ours.issue("server.pem", "127.0.0.1")))
            tls = make_client_tls(ours.path)

            def connect() -> socket.socket:
                sock = socket.create_connection(("127.0.0.1", port), DEADLINE)
                return stack.enter_context(tls.wrap_socket(sock, server_hostname="127.0.0.1"))

        yield connect
        server.close()


def test_a_head_that_does_not_come_is_waited_for_no_longer_than_its_time(
    dial: Callable[[], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "HANDSHAKE_TIMEOUT", 0.3)
    sock = dial()
    sock.sendall(b"GET /_ping HTTP/1.1\r\nHost: d")
    assert Connection(sock).read_rest() == b""


def test_a_body_that_does_not_come_is_waited_for_no_longer_than_its_time(
    dial: Callable[[], socket.socket], known: docker_gateway.Gateway, web: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = known.new_container("web")
    known.add(container)
    dialler = docker_gateway.Dialler(container, web.address, TOKEN, 0.0, lambda: None)
    dialler.start()
    eventually(lambda: container.state.running, "the agent")
    exec_id = Connection(dial()).create("true")
    monkeypatch.setattr(docker_gateway, "BODY_TIMEOUT", 0.3)
    monkeypatch.setattr(docker_gateway, "SKIP_TIMEOUT", 0.3)
    for path, expected in (("containers/web/exec", 408), (f"exec/{exec_id}/start", 408), ("nonsense", 404)):
        connection = Connection(dial())
        connection.sock.sendall(f"POST /{path} HTTP/1.1\r\nHost: docker\r\nContent-Length: 10\r\n\r\n{{".encode())
        status, headers, _ = connection.read_answer()
        assert (status, headers["connection"]) == (expected, "close")
        assert connection.read_rest() == b""
    dialler.stop()


def test_a_connection_that_asks_nothing_more_is_closed_after_its_time(
    dial: Callable[[], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docker_gateway, "IDLE_TIMEOUT", 0.3)
    connection = Connection(dial())
    assert connection.ask("GET", "/info")[0] == 200
    assert connection.read_rest() == b""


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b"GET /_ping HTTP/1.1\r\nX: " + b"x" * 70_000 + b"\r\n\r\n", 431),
        (b"GET /_ping HTTP/2.0\r\n\r\n", 400),
        (b"GET /_ping\r\n\r\n", 400),
        (b"get /_ping HTTP/1.1\r\n\r\n", 400),
        (b"FROB /_ping HTTP/1.1\r\n\r\n", 501),
        (b"GET /_ping HTTP/1.0\r\n\r\n", 200),
    ],
)
def test_a_request_is_answered_as_soon_as_it_is_known_what_it_is(
    dial: Callable[[], socket.socket], said: bytes, status: int
) -> None:
    connection = Connection(dial())
    connection.sock.sendall(said)
    found, headers, _ = connection.read_answer()
    assert (found, headers["connection"]) == (status, "close")
    assert connection.read_rest() == b""


def test_nonsense_behind_a_request_is_answered_behind_its_answer(dial: Callable[[], socket.socket]) -> None:
    connection = Connection(dial())
    connection.sock.sendall(b"GET /_ping HTTP/1.1\r\nHost: docker\r\n\r\nnonsense\r\n")
    assert [connection.read_answer()[0] for _ in range(2)] == [200, 400]
    assert connection.read_rest() == b""

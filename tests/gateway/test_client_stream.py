"""The gateway's end of a client's TLS connection, alone: how it ends, in both directions."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import docker_gateway as gateway
import pytest
from certificates import Authority
from support import DEADLINE, eventually

from agent import ServerTLS, TLSStream, make_client_tls

Pair = tuple[gateway.ClientStream, ssl.SSLSocket]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"), "ours")


@pytest.fixture(params=[ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
def pair(request: pytest.FixtureRequest, authority: Authority) -> Iterator[Pair]:
    """The gateway's end of a connection, and a client's, for which an end without a goodbye is an error."""
    server = ServerTLS(authority.issue("server.pem", "127.0.0.1")).context
    client = make_client_tls(authority.path)
    client.maximum_version = request.param
    near, far = socket.socketpair()  # which is full when it says so, unlike TCP
    near.settimeout(DEADLINE)
    with ThreadPoolExecutor(1) as executor:
        accepted = executor.submit(server.wrap_socket, far, server_side=True)
        dialled = client.wrap_socket(near, server_hostname="127.0.0.1", suppress_ragged_eofs=False)
        stream = gateway.ClientStream(accepted.result(DEADLINE))
    with contextlib.closing(dialled):
        yield stream, dialled
        stream.close()


@contextlib.contextmanager
def running(work: Callable[[], object]) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield thread
    finally:
        thread.join(DEADLINE)
        assert not thread.is_alive()


def test_a_clients_goodbye_is_the_end_and_what_is_sent_after_it_arrives(pair: Pair) -> None:
    stream, client = pair
    client.sendall(b"hello")
    client.settimeout(0)
    with pytest.raises(ssl.SSLWantReadError):
        client.unwrap()
    client.settimeout(DEADLINE)
    assert (stream.recv(100), stream.recv(100)) == (b"hello", b"")
    stream.sendall(b"answer")
    assert client.recv(100) == b"answer"


def test_a_connection_that_ends_without_a_goodbye_was_cut(pair: Pair) -> None:
    stream, client = pair
    client.sendall(b"hello")
    socket.socket.shutdown(client, socket.SHUT_WR)
    assert stream.recv(100) == b"hello"
    with pytest.raises(ConnectionResetError):
        stream.recv(100)


def test_the_goodbye_waits_until_there_is_room_for_it(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is filled beneath TLS, so that nothing at all fits any more."""
    stream, client = pair
    waits, wait = threading.Event(), stream._wait
    monkeypatch.setattr(stream, "_wait", lambda *words: (waits.set(), wait(*words)))
    filled = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            filled += socket.socket.send(stream.socket, b"\0")
    with running(lambda: stream.shutdown(socket.SHUT_WR)) as leaving:
        eventually(lambda: waits.is_set() or not leaving.is_alive(), "a wait for room")
        while filled:
            filled -= len(socket.socket.recv(client, min(filled, 65536)))
        assert client.recv(100) == b""


def test_who_takes_nothing_goes_without_a_goodbye(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, _ = pair
    monkeypatch.setattr(gateway, "GOODBYE_TIMEOUT", 0.01)
    with contextlib.suppress(BlockingIOError):
        while True:
            socket.socket.send(stream.socket, b"\0")
    stream.shutdown(socket.SHUT_WR)
    stream.close()


def test_who_still_sends_when_the_gateway_says_goodbye_gets_the_last_output(pair: Pair) -> None:
    """Nothing that comes then is left unread, for which the kernel would answer with a reset."""
    stream, client = pair
    sender = TLSStream(client)  # two threads use it
    ended: list[bytes] = []
    with running(lambda: sender.sendall(bytes(8 << 20))) as sending:
        stream.sendall(b"the last output")
        stream.shutdown(socket.SHUT_WR)
        with running(lambda: ended.append(stream.recv(100))):
            sending.join(DEADLINE)
            assert (sender.recv(100), sender.recv(100)) == (b"the last output", b"")
            sender.close()
    assert ended == [b""]


def test_reading_has_a_deadline_even_within_a_record(pair: Pair) -> None:
    stream, client = pair
    with gateway.Incoming(stream, b"early") as incoming:
        assert incoming.read(100) == b"early"
        with pytest.raises(TimeoutError), incoming.within(0.01):
            incoming.read(100)
        socket.socket.send(client, b"\x17\x03\x03\x40\x00")  # the head of a record that does not come
        with pytest.raises(TimeoutError), incoming.within(0.01):
            incoming.read(100)


def test_more_than_was_asked_for_is_kept_for_the_next_read(pair: Pair) -> None:
    stream, client = pair
    client.sendall(b"0123456789")
    with gateway.Incoming(stream, b"") as incoming:
        assert [incoming.read(4) for _ in range(3)] == [b"0123", b"4567", b"89"]


def test_an_incoming_that_is_paused_gives_what_was_read_and_waits_for_nothing(pair: Pair) -> None:
    stream, _ = pair
    incoming = gateway.Incoming(stream, b"early")
    incoming.paused = True
    assert (incoming.read(3), incoming.read(3), incoming.read(3)) == (b"ear", b"ly", None)


def test_a_certificate_that_cannot_be_read_again_keeps_no_other_from_it(tmp_path: Path) -> None:
    ours = Authority(tmp_path, "ours")
    broken, good = (ServerTLS(ours.issue(f"{name}.pem", "127.0.0.1")) for name in ("broken", "good"))
    (tmp_path / "broken.pem").write_text("no certificate")
    before = broken.context, good.context
    gateway.reload([broken, good])
    assert broken.context is before[0]
    assert good.context is not before[1]

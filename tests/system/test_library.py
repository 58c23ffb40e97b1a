"""What agent.QueuedConnection relies on in websockets: a release that changes it fails here, and not for a user."""

from __future__ import annotations

import contextlib
import inspect
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import websockets.sync.client
import websockets.sync.server
from support import DEADLINE, eventually
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame
from websockets.protocol import OPEN, Protocol
from websockets.server import ServerProtocol
from websockets.sync.client import ClientConnection
from websockets.sync.connection import Connection
from websockets.sync.server import ServerConnection, serve

WRITING = ("send", "sendall", "sendmsg", "sendto", "sendfile", "write", "shutdown")
TERMINATING = "close_socket"


class WatchedSocket:
    """A socket that notes every write, and whether send_data() made it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.writes: list[tuple[str, str]] = []  # the method, and who called

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._sock, name)
        if name not in WRITING:
            return attribute

        def watched(*args: Any) -> Any:
            callers = [frame.function for frame in inspect.stack()[1:8]]
            who = next((caller for caller in callers if caller in ("send_data", TERMINATING)), "somebody else")
            self.writes.append((name, who))
            return attribute(*args)

        return watched


class Watched(ServerConnection):
    """A server's connection that notes what the library calls, and with which lock held."""

    recv_bufsize = 12345

    def __init__(self, sock: socket.socket, protocol: ServerProtocol, *args: Any, **kwargs: Any) -> None:
        self.locked: list[bool] = []
        self.events: list[Any] = []
        self.closed_socket = threading.Event()
        self.watched = WatchedSocket(sock)
        self.first_bytes: list[bytes] = []
        receive_data = protocol.receive_data

        def receive_first(data: bytes | bytearray) -> None:
            self.first_bytes.append(bytes(data))
            receive_data(data)

        vars(protocol)["receive_data"] = receive_first
        super().__init__(self.watched, protocol, *args, **kwargs)  # type: ignore[arg-type]

    def send_data(self) -> None:
        self.locked.append(self.protocol_mutex.locked())
        super().send_data()

    def process_event(self, event: Any) -> None:
        self.events.append(event)
        super().process_event(event)

    def close_socket(self) -> None:
        super().close_socket()
        self.closed_socket.set()


Serve = Callable[..., tuple[Watched, ClientConnection]]


def handler_of(server: websockets.sync.server.Server) -> Callable[[socket.socket, Any], None]:
    """What serves one connection; the rest of the server is not used, and closed."""
    ends: tuple[Any, ...] = (server.shutdown_watcher, server.shutdown_notifier)
    for end in ends:
        if isinstance(end, int):
            os.close(end)
        else:
            end.close()
    return server.handler


@pytest.fixture
def serve_one() -> Iterator[Serve]:
    """Connect to a server of one connection; the server's side, and the client's."""
    with contextlib.ExitStack() as closing:

        def start(handler: Callable[[Watched], None] | None = None, **options: Any) -> tuple[Watched, ClientConnection]:
            accepted: list[Watched] = []
            ready = threading.Event()

            def handle(connection: ServerConnection) -> None:
                assert isinstance(connection, Watched)
                accepted.append(connection)
                ready.set()
                if handler is not None:
                    handler(connection)
                    return
                with contextlib.suppress(ConnectionClosed):
                    for message in connection:
                        connection.send(message)

            listener = closing.enter_context(socket.create_server(("127.0.0.1", 0)))
            server = serve(
                handle,
                sock=listener,
                create_connection=Watched,
                compression=None,
                ping_interval=None,
                close_timeout=1,
                **options,
            )
            # As the agent does: its own accept, and the library's handler.
            serve_connection = handler_of(server)
            thread = threading.Thread(target=lambda: serve_connection(*listener.accept()))
            thread.start()
            closing.callback(thread.join, DEADLINE)
            client = websockets.sync.client.connect(
                f"ws://127.0.0.1:{listener.getsockname()[1]}/ws", compression=None, close_timeout=1, proxy=None
            ).__enter__()
            closing.callback(client.close)
            assert ready.wait(DEADLINE)
            return accepted[0], client

        yield start


def all_by_send_data(connection: Watched) -> bool:
    """Nothing but send_data() writes; close_socket() may shut the socket down."""
    return {who for method, who in connection.watched.writes if method != "shutdown"} == {"send_data"} and {
        who for method, who in connection.watched.writes
    } <= {"send_data", TERMINATING}


def test_only_send_data_writes_to_the_socket_and_the_mutex_is_held(serve_one: Serve) -> None:
    connection, client = serve_one()
    client.send("text")
    assert client.recv(DEADLINE) == "text"
    client.send(bytes(100000))
    assert client.recv(DEADLINE) == bytes(100000)
    client.send(iter(["frag", "ments"]))
    assert client.recv(DEADLINE) == "fragments"
    assert client.ping().wait(DEADLINE)
    connection.send(iter(["a", "b"]))
    assert client.recv(DEADLINE) == "ab"
    connection.ping()
    connection.pong()
    client.close()
    assert connection.closed_socket.wait(DEADLINE)
    methods = [method for method, _ in connection.watched.writes]
    assert methods.count("sendall") >= 8
    assert all_by_send_data(connection), connection.watched.writes
    # The first, the handshake's answer, is held or not as the library likes; nothing else sends then.
    assert all(connection.locked[1:]), connection.locked


def test_only_send_data_writes_when_the_peer_breaks_the_protocol(serve_one: Serve) -> None:
    connection, client = serve_one()
    client.socket.sendall(b"\xff\xff nonsense")
    assert connection.closed_socket.wait(DEADLINE)
    assert all_by_send_data(connection), connection.watched.writes
    assert connection.close_code == 1002 or connection.protocol.close_sent is not None


def test_only_send_data_writes_when_the_server_closes(serve_one: Serve) -> None:
    connection, client = serve_one(lambda own: own.close(1001, "agent ends"))
    with pytest.raises(ConnectionClosed):
        client.recv(DEADLINE)
    assert connection.closed_socket.wait(DEADLINE)
    assert client.close_code == 1001
    assert all_by_send_data(connection), connection.watched.writes


def test_only_send_data_writes_when_the_request_is_answered_without_an_upgrade() -> None:
    ours, theirs = socket.socketpair()
    kept: list[Watched] = []

    class Kept(Watched):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            kept.append(self)

    with socket.create_server(("127.0.0.1", 0)) as listener, ours, theirs:
        server = serve(
            lambda connection: None,
            sock=listener,
            create_connection=Kept,
            process_request=lambda connection, request: connection.respond(404, "nothing here\n"),
            compression=None,
        )
        ours.sendall(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
        thread = threading.Thread(target=handler_of(server), args=(theirs, ("", 0)))
        thread.start()
        received = b""
        while data := ours.recv(65536):
            received += data
        thread.join(DEADLINE)
    assert received.startswith(b"HTTP/1.1 404 ")
    assert received.endswith(b"nothing here\n")
    assert all_by_send_data(kept[0]), kept[0].watched.writes
    assert kept[0].first_bytes[0].startswith(b"GET /nothing")


def test_the_receiver_hands_every_frame_to_process_event(serve_one: Serve) -> None:
    connection, client = serve_one()
    client.send("text")
    assert client.recv(DEADLINE) == "text"
    assert client.ping(b"are you there").wait(DEADLINE)

    def frames() -> list[bytes]:
        return [bytes(event.data) for event in connection.events if isinstance(event, Frame)]

    eventually(lambda: len(frames()) == 2, "the ping's event, which comes behind the pong")
    assert frames() == [b"text", b"are you there"]
    assert connection.recv_events_thread.is_alive()
    client.close()
    connection.recv_events_thread.join(DEADLINE)
    assert not connection.recv_events_thread.is_alive()
    assert connection.closed_socket.is_set()


def test_receive_data_may_be_replaced_on_the_protocol(serve_one: Serve) -> None:
    connection, client = serve_one()
    client.send("text")
    assert client.recv(DEADLINE) == "text"
    assert connection.first_bytes[0].startswith(b"GET /ws HTTP/1.1\r\n")
    assert len(connection.first_bytes) >= 2


def test_data_to_send_gives_bytes_and_an_empty_one_for_the_end(serve_one: Serve) -> None:
    connection, client = serve_one()
    with connection.protocol_mutex:
        assert connection.protocol.state is OPEN
        connection.protocol.send_ping(b"")
        data = connection.protocol.data_to_send()
        assert [bytes(item) for item in data] == [b"\x89\x00"]
        assert connection.protocol.data_to_send() == []
    connection.socket.sendall(b"\x89\x00")
    client.send("still")
    assert client.recv(DEADLINE) == "still"
    protocol = Protocol(connection.protocol.side)
    protocol.receive_data(b"\xff\xff\xff")  # a reserved opcode
    assert protocol.data_to_send()[-1] == b""
    assert protocol.state is not OPEN


def test_sending_after_the_close_is_an_error_and_closing_twice_is_none(serve_one: Serve) -> None:
    connection, client = serve_one()
    client.close()
    assert connection.closed_socket.wait(DEADLINE)
    with pytest.raises(ConnectionClosed):
        connection.send("late")
    connection.close()
    client.close()


def test_the_names_that_the_agent_uses_are_there() -> None:
    assert {"send_data", "process_event", "close_socket", "recv_bufsize"} <= set(vars(Connection))
    for name in ("sock", "create_connection", "process_request", "compression", "open_timeout", "close_timeout"):
        assert name in inspect.signature(serve).parameters
    for name in ("create_connection", "compression", "additional_headers", "ping_interval", "max_size"):
        assert name in inspect.signature(websockets.sync.client.connect).parameters
    first, second = list(inspect.signature(ServerConnection.__init__).parameters)[1:3]
    assert first in ("sock", "socket")  # passed by position
    assert second == "protocol"
    # Overridden here and in the agent: a release that calls them something else would not call ours.
    for name in ("send_data", "close_socket"):
        assert list(inspect.signature(getattr(Connection, name)).parameters) == ["self"]

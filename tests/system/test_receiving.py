"""agent.QueuedConnection.serve_messages(): the receiver calls the handler itself, and nothing overtakes anything."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import websockets.sync.client
from support import DEADLINE, eventually
from websockets.exceptions import ConnectionClosed, ConnectionClosedError
from websockets.frames import Frame, Opcode
from websockets.sync.client import ClientConnection
from websockets.sync.server import ServerConnection, serve

from agent import QueuedConnection, ThreadPool
from agent_client import AgentConn


class Serving:
    """A connection that serves messages to ``handler``, once ``begin`` is set."""

    def __init__(self, handler: Callable[[str | bytes], None]) -> None:
        self.handler = handler
        self.begin = threading.Event()
        self.connection: QueuedConnection | None = None
        self.ended = threading.Event()
        self.error: Exception | None = None

    def serve(self, connection: Any) -> None:
        self.connection = connection
        connection.start_writer(ThreadPool())
        assert self.begin.wait(DEADLINE)
        try:
            connection.serve_messages(self.handler)
        except Exception as exc:
            self.error = exc
        finally:
            self.ended.set()


class Connection(QueuedConnection, ServerConnection):
    """A server's connection without what the agent's own adds."""


@contextlib.contextmanager
def served(serving: Serving) -> Iterator[ClientConnection]:
    server = serve(serving.serve, "127.0.0.1", 0, create_connection=Connection, compression=None, max_size=None,
                   ping_interval=None, close_timeout=1)  # fmt: skip
    with server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        port = server.socket.getsockname()[1]
        with websockets.sync.client.connect(
            f"ws://127.0.0.1:{port}/ws", compression=None, close_timeout=1, proxy=None
        ) as client:
            yield client
        assert serving.ended.wait(DEADLINE)
    thread.join(DEADLINE)


def test_whole_messages_are_handled_by_the_thread_that_received_them() -> None:
    threads: list[threading.Thread] = []
    serving = Serving(lambda message: threads.append(threading.current_thread()))
    serving.begin.set()
    with served(serving) as client:
        for count in range(20):
            client.send(str(count))
        eventually(lambda: len(threads) == 20, "all are handled")
        eventually(lambda: serving.connection is not None and serving.connection._direct, "the receiver handles")
        assert serving.connection is not None
        client.send("the last")
        eventually(lambda: len(threads) == 21, "the last is handled")
        assert threads[-1] is serving.connection.recv_events_thread
    assert serving.error is None


@pytest.mark.parametrize("seed", range(5))
def test_fragmented_and_whole_messages_pings_and_an_early_start_keep_their_order(seed: int) -> None:
    received: list[str | bytes] = []
    serving = Serving(lambda message: received.append(message if isinstance(message, str) else bytes(message)))
    chance = random.Random(seed)
    sent: list[str | bytes] = []
    with served(serving) as client:
        for count in range(400):
            if count == 3 * (seed % 4):
                serving.begin.set()  # what came before is handled first
            parts = [f"{count}.{part};" * chance.choice([1, 1, 20_000]) for part in range(chance.choice([1, 1, 2, 5]))]
            binary = chance.random() < 0.5
            message = "".join(parts)
            sent.append(message.encode() if binary else message)
            if len(parts) == 1:
                client.send(sent[-1])
            else:
                client.send([part.encode() for part in parts] if binary else parts)
            if chance.random() < 0.2:
                client.ping()
        eventually(lambda: len(received) == len(sent), "all are handled")
    assert received == sent
    assert serving.error is None


def test_a_message_in_many_fragments_is_one_message_in_its_place() -> None:
    received: list[Any] = []
    serving = Serving(received.append)
    serving.begin.set()
    with served(serving) as client:
        client.send("first")
        client.send(["x"] * 100)
        client.send("last")
        eventually(lambda: len(received) == 3, "all are handled")
    assert received == ["first", "x" * 100, "last"]


def test_what_is_not_utf_8_closes_the_connection_with_1007_behind_what_came_before() -> None:
    received: list[Any] = []
    serving = Serving(received.append)
    serving.begin.set()
    with served(serving) as client:
        client.send("fine")
        client.send(b"\xff\xff", text=True)
        with pytest.raises(ConnectionClosedError) as closed:
            client.recv(DEADLINE)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1007
        assert serving.ended.wait(DEADLINE)
    assert received == ["fine"]
    assert isinstance(serving.error, ConnectionClosedError)


def test_a_handler_that_fails_ends_the_connection_and_its_error_is_raised() -> None:
    def handle(message: str | bytes) -> None:
        raise ArithmeticError(message)

    serving = Serving(handle)
    serving.begin.set()
    with served(serving) as client:
        eventually(lambda: serving.connection is not None and serving.connection._direct, "the receiver handles")
        client.send("divide")
        with pytest.raises(ConnectionClosed):
            client.recv(DEADLINE)
        assert serving.ended.wait(DEADLINE)
    assert isinstance(serving.error, ArithmeticError)


def test_a_connection_that_breaks_is_told_as_such_behind_what_came_before() -> None:
    received: list[Any] = []
    serving = Serving(received.append)
    serving.begin.set()
    with served(serving) as client:
        client.send("last words")
        eventually(lambda: received, "it is handled")
        client.socket.shutdown(socket.SHUT_RDWR)
        assert serving.ended.wait(DEADLINE)
    assert received == ["last words"]
    assert isinstance(serving.error, ConnectionClosedError)


def test_the_receiver_holds_no_lock_of_the_library_while_the_handler_runs() -> None:
    held: list[bool] = []
    serving = Serving(lambda message: held.append(serving.connection.protocol_mutex.locked()))  # type: ignore[union-attr]
    serving.begin.set()
    with served(serving) as client:
        for _ in range(10):
            client.send("x")
        eventually(lambda: len(held) == 10, "all are handled")
    assert not any(held)


def test_the_library_queues_frames_where_serve_messages_looks_for_them() -> None:
    serving = Serving(lambda message: None)
    with served(serving) as client:
        client.send("x")
        eventually(lambda: serving.connection and not serving.connection.recv_messages.frames.empty(), "it is queued")
        assert serving.connection is not None
        frame = serving.connection.recv_messages.frames.get(block=False)
        assert isinstance(frame, Frame)
        assert (frame.opcode, frame.fin, bytes(frame.data)) == (Opcode.TEXT, True, b"x")
        serving.begin.set()


def test_a_callback_may_close_the_connection_that_calls_it(start_agent: Callable[..., Any], tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    served_agent = start_agent(
        "--health-cmd", f"test ! -e {flag}", "--health-interval", "20ms", "--health-retries", "1"
    )
    conn = AgentConn.dial(served_agent.address, served_agent.token)
    closed = threading.Event()

    def close(state: dict[str, Any]) -> None:
        conn.close()
        closed.set()

    conn.on_health = close
    conn.popen(["sleep", "1000"])
    flag.touch()
    try:
        assert closed.wait(DEADLINE)
        conn._thread.join(DEADLINE)
        assert not conn._thread.is_alive()
    finally:
        conn.close()

#!/usr/bin/env python3
"""Run commands in a container through its sockerless-agent, as with ``subprocess``.

    from agent_client import AgentConn

    with AgentConn.dial("127.0.0.1:9111", token="secret") as conn:
        print(conn.run(["uname", "-a"], capture_output=True, text=True).stdout)
        with conn.popen(["cat"]) as process:
            process.stdin.write(b"hello")

One connection carries any number of commands at once and may be used from any
thread. From a shell: ``python -m agent_client exec -it -- sh``; see --help.

The file reads top-down: errors, Docker's stream framing, the connection, the
processes on it, bridges to a Docker client's socket, the command line.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import fcntl
import functools
import hmac
import http
import http.client
import io
import itertools
import json
import logging
import os
import queue
import secrets
import select
import shlex
import signal
import socket
import ssl
import struct
import subprocess
import sys
import termios
import threading
import time
import tty
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import IO, Any, ClassVar, NoReturn, Protocol, Self, cast, runtime_checkable

from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.frames import CloseCode
from websockets.http11 import Request as HTTPRequest
from websockets.http11 import Response as HTTPResponse
from websockets.sync.client import connect, unix_connect
from websockets.sync.server import ServerConnection

from agent import (
    CLOSE_TIMEOUT,
    DEFAULT_WINDOW_SIZE,
    INSTANCE_HEADER,
    SUBPROTOCOL,
    Ack,
    Address,
    Answer,
    ArchiveError,
    ArchiveGet,
    ArchivePut,
    ArchiveStat,
    Attach,
    Call,
    Channel,
    CloseStdin,
    DialledWebSocket,
    End,
    Error,
    Event,
    Exec,
    Exit,
    GetHealth,
    GetStats,
    Guest,
    Health,
    Heartbeat,
    LifetimeExpired,
    ListSessions,
    Lost,
    MessageError,
    Opening,
    Outbox,
    Output,
    Park,
    PathStat,
    QueuedConnection,
    Reason,
    Request,
    Resize,
    Resume,
    Resumed,
    ServerTLS,
    ServerWebSocket,
    Sessions,
    Signal,
    Started,
    Stats,
    Stdin,
    Stream,
    ThreadPool,
    Tokens,
    ToSession,
    Unpacker,
    __version__,
    bearer_token,
    decode_data_frame,
    decode_event,
    decode_request,
    explain_tls_failure,
    is_foreign_page,
    make_client_tls,
    make_doorway,
    open_listener,
    pack,
    parse_address,
    parse_duration,
    parse_signal,
    peer_certificate,
    read_token_file,
    stat_path,
)

__all__ = [
    "AgentConn",
    "AgentProcess",
    "ClientError",
    "CommandNotExecutable",
    "CommandNotFound",
    "ConnectFailed",
    "ConnectionLost",
    "DockerStreamDecoder",
    "DockerStreamError",
    "ReverseAgentConn",
    "ReverseListener",
    "ServerTLS",
    "SessionError",
    "Tokens",
    "Unauthorized",
    "encode_docker_frame",
    "make_client_tls",
]

log = logging.getLogger("sockerless.client")

DEFAULT_ADDRESS = "127.0.0.1:9111"
OPEN_TIMEOUT = 10.0  # seconds
PING_INTERVAL = 20.0  # seconds
PING_TIMEOUT = 60.0  # seconds of silence, at the TCP level too, after which the agent counts as gone
MAX_MESSAGE_SIZE = 64 << 20  # bytes
STDIN_CHUNK = 256 << 10  # bytes in one put() of stdin
REMEMBERED_SESSIONS = 4096  # of a client behind a listener, until those that have ended are forgotten
BRIDGE_LIMIT = 64 << 20  # bytes of output that may wait for a Docker client, or one behind a listener
RESUME_PATIENCE = 60.0  # seconds for which a lost connection is made again
REDIAL_FIRST, REDIAL_LAST = 0.05, 2.0  # seconds between two tries; the very first comes at once
END_GRACE = 5.0  # seconds from SIGHUP to SIGKILL where the agent cannot end a session by itself
UNREAD_LIMIT = 1 << 30  # bytes of output that a session keeps for a reader that does not come


# ══════════════════════════════════════════════════════════════════════════════
# Errors
# ══════════════════════════════════════════════════════════════════════════════


class ClientError(Exception):
    """Base class of the errors that this module raises on purpose."""


class ConnectFailed(ClientError, ConnectionError):
    """No connection to the agent could be made; ``str()`` says why."""


class Unauthorized(ConnectFailed):
    """The agent refused the token (HTTP 401)."""


class ConnectionLost(ClientError, ConnectionError):
    """The connection ended while something ran on it: how that ended is not known."""


class SessionError(ClientError):
    """The agent refused to start a session, or gave one up.

    Attributes:
        reason: one of agent.Reason, "" if the agent gave none (the Go agent).
        session_id: which session, where that is not the caller's own.
    """

    def __init__(self, message: str, reason: str = "", session_id: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.session_id = session_id


class CommandNotFound(SessionError):
    """There is no such command: a shell's exit status 127."""


class CommandNotExecutable(SessionError):
    """The command cannot be executed: a shell's exit status 126."""


def _session_error(event: Error) -> SessionError:
    """The exception for an error event; agents without reasons are read by their words."""
    reason, words = event.reason, event.message.lower()
    if reason == Reason.NOT_FOUND or (not reason and ("not found" in words or "no such file" in words)):
        return CommandNotFound(event.message, reason)
    if reason == Reason.NOT_EXECUTABLE or (
        not reason and any(text in words for text in ("not executable", "permission denied", "exec format error"))
    ):
        return CommandNotExecutable(event.message, reason)
    return SessionError(event.message, reason)


# After these the session that they name goes on, or its exit follows.
_NOT_FATAL = frozenset(
    {
        Reason.BAD_MESSAGE,
        Reason.UNKNOWN_SESSION,
        Reason.DUPLICATE_SESSION,
        Reason.STDIN_OVERFLOW,
        Reason.READ_ONLY,
    }
)


# These are about a message to the session that they name; all others, before its start, are about that.
_ABOUT_MESSAGES = frozenset({Reason.BAD_MESSAGE, Reason.STDIN_OVERFLOW, Reason.READ_ONLY})


# ══════════════════════════════════════════════════════════════════════════════
# Docker's stream framing (Docker Engine API, "Attach to a container", stream format)
# ══════════════════════════════════════════════════════════════════════════════


class DockerStreamError(ClientError):
    """Bytes that are not Docker's multiplexed stream."""


def encode_docker_frame(stream: Stream, data: bytes) -> bytes:
    """One frame of Docker's multiplexed stream: an 8-byte header, then ``data``."""
    return struct.pack(">BxxxL", stream, len(data)) + data


class DockerStreamDecoder:
    """Decodes Docker's multiplexed stream from pieces of any size."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[Stream, bytes]]:
        """Take the next piece; returns the frames that it completes.

        Raises:
            DockerStreamError: if a header makes no sense.
        """
        self._buffer += data
        frames = []
        while len(self._buffer) >= 8:
            number, zeros, size = struct.unpack_from(">B3sL", self._buffer)
            if number > 2 or zeros != b"\0\0\0":
                raise DockerStreamError(
                    f"not a frame of Docker's multiplexed stream: header {bytes(self._buffer[:8])!r}"
                )
            if len(self._buffer) < 8 + size:
                break
            frames.append((Stream(number), bytes(self._buffer[8 : 8 + size])))
            del self._buffer[: 8 + size]
        return frames

    def finish(self) -> None:
        """The stream has ended.

        Raises:
            DockerStreamError: if it ended within a frame.
        """
        if self._buffer:
            raise DockerStreamError(f"the stream ended within a frame: {len(self._buffer)} bytes are left over")


# ══════════════════════════════════════════════════════════════════════════════
# The connection
# Threads: the library's receiver, the writer (both as in agent.QueuedConnection),
# and one that hands events to their sessions. Callers come from any thread.
# ══════════════════════════════════════════════════════════════════════════════

_pool = ThreadPool()


_heartbeats: dict[tuple[float, float], Heartbeat] = {}


def _heartbeat(interval: float = PING_INTERVAL, timeout: float = PING_TIMEOUT) -> Heartbeat:
    """The one thread that pings all connections with these times, in seconds."""
    return _heartbeats.setdefault((interval, timeout), Heartbeat(interval, timeout))


class SessionReceiver(Protocol):
    """What the connection tells a session, from its receiving thread; nothing here may block."""

    def output(self, event: Output) -> None: ...

    def warning(self, error: SessionError) -> None:
        """The agent complained about a message; the session goes on, or its exit follows."""

    def ended(self, code: int) -> None: ...

    def failed(self, error: ClientError) -> None:
        """The session did not start, or the connection was lost."""

    def tell_consumed(self, consumed: Callable[[int], None]) -> None:
        """Version 2: call ``consumed`` with each number of bytes that nobody here keeps any more."""


@runtime_checkable
class StartReceiver(Protocol):
    """A SessionReceiver that wants to be told of the start, too."""

    def started(self, event: Started) -> None:
        """Version 2: the command runs, or the client is attached; before any output."""


class _ClientFlow:
    """What a version 2 connection knows of a session, to hold it back and to resume it."""

    def __init__(self, request: Opening, receiver: SessionReceiver) -> None:
        # The secret is this side's choice: a session whose started was lost can be resumed, too.
        self.secret = secrets.token_hex(16)
        self.request = dataclasses.replace(request, secret=self.secret)
        self.id = request.id
        self.receiver = receiver
        # Guarded by the connection's lock.
        self.asked = False  # the request has been sent, perhaps on an earlier connection
        self.farewells = 0  # how many were said before it
        # The receiving thread's alone.
        self.started: Started | None = None
        self.received = 0  # bytes of output
        self.lost_at = -1  # the offset of the last loss
        self.resuming = False  # and not known yet whether the agent has it
        self._lock = threading.Lock()  # guards the attributes below
        self._consumed = 0
        self._acked = 0

    def consume(self, count: int) -> int | None:
        """Note that ``count`` bytes are consumed; the offset to acknowledge, if it is time to."""
        with self._lock:
            self._consumed += count
            if self._consumed - self._acked < DEFAULT_WINDOW_SIZE // 4:
                return None
            self._acked = self._consumed
            return self._acked

    def resumption(self, connection: int) -> Resume:
        """The message that takes the session over to the n-th connection."""
        with self._lock:
            self._acked = self._consumed
            return Resume(self.id, self.secret, self.received, 0, self._acked, connection)


class _StdinSender:
    """What goes to a version 2 session: keeps what the agent may not have, to send it again. Used as a Channel is."""

    def __init__(self, session_id: str) -> None:
        self.id = session_id
        # Guards the attributes below. Held while something is handed to the
        # channel, which never waits: offsets are to agree with the order there.
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._outbox: Outbox | None = None  # both None while there is no connection that has the session
        self._channel: Channel | None = None
        self._kept: collections.deque[bytes | CloseStdin] = collections.deque()
        self._acked = 0  # offset of the first byte that is kept
        self._end = 0
        self._closed = 0  # how many CloseStdin are kept no longer
        self._controls: collections.deque[Signal | Resize | End] = collections.deque()  # that are kept
        self._numbers = itertools.count(1)
        self._dead = False

    def wait_for_room(self) -> bool:
        with self._lock:
            self._room.wait_for(lambda: self._dead or self._end - self._acked < DEFAULT_WINDOW_SIZE)
            return not self._dead

    def put(self, stream: Stream, data: bytes) -> None:
        with self._lock:
            if self._dead:
                return
            self._kept.append(data)
            self._end += len(data)
            if self._channel is not None:
                self._channel.put(stream, data)

    def send(self, message: CloseStdin) -> None:
        """End stdin, behind what was put."""
        with self._lock:
            if self._dead:
                return
            self._kept.append(message)
            if self._channel is not None:
                self._channel.send(message)

    def control(self, message: Signal | Resize | End) -> None:
        """Send ahead of stdin."""
        with self._lock:
            if self._dead:
                return
            numbered = dataclasses.replace(message, number=next(self._numbers))
            self._controls.append(numbered)
            if self._outbox is not None:
                self._outbox.send(numbered)

    def acknowledge(self, offset: int, heard: int) -> None:
        with self._lock:
            self._forget(offset, heard)

    def _forget(self, offset: int, heard: int) -> None:
        while self._kept and self._acked < offset:
            first = self._kept.popleft()
            if isinstance(first, CloseStdin):
                self._closed += 1
                continue
            keep = self._acked + len(first) - offset
            if keep > 0:
                self._kept.appendleft(first[-keep:])
            self._acked += len(first) - max(keep, 0)
        while self._controls and self._controls[0].number <= heard:
            self._controls.popleft()
        self._room.notify_all()

    def connect(self, outbox: Outbox, offset: int = 0, closed: int = 0, heard: int = 0) -> None:
        """Go on through ``outbox``. The agent has stdin up to ``offset``, so many ends of it, and messages."""
        with self._lock:
            self._forget(offset, heard)
            while self._closed < closed and self._kept and isinstance(self._kept[0], CloseStdin):
                self._kept.popleft()
                self._closed += 1
            self._outbox = outbox
            for control in self._controls:
                outbox.send(control)
            self._channel = Channel(outbox, self.id, binary=True)
            for item in self._kept:
                if isinstance(item, CloseStdin):
                    self._channel.send(item)
                else:
                    self._channel.put(Stream.STDIN, item)

    def disconnect(self) -> None:
        with self._lock:
            self._outbox = self._channel = None

    def discard(self) -> None:
        """The session has ended: whoever waits for room is let go."""
        with self._lock:
            self._dead = True
            self._kept.clear()
            self._controls.clear()
            self._room.notify_all()


class _DetachReceiver:
    """Waits for a detached command's start."""

    def __init__(self) -> None:
        self._outcome: queue.SimpleQueue[Started | ClientError] = queue.SimpleQueue()

    def detached(self, event: Started) -> None:
        self._outcome.put(event)

    def output(self, event: Output) -> None:
        """It has none here."""

    def tell_consumed(self, consumed: Callable[[int], None]) -> None:
        """It has no output here."""

    def warning(self, error: SessionError) -> None:
        log.warning("the agent reports: %s", error)

    def ended(self, code: int) -> None:
        self._outcome.put(SessionError(f"the command was not detached, and has ended with {code}"))

    def failed(self, error: ClientError) -> None:
        self._outcome.put(error)

    def wait(self) -> Started:
        outcome = self._outcome.get()
        if isinstance(outcome, ClientError):
            raise outcome
        return outcome


class AgentConn:
    """One connection to an agent, with any number of sessions on it at once.

    With version 2 of the protocol a connection that is lost costs no session: it
    is made again, for RESUME_PATIENCE seconds at most, and all of them go on. One
    that is lost while nothing runs on it, or with version 1, is made again by whatever
    is started next: one try, whose failure is that start's, and that of all that wait
    for it. What was started is never started a second time.

    Attributes:
        version: of the protocol that the agent speaks here: 2, or 1 for an agent that knows no other.
    """

    _renewable: ClassVar[bool] = True  # whether the next start may dial again

    def __init__(
        self,
        connection: QueuedConnection,
        redial: Callable[[], QueuedConnection] | None = None,
        patience: float = RESUME_PATIENCE,
        *,
        ping_interval: float = PING_INTERVAL,
        ping_timeout: float = PING_TIMEOUT,
    ) -> None:
        """Take over a WebSocket connection after its handshake; see :meth:`dial`.

        Args:
            redial: makes another connection.
            patience: seconds for which that is tried, while sessions of version 2 wait for it.
            ping_interval, ping_timeout: in seconds, see :meth:`dial`.
        """
        self._patience = patience
        self._heartbeat = _heartbeat(ping_interval, ping_timeout)
        self._renewing = threading.Lock()  # held while a connection that was lost is made again, see _renew()
        self._renewals_failed = 0  # how often that has failed, and why the last time; changed with it held
        self._renewal_fault = ""
        self.version = 2 if connection.subprotocol == SUBPROTOCOL else 1
        self._redial = redial
        self._closing = threading.Event()
        self.on_outage: Callable[[bool], None] | None = None
        """Called with True when the connection is lost and is to be made again, with False when it is, be it by a
        start after that was given up."""
        self._outage = False  # what it was called with last; the receiving thread's
        self.on_health: Callable[[dict[str, Any]], None] | None = None
        """Called when the health check's verdict changes, with what health() returns. Like on_outage, it is
        called from the receiving thread, and must not block."""
        self._pause = 0.0  # seconds before the next dial; this and _until are the receiving thread's
        self._until = 0.0  # when that is given up, on the monotonic clock; 0 if the last connection brought something
        self._connection = connection  # replaced by the receiving thread, with _lock held
        self._online = True  # guarded by _lock, as all of these
        self._over = False  # it will not be made again
        self._connections = 1  # how many there were
        self._held: list[Request] = []  # to be sent once there is a connection again
        # For sessions that are over here. The last ones may not have come; the start of a
        # session that was asked for after them shows that they have.
        self._farewells: collections.deque[End] = collections.deque()
        self._farewells_said = 0
        self._flows: dict[str, _ClientFlow] = {}
        self._senders: dict[str, _StdinSender] = {}
        self._calls: dict[str, tuple[Call, queue.SimpleQueue[Answer | ClientError]]] = {}
        self._ids = map("{}-{}".format, itertools.repeat(secrets.token_hex(4)), itertools.count(1))
        self._lock = threading.Lock()  # guards the attributes below
        self._receivers: dict[str, SessionReceiver] = {}
        self._followers: set[Callable[[], None]] = set()  # called when the agent's lifetime expires
        self._claimed: set[str] = set()  # ids of callers, see claiming()
        self._lost: ConnectionLost | None = None
        self.lifetime_expired = threading.Event()
        """Set when the agent has said that its platform is about to end it."""
        self._attend(connection)
        self._thread = threading.Thread(target=self._receive, name="agent-client", daemon=True)
        self._start_receiving()

    @classmethod
    def dial(
        cls,
        addr: str = DEFAULT_ADDRESS,
        token: str | None = None,
        *,
        tls: ssl.SSLContext | None = None,
        timeout: float = OPEN_TIMEOUT,
        patience: float = RESUME_PATIENCE,
        ping_interval: float = PING_INTERVAL,
        ping_timeout: float = PING_TIMEOUT,
    ) -> AgentConn:
        """Connect to an agent in server mode.

        Args:
            addr: ``host:port``, ``unix:/path``, or a ``ws://`` or ``wss://`` URL.
            token: the bearer token, if the agent has one.
            tls: what to trust and to show, see :func:`make_client_tls`; ``host:port`` is dialled with TLS then.
                Without it a ``wss://`` URL's server must have a certificate that the system trusts.
            timeout: seconds for the connection and the handshake.
            patience: seconds for which a lost connection is made again, if sessions run on it and the agent
                speaks version 2; 0 for not at all. The agent keeps them for its ``--resume-window``.
            ping_interval: seconds between two pings; a third of ``ping_timeout`` if that is less.
            ping_timeout: seconds in which nothing is heard of the agent, at the TCP level either, after which it
                counts as gone, and the connection as lost. With ``patience`` that is how long a start can take
                to fail when the agent's machine has vanished.

        Raises:
            Unauthorized: if the agent refuses the token.
            ConnectFailed: if there is no agent, or it does not answer.
            ValueError: if ``addr`` is none, or a time is not positive.
        """
        if ping_interval <= 0 or ping_timeout <= 0:
            raise ValueError("ping_interval and ping_timeout must be more than 0 s")
        return cls(
            _dial(addr, token, timeout, tls),
            lambda: _dial(addr, token, timeout, tls),
            patience,
            ping_interval=ping_interval,
            ping_timeout=ping_timeout,
        )

    def close(self) -> None:
        """Close the connection. Commands that run on it are ended."""
        with self._lock:
            self._closing.set()  # with the lock held: a connection that is just made again is closed, too
            connection = self._connection
        for flow in self._live_flows():
            self._say_farewell(flow)  # nobody will resume it
        here = threading.current_thread()
        if here is connection.recv_events_thread:  # in a callback: who receives cannot wait for the answer
            _pool.submit(connection.close)
            return
        connection.close()
        if here is not self._thread:  # as it may be in a callback
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Commands.

    def popen(
        self,
        cmd: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        tty: bool = False,
        size: tuple[int, int] | None = None,
        stdin: int = subprocess.PIPE,
        text: bool = False,
        encoding: str | None = None,
        errors: str | None = None,
        user: str = "",
    ) -> AgentProcess:
        """Start a command, as subprocess.Popen does.

        A command that cannot be started shows when its output is read or its end
        is waited for: version 1 of the protocol does not announce a start.

        Args:
            cmd: the command and its arguments; a plain string is a command without any.
            env: variables that are added to the agent's own.
            cwd: the working directory.
            tty: run it on a terminal; all its output is then ``stdout``.
            size: the terminal's columns and rows.
            stdin: PIPE, or DEVNULL for an input that ends at once.
            text, encoding, errors: as for subprocess.Popen.
            user: ``name``, ``uid``, ``name:group`` or ``uid:gid``; version 2 only.

        Raises:
            ConnectionLost: if the connection has ended.
            SessionError: for ``user``, if the agent speaks version 1 only.
        """
        request = self._make_exec(cmd, env, cwd, tty, size, stdin, user)
        process = AgentProcess(self, request, text=text, encoding=encoding, errors=errors)
        self.start_session(request, process.receiver)
        if size is not None and self.version == 1:
            process.resize(*size)
        if stdin == subprocess.DEVNULL:
            process.stdin.close()
        return process

    def _make_exec(
        self,
        cmd: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
        env: Mapping[str, str] | None,
        cwd: str | os.PathLike[str] | None,
        tty: bool,
        size: tuple[int, int] | None,
        stdin: int,
        user: str,
    ) -> Exec:
        """The request that popen's arguments mean."""
        words = (os.fspath(cmd),) if isinstance(cmd, str | os.PathLike) else tuple(os.fspath(word) for word in cmd)
        variables = tuple(f"{name}={value}" for name, value in (env or {}).items())
        request = Exec(self.new_id(), words, variables, os.fspath(cwd or ""), tty)
        if self.version == 1:
            if user:
                raise SessionError("the agent speaks version 1 of the protocol, which starts nothing as another user")
            return request
        width, height = size or (0, 0)
        empty = stdin == subprocess.DEVNULL
        return dataclasses.replace(request, user=user, width=width, height=height, no_stdin=empty)

    def start_detached(
        self,
        cmd: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        tty: bool = False,
        size: tuple[int, int] | None = None,
        stdin: int = subprocess.DEVNULL,
        user: str = "",
    ) -> Started:
        """Start a command that lives on without this connection, and wait until it has started.

        Attach to it with ``attach(session_id=started.id)``, from any connection,
        also after its end. The arguments are popen's; with ``stdin=PIPE`` it reads
        what those who attach write, and waits for that.

        Raises:
            CommandNotFound, CommandNotExecutable, SessionError: if it cannot be started.
            ConnectionLost: if the connection ends first.
        """
        self._need_version_2("detaches no command")
        self._renew()
        request = dataclasses.replace(self._make_exec(cmd, env, cwd, tty, size, stdin, user), detach=True)
        receiver = _DetachReceiver()
        self.start_session(request, receiver)
        return receiver.wait()

    def attach(
        self,
        session_id: str = "",
        *,
        replay: bool = True,
        text: bool = False,
        encoding: str | None = None,
        errors: str | None = None,
    ) -> AgentProcess:
        """Attach to the main process: its recent output first, then what it writes.

        Args:
            session_id: a detached command's, instead; version 2 only.
            replay: False for no output from before; version 2 only.

        Raises:
            ConnectionLost: if the connection has ended.
            SessionError: if the agent speaks version 1 only, and would have to do more.
        """
        if session_id or not replay:
            self._need_version_2("attaches to the main process alone, with its replay")
        request = Attach(self.new_id(), session=session_id, no_replay=not replay)
        process = AgentProcess(self, request, text=text, encoding=encoding, errors=errors)
        self.start_session(request, process.receiver)
        return process

    def _need_version_2(self, what: str) -> None:
        if self.version == 1:
            raise SessionError(f"the agent speaks version 1 of the protocol, which {what}")

    # Archives.

    def stat_path(self, path: str, timeout: float = OPEN_TIMEOUT) -> dict[str, Any]:
        """What is at ``path`` in the container, see :func:`agent.stat_path`.

        Raises:
            SessionError: with reason ``no_such_path``, if there is nothing.
            ConnectionLost: if the connection has ended, or the agent does not answer.
        """
        answer = self._ask(ArchiveStat(self.new_id(), path), timeout)
        assert isinstance(answer, PathStat)
        return answer.stat

    def archive_get(self, path: str) -> AgentProcess:
        """Read the file or tree at ``path`` as a tar archive, from ``stdout``; wait() is 0 when that was all of it.

        Raises:
            SessionError: if the agent speaks version 1 only. What else is wrong, reading and wait() raise,
                with reason ``no_such_path`` or ``archive_failed``.
            ConnectionLost: if the connection has ended.
        """
        return self._start_archive(ArchiveGet(self.new_id(), path))

    def archive_put(
        self, path: str, *, no_overwrite_dir_non_dir: bool = False, no_owners: bool = False
    ) -> AgentProcess:
        """Unpack a tar archive into the directory ``path``: write it to ``stdin``, close that, and wait().

        Args:
            no_overwrite_dir_non_dir, no_owners: see :class:`agent.ArchivePut`.

        Raises:
            SessionError: if the agent speaks version 1 only. What else is wrong, wait() raises, with reason
                ``no_such_path``, ``not_a_directory`` or ``archive_failed``.
            ConnectionLost: if the connection has ended.
        """
        request = ArchivePut(
            self.new_id(), path, no_overwrite_dir_non_dir=no_overwrite_dir_non_dir, no_owners=no_owners
        )
        return self._start_archive(request)

    def _start_archive(self, request: ArchiveGet | ArchivePut) -> AgentProcess:
        self._need_version_2("has no archives")
        process = AgentProcess(self, request)
        self.start_session(request, process.receiver)
        return process

    def run(
        self,
        cmd: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
        *,
        input: bytes | str | None = None,
        capture_output: bool = False,
        text: bool = False,
        encoding: str | None = None,
        errors: str | None = None,
        timeout: float | None = None,
        check: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        tty: bool = False,
    ) -> subprocess.CompletedProcess[Any]:
        """Run a command and wait for it, as subprocess.run does.

        Without ``input`` the command's stdin ends at once. Without
        ``capture_output`` its output is written to this process's stdout and stderr.

        Raises:
            CommandNotFound, CommandNotExecutable, SessionError: if it cannot be started.
            ConnectionLost: if the connection ends first; never an exit code then.
            subprocess.TimeoutExpired: after ``timeout`` seconds; the command is killed.
            subprocess.CalledProcessError: with ``check``, if the exit code is not 0.
        """
        process = self.popen(
            cmd, env=env, cwd=cwd, tty=tty, text=text or isinstance(input, str), encoding=encoding, errors=errors
        )
        copiers = [] if capture_output else process._copy_output()
        try:
            stdout, stderr = process.communicate(input, timeout, collect=capture_output)
        except subprocess.TimeoutExpired:
            process.kill()
            process._settle()
            raise
        for copier in copiers:
            copier.wait()
        if process.warnings:  # its input was cut short, for one
            raise process.warnings[0]
        assert process.returncode is not None
        result = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
        if check:
            result.check_returncode()
        return result

    # Bridges to a Docker client.

    def bridge_exec(
        self,
        sock: socket.socket,
        session_id: str,
        cmd: Sequence[str],
        env: Sequence[str] = (),
        workdir: str = "",
        tty: bool = False,
    ) -> int:
        """Run a command with a Docker client's socket as its stdin, stdout and stderr.

        Speaks Docker's multiplexed stream without ``tty``, raw bytes with it. A
        half-closed socket ends the command's stdin; a vanished client ends the command.
        The socket stays open.

        Args:
            env: ``K=V`` strings.

        Returns:
            The command's exit code; 127 if it is not found, 126 if it cannot be executed.

        Raises:
            SessionError: if it cannot be started for another reason.
            ConnectionLost: if the connection to the agent ends first.
        """
        request = Exec(session_id, tuple(cmd), tuple(env), workdir, tty)
        return _Bridge(self, sock, request, tty).run()

    def bridge_attach(self, sock: socket.socket, session_id: str, tty: bool = False) -> int:
        """Attach a Docker client's socket to the main process; as :meth:`bridge_exec`.

        A client that vanishes ends the main process's stdin, no more.
        """
        return _Bridge(self, sock, Attach(session_id), tty).run()

    # What sessions use.

    def start_session(self, request: Opening, receiver: SessionReceiver) -> None:
        """Send a request whose events go to ``receiver``.

        Raises:
            ConnectionLost: if the connection has ended.
            SessionError: if the id is in use on this connection.
        """
        with self._lock:
            if self._lost is not None:
                self._senders.pop(request.id, None)
                raise ConnectionLost(str(self._lost))
            if request.id in self._receivers:
                raise SessionError(f"session id {request.id!r} is in use", Reason.DUPLICATE_SESSION)
            self._receivers[request.id] = receiver
            if self.version == 2:
                flow = self._flows[request.id] = _ClientFlow(request, receiver)
                receiver.tell_consumed(lambda count: self._consume(flow, count))
                if self._online:  # with the lock held: no other connection comes in between
                    self._ask_for(flow)
        if self.version == 1:
            self.send(request)

    def _ask_for(self, flow: _ClientFlow) -> None:
        """Start a session, or go on with it, on the connection that there is. Holds the lock."""
        outbox, sender = self._connection.outbox, self._senders.get(flow.id)
        flow.resuming = flow.asked
        if flow.started is not None:
            outbox.send(flow.resumption(self._connections))
            return
        flow.farewells = self._farewells_said
        outbox.send(dataclasses.replace(flow.request, connection=self._connections))
        if not flow.asked and sender is not None:  # else it is to be seen what the agent has
            sender.connect(outbox)
        flow.asked = True

    def _say_farewell(self, flow: _ClientFlow) -> None:
        """The session is over here: the agent need keep it no longer."""
        with self._lock:
            farewell = End(flow.id, secret=flow.secret)
            self._farewells.append(farewell)
            self._farewells_said += 1
            if self._online:
                self._connection.outbox.send(farewell)

    def _confirm_farewells(self, count: int) -> None:
        """The first ``count`` have come."""
        with self._lock:
            while self._farewells and self._farewells_said - len(self._farewells) < count:
                self._farewells.popleft()

    def _consume(self, flow: _ClientFlow, count: int) -> None:
        offset = flow.consume(count)
        if offset is not None:
            with self._lock:
                outbox = self._connection.outbox if self._online else None
            if outbox is not None:  # else the resume says what has been received
                outbox.send(Ack(flow.id, offset))

    def started(self, session_id: str) -> Started | None:
        """What the agent has said of a session's start; None before that, after its end, and in version 1."""
        with self._lock:
            flow = self._flows.get(session_id)
        return flow.started if flow is not None else None

    def _live_flows(self) -> list[_ClientFlow]:
        with self._lock:
            return list(self._flows.values())

    def sessions(self, timeout: float = OPEN_TIMEOUT) -> list[dict[str, Any]]:
        """What runs in the container, see :meth:`agent.SessionRegistry.describe_sessions`.

        Raises:
            SessionError: if the agent speaks version 1 only.
            ConnectionLost: if the connection has ended, or the agent does not answer.
        """
        answer = self._ask(ListSessions(self.new_id()), timeout)
        assert isinstance(answer, Sessions)
        return list(answer.sessions)

    def stats(self, processes: bool = False, timeout: float = OPEN_TIMEOUT) -> dict[str, Any]:
        """CPU, memory and I/O of the container, and in ``sessions`` of each session's tree, see :func:`agent.measure`.

        Raises:
            SessionError: if the agent speaks version 1 only, or has no psutil (reason ``unavailable``).
            ConnectionLost: if the connection has ended, or the agent does not answer.
        """
        answer = self._ask(GetStats(self.new_id(), processes), timeout)
        assert isinstance(answer, Stats)
        return answer.stats

    def health(self, timeout: float = OPEN_TIMEOUT) -> dict[str, Any]:
        """What the agent's ``GET /health`` answers, also of an agent that has none, in reverse mode.

        Raises:
            SessionError: if the agent speaks version 1 only.
            ConnectionLost: if the connection has ended, or the agent does not answer.
        """
        answer = self._ask(GetHealth(self.new_id()), timeout)
        assert isinstance(answer, Health)
        return answer.state

    def _ask(self, call: Call, timeout: float) -> Answer:
        self._need_version_2("has no such question")
        self._renew()
        answers: queue.SimpleQueue[Answer | ClientError] = queue.SimpleQueue()
        with self._lock:
            if self._lost is not None:
                raise ConnectionLost(str(self._lost))
            self._calls[call.id] = (call, answers)
        self.send(call)
        try:
            answer = answers.get(timeout=timeout)
        except queue.Empty:
            raise ConnectionLost(f"the agent did not answer within {timeout:g} s") from None
        finally:
            with self._lock:
                self._calls.pop(call.id, None)
        if isinstance(answer, ClientError):
            raise answer
        return answer

    def _answered(self, call_id: str, answer: Answer | ClientError) -> bool:
        """Hand an answer to who has asked; False if nobody has."""
        with self._lock:
            call = self._calls.get(call_id)
        if call is not None:
            call[1].put(answer)
        return call is not None

    def end_session(self, session_id: str, exit_follows: bool) -> None:
        """End a session as the loss of its connection would: a command's whole tree, an attachment, an archive.

        A deployed Go agent does not know the request; there a command's process
        group gets SIGHUP, and SIGKILL after END_GRACE seconds.
        """
        if not exit_follows and self.version == 2:
            with self._lock:
                flow = self._flows.get(session_id)
            if flow is not None:
                self._forget(session_id)
                self._say_farewell(flow)
            return
        self.send(End(session_id))
        if not exit_follows:
            self._forget(session_id)
            return
        if self.version == 2:
            return
        self.send(Signal(session_id, "HUP"))
        killing = threading.Timer(END_GRACE, self._kill_if_there, (session_id,))
        killing.daemon = True
        killing.start()

    def _kill_if_there(self, session_id: str) -> None:
        with self._lock:
            there = session_id in self._receivers
        if there:
            self.send(Signal(session_id, "KILL"))

    def new_id(self) -> str:
        """A session id that nobody else on this connection has."""
        return next(self._ids)

    @contextlib.contextmanager
    def claiming(self, session_id: str) -> Iterator[None]:
        """Hold an id that a caller has chosen. Raises SessionError if another session has it."""
        with self._lock:
            if session_id in self._claimed:
                raise SessionError(f"session id {session_id!r} is in use", Reason.DUPLICATE_SESSION)
            self._claimed.add(session_id)
        try:
            yield
        finally:
            with self._lock:
                self._claimed.discard(session_id)

    def open_channel(self, session_id: str) -> Channel | _StdinSender:
        """Where a session's stdin goes, which is to be started next. Raises ConnectionLost, see _renew()."""
        self._renew()
        with self._lock:
            if self.version == 1:
                return Channel(self._connection.outbox, session_id)
            sender = self._senders[session_id] = _StdinSender(session_id)  # connected as the session is asked for
            return sender

    def send(self, message: Request) -> None:
        """Send a message; dropped if the connection has ended for good, as every session then is told."""
        if self.version == 2 and isinstance(message, Signal | Resize | End):
            with self._lock:
                sender = self._senders.get(message.id)
            if sender is not None:
                sender.control(message)
            return
        with self._lock:
            if not self._online:
                self._held.append(message)
                return
            outbox = self._connection.outbox
        outbox.send(message)

    def _renew(self) -> None:
        """Make a connection that was lost again, for something that has not begun: one try.

        What ran on it has been told of the loss by then, and stays lost. The caller's thread dials; it gives the
        connection to a receiving thread of its own, once the one before has ended.

        Raises:
            ConnectionLost: if that fails.
        """
        if not self._over or not self._renewable or self._redial is None or not self._patience:
            return
        if threading.current_thread() is self._thread:  # in a callback, which tells of the loss
            return
        failures = self._renewals_failed
        with self._renewing:
            if not self._over or self._closing.is_set():  # another caller was faster
                return
            if self._renewals_failed != failures:  # and failed: who has waited for that need not wait as long again
                raise ConnectionLost(self._renewal_fault)
            try:
                self._renew_now()
            except ConnectFailed as exc:
                self._renewals_failed += 1
                self._renewal_fault = f"{self._lost}; it cannot be made again: {exc}"
                raise ConnectionLost(self._renewal_fault) from exc

    def _renew_now(self) -> None:
        """See _renew(). Raises ConnectFailed."""
        assert self._redial is not None
        before = self._thread
        before.join()
        connection = self._redial()
        if (2 if connection.subprotocol == SUBPROTOCOL else 1) != self.version:
            connection.close()
            raise ConnectFailed("the agent speaks another version of the protocol now")
        self._attend(connection)
        with self._lock:
            self._connection = connection
            self._pause = self._until = 0.0  # if this one is lost, that has its own time
            self._thread = threading.Thread(target=self._receive, name="agent-client", daemon=True)
            try:
                self._start_receiving()  # it waits for the lock before it does anything but receive
            except ConnectFailed:
                self._thread = before
                raise
            self._connections += 1
            self._held.clear()
            self._lost, self._over, self._online = None, False, True
            self.lifetime_expired.clear()  # the agent says so again
            closing = self._closing.is_set()
            for farewell in self._farewells:
                connection.outbox.send(farewell)
        if closing:  # close() knew of the one before only
            connection.close()

    def _receive(self) -> None:
        """Hand events to their sessions until the connection ends, and is not to be had again."""
        if self._outage:  # it was given up, see _renew()
            self._tell_outage(False)
        why = self._receive_until_lost()
        self._link_lost()
        while self._make_again():
            why = self._receive_until_lost()
            self._link_lost()
        with self._lock:
            self._over = True  # before what has arrived is turned away: nothing arrives later
        self._before_loss()
        with self._lock:
            self._lost = ConnectionLost(why)
            receivers = list(self._receivers.values())
            senders = list(self._senders.values())
            calls = list(self._calls.values())
            for kept in (self._receivers, self._flows, self._senders):
                kept.clear()
        for sender in senders:
            sender.discard()
        for _, answers in calls:
            answers.put(ConnectionLost(why))
        for receiver in receivers:
            receiver.failed(ConnectionLost(why))

    def _make_again(self) -> bool:
        """Version 2: connect again, and resume what runs; False if that is not to be."""
        if self.version == 1 or self._redial is None or not self._patience:
            return False
        with self._lock:
            if self._closing.is_set() or not (self._flows or self._calls):
                self._over = True
                return False
            self._online = False
            senders = list(self._senders.values())
        for sender in senders:
            sender.disconnect()
        self._tell_outage(True)
        self._until = self._until or time.monotonic() + self._patience
        while time.monotonic() < self._until and not self._closing.wait(self._pause):
            # Zero again as soon as a connection brings something: one that always breaks off is given up, too.
            self._pause = min(max(self._pause * 2, REDIAL_FIRST), REDIAL_LAST)
            try:
                connection = self._redial()
                if connection.subprotocol != SUBPROTOCOL:
                    connection.close()
                    return False
                self._attend(connection)
            except Unauthorized:
                return False
            except ConnectFailed as exc:
                log.debug("not connected again yet: %s", exc)
                continue
            self._take_over(connection)
            self._tell_outage(False)
            return True
        return False

    def _tell_outage(self, lost: bool) -> None:
        self._outage = lost
        if self.on_outage is not None:
            self.on_outage(lost)

    def _attend(self, connection: QueuedConnection) -> None:
        """Start what a new connection needs beside its receiver.

        Raises:
            ConnectFailed: if the system refuses a thread; it is closed then.
        """
        try:
            connection.start_writer(_pool)
            self._heartbeat.add(connection)
        except RuntimeError as exc:
            _abandon(connection)
            raise ConnectFailed(str(exc)) from exc

    def _start_receiving(self) -> None:
        """Start the receiving thread; raises ConnectFailed as _attend() does."""
        try:
            self._thread.start()
        except RuntimeError as exc:
            self._heartbeat.remove(self._connection)
            _abandon(self._connection)
            raise ConnectFailed(str(exc)) from exc

    def _take_over(self, connection: QueuedConnection) -> None:
        gone = []
        with self._lock:
            same_agent = _instance(connection) == _instance(self._connection)
            self._connection = connection
            self.lifetime_expired.clear()  # the agent says so again
            self._connections += 1
            closing = self._closing.is_set()
            for farewell in self._farewells:
                connection.outbox.send(farewell)
            for flow in self._flows.values():
                if same_agent or not flow.asked:
                    self._ask_for(flow)
                else:
                    gone.append(flow)
            held, self._held = self._held, []
            for message in held:
                if not isinstance(message, Call):
                    connection.outbox.send(message)
            for call, _ in self._calls.values():  # the answer may have been lost: ask again
                connection.outbox.send(call)
            self._online = True
        for flow in gone:
            self._forget(flow.id)
            flow.receiver.failed(ConnectionLost("session lost: the agent was started anew"))
        if closing:  # close() knew of the one before only
            connection.close()

    def _forget(self, session_id: str) -> None:
        with self._lock:
            self._receivers.pop(session_id, None)
            self._flows.pop(session_id, None)
            sender = self._senders.pop(session_id, None)
        if sender is not None:
            sender.discard()

    def _receive_until_lost(self) -> str:
        """Hand events to their sessions until the connection ends; says why it did."""
        why = "the connection was closed"
        try:
            self._connection.serve_messages(self._dispatch)
        except ConnectionClosed as exc:
            why = f"the connection to the agent was lost: {exc}"
            if exc.__cause__ is not None:
                why += f" ({exc.__cause__})"
        except Exception as exc:
            log.exception("unexpected error")
            why = f"unexpected error: {exc}"
            self._connection.close_socket()
        finally:
            self._heartbeat.remove(self._connection)
        return why

    def _dispatch(self, message: str | bytes) -> None:
        self._pause = self._until = 0.0
        try:
            if isinstance(message, str):
                event = decode_event(message, self.version)
            else:
                self._dispatch_data(message)
                return
        except MessageError as exc:
            log.warning("the agent sent nonsense: %s", exc)
            return
        if event is None or self._pass_on(event):
            return
        if isinstance(event, LifetimeExpired):
            self._expire()
        elif isinstance(event, Output | Exit | Error):
            self._deliver(event)
        elif isinstance(event, Answer):
            if not self._answered(event.id, event) and isinstance(event, Health) and self.on_health is not None:
                self.on_health(event.state)
        else:
            self._control(event)

    def _dispatch_data(self, message: bytes) -> None:
        stream, session_id, data = decode_data_frame(message)
        flow = self._flows.get(session_id)  # changed by others only before it starts and after it ends
        if flow is not None:
            flow.received += len(data)
            flow.receiver.output(Output(session_id, stream, bytes(data)))
        else:
            self._pass_on_data(stream, session_id, bytes(data))

    def _control(self, event: Started | Ack | Resumed | Lost) -> None:
        with self._lock:
            flow = self._flows.get(event.id)
            sender = self._senders.get(event.id)
        if isinstance(event, Ack):
            if sender is not None:
                sender.acknowledge(event.offset, event.heard)
        elif flow is None:
            return
        elif isinstance(event, Started):
            flow.started = event
            flow.secret = event.secret or flow.secret
            self._confirm_farewells(flow.farewells)
            if isinstance(flow.receiver, StartReceiver):
                flow.receiver.started(event)
            if isinstance(flow.receiver, _DetachReceiver):
                self._forget(event.id)
                flow.receiver.detached(event)
            elif flow.resuming:  # the agent had not had the request before
                flow.resuming = False
                if sender is not None:
                    sender.connect(self._connection.outbox)
        elif isinstance(event, Lost):
            if event.offset > flow.lost_at:  # a resumed session may say it again
                flow.lost_at = event.offset
                flow.receiver.output(Output(event.id, Stream.STDERR, b"", event.bytes))
        else:
            flow.resuming = False
            if sender is not None:
                sender.connect(self._connection.outbox, event.stdin, event.closed, event.heard)

    def _expire(self) -> None:
        self.lifetime_expired.set()
        with self._lock:
            followers = list(self._followers)
        for follower in followers:
            follower()

    def _link_lost(self) -> None:
        """The connection has ended; another one may be made."""

    def _before_loss(self) -> None:
        """The connection has ended for good, and no session has been told yet."""

    def _pass_on(self, event: Event) -> bool:
        """Hand an event to who is behind this side; False if it is for nobody there."""
        return False

    def _pass_on_data(self, stream: Stream, session_id: str, data: bytes) -> None:
        """As :meth:`_pass_on`, for the data frames of version 2."""

    def _deliver(self, event: Output | Exit | Error) -> None:
        if isinstance(event, Error) and self._answered(event.id, _session_error(event)):
            return
        final = isinstance(event, Exit) or (isinstance(event, Error) and event.reason not in _NOT_FATAL)
        with self._lock:
            receiver = self._receivers.get(event.id)
            flow = self._flows.get(event.id)
        if isinstance(event, Error) and event.reason == Reason.UNKNOWN_SESSION and flow is not None and flow.resuming:
            self._forget(event.id)
            flow.receiver.failed(ConnectionLost(f"session lost: {event.message}"))
            return
        if final and receiver is not None:
            self._forget(event.id)
            if flow is not None:
                self._say_farewell(flow)
        if receiver is None:
            if isinstance(event, Error):
                log.warning("the agent reports: %s", event.message)
        elif isinstance(event, Output):
            receiver.output(event)
        elif isinstance(event, Exit):
            receiver.ended(event.code)
        elif final:
            receiver.failed(_session_error(event))
        else:
            receiver.warning(_session_error(event))


def _abandon(connection: QueuedConnection) -> None:
    """Close a connection that was just made, and that nobody serves.

    Its receiver ends first: it may be about to read, and the number of a closed descriptor is the next connection's,
    whose answer it would take.
    """
    with contextlib.suppress(OSError):  # closed already
        connection.socket.shutdown(socket.SHUT_RDWR)
    connection.recv_events_thread.join(CLOSE_TIMEOUT)
    connection.close_socket()


def _instance(connection: QueuedConnection) -> str:
    """Which agent it is, "" if that has not said so: another than before has none of its sessions."""
    head = connection.response if isinstance(connection, DialledWebSocket) else connection.request
    return head.headers.get(INSTANCE_HEADER, "") if head is not None else ""


def _dial(addr: str, token: str | None, timeout: float, tls: ssl.SSLContext | None) -> DialledWebSocket:
    headers = {"Authorization": f"Bearer {token}"} if token else None
    options: dict[str, Any] = {
        "create_connection": DialledWebSocket,
        "additional_headers": headers,
        "compression": None,
        "open_timeout": timeout,
        "close_timeout": CLOSE_TIMEOUT,
        "ping_interval": None,  # Heartbeat pings
        "max_size": MAX_MESSAGE_SIZE,
        "subprotocols": [SUBPROTOCOL],
    }
    where, url, options["proxy"] = _locate(addr, tls is not None)
    if url.startswith("wss:"):
        options["ssl"] = tls or make_client_tls()
    try:
        made = unix_connect(where, url, **options) if where else connect(url, **options)
        # Entered by hand, since the connection outlives this function; releases
        # from 17.1 on warn of one that is not.
        connection = made.__enter__()
    except InvalidStatus as exc:
        status = exc.response.status_code
        if status == 401:
            fault = "refuses the token" if token else "wants a token, and none was given"
            raise Unauthorized(f"{addr}: the agent {fault}") from None
        said = (exc.response.body or b"")[:200].decode("utf-8", "replace").strip()
        if status == 403:
            raise Unauthorized(f"{addr}: the agent forbids it: {said}") from None
        if status == 404 and "agent" not in said:
            said = "no agent is there; one has /ws"
        raise ConnectFailed(f"{addr}: answered with HTTP status {status}{said and ': '}{said}") from None
    except TimeoutError:
        raise ConnectFailed(f"{addr}: no answer within {timeout:g} s") from None
    # RuntimeError: no thread left; ImportError: a SOCKS proxy, which needs a package that is not here.
    except (OSError, EOFError, WebSocketException, RuntimeError, ImportError) as exc:
        raise ConnectFailed(f"{addr}: {_reason(exc)}") from exc
    assert isinstance(connection, DialledWebSocket)
    return connection


def _reason(exc: BaseException) -> str:
    """Why there is no connection, in words."""
    return explain_tls_failure(exc) or (exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc))


def _locate(addr: str, tls: bool = False) -> tuple[str, str, bool | None]:
    """A unix socket's path or "", the URL, and whether the environment may name a proxy.

    Raises:
        ValueError: if ``addr`` is none, or ``tls`` is wanted where it cannot be.
    """
    if addr.startswith(("ws://", "wss://")):
        parts = urllib.parse.urlsplit(addr)
        if tls and parts.scheme == "ws":
            raise ValueError(f"TLS needs a wss:// URL, not {addr}")
        url = addr if parts.path.strip("/") else parts._replace(path="/ws").geturl()
        return "", url, None if Address(parts.hostname or "").is_local else True
    address = parse_address(addr)
    if address.path:
        if tls:
            raise ValueError(f"no TLS is spoken on a unix socket: {addr}")
        return address.path, "ws://localhost/ws", None
    reachable = Address(address.host or "127.0.0.1", address.port)
    return "", f"{'wss' if tls else 'ws'}://{reachable}/ws", None if reachable.is_local else True


# ══════════════════════════════════════════════════════════════════════════════
# Processes
# ══════════════════════════════════════════════════════════════════════════════


class _OutputStream(io.RawIOBase):
    """The reading end of a session's stdout or stderr.

    The receiving thread feeds it, any thread reads it. It keeps what is not read
    yet. Version 2 of the protocol holds back a session of which a window is not
    read; version 1 cannot without holding back them all: there, the bound is
    UNREAD_LIMIT.
    """

    def __init__(self) -> None:
        super().__init__()
        self.consumed: Callable[[int], None] = lambda count: None  # told of what is read, or dropped
        self._changed = threading.Condition()  # guards the attributes below
        self._chunks: collections.deque[memoryview] = collections.deque()
        self._size = 0
        self._ended = False
        self._error: ClientError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Wait for bytes; 0 at the end. Raises ClientError if the session ended without an exit code."""
        target = memoryview(buffer).cast("B")
        with self._changed:
            self._changed.wait_for(lambda: self._chunks or self._ended)
            if not self._chunks:
                if self._error is not None:
                    raise self._error
                return 0
            count = 0
            while self._chunks and count < len(target):
                chunk = self._chunks.popleft()
                part = min(len(chunk), len(target) - count)
                target[count : count + part] = chunk[:part]
                count += part
                if part < len(chunk):
                    self._chunks.appendleft(chunk[part:])
            self._size -= count
        self.consumed(count)
        return count

    def readall(self) -> bytes:
        """Wait for the end and return the rest; in one piece, where the base class would read 8 KiB at a time."""
        parts: list[memoryview] = []
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._chunks or self._ended)
                if not self._chunks:
                    if self._error is not None and not parts:
                        raise self._error
                    return b"".join(parts)
                count, self._size = self._size, 0
                parts += self._chunks
                self._chunks.clear()
            self.consumed(count)

    def close(self) -> None:
        """Nobody reads on: what is not read yet is dropped, and holds the session back no longer."""
        if not self.closed:
            super().close()
            with self._changed:
                count, self._size = self._size, 0
                self._chunks.clear()
            self.consumed(count)

    def feed(self, data: bytes) -> bool:
        """Take more bytes; False if too many wait already."""
        with self._changed:
            if self._size + len(data) > UNREAD_LIMIT:
                return False
            if data and not self.closed:
                self._chunks.append(memoryview(data))
                self._size += len(data)
                self._changed.notify_all()
                return True
        self.consumed(len(data))
        return True

    def finish(self, error: ClientError | None) -> None:
        with self._changed:
            if not self._ended:
                self._error = error
                self._ended = True
                self._changed.notify_all()


class _InputStream(io.RawIOBase):
    """The writing end of a session's stdin. Any thread may write; a write blocks while the connection is busy."""

    def __init__(self, channel: Channel | _StdinSender, session_id: str) -> None:
        super().__init__()
        self._id = session_id
        self._channel = channel
        self._ended = threading.Event()  # the session has ended: nobody reads any more

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """Send ``data``. Raises BrokenPipeError once the session has ended."""
        if self.closed:
            raise ValueError("write to closed stdin")
        view = memoryview(data).cast("B")
        for start in range(0, len(view), STDIN_CHUNK):
            if not self._channel.wait_for_room() or self._ended.is_set():
                raise BrokenPipeError("the command does not read stdin any more")
            self._channel.put(Stream.STDIN, bytes(view[start : start + STDIN_CHUNK]))
        return len(view)

    def close(self) -> None:
        """End the command's stdin, behind everything written."""
        if not self.closed:
            super().close()
            if not self._ended.is_set():
                self._channel.send(CloseStdin(self._id))

    def finish(self) -> None:
        self._ended.set()


class _ProcessReceiver:
    """Takes a session's events for its AgentProcess; entered by the receiving thread alone."""

    def __init__(self, conn: AgentConn, request: Opening) -> None:
        self.what = "the main process" if isinstance(request, Attach) else "the archive"
        self.stdin = _InputStream(conn.open_channel(request.id), request.id)
        self.stdout = _OutputStream()
        self.stderr = _OutputStream()
        self.finished = threading.Event()
        self.code: int | None = None  # set before finished is
        self.error: ClientError | None = None  # set before finished is
        self.warnings: list[SessionError] = []
        self.lost = 0
        self._conn = conn
        self._id = request.id
        self._exit_follows = isinstance(request, Exec)
        self._ending = False

    def output(self, event: Output) -> None:
        self.lost += event.lost
        target = self.stdout if event.stream is Stream.STDOUT else self.stderr
        if target.closed and not self._ending:
            self._ending = True  # in place of the SIGPIPE that a closed pipe would give
            self._conn.end_session(self._id, self._exit_follows)
        if not target.feed(event.data) and not self.finished.is_set():
            self._conn.end_session(self._id, self._exit_follows)
            fate = "the command was killed" if self._exit_follows else f"this side is detached from {self.what}"
            self.failed(SessionError(f"more than {UNREAD_LIMIT} bytes of output were not read: {fate}"))

    def tell_consumed(self, consumed: Callable[[int], None]) -> None:
        self.stdout.consumed = self.stderr.consumed = consumed

    def warning(self, error: SessionError) -> None:
        self.warnings.append(error)

    def ended(self, code: int) -> None:
        self._finish(code, None)

    def failed(self, error: ClientError) -> None:
        self._finish(None, error)

    def _finish(self, code: int | None, error: ClientError | None) -> None:
        if self.finished.is_set():
            return
        self.code, self.error = code, error
        self.stdin.finish()
        self.stdout.finish(error)
        self.stderr.finish(error)
        self.finished.set()


class _Collector:
    """Reads a stream to its end in a pool thread."""

    def __init__(self, stream: _OutputStream) -> None:
        self._stream = stream
        self._parts: list[bytes] = []  # appended to by that thread alone
        self._done = threading.Event()
        _pool.submit(self._run)

    def _run(self) -> None:
        buffer = bytearray(STDIN_CHUNK)
        try:
            while count := self._stream.readinto(buffer):
                self._parts.append(bytes(memoryview(buffer)[:count]))
        except (ClientError, ValueError):  # wait() raises the session's own; or it was closed
            pass
        finally:
            self._done.set()

    def so_far(self) -> bytes:
        return b"".join(self._parts)

    def wait(self) -> bytes:
        self._done.wait()
        return self.so_far()


class AgentProcess:
    """A command, the main process, or an archive, as subprocess.Popen shows a command.

    Attributes:
        args: the command, else ().
        stdin, stdout, stderr: file objects, binary or text.
    """

    def __init__(
        self,
        conn: AgentConn,
        request: Opening,
        *,
        text: bool = False,
        encoding: str | None = None,
        errors: str | None = None,
    ) -> None:
        self.args: tuple[str, ...] = request.cmd if isinstance(request, Exec) else ()
        self.id = request.id
        self._exit_follows = isinstance(request, Exec)
        self._put = isinstance(request, ArchivePut)
        self.receiver = _ProcessReceiver(conn, request)
        self._conn = conn
        self._collectors: list[_Collector] = []
        self._text = text or encoding is not None or errors is not None
        self.stdin: IO[Any]
        self.stdout: IO[Any]
        self.stderr: IO[Any]
        if self._text:
            names = {"encoding": encoding or "utf-8", "errors": errors}
            self.stdin = io.TextIOWrapper(io.BufferedWriter(self.receiver.stdin), write_through=True, **names)  # type: ignore[arg-type]
            self.stdout = io.TextIOWrapper(io.BufferedReader(self.receiver.stdout), **names)  # type: ignore[arg-type]
            self.stderr = io.TextIOWrapper(io.BufferedReader(self.receiver.stderr), **names)  # type: ignore[arg-type]
        else:
            self.stdin = self.receiver.stdin  # type: ignore[assignment]
            self.stdout = io.BufferedReader(self.receiver.stdout)
            self.stderr = io.BufferedReader(self.receiver.stderr)

    @property
    def returncode(self) -> int | None:
        """The exit code, 128+n when signal n ended it; None while it runs, or if it is not known."""
        return self.receiver.code

    @property
    def lost(self) -> int:
        """Bytes of the main process's output that are missing, because this side fell behind the replay log."""
        return self.receiver.lost

    @property
    def started(self) -> Started | None:
        """Version 2: the command's PID and the session's secret, once the agent has said that it runs."""
        return self._conn.started(self.id)

    @property
    def warnings(self) -> list[SessionError]:
        """What the agent complained about while the session went on."""
        return self.receiver.warnings

    def poll(self) -> int | None:
        """The exit code, None while it runs.

        Raises:
            SessionError: if it could not be started.
            ConnectionLost: if the connection ended first.
        """
        if self.receiver.finished.is_set() and self.receiver.error is not None:
            raise self.receiver.error
        return self.receiver.code

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; all output has arrived then.

        Raises:
            subprocess.TimeoutExpired: after ``timeout`` seconds.
            SessionError, ConnectionLost: as poll().
        """
        if not self.receiver.finished.wait(timeout):
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        code = self.poll()
        assert code is not None
        return code

    def communicate(
        self, input: bytes | str | None = None, timeout: float | None = None, *, collect: bool = True
    ) -> tuple[Any, Any]:
        """Send ``input``, close stdin, wait for the end; returns stdout and stderr.

        Raises:
            As wait(); TimeoutExpired holds what has arrived so far.
        """
        data = self._encode(input)
        if not self.stdin.closed:
            _pool.submit(self._feed, data)
        elif data:
            raise ValueError("stdin is closed: its input has been given before")
        if collect and not self._collectors:
            # Both at once, while the command writes: what is not read holds it back.
            self._collectors = [_Collector(stream) for stream in (self.receiver.stdout, self.receiver.stderr)]
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired as exc:
            assert timeout is not None
            stdout, stderr = (collector.so_far() for collector in self._collectors) if collect else (b"", b"")
            raise subprocess.TimeoutExpired(self.args, timeout, stdout or None, stderr or None) from exc
        if not collect:
            return None, None
        collected = [collector.wait() for collector in self._collectors]
        if not self._text:
            return collected[0], collected[1]
        wrapper = cast(io.TextIOWrapper, self.stdout)
        stdout_text, stderr_text = (
            data.decode(wrapper.encoding, wrapper.errors or "strict").replace("\r\n", "\n").replace("\r", "\n")
            for data in collected
        )
        return stdout_text, stderr_text

    def _encode(self, input: bytes | str | None) -> bytes:
        """The bytes of an input; here and not in another thread, so that the caller sees what is wrong with it."""
        if input is None:
            return b""
        if self._text:
            if not isinstance(input, str):
                raise TypeError(f"input must be str in text mode, not {type(input).__name__}")
            stdin = cast(io.TextIOWrapper, self.stdin)
            return input.encode(stdin.encoding, stdin.errors or "strict")
        return bytes(memoryview(input).cast("B"))  # type: ignore[arg-type]

    def _feed(self, data: bytes) -> None:
        # Nobody reads it any more, as for a pipe; a close may flush, too.
        with contextlib.suppress(BrokenPipeError):
            if data:
                self.receiver.stdin.write(data)
            self.stdin.close()

    def _settle(self) -> None:
        """Wait for the end of a command that was killed."""
        self.receiver.finished.wait(CLOSE_TIMEOUT)

    def _copy_output(self) -> list[threading.Event]:
        """Copy the output to this process's own, in two threads; each event says that one is done."""
        done = []
        for source, target in ((self.receiver.stdout, sys.stdout), (self.receiver.stderr, sys.stderr)):
            event = threading.Event()
            _pool.submit(_copy, source, target, event)
            done.append(event)
        return done

    def send_signal(self, number: int) -> None:
        """Send a signal to the command's process group; harmless once it has ended.

        Raises:
            ValueError: if there is no such signal.
        """
        number = parse_signal(str(int(number)))
        try:
            name = signal.Signals(number).name
        except ValueError:  # a real-time signal
            name = str(number)
        self._conn.send(Signal(self.id, name))

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def resize(self, width: int, height: int) -> None:
        """Set the terminal's columns and rows; harmless once it has ended."""
        self._conn.send(Resize(self.id, width, height))

    def end(self) -> None:
        """End the command with all its descendants: SIGHUP, and SIGKILL after the agent's kill timeout."""
        if self._exit_follows:
            self._conn.end_session(self.id, True)
        else:
            self.detach()

    def detach(self) -> None:
        """Leave the main process alone from now on, or give an archive up; what has arrived can still be read."""
        self._conn.end_session(self.id, False)
        self.receiver.failed(SessionError(f"detached from {self.receiver.what}"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """As subprocess.Popen: close all streams and wait; who writes what nobody reads is ended. Detach from main."""
        waits = self._exit_follows or (self._put and kind is None)
        if not waits:
            self.detach()
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
        self.stdout.close()
        self.stderr.close()
        if waits:
            self.wait()


def _copy(source: _OutputStream, target: IO[str], done: threading.Event) -> None:
    buffer = bytearray(STDIN_CHUNK)
    try:
        while count := source.readinto(buffer):
            raw = getattr(target, "buffer", None)
            if raw is not None:
                target.flush()
                raw.write(memoryview(buffer)[:count])
                raw.flush()
            else:  # something that stands in for sys.stdout and takes text only
                target.write(bytes(buffer[:count]).decode("utf-8", "replace"))
    except (OSError, ValueError, SessionError) as exc:  # wait() raises the session's own
        log.debug("output is no longer copied: %s", exc)
    finally:
        done.set()


# ══════════════════════════════════════════════════════════════════════════════
# Bridges
# ══════════════════════════════════════════════════════════════════════════════


class _EventQueue:
    """A session's events in their order, for one thread that takes them.

    Args:
        limit: bytes of output that may wait.
        on_overflow: called once, when more does, and all output from then on is
            dropped. Without it output() blocks, and with it the receiver: only for
            the one session of a connection.
    """

    def __init__(self, limit: int, on_overflow: Callable[[], None] | None = None) -> None:
        self._consumed: Callable[[int], None] = lambda count: None
        self._limit = limit
        self._on_overflow = on_overflow
        self._dropping = False
        self._changed = threading.Condition()  # guards the attributes below
        self._outputs: collections.deque[tuple[Stream, bytes]] = collections.deque()
        self._size = 0  # bytes in _outputs
        self._ended = False
        self.code: int | None = None
        self.error: ClientError | None = None

    def tell_consumed(self, consumed: Callable[[int], None]) -> None:
        self._consumed = consumed

    def output(self, event: Output) -> None:
        with self._changed:
            if self._on_overflow is None:
                self._changed.wait_for(lambda: self._dropping or self._size < self._limit)
            overflow = self._on_overflow is not None and self._size >= self._limit and not self._dropping
            self._dropping |= overflow
            if not self._dropping:
                self._outputs.append((event.stream, event.data))
                self._size += len(event.data)
                self._changed.notify_all()
            dropped = self._dropping
        if dropped:
            self._consumed(len(event.data))
        if overflow and self._on_overflow is not None:
            self._on_overflow()

    def warning(self, error: SessionError) -> None:
        self.output(Output("", Stream.STDERR, f"{error}\n".encode()))

    def ended(self, code: int) -> None:
        with self._changed:
            self.code, self._ended = code, True
            self._changed.notify_all()

    def failed(self, error: ClientError) -> None:
        with self._changed:
            self.error, self._ended = error, True
            self._changed.notify_all()

    def take(self) -> tuple[Stream, bytes] | None:
        """Wait for the next output; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._outputs or self._ended)
            if not self._outputs:
                return None
            stream, data = self._outputs.popleft()
            self._size -= len(data)
            if self._size < self._limit <= self._size + len(data):
                self._changed.notify_all()
        self._consumed(len(data))
        return stream, data

    def abandon(self) -> None:
        """Nobody takes any more: drop what waits and what comes."""
        with self._changed:
            self._dropping = self._ended = True
            self._outputs.clear()
            self._changed.notify_all()

    def result(self) -> int:
        """The exit code. Raises what the session failed with."""
        if self.error is not None:
            raise self.error
        assert self.code is not None
        return self.code


class _Bridge:
    """One session with a Docker client's socket as its stdin, stdout and stderr.

    The caller's thread sends to the socket, a pool thread receives from it.
    """

    def __init__(self, conn: AgentConn, sock: socket.socket, request: Exec | Attach, tty: bool) -> None:
        self._conn = conn
        self._sock = sock
        self._attached = isinstance(request, Attach)
        self._session_id = request.id  # the caller's, and free again when run() returns
        # On the wire each session has an id of its own: what is late for one never reaches the next.
        self._request = dataclasses.replace(request, id=conn.new_id())
        self._tty = tty
        self._events = _EventQueue(BRIDGE_LIMIT, self._overflowed)
        self._channel = conn.open_channel(self._request.id)
        self._stop_read, self._stop_write = socket.socketpair()
        self._receiver_done = threading.Event()
        self._vanished = threading.Event()

    def run(self) -> int:
        """Carry bytes until the session ends; returns its exit code."""
        with (
            contextlib.closing(self._stop_read),
            contextlib.closing(self._stop_write),
            self._conn.claiming(self._session_id),
        ):
            return self._run()

    def _run(self) -> int:
        self._conn.start_session(self._request, self._events)
        _pool.submit(self._receive)
        try:
            while (item := self._events.take()) is not None:
                self._send(*item)
            return self._events.result()
        except CommandNotFound as exc:
            self._send(Stream.STDERR, f"{exc}\n".encode())
            return 127
        except CommandNotExecutable as exc:
            self._send(Stream.STDERR, f"{exc}\n".encode())
            return 126
        finally:
            self._events.abandon()
            self._channel.discard()
            self._stop_write.close()
            self._receiver_done.wait()

    def _overflowed(self) -> None:
        """The Docker client reads so slowly that what waits would fill the memory: version 1 holds nothing back."""
        self._conn.end_session(self._request.id, not self._attached)
        self._events.failed(
            SessionError(f"more than {BRIDGE_LIMIT} bytes of output were not read: the session was ended")
        )

    def _send(self, stream: Stream, data: bytes) -> None:
        if self._vanished.is_set():
            return
        try:
            self._sock.sendall(data if self._tty else encode_docker_frame(stream, data))
        except OSError:
            self._client_vanished()

    def _receive(self) -> None:
        """Carry the client's bytes to stdin, until either side ends."""
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        poller.register(self._stop_read, select.POLLIN)
        try:
            while True:
                events = dict(poller.poll())
                if self._stop_read.fileno() in events:
                    return
                data = self._sock.recv(STDIN_CHUNK)
                if not data:
                    break
                if self._channel.wait_for_room():
                    self._channel.put(Stream.STDIN, data)
            self._channel.send(CloseStdin(self._request.id))
            self._watch(poller)
        except OSError:
            self._client_vanished()
        finally:
            self._receiver_done.set()

    def _watch(self, poller: select.poll) -> None:
        """After a half-close: a unix socket's peer that closes for good is seen as POLLHUP."""
        poller.modify(self._sock, 0)
        while True:
            events = dict(poller.poll())
            if self._stop_read.fileno() in events:
                return
            if events.get(self._sock.fileno(), 0) & (select.POLLHUP | select.POLLERR):
                self._client_vanished()
                return

    def _client_vanished(self) -> None:
        if self._vanished.is_set():
            return
        self._vanished.set()
        if self._attached:
            self._channel.send(CloseStdin(self._request.id))
            self._events.failed(ConnectionLost("the Docker client has left"))
        self._conn.end_session(self._request.id, not self._attached)


# ══════════════════════════════════════════════════════════════════════════════
# The backend's side of reverse mode: agents dial in
# Threads: the acceptor, and for each agent or client a pool thread from its
# handshake on, beside those of the connection.
# ══════════════════════════════════════════════════════════════════════════════


class ReverseAgentConn(AgentConn):
    """The connection of an agent that dialled in; everything that AgentConn can do.

    Attributes:
        id: what the agent's query named it.
    """

    _renewable = False  # only the agent can dial

    def __init__(
        self,
        ws: QueuedConnection,
        agent_id: str = "",
        on_lifetime_expired: Callable[[ReverseAgentConn], None] | None = None,
        on_closed: Callable[[ReverseAgentConn], None] | None = None,
    ) -> None:
        """Take over ``ws`` after its handshake; serve with ``create_connection=agent.ServerWebSocket``.

        Args:
            on_closed: called when the connection has ended, before any session is told.
        """
        if not isinstance(ws, QueuedConnection):
            raise TypeError(
                "ws must be an agent.ServerWebSocket: pass create_connection=agent.ServerWebSocket to serve()"
            )
        self.id = agent_id
        self._on_lifetime_expired = on_lifetime_expired
        self._on_closed = on_closed
        self._gone = threading.Event()
        self._arrivals: queue.SimpleQueue[QueuedConnection | None] = queue.SimpleQueue()  # None: closed
        self._routes_lock = threading.Lock()  # guards the next two; held for no call but a dictionary's
        self._routes: dict[str, _PassThrough] = {}  # who has a session or call that is not this side's own
        self._clients: set[_PassThrough] = set()
        super().__init__(ws, self._next_arrival)

    # Going on when the agent has dialled again.

    def adopt(self, connection: QueuedConnection) -> bool:
        """Go on, on the connection that this agent has dialled again; False if there is nothing to go on with.

        In version 2, this object and what runs on it live on when the agent's
        connection is lost, for RESUME_PATIENCE seconds at most.
        """
        with self._lock:
            if connection.subprotocol != SUBPROTOCOL or self.version == 1:
                return False
            if _instance(connection) != _instance(self._connection):  # another agent, which knows nothing of it
                return False
            if self._over or self._lost is not None or not (self._flows or self._calls):
                return False
            self._arrivals.put(connection)
            before = self._connection
        before.close_socket()  # the agent has left it, whether that is known here or not
        return True

    def _next_arrival(self) -> QueuedConnection:
        with contextlib.suppress(queue.Empty):
            arrival = self._arrivals.get(timeout=1.0)
            if arrival is not None:
                return arrival
        raise ConnectFailed("the agent has not dialled again yet")

    def close(self) -> None:
        self._closing.set()
        self._arrivals.put(None)
        super().close()

    def give_way(self) -> None:
        """Another connection has taken this one's place: do not wait for the agent to dial again."""
        self._closing.set()
        self._arrivals.put(None)
        self._connection.close(CloseCode.GOING_AWAY, "replaced by another connection")

    # Clients behind this side, see _PassThrough.

    def add_client(self, client: _PassThrough) -> None:
        with self._routes_lock:
            self._clients.add(client)

    def remove_client(self, client: _PassThrough) -> None:
        with self._routes_lock:
            self._clients.discard(client)

    def claim_route(self, session_id: str, client: _PassThrough) -> _PassThrough | None:
        """Give the events of a session to ``client``; returns who else has it, and then does nothing.

        Raises:
            SessionError: if the session is this side's own.
        """
        with self._lock:
            if session_id in self._receivers or session_id in self._calls:
                text = f"session id {session_id!r} is in use"
                raise SessionError(text, Reason.DUPLICATE_SESSION, session_id)
        with self._routes_lock:
            owner = self._routes.setdefault(session_id, client)
            return owner if owner is not client else None

    def release_route(self, session_id: str, client: _PassThrough) -> None:
        with self._routes_lock:
            if self._routes.get(session_id) is client:
                del self._routes[session_id]

    def current_link(self) -> QueuedConnection | None:
        """The agent's connection, None while there is none."""
        with self._lock:
            return self._connection if self._online and not self._over and self._lost is None else None

    def _pass_on(self, event: Event) -> bool:
        event_id = getattr(event, "id", "")
        owner = self._routes.get(event_id) if event_id else None
        if owner is not None:
            owner.event(event)
            return True
        if isinstance(event, Health) and not event_id:
            with self._routes_lock:
                clients = list(self._clients)
            for client in clients:
                client.event(event)
        return False

    def _pass_on_data(self, stream: Stream, session_id: str, data: bytes) -> None:
        client = self._routes.get(session_id)
        if client is not None:
            client.data(stream, session_id, data)

    def _link_lost(self) -> None:
        with self._routes_lock:
            clients, self._clients = list(self._clients), set()
            self._routes.clear()
        for client in clients:
            client.link_lost()

    def _before_loss(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                arrival = self._arrivals.get_nowait()
                if arrival is not None:
                    arrival.close_socket()  # came too late: the agent dials once more
        self._gone.set()
        if self._on_closed is not None:
            self._on_closed(self)

    def _expire(self) -> None:
        super()._expire()
        if self._on_lifetime_expired is not None:
            self._on_lifetime_expired(self)

    @property
    def alive(self) -> bool:
        """Whether the connection still stands."""
        return not self._gone.is_set()

    def wait_closed(self) -> None:
        """Wait until the connection has ended and every session on it has been told."""
        self._thread.join()


Callback = Callable[[ReverseAgentConn], None]


LINK_LOST = "the agent's connection is lost, and may be made again\n"


class ReverseListener:
    """Accepts agents in reverse mode, each known by ``id`` or ``session_id`` of its query.

    An agent of version 2 that lost its connection and dials again goes on with
    the sessions that it had. Else a second agent under an id replaces the first,
    whose sessions end with ConnectionLost. On ``/agents/ID/ws`` it serves clients as the agent itself
    would: ``AgentConn.dial("ws://host:port/agents/ID/ws")``; ``GET /agents`` lists the ids.

    The callbacks are called from the listener's threads, and must not block.
    What they raise is logged.
    """

    def __init__(
        self,
        host: str = "",
        port: int = 0,
        *,
        token: str | Tokens | Callable[[str], str | None] | None = None,
        tls: ssl.SSLContext | ServerTLS | None = None,
        path: str | None = None,
        on_joined: Callback | None = None,
        on_left: Callback | None = None,
        on_lifetime_expired: Callback | None = None,
    ) -> None:
        """Listen, and accept agents from now on.

        Args:
            host: "" for every interface.
            port: 0 for one that the system chooses, see ``port``.
            token: what agents and clients must show; Tokens, of which any is good; or a function that gives each id's
                token, None to refuse it.
            tls: a server's context; or a ServerTLS, which can be reloaded and asks for client certificates.
            path: the one path on which agents may dial; None for any.

        Raises:
            OSError: if the address is in use or does not exist.
        """
        self._token = token
        self._tls = tls
        self._path = path
        self._on_joined, self._on_left, self._on_lifetime_expired = on_joined, on_left, on_lifetime_expired
        self._changed = threading.Condition()  # guards the attributes below
        self._agents: dict[str, ReverseAgentConn] = {}
        self._clients: set[QueuedConnection] = set()
        self._closed = False
        listener = open_listener(Address(host, port))
        self.port = int(listener.getsockname()[1])
        """The port that it listens on."""
        self._doorway = make_doorway(
            self._serve,
            listener,
            _pool,
            self._process_request,
            self._speaks_version_2,
            tls=None if tls is None else lambda: tls.context if isinstance(tls, ServerTLS) else tls,
            process_response=self._process_response,
            server_header=f"sockerless-agent-client/{__version__}",
            max_size=MAX_MESSAGE_SIZE,
            logger=logging.getLogger("sockerless.client.websockets"),
        )
        self._doorway.start()

    def get(self, agent_id: str) -> ReverseAgentConn | None:
        """The agent of this id, None if it is not connected."""
        with self._changed:
            return self._agents.get(agent_id)

    def wait_for(self, agent_id: str, timeout: float | None = None) -> ReverseAgentConn:
        """Wait until the agent of this id is connected.

        Raises:
            TimeoutError: after ``timeout`` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: agent_id in self._agents or self._closed, timeout):
                raise TimeoutError(f"agent {agent_id!r} did not connect within {timeout} s")
            if agent_id not in self._agents:
                raise ConnectionLost("the listener is closed")
            return self._agents[agent_id]

    def __iter__(self) -> Iterator[ReverseAgentConn]:
        """The agents that are connected now."""
        with self._changed:
            return iter(list(self._agents.values()))

    def __len__(self) -> int:
        with self._changed:
            return len(self._agents)

    def close(self) -> None:
        """Close every connection, and listen no more. What was started on them here is ended."""
        with self._changed:
            self._closed = True
            closers = [conn.close for conn in self._agents.values()] + [client.close for client in self._clients]
            self._changed.notify_all()
        self._doorway.close()
        # Side by side: each may wait CLOSE_TIMEOUT for its peer.
        closing = [threading.Thread(target=close, daemon=True) for close in closers]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Handshake.

    def _process_request(self, connection: Guest, request: HTTPRequest) -> HTTPResponse | None:
        path = request.path.partition("?")[0]
        client_of = _client_path(path)
        agent_id = _agent_id(request.path) if client_of is None else client_of
        if path == "/agents":
            agent_id = ""
        elif client_of is None and ((self._path is not None and path != self._path) or not agent_id):
            status = http.HTTPStatus.BAD_REQUEST if not agent_id else http.HTTPStatus.NOT_FOUND
            return connection.respond(status, "an agent's query names it: ?id=... or ?session_id=...\n")
        if isinstance(self._tls, ServerTLS) and self._tls.wants_certificate and not peer_certificate(connection.socket):
            return connection.respond(http.HTTPStatus.FORBIDDEN, "a client certificate is needed\n")
        token = self._token(agent_id) if callable(self._token) else self._token
        if token is None and callable(self._token):  # an id that the function does not know
            token = secrets.token_hex()
        if isinstance(token, str):
            token = Tokens([token])
        if token is None and is_foreign_page(request):
            return connection.respond(http.HTTPStatus.FORBIDDEN, "web pages of another host may not connect\n")
        if token is not None and not token.accept(bearer_token(request)):
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "missing or wrong bearer token\n")
        if path == "/agents":
            return connection.respond(http.HTTPStatus.OK, json.dumps(sorted(conn.id for conn in self)) + "\n")
        if client_of is not None:
            agent = self.get(client_of)
            if agent is None:
                return connection.respond(http.HTTPStatus.NOT_FOUND, "no such agent is connected\n")
            if agent.current_link() is None:
                return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, LINK_LOST)
        return None

    def _process_response(
        self, connection: ServerConnection, request: HTTPRequest, response: HTTPResponse
    ) -> HTTPResponse | None:
        """Tell a client which agent it is, as the agent itself would.

        The agent may have been lost, or have come back, since the request was looked at. A client that was not told
        which agent it has, or does not get the version that it had, would give its sessions up: it is to come again.
        """
        client_of = _client_path(request.path.partition("?")[0])
        if client_of is None or response.status_code != http.HTTPStatus.SWITCHING_PROTOCOLS:
            return None
        agent = self.get(client_of)
        link = agent.current_link() if agent is not None else None
        offered = request.headers.get_all("Sec-WebSocket-Protocol")
        wants_version_2 = any(SUBPROTOCOL in map(str.strip, value.split(",")) for value in offered)
        if (
            agent is None
            or link is None
            or (wants_version_2 and agent.version == 2) != (connection.subprotocol == SUBPROTOCOL)
        ):
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, LINK_LOST)
        response.headers[INSTANCE_HEADER] = _instance(link)
        return None

    def _speaks_version_2(self, connection: ServerConnection) -> bool:
        """Whether a peer that offers version 2 gets it: any agent does, a client if its agent does."""
        assert connection.request is not None
        client_of = _client_path(connection.request.path.partition("?")[0])
        if client_of is None:
            return True
        agent = self.get(client_of)
        return agent is not None and agent.version == 2

    def _serve(self, connection: ServerConnection) -> None:
        assert isinstance(connection, ServerWebSocket)
        assert connection.request is not None
        path = connection.request.path
        client_of = _client_path(path.partition("?")[0])
        if client_of is None:
            self._serve_agent(connection, _agent_id(path))
            return
        conn = self.get(client_of)
        if conn is None:  # it left during the handshake
            return
        with self._changed:
            self._clients.add(connection)
        try:
            if connection.subprotocol == SUBPROTOCOL:
                _PassThrough(connection, conn).run()
            else:
                _Relay(connection, conn).run()
        finally:
            with self._changed:
                self._clients.discard(connection)

    def _serve_agent(self, connection: ServerWebSocket, agent_id: str) -> None:
        known = self.get(agent_id)
        if known is not None and known.adopt(connection):
            log.info("agent %s is back", agent_id)
            connection.recv_events_thread.join()  # the library closes the connection of a handler that returns
            return
        conn = ReverseAgentConn(connection, agent_id, self._expired, self._forget)
        with self._changed:
            before = self._agents.get(agent_id)
            if not self._closed and conn.alive:
                self._agents[agent_id] = conn
            closed = self._closed
            self._changed.notify_all()
        if closed:
            return
        if before is not None:
            log.info("agent %s dialled again: its first connection is closed", agent_id)
            # Not before the new one is known, and in another thread: the old peer may not answer.
            _pool.submit(before.give_way)
        self._tell(self._on_joined, conn)
        conn.wait_closed()
        self._tell(self._on_left, conn)

    def _expired(self, conn: ReverseAgentConn) -> None:
        self._tell(self._on_lifetime_expired, conn)

    def _tell(self, callback: Callback | None, conn: ReverseAgentConn) -> None:
        if callback is None:
            return
        try:
            callback(conn)
        except Exception:
            log.exception("a callback failed for agent %s", conn.id)

    def _forget(self, conn: ReverseAgentConn) -> None:
        with self._changed:
            if self._agents.get(conn.id) is conn:
                del self._agents[conn.id]
                self._changed.notify_all()


def _agent_id(path: str) -> str:
    """What an agent's query names it."""
    query = urllib.parse.parse_qs(path.partition("?")[2])
    return (query.get("session_id") or query.get("id") or [""])[0]


def _client_path(path: str) -> str | None:
    """The agent's id in ``/agents/ID/ws``, None for another path."""
    if path.startswith("/agents/") and path.endswith("/ws"):
        return urllib.parse.unquote(path[len("/agents/") : -len("/ws")])
    return None


class _RelayedSession:
    """One session of a client, on the connection of the agent that runs it."""

    def __init__(self, conn: AgentConn, client: QueuedConnection, request: Exec | Attach) -> None:
        self.id = request.id  # the client's
        self.is_exec = isinstance(request, Exec)
        self.remote_id = conn.new_id()
        self.stdin = conn.open_channel(self.remote_id)
        self.finished = False  # written by the agent connection's thread alone
        self._conn = conn
        self._outbox = client.outbox
        self._output = Channel(client.outbox, self.id)
        self._consumed: Callable[[int], None] = lambda count: None
        self._lock = threading.Lock()  # guards _owed
        self._owed = 0  # bytes that have not been said to be consumed

    def output(self, event: Output) -> None:
        if self.finished:
            return
        if self._output.waiting() > BRIDGE_LIMIT:
            self.end()
            self.failed(SessionError(f"more than {BRIDGE_LIMIT} bytes of output were not read: the session was ended"))
        elif event.lost:
            text = f"\r\nsockerless-agent: {event.lost} bytes of output are missing here\r\n"  # version 2 has none
            self._output.send(dataclasses.replace(event, id=self.id, data=event.data or text.encode()))
        else:
            self._output.put(event.stream, event.data)
            with self._lock:
                self._owed += len(event.data)
            self._acknowledge()

    def _acknowledge(self) -> None:
        """Say what has been consumed, once the client has read enough of it; from the writer's thread then."""
        if self._output.call_when_room(self._acknowledge):
            with self._lock:
                owed, self._owed = self._owed, 0
            if owed:
                self._consumed(owed)

    def tell_consumed(self, consumed: Callable[[int], None]) -> None:
        self._consumed = consumed

    def end(self) -> None:
        """The client has left, or asks for it."""
        self._conn.end_session(self.remote_id, self.is_exec)

    def warning(self, error: SessionError) -> None:
        self._outbox.send(Error(self.id, str(error), error.reason))

    def ended(self, code: int) -> None:
        self.finished = True
        self._output.send(Exit(self.id, code))

    def failed(self, error: ClientError) -> None:
        self.finished = True
        if isinstance(error, ConnectionLost):
            return  # so is the client's then: no session of it ends as if the agent had said so
        self._output.send(Error(self.id, str(error), getattr(error, "reason", "") or Reason.START_FAILED))


class _ClientServer:
    """Serves one client of the listener as the agent itself would; runs in the client's connection thread."""

    def __init__(self, client: ServerWebSocket, conn: ReverseAgentConn) -> None:
        self._client = client
        self._conn = conn

    def run(self) -> None:
        """Relay until the client leaves."""
        self._client.start_writer(_pool)
        _heartbeat().add(self._client)
        expired = self._tell_expired
        with self._conn._lock:
            self._conn._followers.add(expired)
        if self._conn.lifetime_expired.is_set():
            expired()
        try:
            # The client must not wait for an agent that has gone.
            _pool.submit(self._follow_agent)
            for message in self._client:
                self._relay(message)
        except ConnectionClosed as exc:
            log.info("client of agent %s lost: %s", self._conn.id, exc)
        finally:
            _heartbeat().remove(self._client)
            with self._conn._lock:
                self._conn._followers.discard(expired)
            self._leave()

    def _relay(self, message: str | bytes) -> None:
        raise NotImplementedError

    def _leave(self) -> None:
        """The client has gone."""
        raise NotImplementedError

    def _tell_expired(self) -> None:
        self._client.outbox.send(LifetimeExpired())

    def _follow_agent(self) -> None:
        while self._conn._thread.is_alive() and self._client.recv_events_thread.is_alive():
            self._conn._thread.join(1.0)
        self._client.close(CloseCode.GOING_AWAY, "the agent has left")


class _Relay(_ClientServer):
    """Serves a client of version 1: each of its sessions is one of this side's, under an id of its own."""

    def __init__(self, client: ServerWebSocket, conn: ReverseAgentConn) -> None:
        super().__init__(client, conn)
        self._sessions: dict[str, _RelayedSession] = {}  # the connection thread's alone

    def _leave(self) -> None:
        for session in self._sessions.values():
            if not session.finished:
                session.end()

    def _relay(self, message: str | bytes) -> None:
        try:
            request = decode_request(message if isinstance(message, str) else "")
        except MessageError as exc:
            reason = Reason.BAD_MESSAGE if exc.id in self._sessions else exc.reason
            self._client.outbox.send(Error(exc.id, str(exc), reason))
            return
        # Of version 2, which is not decoded here.
        assert not isinstance(request, Ack | Resume | Park | Call | ArchiveGet | ArchivePut)
        session = self._sessions.get(request.id)
        if isinstance(request, Exec | Attach):
            if session is not None and not session.finished:
                text = f"session id {request.id!r} is in use"
                self._client.outbox.send(Error(request.id, text, Reason.DUPLICATE_SESSION))
                return
            self._start(request)
        elif isinstance(request, End):
            if session is not None:
                session.end()
        elif session is None:
            self._client.outbox.send(Error(request.id, "no session has this id", Reason.UNKNOWN_SESSION))
        elif isinstance(request, Stdin):
            if session.stdin.wait_for_room():
                session.stdin.put(Stream.STDIN, request.data)
        elif isinstance(request, CloseStdin):
            session.stdin.send(CloseStdin(session.remote_id))
        else:
            self._conn.send(dataclasses.replace(request, id=session.remote_id))

    def _start(self, request: Exec | Attach) -> None:
        session = _RelayedSession(self._conn, self._client, request)
        if len(self._sessions) > REMEMBERED_SESSIONS:
            self._sessions = {id: known for id, known in self._sessions.items() if not known.finished}
        self._sessions[request.id] = session
        try:
            self._conn.start_session(dataclasses.replace(request, id=session.remote_id), session)
        except ClientError as exc:
            session.failed(exc)


class _Passed:
    """A session that passes through: its ways to the agent and to the client."""

    def __init__(self, request: Opening | Resume, link: QueuedConnection, client: QueuedConnection) -> None:
        self.to_agent = Channel(link.outbox, request.id, binary=True)  # its stdin
        self.to_client = Channel(client.outbox, request.id, binary=True)
        self.secret = request.secret  # "" where the agent chooses it, and has not said it yet
        self.connection = request.connection  # the client's count
        self.detaching = isinstance(request, Exec) and request.detach
        self.exit_follows = isinstance(request, Exec | Resume)  # when it is told to end; for a Resume perhaps
        self.opened = False  # the agent has answered that it has it
        self.ended = False  # it has had its exit or error
        # What the agent said before it has seen a request that is repeated was for another connection, and comes again.
        self.repeated = isinstance(request, Resume) or request.connection > 1
        self.early: Ack | None = None  # of a request that looked repeated, and was the first
        # Offsets of the output, as the agent counts: what the client has acknowledged, and what was passed to it.
        self.acked = self.sent = request.offset if isinstance(request, Resume) else 0

    def check(self, request: Opening | Resume) -> None:
        """Whether the session can go on where the request says, as the agent will check it.

        Raises:
            SessionError: if not.
        """
        offset, acked = (request.offset, request.acked) if isinstance(request, Resume) else (0, 0)
        if not self.acked <= offset <= self.sent:
            fault = f"offset {offset} is not from {self.acked} to {self.sent}"
        elif acked > offset:
            fault = f"{acked} bytes are acknowledged, and {offset} received"
        else:
            return
        raise SessionError(f"resume: {fault}", Reason.BAD_REQUEST, request.id)


class _PassThrough(_ClientServer):
    """Serves a client of version 2: its sessions are the agent's own, and pass through this side as they are.

    So windows, offsets and secrets are between the two, and no output is kept here. A
    client that leaves has its sessions parked by the agent; an agent that leaves
    has its clients dial again. Both resume by themselves. Which client has a session
    is decided here, and the agent sees one peer: so what it would refuse a client that
    wants another's session is refused here, before that one is asked to give it up.
    """

    def __init__(self, client: ServerWebSocket, conn: ReverseAgentConn) -> None:
        super().__init__(client, conn)
        self._link = conn.current_link()
        # Guards the attributes below: this client's thread uses them, the agent's receiving thread, and the
        # threads of other clients. Held while something is handed to a channel, which never waits: who gives a
        # session up is to be sure that nothing of it comes later.
        self._lock = threading.Lock()
        self._sessions: dict[str, _Passed] = {}
        self._ended_ids: dict[str, None] = {}  # the latest, oldest first: what is late for them is harmless
        self._calls: dict[str, str] = {}  # this side's id of a call: the client's
        self._cut = False  # the agent's connection is lost

    def run(self) -> None:
        """Relay until the client leaves, or the agent's connection is lost."""
        if self._link is None:
            return
        self._conn.add_client(self)
        if self._conn.current_link() is not self._link:  # in this order: either link_lost() comes, or this sees it
            self._conn.remove_client(self)
            return
        super().run()

    # Called by the agent's receiving thread.

    def event(self, event: Event) -> None:
        """Something that the agent says of a session or call of this client, or to everybody."""
        event_id = getattr(event, "id", "")
        with self._lock:
            session = self._sessions.get(event_id)
            original = self._calls.pop(event_id, None)
            if session is not None and self._note(event, session):
                session.to_client.send(event)
        if original is not None:
            self._conn.release_route(event_id, self)
            self._client.outbox.send(dataclasses.replace(cast(Answer | Error, event), id=original))
        elif not event_id:
            self._client.outbox.send(event)

    def _note(self, event: Event, session: _Passed) -> bool:
        """Keep track of a session; False if the event is not for its client. Holds the lock."""
        if session.repeated:
            if isinstance(event, Ack):
                session.early = event
            if not isinstance(event, Resumed | Started | Error):
                return False
            session.repeated = False
            if session.early is not None and isinstance(event, Started):
                session.to_client.send(session.early)
        if isinstance(event, Started):
            session.opened = True
            session.secret = event.secret or session.secret
            if session.detaching:  # and goes on without a session
                self._free(event.id)
        elif isinstance(event, Resumed):
            session.opened = True
            session.acked = session.sent = event.offset
        elif isinstance(event, Error) and not session.opened and event.reason not in _ABOUT_MESSAGES:
            self._free(event.id)  # there it is free, too
        elif isinstance(event, Exit) or (isinstance(event, Error) and event.reason not in _NOT_FATAL):
            session.ended = True
        return True

    def _free(self, session_id: str) -> None:
        """The agent has no such session, or not for this client: the id is anybody's. Holds the lock."""
        self._remove(session_id)
        self._conn.release_route(session_id, self)

    def data(self, stream: Stream, session_id: str, data: bytes) -> None:
        """Output; never more than the client's window."""
        with self._lock:
            session = self._sessions.get(session_id)
            if session is not None and not session.repeated:
                session.sent += len(data)
                session.to_client.put(stream, data)

    def link_lost(self) -> None:
        """The agent has parked the sessions: the client has to dial again, and resume them."""
        with self._lock:
            self._cut = True
            for session_id in self._sessions:  # what has got its route since all were forgotten
                self._conn.release_route(session_id, self)
            self._sessions.clear()
        _pool.submit(self._client.close, CloseCode.GOING_AWAY, "the agent's connection is lost")

    # Called by another client's thread.

    def yields(self, request: Opening | Resume) -> bool:
        """Give a session up to who shows its secret.

        Raises:
            SessionError: if the request is late, or makes no sense: the agent would refuse it, too, and nobody had
                the session then.
        """
        with self._lock:
            session = self._sessions.get(request.id)
            if session is None:
                return True
            if not session.secret or not hmac.compare_digest(session.secret.encode(), request.secret.encode()):
                return False
            if request.connection and request.connection <= session.connection:
                text = "a later connection has the session"
                raise SessionError(text, Reason.DUPLICATE_SESSION, request.id)
            session.check(request)
            self._give_up(request.id, session)
            return True

    def _give_up(self, session_id: str, session: _Passed) -> None:
        """Let the agent park a session; nothing of it is said any more, either way. Holds the lock."""
        self._remove(session_id)
        session.to_agent.discard()
        session.to_client.discard()
        self._conn.release_route(session_id, self)
        if self._link is not None:
            self._link.outbox.send(Park(session_id))

    # Called by this client's thread.

    def _leave(self) -> None:
        self._conn.remove_client(self)
        with self._lock:
            for call_id in self._calls:
                self._conn.release_route(call_id, self)
            for session_id, session in list(self._sessions.items()):
                self._give_up(session_id, session)

    def _relay(self, message: str | bytes) -> None:
        try:
            if isinstance(message, str):
                self._relay_request(decode_request(message, 2))
            else:
                self._relay_stdin(*decode_data_frame(message))
        except MessageError as exc:
            with self._lock:
                reason = Reason.BAD_MESSAGE if exc.id in self._sessions else exc.reason
            self._client.outbox.send(Error(exc.id, str(exc), reason))
        except SessionError as exc:
            if not self._cut:  # the client is about to hear of that, and to resume
                self._client.outbox.send(Error(exc.session_id, str(exc), exc.reason))

    def _relay_stdin(self, stream: Stream, session_id: str, data: memoryview) -> None:
        with self._lock:
            session = self._find(session_id)
        if session is None:
            return
        if session.to_agent.wait_for_room():
            with self._lock:
                if self._sessions.get(session_id) is session:
                    session.to_agent.put(stream, bytes(data))

    def _relay_request(self, request: Request) -> None:
        assert self._link is not None
        if isinstance(request, Call):
            call_id = self._conn.new_id()
            with self._lock:
                self._calls[call_id] = request.id
            self._conn.claim_route(call_id, self)
            self._link.outbox.send(dataclasses.replace(request, id=call_id))
        elif isinstance(request, Opening | Resume):
            self._open(request)
        else:
            with self._lock:
                self._forward(request)

    def _forward(self, request: ToSession | Park) -> None:
        """Pass on what is said to a session. Holds the lock."""
        assert self._link is not None
        session = self._sessions.get(request.id)
        if isinstance(request, End) and request.secret and (session is None or session.secret != request.secret):
            self._link.outbox.send(request)  # it is parked, if it is there
            return
        session = self._find(request.id)
        if session is None:
            return
        if isinstance(request, Stdin | CloseStdin):
            session.to_agent.send(request)
            return
        if isinstance(request, Ack) and request.offset <= session.sent:
            session.acked = max(session.acked, request.offset)
        self._link.outbox.send(request)
        if isinstance(request, End) and (session.ended or not session.exit_follows):
            self._free(request.id)

    def _remove(self, session_id: str) -> None:
        """The session is this client's no more. Holds the lock."""
        del self._sessions[session_id]
        self._ended_ids[session_id] = None
        if len(self._ended_ids) > REMEMBERED_SESSIONS:
            del self._ended_ids[next(iter(self._ended_ids))]

    def _open(self, request: Opening | Resume) -> None:
        assert self._link is not None
        with self._lock:
            before = self._sessions.get(request.id)
        if before is not None and not before.ended:
            raise SessionError(f"session id {request.id!r} is in use", Reason.DUPLICATE_SESSION, request.id)
        while (owner := self._conn.claim_route(request.id, self)) is not None:
            if owner.yields(request):
                continue
            if isinstance(request, Resume):
                text = "no session to resume: its id or secret is wrong, or its time is over"
                raise SessionError(text, Reason.UNKNOWN_SESSION, request.id)
            text = f"session id {request.id!r} is in use by another client of this listener"
            raise SessionError(text, Reason.DUPLICATE_SESSION, request.id)
        with self._lock:
            if self._cut:
                self._conn.release_route(request.id, self)
                return
            self._sessions[request.id] = _Passed(request, self._link, self._client)
            self._link.outbox.send(request)

    def _find(self, session_id: str) -> _Passed | None:
        """A session of this client; None if it had one of this id. Raises SessionError. Holds the lock."""
        session = self._sessions.get(session_id)
        if session is None and session_id not in self._ended_ids:
            raise SessionError(f"no session has the id {session_id[:80]!r}", Reason.UNKNOWN_SESSION, session_id)
        return session


# ══════════════════════════════════════════════════════════════════════════════
# Command line
# ══════════════════════════════════════════════════════════════════════════════

EXIT_FAILED, EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND = 125, 126, 127  # as `docker exec` has them
LOCAL_LIMIT = 16 << 20  # bytes of output that may wait for our stdout or stderr to take them
DETACH_KEYS = b"\x10\x11"  # Ctrl-P Ctrl-Q, as Docker has it
PASSED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


class _Detached(ClientError):
    """The user typed the detach keys."""


class _Interrupted(ClientError):
    """A signal ends this program, and is not passed on."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _Parser(argparse.ArgumentParser):
    """Ends with 125 for a usage error, since 2 might be the command's."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(EXIT_FAILED, f"agent_client: {message}\n")


class _LocalTerminal:
    """This process's terminal: raw while entered, and always put back as it was."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._saved: list[Any] | None = None

    def __enter__(self) -> Self:
        if os.isatty(self.fd):
            self._saved = termios.tcgetattr(self.fd)
            tty.setraw(self.fd, termios.TCSADRAIN)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._saved is not None:
            termios.tcsetattr(self.fd, termios.TCSADRAIN, self._saved)
            self._saved = None

    def size(self) -> tuple[int, int] | None:
        """Columns and rows; None if they are not known."""
        for fd in (self.fd, 1, 2):
            try:
                packed = fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8))
            except OSError:
                continue
            rows, columns = struct.unpack_from("HH", packed)
            if rows and columns:
                return columns, rows
        return None


class _LocalEvents(_EventQueue):
    """For one that this process's user watches: what the agent has against it is this program's to say.

    An agent with --read-only passes on no signal. Who wants to leave such a session with one then does.
    """

    def __init__(self) -> None:
        super().__init__(LOCAL_LIMIT)
        self.interrupted = 0  # the last signal that was passed on and is to end something; the signals thread's

    def warning(self, error: SessionError) -> None:
        self.output(Output("", Stream.STDERR, f"agent_client: {_printable(str(error))}\n".encode()))
        if error.reason == Reason.READ_ONLY and self.interrupted:
            self.failed(_Interrupted(self.interrupted))


class _LocalSession:
    """Runs one session with this process's own stdin, stdout and stderr."""

    def __init__(self, conn: AgentConn, request: Exec | Attach, options: argparse.Namespace) -> None:
        self._conn = conn
        self._request = request
        self._interactive: bool = options.interactive
        self._tty: bool = options.tty
        self._pass_signals: bool = options.sig_proxy
        self._attached = isinstance(request, Attach)
        self._events = _LocalEvents()
        self._channel = conn.open_channel(request.id)
        self._terminal = _LocalTerminal(0)
        self._typed = b""  # the first of DETACH_KEYS, held back until the next key decides

    def run(self) -> int:
        """Carry bytes and signals until the session ends; returns its exit code."""
        self._catch_signals()
        size = self._terminal.size()
        if self._tty and size is not None and self._conn.version == 2 and isinstance(self._request, Exec):
            self._request = dataclasses.replace(self._request, width=size[0], height=size[1])
        self._conn.start_session(self._request, self._events)
        # Raw only where keys are forwarded: else Ctrl-C must go on to interrupt us.
        raw = self._terminal if self._tty and self._interactive else contextlib.nullcontext()
        if self._tty:
            self._resize()
        with raw:
            if self._interactive:
                threading.Thread(target=self._read_stdin, name="stdin", daemon=True).start()
            elif not self._attached and not self._tty:
                self._channel.send(CloseStdin(self._request.id))
            try:
                while (item := self._events.take()) is not None:
                    if not self._write(*item):
                        return 128 + signal.SIGPIPE
                return self._events.result()
            finally:
                self._events.abandon()

    def _write(self, stream: Stream, data: bytes) -> bool:
        """Write output; False if nobody reads it any more."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(stream, view) :]
            except BlockingIOError:  # whoever shares it made it non-blocking
                select.select((), (stream,), ())
            except BrokenPipeError:
                return False
        return True

    def _read_stdin(self) -> None:
        try:
            while data := os.read(0, STDIN_CHUNK):
                if self._tty and self._attached:
                    data = self._look_for_detach(data)
                if data and self._channel.wait_for_room():
                    self._channel.put(Stream.STDIN, data)
        except OSError as exc:
            log.warning("stdin: %s", exc.strerror)
        except _Detached as exc:
            self._events.failed(exc)
            return
        self._channel.send(CloseStdin(self._request.id))

    def _look_for_detach(self, data: bytes) -> bytes:
        data = self._typed + data
        if DETACH_KEYS in data:
            raise _Detached("detached")
        self._typed = data[-1:] if data.endswith(DETACH_KEYS[:1]) else b""
        return data[: len(data) - len(self._typed)]

    def _resize(self) -> None:
        size = self._terminal.size()
        if size is not None:
            self._conn.send(Resize(self._request.id, *size))

    def _catch_signals(self) -> None:
        # Python runs a handler only once the main thread wakes, and not every
        # signal wakes it; the byte for set_wakeup_fd() is written at once.
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing)
        threading.Thread(target=self._handle_signals, args=(reading,), name="signals", daemon=True).start()
        for number in (*PASSED_SIGNALS, signal.SIGWINCH):
            signal.signal(number, lambda received, frame: None)

    def _handle_signals(self, fd: int) -> None:
        while True:
            for number in os.read(fd, 64):
                if number == signal.SIGWINCH:
                    if self._tty:
                        self._resize()
                elif self._pass_signals:
                    if number not in (signal.SIGUSR1, signal.SIGUSR2):
                        self._events.interrupted = number
                    self._conn.send(Signal(self._request.id, signal.Signals(number).name))
                else:
                    self._events.failed(_Interrupted(number))  # so that the terminal is put back


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="agent_client",
        description="Run commands in a container through its sockerless-agent.",
        epilog="Exit status: the command's own; 128+n if signal n ended it; 125 if this program failed, 126 if the "
        "command cannot be executed, 127 if it is not found.",
    )
    parser.add_argument("--version", action="version", version=f"sockerless-agent-client {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = _Parser(add_help=False)
    common.add_argument(
        "--addr",
        default=os.environ.get("SOCKERLESS_AGENT_ADDR") or DEFAULT_ADDRESS,
        help="host:port, unix:/path or ws:// URL of the agent (SOCKERLESS_AGENT_ADDR; default: %(default)s)",
    )
    common.add_argument(
        "--token-file", metavar="PATH", help="read the bearer token from PATH (or SOCKERLESS_AGENT_TOKEN)"
    )
    common.add_argument(
        "--via", metavar="HOST:PORT", help="through the listener there, which the agent has dialled; or its wss:// URL"
    )
    common.add_argument("--agent", metavar="ID", help="with --via: the agent's id")
    common.add_argument("--ca", metavar="PATH", help="speak TLS, and trust the certificates in PATH (PEM), no others")
    common.add_argument("--cert", metavar="PATH", help="speak TLS, and show the certificate in PATH (PEM)")
    common.add_argument("--key", metavar="PATH", help="its private key (default: in the same file)")
    session = _Parser(add_help=False, parents=[common])
    session.add_argument("-i", "--interactive", action="store_true", help="forward stdin")
    session.add_argument("-t", "--tty", action="store_true", help="on a terminal")
    session.add_argument(
        "--no-sig-proxy", dest="sig_proxy", action="store_false", help="do not pass signals on to the process"
    )
    session.add_argument(
        "--reconnect",
        type=read_duration,
        default=RESUME_PATIENCE,
        metavar="DURATION",
        help="how long to try to resume when the connection is lost, 0 for not at all (default: 60s)",
    )
    session.add_argument(
        "--ping-interval",
        type=_positive_duration,
        default=PING_INTERVAL,
        metavar="DURATION",
        help="time between two pings (default: 20s)",
    )
    session.add_argument(
        "--ping-timeout",
        type=_positive_duration,
        default=PING_TIMEOUT,
        metavar="DURATION",
        help="silence, at the TCP level too, after which the agent counts as gone (default: 60s)",
    )
    run = commands.add_parser(
        "exec", parents=[session], help="run a command", usage="%(prog)s [options] [--] CMD [ARG ...]"
    )
    run.add_argument(
        "-e", "--env", metavar="K=V", action="append", default=[], help="set a variable (K alone: from here)"
    )
    run.add_argument("-u", "--user", metavar="USER", default="", help="as this user: name, uid, name:group or uid:gid")
    run.add_argument(
        "-d", "--detach", action="store_true", help="start it, print its id, and leave it running: see attach, ps"
    )
    run.add_argument("-w", "--workdir", metavar="DIR", default="", help="working directory")
    run.add_argument("cmd", nargs=argparse.REMAINDER, metavar="CMD", help="the command and its arguments")
    attach = commands.add_parser(
        "attach", parents=[session], help="attach to the main process, or a detached command; -it detaches with "
        "Ctrl-P Ctrl-Q"
    )  # fmt: skip
    attach.add_argument("id", nargs="?", default="", metavar="ID", help="of a command that exec -d has started")
    attach.add_argument("--no-replay", dest="replay", action="store_false", help="no output from before")
    copy = commands.add_parser(
        "cp",
        parents=[common],
        help="copy files and trees into or out of the container, as docker cp does",
        description="One of the two is in the container, and begins with a colon: cp :/etc/hosts . copies out of it. "
        "- is a tar archive on stdin or stdout. What lies there already is replaced; a tree is copied into a "
        "directory that exists, and only what it holds if SRC ends with /. A relative path in the container is "
        "relative to /.",
    )
    copy.add_argument("-a", "--archive", action="store_true", help="keep the owners' numbers (root only)")
    copy.add_argument("-L", "--follow-link", action="store_true", help="copy what SRC links to")
    copy.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    copy.add_argument("source", metavar="SRC")
    copy.add_argument("target", metavar="DST")
    listen = commands.add_parser("listen", help="accept agents in reverse mode, and serve clients with --via")
    listen.add_argument("--addr", default=":8080", help="where to listen (default: %(default)s)")
    listen.add_argument(
        "--token-file",
        metavar="PATH",
        help="read the tokens that agents and clients may show from PATH",
    )
    listen.add_argument("--tls-cert", metavar="PATH", help="speak TLS, with the certificate in PATH; SIGHUP reloads it")
    listen.add_argument("--tls-key", metavar="PATH", help="its private key (default: in the same file)")
    listen.add_argument(
        "--tls-client-ca", metavar="PATH", help="agents and clients must have a certificate that one in PATH has issued"
    )
    commands.add_parser("ps", parents=[common], help="list what runs in the container")
    stats = commands.add_parser("stats", parents=[common], help="print what it uses: CPU, memory, I/O")
    stats.add_argument("--json", action="store_true", help="all figures, as JSON")
    commands.add_parser("health", parents=[common], help="print the agent's health; exit status 1 if unhealthy")
    return parser


def read_duration(text: str) -> float:
    """parse_duration() for argparse, which shows what is wrong of an ArgumentTypeError only."""
    try:
        return parse_duration(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def _positive_duration(text: str) -> float:
    seconds = read_duration(text)
    if seconds <= 0:
        raise argparse.ArgumentTypeError("it must be more than 0")
    return seconds


def _read_token(options: argparse.Namespace) -> str | None:
    if options.token_file is None:
        return os.environ.get("SOCKERLESS_AGENT_TOKEN")
    try:
        return read_token_file(options.token_file)[0]
    except ValueError as exc:
        raise ClientError(f"--token-file: {exc}") from None


def _variables(items: Sequence[str]) -> Iterator[str]:
    """``K=V`` as it is; ``K`` alone is taken from this process, if it has it, as docker exec does."""
    for item in items:
        name, equals, _ = item.partition("=")
        if not name:
            raise ClientError(f"--env: not K=V: {item!r}")
        if equals:
            yield item
        elif name in os.environ:
            yield f"{name}={os.environ[name]}"


def _run_exec(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    cmd = options.cmd[1:] if options.cmd[:1] == ["--"] else options.cmd
    if not cmd:
        parser.error("exec: no command given")
    if options.tty and options.interactive and not os.isatty(0):
        raise ClientError("the input device is not a terminal: leave out -t")
    with _dial_as_told(options) as conn:
        request = Exec(conn.new_id(), tuple(cmd), tuple(_variables(options.env)), options.workdir, options.tty)
        if conn.version == 1 and (options.user or options.detach):
            what = "--user" if options.user else "--detach"
            raise ClientError(f"{what}: the agent speaks version 1 of the protocol, which has no such thing")
        request = dataclasses.replace(request, user=options.user)
        if not options.detach:
            return _LocalSession(conn, request, options).run()
        receiver = _DetachReceiver()
        conn.start_session(dataclasses.replace(request, detach=True, no_stdin=not options.interactive), receiver)
        print(receiver.wait().id)
        return 0


def _dial_as_told(options: argparse.Namespace) -> AgentConn:
    """The connection that --addr, or --via and --agent, ask for."""
    if (options.via is None) != (options.agent is None):
        raise ClientError("--via and --agent go together")
    addr = options.addr
    tls = _tls_as_told(options)
    if options.via is not None:
        where, url, _ = _locate(options.via, tls is not None)
        if where:
            raise ClientError(f"--via: a listener is at HOST:PORT, not at {options.via}")
        path = f"/agents/{urllib.parse.quote(options.agent, safe='')}/ws"
        addr = urllib.parse.urlsplit(url)._replace(path=path).geturl()
    patience = getattr(options, "reconnect", RESUME_PATIENCE)
    pings = {name: getattr(options, name) for name in ("ping_interval", "ping_timeout") if name in options}
    conn = AgentConn.dial(addr, _read_token(options), tls=tls, patience=patience, **pings)
    conn.on_outage = _show_outage
    return conn


def _tls_as_told(options: argparse.Namespace) -> ssl.SSLContext | None:
    if options.key and not options.cert:
        raise ClientError("--key needs --cert")
    return (
        make_client_tls(options.ca or "", options.cert or "", options.key or "") if options.ca or options.cert else None
    )


def _show_outage(lost: bool) -> None:
    """Say on stderr that the session pauses, and that it goes on."""
    words = "connection lost, trying to resume" if lost else "resumed"
    end = "\r\n" if os.isatty(2) else "\n"  # the terminal may be raw
    with contextlib.suppress(OSError):
        os.write(2, f"{end if lost else ''}agent_client: {words}{end}".encode())


def read_server_tls(options: argparse.Namespace, prefix: str = "") -> ServerTLS | None:
    """What --tls-cert, --tls-key and --tls-client-ca ask for, all with ``prefix``. Raises ValueError."""
    cert, key, client_ca = (getattr(options, f"{prefix}tls_{name}") for name in ("cert", "key", "client_ca"))
    flag = f"--{prefix.replace('_', '-')}tls"
    if not cert:
        if key or client_ca:
            raise ValueError(f"{flag}-{'key' if key else 'client-ca'} needs {flag}-cert")
        return None
    return ServerTLS(cert, key or "", client_ca or "")


def _run_listen(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    address = parse_address(options.addr)
    tls = read_server_tls(options)
    tokens: Tokens | None = None
    if options.token_file:
        tokens = Tokens(read_token_file(options.token_file), options.token_file)
    elif token := _read_token(options):
        tokens = Tokens([token])

    # Before any thread exists, so that each inherits it and sigwait() alone gets them.
    reloadable = tls is not None or bool(options.token_file)
    awaited = {signal.SIGINT, signal.SIGTERM} | ({signal.SIGHUP} if reloadable else set())
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)

    saying = threading.Lock()  # held while a line is printed: print() writes it in two parts

    def say(what: str) -> Callback:
        def callback(conn: ReverseAgentConn) -> None:
            with saying, contextlib.suppress(OSError):  # who no longer reads this may still need the agents
                print(f"agent {_printable(conn.id)} {what}", flush=True)

        return callback

    with ReverseListener(
        address.host,
        address.port,
        token=tokens,
        tls=tls,
        on_joined=say("joined"),
        on_left=say("left"),
        on_lifetime_expired=say("says that its platform is about to end it"),
    ) as listener:
        print(f"listening on {Address(address.host, listener.port)}", flush=True)
        if tokens is None and not options.tls_client_ca and not address.is_local:
            log.warning("NO TOKEN IS SET: whoever reaches this can run commands in every agent that dials in")
        while signal.sigwait(awaited) == signal.SIGHUP:
            try:
                if tls is not None:
                    tls.reload()
                if tokens is not None and options.token_file:
                    tokens.reload()
            except ValueError as exc:
                log.warning("what was read before stays in use: %s", exc)
    return 0


def _run_attach(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    with _dial_as_told(options) as conn:
        try:
            if options.id or not options.replay:
                conn._need_version_2("attaches to the main process alone, with its replay")
            request = Attach(conn.new_id(), session=options.id, no_replay=not options.replay)
            return _LocalSession(conn, request, options).run()
        except _Detached:
            return 0


class _UnixHTTPConnection(http.client.HTTPConnection):
    """http.client over a unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(OPEN_TIMEOUT)
        self.sock.connect(self._path)


def fetch_health(addr: str, tls: ssl.SSLContext | None = None) -> dict[str, Any]:
    """What ``GET /health`` of an agent answers; arguments are those of :meth:`AgentConn.dial`.

    Raises:
        ConnectFailed: if there is no agent, or it does not answer.
        ValueError: if ``addr`` is none.
    """
    path, url, _ = _locate(addr, tls is not None)
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or "127.0.0.1"
    connection: http.client.HTTPConnection
    if path:
        connection = _UnixHTTPConnection(path, OPEN_TIMEOUT)
    elif parts.scheme == "wss":
        connection = http.client.HTTPSConnection(
            host, parts.port or 443, timeout=OPEN_TIMEOUT, context=tls or make_client_tls()
        )
    else:
        connection = http.client.HTTPConnection(host, parts.port or 80, timeout=OPEN_TIMEOUT)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/health")
            response = connection.getresponse()
            body = response.read()
            state = json.loads(body) if response.status == 200 else None
        except (OSError, http.client.HTTPException) as exc:
            raise ConnectFailed(f"{addr}: {_reason(exc)}") from exc
        except ValueError:
            raise ConnectFailed(f"{addr}: its answer is not JSON") from None
    if response.status != 200:
        line = _printable(body[:200].decode(errors="replace").partition("\n")[0])
        raise ConnectFailed(f"{addr}: answered with HTTP status {response.status}: {line}")
    if not isinstance(state, dict):
        raise ConnectFailed(f"{addr}: its answer is not a JSON object")
    return state


def _run_health(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if options.via is None:
        state = fetch_health(options.addr, _tls_as_told(options))
    else:
        with _dial_as_told(options) as conn:
            state = conn.health()
    print(json.dumps(state, indent=2))
    healthy = state.get("status") == "ok" and state.get("health", {}).get("status") != "unhealthy"
    return 0 if healthy else 1


def _run_ps(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    with _dial_as_told(options) as conn:
        sessions = conn.sessions()
    print(f"{'ID':20} {'KIND':9} {'PID':>7} {'STATE':12} COMMAND")
    for entry in sessions:
        kind = entry.get("kind", "")
        if "code" in entry:
            state = f"ended ({entry['code']})"
        elif kind in ("main", "detached") or entry.get("connected"):
            state = "running"
        else:
            state = "unconnected"
        command = _printable(" ".join(map(shlex.quote, entry.get("cmd") or ["-"])))
        print(f"{_printable(entry.get('id') or '-'):20} {kind:9} {entry.get('pid') or '-':>7} {state:12} {command}")
    return 0


def _printable(text: str) -> str:
    """``text`` without what would do something to a terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class _LogFormatter(logging.Formatter):
    """A line a record, but for a traceback."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return _printable(super().formatMessage(record))


STATS_PAUSE = 1.0  # seconds between the two measurements that CPU % is reckoned from


def _run_stats(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    with _dial_as_told(options) as conn:
        before = conn.stats()
        if options.json:
            print(json.dumps(before, indent=2))
            return 0
        time.sleep(STATS_PAUSE)
        now = conn.stats()
    seconds = max(now["time"] - before["time"], 1e-6)
    cpu_before = {entry["id"]: entry["cpu_seconds"] for entry in before["sessions"]}
    print(
        f"{'ID':20} {'CPU %':>7} {'MEMORY':>10} {'PROCESSES':>9} {'THREADS':>7} {'FDS':>5} {'READ':>10} {'WRITTEN':>10}"
    )
    total = {**now["container"], "id": "(all)"}
    cpu_before["(all)"] = before["container"]["cpu_seconds"]
    for entry in (*now["sessions"], total):
        spent = entry["cpu_seconds"] - cpu_before.get(entry["id"], entry["cpu_seconds"])
        print(
            f"{_printable(entry['id'] or 'main process'):20} {spent / seconds:>7.1%} {_size(entry['memory']):>10} "
            f"{entry['processes']:>9} {entry['threads']:>7} {entry['fds']:>5} {_size(entry['read_bytes']):>10} "
            f"{_size(entry['write_bytes']):>10}"
        )
    return 0


def _size(count: float) -> str:
    units = ["TiB", "GiB", "MiB", "KiB"]
    if count < 1024:
        return f"{count:.0f} B"
    count /= 1024
    while count >= 1024 and len(units) > 1:
        count /= 1024
        units.pop()
    return f"{count:.1f} {units[-1]}"


# ══════════════════════════════════════════════════════════════════════════════
# Copying
# ══════════════════════════════════════════════════════════════════════════════


class _Place:
    """SRC or DST of ``cp``: a path here, or in the container.

    Attributes:
        path: what is meant; a slash or ``/.`` at its end is kept.
        name: its last component, which a copy keeps; "" for all that the directory holds.
    """

    def __init__(self, text: str, conn: AgentConn) -> None:
        self.remote = text.startswith(":")
        self.path = text[1:] if self.remote else text
        self._conn = conn
        if not self.path:
            raise ClientError("cp: an empty path")
        ending = "/." if self.path.endswith("/.") or self.path == "." else "/" if self.path.endswith("/") else ""
        whole = os.path.normpath("/" + self.path.lstrip("/")) if self.remote else os.path.abspath(self.path)
        self.path = whole.rstrip("/") + ending or "/"
        self.name = "" if ending == "/." else os.path.basename(whole)

    def stat(self, path: str = "") -> dict[str, Any] | None:
        """What is there, see agent.stat_path(); None if there is nothing."""
        try:
            return self._conn.stat_path(path or self.path) if self.remote else stat_path(path or self.path)
        except ArchiveError as exc:
            if exc.reason == Reason.NO_SUCH_PATH:
                return None
            raise ClientError(f"cp: {exc}") from None
        except SessionError as exc:
            if exc.reason == Reason.NO_SUCH_PATH:
                return None
            raise

    def follow_link(self) -> None:
        """Mean what a link at the end of the path leads to, be it there or not. The name stays."""
        found = self.stat()
        if found is not None and found["linkTarget"]:
            self.path = found["linkTarget"]

    def without_ending(self) -> str:
        return self.path.removesuffix("/.").rstrip("/") or "/"

    def is_directory(self) -> bool:
        """Whether a directory is there, or a link to one."""
        return self.stat(self.without_ending().rstrip("/") + "/.") is not None


def _plan_copy(source: _Place, target: _Place) -> tuple[str, str, str]:
    """What `docker cp` does with these: the path to pack, the directory to unpack it into, its name there or "".

    https://docs.docker.com/reference/cli/docker/container/cp/

    Raises:
        ClientError: if it would refuse them.
    """
    found = source.stat()
    if found is None:
        raise ClientError(f"cp: {source.path}: no such file or directory")
    is_directory = _is_directory(found)
    if target.is_directory():
        return source.path, target.path, source.name
    asserted = target.path.endswith(("/", "/."))
    target.path = target.without_ending()
    target.follow_link()
    there = target.stat()
    if asserted and (there is not None or not is_directory):
        raise ClientError(f"cp: {target.path}/: {'no such directory' if there is None else 'not a directory'}")
    if there is not None and is_directory:
        raise ClientError(f"cp: {target.path}: cannot copy a directory over a file")
    if there is not None and there["mode"] & GO_SPECIAL:
        raise ClientError(f"cp: {target.path}: not a regular file, and not replaced by one")
    parent, name = os.path.split(target.path)
    # A slash at the end, and no dot: a link to a directory is followed, and the name is what is given here.
    return source.path.removesuffix(".") if source.path.endswith("/.") else source.path, parent, name


# Of Go's os.FileMode, which a state has for a mode: directory; device, FIFO and socket.
GO_DIRECTORY = 1 << 31
GO_SPECIAL = 1 << 26 | 1 << 25 | 1 << 24


def _is_directory(found: Mapping[str, Any]) -> bool:
    return bool(found["mode"] & GO_DIRECTORY)


class _Progress:
    """A progress bar on stderr, if that is a terminal and tqdm is installed."""

    def __init__(self, quiet: bool, total: int | None) -> None:
        self._bar = None
        if not quiet and sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self._bar = tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, leave=False)

    def advance(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class _Counted:
    """A stream that a progress bar follows."""

    def __init__(self, stream: IO[bytes], progress: _Progress) -> None:
        self._stream = stream
        self._progress = progress

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._progress.advance(len(data))
        return data

    def write(self, data: bytes) -> None:
        self._stream.write(data)
        self._progress.advance(len(data))


def _run_cp(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    places = (options.source, options.target)
    if sum(text.startswith(":") for text in places) != 1:
        parser.error("cp: one of SRC and DST is in the container, and begins with a colon")
    with _dial_as_told(options) as conn:
        if options.target.startswith(":"):
            _copy_in(conn, options)
        else:
            _copy_out(conn, options)
    return 0


def _resolve(options: argparse.Namespace, conn: AgentConn) -> _Place:
    source = _Place(options.source, conn)
    if options.follow_link:
        source.follow_link()
    return source


def _copy_in(conn: AgentConn, options: argparse.Namespace) -> None:
    target = _Place(options.target, conn)
    if options.source == "-":
        progress = _Progress(options.quiet, None)
        process = conn.archive_put(target.path, no_overwrite_dir_non_dir=True)
        feed: Callable[[Callable[[bytes], None]], None] = functools.partial(_pour, sys.stdin.buffer)
    else:
        path, directory, name = _plan_copy(_resolve(options, conn), target)
        progress = _Progress(options.quiet, _tree_size(path) if sys.stderr.isatty() else None)
        process = conn.archive_put(directory, no_overwrite_dir_non_dir=True, no_owners=not options.archive)
        feed = functools.partial(pack, path, name=name)
    counted = _Counted(process.stdin, progress)
    try:
        feed(counted.write)
        process.stdin.close()
    except ArchiveError as exc:
        process.end()
        raise ClientError(f"cp: {exc}") from None
    except BrokenPipeError:
        pass  # the agent has refused it: wait() says why
    finally:
        progress.close()
    process.wait()


def _copy_out(conn: AgentConn, options: argparse.Namespace) -> None:
    source = _resolve(options, conn)
    if options.target == "-":
        path, directory, name = source.path, "", ""
    else:
        path, directory, name = _plan_copy(source, _Place(options.target, conn))
    found = source.stat()
    total = found["size"] if found is not None and not _is_directory(found) else None
    progress = _Progress(options.quiet, total)
    process = conn.archive_get(path)
    counted = _Counted(process.stdout, progress)
    try:
        if directory:
            # With the name that is asked for: an agent that sends another one replaces nothing else here.
            unpacker = Unpacker(directory, True, not options.archive, name)
            with contextlib.closing(unpacker):
                unpacker.unpack(counted)
        else:
            _pour(counted, sys.stdout.buffer.write)
    except ArchiveError as exc:
        process.end()
        raise ClientError(f"cp: {exc}") from None
    finally:
        progress.close()
    process.wait()


def _pour(source: IO[bytes] | _Counted, write: Callable[[bytes], Any]) -> None:
    while data := source.read(STDIN_CHUNK):
        write(data)


def _tree_size(path: str) -> int:
    """Bytes of the files in a tree, for the progress bar alone."""
    if not os.path.isdir(path) or os.path.islink(path):
        return os.lstat(path).st_size
    size = 0
    for directory, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(directory, name)).st_size
    return size


_COMMANDS: dict[str, Callable[[argparse.Namespace, argparse.ArgumentParser], int]] = {
    "exec": _run_exec,
    "attach": _run_attach,
    "listen": _run_listen,
    "health": _run_health,
    "ps": _run_ps,
    "stats": _run_stats,
    "cp": _run_cp,
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command line; ends the process with the command's exit status."""
    handler = logging.StreamHandler()
    handler.setFormatter(_LogFormatter("agent_client: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    parser = _make_parser()
    options = parser.parse_args(argv)
    code = EXIT_FAILED
    try:
        code = _COMMANDS[options.command](options, parser)
    except CommandNotFound as exc:
        print(f"agent_client: {_printable(str(exc))}", file=sys.stderr)
        code = EXIT_NOT_FOUND
    except CommandNotExecutable as exc:
        print(f"agent_client: {_printable(str(exc))}", file=sys.stderr)
        code = EXIT_NOT_EXECUTABLE
    except _Interrupted as exc:
        code = 128 + exc.number
    except (ClientError, ValueError, OSError) as exc:
        print(f"agent_client: {_printable(str(exc))}", file=sys.stderr)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
        sys.stdout.flush()
    # Not sys.exit(): a thread may still be in a read of stdin, which nothing can end.
    os._exit(code if 0 <= code <= 255 else 255)  # an agent's code may be anything: 256 would be success


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""sockerless-agent: run commands in a container over one WebSocket.

One file that is copied into an image and trusted as PID 1. It needs CPython
3.11 or newer, the standard library and ``websockets``; nothing else.

    python -m agent                                  serve execs on :9111
    python -m agent --keep-alive -- node server.js   and run a main process
    python -m agent --callback URL                   dial a backend instead
    python -m agent --help                           every flag

A client opens a WebSocket on ``/ws`` and starts any number of sessions on it:
``exec`` runs a command with pipes or on a terminal, ``attach`` joins the main
process with a replay of its recent output. ``agent_client.py`` is the client.

The file reads top-down; each section uses only those above it:

     1  Wire protocol          messages to bytes and back; no I/O
     2  Configuration          flags, environment, logging, secrets
     3  Accounts               what is counted, and who ran what
     4  Replay log             the bounded output of one process
     5  Child processes        spawn, reap, signal, find and end a process tree
     6  Pumps                  threads that move bytes between fds and queues
     7  Outgoing queue         what waits to be sent on one connection
     8  Sessions               exec, attach, the main process
     9  Archives               a tree as a tar stream, and back
    10  Health checks          Docker HEALTHCHECK
    11  Statistics             CPU and memory of what runs
    12  Connection             one WebSocket peer
    13  Metrics                the text of /metrics
    14  Server mode            listen, authenticate, answer /health
    15  Reverse mode           dial the backend, and dial again
    16  Command line           main, signals, exit code
"""

from __future__ import annotations

import signal

# What an init passes on to its main process: as in tini, all but what the
# kernel sends for a fault of the process's own, what stops it at a terminal, and
# SIGCHLD. SIGPIPE and SIGXFSZ are Python's own business.
PASSED_SIGNALS = frozenset(
    signal.valid_signals()
    - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGTTIN, signal.SIGTTOU, signal.SIGPIPE, signal.SIGXFSZ}
    - {signal.SIGFPE, signal.SIGILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGTRAP, signal.SIGSYS}
)
# Blocked, so that writing a log line to a terminal from the background stops nothing (termios(3), TOSTOP).
TERMINAL_STOPS = frozenset({signal.SIGTTIN, signal.SIGTTOU})

if __name__ == "__main__":
    # Before the imports, which take a tenth of a second: to a PID 1 the kernel
    # does not even deliver what nobody has asked for. What is blocked stays pending.
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_SIGNALS | TERMINAL_STOPS)

import argparse
import binascii
import bisect
import collections
import contextlib
import ctypes
import dataclasses
import datetime
import enum
import errno
import fcntl
import functools
import heapq
import hmac
import http
import ipaddress
import itertools
import json
import logging
import math
import mmap
import os
import queue
import random
import re
import resource
import secrets
import select
import selectors
import socket
import ssl
import stat
import struct
import sys
import termios
import threading
import time
import urllib.parse
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, ClassVar, NoReturn, Protocol, TypeVar, cast

if __name__ == "__main__":
    # `docker diff` shows what changed since PID 1 started: leave no __pycache__.
    sys.dont_write_bytecode = True

from websockets.datastructures import Headers
from websockets.exceptions import (
    ConnectionClosed,
    ConnectionClosedOK,
    InvalidStatus,
    InvalidURI,
    SecurityError,
    WebSocketException,
)
from websockets.frames import DATA_OPCODES, CloseCode, Frame, Opcode
from websockets.http11 import Request as HTTPRequest
from websockets.http11 import Response as HTTPResponse
from websockets.protocol import OPEN
from websockets.protocol import Protocol as WebSocketProtocol
from websockets.server import ServerProtocol
from websockets.streams import StreamReader
from websockets.sync.client import ClientConnection, connect
from websockets.sync.connection import Connection as WebSocket
from websockets.sync.server import ServerConnection, serve
from websockets.typing import BytesLike, Subprotocol
from websockets.uri import parse_uri

try:  # the C helper that websockets itself prefers
    from websockets.speedups import apply_mask
except ImportError:
    from websockets.utils import apply_mask

if TYPE_CHECKING:  # imported where they are used
    import io
    import tarfile

    import psutil

__version__ = "0.1.0"

log = logging.getLogger("sockerless.agent")


class AgentError(Exception):
    """Base class of the errors that this module raises on purpose."""


# ══════════════════════════════════════════════════════════════════════════════
# 1  Wire protocol
#    Owns the messages of docs/protocol.md and their bytes. No I/O, no threads.
# ══════════════════════════════════════════════════════════════════════════════


class Stream(enum.IntEnum):
    """Which stream of a session some bytes belong to."""

    STDIN = 0
    STDOUT = 1
    STDERR = 2


STREAM_NAMES = {Stream.STDIN: "stdin", Stream.STDOUT: "stdout", Stream.STDERR: "stderr"}


class Reason(enum.StrEnum):
    """Why an ``error`` was sent: the ``reason`` field beside its ``message``.

    Version 1 peers ignore the field; agent_client maps it to an exit status.
    """

    BAD_MESSAGE = "bad_message"  # the message made no sense; sessions go on
    BAD_REQUEST = "bad_request"  # the same of what was to start a session: it has not begun
    UNKNOWN_SESSION = "unknown_session"
    DUPLICATE_SESSION = "duplicate_session"  # the first session goes on
    NOT_FOUND = "not_found"  # of a command: 127 for a shell
    NOT_EXECUTABLE = "not_executable"  # of a command: 126 for a shell
    START_FAILED = "start_failed"
    NO_MAIN_PROCESS = "no_main_process"
    LIFETIME_EXPIRED = "lifetime_expired"  # the platform is about to end the agent
    LIMIT = "limit"
    STDIN_OVERFLOW = "stdin_overflow"  # the command did not read what was sent
    OUTPUT_LOST = "output_lost"  # output that has been read could not be kept; the command is killed
    ID_TAKEN = "id_taken"  # by another detached command that runs
    NO_DETACHED_COMMAND = "no_detached_command"  # attach to one that is not there
    NO_SUCH_PATH = "no_such_path"  # of an archive
    NOT_A_DIRECTORY = "not_a_directory"  # the path that an archive is to be put into
    ARCHIVE_FAILED = "archive_failed"
    FORBIDDEN = "forbidden"  # by --allow-cmd, --no-exec or --read-only: it did not start
    READ_ONLY = "read_only"  # stdin or a signal, with --read-only; the session goes on
    UNAVAILABLE = "unavailable"  # statistics in an image without psutil


class MessageError(AgentError):
    """A message that makes no sense.

    Attributes:
        id: the session that the message named, "" if none could be read.
        reason: BAD_REQUEST if it was to start that session, which so has not begun.
    """

    def __init__(self, message: str, session_id: str = "") -> None:
        super().__init__(message)
        self.id = session_id
        self.reason = Reason.BAD_MESSAGE


@dataclasses.dataclass(frozen=True, slots=True)
class Exec:
    """Start a command as session ``id``. ``env`` holds ``K=V`` strings.

    Attributes:
        user: ``name``, ``uid``, ``name:group`` or ``uid:gid``; "" for the agent's own.
        width, height: the terminal's size from its first byte, 0 for the default.
        no_stdin: stdin is empty.
        window: version 2: bytes that the client holds unacknowledged.
        detach: version 2: the session ends with its start; the command lives on, see :class:`Attach`.
        secret, connection: version 2: see :class:`Resume`; the client may choose the secret.
    """

    id: str
    cmd: tuple[str, ...]
    env: tuple[str, ...] = ()
    workdir: str = ""
    tty: bool = False
    user: str = ""
    width: int = 0
    height: int = 0
    no_stdin: bool = False
    window: int = 0
    detach: bool = False
    secret: str = ""
    connection: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Attach:
    """Attach to the main process, or to a detached command: replay, then live output.

    Attributes:
        window: version 2: bytes that the client holds unacknowledged.
        session: version 2: the id of a detached command, "" for the main process.
        no_replay: version 2: only what is written from now on.
    """

    id: str
    window: int = 0
    session: str = ""
    no_replay: bool = False
    secret: str = ""
    connection: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Stdin:
    """Bytes for a session's stdin."""

    id: str
    data: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class CloseStdin:
    """End of a session's stdin."""

    id: str


@dataclasses.dataclass(frozen=True, slots=True)
class Signal:
    """A signal by name or number, see :func:`parse_signal`.

    Attributes:
        number: version 2: counts the session's signals, sizes and ends from 1, so that one that is sent again
            after an outage is known again; 0 for one that never is.
    """

    id: str
    signal: str
    number: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class End:
    """End a session as the end of its connection would: its whole process tree, or an attachment.

    An addition to version 1: a Go agent answers it with an error.

    Attributes:
        number: see :class:`Signal`.
        secret: version 2: reaches a session that this connection does not have, too.
    """

    id: str
    number: int = 0
    secret: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Resize:
    """The terminal's new size, in columns and rows; ``number`` as in :class:`Signal`."""

    id: str
    width: int
    height: int
    number: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Output:
    """Bytes that a session wrote.

    Attributes:
        lost: how many bytes of output are missing right before ``data``, because
            this attached client fell behind the replay log; ``data`` then is
            the agent's own notice about it, not the process's output.
    """

    id: str
    stream: Stream
    data: bytes
    lost: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Exit:
    """The end of a session: the command's code, 128+n when signal n ended it."""

    id: str
    code: int


@dataclasses.dataclass(frozen=True, slots=True)
class Error:
    """A session could not start, or a message made no sense."""

    id: str
    message: str
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class LifetimeExpired:
    """The platform is about to end this agent."""


@dataclasses.dataclass(frozen=True, slots=True)
class Started:
    """Version 2: the command runs.

    Attributes:
        secret: what a Resume must show.
        replay: attach: so many bytes of the output to come are from before.
    """

    id: str
    pid: int
    secret: str
    replay: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Ack:
    """Version 2: so many bytes of a session's output, or of its stdin, have been consumed.

    Attributes:
        heard: to the client: the highest ``number`` that has come.
    """

    id: str
    offset: int
    heard: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Resume:
    """Version 2: take a session over on this connection; the client has its output up to ``offset``.

    Attributes:
        acked: up to where the client has consumed that: the window is counted from here.
        connection: counts the client's connections. What comes late on an earlier one takes nothing over;
            0 for a client that does not count.
    """

    id: str
    secret: str
    offset: int
    window: int = 0
    acked: int = 0
    connection: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Resumed:
    """Version 2: output goes on from ``offset``; the agent has stdin up to ``stdin``.

    Attributes:
        closed: how many CloseStdin have come.
        heard: the highest ``number`` that has come.
    """

    id: str
    offset: int
    stdin: int
    closed: int = 0
    heard: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Lost:
    """Version 2: an attached client fell behind the replay log: these bytes are missing before ``offset``."""

    id: str
    offset: int
    bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Park:
    """Version 2, of a listener: who had the session has left it; keep it for the resume window."""

    id: str


@dataclasses.dataclass(frozen=True, slots=True)
class ArchiveGet:
    """Version 2: send the file or tree at ``path`` as a tar archive on stdout."""

    id: str
    path: str
    window: int = 0
    secret: str = ""
    connection: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class ArchivePut:
    """Version 2: unpack the tar archive that comes on stdin into the directory ``path``.

    Attributes:
        no_overwrite_dir_non_dir: refuse to put a file in a directory's place, and the reverse.
        no_owners: what is unpacked belongs to the agent's user, not to whom the archive names.
    """

    id: str
    path: str
    window: int = 0
    no_overwrite_dir_non_dir: bool = False
    no_owners: bool = False
    secret: str = ""
    connection: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class ArchiveStat:
    """Version 2: ask what is at ``path``."""

    id: str
    path: str


@dataclasses.dataclass(frozen=True, slots=True)
class PathStat:
    """Version 2: what is there, as Docker's X-Docker-Container-Path-Stat header has it, see :func:`stat_path`."""

    id: str
    stat: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class ListSessions:
    """Version 2: ask for a list of what runs. The answer has the same id, which may be empty."""

    id: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Sessions:
    """Version 2: what runs, see :meth:`SessionRegistry.describe_sessions`."""

    sessions: tuple[dict[str, Any], ...]
    id: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class GetStats:
    """Version 2: ask for statistics; with ``processes`` for a list of all processes, too."""

    id: str = ""
    processes: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Stats:
    """Version 2: statistics, see :func:`measure`."""

    stats: dict[str, Any]
    id: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class GetHealth:
    """Version 2: ask for what ``GET /health`` answers, where there is no such endpoint."""

    id: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Health:
    """Version 2: the answer to GetHealth, or without an id a change of health that nobody has asked for.

    Attributes:
        status: ``starting``, ``healthy`` or ``unhealthy``; "" without a health check.
        log: the output of the last check.
        state: what ``GET /health`` answers.
    """

    status: str
    log: str
    state: dict[str, Any]
    id: str = ""


# What is said to a session that runs.
ToSession = Stdin | CloseStdin | Signal | Resize | End | Ack
# What starts a session.
Opening = Exec | Attach | ArchiveGet | ArchivePut
# What is answered once, by an event with the same id or an Error.
Call = ListSessions | GetStats | GetHealth | ArchiveStat
Answer = Sessions | Stats | Health | PathStat
Request = Opening | ToSession | Resume | Park | Call
Event = Output | Exit | Error | LifetimeExpired | Started | Ack | Resumed | Lost | Answer
_T = TypeVar("_T")


class _Fields:
    """Typed access to one decoded JSON object; each refusal names the field."""

    def __init__(self, fields: dict[str, Any], kind: str, version: int = 1) -> None:
        self.fields = fields
        self.kind = kind
        self.version = version  # of the protocol: version 1 ignores what version 2 has added
        session_id = fields.get("id")
        self.id = session_id if isinstance(session_id, str) and _is_unicode(session_id) else ""

    def error(self, what: str) -> MessageError:
        return MessageError(f"{self.kind}: {what}", self.id)

    def _get(self, name: str, kind: type[_T], article: str, default: _T) -> _T:
        value = self.fields.get(name)
        if value is None:
            return default
        # bool is an int to isinstance(), but not to a Go peer.
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(f"field {name!r} must be {article}, not {_json_type(value)}")
        return value

    def text(self, name: str) -> str:
        return self._get(name, str, "a string", "")

    def readable(self, name: str) -> str:
        """A text for people: what has no UTF-8 encoding in it is replaced."""
        return self.text(name).encode("utf-8", "replace").decode()

    def boolean(self, name: str, default: bool = False) -> bool:
        return self._get(name, bool, "a boolean", default)

    def count(self, name: str) -> int:
        value = self.integer(name)
        if value < 0:
            raise self.error(f"field {name!r} must not be negative")
        return value

    def integer(self, name: str) -> int:
        return self._get(name, int, "an integer", 0)

    def strings(self, name: str) -> tuple[str, ...]:
        values = self._get(name, list, "an array of strings", [])
        for value in values:
            if not isinstance(value, str):
                raise self.error(f"field {name!r} must hold strings only, not {_json_type(value)}")
        return tuple(values)

    def object(self, name: str) -> dict[str, Any]:
        return self._get(name, dict, "an object", {})

    def objects(self, name: str) -> list[dict[str, Any]]:
        values = self._get(name, list, "an array of objects", [])
        if not all(isinstance(value, dict) for value in values):
            raise self.error(f"field {name!r} must hold objects only")
        return values

    def system_text(self, name: str, value: str) -> str:
        """Check a string that goes to execve(2): no NUL, and it has bytes."""
        if "\0" in value:
            raise self.error(f"field {name!r} contains a NUL character")
        try:
            value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise self.error(f"field {name!r} is not valid Unicode") from None
        return value

    def session_id(self) -> str:
        self.text("id")  # refuses another type, by name
        if not self.id:
            raise self.error("field 'id' is missing, empty or not valid Unicode")
        if len(self.id) > ID_LIMIT:
            length, self.id = len(self.id), ""
            raise self.error(f"field 'id' has {length} characters, and {ID_LIMIT} is the limit")
        return self.id

    def new_session_id(self) -> str:
        """The id of a session that is to be this connection's."""
        session_id = self.session_id()
        if self.version > 1 and (size := len(session_id.encode())) > ID_LIMIT_2:
            raise self.error(f"field 'id' has {size} bytes, and {ID_LIMIT_2} is the limit")
        return session_id

    def number(self) -> int:
        return self.count("number") if self.version > 1 else 0

    def any_secret(self) -> str:
        value = self.text("secret")
        if not _is_unicode(value):
            raise self.error("field 'secret' is not valid Unicode")
        return value

    def secret(self) -> str:
        """A secret that the client has chosen, "" for none."""
        value = self.any_secret() if self.version > 1 else ""
        if value and not _SECRET_MINIMUM <= len(value) <= ID_LIMIT:
            raise self.error(f"field 'secret' must have from {_SECRET_MINIMUM} to {ID_LIMIT} characters")
        return value

    def path(self) -> str:
        value = self.system_text("path", self.text("path"))
        if not value:
            raise self.error("field 'path' is missing or empty")
        return value

    def data(self) -> bytes:
        try:
            return binascii.a2b_base64(self.text("data"), strict_mode=True)
        except ValueError as exc:  # binascii.Error, or a non-ASCII string
            raise self.error(f"field 'data' is not valid base64: {exc}") from None


def _is_unicode(text: str) -> bool:
    """Tell whether ``text`` has a UTF-8 encoding; JSON can smuggle half surrogates."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _load(text: str, version: int) -> _Fields:
    try:
        fields = json.loads(text)
    except RecursionError:
        raise MessageError("message is nested too deeply") from None
    except ValueError as exc:
        raise MessageError(f"message is not valid JSON: {exc}") from None
    if not isinstance(fields, dict):
        raise MessageError(f"message must be a JSON object, not {_json_type(fields)}")
    kind = fields.get("type")
    if not isinstance(kind, str):
        raise _Fields(fields, "message").error("field 'type' is missing or not a string")
    return _Fields(fields, kind[:64], version)


def _decode_exec(fields: _Fields) -> Exec:
    session_id = fields.new_session_id()
    cmd = tuple(fields.system_text("cmd", item) for item in fields.strings("cmd"))
    env = tuple(fields.system_text("env", item) for item in fields.strings("env"))
    if not cmd or not cmd[0]:
        raise fields.error("field 'cmd' is missing or empty")
    for item in env:
        if item.find("=") < 1:
            raise fields.error(f"field 'env' must hold K=V strings, not {item[:80]!r}")
    workdir = fields.system_text("workdir", fields.text("workdir"))
    if fields.version == 1:
        return Exec(session_id, cmd, env, workdir, fields.boolean("tty"))
    width, height = fields.integer("width"), fields.integer("height")
    for name, value in (("width", width), ("height", height)):
        if not 0 <= value <= 0xFFFF:
            raise fields.error(f"field {name!r} must be from 0 to 65535, not {value}")
    return Exec(
        session_id,
        cmd,
        env,
        workdir,
        fields.boolean("tty"),
        fields.system_text("user", fields.text("user")),
        width,
        height,
        not fields.boolean("stdin", True),
        fields.count("window"),
        fields.boolean("detach"),
        secret=fields.secret(),
        connection=fields.count("connection"),
    )


def _decode_attach(fields: _Fields) -> Attach:
    session_id = fields.new_session_id()
    if fields.version == 1:
        return Attach(session_id)
    return Attach(
        session_id,
        fields.count("window"),
        fields.text("session"),
        not fields.boolean("replay", True),
        secret=fields.secret(),
        connection=fields.count("connection"),
    )


def _decode_signal(fields: _Fields) -> Signal:
    session_id = fields.session_id()
    name = fields.fields.get("signal")
    if type(name) is int:  # lenient: a number where a string is specified
        name = str(name)
    if not isinstance(name, str) or not name:
        raise fields.error("field 'signal' is missing or not a string")
    return Signal(session_id, name, fields.number())


def _decode_resize(fields: _Fields) -> Resize:
    session_id = fields.session_id()
    width, height = fields.integer("width"), fields.integer("height")
    for name, value in (("width", width), ("height", height)):
        if not 0 < value <= 0xFFFF:  # struct winsize holds unsigned shorts
            raise fields.error(f"field {name!r} must be from 1 to 65535, not {value}")
    return Resize(session_id, width, height, fields.number())


def _decode_resume(fields: _Fields) -> Resume:
    session_id, offset = fields.new_session_id(), fields.count("offset")
    acked = offset if fields.fields.get("acked") is None else fields.count("acked")
    return Resume(session_id, fields.any_secret(), offset, fields.count("window"), acked, fields.count("connection"))


_REQUESTS: dict[str, Callable[[_Fields], Request]] = {
    "exec": _decode_exec,
    "attach": _decode_attach,
    "stdin": lambda fields: Stdin(fields.session_id(), fields.data()),
    "close_stdin": lambda fields: CloseStdin(fields.session_id()),
    "end": lambda fields: End(fields.session_id(), fields.number(), fields.secret()),
    "signal": _decode_signal,
    "resize": _decode_resize,
}

_REQUESTS_2: dict[str, Callable[[_Fields], Request]] = {
    **_REQUESTS,
    "ack": lambda fields: Ack(fields.session_id(), fields.count("offset")),
    "resume": _decode_resume,
    "park": lambda fields: Park(fields.session_id()),
    "sessions": lambda fields: ListSessions(fields.id),
    "stats": lambda fields: GetStats(fields.id, fields.boolean("processes")),
    "health": lambda fields: GetHealth(fields.id),
    "archive_get": lambda fields: ArchiveGet(
        fields.new_session_id(),
        fields.path(),
        fields.count("window"),
        secret=fields.secret(),
        connection=fields.count("connection"),
    ),
    "archive_put": lambda fields: ArchivePut(
        fields.new_session_id(),
        fields.path(),
        fields.count("window"),
        fields.boolean("no_overwrite_dir_non_dir"),
        fields.boolean("no_owners"),
        secret=fields.secret(),
        connection=fields.count("connection"),
    ),
    "archive_stat": lambda fields: ArchiveStat(fields.session_id(), fields.path()),
}

_EVENTS: dict[str, Callable[[_Fields], Event]] = {
    "stdout": lambda fields: Output(fields.session_id(), Stream.STDOUT, fields.data(), fields.integer("lost")),
    "stderr": lambda fields: Output(fields.session_id(), Stream.STDERR, fields.data(), fields.integer("lost")),
    "exit": lambda fields: Exit(fields.session_id(), fields.integer("code")),
    "error": lambda fields: Error(fields.id, fields.readable("message"), fields.text("reason")),
    "lifetime_expired": lambda fields: LifetimeExpired(),
}

_EVENTS_2: dict[str, Callable[[_Fields], Event]] = {
    **_EVENTS,
    "started": lambda fields: Started(
        fields.session_id(), fields.integer("pid"), fields.text("secret"), fields.count("replay")
    ),
    "ack": lambda fields: Ack(fields.session_id(), fields.count("offset"), fields.count("heard")),
    "resumed": lambda fields: Resumed(
        fields.session_id(),
        fields.count("offset"),
        fields.count("stdin"),
        fields.count("closed"),
        fields.count("heard"),
    ),
    "lost": lambda fields: Lost(fields.session_id(), fields.count("offset"), fields.count("bytes")),
    "sessions": lambda fields: Sessions(tuple(fields.objects("sessions")), fields.id),
    "stats": lambda fields: Stats(fields.object("stats"), fields.id),
    "health": lambda fields: Health(fields.text("status"), fields.text("log"), fields.object("state"), fields.id),
    "archive_stat": lambda fields: PathStat(fields.session_id(), fields.object("stat")),
}


_OPENING_KINDS = ("exec", "attach", "archive_get", "archive_put")


def decode_request(text: str, version: int = 1) -> Request:
    """Decode what a client sent to an agent.

    Raises:
        MessageError: if the message makes no sense; says which field, and why.
    """
    fields = _load(text, version)
    decode = (_REQUESTS if version == 1 else _REQUESTS_2).get(fields.kind)
    if decode is None:
        raise MessageError(f"unknown message type {fields.kind!r}", fields.id)
    try:
        return decode(fields)
    except MessageError as exc:
        if fields.kind in _OPENING_KINDS:
            exc.reason = Reason.BAD_REQUEST
        raise


def decode_event(text: str, version: int = 1) -> Event | None:
    """Decode what an agent sent to a client; None for a type that is not known.

    Raises:
        MessageError: if the message makes no sense; says which field, and why.
    """
    fields = _load(text, version)
    decode = (_EVENTS if version == 1 else _EVENTS_2).get(fields.kind)
    return decode(fields) if decode is not None else None


_TYPE_NAMES: dict[type, str] = {
    Exec: "exec",
    Attach: "attach",
    CloseStdin: "close_stdin",
    End: "end",
    Signal: "signal",
    Resize: "resize",
    Exit: "exit",
    Error: "error",
    LifetimeExpired: "lifetime_expired",
    Started: "started",
    Ack: "ack",
    Resume: "resume",
    Resumed: "resumed",
    Lost: "lost",
    Park: "park",
    ArchiveGet: "archive_get",
    ArchivePut: "archive_put",
    ArchiveStat: "archive_stat",
    PathStat: "archive_stat",
    ListSessions: "sessions",
    Sessions: "sessions",
    GetStats: "stats",
    Stats: "stats",
    GetHealth: "health",
    Health: "health",
}
# Fields that a peer must see even when they hold their zero value.
_ALWAYS = frozenset(
    {"id", "code", "cmd", "message", "signal", "offset", "acked", "stdin", "sessions", "stats", "status"}
)
_SECRET_MINIMUM = 16  # characters of a secret that a client chooses
# Those that are true unless said otherwise: the attribute, and the field that is its opposite.
_UNLESS = {"no_stdin": "stdin", "no_replay": "replay"}


def encode(message: Request | Event) -> bytes:
    """Encode one message as the JSON object of a text frame."""
    if isinstance(message, Stdin | Output):
        stream = Stream.STDIN if isinstance(message, Stdin) else message.stream
        body = b"".join(encode_data(data_prefix(stream, message.id), message.data))
        if isinstance(message, Output) and message.lost:
            body = body[:-1] + b',"lost":%d}' % message.lost
        return body
    fields: dict[str, object] = {"type": _TYPE_NAMES[type(message)]}
    for field in dataclasses.fields(message):
        value = getattr(message, field.name)
        if field.name in _UNLESS:
            if value:
                fields[_UNLESS[field.name]] = False
        elif value or field.name in _ALWAYS or (field.name in ("width", "height") and isinstance(message, Resize)):
            fields[field.name] = value
    if not fields.get("id", "-"):
        del fields["id"]  # connection-level: absent, not empty
    return json.dumps(fields, separators=(",", ":")).encode()


def data_prefix(stream: Stream, session_id: str) -> bytes:
    """What stands before the base64 text in every data message of a stream."""
    return b'{"type":"%s","id":%s,"data":"' % (STREAM_NAMES[stream].encode(), json.dumps(session_id).encode())


def encode_data(prefix: bytes, data: BytesLike) -> list[bytes]:
    """Encode a data message as buffers to be sent one after the other."""
    return [prefix, binascii.b2a_base64(data, newline=False), b'"}']


SUBPROTOCOL = Subprotocol("sockerless-agent.v2")
INSTANCE_HEADER = (
    "Sockerless-Agent-Instance"  # of the agent's half of the handshake: another one has no session of ours
)


def data_frame_prefix(stream: Stream, session_id: str) -> bytes:
    """What stands before the bytes in every binary frame of a stream, version 2.

    Raises:
        ValueError: if the id has more than 255 bytes.
    """
    encoded = session_id.encode()
    return bytes((stream, len(encoded))) + encoded


def decode_data_frame(frame: bytes) -> tuple[Stream, str, memoryview]:
    """Decode a binary frame of version 2: its stream, session id and bytes, which are not copied.

    Raises:
        MessageError: if it makes no sense.
    """
    try:
        stream, length = Stream(frame[0]), frame[1]
        session_id = frame[2 : 2 + length].decode()
    except (ValueError, IndexError):
        raise MessageError("data frame: no stream, or an id that is not UTF-8") from None
    if not length or len(frame) < 2 + length:
        raise MessageError("data frame: the id is missing or cut off")
    return stream, session_id, memoryview(frame)[2 + length :]


def frame_header(opcode: int, length: int, mask: bytes = b"") -> bytes:
    """The header of an unfragmented WebSocket frame (RFC 6455 §5.2).

    Args:
        mask: the masking key if the sender is the client, else empty.
    """
    first, masked = 0x80 | opcode, 0x80 if mask else 0
    if length < 126:
        return struct.pack("!BB", first, masked | length) + mask
    if length < 65536:
        return struct.pack("!BBH", first, masked | 126, length) + mask
    return struct.pack("!BBQ", first, masked | 127, length) + mask


def make_frame(opcode: int, payload: Sequence[BytesLike], masked: bool) -> list[BytesLike]:
    """A whole frame as buffers to be sent one after the other.

    The library's Frame.serialize() copies the payload twice; here an unmasked
    one is not copied at all, a client's once for the mask that RFC 6455 §5.3
    asks of it.
    """
    if not masked:
        return [frame_header(opcode, sum(map(len, payload))), *payload]
    key = secrets.token_bytes(4)
    data = apply_mask(payload[0] if len(payload) == 1 else b"".join(payload), key)
    return [frame_header(opcode, len(data), key), data]


ID_LIMIT = 4096  # characters in a session id
ID_LIMIT_2 = 255  # bytes in one of version 2: its data frames hold no more
_REALTIME = re.compile(r"SIGRT(MIN|MAX)([+-]\d{1,2})?")


def parse_signal(text: str) -> int:
    """The number of a signal given as ``SIGTERM``, ``TERM``, ``term``, ``RTMIN+3`` or ``15``.

    Raises:
        ValueError: if the platform has no such signal.
    """
    name = text.strip().upper()
    if name.isascii() and name.isdigit() and len(name) < 4:
        number = int(name)
    else:
        name = name if name.startswith("SIG") else f"SIG{name}"
        realtime = _REALTIME.fullmatch(name)
        if realtime is not None:
            number = signal.Signals[f"SIGRT{realtime[1]}"] + int(realtime[2] or 0)
        else:
            number = signal.Signals.__members__.get(name, 0)
    if number not in signal.valid_signals():
        raise ValueError(f"unknown signal {text[:80]!r}")
    return int(number)


# ══════════════════════════════════════════════════════════════════════════════
# 2  Configuration
#    Owns Config, made once before any thread starts and never changed; the log
#    format; and the secrets, which reach no log, child or process listing.
# ══════════════════════════════════════════════════════════════════════════════

TOKEN_FILE_LIMIT = 64 << 10  # characters
ENV_PREFIX = "SOCKERLESS_AGENT_"
SECRET_VARIABLES = ("SOCKERLESS_AGENT_TOKEN", "SOCKERLESS_CALLBACK_URL", "SOCKERLESS_AGENT_CALLBACK")
PID_FILE = "/tmp/.sockerless-mainpid"
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # as Docker has it


class ConfigError(AgentError):
    """A flag or environment variable that makes no sense: exit code 2."""


@dataclasses.dataclass(frozen=True, slots=True)
class Address:
    """Where to listen: a host ("" for every interface) and port, or a unix socket's path."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the address."""
        return bool(self.path) or self.host == "localhost" or self.host.startswith("127.") or self.host == "::1"


@dataclasses.dataclass(frozen=True, slots=True)
class Callback:
    """Where reverse mode dials: a ``ws:`` or ``wss:`` URL, whose query holds secrets."""

    url: str = dataclasses.field(default="", repr=False)
    given: str = dataclasses.field(default="", repr=False)  # as it stands in a flag or variable

    def __bool__(self) -> bool:
        return bool(self.url)

    def __str__(self) -> str:
        """The URL without its query, and without a password."""
        parts = urllib.parse.urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    @property
    def secure(self) -> bool:
        return self.url.startswith("wss:")

    def secrets(self) -> list[str]:
        """What no log may show: the query, its values, and a password, as they are and decoded."""
        parts = urllib.parse.urlsplit(self.url)
        values = [pair.partition("=")[2] for pair in parts.query.split("&")]
        hidden = [parts.query, *values, parts.password or ""]
        hidden += [urllib.parse.unquote_plus(value) for value in hidden]
        return [secret for secret in hidden if len(secret) >= 4]  # less would only garble the log

    def with_session_id(self, container_id: str) -> Callback:
        """With ``session_id`` in the query if it has none; what is there stays, byte for byte."""
        head, _, query = self.url.partition("?")
        if not container_id or any(pair.partition("=")[0] == "session_id" for pair in query.split("&")):
            return self
        joint = "&" if query else ""
        session_id = urllib.parse.quote(container_id, safe="")
        return Callback(f"{head}?{query}{joint}session_id={session_id}", self.given)


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """Everything that flags and environment decide. Times in seconds, sizes in bytes."""

    addr: Address = Address(port=9111)
    probe: bool = False
    keep_alive: bool = False
    command: tuple[str, ...] = ()
    callback: Callback = Callback()
    callback_retries: int = 10
    callback_ca: str = ""
    callback_cert: str = ""
    callback_key: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    lifetime: float = 0.0
    lifetime_margin: float = 5.0
    lifetime_signal: int = 0
    tty: bool = False
    copy_output: bool = True
    exit_with_main: bool = False
    init: str = "auto"
    subreaper: bool = False
    signal_group: bool = False
    exit_codes: Mapping[int, int] = dataclasses.field(default_factory=dict)
    stop_signal: int = int(signal.SIGTERM)
    stop_timeout: float = 10.0
    drain_timeout: float = 1.0
    kill_timeout: float = 2.0
    replay_size: int = 1 << 20
    pid_file: str = PID_FILE
    log_level: str = "info"
    log_format: str = "text"
    audit_log: str = ""
    tokens: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    token_file: str = ""
    allow_cmd: tuple[str, ...] = ()
    no_exec: bool = False
    read_only: bool = False
    health_cmd: str = ""
    health_interval: float = 30.0
    health_timeout: float = 30.0
    health_retries: int = 3
    health_start_period: float = 0.0
    max_message_size: int = 16 << 20
    max_sessions: int = 1024
    max_total_sessions: int = 4096
    stdin_limit: int = 256 << 20
    resume_window: float = 60.0
    ping_interval: float = 20.0
    ping_timeout: float = 60.0

    @property
    def reloadable(self) -> bool:
        """Whether there is something that SIGHUP reloads."""
        return bool(self.tls_cert or self.token_file)


_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:ns|us|µs|ms|s|m|h)")
_LONGEST = 2**63 / 1e9  # seconds: Go's time.Duration ends there, and so does what threading can wait for


def parse_duration(text: str) -> float:
    """Seconds in a duration as Go and Docker write it: ``500ms``, ``1m30s``, ``0``.

    Raises:
        ValueError: if it is none.
    """
    if text == "0":
        return 0.0
    parts = _DURATION.findall(text)
    if not parts or "".join(parts) != text:
        hint = f" (did you mean {text}s?)" if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) else ""
        raise ValueError(f"not a duration such as 500ms, 10s or 1m30s: {text!r}{hint}")
    seconds = sum(float(part.rstrip("nuµmsh")) * _UNITS[part.lstrip("0123456789.")] for part in parts)
    if seconds >= _LONGEST:
        raise ValueError(f"a duration of more than 2562047h: {text!r}")
    return seconds


def parse_size(text: str) -> int:
    """Bytes in a size such as ``65536``, ``64k`` or ``1MiB``; units are powers of 1024.

    Raises:
        ValueError: if it is none.
    """
    match = re.fullmatch(r"(\d{1,15})([kmg]?)(i?b)?", text.strip().lower())
    if match is None:
        raise ValueError(f"not a size such as 65536, 64k or 1MiB: {text!r}")
    return int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[match[2]]


def parse_address(text: str) -> Address:
    """A listen address: ``:9111``, ``host:port``, ``[::1]:port`` or ``unix:/path``.

    Raises:
        ValueError: if it is none.
    """
    if "://" in text:
        raise ValueError(f"a URL, where host:port or unix:/path is wanted: {text!r}")
    if text.startswith("unix:"):
        if len(text) == len("unix:"):
            raise ValueError("unix: needs a path, such as unix:/run/agent.sock")
        return Address(path=text.removeprefix("unix:"))
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"an IPv6 address needs brackets, as in [::1]:9111: {text!r}")
    if not colon or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError(f"not an address such as :9111, host:9111 or [::1]:9111: {text!r}")
    return Address(host=host, port=int(port))


def parse_callback(text: str) -> Callback:
    """A callback URL: ``http:``, ``https:``, ``ws:`` or ``wss:``. Its text is in no error: it holds secrets.

    Raises:
        ValueError: if it is none.
    """
    scheme, colon, rest = text.partition(":")
    scheme = {"http": "ws", "https": "wss"}.get(scheme.lower(), scheme.lower())
    if not colon or scheme not in ("ws", "wss"):
        raise ValueError("not a URL that starts with http:, https:, ws: or wss:")
    url = f"{scheme}:{rest}"
    try:
        parse_uri(url)
    except InvalidURI:
        raise ValueError("not a valid URL: it needs a host, and may have no fragment") from None
    except ValueError:
        raise ValueError("not a valid URL") from None
    return Callback(url, text)


def _parse_programs(text: str) -> tuple[str, ...]:
    programs = tuple(part.strip() for part in text.split(",") if part.strip())
    for program in programs:
        # A bare name would be looked up in a PATH, and somebody may come to write there.
        if not program.startswith("/") or program.endswith("/"):
            raise ValueError(f"must be absolute paths of programs, not {program!r}")
    if not programs:
        raise ValueError("names no program")
    names = [os.path.basename(program) for program in programs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two programs are called {name!r}")
    return programs


def _parse_boolean(text: str) -> bool:
    # strconv.ParseBool's words, since `-keep-alive=true` is Go's spelling.
    if text.lower() in ("1", "t", "true"):
        return True
    if text.lower() in ("0", "f", "false", ""):
        return False
    raise ValueError(f"must be true or false, not {text!r}")


def _parse_count(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise ValueError(f"must be a whole number of 1 or more, not {text!r}")
    return int(text)


def _parse_whole_number(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"must be a whole number of 0 or more, not {text!r}")
    return int(text)


def _parse_positive_duration(text: str) -> float:
    seconds = parse_duration(text)
    if seconds <= 0:
        raise ValueError(f"must be longer than 0, not {text!r}")
    return seconds


def _parse_positive_size(text: str) -> int:
    size = parse_size(text)
    if size <= 0:
        raise ValueError(f"must be more than 0, not {text!r}")
    return size


def _check_file(path: str) -> str:
    if path:
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError as exc:
            raise ValueError(f"cannot read {path!r}: {exc.strerror}") from None
    return path


def parse_exit_codes(text: str) -> dict[int, int]:
    """Exit codes to be replaced, such as ``143:0,130:1``; ``143`` alone is replaced by 0, as by ``tini -e``.

    Raises:
        ValueError: if it is none.
    """
    codes = {}
    for pair in text.split(","):
        code, colon, replacement = pair.strip().partition(":")
        numbers = [code, replacement if colon else "0"]
        if not all(number.isascii() and number.isdigit() and int(number) < 256 for number in numbers):
            raise ValueError(f"must be codes from 0 to 255 such as 143:0,130:0, not {text!r}")
        codes[int(code)] = int(numbers[1])
    return codes


def _parse_stop_signal(text: str) -> int:
    number = parse_signal(text)
    if number not in PASSED_SIGNALS:
        raise ValueError(f"cannot be used to stop: {text!r}")
    return number


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"must be one of {', '.join(words)}, not {text!r}")
        return text

    return parse


def read_token_file(path: str) -> tuple[str, ...]:
    """The tokens in a file, one a line.

    Raises:
        ValueError: if there are none, or one cannot be one. Shows nothing of them.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(TOKEN_FILE_LIMIT + 1)
    except (OSError, UnicodeDecodeError) as exc:
        raise ValueError(f"cannot read {path!r}: {getattr(exc, 'strerror', None) or exc}") from None
    tokens = tuple(line.strip() for line in text.split("\n") if line.strip())
    if not tokens:
        raise ValueError(f"{path!r} is empty")
    if len(text) > TOKEN_FILE_LIMIT:
        raise ValueError(f"{path!r} has more than {TOKEN_FILE_LIMIT >> 10} KiB")
    _check_tokens(tokens)
    return tokens


def _check_tokens(tokens: Iterable[str]) -> None:
    if any(not char.isprintable() or char == " " for token in tokens for char in token):
        raise ValueError("the bearer token contains white space or a control character")


class Tokens:
    """The bearer tokens that are good: several, so that one can replace another while both are in use.

    Replaced as a whole by reload(); any thread may ask meanwhile.
    """

    def __init__(self, tokens: Sequence[str], path: str = "") -> None:
        """``path`` is the file that reload() reads, if there is one."""
        self._path = path
        self._key = secrets.token_bytes(32)
        self.first = tokens[0] if tokens else ""
        """What this side shows where it dials."""
        self._digests = self._digest(tokens)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def reload(self) -> tuple[str, ...]:
        """Read the file again, and return what it has; what was good before stays so if that fails.

        Raises:
            ValueError: if it cannot be read or used.
        """
        tokens = read_token_file(self._path)
        self._digests = self._digest(tokens)
        self.first = tokens[0]
        return tokens

    def accept(self, given: bytes) -> bool:
        """Whether a token is one of them; takes as long for each, whatever they have in common."""
        digest = hmac.digest(self._key, given, "sha256")  # of one length, so that the comparison tells none either
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        return found

    def _digest(self, tokens: Iterable[str]) -> tuple[bytes, ...]:
        return tuple(hmac.digest(self._key, token.encode("utf-8", "surrogateescape"), "sha256") for token in tokens)


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One flag, its environment variable and the Config field that both set."""

    name: str
    parse: Callable[[str], object]
    metavar: str  # "" for a boolean
    help: str
    field: str = ""

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.name.upper().replace("-", "_")

    @property
    def target(self) -> str:
        return self.field or self.name.replace("-", "_")


OPTIONS = (
    Option("addr", parse_address, "ADDR",
           "listen on ADDR: :9111, host:port, [::1]:port, unix:/path; port 0 picks one (default: :9111)"),
    Option("probe", _parse_boolean, "", "ask the agent at ADDR for its health; exit code 0 if that is good, else 1"),
    Option("callback", parse_callback, "URL",
           "reverse mode: dial this URL (http, https, ws, wss) instead of listening; also SOCKERLESS_CALLBACK_URL"),
    Option("callback-retries", _parse_whole_number, "N",
           "failed tries in a row after which reverse mode gives up; 0 for never (default: 10)"),
    Option("callback-ca", _check_file, "PATH", "trust the certificates in PATH (PEM) for the callback, and no others"),
    Option("callback-cert", _check_file, "PATH", "show the callback the certificate in PATH (PEM, with its chain)"),
    Option("callback-key", _check_file, "PATH", "its private key (default: in the same file)"),
    Option("tls-cert", _check_file, "PATH",
           "speak TLS, with the certificate in PATH (PEM, with its chain); SIGHUP reloads it"),
    Option("tls-key", _check_file, "PATH", "its private key (default: in the same file)"),
    Option("tls-client-ca", _check_file, "PATH",
           "/ws and /metrics are for clients with a certificate that one in PATH (PEM) has issued; SIGHUP reloads it"),
    Option("lifetime", _parse_positive_duration, "DURATION",
           "how long the platform lets the agent live: clients are told before it ends"),
    Option("lifetime-margin", parse_duration, "DURATION", "how long before its end they are told (default: 5s)"),
    Option("lifetime-signal", _parse_stop_signal, "SIGNAL", "tell them when this signal arrives, too, such as TERM"),
    Option("keep-alive", _parse_boolean, "", "run the remaining arguments (default: /bin/sh) as the main process"),
    Option("tty", _parse_boolean, "", "give the main process a terminal"),
    Option("copy-output", _parse_boolean, "", "copy the main process's output to the agent's own (default: true)"),
    Option("exit-with-main", _parse_boolean, "", "end with the main process, and with its exit code"),
    Option("init", _one_of("auto", "on", "off"), "MODE",
           "wait for orphans: auto as PID 1, on always (as a subreaper), off never (default: auto)"),
    Option("subreaper", _parse_boolean, "", "adopt orphans when not PID 1, as --init=on does"),
    Option("signal-group", _parse_boolean, "", "pass signals on to the main process's group, not to it alone"),
    Option("exit-codes", parse_exit_codes, "LIST", "main process's exit codes to be replaced, such as 143:0,130:0"),
    Option("stop-signal", _parse_stop_signal, "SIGNAL",
           "what the main process is sent when the agent gets this or SIGTERM (default: TERM)"),
    Option("stop-timeout", parse_duration, "DURATION",
           "from the stop signal to SIGKILL for the main process (default: 10s)"),
    Option("drain-timeout", parse_duration, "DURATION",
           "how long output must be quiet after a command has ended while its background children hold the pipe "
           "(default: 1s)"),
    Option("kill-timeout", parse_duration, "DURATION",
           "from SIGHUP to SIGKILL for the commands of a closed connection (default: 2s)"),
    Option("replay-size", parse_size, "SIZE", "how much output of the main process attach replays (default: 1MiB)"),
    Option("pid-file", str, "PATH",
           f"where the main process's PID is written; empty for nowhere (default: {PID_FILE})"),
    Option("log-level", _one_of("debug", "info", "warn", "error"), "LEVEL",
           "debug, info, warn or error (default: info)"),
    Option("log-format", _one_of("text", "json"), "FORMAT", "text or json (default: text)"),
    Option("audit-log", str, "PATH",
           "append who ran what, when and how it ended to PATH, one JSON object a line; - for stderr"),
    Option("token-file", read_token_file, "PATH",
           "read the bearer tokens from PATH, one a line; SIGHUP reads them again; or set SOCKERLESS_AGENT_TOKEN",
           field="tokens"),
    Option("allow-cmd", _parse_programs, "LIST",
           "exec may start these programs only, such as /bin/df,/bin/ls; without env and user, and no files are put"),
    Option("no-exec", _parse_boolean, "", "no commands and no files: attach, and questions about what runs"),
    Option("read-only", _parse_boolean, "", "look only: no commands, no stdin or signals, no files are put"),
    Option("health-cmd", str, "COMMAND", "check health with this shell command, as Docker's HEALTHCHECK does"),
    Option("health-interval", _parse_positive_duration, "DURATION", "time between two checks (default: 30s)"),
    Option("health-timeout", _parse_positive_duration, "DURATION", "how long a check may take (default: 30s)"),
    Option("health-retries", _parse_count, "N", "failures in a row that mean unhealthy (default: 3)"),
    Option("health-start-period", parse_duration, "DURATION", "failures in this time do not count (default: 0s)"),
    Option("max-message-size", _parse_positive_size, "SIZE", "largest message that is accepted (default: 16MiB)"),
    Option("max-sessions", _parse_count, "N", "sessions on one connection (default: 1024)"),
    Option("max-total-sessions", _parse_count, "N", "sessions on all connections (default: 4096)"),
    Option("stdin-limit", parse_size, "SIZE", "stdin that may wait for one command to read it (default: 256MiB)"),
    Option("resume-window", parse_duration, "DURATION",
           "how long a session outlives its connection, for a client that can resume it (default: 60s)"),
    Option("ping-interval", _parse_positive_duration, "DURATION", "time between two pings (default: 20s)"),
    Option("ping-timeout", _parse_positive_duration, "DURATION",
           "silence, at the TCP level too, after which a peer counts as gone (default: 60s)"),
)  # fmt: skip


# The suites of TLS 1.2 that have forward secrecy and authenticated encryption; all of TLS 1.3 do.
TLS_1_2_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


def _prepare_tls(context: ssl.SSLContext) -> None:
    """What both sides want: nothing older than TLS 1.2, and no compression or renegotiation."""
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(TLS_1_2_CIPHERS)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])


def _load_authorities(context: ssl.SSLContext, path: str) -> None:
    try:
        context.load_verify_locations(path)
    except ssl.SSLError:
        raise ValueError(f"{path!r} holds no PEM certificate") from None
    except OSError as exc:
        raise ValueError(f"cannot read {path!r}: {exc.strerror}") from None


def _load_certificate(context: ssl.SSLContext, cert: str, key: str) -> None:
    def refuse_to_ask() -> str:  # OpenSSL would prompt on the terminal
        raise ValueError(f"the private key in {key or cert!r} has a passphrase, which nobody could type")

    for path in (cert, key or cert):
        try:
            open(path, "rb").close()
        except OSError as exc:
            raise ValueError(f"cannot read {path!r}: {exc.strerror}") from None
    try:
        context.load_cert_chain(cert, key or None, password=refuse_to_ask)
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"the private key in {key or cert!r} is not that of the certificate in {cert!r}") from None
        _load_authorities(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), cert)  # raises if it is the certificate
        why = exc.reason.lower().replace("_", " ") if exc.reason else "no PEM private key there"
        raise ValueError(f"cannot use the private key in {key or cert!r}: {why}") from None


def make_client_tls(ca: str = "", cert: str = "", key: str = "") -> ssl.SSLContext:
    """TLS for a connection that this side opens; the server's name is checked.

    Args:
        ca: a file of certificates to trust; "" for those that the system does.
        cert: a file with this side's certificate and its chain; "" for none.
        key: a file with its private key; "" if that is in ``cert``.

    Raises:
        ValueError: if a file cannot be read or used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _prepare_tls(context)
    if ca:
        _load_authorities(context, ca)
    else:
        context.load_default_certs()
    if cert:
        _load_certificate(context, cert, key)
    return context


class ServerTLS:
    """The certificate of a server and whose certificates clients must have: files, that are read again by reload().

    A client without a certificate is let in by TLS, so that it can be told in HTTP what it lacks, and may ask for
    /health; see has_certificate(). One that cannot be verified is not.
    """

    def __init__(self, cert: str, key: str = "", client_ca: str = "") -> None:
        """Arguments are paths of PEM files; "" as ``key`` if it is in ``cert``, as ``client_ca`` for everybody.

        Raises:
            ValueError: if a file cannot be read or used.
        """
        self._paths = (cert, key, client_ca)
        self.wants_certificate = bool(client_ca)
        self.context = self._load()
        """For the next connection. Replaced, never changed: connections that exist keep theirs."""

    def reload(self) -> None:
        """Read the files again. What was read before stays in use if that fails.

        Raises:
            ValueError: if a file cannot be read or used.
        """
        self.context = self._load()

    def _load(self) -> ssl.SSLContext:
        cert, key, client_ca = self._paths
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        _prepare_tls(context)
        # No resumption: connections are few and long, and a ticket would outlive the certificates that it stands for.
        context.num_tickets = 0
        context.options |= ssl.OP_NO_TICKET
        _load_certificate(context, cert, key)
        if client_ca:
            _load_authorities(context, client_ca)
            context.verify_mode = ssl.CERT_OPTIONAL
        return context


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _make_parser() -> _Parser:
    parser = _Parser(
        prog="sockerless-agent",
        usage="sockerless-agent [flags] [--keep-alive [--] command ...]",
        description="Run commands in a container over one WebSocket.",
        epilog="Flags may be written -flag or --flag; each can also be set in the environment as "
        "SOCKERLESS_AGENT_FLAG, such as SOCKERLESS_AGENT_LOG_LEVEL. Durations are written 500ms, 10s, 1m30s, "
        "sizes 65536, 64k, 1MiB. The bearer token is read from SOCKERLESS_AGENT_TOKEN or --token-file.",
        allow_abbrev=False,
    )
    for option in OPTIONS:
        help_text = option.help.replace("%", "%%")
        names = (f"-{option.name}", f"--{option.name}")
        if option.metavar:
            parser.add_argument(*names, metavar=option.metavar, help=help_text, dest=option.name)
        else:
            parser.add_argument(*names, nargs="?", const="true", metavar="BOOL", help=help_text, dest=option.name)
    parser.add_argument("-version", "--version", action="version", version=f"sockerless-agent {__version__}")
    return parser


def _split_command(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split flags from the main process's command as Go's flag package does.

    Flags end at ``--`` or at the first word that is neither a flag nor the
    value of one.
    """
    takes_value = {option.name for option in OPTIONS if option.metavar}
    flags: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            return flags, words
        if not word.startswith("-") or word == "-":
            return flags, [word, *words]
        if word.lstrip("-") in takes_value and words:
            # Joined, so that argparse takes a value that starts with a dash.
            word = f"{word}={words.pop(0)}"
        flags.append(word)
    return flags, []


def load_config(argv: Sequence[str], environ: Mapping[str, str]) -> Config:
    """Make the Config of a command line and an environment; flags win.

    Raises:
        ConfigError: if a flag or variable makes no sense; names it.
        SystemExit: for --help and --version.
    """
    flags, command = _split_command(argv)
    given = vars(_make_parser().parse_args(flags))
    token = environ.get("SOCKERLESS_AGENT_TOKEN", "")
    values: dict[str, Any] = {"tokens": (token,) if token else ()}
    for option in OPTIONS:
        text, source = given[option.name], f"flag --{option.name}"
        if text is None:
            text, source = environ.get(option.variable), f"environment variable {option.variable}"
        if text is None or (text == "" and source.startswith("env") and option.name != "pid-file"):
            continue
        try:
            values[option.target] = option.parse(text)
        except ValueError as exc:
            raise ConfigError(f"{source}: {exc}") from None
        if option.name == "token-file":
            values["token_file"] = text
    if "callback" not in values and environ.get("SOCKERLESS_CALLBACK_URL"):
        try:
            values["callback"] = parse_callback(environ["SOCKERLESS_CALLBACK_URL"])
        except ValueError as exc:
            raise ConfigError(f"environment variable SOCKERLESS_CALLBACK_URL: {exc}") from None
    if "callback" in values:
        values["callback"] = values["callback"].with_session_id(environ.get("SOCKERLESS_CONTAINER_ID", ""))
    config = Config(**values, command=tuple(command))
    _check_tls(config)
    if config.probe:
        if not config.addr.path and not config.addr.port:
            raise ConfigError("flag --probe: --addr has no port to ask at")
        return config
    if command and not config.keep_alive:
        raise ConfigError(f"a command ({command[0]!r}) needs --keep-alive in front of it")
    if config.keep_alive and not config.command:
        config = dataclasses.replace(config, command=("/bin/sh",))
    if config.subreaper and config.init == "off":
        raise ConfigError("flag --subreaper: it adopts orphans, and --init=off does not wait for them")
    if config.lifetime and config.lifetime <= config.lifetime_margin:
        raise ConfigError(f"flag --lifetime: {config.lifetime:g} s are not longer than the margin, "
                          f"--lifetime-margin: {config.lifetime_margin:g} s")  # fmt: skip
    if config.tty and not config.keep_alive:
        raise ConfigError("flag --tty: there is no main process; it needs --keep-alive")
    if config.exit_with_main and not config.keep_alive:
        raise ConfigError("flag --exit-with-main: there is no main process; it needs --keep-alive")
    try:
        _check_tokens(config.tokens)
    except ValueError as exc:
        raise ConfigError(str(exc)) from None
    return config


def _check_tls(config: Config) -> None:
    """Raises ConfigError if the flags do not fit together, or a file cannot be used."""
    for flag, needs in (("tls-key", "tls-cert"), ("tls-client-ca", "tls-cert"), ("callback-key", "callback-cert")):
        if getattr(config, flag.replace("-", "_")) and not getattr(config, needs.replace("-", "_")):
            raise ConfigError(f"flag --{flag}: it needs --{needs}")
    if config.tls_cert and config.callback:
        raise ConfigError("flag --tls-cert: in reverse mode nothing listens; --callback-cert is for that")
    if config.tls_cert and config.addr.path:
        raise ConfigError("flag --tls-cert: a unix socket needs no TLS")
    try:
        if config.tls_cert:
            flag = "tls-cert"
            ServerTLS(config.tls_cert, config.tls_key)
            flag = "tls-client-ca"
            ServerTLS(config.tls_cert, config.tls_key, config.tls_client_ca)
        if config.callback.secure:
            flag = "callback-ca"
            make_client_tls(config.callback_ca)
            flag = "callback-cert"
            make_client_tls(config.callback_ca, config.callback_cert, config.callback_key)
        elif config.callback and (config.callback_ca or config.callback_cert):
            flag = "callback-ca" if config.callback_ca else "callback-cert"
            raise ValueError("it is for a callback URL that starts with https: or wss:")
    except ValueError as exc:
        raise ConfigError(f"flag --{flag}: {exc}") from None


def rfc3339(when: float) -> str:
    """A Unix time as RFC 3339 writes it, in UTC, to the millisecond."""
    return datetime.datetime.fromtimestamp(when, datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class LogFormatter(logging.Formatter):
    """One line a record, as text or as JSON, with no secret in it."""

    all: ClassVar[weakref.WeakSet[LogFormatter]] = weakref.WeakSet()  # for secrets that come later

    def __init__(self, style: str, hidden: Iterable[str]) -> None:
        super().__init__()
        self.as_json = style == "json"
        self.hidden: list[str] = []  # longest first; replaced as a whole
        self.add_secrets(hidden)
        self.all.add(self)

    def add_secrets(self, hidden: Iterable[str]) -> None:
        """Let no line show these either."""
        # As it is, and as repr() and JSON spell it: messages quote what they name.
        self.hidden = sorted(
            {
                *self.hidden,
                *(
                    spelling
                    for secret in hidden
                    if secret
                    for spelling in (secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], repr('"' + secret)[2:-1])
                ),
            },
            key=len,
            reverse=True,
        )

    def hide(self, text: str) -> str:
        """A text without the secrets in it."""
        for secret in self.hidden:
            text = text.replace(secret, "[hidden]")
        return text

    def hide_all(self, value: object) -> object:
        """What JSON can hold, without the secrets in its texts."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, list | tuple):
            return [self.hide_all(item) for item in value]
        if isinstance(value, Mapping):
            return {name: self.hide_all(item) for name, item in value.items()}
        return value

    def format(self, record: logging.LogRecord) -> str:
        when = rfc3339(record.created)
        level = "warn" if record.levelno == logging.WARNING else record.levelname.lower()
        lines = [record.getMessage()]
        if record.exc_info:
            lines += self.formatException(record.exc_info).split("\n")
        lines = [self.hide(line) for line in lines]
        facts = vars(record)
        if "audit" in facts:
            return json.dumps(self.hide_all(facts["audit"]))
        if "websocket" in facts:  # a line of the library's
            facts.setdefault("peer", facts["websocket"].who.name)
        extra = {name: self.hide(str(facts[name])) for name in ("peer", "session") if name in facts}
        if self.as_json:
            return json.dumps({"time": when, "level": level, "message": "\n".join(lines), **extra})
        fields = "".join(f" {name}={value!r}" for name, value in extra.items())
        # A message may quote what a peer sent: no line break or escape code gets
        # through. A traceback's lines are indented, to look like no record.
        text = "\n    ".join(
            line
            if line.isprintable()
            else "".join(char if char.isprintable() or char == "\t" else repr(char)[1:-1] for char in line)
            for line in lines
        )
        return f"{when} {level:5} {text}{fields}"


LOG_BACKLOG = 4096  # records that may wait for stderr to take them
LOG_GATHERED = 256  # records that are enough to be written at once
LOG_PAUSE = 0.02  # seconds in which records gather: a thread that wakes for each takes a tenth of an exec's time
LOG_RETRY = 0.5  # seconds from a failure to write to the next try


class LogHandler(logging.Handler):
    """Writes records to stderr from a thread of its own: whoever logs never waits for a reader that stands still.

    What a full disk does not take waits, and is tried again. Beyond LOG_BACKLOG
    records are dropped, as is what a closed pipe refuses; that is counted, and
    said in the log once it is written again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stream = sys.stderr
        self._rest = b""  # formatted, and not written yet; the writing thread's
        self._changed = threading.Condition()  # guards the attributes below
        self._records: collections.deque[logging.LogRecord] = collections.deque()
        self._dropped = 0  # since it was last said
        self._why = ""  # they were
        self.lost = 0  # in all
        self._writing = False
        self._started = False
        self._hurry = threading.Event()  # ends LOG_PAUSE: there is enough, a warning, or somebody waits in flush()

    def handle(self, record: logging.LogRecord) -> bool:
        """Queue a record. Does without the lock of the base class, which is held while it writes."""
        with self._changed:
            if len(self._records) >= LOG_BACKLOG:
                self._drop(1, self._why or "stderr was not read")
                return False
            self._records.append(record)
            if not self._started:
                with contextlib.suppress(RuntimeError):  # no thread to be had: the next record tries again
                    threading.Thread(target=self._run, name="log", daemon=True).start()
                    self._started = True
            if len(self._records) == 1:
                self._changed.notify_all()
            if len(self._records) == LOG_GATHERED or record.levelno >= logging.WARNING:
                self._hurry.set()
        return True

    def flush(self, timeout: float = 1.0) -> None:
        """Wait until everything is written, ``timeout`` seconds at most."""
        self._hurry.set()
        with self._changed:
            started = self._started
            if started:
                self._changed.wait_for(lambda: not self._records and not self._writing, timeout)
        if not started:  # there was no thread: the one who waits is as good
            self._write_records()

    def _drop(self, count: int, why: str) -> None:
        """Count lines that will not be written. Holds the lock."""
        self._dropped += count
        self.lost += count
        self._why = why

    def _run(self) -> None:
        while True:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._records)
            self._hurry.wait(LOG_PAUSE)
            self._hurry.clear()
            while not self._write_records():
                time.sleep(LOG_RETRY)

    def _write_records(self) -> bool:
        """Write what waits; False if it, or a part of it, waits still."""
        records: list[logging.LogRecord] = []
        try:
            with self._changed:
                self._writing = True
                if not self._rest:
                    records, dropped, why = list(self._records), self._dropped, self._why
                    self._records.clear()
                    self._dropped, self._why = 0, ""
            if records:
                lines = [self.format(record) for record in records]
                if dropped:
                    words = (f"{dropped} lines are missing here: {why}", (), None)
                    lines.append(self.format(logging.LogRecord(log.name, logging.WARNING, "", 0, *words)))
                self._rest = "".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace")
            self._write_rest()
        except OSError as exc:
            why = f"stderr could not be written: {exc.strerror or exc}"
            with self._changed:
                if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.ENOBUFS):
                    self._why = why
                    return False  # another time it may
                self._drop(self._rest.count(b"\n"), why)
                self._rest = b""
        except Exception as exc:  # MemoryError; or a record that makes no sense: logging must not end for it
            with self._changed:
                self._drop(len(records), f"unexpected error: {exc!r}")
        return True

    def _write_rest(self) -> None:
        """Write, without the stream's own buffer: that would keep what has failed, and tear lines."""
        try:
            fd = self._stream.fileno()
        except (OSError, ValueError):  # not a file's
            text, self._rest = self._rest.decode(), b""
            self._stream.write(text)
            self._stream.flush()
            return
        while self._rest:
            try:
                self._rest = self._rest[os.write(fd, self._rest) :]
            except BlockingIOError:  # whoever shares it made it non-blocking
                select.select((), (fd,), ())


def set_up_logging(config: Config) -> LogHandler:
    """Send log lines to stderr. A log that cannot be written never stops the agent."""
    logging.raiseExceptions = False
    handler = LogHandler()
    handler.setFormatter(LogFormatter(config.log_format, config.callback.secrets()))
    level = {"warn": "warning"}.get(config.log_level, config.log_level).upper()
    root = logging.getLogger("sockerless")
    root.handlers[:] = [handler]
    root.setLevel(level)
    root.propagate = False
    hide_from_log(config.tokens)
    # At DEBUG websockets logs every header and frame, the token among them; at
    # INFO it repeats what this module logs better.
    logging.getLogger("sockerless.websockets").setLevel(logging.WARNING)
    return handler


def secrets_of(config: Config) -> tuple[str, ...]:
    """What no log may show."""
    spellings = [spelling for token in config.tokens for spelling in (token, urllib.parse.quote(token, ""))]
    return (*spellings, *config.callback.secrets())


def hide_from_log(tokens: Iterable[str]) -> None:
    """Let no line of the log or the audit log show a token, as it is or as a URL has it."""
    for formatter in list(LogFormatter.all):
        formatter.add_secrets(spelling for token in tokens for spelling in (token, urllib.parse.quote(token, "")))


def reload_tokens(tokens: Tokens) -> None:
    """Read the token file again, and say in the log what became of it."""
    try:
        read = tokens.reload()
    except ValueError as exc:
        log.error("the tokens stay as they are: %s", exc)
    else:
        hide_from_log(read)
        log.info("tokens: %d are good from now on", len(read))


def forget_coerced_locale() -> None:
    """Take back the LC_CTYPE that Python sets for itself where the locale is C (PEP 538): it is no command's."""
    try:
        with open("/proc/self/environ", "rb") as file:
            given = file.read().split(b"\0")
    except OSError:
        return
    if not any(variable.startswith(b"LC_CTYPE=") for variable in given):
        os.environ.pop("LC_CTYPE", None)


def log_thread_failure(failure: threading.ExceptHookArgs) -> None:
    """What ends a thread of the library's goes to the log, and not around it."""
    if failure.exc_value is not None:
        name = failure.thread.name if failure.thread is not None else "?"
        log.error("unexpected error in thread %s: %s", name, failure.exc_value)


def hide_secrets(hidden: Iterable[str]) -> None:
    """Overwrite secrets in this process's own environment and argument memory.

    ``unsetenv`` only drops a pointer: /proc/PID/environ and ``ps e`` would go
    on showing the text to every process of the same user. proc_pid_stat(5)
    gives the bounds of the memory that they show.
    """
    for name in SECRET_VARIABLES:
        os.environ.pop(name, None)
    needles = [secret.encode("utf-8", "surrogateescape") for secret in hidden if secret]
    if not needles:
        return
    try:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError as exc:
        log.warning("cannot hide the token from ps and /proc: %s", exc)
        return
    for first, last in ((int(fields[45]), int(fields[46])), (int(fields[47]), int(fields[48]))):
        if not 0 < first < last:
            continue
        block = ctypes.string_at(first, last - first)
        for needle in needles:
            at = block.find(needle)
            while at >= 0:
                ctypes.memset(first + at, ord("*"), len(needle))
                at = block.find(needle, at + len(needle))


# ══════════════════════════════════════════════════════════════════════════════
# 3  Accounts
#    Owns what is counted for /metrics, each session's record, and the audit log
#    with the thread that writes it. Any thread may count and tell; none waits.
# ══════════════════════════════════════════════════════════════════════════════

METRIC_PREFIX = "sockerless_agent_"
# Seconds; the last bucket is for what took longer. A spawn takes 0.6 ms where nothing is in its way.
SPAWN_BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class Kind(enum.StrEnum):
    """What a session does."""

    EXEC = "exec"
    ATTACH = "attach"
    DETACHED = "detached"
    ARCHIVE = "archive"


@dataclasses.dataclass(frozen=True, slots=True)
class Counter:
    """A total for ``/metrics``: one for each value of its label, where it has one."""

    name: str
    help: str
    label: str = ""
    values: tuple[str, ...] = ("",)  # there from the start, so that the first one counted is an increase


SESSIONS_STARTED = Counter("sessions_started_total", "Sessions that have begun.", "kind", tuple(Kind))
SESSIONS_ENDED = Counter("sessions_ended_total", "Sessions that have ended.", "kind", tuple(Kind))
SESSIONS_PARKED = Counter("sessions_parked_total", "Sessions whose connection ended before they did.")
SESSIONS_RESUMED = Counter("sessions_resumed_total", "Sessions that a connection has taken over.")
SESSIONS_EXPIRED = Counter("sessions_expired_total", "Sessions ended because nobody resumed them in time.")
ERRORS = Counter("errors_total", "Errors that clients were sent.", "reason", tuple(Reason))
CONNECTIONS_OPENED = Counter("connections_opened_total", "WebSockets opened.", "protocol", ("1", "2"))
CONNECTIONS_CLOSED = Counter("connections_closed_total", "WebSockets that have ended.", "how", ("closed", "lost"))
AUTH_FAILURES = Counter(
    "auth_failures_total", "Clients turned away before the upgrade.", "reason", ("token", "origin", "certificate")
)
AUDIT_LOST = Counter("audit_entries_lost_total", "Entries of the audit log that could not be written.")
COUNTERS = (
    AUDIT_LOST,
    SESSIONS_STARTED, SESSIONS_ENDED, SESSIONS_PARKED, SESSIONS_RESUMED, SESSIONS_EXPIRED, ERRORS, CONNECTIONS_OPENED,
    CONNECTIONS_CLOSED, AUTH_FAILURES,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Totals:
    """What Counters held at one moment."""

    counts: Mapping[tuple[Counter, str], int]
    spawns: tuple[int, ...]  # by SPAWN_BUCKETS, and one for the rest
    spawn_seconds: float


class Counters:
    """Totals of what is rare: sessions, connections, spawns.

    Bytes are not counted here, but where a lock is held anyway or one thread
    owns the figure: see Outbox.sent and Peer.moved().
    """

    def __init__(self, log_lines_lost: Callable[[], int] = lambda: 0) -> None:
        self.log_lines_lost = log_lines_lost
        self._lock = threading.Lock()  # guards the attributes below
        self._counts = {(counter, value): 0 for counter in COUNTERS for value in counter.values}
        self._spawns = [0] * (len(SPAWN_BUCKETS) + 1)
        self._spawn_seconds = 0.0

    def count(self, counter: Counter, value: str = "", amount: int = 1) -> None:
        with self._lock:
            self._counts[counter, value] = self._counts.get((counter, value), 0) + amount

    def spawned(self, seconds: float) -> None:
        """A process was started, in so many seconds."""
        bucket = bisect.bisect_left(SPAWN_BUCKETS, seconds)
        with self._lock:
            self._spawns[bucket] += 1
            self._spawn_seconds += seconds

    def totals(self) -> Totals:
        with self._lock:
            return Totals(dict(self._counts), tuple(self._spawns), self._spawn_seconds)


AUDIT_BACKLOG = 16 << 20  # characters of entries that may wait to be written
AUDIT_RETRY = 1.0  # seconds from a failure to the next try


class AuditLog:
    """A file with one JSON object a line, written by one thread, so that a full or slow disk holds up no session.

    What cannot be written waits, and is tried again. What does not fit the queue
    is lost, but not in silence: it is counted, and said in the log and in the file
    once that works again. The file may be renamed or removed: a new one is made.
    """

    def __init__(self, path: str, counters: Counters, formatter: LogFormatter) -> None:
        """Open the file.

        Raises:
            OSError: if that fails, or it is a symbolic link.
        """
        self._path = path
        self._counters = counters
        self._formatter = formatter
        # These three are the writer's alone from now on.
        self._fd = self._open()
        self._rest = b""  # of a line that the file has a part of
        self._failing = False  # and the log has been told
        self._changed = threading.Condition()  # guards the attributes below
        self._entries: collections.deque[str] = collections.deque()  # the first is being written
        self._size = 0  # characters in _entries
        self._lost = 0  # entries, since the file was last told
        self._started = False

    def _open(self) -> int:
        # Without waiting for the reader of a FIFO; what is open then may be as slow as it is.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        fd = os.open(self._path, flags, 0o600)
        os.set_blocking(fd, True)
        return fd

    def write(self, entry: Mapping[str, object]) -> None:
        """Queue an entry."""
        line = json.dumps(self._formatter.hide_all(entry)) + "\n"
        with self._changed:
            if self._entries and self._size + len(line) > AUDIT_BACKLOG:
                self._lost += 1
                self._counters.count(AUDIT_LOST)
                return
            self._entries.append(line)
            self._size += len(line)
            self._changed.notify_all()

    def start(self) -> None:
        """Start to write; not before the agent has taken over its signals.

        Raises:
            RuntimeError: if the system refuses the thread.
        """
        with self._changed:
            if not self._started:
                threading.Thread(target=self._run, name="audit", daemon=True).start()
                self._started = True

    def flush(self, timeout: float) -> None:
        """The agent ends: wait until everything is written, ``timeout`` seconds at most."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._entries, timeout):
                log.error("audit log: the last %d entries cannot be written to %s", len(self._entries), self._path)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._entries)
                line, lost = self._entries[0], self._lost
            try:
                self._follow_path()
                if lost and not self._rest:
                    self._note_loss(lost)
                self._write(line)
            except (OSError, MemoryError) as exc:
                if not self._failing:
                    why = getattr(exc, "strerror", None) or repr(exc)
                    log.error("audit log: cannot write to %s, trying again: %s", self._path, why)
                self._failing = True
                time.sleep(AUDIT_RETRY)
                continue
            self._failing = False
            with self._changed:
                self._entries.popleft()
                self._size -= len(line)
                self._changed.notify_all()

    def _follow_path(self) -> None:
        """Open the file anew if another one, or none, is at its path: somebody rotates it."""
        before = os.fstat(self._fd)
        try:
            found = os.lstat(self._path)
            if (found.st_dev, found.st_ino) == (before.st_dev, before.st_ino):
                return
        except FileNotFoundError:
            pass
        try:
            fd = self._open()
        except OSError:
            if before.st_nlink:  # renamed: what is written there can be read
                return
            raise
        os.close(self._fd)
        self._fd = fd
        self._rest = b""  # the line belongs into one file, as a whole

    def _note_loss(self, lost: int) -> None:
        self._write(json.dumps({"time": rfc3339(time.time()), "event": "lost", "entries": lost}) + "\n")
        log.error("audit log: %d entries are missing in %s: it could not be written fast enough", lost, self._path)
        with self._changed:
            self._lost -= lost

    def _write(self, line: str) -> None:
        """Write a line, or what is left of it from the last time."""
        self._rest = self._rest or line.encode()
        while self._rest:
            self._rest = self._rest[os.write(self._fd, self._rest) :]


class AuditLines:
    """The audit log among the log's lines, on stderr."""

    def __init__(self, handler: LogHandler, counters: Counters) -> None:
        self._handler = handler
        self._counters = counters

    def write(self, entry: Mapping[str, object]) -> None:
        """Queue an entry."""
        record = logging.LogRecord(log.name, logging.INFO, "", 0, "audit", (), None)
        record.audit = entry
        if not self._handler.handle(record):
            self._counters.count(AUDIT_LOST)

    def start(self) -> None:
        """The log's thread writes them."""

    def flush(self, timeout: float) -> None:
        self._handler.flush(timeout)


@dataclasses.dataclass(frozen=True, slots=True)
class Who:
    """A client, as the log and the audit log name it."""

    peer: str  # its address
    subject: str = ""  # its certificate's name, if it has shown one

    @property
    def name(self) -> str:
        """Both, for the log."""
        return f"{self.peer} ({self.subject})" if self.subject else self.peer

    def describe(self) -> dict[str, str]:
        return {"peer": self.peer} | ({"subject": self.subject} if self.subject else {})


class Cause(enum.StrEnum):
    """Why a session ended, if not by itself."""

    CLIENT = "ended by its client"
    CONNECTION = "its connection ended"
    NOT_RESUMED = "nobody resumed it in time"
    STDIN_OVERFLOW = "its stdin overflowed"
    AGENT = "the agent ended"


def kind_of(request: Opening) -> Kind:
    if isinstance(request, Exec):
        return Kind.DETACHED if request.detach else Kind.EXEC
    return Kind.ATTACH if isinstance(request, Attach) else Kind.ARCHIVE


def describe_opening(request: Opening) -> dict[str, object]:
    """What a client wants to be done, for the audit log. Of variables only the names: values are secrets."""
    facts: dict[str, object] = {"kind": kind_of(request)}
    if isinstance(request, Exec):
        names = [variable.partition("=")[0] for variable in request.env]
        facts |= {"cmd": request.cmd, "env": names, "workdir": request.workdir, "user": request.user}
        return facts | {"tty": request.tty}
    if isinstance(request, Attach):
        return facts | {"to": request.session}
    return facts | {"direction": "get" if isinstance(request, ArchiveGet) else "put", "path": request.path}


class Record:
    """One session in the books: it is counted, and the audit log is told of it.

    The threads that run the session write it; its start and its end are told once.
    """

    def __init__(self, books: Books, who: Who, request: Opening) -> None:
        self.kind = kind_of(request)
        self._books = books
        self._request = request
        self._key = secrets.token_hex(8)  # session ids may come again
        # For log lines. Changed when another connection takes the session over.
        self.extra = {"peer": who.name, "session": request.id}
        self._lock = threading.Lock()  # guards the attributes below
        self._who = who
        self._started = 0.0  # Unix time
        self._early: tuple[int | None, int, Error | None] | None = None  # its end, if that came before its start
        self._ended = False
        self._stdin_forbidden = False  # that was told
        self._cause = ""

    @property
    def cause(self) -> str:
        """Why it ends, in brackets, for the end of a log line; "" if by itself."""
        return f" ({self._cause})" if self._cause else ""

    def _tell(self, event: str, who: Who, **facts: object) -> None:
        self._books.tell(event, who, session=self._request.id, key=self._key, **facts)

    def start(self, pid: int = 0) -> None:
        """What it is for has begun."""
        with self._lock:
            self._started = time.time()
            who, early = self._who, self._early
        self._books.begin(self)
        self._tell("start", who, **describe_opening(self._request), **({"pid": pid} if pid else {}))
        if early is not None:
            self.end(*early)

    def refuse(self, reason: str, message: str) -> None:
        """It could not begin."""
        self.error(reason)
        facts = describe_opening(self._request)
        self._tell("refused", self._who, **facts, reason=reason, error=message)

    def error(self, reason: str) -> None:
        """Its client is told of an error."""
        self._books.counters.count(ERRORS, reason)

    def signal(self, number: int, who: Who) -> None:
        """A client has sent it a signal."""
        name = signal_name(number)
        log.info("signal %s", name, extra={**self.extra, "peer": who.name})
        self._tell("signal", who, signal=name)

    def forbid(self, request: ToSession, reason: str, message: str, who: Who) -> None:
        """A client has sent it what it may not: each signal is told, and the first of its stdin."""
        what = {"signal": request.signal[:80]} if isinstance(request, Signal) else {"kind": "stdin"}
        with self._lock:
            told = self._stdin_forbidden and "signal" not in what
            self._stdin_forbidden |= "signal" not in what
        if not told:
            self._tell("refused", who, **what, reason=reason, error=message)

    def park(self, window: float) -> None:
        """Its connection has ended."""
        self._books.counters.count(SESSIONS_PARKED)
        log.info("its connection has ended: it can be resumed for %g s", window, extra=self.extra)
        self._tell("parked", self._who)

    def resume(self, who: Who) -> None:
        """Another connection has it now."""
        with self._lock:
            self._who = who
        self.extra["peer"] = who.name
        self._books.counters.count(SESSIONS_RESUMED)
        log.info("session resumed", extra=self.extra)
        self._tell("resumed", who)

    def expire(self) -> None:
        """No other connection came for it."""
        self.because(Cause.NOT_RESUMED)
        self._books.counters.count(SESSIONS_EXPIRED)
        log.warning("nobody resumed the session in time: it is ended", extra=self.extra)

    def because(self, cause: Cause) -> None:
        """Something ends it. Of several causes the first one counts."""
        with self._lock:
            self._cause = self._cause or cause

    def end(self, code: int | None = None, killed_by: int = 0, error: Error | None = None) -> None:
        """It is over; what was over already, or never began, stays as it is. A start may be told after the end."""
        with self._lock:
            if not self._started:
                self._early = (code, killed_by, error)
            if self._ended or not self._started:
                return
            self._ended = True
            who, started, cause = self._who, self._started, self._cause
        self._books.finish(self)
        now = time.time()
        facts: dict[str, object] = {"kind": self.kind, "started": rfc3339(started), "ended": rfc3339(now)}
        facts |= {"code": code} if code is not None else {}
        facts |= {"signal": signal_name(killed_by)} if killed_by else {}
        facts |= {"reason": error.reason, "error": error.message} if error is not None else {}
        facts |= {"because": cause} if cause else {}
        self._tell("end", who, **facts)


def signal_name(number: int) -> str:
    """``SIGTERM``, or what a signal without a name is called."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}" if number > signal.SIGRTMIN else f"signal {number}"


class Books:
    """What is kept of all sessions: totals, the audit log, and which are open."""

    def __init__(self, counters: Counters | None = None, audit: AuditLog | AuditLines | None = None) -> None:
        self.counters = counters or Counters()
        self._audit = audit
        self._lock = threading.Lock()  # guards _open
        self._open: set[Record] = set()

    def start(self) -> None:
        """Start to write the audit log, if there is one. Raises RuntimeError if the system refuses the thread."""
        if self._audit is not None:
            self._audit.start()

    def begin(self, record: Record) -> None:
        with self._lock:
            self._open.add(record)
        self.counters.count(SESSIONS_STARTED, record.kind)

    def finish(self, record: Record) -> None:
        with self._lock:
            self._open.discard(record)
        self.counters.count(SESSIONS_ENDED, record.kind)

    def tell(self, event: str, who: Who, **facts: object) -> None:
        """Tell the audit log, if there is one."""
        if self._audit is not None:
            self._audit.write({"time": rfc3339(time.time()), "event": event, **who.describe(), **facts})

    def because(self, cause: Cause) -> None:
        """Something ends every session."""
        with self._lock:
            records = list(self._open)
        for record in records:
            record.because(cause)

    def close(self, timeout: float) -> None:
        """The agent ends, and with it what is open still. Waits for the audit log, ``timeout`` seconds at most."""
        with self._lock:
            records = list(self._open)
        for record in records:
            record.because(Cause.AGENT)
            record.end()
        if self._audit is not None:
            self._audit.flush(timeout)


# ══════════════════════════════════════════════════════════════════════════════
# 4  Replay log
#    Owns the recent output of one process. Its readers append; each follower
#    reads through its own Cursor, in its own thread.
# ══════════════════════════════════════════════════════════════════════════════

READ_SIZE = 256 << 10  # bytes in one read of a busy pipe
SMALL_CHUNK = 4096  # chunks below this are merged, so that a log of bytes is not a log of objects
CHUNK_COST = 128  # what one chunk weighs beside its bytes
PACE_RATE = 50e6  # bytes/s that a process may always write, however slow those who follow it


@dataclasses.dataclass(frozen=True, slots=True)
class Replay:
    """What a cursor read: chunks in true order, and how many bytes were lost before them."""

    chunks: tuple[tuple[Stream, bytes], ...]
    lost: int


class ReplayLog:
    """A bounded log of one process's stdout and stderr, in the order of their arrival.

    Every byte has an offset, counted from 0 over both streams together. The log
    keeps at least the last ``capacity`` bytes, each chunk counted as CHUNK_COST
    bytes more: a change of stream, or a read of more than SMALL_CHUNK. The writer never waits for a
    follower that stands still. A follower that moves but cannot keep up is
    waited for a little, as long as the process still gets PACE_RATE: enough for
    every follower that is merely behind on a busy machine, and no more.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        # Guards every attribute below, and the cursors' attributes.
        self._lock = threading.Lock()
        self._appended = threading.Condition(self._lock)  # followers wait here
        self._moved = threading.Condition(self._lock)  # the writer paces itself here
        self._chunks: collections.deque[tuple[int, Stream, bytes]] = collections.deque()
        self._cost = 0  # bytes held, and CHUNK_COST for each chunk
        self._end = 0  # offset of the next byte
        self._ended = False
        self._cursors: set[Cursor] = set()
        self._allowance = 0.0  # seconds that the writer may still wait, see PACE_RATE

    @property
    def end(self) -> int:
        """How many bytes have been appended so far."""
        return self._end

    def wait_for_room(self) -> bool:
        """Give followers that are about to lose bytes a moment to catch up."""
        with self._lock:
            slow = [cursor for cursor in self._cursors if cursor.moving and self._behind(cursor)]
            if slow and self._allowance > 0.001:
                before = [cursor.offset for cursor in slow]
                started = time.monotonic()
                self._moved.wait_for(lambda: not any(map(self._behind, slow)), self._allowance)
                self._allowance -= time.monotonic() - started
                for cursor, offset in zip(slow, before, strict=True):
                    cursor.moving = cursor.offset > offset
        return True

    def _behind(self, cursor: Cursor) -> bool:
        return not cursor._closed and self._end + min(READ_SIZE - self.capacity, 0) > cursor.offset

    def call_when_room(self, callback: Callable[[], None]) -> bool:
        """The non-blocking half of a sink: a replay log always has room."""
        return True

    def put(self, stream: Stream, data: bytes) -> None:
        """Append ``data``; forgets the oldest chunks beyond the capacity."""
        with self._lock:
            self._allowance = min(self._allowance + len(data) / PACE_RATE, 0.05)
            last = self._chunks[-1] if self._chunks else None
            if last is not None and last[1] is stream and len(last[2]) + len(data) <= SMALL_CHUNK:
                self._chunks[-1] = (last[0], stream, last[2] + data)
                self._cost += len(data)
            else:
                self._chunks.append((self._end, stream, data))
                self._cost += len(data) + CHUNK_COST
            self._end += len(data)
            while len(self._chunks) > 1 and self._cost - len(self._chunks[0][2]) - CHUNK_COST >= self.capacity:
                self._cost -= len(self._chunks.popleft()[2]) + CHUNK_COST
            self._appended.notify_all()

    def finish(self) -> None:
        """No more bytes will come: followers end once they have read the rest."""
        with self._lock:
            self._ended = True
            self._appended.notify_all()

    def follow(self, replay: bool = True) -> Cursor:
        """A new cursor, at the oldest byte that the log still holds, or without ``replay`` behind the newest."""
        with self._lock:
            cursor = Cursor(self, self._chunks[0][0] if self._chunks and replay else self._end)
            self._cursors.add(cursor)
            return cursor


class Cursor:
    """One follower's place in a ReplayLog. Its attributes are guarded by the log's lock."""

    def __init__(self, replay_log: ReplayLog, offset: int) -> None:
        self._log = replay_log
        self.offset = offset  # of the next byte to read
        self.replay = replay_log._end - offset  # bytes to read that were there before it
        self.moving = True  # False once the writer has waited for it in vain
        self._closed = False

    def read(self, limit: int = READ_SIZE) -> Replay | None:
        """Wait for the next bytes, about ``limit`` at most; None at the end, or once closed."""
        source = self._log
        with source._lock:
            source._appended.wait_for(lambda: self._closed or source._ended or self.offset < source._end)
            if self._closed or self.offset >= source._end:
                source._cursors.discard(self)
                return None
            lost = max(source._chunks[0][0] - self.offset, 0)
            self.offset += lost
            chunks: list[tuple[Stream, bytes]] = []
            for at, stream, data in self._unread():
                chunks.append((stream, data[self.offset - at :] if self.offset > at else data))
                self.offset = at + len(data)
                limit -= len(data)
                if limit <= 0:
                    break
            self.moving = True
            source._moved.notify()
            return Replay(tuple(chunks), lost)

    def _unread(self) -> Iterator[tuple[int, Stream, bytes]]:
        """The chunks from the cursor on; found from the end, where cursors mostly are."""
        chunks = self._log._chunks
        first = len(chunks)
        while first > 0 and chunks[first - 1][0] + len(chunks[first - 1][2]) > self.offset:
            first -= 1
        for index in range(first, len(chunks)):
            yield chunks[index]

    def close(self) -> None:
        """Stop following, from any thread: a waiting read() returns None."""
        with self._log._lock:
            self._closed = True
            self._log._cursors.discard(self)
            self._log._appended.notify_all()
            self._log._moved.notify()


# ══════════════════════════════════════════════════════════════════════════════
# 5  Child processes
#    Owns posix_spawn, every wait(2), and the search for what a session left
#    behind. Entered by session threads, and by the reaper thread that it starts.
# ══════════════════════════════════════════════════════════════════════════════

SESSION_VARIABLE = "SOCKERLESS_AGENT_SESSION"  # marks a child and its descendants, see find_processes()
_agent_mark = f"{SESSION_VARIABLE}={secrets.token_hex(8)}."  # how the mark of every child of this agent begins

_libc = ctypes.CDLL(None)
# <spawn.h>; the values are the same in glibc and musl.
_POSIX_SPAWN_SETSIGDEF, _POSIX_SPAWN_SETSIGMASK, _POSIX_SPAWN_SETSID = 0x04, 0x08, 0x80
_SPAWN_STRUCT_SIZE = 512  # posix_spawnattr_t is 336 bytes in both, file actions are 80
_SIGSET_SIZE = 128


def explain_want(exc: BaseException) -> str:
    """What the system had too little of, for the end of a sentence."""
    if isinstance(exc, MemoryError):
        return "out of memory"
    return (exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)).lower()


class SpawnError(AgentError):
    """A command that could not be started.

    Attributes:
        reason: NOT_FOUND, NOT_EXECUTABLE or START_FAILED.
    """

    def __init__(self, message: str, reason: Reason) -> None:
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass(frozen=True, slots=True)
class Credentials:
    """As whom a command runs."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


def find_user(text: str) -> Credentials:
    """The credentials of ``name``, ``uid``, ``name:group`` or ``uid:gid``, as for ``docker exec --user``.

    A number need not be in /etc/passwd: its group is 0 then, as Docker has it.

    Raises:
        SpawnError: if there is no such user or group.
    """
    import grp
    import pwd

    name, colon, group = text.partition(":")
    try:
        entry = pwd.getpwuid(int(name)) if name.isascii() and name.isdigit() else pwd.getpwnam(name)
        uid, gid, home = entry.pw_uid, entry.pw_gid, entry.pw_dir or "/"
        groups = tuple(os.getgrouplist(entry.pw_name, gid))
    except (KeyError, OverflowError):
        if not (name.isascii() and name.isdigit() and int(name) < 1 << 32):
            raise SpawnError(f"no such user: {name[:80]!r}", Reason.START_FAILED) from None
        uid, gid, groups, home = int(name), 0, (), "/"
    if colon:
        try:
            number = group.isascii() and group.isdigit()
            gid = int(group) if number and int(group) < 1 << 32 else grp.getgrnam(group).gr_gid
        except KeyError:
            raise SpawnError(f"no such group: {group[:80]!r}", Reason.START_FAILED) from None
        groups = (gid,)
    return Credentials(uid, gid, groups or (gid,), home)


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    """What to run, resolved: encoded as execve(2) wants it."""

    argv: tuple[bytes, ...]
    path: bytes
    env: tuple[bytes, ...]
    workdir: bytes
    cookie: bytes  # the SESSION_VARIABLE entry of its environment
    credentials: Credentials | None = None


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def make_command(
    cmd: Sequence[str],
    env: Iterable[str] = (),
    workdir: str = "",
    defaults: Mapping[str, str] | None = None,
    user: str = "",
) -> Command:
    """Resolve a command: its environment over the agent's own, its path in the PATH of that.

    Args:
        defaults: variables for where neither ``env`` nor the agent has one.
        user: ``name``, ``uid``, ``name:group`` or ``uid:gid``; its HOME is the user's unless ``env`` has one.

    Raises:
        SpawnError: if the command is not found, or not executable, or there is no such user.
    """
    credentials = find_user(user) if user else None
    variables = dict(defaults or ())
    variables.update(os.environ)
    if credentials is not None:
        variables["HOME"] = credentials.home
    for item in env:
        name, _, value = item.partition("=")
        variables[name] = value
    variables.setdefault("PATH", DEFAULT_PATH)
    # A nested agent's children belong to it and to us: keep both marks apart.
    cookie = _agent_mark + secrets.token_hex(4)
    variables.pop(SESSION_VARIABLE, None)
    encoded = tuple(_encode(f"{name}={value}") for name, value in variables.items())
    return Command(
        argv=tuple(map(_encode, cmd)),
        path=_encode(_find_executable(cmd[0], variables["PATH"], workdir)),
        env=(*encoded, cookie.encode()),
        workdir=_encode(workdir),
        cookie=cookie.encode(),
        credentials=credentials,
    )


def _find_executable(name: str, search_path: str, workdir: str) -> str:
    """Look ``name`` up as execvp(3) does, relative directories from ``workdir``."""
    if "/" in name:
        return name
    refused = False
    for directory in search_path.split(":"):
        candidate = os.path.join(workdir or ".", directory or ".", name)
        if os.path.isfile(candidate):
            if os.access(candidate, os.X_OK):
                return os.path.abspath(candidate)
            refused = True
    if refused:
        raise SpawnError(f"{name}: not executable: permission denied", Reason.NOT_EXECUTABLE)
    raise SpawnError(f"{name}: command not found in PATH", Reason.NOT_FOUND)


def _explain(command: Command, error: int) -> SpawnError:
    """Say what an errno of posix_spawn means: it may be the workdir's or the command's."""
    name = command.argv[0].decode("utf-8", "replace")
    workdir = command.workdir
    if workdir and not os.path.isdir(workdir):
        what = "is not a directory" if os.path.exists(workdir) else "no such directory"
        return SpawnError(f"{name}: cannot start: working directory {_show(workdir)}: {what}", Reason.START_FAILED)
    if workdir and not os.access(workdir, os.X_OK):
        return SpawnError(f"{name}: cannot start: working directory {_show(workdir)}: permission denied",
                          Reason.START_FAILED)  # fmt: skip
    path = os.path.join(workdir, command.path)
    if error in (errno.ENOENT, errno.ENOTDIR):
        if os.path.isfile(path):
            return SpawnError(f"{name}: not found: the interpreter that it names is missing", Reason.NOT_FOUND)
        return SpawnError(f"{name}: command not found: no such file", Reason.NOT_FOUND)
    if error in (errno.EACCES, errno.EPERM, errno.ENOEXEC, errno.EISDIR, errno.ELOOP, errno.ETXTBSY):
        detail = "is a directory" if os.path.isdir(path) else os.strerror(error).lower()
        return SpawnError(f"{name}: not executable: {detail}", Reason.NOT_EXECUTABLE)
    what = "the limit of processes is reached" if error == errno.EAGAIN else os.strerror(error).lower()
    return SpawnError(f"{name}: cannot start: {what}", Reason.START_FAILED)


def _show(path: bytes) -> str:
    return repr(path.decode("utf-8", "replace"))


class _SpawnAttributes:
    """posix_spawnattr_t, the same for every child: made once, only read afterwards.

    Each child leads its own session, with no signal blocked and none ignored:
    Python ignores SIGPIPE, and a mask would be inherited (signal(7)).
    """

    def __init__(self) -> None:
        self.struct = ctypes.create_string_buffer(_SPAWN_STRUCT_SIZE)
        no_signals = ctypes.create_string_buffer(_SIGSET_SIZE)
        # Not sigfillset(): it leaves out the C library's own signals, which
        # posix_spawn() would then set to be ignored.
        all_signals = ctypes.create_string_buffer(b"\xff" * _SIGSET_SIZE, _SIGSET_SIZE)
        _libc.sigemptyset(no_signals)
        flags = ctypes.c_short(_POSIX_SPAWN_SETSID | _POSIX_SPAWN_SETSIGDEF | _POSIX_SPAWN_SETSIGMASK)
        _libc.posix_spawnattr_init(self.struct)
        _libc.posix_spawnattr_setflags(self.struct, flags)
        _libc.posix_spawnattr_setsigdefault(self.struct, all_signals)
        _libc.posix_spawnattr_setsigmask(self.struct, no_signals)


_spawn_attributes = _SpawnAttributes()


class _FileActions:
    """posix_spawn_file_actions_t: what the child does to its descriptors, in order."""

    def __init__(self) -> None:
        self.struct = ctypes.create_string_buffer(_SPAWN_STRUCT_SIZE)
        self._check(_libc.posix_spawn_file_actions_init(self.struct))

    @staticmethod
    def _check(error: int) -> None:
        if error:
            raise OSError(error, os.strerror(error))

    def dup2(self, source: int, target: int) -> None:
        self._check(_libc.posix_spawn_file_actions_adddup2(self.struct, source, target))

    def open(self, target: int, path: str, flags: int) -> None:
        self._check(_libc.posix_spawn_file_actions_addopen(self.struct, target, path.encode(), flags, 0))

    def chdir(self, path: bytes) -> None:
        try:
            add = _libc.posix_spawn_file_actions_addchdir_np
        except AttributeError:
            raise OSError(errno.ENOSYS, "this C library cannot start a process in another directory") from None
        self._check(add(self.struct, path))

    def __enter__(self) -> _FileActions:
        return self

    def __exit__(self, *exc_info: object) -> None:
        _libc.posix_spawn_file_actions_destroy(self.struct)


@dataclasses.dataclass(frozen=True, slots=True)
class Descriptors:
    """The child's ends: three descriptors, or a terminal's path instead of them."""

    stdin: int = -1
    stdout: int = -1
    stderr: int = -1
    terminal: str = ""


def _posix_spawn(command: Command, descriptors: Descriptors) -> int:
    """Start ``command`` and return its PID.

    Through ctypes, which unlike os.posix_spawn releases the interpreter lock
    until the child has called execve, and can set the working directory.

    Raises:
        SpawnError: if it cannot be started; says why.
    """
    argv = (ctypes.c_char_p * (len(command.argv) + 1))(*command.argv, None)
    env = (ctypes.c_char_p * (len(command.env) + 1))(*command.env, None)
    pid = ctypes.c_int(0)
    with _FileActions() as actions:
        if descriptors.terminal:
            # A session leader without a terminal that opens one gets it as its
            # controlling terminal: tty_ioctl(4), POSIX 11.1.3.
            actions.open(0, descriptors.terminal, os.O_RDWR)
            actions.dup2(0, 1)
            actions.dup2(0, 2)
        else:
            actions.dup2(descriptors.stdin, 0)
            actions.dup2(descriptors.stdout, 1)
            actions.dup2(descriptors.stderr, 2)
        if command.workdir:
            actions.chdir(command.workdir)
        error = _libc.posix_spawn(ctypes.byref(pid), command.path, actions.struct, _spawn_attributes.struct, argv, env)
    if error:
        raise _explain(command, error)
    if _child_limit is not None:
        # It has called execve, and its program is being linked: no sooner than it looks, as a rule.
        with contextlib.suppress(OSError):  # it has ended, or changed to another user
            resource.prlimit(pid.value, resource.RLIMIT_NOFILE, _child_limit)
    return pid.value


def _fork_as_user(command: Command, descriptors: Descriptors) -> int:
    """Start ``command`` as another user and return its PID: posix_spawn(3) cannot.

    A fork of a process with threads. Until execve the child only makes system
    calls, on values that are there already.

    Raises:
        SpawnError: if it cannot be started; says why.
    """
    who = command.credentials
    assert who is not None
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks with threads, since 3.12; see above
            pid = os.fork()
    except OSError as exc:
        os.close(reading)
        os.close(writing)
        raise _explain(command, exc.errno or errno.EAGAIN) from None
    if pid == 0:
        step = 0
        try:
            os.setsid()
            for number in range(1, signal.NSIG):
                with contextlib.suppress(OSError, ValueError):
                    signal.signal(number, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            if descriptors.terminal:
                terminal = os.open(descriptors.terminal, os.O_RDWR)
                os.fchown(terminal, who.uid, -1)
                sources = (terminal, terminal, terminal)
            else:
                sources = (descriptors.stdin, descriptors.stdout, descriptors.stderr)
            for target, source in enumerate(sources):
                os.dup2(source, target)
            if _child_limit is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, _child_limit)
            step = 1
            os.setgroups(who.groups)
            os.setresgid(who.gid, who.gid, who.gid)
            os.setresuid(who.uid, who.uid, who.uid)
            step = 2
            if command.workdir:
                os.chdir(command.workdir)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            os.execve(command.path, command.argv, dict(item.split(b"=", 1) for item in command.env))
        except BaseException as exc:
            os.write(writing, struct.pack("ii", step, getattr(exc, "errno", None) or errno.EIO))
        finally:
            os._exit(127)
    os.close(writing)
    with open(reading, "rb") as pipe:
        failure = pipe.read()
    if not failure:
        return pid
    with contextlib.suppress(ChildProcessError):  # the reaper may have been there first
        os.waitpid(pid, 0)
    step, error = struct.unpack("ii", failure)
    if step == 2:
        raise _explain(command, error)
    what = "change to the user" if step == 1 else "start"
    name = command.argv[0].decode("utf-8", "replace")
    raise SpawnError(f"{name}: cannot {what}: {os.strerror(error).lower()}", Reason.START_FAILED)


class Child:
    """A process that this agent started; it leads its own session and process group."""

    def __init__(self, reaper: Reaper, pid: int, cookie: bytes, on_exit: Callable[[int], None]) -> None:
        self.pid = pid
        self.cookie = cookie
        self.exited = threading.Event()
        self.returncode: int | None = None  # 128+n for signal n; written once, by the reaper
        self.killed_by = 0  # the signal that ended it; written before exited is set
        self._reaper = reaper
        self._on_exit = on_exit

    def send_signal(self, number: int, group: int = 0, alone: bool = False) -> bool:
        """Send a signal to the child's process group, to ``group``, or to it ``alone``; False if it has ended.

        Raises:
            PermissionError: if the group changed to another user.
        """
        with self._reaper.holding_pids():
            if self.returncode is not None:
                return False
            try:
                if alone:
                    os.kill(self.pid, number)
                else:
                    os.killpg(group or self.pid, number)
            except ProcessLookupError:
                return False
            return True

    def _set_status(self, status: int) -> None:
        self.returncode = returncode_of(status)
        self.killed_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        self.exited.set()
        self._on_exit(self.returncode)


def returncode_of(status: int) -> int:
    """The shell's exit code for a wait status: the command's own, or 128+n for signal n."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


class Roll:
    """The PIDs of this agent's living children, in memory that a watchdog shares: no system call to keep it.

    Its owner's lock guards it. What does not fit is found by its mark alone.
    """

    SIZE = 16384

    def __init__(self) -> None:
        self._memory = memoryview(mmap.mmap(-1, 4 * self.SIZE)).cast("i")  # anonymous and shared, over a fork too
        self._places: dict[int, int] = {}
        self._free = list(range(self.SIZE - 1, -1, -1))

    def add(self, pid: int) -> None:
        if self._free:
            self._places[pid] = self._free.pop()
            self._memory[self._places[pid]] = pid

    def remove(self, pid: int) -> None:
        place = self._places.pop(pid, None)
        if place is not None:
            self._memory[place] = 0
            self._free.append(place)

    def read(self) -> list[int]:
        return [pid for pid in self._memory if pid]


class Reaper:
    """The one thread that waits for children, known and unknown alike.

    So no exit status is stolen, and no zombie stays: as PID 1 the agent inherits
    every orphan. SIGCHLD wakes it through signal.set_wakeup_fd. That needs no
    blocked signal mask, which children would inherit.

    Args:
        adopting: whether orphans are waited for; else the agent's own children alone.
        roll: lists the living children for a watchdog.
    """

    def __init__(self, adopting: bool = True, roll: Roll | None = None) -> None:
        self._adopting = adopting
        self._roll = roll  # guarded by _lock
        # Guards the attributes below. Held during waitpid(WNOHANG) and kill(2),
        # neither of which blocks, so that no PID is signalled after it was reaped.
        self._lock = threading.Lock()
        self._children: dict[int, Child] = {}
        self._spawning = 0  # spawns under way: their PIDs are not in _children yet
        self._unclaimed: dict[int, int] = {}  # PID to status, reaped while _spawning > 0
        self.orphans = 0  # unknown children reaped so far

        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._wake_write, False)
        self._thread = threading.Thread(target=self._run, name="reaper", daemon=True)

    def start(self) -> None:
        """Take over SIGCHLD; only the main thread may (signal.set_wakeup_fd)."""
        signal.signal(signal.SIGCHLD, lambda number, frame: None)  # the default would write no wake-up byte
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self._thread.start()

    def spawn(self, command: Command, descriptors: Descriptors, on_exit: Callable[[int], None]) -> Child:
        """Start a command. ``on_exit(returncode)`` is called once, from the reaper thread mostly; it must not block.

        Raises:
            SpawnError: if it cannot be started.
        """
        with self._lock:
            self._spawning += 1
        pid = 0
        try:
            pid = (_posix_spawn if command.credentials is None else _fork_as_user)(command, descriptors)
        except OSError as exc:
            raise SpawnError(f"cannot start: {exc.strerror or exc}", Reason.START_FAILED) from None
        finally:
            with self._lock:
                self._spawning -= 1
                status = self._claim(pid) if pid else None
                if self._spawning == 0:
                    self.orphans += len(self._unclaimed)
                    self._unclaimed.clear()
                if pid:
                    child = Child(self, pid, command.cookie, on_exit)
                    if status is None:
                        self._children[pid] = child
                        if self._roll is not None:
                            self._roll.add(pid)
        if status is not None:
            child._set_status(status)
        elif not self._adopting:
            os.write(self._wake_write, b"\0")  # it may have ended before its PID was known
        return child

    def _claim(self, pid: int) -> int | None:
        """The status of a new child that has been reaped already, if it has been."""
        status = self._unclaimed.pop(pid, None)
        if status is None:
            return None
        try:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return status
        # The child is still to be reaped: the status was that of an orphan with the same PID.
        self.orphans += 1
        return None

    @contextlib.contextmanager
    def holding_pids(self) -> Iterator[None]:
        """No child is reaped meanwhile, so no PID of a known child is free to be reused."""
        with self._lock:
            yield

    def _run(self) -> None:
        while True:
            try:
                os.read(self._wake_read, 4096)
                if self._adopting:
                    self._reap()
                else:
                    self._reap_own()
            except Exception as exc:
                if not isinstance(exc, MemoryError):
                    log.exception("reaper: unexpected error")
                with contextlib.suppress(BlockingIOError):  # what it has not come to, it is to look at again
                    os.write(self._wake_write, b"\0")
                time.sleep(ERROR_PAUSE)

    def _reap_own(self) -> None:
        with self._lock:
            children = list(self._children.values())
        for child in children:
            with self._lock:
                pid, status = os.waitpid(child.pid, os.WNOHANG)
                if pid == 0:
                    continue
                del self._children[pid]
                if self._roll is not None:
                    self._roll.remove(pid)
                child.returncode = returncode_of(status)
            child._set_status(status)

    def _reap(self) -> None:
        while True:
            with self._lock:
                try:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    return
                if pid == 0:
                    return
                child = self._children.pop(pid, None)
                if child is not None:
                    if self._roll is not None:
                        self._roll.remove(pid)
                    # Before the lock is let go: from here on nobody may signal the PID.
                    child.returncode = returncode_of(status)
                elif self._spawning:
                    self._unclaimed[pid] = status
                else:
                    self.orphans += 1
            if child is not None:
                child._set_status(status)


DESCRIPTORS = 65536  # the agent's own soft limit, if the hard one allows it: a session takes four
SPARE_DESCRIPTORS = 32  # the last ones, an eighth at most, which no session and no connection takes
ERROR_PAUSE = 0.1  # seconds that a thread rests after an error, which may come again at once
_child_limit: tuple[int, int] | None = None  # a child's RLIMIT_NOFILE, if it differs from the agent's


def raise_descriptor_limit() -> None:
    """Raise this process's soft limit of descriptors, but not its children's; before the first of them."""
    global _child_limit
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        _child_limit = (soft, hard)


def check_descriptor(fd: int) -> None:
    """Keep the last descriptors for what must go on at the limit: ending processes, answering, the audit log.

    Linux gives the lowest number that is free, so a high one says that those below are taken.

    Raises:
        OSError: EMFILE, if ``fd``, which has just been opened, is among the last.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and fd >= soft - min(SPARE_DESCRIPTORS, soft // 8):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>


def become_subreaper() -> None:
    """Adopt the orphans among this process's descendants, see PR_SET_CHILD_SUBREAPER(2const).

    Raises:
        OSError: if the kernel does not allow it.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@dataclasses.dataclass(frozen=True, slots=True)
class _ProcessInfo:
    """A process; equal to what was read of the same process at another time."""

    pid: int
    parent: int = dataclasses.field(compare=False)
    session: int = dataclasses.field(compare=False)
    start: int  # in clock ticks after boot: tells a reused PID


def _read_process(pid: int) -> _ProcessInfo | None:
    """One process of /proc that has not ended, see proc_pid_stat(5)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        # A leader that has ended while other threads of its process run on is a zombie, too.
        if fields[0] == b"X" or (fields[0] == b"Z" and len(os.listdir(f"/proc/{pid}/task")) < 2):
            return None
    except (FileNotFoundError, ProcessLookupError):  # it has gone meanwhile
        return None
    return _ProcessInfo(pid, int(fields[1]), int(fields[3]), int(fields[19]))


def _has_cookie(pid: int, cookies: Iterable[bytes]) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            environment = file.read()
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # gone, or another user's
        return False
    return any(cookie in environment for cookie in cookies)


class Marked(Protocol):
    """What find_processes() looks for: the processes of a child."""

    pid: int
    cookie: bytes
    returncode: int | None


def find_processes(children: Sequence[Marked] | None, known: Iterable[_ProcessInfo] = ()) -> set[_ProcessInfo]:
    """Every living process that these children started, in /proc; None for all that this agent ever did.

    A process belongs to a child by its session, by an ancestor that belongs to
    it, or by the mark in its environment: a daemon that called setsid(2) twice
    and lost its parents is found by the mark. What was ``known`` to belong, does.
    """
    own = os.getpid()
    processes = [
        process
        for process in map(_read_process, (int(name) for name in os.listdir("/proc") if name.isdigit()))
        if process is not None and process.pid != own
    ]
    if children is None:
        cookies, leaders, sessions = [_agent_mark.encode()], {own}, set()
    else:
        living = {process.pid for process in processes}
        cookies = [child.cookie for child in children]
        leaders = {child.pid for child in children if child.returncode is None}
        # While a session has members, the number of its leader that ended is no new process's.
        sessions = leaders | {child.pid for child in children if child.pid not in living}
    known = frozenset(known)
    found = {
        process
        for process in processes
        if process in known
        or process.pid in leaders
        or process.parent in leaders
        or process.session in sessions
        or _has_cookie(process.pid, cookies)
    }
    pids = {process.pid for process in found}
    size = -1
    while size != len(found):
        size = len(found)
        found |= {process for process in processes if process.parent in pids}
        pids = {process.pid for process in found}
    return found


def handles_signal(child: Child, number: int) -> bool:
    """Whether a child has a handler for a signal, so that it would not merely end of it; proc_pid_status(5)."""
    try:
        with open(f"/proc/{child.pid}/status", "rb") as file:
            caught = next(line for line in file if line.startswith(b"SigCgt:"))
    except (OSError, StopIteration):
        return False
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def _signal_process(process: _ProcessInfo, number: int) -> None:
    """Signal a process, unless its PID belongs to another by now."""
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    except OSError:  # no pidfds here (old kernels, gVisor): a window of microseconds is left
        handle = -1
    try:
        now = _read_process(process.pid)
        if now is None or now.start != process.start:
            return
        if handle >= 0:
            signal.pidfd_send_signal(handle, number)
        else:
            os.kill(process.pid, number)
    except ProcessLookupError:
        pass
    except PermissionError:
        log.warning("cannot signal process %d: it belongs to another user", process.pid)
    finally:
        if handle >= 0:
            os.close(handle)


SURE_SCANS = 3
KILL_LIMIT = 10.0  # seconds after which processes that SIGKILL does not end are given up


def signal_processes(children: Sequence[Child], number: int) -> None:
    """Signal all that these children started, whose leaders have ended."""
    for process in find_processes(children):
        _signal_process(process, number)


def end_processes(children: Sequence[Marked] | None, grace: float) -> None:
    """End all that find_processes() finds: SIGHUP, and after ``grace`` seconds SIGKILL.

    Blocks until nothing is left. SIGCONT goes along, since a stopped process
    would not see the SIGHUP; the kernel does the same for an orphaned group.
    """
    deadline = time.monotonic() + grace
    hung_up: set[_ProcessInfo] = set()
    pause = 0.01
    found: set[_ProcessInfo] = set()
    empty = 0  # scans in a row that found nothing: one may miss a process that forks and moves on
    troubled = False  # a scan has failed, and the log was told
    while empty < (SURE_SCANS if hung_up else 1):
        failed = False
        try:
            # With what was found before: a parent that has ended no longer shows whose its children are.
            found = find_processes(children, found)
        except (OSError, MemoryError) as exc:  # no descriptor left, or nothing to read into
            if not troubled:
                log.error("cannot look for processes to end, trying again: %s", explain_want(exc))
            troubled = failed = True
            found = found or hung_up
        empty = 0 if found or failed else empty + 1
        killing = time.monotonic() >= deadline
        for process in found:
            try:
                if killing:
                    _signal_process(process, signal.SIGKILL)
                elif process not in hung_up:
                    _signal_process(process, signal.SIGHUP)
                    _signal_process(process, signal.SIGCONT)
            except (OSError, MemoryError):  # the same: another time
                continue
            hung_up.add(process)
        if killing and time.monotonic() > deadline + KILL_LIMIT:
            log.error("cannot end processes %s", sorted(process.pid for process in found))
            return
        time.sleep(pause if found or failed else 0.001)  # processes that are not our children announce no exit
        pause = min(pause * 1.5, 0.2)


PR_SET_DUMPABLE = 4  # <linux/prctl.h>


def hide_memory() -> None:
    """Let no process of the same user read this one's memory and environment, and no core dump hold them.

    See PR_SET_DUMPABLE(2const). Every execve(2) resets it, so that commands are as they ever were. Only root may open
    what is private of /proc/self from now on, this process included.
    """
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


M_ARENA_MAX = -8  # <malloc.h>


def share_malloc_arena() -> None:
    """Let all threads allocate from one arena of malloc; call it before any thread exists.

    glibc gives threads arenas of their own, 8 for each core (mallopt(3)), so that they need not wait for each other.
    Python's mostly wait for its lock anyway, and what one arena has free is of no use to the others. musl has one.
    """
    with contextlib.suppress(AttributeError):
        _libc.mallopt(M_ARENA_MAX, 1)


def give_back_memory() -> None:
    """Return to the system what malloc keeps of freed memory (malloc_trim(3)); musl returns it by itself."""
    with contextlib.suppress(AttributeError):
        _libc.malloc_trim(0)


@dataclasses.dataclass
class _Leftover:
    """A child of an agent that is gone."""

    pid: int
    cookie: bytes = _agent_mark.encode()
    returncode: int | None = None


def start_watchdog(grace: float) -> Roll:
    """Start a process that outlives this one, and then ends what its children left; call it before any thread exists.

    PR_SET_PDEATHSIG would signal a child when the thread that started it ends, as a pool's threads do, and a grandchild
    not at all. A pipe breaks however the agent ends. The watchdog is forked, not executed: an image may have no other
    program, and memory stays shared until one of the two changes it. Its parent is init: nobody takes it for a command.

    Args:
        grace: seconds from SIGHUP to SIGKILL.

    Raises:
        OSError: if the system refuses a process or descriptors.
    """
    roll = Roll()
    watched, alive = os.pipe2(os.O_CLOEXEC)
    try:
        forked = os.fork()
        if forked == 0:
            failure = errno.EAGAIN
            try:
                if os.fork() == 0:
                    _watch(watched, roll, grace)
                failure = 0
            finally:
                os._exit(failure)
        _, status = os.waitpid(forked, 0)
        if status:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    except OSError:
        os.close(alive)
        raise
    finally:
        os.close(watched)
    os.set_inheritable(alive, False)  # and never closed: it breaks with this process
    return roll


def _watch(watched: int, roll: Roll, grace: float) -> NoReturn:
    """The watchdog. Holds nothing of the agent's but one end of the pipe, so that who waits for its end sees that."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    os.dup2(watched, 3)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.close(null)
    os.chdir("/")
    ctypes.CDLL(None).prctl(PR_SET_NAME, b"agent-watchdog", 0, 0, 0)
    logging.disable()
    os.read(3, 1)
    children = [_Leftover(pid) for pid in roll.read()]
    end_processes(children or None, grace)
    os._exit(0)


PR_SET_NAME = 15  # <linux/prctl.h>


# ══════════════════════════════════════════════════════════════════════════════
# 6  Pumps
#    Owns the threads that move bytes between descriptors and queues: a pool of
#    parked threads, a reader for a command's pipes, one pump for all terminals, a
#    writer per stdin while something is queued. Knows bytes and callbacks, no sessions.
# ══════════════════════════════════════════════════════════════════════════════

PIPE_SIZE = 1 << 20  # bytes that a busy pipe is grown to (F_SETPIPE_SZ)
FIRST_READ = 64 << 10  # bytes in the first read: a new pipe's capacity (pipe(7))
BUSY_READ = 512 << 10  # bytes in each once the pipe is grown: a quarter less time for a byte than with 256 KiB
IDLE_THREAD_LIFE = 10.0  # seconds that a thread stays parked
RETRY_PAUSE = 0.1  # seconds after which a thread is asked for again where the system refused one
DEFAULT_WINDOW = (80, 24)  # columns, rows


class ThreadPool:
    """Threads that are taken from a park and go back to it: ten times cheaper than new ones.

    There is no upper bound: every job may block for as long as a command runs.
    The system may have one, and who must have a thread nevertheless is called again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the attributes below
        self._idle: dict[_PoolThread, None] = {}  # a dict, so that thousands that retire at once cost little
        self._count = 0  # threads, parked ones among them
        self._retries: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def start_retrying(self) -> None:
        """Start the thread that retry_later() needs: before the system refuses any.

        Raises:
            RuntimeError: if it does already.
        """
        threading.Thread(target=self._retry, name="retry", daemon=True).start()

    def retry_later(self, callback: Callable[[], None]) -> None:
        """Call ``callback``, which submits what was refused a thread, after a while; it must not block."""
        self._retries.put(callback)

    def _retry(self) -> None:
        while True:
            callbacks = [self._retries.get()]
            time.sleep(RETRY_PAUSE)
            with contextlib.suppress(queue.Empty):
                while True:
                    callbacks.append(self._retries.get_nowait())
            for callback in callbacks:
                try:
                    callback()
                except Exception:
                    log.exception("unexpected error in a second try")
                    self._retries.put(callback)
            del callbacks, callback  # nothing is kept alive

    def submit(self, job: Callable[..., None], *args: object) -> None:
        """Run ``job`` in a thread.

        Raises:
            RuntimeError: if the system refuses another thread.
        """
        self.reserve(1)[0].run(job, *args)

    def reserve(self, count: int) -> list[_PoolThread]:
        """Take threads that wait for run(), so that what needs them cannot fail half-way.

        Raises:
            RuntimeError: if the system refuses another thread, or the memory for it.
        """
        with self._lock:
            taken = [self._idle.popitem()[0] for _ in range(min(count, len(self._idle)))]
        try:
            while len(taken) < count:
                taken.append(_PoolThread(self))
                with self._lock:
                    self._count += 1
        except Exception as exc:
            self.release(taken)
            if isinstance(exc, MemoryError):  # which is the same to whoever needs a thread
                raise RuntimeError("out of memory") from exc
            raise
        return taken

    def release(self, threads: Iterable[_PoolThread]) -> None:
        """Park threads that are not needed after all."""
        for thread in threads:
            thread.run(lambda: None)

    def _park(self, thread: _PoolThread) -> None:
        with self._lock:
            self._idle[thread] = None

    def _retire(self, thread: _PoolThread) -> bool:
        """Take a thread out of the park for good; False if somebody just reserved it."""
        with self._lock:
            if thread not in self._idle:
                return False
            del self._idle[thread]
            self._count -= 1
            return True

    def threads(self) -> tuple[int, int]:
        """How many are busy, and how many are parked."""
        with self._lock:
            return self._count - len(self._idle), len(self._idle)


class _PoolThread:
    """One thread of the pool. It owns itself; the pool's list says who may call run()."""

    def __init__(self, pool: ThreadPool) -> None:
        self._pool = pool
        self._jobs: queue.SimpleQueue[tuple[Callable[..., None], tuple[object, ...]]] = queue.SimpleQueue()
        self._abandoned = False  # set before the job that tells it
        try:
            threading.Thread(target=self._loop, name="pool", daemon=True).start()
        except Exception:  # MemoryError while its first sign of life is waited for: nobody will know it
            self._abandoned = True
            self.run(lambda: None)
            raise

    def run(self, job: Callable[..., None], *args: object) -> None:
        self._jobs.put((job, args))

    def _loop(self) -> None:
        reserved = True  # a new thread is: reserve() made it
        while True:
            try:
                job, args = self._jobs.get(timeout=None if reserved else IDLE_THREAD_LIFE)
            except queue.Empty:
                if self._pool._retire(self):
                    give_back_memory()  # there was more to do than there is: 40 us if it is for nothing
                    return
                reserved = True
                continue
            try:
                job(*args)
            except Exception:
                with contextlib.suppress(MemoryError):
                    log.exception("unexpected error in a pool thread")
            del job, args  # a parked thread keeps nothing alive
            if self._abandoned:
                return
            reserved = False
            self._pool._park(self)


class Sink(Protocol):
    """Where pumps put output: a ReplayLog, or a Channel."""

    def wait_for_room(self) -> bool:
        """Block until put() is welcome; False once nobody wants the output any more."""

    def call_when_room(self, callback: Callable[[], None]) -> bool:
        """True if put() is welcome; else ``callback`` is called once when it is, from any thread."""

    def put(self, stream: Stream, data: bytes) -> None:
        """Take ``data``; never blocks."""


class Wakeup:
    """An eventfd(2) that stays readable once set: it wakes any number of poll(2)s.

    Closed when its last holder lets go, since a descriptor that is closed while
    another thread polls it may come back as somebody else's.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()  # guards _holders, and fd against close
        self._holders = 1

    def hold(self) -> bool:
        """Become a holder; False if it is closed already."""
        with self._lock:
            self._holders += self._holders > 0
            return self._holders > 0

    def set(self) -> None:
        with self._lock:
            if self._holders:
                os.eventfd_write(self.fd, 1)

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders == 0:
                os.close(self.fd)


class PipeReader:
    """Moves the bytes of a process's pipes into a sink until they end; one thread for both.

    A pipe ends at end of file; or, once ``exited`` is set, when neither has had
    output for the drain timeout: a background child may hold them for ever.
    Holds ``exited`` from the beginning to the end of run(). No other thread enters.
    """

    def __init__(self, pipes: Mapping[int, Stream], sink: Sink, exited: Wakeup, drain_timeout: float) -> None:
        self._streams = dict(pipes)  # of the descriptors that are open
        self._sizes = dict.fromkeys(pipes, FIRST_READ)  # of the next read
        self._sink = sink
        self._exited = exited
        self._drain_timeout = min(drain_timeout, 1e6)  # poll(2) takes 24 days at most
        self._quiet_since = math.inf  # on the monotonic clock; infinite while the process runs
        self._poller = select.poll()

    def run(self, on_end: Callable[[], None], on_failure: Callable[[Exception], None]) -> None:
        """Read until the end, close the pipes and call ``on_end``; before that ``on_failure``, if output is lost."""
        self._exited.hold()
        for fd in (*self._streams, self._exited.fd):
            self._poller.register(fd, select.POLLIN)
        try:
            while self._streams:
                ready = self._poller.poll(self._timeout())
                if not ready and self._timeout() == 0:
                    break
                for fd, _ in ready:
                    if fd == self._exited.fd:
                        self._poller.unregister(fd)
                        self._quiet_since = time.monotonic()
                    else:
                        self._read(fd)
        except Exception as exc:
            on_failure(exc)
        finally:
            for fd in list(self._streams):
                self._close(fd)
            self._exited.release()
            on_end()

    def _timeout(self) -> int | None:
        """Milliseconds until it has been quiet for long enough; 0 if it has; None while the process runs."""
        if self._quiet_since == math.inf:
            return None
        return max(math.ceil((self._quiet_since + self._drain_timeout - time.monotonic()) * 1000), 0)

    def _read(self, fd: int) -> None:
        """Read a pipe that is ready, once what is read is welcome."""
        self._sink.wait_for_room()
        size = self._sizes[fd]
        try:
            data = os.read(fd, size)
        except MemoryError:  # before anything was read: less may be had, or this in a while
            self._sizes[fd] = FIRST_READ
            time.sleep(ERROR_PAUSE)
            return
        if not data:
            self._poller.unregister(fd)
            self._close(fd)
            return
        if self._quiet_since != math.inf:
            self._quiet_since = time.monotonic()
        if len(data) == size and size < BUSY_READ:
            self._sizes[fd] = BUSY_READ
            with contextlib.suppress(OSError):  # over the user's quota (pipe(7)): go on with 64 KiB
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        self._sink.put(self._streams[fd], data)

    def _close(self, fd: int) -> None:
        del self._streams[fd]
        os.close(fd)


PROGRESS_STEP = 128 << 10  # bytes that a child's stdin takes before its client is told
HANGUP_PAUSE = 100.0  # milliseconds until a terminal that nobody has open is tried again


class InputOverflow(AgentError):
    """More stdin is queued than the limit allows: the command does not read it."""


class Input:
    """A child's stdin: takes bytes at once, writes them as the child reads.

    Bytes go straight to the pipe or terminal while it has room; the rest waits
    in a queue, and a pool thread writes it, one thread as long as there is a rest.
    """

    def __init__(self, pool: ThreadPool, limit: int) -> None:
        self.limit = limit  # bytes
        self.extra: Mapping[str, str] = {}  # for log lines; set before open()
        self._pool = pool
        # Guards the attributes below. Held during write(2) on a non-blocking
        # descriptor: that and close(2) must not cross, and never wait.
        self._lock = threading.Lock()
        self._queue: collections.deque[BytesLike] = collections.deque()
        self._queued = 0  # bytes in _queue
        self._fd = -1  # -1 before open() and once closed
        self._exited: Wakeup | None = None
        self._terminal = False
        self._grown = False  # whether the pipe has its full size
        self._last = b""  # the last byte written
        self.accepted = 0  # bytes so far that write() took
        self._told = 0  # bytes so far that a listener knows to be written, or of no use to anybody
        self._listeners: list[Callable[[int], None]] = []
        self._ending = False  # close after the queue
        self._dead = False  # the child is gone: whatever comes is dropped, as in a broken pipe
        self._writing = False  # a pool thread has the queue
        self._refused = False  # it could not have one, and that was said; whoever starts the writer sets it
        self._retrying = False  # the pool will call _write_rest(), once for all that comes before

    def open(self, fd: int, exited: Wakeup, terminal: bool = False) -> None:
        """Start to write to ``fd``, a non-blocking descriptor that now belongs to this object."""
        with self._lock:
            self._fd = fd
            self._exited = exited
            self._terminal = terminal
            self._write_some()  # closes at once if the end of input came first
            start = self._claim_writer()
        if start:
            self._start_writer()
        self._tell()

    def write(self, data: BytesLike) -> None:
        """Queue ``data``.

        Raises:
            InputOverflow: if the queue is full; nothing of ``data`` is taken.
        """
        if not data:
            return
        with self._lock:
            if self._dead or self._ending:
                self.accepted += len(data)
                return
            if self._queued + len(data) > self.limit:
                raise InputOverflow(f"the command has not read its stdin: {self._queued} bytes are waiting, "
                                    f"and {self.limit} is the limit")  # fmt: skip
            self._queue.append(data)
            self._queued += len(data)
            self.accepted += len(data)
            self._last = bytes(data[-1:])
            if not self._writing:
                self._write_some()
            start = self._claim_writer()
        if start:
            self._start_writer()
        self._tell()

    def end(self) -> None:
        """Close stdin once the queue is written; on a terminal, type its end-of-file character."""
        with self._lock:
            if self._dead or self._ending:
                return
            self._ending = True
            if not self._writing:
                self._write_some()
            start = self._claim_writer()
        if start:
            self._start_writer()

    def discard(self) -> None:
        """The child is gone: drop what is queued and close."""
        with self._lock:
            self._dead = True
            self._queue.clear()
            self._queued = 0
            self._close()

    def listen(self, listener: Callable[[int], None]) -> None:
        """Call ``listener`` with the count of bytes that the child's pipe has taken, now and then."""
        with self._lock:
            self._listeners.append(listener)

    def written(self) -> int:
        """Bytes so far that the child's pipe has taken."""
        with self._lock:
            return max(self.accepted - self._queued, 0)

    def queued(self) -> int:
        """Bytes that wait for the child to read them."""
        return self._queued

    def _tell(self) -> None:
        """Tell the listeners, if there is enough to tell."""
        if not self._listeners:
            return
        with self._lock:
            written = max(self.accepted - self._queued, 0)
            if written == self._told or (self._queue and written - self._told < PROGRESS_STEP):
                return
            self._told = written
            listeners = list(self._listeners)
        for listener in listeners:
            listener(written)

    def _claim_writer(self) -> bool:
        """Whether the caller must start the writer. Holds the lock."""
        if self._writing or not self._queue or self._fd < 0 or self._dead:
            return False
        assert self._exited is not None
        self._writing = self._exited.hold()
        return self._writing

    def _start_writer(self) -> None:
        try:
            self._pool.submit(self._write_queue)
        except RuntimeError as exc:
            self._stop_writer(restart=False)
            if not self._refused:
                log.error("stdin: no thread to write %d bytes, trying again: %s", self._queued, exc, extra=self.extra)
            self._refused = True
            with self._lock:
                retrying, self._retrying = self._retrying, True
            if not retrying:
                self._pool.retry_later(self._write_rest)
        else:
            self._refused = False

    def _write_rest(self) -> None:
        """Write what waits, with another try to have a thread for what the child does not take at once."""
        with self._lock:
            self._retrying = False
            if not self._writing:
                self._write_some()
            start = self._claim_writer()
        if start:
            self._start_writer()
        self._tell()

    def _write_queue(self) -> None:
        """Write as the child reads, until the queue is empty or the child is gone."""
        assert self._exited is not None
        poller = select.poll()
        poller.register(self._fd, select.POLLOUT)
        poller.register(self._exited.fd, select.POLLIN)
        pause: float | None = None
        try:
            while True:
                events = poller.poll(pause)
                poller.register(self._fd, select.POLLOUT)
                pause = None
                for ready, event in events:
                    if ready != self._exited.fd and event & select.POLLHUP and self._terminal:
                        # Nobody has the terminal open, now; that is always ready, and takes nothing.
                        poller.unregister(self._fd)
                        pause = HANGUP_PAUSE
                with self._lock:
                    if any(ready == self._exited.fd for ready, _ in events):
                        self._dead = True
                    else:
                        self._grow()
                    self._write_some()
                    if self._dead or not self._queue:
                        return
                self._tell()
        finally:
            self._stop_writer()
            self._tell()

    def _stop_writer(self, restart: bool = True) -> None:
        assert self._exited is not None
        with self._lock:
            self._writing = False
            # What came between the last write and this line is not forgotten.
            self._write_some()
            start = restart and self._claim_writer()
            if self._dead:
                self._queue.clear()
                self._queued = 0
        self._exited.release()
        if start:
            self._start_writer()

    def _write_some(self) -> None:
        """Write without waiting, and close if that was the end. Holds the lock."""
        while self._queue and self._fd >= 0 and not self._dead:
            data = self._queue[0]
            try:
                count = os.write(self._fd, data)
            except BlockingIOError:
                return
            except OSError:  # EPIPE: nobody reads any more; EIO: the terminal was hung up
                self._dead = True
                self._queue.clear()
                self._queued = 0
                break
            self._queued -= count
            self._queue.popleft()
            if count < len(data):
                self._queue.appendleft(memoryview(data)[count:])
        if self._dead or (self._ending and not self._terminal and not self._queue):
            self._close()
        elif self._ending and not self._queue and self._fd >= 0:
            self._ending = False  # a terminal stays open: more may be typed later
            keys = self._end_of_file_keys()
            if keys:
                self._queue.append(keys)
                self._queued += len(keys)
                self._write_some()

    def _grow(self) -> None:
        """Make a pipe larger that was full and is read: that saves most changes of threads. Holds the lock."""
        if self._grown or self._terminal or self._fd < 0:
            return
        self._grown = True
        with contextlib.suppress(OSError):  # over the user's quota (pipe(7)): go on with 64 KiB
            fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)

    def _end_of_file_keys(self) -> bytes:
        """End of input as a person types it, termios(3): VEOF ends a line, or the input at a line's start."""
        try:
            attributes = termios.tcgetattr(self._fd)
        except termios.error:
            return b""
        if not attributes[3] & termios.ICANON:
            return b""  # a program that reads raw has no end of input
        character: bytes = attributes[6][termios.VEOF]
        line_ends = (b"", b"\n", b"\r") if attributes[0] & termios.ICRNL else (b"", b"\n")
        keys = character if self._last in line_ends else character * 2
        self._last = b""
        return keys

    def _close(self) -> None:
        """Close unless a writer polls the descriptor: then that closes it. Holds the lock."""
        if self._fd >= 0 and not self._writing:
            os.close(self._fd)
            self._fd = -1


class Terminal:
    """A pseudo-terminal (pty(7)): the agent keeps the master, a child gets the slave by path."""

    def __init__(self, width: int, height: int) -> None:
        """Open one, ``width`` columns by ``height`` rows.

        Raises:
            OSError: if the system has no terminal left.
        """
        # Guards master against close: ioctl(2)s and write(2)s come from any thread, and never wait.
        self._lock = threading.Lock()
        self.master, self._slave = os.openpty()
        try:
            self.path = os.ttyname(self._slave)  # fails where no /dev/pts is mounted
            os.set_blocking(self.master, False)
            self.resize(width, height)
        except BaseException:
            self.close()
            raise

    def resize(self, width: int, height: int) -> None:
        """Set the size and send SIGWINCH to the foreground group, as TIOCSWINSZ does; harmless once closed."""
        with self._lock:
            if self.master >= 0:
                fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def foreground_group(self) -> int:
        """The foreground process group, 0 if there is none."""
        with self._lock:
            try:
                return os.tcgetpgrp(self.master) if self.master >= 0 else 0
            except OSError:
                return 0

    def close_slave(self) -> None:
        """The child has its own by now: from here on its end is seen as EIO on the master."""
        if self._slave >= 0:
            os.close(self._slave)
            self._slave = -1

    def close(self) -> None:
        self.close_slave()
        with self._lock:
            if self.master >= 0:
                os.close(self.master)
                self.master = -1


@dataclasses.dataclass(slots=True)
class PumpedTerminal:
    """What the terminal pump knows about one terminal; only its thread touches it."""

    fd: int
    sink: Sink
    on_end: Callable[[], None]
    on_failure: Callable[[Exception], None]
    drain_timeout: float
    quiet_after: float | None = None  # monotonic time; set once the child has ended
    paused: bool = False  # waits for room in its sink: not quiet, only slow


class TerminalPump:
    """One thread that reads every terminal's master side, with a selector."""

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # run by the thread, in order
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()  # guards _started
        self._started = False
        # Only the thread touches these.
        self._terminals: dict[int, PumpedTerminal] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wakeup, selectors.EVENT_READ)

    def start(self) -> None:
        """Start the thread, if that has not been done yet.

        Raises:
            RuntimeError: if the system refuses it.
        """
        with self._lock:
            if not self._started:
                threading.Thread(target=self._run, name="terminal-pump", daemon=True).start()
                self._started = True

    def add(
        self,
        fd: int,
        sink: Sink,
        drain_timeout: float,
        on_end: Callable[[], None],
        on_failure: Callable[[Exception], None],
    ) -> PumpedTerminal:
        """Move ``fd``'s bytes into ``sink`` until it ends; then call ``on_end``, which may close it.

        ``on_failure`` is called before that, if output is lost.
        """
        terminal = PumpedTerminal(fd, sink, on_end, on_failure, drain_timeout)
        self._order(lambda: self._add(terminal))
        return terminal

    def drain(self, terminal: PumpedTerminal) -> None:
        """The child has ended: end once the terminal has been quiet for its drain timeout."""
        self._order(lambda: self._drain(terminal))

    def _order(self, order: Callable[[], None]) -> None:
        self._orders.put(order)
        os.eventfd_write(self._wakeup, 1)

    def _run(self) -> None:
        while True:
            try:
                for key, _ in self._selector.select(self._timeout()):
                    if key.fd == self._wakeup:
                        self._obey()
                    else:
                        self._read(self._terminals[key.fd])
                self._end_quiet()
            except Exception:
                log.exception("terminal pump: unexpected error")

    def _obey(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wakeup)
        while True:
            try:
                order = self._orders.get_nowait()
            except queue.Empty:
                return
            order()

    def _add(self, terminal: PumpedTerminal) -> None:
        self._terminals[terminal.fd] = terminal
        self._selector.register(terminal.fd, selectors.EVENT_READ)

    def _drain(self, terminal: PumpedTerminal) -> None:
        terminal.quiet_after = time.monotonic() + terminal.drain_timeout

    def _timeout(self) -> float | None:
        times = [
            terminal.quiet_after
            for terminal in self._terminals.values()
            if terminal.quiet_after is not None and not terminal.paused
        ]
        return max(min(times) - time.monotonic(), 0) if times else None

    def _read(self, terminal: PumpedTerminal) -> None:
        if not terminal.sink.call_when_room(lambda: self._order(lambda: self._resume(terminal))):
            self._selector.unregister(terminal.fd)
            terminal.paused = True
            return
        try:
            data = os.read(terminal.fd, FIRST_READ)
        except BlockingIOError:
            return
        except MemoryError:  # before anything was read
            time.sleep(ERROR_PAUSE)
            return
        except OSError:  # EIO: the last slave was closed, which is a terminal's end of file
            data = b""
        if not data:
            self._end(terminal)
            return
        if terminal.quiet_after is not None:
            terminal.quiet_after = time.monotonic() + terminal.drain_timeout
        try:
            terminal.sink.put(Stream.STDOUT, data)
        except MemoryError as exc:
            terminal.on_failure(exc)

    def _resume(self, terminal: PumpedTerminal) -> None:
        if terminal.paused:
            terminal.paused = False
            self._selector.register(terminal.fd, selectors.EVENT_READ)
            if terminal.quiet_after is not None:
                terminal.quiet_after = time.monotonic() + terminal.drain_timeout

    def _end_quiet(self) -> None:
        now = time.monotonic()
        for terminal in list(self._terminals.values()):
            if terminal.quiet_after is None or now < terminal.quiet_after or terminal.paused:
                continue
            if select.select((terminal.fd,), (), (), 0)[0]:
                self._read(terminal)  # however short the drain timeout, what is there is output
            else:
                self._end(terminal)

    def _end(self, terminal: PumpedTerminal) -> None:
        self._selector.unregister(terminal.fd)
        del self._terminals[terminal.fd]
        terminal.on_end()


# ══════════════════════════════════════════════════════════════════════════════
# 7  Outgoing queue
#    Owns what waits to be sent on one connection. Pumps and sessions put into
#    it; whoever has the role of sending takes out: the connection's writer
#    thread, or for something small the thread that put it. No I/O.
# ══════════════════════════════════════════════════════════════════════════════

CHANNEL_LIMIT = 1 << 20  # bytes of one session that may wait, if there are few sessions
CHANNEL_MINIMUM = 64 << 10  # and if there are very many
OUTBOX_LIMIT = 64 << 20  # bytes of all sessions of a connection that may wait, about
FRAME_LIMIT = 1 << 20  # bytes of output in one data frame
BATCH_SIZE = 256 << 10  # bytes that are worth a system call of their own
PONGS_LIMIT = 16 << 10  # bytes of messages without a session from which on a pong replaces the one before it
SEND_NOW_LIMIT = 16 << 10  # bytes that whoever puts them may send itself
SEND_NOW_BINARY_LIMIT = 1 << 20  # the same in version 2, where nothing is to be encoded
PACED_BURST = 16  # small frames of a session that go out at once, in a paced outbox
PACED_RATE = 25.0  # frames/s that go out after them


class Channel:
    """One session's messages on their way to one connection, in their order: a Sink.

    Bytes that wait are sent as one frame. In a paced outbox a session that goes on
    to write little by little, and to which nobody speaks, is made to wait for
    that: a deployed Go backend drops what exceeds 64 messages a session.
    """

    def __init__(self, outbox: Outbox, session_id: str, binary: bool = False) -> None:
        self._outbox = outbox
        self._binary = binary  # data frames of version 2
        self.send_now_limit = SEND_NOW_BINARY_LIMIT if binary else SEND_NOW_LIMIT
        make_prefix = data_frame_prefix if binary else data_prefix
        self._prefixes = {stream: make_prefix(stream, session_id) for stream in Stream}
        # Guarded by the outbox's lock, as is everything in an outbox.
        self._entries: collections.deque[tuple[Stream | None, bytes]] = collections.deque()
        self._size = 0  # bytes in _entries
        self._room = threading.Condition(outbox._lock)
        self._on_room: Callable[[], None] | None = None
        self._on_sent: Callable[[], None] | None = None
        self._resting = False  # in the outbox's _resting instead of _ready
        self._budget = float(PACED_BURST)  # small frames that may go out at once
        self._budget_of = 0.0  # when that was reckoned, on the monotonic clock

    def refill(self) -> None:
        """The client has said something: what answers it is not held back."""
        outbox = self._outbox
        if not outbox.paced:
            return
        with outbox._lock:
            self._budget = float(PACED_BURST)
            if self._resting:
                self._end_rest()
                outbox._work.notify()

    def _end_rest(self) -> None:
        """Be ready before the time. Holds the outbox's lock."""
        self._resting = False
        self._outbox._ready.append(self)

    def waiting(self) -> int:
        """Bytes that wait."""
        return self._size

    def wait_for_room(self) -> bool:
        outbox = self._outbox
        with outbox._lock:
            self._room.wait_for(lambda: outbox._closed or self._size < outbox._channel_limit())
            return not outbox._closed

    def call_when_room(self, callback: Callable[[], None]) -> bool:
        outbox = self._outbox
        with outbox._lock:
            if outbox._closed or self._size < outbox._channel_limit():
                return True
            self._on_room = callback
            return False

    def put(self, stream: Stream, data: bytes) -> None:
        """Queue output; dropped if the connection is closed."""
        if self._append(stream, data):
            self._outbox.send_queued()

    def queue(self, stream: Stream | None, data: bytes) -> None:
        """Queue output, or without a stream a message, for send_queued()."""
        self._append(stream, data)

    def send_queued(self) -> None:
        """Have what is queued sent, if it can be without waiting by this thread."""
        self._outbox.send_queued()

    def send(self, message: Request | Event, on_sent: Callable[[], None] | None = None) -> None:
        """Queue a message behind what the session has queued so far.

        Args:
            on_sent: for the last message: called when it is on its way, or never will be.
        """
        if self._append(None, encode(message), on_sent):
            self._outbox.send_queued()
        elif on_sent is not None:
            on_sent()

    def discard(self) -> None:
        """Drop what waits: its session has ended."""
        with self._outbox._lock:
            self._entries.clear()
            self._size = 0
            if self._resting:
                self._resting = False
            else:
                with contextlib.suppress(ValueError):
                    self._outbox._ready.remove(self)
            self._room.notify_all()

    def _append(self, stream: Stream | None, data: bytes, on_sent: Callable[[], None] | None = None) -> bool:
        """Queue a message; False if the connection is closed."""
        outbox = self._outbox
        with outbox._lock:
            if outbox._closed:
                return False
            self._on_sent = on_sent
            idle = not self._entries
            if not idle and stream is self._entries[-1][0] and stream is not None:
                last = self._entries[-1][1]
                if len(last) + len(data) <= SMALL_CHUNK:  # a queue of bytes is no queue of objects
                    self._entries.pop()
                    self._size -= len(last)
                    data = last + data
            self._entries.append((stream, data))
            self._size += len(data)
            urgent = stream is None or self._size >= BATCH_SIZE
            if idle:
                pause = self._pause() if outbox.paced and not urgent else 0.0
                if pause > 0:
                    outbox._rest_until(time.monotonic() + pause, self)
                    return True
                outbox._ready.append(self)
            elif self._resting and urgent:
                self._end_rest()
        return True

    def _pause(self) -> float:
        """Seconds until the next small frame may go out. Holds the outbox's lock."""
        now = time.monotonic()
        self._budget = min(self._budget + (now - self._budget_of) * PACED_RATE, PACED_BURST)
        self._budget_of = now
        return (1 - self._budget) / PACED_RATE

    def _take_turn(self) -> _Turn:
        """Take as much as makes one frame. Holds the outbox's lock."""
        stream, data = self._entries.popleft()
        chunks, size = [data], len(data)
        if stream is not None:
            passed: list[tuple[Stream | None, bytes]] = []
            while self._entries and size + len(self._entries[0][1]) <= FRAME_LIMIT:
                if self._entries[0][0] is not stream:
                    # Only within a stream is the order promised. Where frames are
                    # few, what alternates is put together across the other's bytes.
                    if not self._outbox.paced or self._entries[0][0] is None:
                        break
                    passed.append(self._entries.popleft())
                    continue
                data = self._entries.popleft()[1]
                chunks.append(data)
                size += len(data)
            self._entries.extendleft(reversed(passed))
            self._outbox.sent[stream] += size
        self._size -= size
        if size < BATCH_SIZE:
            self._budget = max(self._budget - 1, -1.0)
        self._room.notify_all()
        return _Turn(chunks, size, self._prefixes[stream] if stream is not None else None, self._binary)


DEFAULT_WINDOW_SIZE = 1 << 20  # bytes that a version 2 client holds unacknowledged, unless it says otherwise
LARGEST_WINDOW = 64 << 20


class Flow:
    """A version 2 session's output: a Sink that keeps what its client has not acknowledged.

    Every byte has an offset, counted from 0 over stdout and stderr together, in
    the order in which they go out. Past the window nothing is sent and the sink
    has no room, so that the command waits in its own write and no other session
    does. A connection may end and another take its place: what is kept is sent
    again. Nothing is sent before the word that the session has started.
    """

    def __init__(self, window: int) -> None:
        # Guards the attributes below. Held while something is handed to the
        # channel, which never waits: offsets are to agree with the order there.
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._channel: Channel | None = None  # None while no connection has the session
        # In both, None instead of a stream is a message, which takes no offset.
        self._kept: collections.deque[tuple[Stream | None, bytes]] = collections.deque()  # sent
        self._unsent: collections.deque[tuple[Stream | None, bytes]] = collections.deque()
        self._acked = 0  # offset of the first byte in _kept
        self._consumed = 0  # offset from which the window is counted: what the client has is not read there yet
        self._sent = 0  # offset of the first byte in _unsent
        self._end = 0  # offset of the next byte
        self._window = window
        self._first: Started | None = None
        self._last: Exit | Error | None = None
        self._last_sent = False
        self._closed = False  # nobody will ever read on
        self._on_room: Callable[[], None] | None = None

    @property
    def begun(self) -> bool:
        """Whether the session has started."""
        return self._first is not None

    @property
    def code(self) -> int | None:
        """The exit code, once the session has ended with one."""
        return self._last.code if isinstance(self._last, Exit) else None

    @property
    def finished(self) -> bool:
        """Whether the session has had its last word."""
        return self._last is not None

    def unacknowledged(self) -> int:
        """Bytes that are kept because the client has not acknowledged them."""
        return self._end - self._acked

    def wait_for_room(self) -> bool:
        with self._lock:
            self._room.wait_for(self._has_room)
            return not self._closed

    def _has_room(self) -> bool:
        return self._closed or self._end - self._consumed < self._window

    def call_when_room(self, callback: Callable[[], None]) -> bool:
        with self._lock:
            if self._has_room():
                return True
            self._on_room = callback
            return False

    def put(self, stream: Stream, data: bytes) -> None:
        with self._lock:
            if self._closed:
                return
            self._unsent.append((stream, data))
            self._end += len(data)
            channel = self._pass_on()
        self._send(channel)

    def announce_loss(self, session_id: str, lost: int) -> None:
        """Say at this place that bytes are missing."""
        with self._lock:
            self._unsent.append((None, encode(Lost(session_id, self._end, lost))))
            channel = self._pass_on()
        self._send(channel)

    def begin(self, message: Started) -> None:
        """Send that the session has started, and then its output."""
        with self._lock:
            self._first = message
            if self._channel is not None:
                self._channel.queue(None, encode(message))
            channel = self._pass_on()
        self._send(channel)

    def send(self, message: Ack) -> None:
        """Send a message at once; it is not kept."""
        with self._lock:
            channel = self._channel
            if channel is not None:
                channel.queue(None, encode(message))
        self._send(channel)

    def finish(self, message: Exit | Error) -> None:
        """Send the exit, or an error instead, behind all output, and keep it: the session's last word."""
        with self._lock:
            self._last = message
            channel = self._pass_on()
        self._send(channel)

    @staticmethod
    def _send(channel: Channel | None) -> None:
        """Send what _pass_on() queued: without the lock, which those who acknowledge need meanwhile."""
        if channel is not None:
            channel.send_queued()

    def _pass_on(self) -> Channel | None:
        """Queue in the channel, which is returned, what the window allows. Holds the lock."""
        channel = self._channel
        if channel is None or (self._first is None and not isinstance(self._last, Error)):
            return channel
        while self._unsent and self._first is not None:  # else its start could not be told, and it has failed
            stream, data = self._unsent[0]
            if stream is not None:
                allowed = self._consumed + self._window - self._sent
                if allowed <= 0:
                    return channel
                if len(data) > allowed:
                    self._unsent[0] = (stream, data[allowed:])
                    self._unsent.appendleft((stream, data := data[:allowed]))
                self._sent += len(data)
            channel.queue(stream, data)
            self._kept.append(self._unsent.popleft())
        if self._last is not None and not self._last_sent:
            self._last_sent = True
            channel.queue(None, encode(self._last))
        return channel

    def acknowledge(self, offset: int) -> None:
        """Forget every byte below ``offset``.

        Raises:
            ValueError: if they have not been sent.
        """
        with self._lock:
            if offset > self._sent:
                raise ValueError(f"offset {offset} is beyond the {self._sent} bytes that were sent")
            self._consumed = max(self._consumed, offset)
            self._forget(offset)
            channel = self._pass_on()
            callback = self._take_callback()
        self._send(channel)
        if callback is not None:
            callback()

    def _forget(self, offset: int) -> None:
        while self._acked < offset:
            stream, data = self._kept.popleft()
            if stream is None:
                continue
            keep = self._acked + len(data) - offset
            if keep > 0:
                self._kept.appendleft((stream, data[-keep:]))
                self._acked = offset
            else:
                self._acked += len(data)

    def _take_callback(self) -> Callable[[], None] | None:
        """Who waits for room, if there is some. Holds the lock."""
        if not self._has_room():
            return None
        self._room.notify_all()
        callback, self._on_room = self._on_room, None
        return callback

    def connect(self, channel: Channel) -> None:
        """Send through the first channel."""
        with self._lock:
            self._channel = channel

    def check(self, offset: int, acked: int) -> None:
        """Raises ValueError if the flow cannot go on at ``offset`` for a client that has consumed all below ``acked``.

        That is so if bytes from there on are kept no longer, or were never sent.
        """
        with self._lock:
            if not self._acked <= offset <= self._sent:
                raise ValueError(f"offset {offset} is not from {self._acked} to {self._sent}")
            if acked > offset:
                raise ValueError(f"{acked} bytes are acknowledged, and {offset} received")

    def resume(self, channel: Channel, message: Resumed, acked: int, window: int) -> None:
        """Send through another channel, and first, behind ``message``, what the client does not have; see check()."""
        with self._lock:
            self._forget(message.offset)
            self._consumed = max(self._consumed, acked)
            self._unsent.extendleft(reversed(self._kept))
            self._kept.clear()
            self._sent = self._acked
            self._last_sent = False
            self._window = window
            self._channel = channel
            channel.queue(None, encode(message))
            if self._first is not None:  # the client may not know yet
                channel.queue(None, encode(self._first))
            self._pass_on()
            callback = self._take_callback()
        channel.send_queued()
        if callback is not None:
            callback()

    def disconnect(self, channel: Channel) -> None:
        """The connection has ended, unless another has taken its place already."""
        with self._lock:
            if self._channel is channel:
                self._channel = None

    def close(self) -> None:
        """Nobody reads on: let everybody go who waits."""
        with self._lock:
            self._closed = True
            self._channel = None
            self._kept.clear()
            self._unsent.clear()
            callback = self._take_callback()
        if callback is not None:
            callback()


@dataclasses.dataclass(frozen=True, slots=True)
class _Turn:
    """What one channel sends in one frame."""

    chunks: list[bytes]
    size: int
    prefix: bytes | None  # of a data message; None for a message that is encoded already
    binary: bool = False

    def frame(self, masked: bool) -> list[BytesLike]:
        if self.binary and self.prefix is not None:
            return make_frame(Opcode.BINARY, [self.prefix, *self.chunks], masked)
        data = self.chunks[0] if len(self.chunks) == 1 else b"".join(self.chunks)
        payload = [data] if self.prefix is None else encode_data(self.prefix, data)
        return make_frame(Opcode.TEXT, payload, masked)


class Outbox:
    """Everything that waits to be sent on one connection.

    Control frames and messages without a session go first. Then sessions take
    turns of one frame each, so that a flood of one delays another by a frame.

    Sending is a role that one thread has at a time: the writer, or whoever puts
    something small into an empty outbox and sends it without waiting. That
    saves a change of threads, a fifth of an echo's round trip (scripts/bench).
    """

    def __init__(self, masked: bool, paced: bool = False) -> None:
        self.masked = masked  # the client's side masks its frames
        self.paced = paced  # for a peer that drops what comes in many small frames, see Channel
        # Guards everything here and in the channels. Held for no I/O and no callback.
        self._lock = threading.Lock()
        self.sent = [0, 0, 0]  # bytes of each Stream that were put into frames
        self._work = threading.Condition(self._lock)  # the writer waits here
        self._idle = threading.Condition(self._lock)  # flush() waits here
        self._frames: collections.deque[bytes] = collections.deque()  # ready for the socket; b"" closes our side
        self._frames_size = 0
        # Channels with entries, each in one of these once: in _ready, or while it
        # waits for more in _resting, a heap by the time until then. There an entry
        # whose channel's _resting is False is a leftover.
        self._ready: collections.deque[Channel] = collections.deque()
        self._resting: list[tuple[float, int, Channel]] = []
        self._rests = itertools.count()  # so that no two entries compare equal up to the channel
        self._sending = False  # somebody has the role
        self._writer_sends = False  # and it is the writer
        self._rest: list[BytesLike] = []  # taken, and not accepted by the socket without waiting
        self._send_now: Callable[[list[bytes | _Turn]], list[BytesLike]] | None = None
        self._closed = False  # no more messages are taken
        self._ended = False  # nothing is: the socket is closed

    def _channel_limit(self) -> int:
        return max(CHANNEL_MINIMUM, min(CHANNEL_LIMIT, OUTBOX_LIMIT // (len(self._ready) or 1)))

    def _rest_until(self, due: float, channel: Channel) -> None:
        """Let a channel wait for more. Holds the lock."""
        channel._resting = True
        heapq.heappush(self._resting, (due, next(self._rests), channel))
        self._work.notify()  # the writer wakes it

    def _end_rests(self, everybody: bool = False) -> float | None:
        """Make channels ready whose rest is over; seconds until the next one's is. Holds the lock."""
        now = math.inf if everybody else time.monotonic()
        while self._resting and (self._resting[0][0] <= now or not self._resting[0][2]._resting):
            channel = heapq.heappop(self._resting)[2]
            if channel._resting:
                channel._end_rest()
        return self._resting[0][0] - now if self._resting else None

    def push_frame(self, frame: bytes) -> None:
        """Queue a control frame that websockets made, or the end of the stream (b"")."""
        with self._lock:
            if self._ended:
                return
            # RFC 6455 §5.5.3: only the latest ping needs an answer. Each gets one, but
            # a peer that pings and never reads must not fill the memory.
            pongs = frame[:1] == b"\x8a" and self._frames and self._frames[-1][:1] == b"\x8a"
            if pongs and self._frames_size > PONGS_LIMIT:
                self._frames_size -= len(self._frames.pop())
            self._frames.append(frame)
            self._frames_size += len(frame)
            self._work.notify()

    def send(self, message: Request | Event) -> None:
        """Queue a message ahead of every session's output; dropped if the connection is closed."""
        frame = b"".join(make_frame(Opcode.TEXT, [encode(message)], self.masked))
        with self._lock:
            if self._closed:
                return
            self._frames.append(frame)
            self._frames_size += len(frame)
        self.send_queued()

    def wait_for_calm(self, limit: int) -> None:
        """Block while more than ``limit`` bytes of messages without a session wait."""
        with self._lock:
            self._idle.wait_for(lambda: self._closed or self._frames_size <= limit)

    def stop(self) -> None:
        """The closing handshake has begun: whatever is not sent yet no longer will be."""
        with self._lock:
            callbacks = self._stop()
        for callback in callbacks:
            callback()

    def _stop(self) -> list[Callable[[], None]]:
        if self._closed:
            return []
        self._closed = True
        self._end_rests(everybody=True)
        waiting = list(self._ready)
        for channel in waiting:
            channel._entries.clear()
            channel._size = 0
            channel._room.notify_all()
        self._ready.clear()
        self._idle.notify_all()
        return [
            callback for channel in waiting for callback in (channel._on_room, channel._on_sent) if callback is not None
        ]

    def end(self) -> None:
        """The socket is closed: drop everything, let everybody go."""
        with self._lock:
            callbacks = self._stop()
            self._ended = True
            self._rest.clear()
            self._frames.clear()
            self._frames_size = 0
            self._work.notify_all()
            self._idle.notify_all()
        for callback in callbacks:
            callback()

    def allow_sending_now(self, send_now: Callable[[list[bytes | _Turn]], list[BytesLike]]) -> None:
        """Let threads that put something small send it themselves.

        ``send_now`` sends a batch without waiting and returns what the socket did not accept.
        """
        with self._lock:
            self._send_now = send_now

    def send_queued(self) -> None:
        """Send what waits, without waiting, if the role is to be had and it is one session's; else wake the writer.

        What the socket does not accept is the writer's.
        """
        with self._lock:
            if not self._frames and not self._ready:
                return
            if (
                self._send_now is None
                or self._sending
                or self._rest
                or len(self._ready) > 1
                or b"" in self._frames  # the writer knows how to end the stream
                or self._frames_size > SEND_NOW_LIMIT
                or (self._ready and self._ready[0]._size > self._ready[0].send_now_limit)
            ):
                self._work.notify()
                return
            self._sending = True
            batch, callbacks = self._take_batch()
        for callback in callbacks:
            callback()
        rest = self._send_now(batch)
        with self._lock:
            self._sending = False
            self._rest = rest
            if self._rest or self._frames or self._ready:
                self._work.notify()
            else:
                self._idle.notify_all()

    def _take_batch(self) -> tuple[list[bytes | _Turn], list[Callable[[], None]]]:
        """The next batch, and the callbacks of channels that have room again, or have ended. Holds the lock."""
        batch: list[bytes | _Turn] = list(self._frames)
        size = self._frames_size
        self._frames.clear()
        self._frames_size = 0
        callbacks = []
        while self._ready and size < BATCH_SIZE:
            channel = self._ready.popleft()
            turn = channel._take_turn()
            batch.append(turn)
            size += turn.size
            if channel._entries:
                self._ready.append(channel)
            elif channel._on_sent is not None:
                callbacks.append(channel._on_sent)
                channel._on_sent = None
            if channel._on_room is not None:
                callbacks.append(channel._on_room)
                channel._on_room = None
        return batch, callbacks

    def take(self) -> tuple[list[BytesLike], list[bytes | _Turn]] | None:
        """Give the role back, wait for work and take it again with a batch; None once ended.

        For the writer alone. The first list is what another thread could not send.
        """
        with self._lock:
            if self._writer_sends:  # not so the first time: then another thread may have the role
                self._sending = self._writer_sends = False
                self._idle.notify_all()
            while True:
                pause = self._end_rests()
                if self._ended or (not self._sending and (self._rest or self._frames or self._ready)):
                    break
                self._work.wait(pause)
            if self._ended:
                return None
            self._sending = self._writer_sends = True
            rest, self._rest = self._rest, []
            batch, callbacks = self._take_batch()
        for callback in callbacks:
            callback()
        return rest, batch

    def waiting(self) -> int:
        """Bytes that the socket has not been given yet."""
        with self._lock:
            resting = (channel for _, _, channel in self._resting if channel._resting)
            channels = sum(channel._size for channel in (*self._ready, *resting))
            return channels + self._frames_size + sum(map(len, self._rest))

    def flush(self, timeout: float) -> bool | None:
        """Wait until everything was handed to the kernel; False if it was not in ``timeout`` seconds.

        None if it never will be: the connection is closed.
        """
        with self._lock:
            self._end_rests(everybody=True)
            self._work.notify()
            done = self._idle.wait_for(
                lambda: self._closed or not (self._frames or self._ready or self._rest or self._sending), timeout
            )
            return None if self._closed else done


# ══════════════════════════════════════════════════════════════════════════════
# 8  Sessions
#    Owns what a client started: processes with their pumps, exec and attach
#    sessions, the main process. Entered by the connection threads (requests),
#    pool threads (start, pump) and the reaper (exit); none of them ever waits
#    for a command here.
# ══════════════════════════════════════════════════════════════════════════════


class Endings:
    """Counts what is being ended in other threads, so that the agent's own end can wait for it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards _count
        self._count = 0

    def begin(self) -> None:
        with self._changed:
            self._count += 1

    def finish(self) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def wait(self, timeout: float) -> bool:
        """Wait until nothing is being ended; False if something still is after ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._count, timeout)


@dataclasses.dataclass(frozen=True, slots=True)
class Runtime:
    """What everything needs that starts processes; made once."""

    config: Config
    pool: ThreadPool
    reaper: Reaper
    terminals: TerminalPump
    endings: Endings = dataclasses.field(default_factory=Endings)
    archives: Endings = dataclasses.field(default_factory=Endings)  # those that are packed or unpacked
    books: Books = dataclasses.field(default_factory=Books)

    def end_later(self, children: Sequence[Child]) -> None:
        """End what these children started, without waiting for it."""
        if not children:
            return
        self.endings.begin()
        try:
            self.pool.submit(self._end, children)
        except RuntimeError as exc:
            log.error("no thread to end processes in: the commands are killed, what they left has to wait: %s", exc)
            for child in children:
                with contextlib.suppress(PermissionError):
                    child.send_signal(signal.SIGKILL)
            self.pool.retry_later(lambda: self._end_again(children))

    def _end_again(self, children: Sequence[Child]) -> None:
        try:
            self.pool.submit(self._end, children)
        except RuntimeError:
            self.pool.retry_later(lambda: self._end_again(children))

    def _end(self, children: Sequence[Child]) -> None:
        try:
            end_processes(children, self.config.kill_timeout)
        finally:
            self.endings.finish()


class ProcessState(enum.Enum):
    """A process's life; each state is left for the next one only."""

    STARTING = "starting"
    RUNNING = "running"
    DRAINING = "draining"  # it has ended, its output has not
    EXITED = "exited"


def _pipe(reader: contextlib.ExitStack, writer: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe's read and write end; each is closed with its stack."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    reader.callback(os.close, read_end)
    writer.callback(os.close, write_end)
    return read_end, write_end


class Process:
    """A child with its pumps: output goes to a sink, input comes from :attr:`input`.

    Making one raises OSError where the system has no descriptors left for it.
    It is to be started, or dropped. ``on_exit(code)`` is called when the process has ended, ``on_finished(code)``
    when all its output is in the sink too; each once, in this order, from
    whichever thread sees it, and they must not block.
    """

    def __init__(
        self,
        runtime: Runtime,
        sink: Sink,
        on_finished: Callable[[int], None],
        on_exit: Callable[[int], None] = lambda code: None,
        tty: bool = False,
    ) -> None:
        self.tty = tty
        self.input = Input(runtime.pool, runtime.config.stdin_limit)
        self._runtime = runtime
        self._sink = sink
        self._on_finished = on_finished
        self._on_exit = on_exit
        self._exited = Wakeup()  # wakes the pumps; this object is one of its holders until EXITED
        try:
            check_descriptor(self._exited.fd)
        except OSError:
            self._exited.release()
            raise
        self._outputs: dict[int, Stream] = {}  # for pump(), set by start()
        # Guards the attributes below.
        self._lock = threading.Lock()
        self._state = ProcessState.STARTING
        self._child: Child | None = None
        self._terminal: Terminal | None = None
        self._pumped: PumpedTerminal | None = None
        self._size = DEFAULT_WINDOW  # until the terminal exists
        self._early_signals: list[tuple[int, bool]] = []  # sent before the child exists
        self._abandoned = False  # end() came before the child exists
        self._output_open = True
        self._code: int | None = None
        self.fault = ""  # why output is lost; written once, before the output ends

    @property
    def pid(self) -> int:
        """The process's PID, 0 before it has started."""
        return self._child.pid if self._child is not None else 0

    @property
    def killed_by(self) -> int:
        """The signal that ended it, 0 if it ended by itself or has not ended."""
        return self._child.killed_by if self._child is not None else 0

    def drop(self) -> None:
        """It will not be started."""
        self._exited.release()

    def start(
        self,
        cmd: Sequence[str],
        env: Sequence[str] = (),
        workdir: str = "",
        defaults: Mapping[str, str] | None = None,
        user: str = "",
    ) -> None:
        """Start the process, see make_command(). Output flows once pump() is called, too.

        Raises:
            SpawnError: if it cannot be started; nothing is left behind then.
        """
        began = time.monotonic()
        try:
            command = make_command(cmd, env, workdir, defaults, user)
            if self.tty:
                self._start_on_terminal(command)
            else:
                self._start_on_pipes(command)
        except (OSError, RuntimeError, MemoryError) as exc:  # no descriptor, terminal, thread or memory left
            if self._child is None:
                self._exited.release()
                raise SpawnError(f"{cmd[0]}: cannot start: {explain_want(exc)}", Reason.START_FAILED) from None
            self.fail(exc)  # it runs already: it is ended, and its end told
            if self.tty and self._pumped is None:
                self._output_ended()
        except SpawnError:
            self._exited.release()
            raise
        self._runtime.books.counters.spawned(time.monotonic() - began)
        self._become_running()

    def _start_on_pipes(self, command: Command) -> None:
        with contextlib.ExitStack() as undo:
            # The child's ends are closed here whether it could be started or not.
            with contextlib.ExitStack() as closing:
                child_stdin, stdin = _pipe(closing, undo)
                stdout, child_stdout = _pipe(undo, closing)
                stderr, child_stderr = _pipe(undo, closing)
                descriptors = Descriptors(child_stdin, child_stdout, child_stderr)
                child = self._runtime.reaper.spawn(command, descriptors, self._child_exited)
            undo.pop_all()
        self._outputs = {stdout: Stream.STDOUT, stderr: Stream.STDERR}
        with self._lock:
            self._child = child
        os.set_blocking(stdin, False)
        self.input.open(stdin, self._exited)

    def _start_on_terminal(self, command: Command) -> None:
        self._runtime.terminals.start()  # before there is a child that a failure would leave behind
        with self._lock:
            size = self._size
        terminal = Terminal(*size)
        with contextlib.ExitStack() as undo:
            undo.callback(terminal.close)
            keyboard = os.dup(terminal.master)
            undo.callback(os.close, keyboard)
            with self._lock:
                self._terminal = terminal
                size = self._size
            terminal.resize(*size)  # a resize that came meanwhile
            child = self._runtime.reaper.spawn(command, Descriptors(terminal=terminal.path), self._child_exited)
            undo.pop_all()
        with self._lock:
            self._child = child
        self.input.open(keyboard, self._exited, terminal=True)
        terminal.close_slave()
        drain_timeout = self._runtime.config.drain_timeout
        terminals = self._runtime.terminals
        pumped = terminals.add(terminal.master, self._sink, drain_timeout, self._output_ended, self.fail)
        with self._lock:
            self._pumped = pumped
            exited = self._code is not None
        if exited:
            self._runtime.terminals.drain(pumped)

    def _become_running(self) -> None:
        with self._lock:
            if self._state is ProcessState.STARTING:
                self._state = ProcessState.RUNNING
            early, self._early_signals = self._early_signals, []
            child, abandoned = self._child, self._abandoned
        assert child is not None
        for number, alone in early:
            self.send_signal(number, alone)
        if abandoned:
            self._runtime.end_later([child])

    def pump(self) -> None:
        """Move output until it ends; the caller's thread becomes its reader. On a terminal, return at once."""
        if not self.tty:
            drain_timeout = self._runtime.config.drain_timeout
            PipeReader(self._outputs, self._sink, self._exited, drain_timeout).run(self._output_ended, self.fail)

    def fail(self, error: Exception) -> None:
        """Kill it, since it cannot be seen to: output with a gap in it is worse than none."""
        self.fault = self.fault or f"the command is killed: its output is lost: {explain_want(error)}"
        with contextlib.suppress(MemoryError):
            log.error("a process cannot be seen to, and is killed", exc_info=error, extra=self.input.extra)
        with contextlib.suppress(PermissionError):
            self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int, alone: bool = False) -> None:
        """Signal the process group; on a terminal its foreground group, as the terminal would.

        HUP, TERM and KILL, which no key sends, go to the process's own group
        too. With ``alone``, signal the process and nothing else. Harmless once
        it has ended.

        Raises:
            PermissionError: if the process changed to another user.
        """
        with self._lock:
            child, terminal = self._child, self._terminal
            if child is None:
                self._early_signals.append((number, alone))
                return
        if alone:
            child.send_signal(number, alone=True)
            return
        if child.returncode is not None:
            # What it left behind still holds the session: it is all that can be meant.
            with self._lock:
                draining = self._state is not ProcessState.EXITED
            if draining:
                signal_processes([child], number)
            return
        group = terminal.foreground_group() if terminal is not None else 0
        if group and group != child.pid:
            child.send_signal(number, group)
            if number not in (signal.SIGHUP, signal.SIGTERM, signal.SIGKILL):
                return
        child.send_signal(number)

    def resize(self, width: int, height: int) -> None:
        """Set the terminal's size, before the start too; harmless without a terminal."""
        with self._lock:
            self._size = (width, height)
            terminal = self._terminal
        if terminal is not None:
            terminal.resize(width, height)

    def abandon(self) -> Child | None:
        """The child whose processes the caller must end; None if there is none to end (yet: then it is seen to)."""
        with self._lock:
            self._abandoned = True
            return self._child if self._state is not ProcessState.EXITED else None

    def _child_exited(self, code: int) -> None:
        self._on_exit(code)  # before a pump, which may end at any moment, can find that all is over
        with self._lock:
            self._code = code
            self._state = ProcessState.DRAINING
            pumped = self._pumped
        self._exited.set()
        if pumped is not None:
            self._runtime.terminals.drain(pumped)
        self._maybe_finish()

    def _output_ended(self) -> None:
        with self._lock:
            self._output_open = False
        self._maybe_finish()

    def _maybe_finish(self) -> None:
        with self._lock:
            if self._code is None or self._output_open or self._state is ProcessState.EXITED:
                return
            self._state = ProcessState.EXITED
            terminal = self._terminal
        self.input.discard()
        if terminal is not None:
            terminal.close()
        self._exited.release()
        self._on_finished(self._code)


class SessionHost(Protocol):
    """What a session needs of the connection that it belongs to."""

    def open_channel(self, session_id: str) -> Channel: ...

    def open_record(self, request: Opening) -> Record: ...

    def forget(self, session: Session) -> None:
        """The session has ended: its id is free again."""

    def drop(self, session: Session) -> bool:
        """The session goes on, but not here; False if it was not here."""

    def settle(self, session: Session) -> None:
        """A session that its client has told to end, has ended: forget it, if nobody is there to hear of that."""

    def send(self, message: Event) -> None: ...


class Session(Protocol):
    """What a connection can do with a session, whatever its kind. Nothing here blocks."""

    id: str
    record: Record

    def write(self, data: BytesLike) -> None: ...

    def end_input(self) -> None: ...

    def send_signal(self, number: int) -> None: ...

    def resize(self, width: int, height: int) -> None: ...

    def end(self) -> None:
        """End what the session runs, with all its descendants, or detach from the main process; does not wait."""

    def leave(self) -> Child | None:
        """The connection is gone; the child, if any, whose processes are to be ended with it."""


def start_as_requested(process: Process, request: Exec) -> None:
    """Start a client's command.

    Raises:
        SpawnError: if it cannot be started.
    """
    if request.width and request.height:
        process.resize(request.width, request.height)
    # As Docker does: a terminal has a TERM, and the request's or the image's wins.
    defaults = {"TERM": "xterm"} if request.tty else None
    process.start(request.cmd, request.env, request.workdir, defaults, request.user)
    if request.no_stdin and not request.tty:
        process.input.end()


class ExecSession:
    """A command that a client started."""

    def __init__(self, runtime: Runtime, host: SessionHost, request: Exec, sink: Sink | None = None) -> None:
        self.id = request.id
        self.host = host
        self.channel = host.open_channel(request.id)
        self.record = host.open_record(request)
        self.started_at = 0.0  # Unix time
        self._request = request
        self._runtime = runtime
        self._process = Process(runtime, sink or self.channel, self._finished, tty=request.tty)
        self._process.input.extra = self.record.extra

    def run(self) -> None:
        """Start the command and read its stdout, in a pool thread."""
        request = self._request
        try:
            start_as_requested(self._process, request)
        except SpawnError as exc:
            self._not_started(exc)
            log.info("exec failed: %s", exc, extra=self.record.extra)
            return
        try:
            self.started_at = time.time()
            self.record.start(self._process.pid)
            self._started()
            log.info("exec started: pid %d, %s", self._process.pid, request.cmd[0][:200], extra=self.record.extra)
        except MemoryError as exc:
            self._process.fail(exc)
        self._process.pump()

    def _started(self) -> None:
        """The command runs."""

    def _not_started(self, error: SpawnError) -> None:
        self.record.refuse(error.reason, str(error))
        self.channel.send(Error(self.id, str(error), error.reason), lambda: self.host.forget(self))

    def _note_end(self, code: int) -> None:
        record, killed_by = self.record, self._process.killed_by
        by = f", by {signal_name(killed_by)}" if killed_by else ""
        log.info("exec ended: exit code %d%s%s", code, by, record.cause, extra=record.extra)
        record.end(code, killed_by)

    def _lost(self) -> Error:
        """What its client is told of output that is lost."""
        self.record.error(Reason.OUTPUT_LOST)
        return Error(self.id, self._process.fault, Reason.OUTPUT_LOST)

    def _finished(self, code: int) -> None:
        self._note_end(code)
        if self._process.fault:
            self.channel.send(self._lost())
        # The id is free once its exit is on its way: another session's output must not come before it.
        self.channel.send(Exit(self.id, code), lambda: self.host.forget(self))

    def write(self, data: BytesLike) -> None:
        self.channel.refill()
        if self._request.no_stdin:
            return
        try:
            self._process.input.write(data)
        except InputOverflow as exc:
            # Version 1 has no flow control. A gap in stdin would be silent
            # damage, so the command ends, and its client is told why.
            self.record.error(Reason.STDIN_OVERFLOW)
            self.record.because(Cause.STDIN_OVERFLOW)
            self.host.send(Error(self.id, f"stdin: {exc}; the command is killed", Reason.STDIN_OVERFLOW))
            log.warning("exec killed: %s", exc, extra=self.record.extra)
            self._process.input.discard()
            try:
                self._process.send_signal(signal.SIGKILL)
            except PermissionError:
                log.warning("cannot kill it: it belongs to another user", extra=self.record.extra)

    def queued(self) -> int:
        """Bytes of stdin that wait for the command to read them."""
        return self._process.input.queued()

    def end_input(self) -> None:
        self._process.input.end()

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def resize(self, width: int, height: int) -> None:
        self._process.resize(width, height)

    def end(self) -> None:
        child = self._process.abandon()
        if child is not None:
            self._runtime.end_later([child])

    def leave(self) -> Child | None:
        return self._process.abandon()


class LoggedProcess:
    """A process whose output goes to a replay log: any number of clients may come, follow it, and leave."""

    def __init__(self, runtime: Runtime, tty: bool) -> None:
        self.log = ReplayLog(runtime.config.replay_size)
        self.exited = threading.Event()  # the process has ended
        self.finished = threading.Event()  # and all its output is in the log
        self.code: int | None = None  # written once, before exited is set
        self.started_at = self.ended_at = 0.0  # Unix times; each written once
        self._runtime = runtime
        self._process = Process(runtime, self.log, self._on_finished, self._on_exit, tty)

    def drop(self) -> None:
        """See :meth:`Process.drop`."""
        self._process.drop()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def child(self) -> Child | None:
        return self._process._child

    @property
    def input(self) -> Input:
        return self._process.input

    @property
    def tty(self) -> bool:
        return self._process.tty

    def send_signal(self, number: int, alone: bool = False) -> None:
        """Signal the process, see :meth:`Process.send_signal`."""
        self._process.send_signal(number, alone)

    def resize(self, width: int, height: int) -> None:
        self._process.resize(width, height)

    def describe(self) -> dict[str, Any]:
        """What the list of sessions says of it."""
        state: dict[str, Any] = {"pid": self.pid, "tty": self.tty, "started_at": self.started_at}
        return state | ({"code": self.code, "ended_at": self.ended_at} if self.code is not None else {})

    def _on_exit(self, code: int) -> None:
        self.ended_at = time.time()
        self.code = code
        self.exited.set()

    def _on_finished(self, code: int) -> None:
        self.log.finish()
        self.finished.set()


class MainProcess(LoggedProcess):
    """The long-running process of keep-alive mode."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime, runtime.config.tty)
        self._pid_file = runtime.config.pid_file
        # Guards _gone, and the file: held while it is written or removed, by two threads once each.
        self._pid_file_lock = threading.Lock()
        self._gone = False
        self._exit_callbacks: list[Callable[[], None]] = []  # not changed after start()

    def start(self) -> None:
        """Start it.

        Raises:
            SpawnError: if it cannot be started.
        """
        config = self._runtime.config
        defaults = {"TERM": "xterm"} if config.tty else None
        (thread,) = self._runtime.pool.reserve(1)
        self.started_at = time.time()  # before: it may end at once
        try:
            self._process.start(config.command, defaults=defaults)
        except SpawnError:
            self._runtime.pool.release([thread])
            raise
        with self._pid_file_lock:
            if not self._gone:
                self._write_pid_file()
        log.info("main process started: pid %d, %s", self.pid, config.command[0])
        thread.run(self._process.pump)

    def call_on_exit(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` when the process ends; before start() only."""
        self._exit_callbacks.append(callback)

    def end(self, grace: float) -> None:
        """End it and all that it started: SIGHUP, and after ``grace`` seconds SIGKILL. Blocks."""
        if self.child is not None:
            end_processes([self.child], grace)

    def describe(self) -> dict[str, Any]:
        return {"id": "", "kind": "main", "cmd": list(self._runtime.config.command), "user": "", **super().describe()}

    def _on_exit(self, code: int) -> None:
        log.info("main process ended: exit code %d", code)
        with self._pid_file_lock:
            self._gone = True
            self._remove_pid_file()
        super()._on_exit(code)
        for callback in self._exit_callbacks:
            callback()

    def _write_pid_file(self) -> None:
        """Write the PID file; by rename(2), which follows no link that somebody put there."""
        path = self._pid_file
        if not path:
            return
        temporary = f"{path}.{secrets.token_hex(4)}"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            try:
                os.write(fd, str(self.pid).encode())
            finally:
                os.close(fd)
            os.rename(temporary, path)
        except OSError as exc:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            log.warning("cannot write the PID file %s: %s", path, exc.strerror)

    def _remove_pid_file(self) -> None:
        if not self._pid_file:
            return
        try:
            # A FIFO that somebody has put there would hold us without O_NONBLOCK.
            fd = os.open(self._pid_file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                ours = os.read(fd, 32) == str(self.pid).encode()
            finally:
                os.close(fd)
            if ours:
                os.unlink(self._pid_file)
        except FileNotFoundError:
            pass
        except OSError as exc:
            log.warning("cannot remove the PID file %s: %s", self._pid_file, exc.strerror)


DETACHED_KEPT = 32  # detached commands that have ended and can still be attached to


class DetachedCommand(LoggedProcess):
    """A command that needs no connection: it was started by one, and others may attach to it."""

    def __init__(self, runtime: Runtime, request: Exec, record: Record, on_end: Callable[[], None]) -> None:
        super().__init__(runtime, request.tty)
        self.id = request.id
        self.request = request
        self.record = record
        self._on_end = on_end
        self._lock = threading.Lock()  # guards the attributes below
        self._outcome: Started | Error | None = None
        self._waiting: list[Callable[[Started | Error], None]] = []

    def start(self) -> None:
        """Start it; its output flows once pump() is called.

        Raises:
            SpawnError: if it cannot be started.
        """
        self.started_at = time.time()  # before: it may end at once
        try:
            start_as_requested(self._process, self.request)
        except SpawnError as exc:
            self._tell(Error(self.id, str(exc), exc.reason))
            raise
        self.record.start(self.pid)
        self._tell(Started(self.id, self.pid, ""))

    def _tell(self, outcome: Started | Error) -> None:
        with self._lock:
            self._outcome = outcome
            waiting, self._waiting = self._waiting, []
        for callback in waiting:
            callback(outcome)

    def call_when_started(self, callback: Callable[[Started | Error], None]) -> None:
        """Call ``callback``, once, with what the start has led to."""
        with self._lock:
            outcome = self._outcome
            if outcome is None:
                self._waiting.append(callback)
        if outcome is not None:
            callback(outcome)

    def pump(self) -> None:
        """See :meth:`Process.pump`."""
        self._process.pump()

    def abandon(self) -> Child | None:
        """See :meth:`Process.abandon`."""
        return self._process.abandon()

    def describe(self) -> dict[str, Any]:
        state = {"id": self.id, "kind": "detached", "cmd": list(self.request.cmd), "user": self.request.user}
        return state | super().describe()

    def _on_finished(self, code: int) -> None:
        log.info("detached command ended: exit code %d%s", code, self.record.cause, extra=self.record.extra)
        self.record.end(code, self._process.killed_by)
        self._on_end()  # before anybody hears of it: its id and its place are free
        super()._on_finished(code)


class DetachedCommands:
    """The detached commands by id: all that run, and the DETACHED_KEPT that have ended last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the attributes below
        self._commands: dict[str, DetachedCommand] = {}
        self._ended: dict[DetachedCommand, None] = {}  # those of them that have ended, the first to end first

    def add(self, command: DetachedCommand) -> None:
        """Take in a command that is about to start.

        Raises:
            LookupError: if its id belongs to another one that runs.
        """
        with self._lock:
            before = self._commands.get(command.id)
            if before is not None and before not in self._ended:
                raise LookupError(f"a detached command has the id {command.id[:80]!r}")
            if before is not None:
                del self._ended[before]
            self._commands[command.id] = command

    def end(self, command: DetachedCommand) -> None:
        """It has ended: keep it, and let go of the one that has ended first, if there are too many."""
        with self._lock:
            self._ended[command] = None
            if len(self._ended) > DETACHED_KEPT:
                oldest = next(iter(self._ended))
                del self._ended[oldest], self._commands[oldest.id]

    def remove(self, command: DetachedCommand) -> None:
        """Its start has failed."""
        with self._lock:
            if self._commands.get(command.id) is command:
                del self._commands[command.id]

    def find(self, session_id: str) -> DetachedCommand | None:
        """The command of this id, None if there is none, or if it has not started yet."""
        with self._lock:
            command = self._commands.get(session_id)
        return command if command is not None and command.pid else None

    def find_same(self, request: Exec) -> DetachedCommand | None:
        """The command that this very request has started, or is starting."""
        with self._lock:
            command = self._commands.get(request.id)
        return command if command is not None and command.request.secret == request.secret else None

    def all(self) -> list[DetachedCommand]:
        with self._lock:
            return [command for command in self._commands.values() if command.pid]


def describe_loss(lost: int, capacity: int) -> bytes:
    """What a follower that fell behind reads in place of the bytes it lost."""
    return (
        f"\r\nsockerless-agent: {lost} bytes of output are missing here: "
        f"this reader fell behind by more than the replay size ({capacity} bytes)\r\n"
    ).encode()


class AttachSession:
    """One client's view of the main process, or of a detached command: replay, live output, exit code."""

    def __init__(self, host: SessionHost, request: Attach, process: LoggedProcess) -> None:
        self.id = request.id
        self.host = host
        self.started_at = time.time()
        self._request = request
        self._target = process
        self.channel = host.open_channel(request.id)
        self.record = host.open_record(request)
        self._cursor = process.log.follow(not request.no_replay)
        self._left = False  # written before the cursor is closed

    def run(self) -> None:
        """Copy the log to the client until it ends or the client leaves, in a pool thread."""
        try:
            self._follow()
        except MemoryError as exc:
            log.error("attach ended: %s", explain_want(exc), extra=self.record.extra)
            self._cursor.close()
            error = Error(self.id, f"detached, since output is lost: {explain_want(exc)}", Reason.OUTPUT_LOST)
            self.record.error(error.reason)
            self.record.end(error=error)
            self._finish(error)

    def _finish(self, last: Exit | Error) -> None:
        """Tell the client the last that there is to say."""
        self.channel.send(last, lambda: self.host.forget(self))

    def _follow(self) -> None:
        self.record.start(self._target.pid)
        log.info("attach started", extra=self.record.extra)
        while self.channel.wait_for_room() and (part := self._cursor.read()) is not None:
            if part.lost:
                self._report_loss(part.lost)
            for stream, data in part.chunks:
                self.channel.put(stream, data)
        self._cursor.close()
        code = self._code()
        self.record.end(code)
        if code is not None:
            self._finish(Exit(self.id, code))
        else:  # the client has left, and the main process goes on
            self.host.forget(self)
        log.info("attach ended%s", self.record.cause, extra=self.record.extra)

    def _code(self) -> int | None:
        """The exit code of what it is attached to; None if the client has left before."""
        return self._target.code if not self._left else None

    def _report_loss(self, lost: int) -> None:
        log.warning("attach lost %d bytes: the client reads too slowly", lost, extra=self.record.extra)
        stream = Stream.STDOUT if self._target.tty else Stream.STDERR
        self.channel.send(Output(self.id, stream, describe_loss(lost, self._target.log.capacity), lost))

    def write(self, data: BytesLike) -> None:
        self.channel.refill()
        try:
            self._target.input.write(data)
        except InputOverflow as exc:
            self.record.error(Reason.STDIN_OVERFLOW)
            self.host.send(Error(self.id, f"stdin: {exc}; {len(data)} bytes were refused", Reason.STDIN_OVERFLOW))

    def end_input(self) -> None:
        self._target.input.end()

    def send_signal(self, number: int) -> None:
        self._target.send_signal(number)

    def resize(self, width: int, height: int) -> None:
        self._target.resize(width, height)

    def end(self) -> None:
        self.leave()

    def leave(self) -> Child | None:
        self._left = True
        self._cursor.close()
        return None


class FlowSession(Protocol):
    """A session of a version 2 client: with flow control, and a life beyond its connection."""

    id: str
    # Guarded by the registry's lock, once the session is registered. Who has this
    # session's lock, too, may rely on its connection being the session's for so long.
    host: SessionHost
    channel: Channel
    record: Record
    tie: Tie

    def run(self) -> None: ...

    def end(self) -> None: ...

    def leave(self) -> Child | None: ...

    def describe(self) -> dict[str, Any]:
        """What the list of sessions says of it."""

    @property
    def child(self) -> Child | None:
        """Whose processes are the session's, if there are any."""

    def consumed(self) -> int:
        """Bytes of stdin that the client need not keep."""


def _window_of(request: Opening | Resume) -> int:
    return min(request.window or DEFAULT_WINDOW_SIZE, LARGEST_WINDOW)


class Tie:
    """What ties a version 2 session to its client, over all its connections: the agent's half of a resumption."""

    def __init__(self, request: Opening) -> None:
        self.secret = request.secret or secrets.token_hex(16)
        self.flow = Flow(_window_of(request))
        # Guards the attributes below. Held while what the client sent is passed to
        # the session, and while another connection takes it over: what comes late
        # on the one before is then known to be late. May be held when the
        # registry's lock is taken, never the reverse.
        self.lock = threading.Lock()
        self.connection = request.connection  # the client's count
        self.received = 0  # bytes of stdin so far
        self.closed = 0  # ends of stdin
        self.heard = 0  # the highest number of a signal, size or end
        self.ending = False  # its client has told it to end: it is not kept without a connection

    def is_news(self, number: int) -> bool:
        """Whether a signal, size or end has not come before; it has now. Holds the lock."""
        if not number:
            return True
        news = number > self.heard
        self.heard = max(self.heard, number)
        return news


class FlowExecSession(ExecSession):
    """A command of a version 2 client."""

    def __init__(self, runtime: Runtime, host: SessionHost, request: Exec) -> None:
        self.tie = Tie(request)
        super().__init__(runtime, host, request, self.tie.flow)
        self.tie.flow.connect(self.channel)
        self._process.input.listen(self._stdin_written)

    def _started(self) -> None:
        self.tie.flow.begin(Started(self.id, self._process.pid, self.tie.secret))

    def _not_started(self, error: SpawnError) -> None:
        self.record.refuse(error.reason, str(error))
        self.host.forget(self)  # first: from now on nobody takes it over, and its channel stays what it is
        self.channel.send(Error(self.id, str(error), error.reason))

    def _finished(self, code: int) -> None:
        self._note_end(code)
        # Kept until its client says that it has it.
        self.tie.flow.finish(Exit(self.id, code) if not self._process.fault else self._lost())
        if self.tie.ending:
            self.host.settle(self)

    def _stdin_written(self, count: int) -> None:
        self.host.send(Ack(self.id, count, self.tie.heard))

    def consumed(self) -> int:
        return self._process.input.written()

    def write(self, data: BytesLike) -> None:
        self.tie.received += len(data)
        super().write(data)
        if self._request.no_stdin:
            self.host.send(Ack(self.id, self.tie.received))  # of no use to anybody, but consumed

    def end_input(self) -> None:
        self.tie.closed += 1
        super().end_input()

    def end(self) -> None:
        if self.tie.flow.code is not None:
            self.host.forget(self)
        else:
            self.tie.ending = True
            super().end()

    def leave(self) -> Child | None:
        self.tie.flow.close()
        return super().leave()

    def describe(self) -> dict[str, Any]:
        request, code = self._request, self.tie.flow.code
        state: dict[str, Any] = {"id": self.id, "kind": "exec", "pid": self._process.pid, "cmd": list(request.cmd)}
        state |= {"tty": request.tty, "user": request.user, "started_at": self.started_at}
        return state | ({"code": code} if code is not None else {})

    @property
    def child(self) -> Child | None:
        """The command, None before it has started."""
        return self._process._child


class FlowAttachSession(AttachSession):
    """A version 2 client's view of the main process."""

    def __init__(self, host: SessionHost, request: Attach, process: LoggedProcess) -> None:
        super().__init__(host, request, process)
        self.tie = Tie(request)
        self.tie.flow.connect(self.channel)

    def _finish(self, last: Exit | Error) -> None:
        self.tie.flow.finish(last)

    def _follow(self) -> None:
        self.record.start(self._target.pid)
        log.info("attach started", extra=self.record.extra)
        flow = self.tie.flow
        flow.begin(Started(self.id, self._target.pid, self.tie.secret, self._cursor.replay))
        while flow.wait_for_room() and (part := self._cursor.read(FIRST_READ)) is not None:
            if part.lost:
                log.warning("attach lost %d bytes: the client reads too slowly", part.lost, extra=self.record.extra)
                flow.announce_loss(self.id, part.lost)
            for stream, data in part.chunks:
                flow.put(stream, data)
        self._cursor.close()
        code = self._code()
        self.record.end(code)
        if code is not None:
            self._finish(Exit(self.id, code))
        log.info("attach ended%s", self.record.cause, extra=self.record.extra)

    def write(self, data: BytesLike) -> None:
        self.tie.received += len(data)
        super().write(data)
        self.host.send(Ack(self.id, self.tie.received, self.tie.heard))

    def consumed(self) -> int:
        return self.tie.received

    def end_input(self) -> None:
        self.tie.closed += 1
        super().end_input()

    def end(self) -> None:
        self.leave()
        self.host.forget(self)

    def leave(self) -> Child | None:
        self.tie.flow.close()
        return super().leave()

    def describe(self) -> dict[str, Any]:
        state: dict[str, Any] = {"id": self.id, "kind": "attach", "session": self._request.session}
        state |= {"pid": self._target.pid, "cmd": [], "tty": self._target.tty}
        return state | {"user": "", "started_at": self.started_at}

    @property
    def child(self) -> Child | None:
        """None: what it is attached to is no part of it."""
        return None


class DetachingSession:
    """The start of a command that then lives on by itself: the session ends with ``started``."""

    def __init__(self, runtime: Runtime, host: SessionHost, request: Exec, commands: DetachedCommands,
                 on_end: Callable[[], None]) -> None:  # fmt: skip
        """Raises LookupError if the id belongs to a detached command that runs."""
        self.id = request.id
        self.host = host
        self.channel = host.open_channel(request.id)
        self.tie = Tie(request)  # unused but for its lock: what is repeated is the start, see find_same()
        self._on_end = on_end
        self._runtime = runtime
        self._commands = commands
        self.record = host.open_record(request)
        self._command = DetachedCommand(runtime, request, self.record, self._ended)
        try:
            commands.add(self._command)
        except LookupError:
            self._command.drop()
            raise

    def run(self) -> None:
        """Start the command and read its stdout, in a pool thread."""
        try:
            self._command.start()
        except SpawnError as exc:
            self._commands.remove(self._command)
            self.record.refuse(exc.reason, str(exc))
            self.channel.send(Error(self.id, str(exc), exc.reason), self._give_up)
            log.info("exec failed: %s", exc, extra=self.record.extra)
            return
        log.info("detached command started: pid %d, %s", self._command.pid, self._command.request.cmd[0][:200],
                 extra=self.record.extra)  # fmt: skip
        self.channel.send(Started(self.id, self._command.pid, ""), self._go)
        self._command.pump()

    def _go(self) -> None:
        self.host.drop(self)

    def _give_up(self) -> None:
        self.host.drop(self)
        self._on_end()

    def consumed(self) -> int:
        return 0

    def _ended(self) -> None:
        self._commands.end(self._command)
        self._on_end()

    def write(self, data: BytesLike) -> None:
        text = "stdin: a detached command has none from here: attach to it"
        self.host.send(Error(self.id, text, Reason.BAD_MESSAGE))

    def end_input(self) -> None:
        self._command.input.end()

    def send_signal(self, number: int) -> None:
        self._command.send_signal(number)

    def resize(self, width: int, height: int) -> None:
        self._command.resize(width, height)

    def end(self) -> None:
        child = self._command.abandon()
        if child is not None:
            self._runtime.end_later([child])

    def leave(self) -> Child | None:
        """The command does not end with the connection."""
        return None


class OutputCopier:
    """Copies the main process's output to the agent's own, where the platform collects logs.

    It is one more follower of the replay log: a log collector that stands
    still stops neither the main process nor those who attach to it.
    """

    def __init__(self, main: MainProcess) -> None:
        self.finished = threading.Event()
        self._main = main
        self._cursor = main.log.follow()

    def run(self) -> None:
        """Copy until the output ends or nobody reads it, in a pool thread."""
        try:
            while (part := self._cursor.read()) is not None:
                if part.lost:
                    self._write(Stream.STDERR, describe_loss(part.lost, self._main.log.capacity))
                for stream, data in part.chunks:
                    self._write(stream, data)
        except OSError as exc:
            log.warning("the main process's output is no longer copied: %s", exc.strerror)
            self._cursor.close()
        finally:
            self.finished.set()

    @staticmethod
    def _write(stream: Stream, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(stream, view) :]
            except BlockingIOError:  # whoever shares it made it non-blocking
                select.select((), (stream,), ())


# ══════════════════════════════════════════════════════════════════════════════
# 9  Archives
#    Owns what `docker cp` needs where the image has no tar: a path's state, a
#    tree as a tar stream, a tar stream as a tree. A pool thread for each archive;
#    the connection threads feed it, and never wait for it.
# ══════════════════════════════════════════════════════════════════════════════

ARCHIVE_CHUNK = 256 << 10  # bytes in one read of a file
ARCHIVE_BUFFER = 64 << 10  # bytes of headers and small files that are put together
ARCHIVE_HEADER = 1 << 20  # bytes of all headers of one member, as Go's archive/tar has it
NOBODY_AT_ALL = 0xFFFFFFFF  # no user's number: for chown(2) it means that nothing is to change
LINKS_LIMIT = 40  # symbolic links in one path, as the kernel has it (path_resolution(7))
# What the kernel makes up as it is read: no part of an image, without a size, and some of it without an end.
PSEUDO_FILE_SYSTEMS = frozenset((
    "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "efivarfs", "fusectl", "mqueue", "nsfs",
    "proc", "pstore", "resctrl", "rpc_pipefs", "securityfs", "selinuxfs", "sysfs", "tracefs",
))  # fmt: skip


class ArchiveError(AgentError):
    """A path cannot be read or written; ``reason`` says which kind of error, as a Reason."""

    def __init__(self, message: str, reason: Reason = Reason.ARCHIVE_FAILED) -> None:
        super().__init__(message)
        self.reason = reason


class _Abandoned(Exception):
    """Nobody wants the archive any more."""


def _explain_path(path: str, error: OSError) -> ArchiveError:
    missing = isinstance(error, FileNotFoundError | NotADirectoryError)
    reason = Reason.NO_SUCH_PATH if missing else Reason.ARCHIVE_FAILED
    return ArchiveError(f"{path}: {(error.strerror or str(error)).lower()}", reason)


def clean_path(path: str) -> str:
    """``path`` from the root, without ``..``; a slash or ``/.`` at its end is kept, since it follows a link."""
    ending = "/." if path.endswith("/.") or path == "." else "/" if path.endswith("/") else ""
    clean = os.path.normpath("/" + path.lstrip("/"))
    return clean if clean == "/" else clean + ending


# Go's os.FileMode, which Docker's API has for a mode: the bits above the permissions.
_GO_TYPES = {
    stat.S_IFDIR: 1 << 31,
    stat.S_IFLNK: 1 << 27,
    stat.S_IFBLK: 1 << 26,
    stat.S_IFCHR: 1 << 26 | 1 << 21,
    stat.S_IFIFO: 1 << 25,
    stat.S_IFSOCK: 1 << 24,
}
_GO_BITS = {stat.S_ISUID: 1 << 23, stat.S_ISGID: 1 << 22, stat.S_ISVTX: 1 << 20}
_GO_EARLIEST, _GO_LATEST = -62135596800, 253402300799  # years 1 and 9999, which RFC 3339 and datetime end with


def stat_path(path: str) -> dict[str, Any]:
    """What is at ``path``: ``name``, ``size``, ``mode``, ``mtime`` and ``linkTarget``, as Docker's API has it.

    A link at the end of the path is not followed; its target is given from the root.

    Raises:
        ArchiveError: if there is nothing, or it cannot be looked at.
    """
    path = clean_path(path)
    try:
        found = os.lstat(path)
        target = os.path.realpath(path) if stat.S_ISLNK(found.st_mode) else ""
    except OSError as exc:
        raise _explain_path(path, exc) from None
    mode = stat.S_IMODE(found.st_mode) & 0o777 | _GO_TYPES.get(stat.S_IFMT(found.st_mode), 0)
    for bit, go_bit in _GO_BITS.items():
        mode |= go_bit if found.st_mode & bit else 0
    seconds, nanoseconds = divmod(found.st_mtime_ns, 1_000_000_000)
    seconds = min(max(seconds, _GO_EARLIEST), _GO_LATEST)
    moment = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=seconds)
    return {
        "name": os.path.basename(path.rstrip("/")) or "/",
        "size": found.st_size,
        "mode": mode,
        "mtime": f"{moment.isoformat()}.{nanoseconds:09d}Z",
        "linkTarget": target,
    }


def _pseudo_devices() -> set[int]:
    """The devices of PSEUDO_FILE_SYSTEMS, see proc_pid_mountinfo(5)."""
    devices = set()
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            for line in file:
                mount, _, source = line.partition(b" - ")
                if source.split()[0].decode() in PSEUDO_FILE_SYSTEMS:
                    major, minor = mount.split()[2].split(b":")
                    devices.add(os.makedev(int(major), int(minor)))
    except OSError:  # no /proc: then none of it is mounted where it would do harm
        pass
    return devices


class _WriteFailed(Exception):
    """Whoever takes the archive has failed, and not what is read: ``args[0]`` says how."""


class _TarOutput:
    """The file that tarfile writes to: small writes are put together."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write
        self._parts: list[bytes] = []
        self._size = 0
        self._flushed = 0

    def tell(self) -> int:
        return self._flushed + self._size

    def write(self, data: bytes) -> int:
        self._parts.append(data)
        self._size += len(data)
        if self._size >= ARCHIVE_BUFFER:
            self.flush()
        return len(data)

    def flush(self) -> None:
        if self._size:
            try:
                self._write(self._parts[0] if len(self._parts) == 1 else b"".join(self._parts))
            except OSError as exc:
                raise _WriteFailed(exc) from None
            self._flushed += self._size
            self._parts, self._size = [], 0


def pack(path: str, write: Callable[[bytes], None], name: str = "") -> None:
    """Write the file or tree at ``path`` as a tar archive, as ``GET /containers/ID/archive`` has it.

    Its names begin with ``name``, or the last component of ``path``. A link there is packed
    as a link, unless a slash follows it. Sockets and what is below a mounted
    proc, sysfs or the like are left out; a file that vanishes meanwhile, too.

    Raises:
        ArchiveError: if there is nothing, or it cannot be read. What ``write`` raises is passed on.
    """
    import tarfile  # only here and below: most agents never pack anything

    path = clean_path(path)
    output = _TarOutput(write)
    try:
        top = os.lstat(path)
        pseudo = _pseudo_devices()
        if top.st_dev in pseudo:
            raise ArchiveError(f"{path}: the kernel makes this up as it is read, so it has no size: use a command")
        with tarfile.open(fileobj=cast(IO[bytes], output), mode="w", format=tarfile.PAX_FORMAT,
                          encoding="utf-8", errors="surrogateescape") as tar:  # fmt: skip
            cast(Any, tar).copybufsize = ARCHIVE_CHUNK
            _Packer(tar, pseudo, path).pack(top, name or os.path.basename(path.rstrip("/")) or ".")
        output.flush()
    except _WriteFailed as exc:
        raise exc.args[0] from None
    except OSError as exc:
        raise _explain_path(path, exc) from None


@dataclasses.dataclass(slots=True)
class _Level:
    """A directory that is being packed."""

    found: os.stat_result
    name: str  # in the archive
    left: list[str]  # names in it that are yet to be packed, the next one last


class _Packer:
    """Packs one tree: down from an open directory to a name in it, however deep, and whatever moves meanwhile."""

    def __init__(self, tar: tarfile.TarFile, pseudo: set[int], path: str) -> None:
        self._tar = tar
        self._pseudo = pseudo
        self._path = path  # for messages
        # The first name of what has several. A file that changes, or another one in its inode, is packed again.
        self._linked: dict[tuple[int, int, int, int], str] = {}

    def pack(self, top: os.stat_result, name: str) -> None:
        """Raises OSError or ArchiveError."""
        if stat.S_ISSOCK(top.st_mode):
            raise ArchiveError(f"{self._path}: a socket, which has no place in an archive")
        if not stat.S_ISDIR(top.st_mode):
            parent = os.open(os.path.dirname(self._path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._pack_other(parent, os.path.basename(self._path), name, top)
            finally:
                os.close(parent)
            return
        # One descriptor at a time, and so no limit to the depth: up again goes "..", if it still leads there.
        directory = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        levels: list[_Level] = []
        try:
            levels.append(self._begin(directory, name))
            while levels:
                level = levels[-1]
                if level.left:
                    below = level.left.pop()
                    entered = self._pack_below(directory, below, f"{level.name}/{below}")
                    if entered < 0:
                        continue
                    os.close(directory)
                    directory = entered
                    levels.append(self._begin(directory, f"{level.name}/{below}"))
                    continue
                levels.pop()
                if levels:
                    directory = self._ascend(directory, levels[-1])
        finally:
            os.close(directory)

    def _begin(self, directory: int, name: str) -> _Level:
        """Pack a directory's own entry."""
        found = os.fstat(directory)
        self._add(self._describe(found, name))
        names: list[str] = []
        if found.st_dev not in self._pseudo:
            try:
                names = sorted(os.listdir(directory), reverse=True)
            except OSError as exc:
                raise self._explain(name, exc) from None
        return _Level(found, name, names)

    def _ascend(self, directory: int, level: _Level) -> int:
        """Open the directory above, in place of the one that is open."""
        above = os.open("..", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
        if not os.path.samestat(os.fstat(above), level.found):
            os.close(above)
            raise ArchiveError(f"{self._show(level.name)}: what is in it was moved while it was read")
        os.close(directory)
        return above

    def _pack_below(self, directory: int, below: str, name: str) -> int:
        """Pack what is not a directory, and return -1; or open the directory."""
        try:
            for _ in range(LINKS_LIMIT):
                found = os.stat(below, dir_fd=directory, follow_symlinks=False)
                try:
                    if stat.S_ISDIR(found.st_mode):
                        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                        return os.open(below, flags, dir_fd=directory)
                    self._pack_other(directory, below, name, found)
                    return -1
                except OSError as exc:
                    # Another file, a link for instance, has just taken its place: look again.
                    if exc.errno not in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
                        raise
            raise ArchiveError(f"{self._show(name)}: changes all the time")
        except FileNotFoundError:  # it has gone
            return -1
        except OSError as exc:
            raise self._explain(name, exc) from None

    def _pack_other(self, directory: int, below: str, name: str, found: os.stat_result) -> None:
        """Pack what is not a directory."""
        if not stat.S_ISREG(found.st_mode):
            target = os.readlink(below, dir_fd=directory) if stat.S_ISLNK(found.st_mode) else ""
            if not stat.S_ISSOCK(found.st_mode):  # which has no place in an archive
                self._add(self._describe(found, name, target))
            return
        if found.st_dev in self._pseudo:  # mounted over a file
            return
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        with open(os.open(below, flags, dir_fd=directory), "rb", buffering=0) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))  # it was, a moment ago
            info = self._describe(found, name)
            if not info.isreg():
                self._add(info)
                return
            with contextlib.suppress(OSError):  # it has none, or the file system does not know them
                capability = os.getxattr(file.fileno(), "security.capability")
                text = capability.decode("utf-8", "surrogateescape")
                info.pax_headers = {**info.pax_headers, "SCHILY.xattr.security.capability": text}
            try:
                self._add(info, file)
            except OSError as exc:
                if exc.errno is None:  # tarfile's own
                    raise ArchiveError(f"{self._show(name)}: became shorter while it was read") from None
                raise self._explain(name, exc) from None

    def _describe(self, found: os.stat_result, name: str, target: str = "") -> tarfile.TarInfo:
        """The header of a member. Without the names of its owners, as Docker has it: the receiver's differ."""
        import tarfile

        info = tarfile.TarInfo(name)
        info.mode, info.uid, info.gid = stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid
        info.mtime, fraction = divmod(found.st_mtime_ns, 1_000_000_000)
        if fraction:  # exactly: a float has too few digits
            seconds, fraction = divmod(abs(found.st_mtime_ns), 1_000_000_000)
            sign = "-" if found.st_mtime_ns < 0 else ""
            info.pax_headers = {"mtime": f"{sign}{seconds}.{fraction:09d}".rstrip("0")}
        types = {stat.S_IFREG: tarfile.REGTYPE, stat.S_IFDIR: tarfile.DIRTYPE, stat.S_IFLNK: tarfile.SYMTYPE,
                 stat.S_IFIFO: tarfile.FIFOTYPE, stat.S_IFCHR: tarfile.CHRTYPE,
                 stat.S_IFBLK: tarfile.BLKTYPE}  # fmt: skip
        info.type = types[stat.S_IFMT(found.st_mode)]
        info.linkname = target
        if found.st_nlink > 1 and not stat.S_ISDIR(found.st_mode):
            key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
            first = self._linked.setdefault(key, name)
            if first != name:
                info.type, info.linkname = tarfile.LNKTYPE, first
        if info.isreg():
            info.size = found.st_size
        elif info.ischr() or info.isblk():
            info.devmajor, info.devminor = os.major(found.st_rdev), os.minor(found.st_rdev)
        return info

    def _add(self, info: tarfile.TarInfo, file: IO[bytes] | None = None) -> None:
        self._tar.addfile(info, file)
        cast(Any, self._tar).members.clear()  # else it grows with every member

    def _show(self, name: str) -> str:
        """Where a member is, for messages."""
        return os.path.join(self._path.removesuffix("/.").rstrip("/") or "/", *name.split("/")[1:])

    def _explain(self, name: str, error: OSError) -> ArchiveError:
        return _explain_path(self._show(name), error)


class _TarInput:
    """A tar stream from a client: the connection thread feeds it, the archive's thread reads it as a file."""

    def __init__(self, on_consumed: Callable[[int], None]) -> None:
        self._on_consumed = on_consumed  # called with the count of bytes so far
        self._changed = threading.Condition()  # guards the attributes below
        self._chunks: collections.deque[bytes] = collections.deque()
        self._waiting = 0  # bytes in _chunks
        self._consumed = 0
        self._ended = False
        self._closed = False

    def feed(self, data: bytes) -> int:
        """Take ``data``; returns how many bytes wait now."""
        with self._changed:
            if not self._closed:
                self._chunks.append(data)
                self._waiting += len(data)
                self._changed.notify()
            return self._waiting

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()

    def close(self) -> None:
        """Nobody wants the archive any more."""
        with self._changed:
            self._closed = True
            self._chunks.clear()
            self._waiting = 0
            self._changed.notify()

    def consumed(self) -> int:
        with self._changed:
            return self._consumed

    def read(self, size: int) -> bytes:
        """The next bytes, as many as came at once; b"" at the end. Raises _Abandoned."""
        with self._changed:
            self._changed.wait_for(lambda: self._chunks or self._ended or self._closed)
            if self._closed:
                raise _Abandoned
            if not self._chunks:
                return b""
            data = self._chunks.popleft()
            if len(data) > size:
                self._chunks.appendleft(data[size:])
                data = data[:size]
            self._waiting -= len(data)
            self._consumed += len(data)
            consumed = self._consumed
        self._on_consumed(consumed)
        return data


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _TarStream:
    """The file that tarfile reads from: forwards only, and with a bound to what one header may hold."""

    def __init__(self, source: _Readable) -> None:
        self._source = source
        self._buffer = b""
        self._used = 0  # bytes of _buffer
        self._position = 0
        self._header_left = ARCHIVE_HEADER

    def _fill(self) -> bool:
        """Make sure that there is a byte in the buffer; False at the end."""
        if self._used == len(self._buffer):
            self._buffer, self._used = self._source.read(ARCHIVE_CHUNK), 0
        return bool(self._buffer)

    def is_empty(self) -> bool:
        return not self._fill()

    def begin_header(self) -> None:
        """What is read up to end_header() is read into memory as a whole."""
        self._header_left = ARCHIVE_HEADER

    def end_header(self) -> None:
        self._header_left = -1

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes; fewer only at the end. Raises ArchiveError for a header without end."""
        if self._header_left >= 0:
            if size > self._header_left:
                raise ArchiveError(f"not a tar archive: a header of more than {ARCHIVE_HEADER} bytes")
            self._header_left -= size
        parts = []
        while size > 0 and self._fill():
            part = self._buffer[self._used : self._used + size]
            self._used += len(part)
            size -= len(part)
            parts.append(part)
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        self._position += len(data)
        return data

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        """Skip what lies between. Raises ArchiveError backwards, or if there is less."""
        if position < self._position:
            raise ArchiveError("not a tar archive: it contradicts itself")
        while self._position < position:
            if not self.read(min(position - self._position, ARCHIVE_CHUNK)):
                raise ArchiveError("not a whole tar archive: unexpected end of data")


class Unpacker:
    """Unpacks a tar stream into a directory.

    Whoever runs in the container may write there, too, and put links in the way.
    So every step is from an open directory to a name in it (openat(2)), and a
    link on the way is followed only if it was there before, and belongs to root
    or to the agent's user; never one that the archive itself has brought. A file
    appears under its name when it is whole.
    """

    def __init__(
        self, path: str, no_overwrite_dir_non_dir: bool = False, no_owners: bool = False, rename: str = ""
    ) -> None:
        """Open the directory.

        Args:
            no_overwrite_dir_non_dir, no_owners: see :class:`ArchivePut`.
            rename: takes the place of the first component of every name.

        Raises:
            ArchiveError: if it is none.
        """
        self._path = clean_path(path)
        self._strict = no_overwrite_dir_non_dir
        self._rename = rename
        self._owned = os.geteuid() == 0 and not no_owners  # only root can give a file away
        self._directories: dict[tuple[str, ...], tarfile.TarInfo] = {}  # their attributes are set last
        self._made_links: set[tuple[int, int]] = set()  # device and inode
        self._parent: tuple[tuple[str, ...], int] = ((), -1)  # the directory that was last open
        self._unnamed = os.path.isdir("/proc/self/fd")  # files may begin without a name, see _write_file()
        try:
            self._root = os.open(self._path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except NotADirectoryError as exc:
            if not os.path.lexists(self._path):
                raise _explain_path(self._path, exc) from None
            raise ArchiveError(f"{self._path}: not a directory", Reason.NOT_A_DIRECTORY) from None
        except OSError as exc:
            raise _explain_path(self._path, exc) from None

    def close(self) -> None:
        self._leave_parent()
        os.close(self._root)

    def unpack(self, source: _Readable) -> None:
        """Unpack all of it.

        As for Docker, nothing at all is an empty archive, and the zeros at the end may be missing.

        Raises:
            ArchiveError: naming the member, if it cannot be unpacked or leads out of the directory;
                what came before it stays.
        """
        stream = _TarStream(source)
        name = ""
        try:
            for member in self._members(stream):
                name = member.name
                self._unpack_one(stream, member)
            name = ""
            self._finish_directories()
            while source.read(ARCHIVE_CHUNK):
                pass  # padding
        except OSError as exc:
            what = os.path.join(self._path, name)
            raise ArchiveError(f"{what}: {(exc.strerror or str(exc)).lower()}") from None
        except (ValueError, OverflowError) as exc:  # a NUL in a name, a number that no system call takes
            raise ArchiveError(f"{name}: {exc}") from None
        finally:
            with contextlib.suppress(ArchiveError):  # there is an error already
                self._finish_directories()

    @staticmethod
    def _members(stream: _TarStream) -> Iterator[tarfile.TarInfo]:
        """All members, each to be dealt with before the next.

        TarFile.next() would take a header that is damaged for the end of the archive.
        """
        import tarfile

        if stream.is_empty():
            return
        errors = cast(Any, tarfile)
        try:
            tar = tarfile.TarFile(fileobj=cast(IO[bytes], stream), encoding="utf-8", errors="surrogateescape")
            member = tar.next()
            while member is not None:
                stream.end_header()
                yield member
                cast(Any, tar).members.clear()  # else it grows with every member
                stream.seek(cast(Any, tar).offset)
                stream.begin_header()
                member = tar.tarinfo.fromtarfile(tar)
            stream.end_header()
        except (errors.EOFHeaderError, errors.EmptyHeaderError):
            return
        except tarfile.TarError as exc:
            raise ArchiveError(f"not a whole tar archive: {exc}") from None
        except (ValueError, LookupError, OverflowError, RecursionError) as exc:  # of tarfile's, for a strange header
            raise ArchiveError(f"not a tar archive: {exc}") from None

    def _unpack_one(self, stream: _TarStream, member: tarfile.TarInfo) -> None:
        parts = self._split(member.name)
        if not parts:
            if not member.isdir():
                raise ArchiveError(f"{member.name}: names the directory itself, and is none")
            return  # as for Docker, what is there keeps its mode and its owner
        parent, name = self._enter_parent(parts[:-1]), parts[-1]
        if member.isdir():
            self._make_directory(parent, name, parts, member)
            return
        self._check_way(parent, name)
        self._directories.pop(parts, None)
        if member.isreg():
            self._write_file(parent, name, stream, member)
        elif member.islnk():
            self._link(parent, name, member)
        elif member.issym() or member.isfifo() or member.isdev():
            self._make_node(parent, name, member)
        else:
            raise ArchiveError(f"{member.name}: a member of an unknown type, {member.type!r}")

    def _split(self, name: str) -> tuple[str, ...]:
        parts = tuple(part for part in name.split("/") if part not in ("", "."))
        if ".." in parts:
            raise ArchiveError(f"{name}: leads out of the directory")
        return (self._rename, *parts[1:]) if self._rename and parts else parts

    def _enter_parent(self, parts: tuple[str, ...]) -> int:
        """The directory of a member, made if need be; stays open until the next one is asked for."""
        open_parts, open_fd = self._parent
        if parts == open_parts and open_fd >= 0:
            return open_fd
        below = open_fd >= 0 and parts[: len(open_parts)] == open_parts
        fd = os.dup(open_fd if below else self._root)
        self._leave_parent()
        try:
            for part in parts[len(open_parts) if below else 0 :]:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=fd)
                fd = self._enter(fd, part, [LINKS_LIMIT])
        except BaseException:
            os.close(fd)
            raise
        self._parent = (parts, fd)
        return fd

    def _leave_parent(self) -> None:
        if self._parent[1] >= 0:
            os.close(self._parent[1])
        self._parent = ((), -1)

    def _enter(self, directory: int, name: str, links_left: list[int]) -> int:
        """Open a directory in another one, which is closed; not when that raises OSError or ArchiveError."""
        try:
            entered = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        except NotADirectoryError:  # what a link gives, too
            entered = self._follow(directory, self._read_link(directory, name, links_left), links_left)
        os.close(directory)
        return entered

    def _follow(self, directory: int, target: str, links_left: list[int]) -> int:
        """Open the directory that a link in ``directory`` leads to."""
        entered = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) if target[0] == "/" else os.dup(directory)
        try:
            for part in target.split("/"):
                if part not in ("", "."):
                    entered = self._enter(entered, part, links_left)
        except BaseException:
            os.close(entered)
            raise
        return entered

    def _read_link(self, directory: int, name: str, links_left: list[int]) -> str:
        link = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        try:
            found = os.fstat(link)
            if not stat.S_ISLNK(found.st_mode):
                raise ArchiveError(f"{os.path.join(self._path, name)}: not a directory")
            if (found.st_dev, found.st_ino) in self._made_links:
                raise ArchiveError(f"{name}: a link of this archive, which is not followed")
            if found.st_uid not in (0, os.geteuid()):
                raise ArchiveError(f"{name}: a link of another user's, which is not followed")
            links_left[0] -= 1
            if links_left[0] < 0:
                raise ArchiveError(f"{name}: too many levels of symbolic links")
            return os.readlink("", dir_fd=link)
        finally:
            os.close(link)

    def _check_way(self, parent: int, name: str) -> None:
        """Refuse what may not take a directory's place, before all of it has come."""
        if self._strict:
            with contextlib.suppress(FileNotFoundError):
                found = os.stat(name, dir_fd=parent, follow_symlinks=False)
                if stat.S_ISDIR(found.st_mode):
                    raise ArchiveError(f"cannot overwrite directory {name!r} with non-directory")

    def _replace(self, parent: int, temporary: str, name: str) -> None:
        """Give what is whole its name; what has that now is gone then."""
        try:
            os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
        except IsADirectoryError:
            self._check_way(parent, name)
            import shutil

            try:
                shutil.rmtree(name, dir_fd=parent)
            except RecursionError:
                raise ArchiveError(f"{name}: the directory in its place is too deep to be removed") from None
            os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)

    def _make_directory(self, parent: int, name: str, parts: tuple[str, ...], member: tarfile.TarInfo) -> None:
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            found = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if not stat.S_ISDIR(found.st_mode):
                if self._strict:
                    raise ArchiveError(f"cannot overwrite non-directory {name!r} with directory") from None
                os.unlink(name, dir_fd=parent)
                os.mkdir(name, 0o700, dir_fd=parent)
        self._directories[parts] = member

    def _write_file(self, parent: int, name: str, stream: _TarStream, member: tarfile.TarInfo) -> None:
        """Write a file that has no name until it is whole; where that cannot be, one that only we know."""
        temporary = f".sockerless-{secrets.token_hex(8)}"
        fd, named = self._open_new(parent, temporary)
        try:
            with open(fd, "wb", buffering=0) as file:
                self._write_content(file, stream, member)
                self._set_attributes(fd, member)
                if not named:
                    # open(2), O_TMPFILE: how such a file gets its name. link(2) replaces nothing, rename(2) does.
                    unnamed = f"/proc/self/fd/{fd}"
                    try:
                        os.link(unnamed, name, dst_dir_fd=parent, follow_symlinks=True)
                        return
                    except FileExistsError:
                        os.link(unnamed, temporary, dst_dir_fd=parent, follow_symlinks=True)
                        named = True
            self._replace(parent, temporary, name)
        except BaseException:
            if named:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=parent)
            raise

    def _open_new(self, parent: int, temporary: str) -> tuple[int, bool]:
        """A new file, and whether it has that name."""
        if self._unnamed:
            try:
                return os.open(".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=parent), False
            except OSError as exc:
                if exc.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
                    raise
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(temporary, flags, 0o600, dir_fd=parent), True

    @staticmethod
    def _write_content(file: io.FileIO, stream: _TarStream, member: tarfile.TarInfo) -> None:
        if member.size < 0:
            raise ArchiveError(f"{member.name}: a size below 0")
        stream.seek(member.offset_data)
        # The pieces of a sparse file stand one behind the other.
        pieces: Sequence[tuple[int, int]] = cast(Any, member).sparse or [(0, member.size)]
        end = 0
        for offset, size in pieces:
            if not size:  # as unused places of the header are, too
                continue
            if offset < end or size < 0 or offset + size > member.size:
                raise ArchiveError(f"{member.name}: a sparse file that contradicts itself")
            end = offset + size
            file.seek(offset)
            while size:
                data = stream.read(min(size, ARCHIVE_CHUNK))
                if not data:
                    raise ArchiveError(f"{member.name}: not a whole tar archive: unexpected end of data")
                size -= len(data)
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
        if end < member.size or member.issparse():
            file.truncate(member.size)

    def _link(self, parent: int, name: str, member: tarfile.TarInfo) -> None:
        """A hard link to something below the directory; what is a link there is linked itself."""
        target = self._split(member.linkname)
        if not target:
            raise ArchiveError(f"{member.name}: a hard link to a directory")
        temporary = f".sockerless-{secrets.token_hex(8)}"
        holder = os.dup(self._root)
        try:
            for part in target[:-1]:
                holder = self._enter(holder, part, [LINKS_LIMIT])
            try:
                os.link(target[-1], name, src_dir_fd=holder, dst_dir_fd=parent, follow_symlinks=False)
                return
            except FileExistsError:
                os.link(target[-1], temporary, src_dir_fd=holder, dst_dir_fd=parent, follow_symlinks=False)
            try:
                self._replace(parent, temporary, name)
            finally:
                # rename(2) of a link to the same file does nothing, and leaves both.
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=parent)
        except FileNotFoundError:
            raise ArchiveError(f"{member.name}: a hard link to {member.linkname}, which is not there") from None
        finally:
            os.close(holder)

    def _make_node(self, parent: int, name: str, member: tarfile.TarInfo) -> None:
        """A symbolic link, a FIFO or a device."""
        made = name
        try:
            self._make_bare_node(parent, made, member)
        except FileExistsError:
            made = f".sockerless-{secrets.token_hex(8)}"
            self._make_bare_node(parent, made, member)
        try:
            node = os.open(made, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            try:
                found = os.fstat(node)
                # Somebody else may have put something in its place, to be given it, or have its mode changed.
                if stat.S_IFMT(found.st_mode) != self._node_type(member) or found.st_uid != os.geteuid():
                    raise ArchiveError(f"{member.name}: replaced while it was made")
                if member.issym():
                    self._made_links.add((found.st_dev, found.st_ino))
                self._set_attributes(node, member)
            finally:
                os.close(node)
            if made != name:
                self._replace(parent, made, name)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(made, dir_fd=parent)
            raise

    @staticmethod
    def _node_type(member: tarfile.TarInfo) -> int:
        if member.issym():
            return stat.S_IFLNK
        return stat.S_IFIFO if member.isfifo() else stat.S_IFCHR if member.ischr() else stat.S_IFBLK

    def _make_bare_node(self, parent: int, name: str, member: tarfile.TarInfo) -> None:
        if member.issym():
            os.symlink(member.linkname, name, dir_fd=parent)
            return
        device = 0 if member.isfifo() else os.makedev(member.devmajor, member.devminor)
        os.mknod(name, self._node_type(member) | 0o600, device, dir_fd=parent)

    def _set_attributes(self, fd: int, member: tarfile.TarInfo) -> None:
        """Owner, mode, extended attributes and times, in this order: each may undo one before it."""
        # What is open for its path alone takes these only so. There is no link to follow behind it, either: see
        # proc_pid_fd(5).
        target: int | str = fd if member.isreg() else f"/proc/self/fd/{fd}"
        if self._owned:
            if not (0 <= member.uid < NOBODY_AT_ALL and 0 <= member.gid < NOBODY_AT_ALL):
                raise ArchiveError(f"{member.name}: no user can have the number {member.uid}, or no group {member.gid}")
            os.chown(target, member.uid, member.gid)
        if not member.issym():
            os.chmod(target, self._mode_of(fd, member))
        if member.isreg() or member.isdir():
            for key, value in member.pax_headers.items():
                if key.startswith("SCHILY.xattr."):
                    # Those that the file system, or the kernel for this user, does not take.
                    with contextlib.suppress(OSError):
                        name = key.removeprefix("SCHILY.xattr.")
                        os.setxattr(target, name, value.encode("utf-8", "surrogateescape"))
        moment = _mtime_of(member)
        os.utime(target, ns=(moment, moment))

    @staticmethod
    def _mode_of(fd: int, member: tarfile.TarInfo) -> int:
        """Its mode; what runs as its owner must not come to run as another one."""
        mode = member.mode & 0o7777
        if not member.isdir():
            found = os.fstat(fd)
            if found.st_uid != member.uid:
                mode &= ~stat.S_ISUID
            if found.st_gid != member.gid:
                mode &= ~stat.S_ISGID
        return mode

    def _finish_directories(self) -> None:
        """Give directories their attributes, the deepest first: what was put into them has changed their times."""
        self._leave_parent()
        finishing, self._directories = self._directories, {}
        failure: ArchiveError | None = None
        for parts, member in sorted(finishing.items(), key=lambda item: -len(item[0])):
            fd = os.dup(self._root)
            try:
                for part in parts:
                    fd = self._enter(fd, part, [LINKS_LIMIT])
                self._set_attributes(fd, member)
            except ArchiveError as exc:
                failure = failure or exc
            except OSError as exc:
                failure = failure or ArchiveError(f"{member.name}: {(exc.strerror or str(exc)).lower()}")
            except (ValueError, OverflowError) as exc:  # as in unpack()
                failure = failure or ArchiveError(f"{member.name}: {exc}")
            finally:
                os.close(fd)
        if failure is not None:
            raise failure


_PAX_TIME = re.compile(r"(-?)(\d{1,12})(?:\.(\d*))?")


def _mtime_of(member: tarfile.TarInfo) -> int:
    """A member's time in nanoseconds, exactly: tarfile makes a float of it."""
    text = member.pax_headers.get("mtime")
    if text is None:
        return int(member.mtime) * 1_000_000_000
    match = _PAX_TIME.fullmatch(text)
    if match is None:
        raise ArchiveError(f"{member.name}: not a time: {text[:80]!r}")
    moment = int(match[2]) * 1_000_000_000 + int((match[3] or "")[:9].ljust(9, "0"))
    return -moment if match[1] else moment


class ArchiveSession:
    """A tar stream out of the container or into it, as a session of version 2."""

    def __init__(self, runtime: Runtime, host: SessionHost, request: ArchiveGet | ArchivePut) -> None:
        self.id = request.id
        self.host = host
        self.channel = host.open_channel(request.id)
        self.record = host.open_record(request)
        self.tie = Tie(request)
        self.tie.flow.connect(self.channel)
        self.started_at = time.time()
        self._request = request
        self._runtime = runtime
        self._input = _TarInput(self._consumed)
        self._told = 0  # bytes of stdin that have been acknowledged; the archive thread's alone

    def run(self) -> None:
        """Pack or unpack, in a pool thread."""
        self._runtime.archives.begin()
        try:
            self._pack_or_unpack()
        finally:
            self._input.close()
            self._runtime.archives.finish()

    def _pack_or_unpack(self) -> None:
        self.tie.flow.begin(Started(self.id, 0, self.tie.secret))
        self.record.start()
        last = self._copy()
        if isinstance(last, Error):
            self.record.error(last.reason)
            self.record.end(error=last)
        else:
            self.record.end(last.code if last is not None else None)
        if last is not None:
            self.tie.flow.finish(last)
        else:
            self.host.forget(self)

    def _copy(self) -> Exit | Error | None:
        """Copy, and return the session's last word; None if nobody is there to hear it."""
        request = self._request
        extra = self.record.extra
        log.info("archive %s: %s", "out of" if isinstance(request, ArchiveGet) else "into", request.path, extra=extra)
        try:
            if isinstance(request, ArchiveGet):
                pack(request.path, self._put)
            else:
                self._unpack(request)
        except ArchiveError as exc:
            log.info("archive failed: %s", exc, extra=extra)
            return Error(self.id, str(exc), exc.reason)
        except _Abandoned:
            log.info("archive abandoned%s", self.record.cause, extra=extra)
            return None
        except Exception as exc:
            log.exception("archive: unexpected error", extra=extra)
            return Error(self.id, f"unexpected error: {exc}", Reason.ARCHIVE_FAILED)
        log.info("archive ended", extra=extra)
        return Exit(self.id, 0)

    def _unpack(self, request: ArchivePut) -> None:
        unpacker = Unpacker(request.path, request.no_overwrite_dir_non_dir, request.no_owners)
        try:
            unpacker.unpack(self._input)
        finally:
            unpacker.close()

    def _put(self, data: bytes) -> None:
        if not self.tie.flow.wait_for_room():
            raise _Abandoned
        self.tie.flow.put(Stream.STDOUT, data)

    def _consumed(self, count: int) -> None:
        if count - self._told >= PROGRESS_STEP or count == self.tie.received:
            self._told = count
            self.tie.flow.send(Ack(self.id, count))

    def consumed(self) -> int:
        return self._input.consumed()

    def write(self, data: BytesLike) -> None:
        self.tie.received += len(data)
        limit = self._runtime.config.stdin_limit
        if self._input.feed(bytes(data)) > limit:
            text = f"stdin: more than {limit} bytes are waiting"
            self.host.send(Error(self.id, text, Reason.ARCHIVE_FAILED))
            self.end()

    def end_input(self) -> None:
        self.tie.closed += 1
        self._input.end()

    def send_signal(self, number: int) -> None:
        """There is nobody to signal."""

    def resize(self, width: int, height: int) -> None:
        """There is no terminal."""

    def end(self) -> None:
        self.leave()
        self.host.forget(self)

    def leave(self) -> Child | None:
        self._input.close()
        self.tie.flow.close()
        return None

    def describe(self) -> dict[str, Any]:
        verb = "archive_get" if isinstance(self._request, ArchiveGet) else "archive_put"
        state: dict[str, Any] = {"id": self.id, "kind": "archive", "pid": 0, "cmd": [verb, self._request.path]}
        return state | {"tty": False, "user": "", "started_at": self.started_at}

    @property
    def child(self) -> Child | None:
        """None: it is no process."""
        return None


# ══════════════════════════════════════════════════════════════════════════════
# 10  Health checks
#    Owns the periodic check of Docker's HEALTHCHECK. One thread runs it; any
#    thread may ask for its state.
# ══════════════════════════════════════════════════════════════════════════════

HEALTH_OUTPUT = 4096  # bytes of a check's output that are kept, as Docker does
HEALTH_RESULTS = 5  # results that are kept, as Docker does
HEALTH_STATES = ("starting", "healthy", "unhealthy")


@dataclasses.dataclass(frozen=True, slots=True)
class HealthResult:
    """One check. Times are Unix times; the exit code is -1 if it took too long or could not start."""

    start: float
    end: float
    exit_code: int
    output: str

    def describe(self) -> dict[str, object]:
        """The result as Docker's API writes it."""
        start, end = (
            datetime.datetime.fromtimestamp(moment, datetime.UTC).isoformat().replace("+00:00", "Z")
            for moment in (self.start, self.end)
        )
        return {"Start": start, "End": end, "ExitCode": self.exit_code, "Output": self.output}


class _FirstBytes:
    """A sink that keeps the first HEALTH_OUTPUT bytes and drops the rest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _data: stdout and stderr have a reader each
        self._data = b""

    def wait_for_room(self) -> bool:
        return True

    def call_when_room(self, callback: Callable[[], None]) -> bool:
        return True

    def put(self, stream: Stream, data: bytes) -> None:
        with self._lock:
            self._data += data[: HEALTH_OUTPUT - len(self._data)]

    def text(self) -> str:
        with self._lock:
            return self._data.decode("utf-8", "replace")


class HealthChecker:
    """Runs the health command at intervals and keeps its verdict.

    ``starting`` until the first success, or until ``health_retries`` failures
    in a row. Failures in the start period do not count, unless a success has
    ended it (https://docs.docker.com/reference/dockerfile/#healthcheck).
    """

    def __init__(self, runtime: Runtime, on_change: Callable[[], None] = lambda: None) -> None:
        self._runtime = runtime
        self._on_change = on_change  # called in the checking thread
        self._started = time.monotonic()
        self._stopped = threading.Event()
        self.ended = threading.Event()  # nothing of a check runs any more
        self._lock = threading.Lock()  # guards the attributes below
        self._check_over = threading.Event()  # the check that runs has finished, or must
        self._status = "starting"
        self._streak = 0  # failures in a row that count
        self._results: collections.deque[HealthResult] = collections.deque(maxlen=HEALTH_RESULTS)

    def run(self) -> None:
        """Check until stopped, in a pool thread."""
        try:
            while not self._stopped.wait(self._runtime.config.health_interval):
                result = self._check()
                if not self._stopped.is_set():
                    self._judge(result)
        finally:
            self.ended.set()

    def stop(self) -> None:
        """Check no more, and end the check that runs: the main process has ended, or the agent ends."""
        self._stopped.set()
        with self._lock:
            self._check_over.set()

    def describe(self) -> dict[str, Any]:
        """The state for ``/health``."""
        with self._lock:
            return {
                "status": self._status,
                "failingStreak": self._streak,
                "log": [result.describe() for result in self._results],
            }

    def _check(self) -> HealthResult:
        config = self._runtime.config
        start, began = time.time(), time.monotonic()

        def result(code: int, text: str) -> HealthResult:
            # A clock that is set in the meantime does not change how long it took.
            return HealthResult(start, start + time.monotonic() - began, code, text)

        output = _FirstBytes()
        over = threading.Event()
        codes: list[int] = []

        def on_finished(code: int) -> None:
            codes.append(code)
            over.set()

        with self._lock:
            self._check_over = over
        if self._stopped.is_set():  # in this order: either stop() finds the event, or this sees the stop
            over.set()

        try:
            (thread,) = self._runtime.pool.reserve(1)
        except RuntimeError as exc:
            return result(-1, f"Health check could not start: {exc}")
        try:
            process = Process(self._runtime, output, on_finished)
            process.start(("/bin/sh", "-c", config.health_cmd))
        except (OSError, SpawnError) as exc:
            self._runtime.pool.release([thread])
            return result(-1, f"Health check could not start: {exc}")
        process.input.end()
        thread.run(process.pump)
        over.wait(config.health_timeout)
        if codes:
            return result(codes[0], output.text())
        child = process.abandon()
        if child is not None:
            end_processes([child], grace=0)
        seconds = f"{config.health_timeout:g}"
        return result(-1, f"Health check exceeded timeout ({seconds}s)")

    def _judge(self, result: HealthResult) -> None:
        config = self._runtime.config
        # As in moby's handleProbeResult: it counts from when the check began.
        age = time.monotonic() - (result.end - result.start) - self._started
        with self._lock:
            before = self._status
            self._results.append(result)
            if result.exit_code == 0:
                self._status, self._streak = "healthy", 0
            elif before != "starting" or age >= config.health_start_period:
                self._streak += 1
                if self._streak >= config.health_retries:
                    self._status = "unhealthy"
            after = self._status
        if after != before:
            log.info("health: %s, was %s (exit code %d)", after, before, result.exit_code)
            self._on_change()


# ══════════════════════════════════════════════════════════════════════════════
# 11  Statistics
#     Owns the figures of what runs: CPU, memory, threads, descriptors, I/O. Pool
#     threads ask for them; psutil is imported when the first one does.
# ══════════════════════════════════════════════════════════════════════════════

CGROUP = "/sys/fs/cgroup"  # as a container sees its own, cgroups(7)


class StatisticsError(AgentError):
    """There are no statistics to be had here."""


def _read_number(path: str) -> int | None:
    """A number that a file of the kernel's holds; None for "max", or if there is none."""
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None


def _owner_of(process: _ProcessInfo, children: Mapping[bytes, str], leaders: Mapping[int, str]) -> str | None:
    """Which session a process says that it belongs to: by the mark in its environment, else by its leader."""
    try:
        with open(f"/proc/{process.pid}/environ", "rb") as file:
            environment = file.read()
    except OSError:  # gone, or another user's
        environment = b""
    at = environment.find(_agent_mark.encode())
    if at >= 0:
        owner = children.get(environment[at : environment.find(b"\0", at)])
        if owner is not None:
            return owner
    return leaders.get(process.pid) or leaders.get(process.session)


def _assign(processes: Sequence[_ProcessInfo], children: Mapping[str, Child]) -> dict[int, str]:
    """The owner of each process that has one, its ancestors' if it does not say so itself; see find_processes()."""
    cookies = {child.cookie: key for key, child in children.items()}
    # While a session has members, the number of its leader that ended is no new process's.
    living = {process.pid for process in processes}
    leaders = {child.pid: key for key, child in children.items() if child.returncode is None or child.pid not in living}
    owners = {
        process.pid: owner for process in processes if (owner := _owner_of(process, cookies, leaders)) is not None
    }
    size = -1
    while size != len(owners):
        size = len(owners)
        owners |= {
            process.pid: owners[process.parent]
            for process in processes
            if process.pid not in owners and process.parent in owners
        }
    return owners


@dataclasses.dataclass(slots=True)
class _Usage:
    """The sum over some processes. Those that cannot be read, another user's for one, count as far as they can be.

    The CPU time is theirs and that of the children which they have waited for.
    """

    processes: int = 0
    cpu_seconds: float = 0.0
    memory: int = 0
    threads: int = 0
    fds: int = 0
    read_bytes: int = 0
    write_bytes: int = 0

    def add(self, process: psutil.Process) -> None:
        import psutil

        self.processes += 1
        times = process.cpu_times()
        self.cpu_seconds += times.user + times.system + times.children_user + times.children_system
        self.memory += process.memory_info().rss
        self.threads += process.num_threads()
        # AttributeError: a kernel that does not count I/O. RuntimeError: so psutil says that it has just ended.
        with contextlib.suppress(psutil.AccessDenied, AttributeError, RuntimeError):
            self.fds += process.num_fds()
            counters = process.io_counters()
            self.read_bytes += counters.read_bytes
            self.write_bytes += counters.write_bytes


def _describe_process(process: psutil.Process) -> dict[str, Any]:
    import psutil

    with process.oneshot():
        times, memory = process.cpu_times(), process.memory_info()
        state: dict[str, Any] = {"pid": process.pid, "ppid": process.ppid(), "uid": process.uids().effective}
        try:
            state["user"] = process.username()
        except (KeyError, psutil.AccessDenied):
            state["user"] = str(state["uid"])
        state |= {"cpu_seconds": times.user + times.system, "start_time": process.create_time()}
        state |= {"tty": process.terminal() or "", "state": process.status()}
        state |= {"rss": memory.rss, "vsz": memory.vms, "name": process.name()}
        try:
            state["cmd"] = process.cmdline()
        except psutil.AccessDenied:
            state["cmd"] = []
        return state


def _describe_container(everything: _Usage) -> dict[str, Any]:
    """The whole container, from its cgroup if there is one to see, else the sum of its processes."""
    import psutil

    state: dict[str, Any] = dataclasses.asdict(everything)
    memory = _read_number(f"{CGROUP}/memory.current")
    if memory is not None:
        state["memory"] = memory
    limit = _read_number(f"{CGROUP}/memory.max")
    total = psutil.virtual_memory().total
    state["memory_limit"] = min(limit, total) if limit is not None else total
    with contextlib.suppress(OSError, ValueError), open(f"{CGROUP}/cpu.stat", encoding="ascii") as file:
        state["cpu_seconds"] = int(dict(line.split() for line in file)["usage_usec"]) / 1e6
    whole = psutil.cpu_times()
    state["system_cpu_seconds"] = sum(whole) - getattr(whole, "guest", 0) - getattr(whole, "guest_nice", 0)
    network = {}
    with contextlib.suppress(OSError):  # no /proc/net
        for name, counters in psutil.net_io_counters(pernic=True).items():
            network[name] = {
                "rx_bytes": counters.bytes_recv,
                "rx_packets": counters.packets_recv,
                "rx_errors": counters.errin,
                "rx_dropped": counters.dropin,
                "tx_bytes": counters.bytes_sent,
                "tx_packets": counters.packets_sent,
                "tx_errors": counters.errout,
                "tx_dropped": counters.dropout,
            }
    return state | {"network": network}


def measure(children: Mapping[str, Child], processes: bool = False) -> dict[str, Any]:
    """Statistics of the container, and of each child with all that it started.

    Args:
        children: by a key that the result has again.
        processes: describe every process, too.

    Returns:
        ``time`` (Unix time), ``cpus``, ``memory_total``; ``container`` and, by key, ``trees``: each with
        ``processes``, ``cpu_seconds``, ``memory`` (bytes resident), ``threads``, ``fds``, ``read_bytes`` and
        ``write_bytes`` of the processes that run, the container with ``memory_limit``, ``system_cpu_seconds`` and
        ``network``, too; ``processes``, if asked for.

    Raises:
        StatisticsError: if psutil is not installed.
    """
    try:
        import psutil
    except ImportError:
        raise StatisticsError("statistics need the Python package psutil, which this image does not have") from None
    found = [process for process in map(_read_process, psutil.pids()) if process is not None]
    owners = _assign(found, children)
    everything, trees = _Usage(), {key: _Usage() for key in children}
    described = []
    for info in found:
        # It may end at any moment.
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process = psutil.Process(info.pid)
            usage = _Usage()
            with process.oneshot():
                usage.add(process)
                if processes:
                    described.append(_describe_process(process))
            for target in (everything, trees.get(owners.get(info.pid, "")) if info.pid in owners else None):
                if target is not None:
                    for field in dataclasses.fields(usage):
                        setattr(target, field.name, getattr(target, field.name) + getattr(usage, field.name))
    result: dict[str, Any] = {"time": time.time(), "cpus": psutil.cpu_count() or 1}
    result |= {"memory_total": psutil.virtual_memory().total, "container": _describe_container(everything)}
    result["trees"] = {key: dataclasses.asdict(usage) for key, usage in trees.items()}
    return result | ({"processes": described} if processes else {})


# ══════════════════════════════════════════════════════════════════════════════
# 12  Connection
#     Owns one WebSocket peer each, whichever side dialled. Threads: the library's
#     receiver, which answers pings and dispatches; the connection thread, which
#     does so for what comes before it is there; the writer, and whoever sends
#     something itself (see Outbox). One heartbeat thread watches them all.
# ══════════════════════════════════════════════════════════════════════════════

CLOSE_TIMEOUT = 3.0  # seconds for the closing handshake
BACKLOG_LIMIT = 4 << 20  # bytes of error replies that may wait for a peer that does not read them
CALLS_LIMIT = 64  # questions of one peer that may wait for their answers
HEARD_STEP = 16  # signals, sizes and ends after which a client is told that they have come
REMEMBERED_IDS = 4096  # ended sessions whose late messages are expected
CONTROL_SIZE = 16  # bytes; a ping or pong of ours is smaller, a message is not
LARGE_PAYLOAD = 64 << 10  # bytes from which on a frame's payload is not gathered in the library's buffer
LARGE_PART = 4 << 10  # bytes from which on a part of it is kept as it came
IOV_MAX = 1024  # buffers in one sendmsg(2), see <limits.h>


def _in_words(exc: BaseException) -> str:
    return exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)


def explain_tls_failure(exc: BaseException) -> str:
    """Why there is no TLS connection to a server, in words; empty if that is not the reason."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {exc.verify_message}"
    if not isinstance(exc, ssl.SSLError):
        return ""
    if exc.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):  # the latter since OpenSSL 3.2
        return "it does not speak TLS there"
    return f"TLS: {(exc.reason or str(exc)).lower().replace('_', ' ')}"


class TLSStream:
    """An SSLSocket that one thread reads while another writes.

    An OpenSSL connection must not be entered by two threads at once, and a
    blocking read would keep a writer out. So the socket does not block, a lock
    guards each call, and the waiting is done outside it. Has the part of a
    socket's interface that websockets and QueuedConnection use.
    """

    RECORD = 16 << 10  # bytes in a TLS record at most (RFC 8446 §5.1)

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock = sock
        self._lock = threading.Lock()  # guards _sock's OpenSSL state, and _closed
        self.error: ssl.SSLError | None = None
        """What ended the reading, such as the alert with which a server refuses a certificate."""
        self._closed = False  # both sides have said goodbye: what comes now is no TLS, and SSLSocket would take it
        sock.settimeout(0)

    def recv(self, size: int) -> bytes:
        while True:
            try:
                with self._lock:
                    return self._read(max(size, self.RECORD))  # a whole record: nothing stays behind in OpenSSL
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN)
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT)
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return b""
            except ssl.SSLError as exc:
                self.error = exc
                raise

    def _read(self, size: int) -> bytes:
        """Holds the lock."""
        return b"" if self._closed else self._sock.recv(size)

    def sendall(self, data: BytesLike) -> None:
        view = memoryview(data)
        while view:
            try:
                with self._lock:
                    if self._closed:
                        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
                    count = self._sock.send(view[: self.RECORD])
                view = view[count:]
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN)
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT)

    def sendmsg(self, buffers: Iterable[BytesLike]) -> int:
        data = b"".join(buffers)
        self.sendall(data)
        return len(data)

    def peer_certificate(self) -> dict[str, Any]:
        """What SSLSocket.getpeercert() says of a certificate that was verified; empty without one."""
        with self._lock:
            return self._sock.getpeercert() or {}

    def _wait(self, event: int) -> None:
        poller = select.poll()
        poller.register(self._sock, event)
        poller.poll()

    def shutdown(self, how: int) -> None:
        """shutdown(2), for SHUT_WR with TLS's own goodbye before it: without one the end might be an attacker's.

        SSLSocket's own would go on in plain text, which the other thread might be sending.
        """
        if how == socket.SHUT_WR:
            with self._lock, contextlib.suppress(OSError, ValueError):
                self._sock.unwrap()  # says goodbye; SSLWantReadError while the peer has not
                self._closed = True
        socket.socket.shutdown(self._sock, how)

    def close(self) -> None:
        with self._lock:
            self._sock.close()

    def __getattr__(self, name: str) -> Any:
        # fileno, getsockopt, getpeername, family ...: system calls on the descriptor.
        return getattr(self._sock, name)

    def settimeout(self, timeout: float | None) -> None:
        """Ignored: the deadline of a closing handshake is kept by websockets' close()."""


def who_is(sock: socket.socket) -> Who:
    """Who is at the other end: an address, or what a unix socket knows of its client (SO_PEERCRED, unix(7))."""
    try:
        if sock.family == socket.AF_UNIX:
            pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            return Who(f"unix socket, pid {pid}, uid {uid}")
        address = str(Address(*sock.getpeername()[:2]))
    except OSError:  # what it sent before it left counts all the same
        return Who("a peer that has left")
    certificate = peer_certificate(sock)
    names = [value for part in certificate.get("subject", ()) for kind, value in part if kind == "commonName"]
    names += [value for _, value in certificate.get("subjectAltName", ())]
    return Who(address, (names or ["a certificate without a name"])[0] if certificate else "")


def peer_certificate(sock: socket.socket) -> dict[str, Any]:
    """The certificate that a client showed and that was verified; empty without one."""
    stream: object = sock  # a TLSStream where QueuedConnection made one
    if isinstance(stream, TLSStream):
        return stream.peer_certificate()
    if isinstance(stream, ssl.SSLSocket) and stream.version() is not None:  # else its handshake is not over
        return stream.getpeercert() or {}
    return {}


class FrameReader(StreamReader):
    """What is received and not parsed yet; puts a large payload together once, where the library copies it thrice.

    Entered with protocol_mutex held.
    """

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[bytes | bytearray] | None = None  # of a large payload, while it comes
        self._count = 0  # bytes in _parts

    def feed_data(self, data: bytes | bytearray) -> None:
        if self._parts is None:
            super().feed_data(data)
            return
        self._count += len(data)
        if len(data) >= LARGE_PART:
            self._parts.append(data)
        elif isinstance(self._parts[-1], bytearray):  # a megabyte of single bytes is no list of a million objects
            self._parts[-1] += data
        else:
            self._parts.append(bytearray(data))

    def at_eof(self) -> Generator[None, None, bool]:
        self._parts = None  # what is discarded after an error is not kept either
        return super().at_eof()

    def read_exact(self, n: int) -> Generator[None, None, bytearray]:
        if n < LARGE_PAYLOAD or len(self.buffer) >= n:
            return super().read_exact(n)
        return self._read_large(n)

    def _read_large(self, n: int) -> Generator[None, None, bytearray]:
        parts: list[bytes | bytearray] = [self.buffer]
        self.buffer = bytearray()
        self._parts, self._count = parts, len(parts[0])
        while self._count < n:
            if self.eof:
                raise EOFError(f"stream ends after {self._count} bytes, expected {n} bytes")
            yield
        self._parts = None
        last = memoryview(parts.pop())
        end = len(last) - (self._count - n)
        self.buffer += last[end:]
        return bytearray().join([*parts, last[:end]])


class QueuedConnection(WebSocket):
    """A websockets connection whose sending never blocks its receiving.

    The library's send() holds protocol_mutex while it is in socket.sendall(),
    and its receiver needs that mutex for every frame: with a peer that is slow
    to read, no ping would be answered and no signal delivered, and two peers
    that both stream would stop for ever. Here send_data(), which the library
    calls with the mutex held, only queues; what is queued is sent by the writer
    thread, or without waiting by the thread that has something small to send.

    Receiving takes no change of threads either where serve_messages() is used.

    Relies on: send_data() being the only place that writes to the socket;
    protocol.data_to_send(), protocol_mutex, close_socket(); process_event(),
    which the receiver calls without that mutex; recv_messages.frames, the queue;
    the protocol's parser, which reads from the reader that it has when it is made.
    tests/system/test_library.py fails if a release changes one of them.
    """

    recv_bufsize = 256 << 10
    masked = False
    paced = False

    def __init__(self, sock: socket.socket, protocol: WebSocketProtocol, *args: Any, **kwargs: Any) -> None:
        stream = cast(socket.socket, TLSStream(sock)) if isinstance(sock, ssl.SSLSocket) else sock
        self.who = who_is(stream)
        self.outbox = Outbox(self.masked, self.paced)
        self.last_received = time.monotonic()  # written by the receiver alone
        self.progress: tuple[int, float] = (0, time.monotonic())  # see stuck_for(); the heartbeat's alone
        self._writing = False  # guarded by protocol_mutex; once True, everything goes through the outbox
        self._sent = 0  # bytes handed to the kernel, pings and pongs aside; the role's, see Outbox
        self._secure = isinstance(sock, ssl.SSLSocket)
        # For serve_messages(). The receiver makes _direct False, serve_messages()
        # makes it True: both with the lock, which is also held while a message is queued.
        self._handler: Callable[[str | bytes], None] | None = None
        self._direct = False
        self._direct_lock = threading.Lock()
        self._handler_failure: Exception | None = None
        # A message in fragments, while it comes; the receiver's alone.
        self._opcode = Opcode.TEXT
        self._fragments = bytearray()
        # Before the receiver starts. The parser has begun with the reader that it found.
        protocol.reader = FrameReader()
        protocol.parser = protocol.parse()
        next(protocol.parser)
        try:
            super().__init__(stream, protocol, *args, **kwargs)
        except Exception:  # the system refuses the receiver's thread: let go of what the library has opened for it
            for name in ("shutdown_watcher", "shutdown_notifier"):
                if (end := getattr(self, name, None)) is not None:
                    end.close()
            raise

    def recv_events(self) -> None:
        """The receiver, see receive_all()."""
        try:
            self.receive_all()
        except (OSError, MemoryError) as exc:  # of the library's, before it could begin: no descriptor or memory
            log.error("connection lost: %s", explain_want(exc), extra={"peer": self.who.name})
            self.close_socket()
            self.shutdown_watcher.close()

    def receive_all(self) -> None:
        """Receive until the connection ends."""
        super().recv_events()

    def start_writer(self, pool: ThreadPool) -> None:
        """Send from a thread of ``pool`` from now on; call it right after the handshake.

        Raises:
            RuntimeError: if the system refuses the thread.
        """
        (thread,) = pool.reserve(1)
        with self.protocol_mutex:
            self._writing = True
        if not self._secure:  # TLS knows no MSG_DONTWAIT
            self.outbox.allow_sending_now(self._send_now)
        thread.run(self._write)

    def send_data(self) -> None:
        for data in self.data_to_send():
            if self._writing:
                if not data:
                    # The close frame goes now, if it can: where the peer has closed its side behind its own, the
                    # socket is closed before the writer's turn.
                    self.outbox.stop()
                    self.outbox.send_queued()
                self.outbox.push_frame(data)
            elif data:  # the handshake: a few bytes that always fit the socket's buffer
                with contextlib.suppress(ConnectionError):  # the receiver sees that it has left
                    self.socket.sendall(data)
            else:
                with contextlib.suppress(OSError):  # closed already
                    self.socket.shutdown(socket.SHUT_WR)
        if self._writing and self.protocol.state is not OPEN:
            self.outbox.stop()  # RFC 6455 §5.5.1: no data frame after a close frame

    def data_to_send(self) -> list[bytes]:
        """What the protocol wants to be sent; b"" closes our side of the stream."""
        return self.protocol.data_to_send()

    def send_ping(self) -> None:
        """Ping, without waiting for anything. The pong only counts as a sign of life."""
        with self.protocol_mutex:
            if self.protocol.state is OPEN:
                self.protocol.send_ping(b"")
                self.send_data()

    def serve_messages(self, handler: Callable[[str | bytes], None]) -> None:
        """Call ``handler`` with each message in its order, until the connection is closed.

        The receiver calls it, which saves a change of threads for every message,
        and the caller's thread for what has come before. While it runs nothing is
        received, pings neither: it must not block.

        Raises:
            ConnectionClosed: if the connection ends otherwise than by a closing handshake.
        """
        self._handler = handler
        try:
            while True:
                with self._direct_lock:
                    self._direct = self.recv_messages.frames.empty()
                handler(self.recv())
        except ConnectionClosed as exc:
            if self._handler_failure is not None:
                raise self._handler_failure from None
            if not isinstance(exc, ConnectionClosedOK):
                raise

    def process_event(self, event: Any) -> None:
        self.last_received = time.monotonic()
        if not isinstance(event, Frame) or event.opcode not in DATA_OPCODES:
            super().process_event(event)
            return
        if not event.fin or event.opcode is Opcode.CONT:
            self._gather(event)
            if not event.fin:
                return
            event = Frame(self._opcode, self._fragments)
            self._fragments = bytearray()
        if self._direct and (message := self._read(event)) is not None:
            assert self._handler is not None
            try:
                self._handler(message)
            except Exception as exc:
                self._handler_failure = exc
                self.close_socket()
        else:
            with self._direct_lock:
                self._direct = False
                super().process_event(event)

    def _gather(self, fragment: Frame) -> None:
        """Put a message's fragments together. Its protocol has checked their order and their size.

        The library would keep each as an object until the last one is there, a hundred times the size of a
        fragment of one byte, and from release 17 on refuse a message of more than 4,096.
        """
        if fragment.opcode is not Opcode.CONT:
            self._opcode = fragment.opcode
        self._fragments += fragment.data

    @staticmethod
    def _read(frame: Frame) -> str | bytes | None:
        """The message that a frame is; None if it is not UTF-8, for which the library has a close code."""
        if frame.opcode is Opcode.BINARY:
            return cast(bytes, frame.data)
        try:
            return bytes(frame.data).decode()
        except UnicodeDecodeError:
            return None

    def close_socket(self) -> None:
        self.outbox.end()
        with contextlib.suppress(OSError):  # closed already
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes a writer in sendmsg(); close(2) would not
        super().close_socket()

    def silence(self) -> float:
        """Seconds since the peer, or at least its kernel, was last heard of."""
        silence = time.monotonic() - self.last_received
        try:
            info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 60)
        except OSError:  # a unix socket, whose other end cannot vanish without a word; or closed
            return 0.0
        # struct tcp_info (<linux/tcp.h>): tcpi_probes, tcpi_backoff, tcpi_unacked, tcpi_last_ack_recv (milliseconds).
        # A peer whose program is stuck still acknowledges, one that is cut off does not. Once its window is full the
        # kernel only asks now and then whether there is room again, after up to two minutes. While that is answered,
        # the peer is there.
        probes, backoff = info[3], info[4]
        (unacknowledged,) = struct.unpack_from("I", info, 24)
        (last_ack_received,) = struct.unpack_from("I", info, 56)
        if backoff and not unacknowledged and probes < 2:  # one may be under way
            return 0.0
        return min(silence, float(last_ack_received) / 1000)

    def unsent(self) -> int:
        """Bytes that the kernel has not sent, or the peer's has not acknowledged (SIOCOUTQ, see tcp(7))."""
        try:
            return int.from_bytes(fcntl.ioctl(self.socket.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        except (OSError, ValueError):  # closed
            return 0

    def stuck_for(self) -> float:
        """Seconds since the peer last sent something, or took something other than a ping."""
        if self._sent != self.progress[0]:
            self.progress = (self._sent, time.monotonic())
        return time.monotonic() - max(self.progress[1], self.last_received)

    def _write(self) -> None:
        """The writer: sends, waiting as long as the peer makes it wait, until the connection ends."""
        try:
            while (taken := self.outbox.take()) is not None:
                buffers, batch = taken
                for item in batch:
                    if item == b"":
                        self._send(buffers)
                        buffers = []
                        self.socket.shutdown(socket.SHUT_WR)
                    else:
                        buffers += self._to_buffers(item)
                self._send(buffers)
        except (OSError, MemoryError) as exc:
            self._fail(exc)

    def _to_buffers(self, item: bytes | _Turn) -> list[BytesLike]:
        return item.frame(self.masked) if isinstance(item, _Turn) else [item]

    def _send(self, buffers: list[BytesLike]) -> None:
        while buffers:
            count = self.socket.sendmsg(buffers[:IOV_MAX])
            if count > CONTROL_SIZE:
                self._sent += count
            _drop(buffers, count)

    def _send_now(self, batch: list[bytes | _Turn]) -> list[BytesLike]:
        """Send without waiting, in whichever thread; returns what is left."""
        buffers: list[BytesLike] = []
        try:
            for item in batch:
                buffers += self._to_buffers(item)
            count = self.socket.sendmsg(buffers[:IOV_MAX], (), socket.MSG_DONTWAIT)
            if count > CONTROL_SIZE:
                self._sent += count
            _drop(buffers, count)
        except BlockingIOError:
            pass
        except (OSError, MemoryError) as exc:
            self._fail(exc)
            return []
        return buffers

    def _fail(self, exc: OSError | MemoryError) -> None:
        level = logging.ERROR if isinstance(exc, MemoryError) else logging.DEBUG
        log.log(level, "connection lost while sending: %s", explain_want(exc), extra={"peer": self.who.name})
        # The receiver sees the end of the stream and closes everything.
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.outbox.end()


class DialledWebSocket(QueuedConnection, ClientConnection):
    """A connection that this side dialled."""

    masked = True

    def handshake(self, *args: Any, **kwargs: Any) -> None:
        """As the library's. In TLS 1.3 a server refuses a certificate only after the client's part of the TLS
        handshake: for the library the answer ends early, here it is the SSLError that says why.
        """
        try:
            super().handshake(*args, **kwargs)
        except Exception as exc:
            stream: object = self.socket
            if isinstance(stream, TLSStream) and stream.error is not None:
                raise stream.error from exc
            raise

    def send_data(self) -> None:
        super().send_data()
        if self.protocol.handshake_exc is not None:  # an answer that is none may have no end: it is not waited for
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)


def _drop(buffers: list[BytesLike], count: int) -> None:
    """Drop the first ``count`` bytes of a list of buffers."""
    done = 0
    while done < len(buffers) and count >= len(buffers[done]):
        count -= len(buffers[done])
        done += 1
    del buffers[:done]
    if count:
        buffers[0] = memoryview(buffers[0])[count:]


class Heartbeat:
    """One thread that pings every connection and closes those whose peer is gone.

    A missing pong is not enough: a version 1 client that is blocked on its own
    slow reader answers none. Gone is who does not even acknowledge at the TCP
    level. A backend, which reverse mode dials, never blocks on its readers:
    there, gone is also who neither sends nor takes anything. Time in which this
    process itself was stopped, or its machine slept, is no silence of a peer's.
    """

    def __init__(self, interval: float, timeout: float, strict: bool = False) -> None:
        self._interval = min(interval, timeout / 3)  # silence counts only after unanswered pings
        self._timeout = timeout
        self._strict = strict
        self._lock = threading.Lock()  # guards the attributes below
        self._connections: dict[QueuedConnection, float] = {}  # and when each is pinged next
        self._started = False
        # The thread's alone: since when, on the monotonic clock, it has run without being held up. Silence before that
        # may have been the silence of who was stopped himself.
        self._awake_since = 0.0

    def add(self, connection: QueuedConnection) -> None:
        """Watch a connection until remove(); starts the thread if start() has not."""
        self.start()
        with self._lock:
            self._connections[connection] = time.monotonic() + self._interval

    def start(self) -> None:
        """Start the thread, so that add() does not have to.

        Raises:
            RuntimeError: if the system refuses it.
        """
        with self._lock:
            if not self._started:
                threading.Thread(target=self._run, name="heartbeat", daemon=True).start()
                self._started = True

    def remove(self, connection: QueuedConnection) -> None:
        with self._lock:
            self._connections.pop(connection, None)

    def _run(self) -> None:
        before = time.monotonic()
        while True:
            time.sleep(self._interval / 4)
            now = time.monotonic()
            if now - before > self._interval:
                self._awake_since = now
            before = now
            try:
                due = self._due()
            except MemoryError:  # their turn comes again
                continue
            for connection in due:
                try:
                    self._check(connection)
                except Exception:
                    log.exception("heartbeat: unexpected error")

    def _due(self) -> list[QueuedConnection]:
        """Whose turn it is."""
        now = time.monotonic()
        with self._lock:
            due = [connection for connection, when in self._connections.items() if when <= now]
            self._connections.update(dict.fromkeys(due, now + self._interval))
        return due

    def _check(self, connection: QueuedConnection) -> None:
        silence = connection.stuck_for() if self._strict else connection.silence()
        silence = min(silence, time.monotonic() - self._awake_since)
        if silence > self._timeout:
            log.warning("connection closed: nothing was heard of the peer for %.0f seconds", silence,
                        extra={"peer": connection.who.name})  # fmt: skip
            connection.close_socket()
        else:
            connection.send_ping()


class LimitError(AgentError):
    """One session more than the limits allow."""


class ClaimError(AgentError):
    """A session cannot be resumed."""

    def __init__(self, message: str, reason: Reason) -> None:
        super().__init__(message)
        self.reason = reason


class SessionExists(AgentError):
    """What is to be started has been: the request is sent again because its answer was lost."""


def _add(one: tuple[int, int, int], other: tuple[int, int, int]) -> tuple[int, int, int]:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


class SessionRegistry:
    """Who is connected, what runs, and how many sessions there are in all."""

    def __init__(
        self,
        limit: int,
        main: MainProcess | None = None,
        describe_health: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        """``describe_health`` gives the health check's state."""
        self.limit = limit
        self.detached = DetachedCommands()
        self._main = main
        self._describe_health = describe_health
        self.instance = secrets.token_hex(8)  # tells clients in the handshake which agent has their sessions
        # Held from the search for a secret to its entry, see start().
        self._starting = threading.Lock()
        self._lock = threading.Lock()  # guards the attributes below
        self._count = 0
        self._peers: set[Peer] = set()
        self._moved = (0, 0, 0)  # bytes of each Stream over all connections that have ended
        self._expired = False
        self._refusal = ""
        self._resumable: dict[str, FlowSession] = {}  # by secret
        self._over: dict[str, None] = {}  # secrets of the latest that have ended, oldest first
        self._parked: dict[FlowSession, float] = {}  # without a connection, and when that is to end
        self._parking = threading.Condition(self._lock)  # the thread that ends them waits here
        self._closed = False

    @property
    def refusal(self) -> str:
        """Why nothing is started any more; empty while something is."""
        return self._refusal

    def close(self) -> None:
        """The agent ends: start nothing any more, and keep nothing for later."""
        with self._lock:
            self._closed = True
            self._refusal = self._refusal or "the agent is ending: nothing is started any more"

    def expire(self) -> None:
        """Tell every client, once, that the platform is about to end this agent."""
        with self._lock:
            if self._expired:
                return
            self._expired = True
            self._refusal = "the agent's lifetime has expired: nothing is started any more"
            peers = list(self._peers)
        log.warning("lifetime expired: %d clients are told, nothing is started any more", len(peers))
        for peer in peers:
            peer.send(LifetimeExpired())

    def add(self, peer: Peer) -> None:
        with self._lock:
            self._peers.add(peer)
            expired = self._expired
        if expired:
            peer.send(LifetimeExpired())

    def remove(self, peer: Peer) -> None:
        with self._lock:
            self._peers.discard(peer)
            self._moved = _add(self._moved, peer.moved())

    def moved(self) -> tuple[int, int, int]:
        """Bytes of each Stream that sessions were sent, and have sent, over all connections so far."""
        with self._lock:  # so that a connection that ends is counted once
            return functools.reduce(_add, (peer.moved() for peer in self._peers), self._moved)

    def queues(self) -> tuple[list[int], list[int], list[int]]:
        """Bytes that wait: for each connection to be sent, for each command to read, for each client to acknowledge."""
        with self._lock:
            peers, sessions = list(self._peers), [*self._resumable.values()]
        running = {*sessions, *(session for peer in peers for session in peer.sessions())}
        logged: list[LoggedProcess] = [self._main] if self._main is not None else []
        inputs = [session.queued() for session in running if isinstance(session, ExecSession)]
        inputs += [process.input.queued() for process in (*logged, *self.detached.all())]
        return (
            [peer.waiting() for peer in peers],
            inputs,
            [session.tie.flow.unacknowledged() for session in sessions],
        )

    def parked(self) -> int:
        """How many sessions have no connection."""
        with self._lock:
            return len(self._parked)

    def peers(self) -> list[Peer]:
        with self._lock:
            return list(self._peers)

    def start(self, secret: str, peer: Peer, make: Callable[[], FlowSession]) -> FlowSession:
        """Make a version 2 session for a connection: whoever has its secret may resume it from now on.

        Raises:
            SessionExists: if one with this secret runs, or has ended: no request starts two.
        """
        with self._starting:
            with self._lock:
                if secret in self._resumable or secret in self._over:
                    raise SessionExists
            session = make()
            with self._lock:
                self._resumable[session.tie.secret] = session
                peer.adopt(cast(Session, session))
            return session

    def describe_sessions(self) -> tuple[dict[str, Any], ...]:
        """What runs: the main process first, then detached commands, then the sessions of version 2.

        Each has ``id`` ("" for the main process), ``kind`` (main, detached, exec,
        attach, archive), ``pid``, ``cmd``, ``tty``, ``user`` (as it was asked for),
        ``started_at`` (Unix time) and ``connected``, once ended ``code``; what has
        a replay log ``ended_at``, too.
        """
        logged: list[MainProcess | DetachedCommand] = [self._main] if self._main is not None else []
        logged += self.detached.all()
        with self._lock:
            found = [(session, session not in self._parked) for session in self._resumable.values()]
        listed = [{**process.describe(), "connected": False} for process in logged]
        return tuple(listed + [{**session.describe(), "connected": connected} for session, connected in found])

    def describe_statistics(self, processes: bool) -> dict[str, Any]:
        """What measure() says, the tree of each that describe_sessions() lists with ``id`` and ``kind``.

        Raises:
            StatisticsError: if psutil is not installed.
        """
        with self._lock:
            sessions = list(self._resumable.values())
        logged: list[MainProcess | DetachedCommand] = [self._main] if self._main is not None else []
        listed = [(source.describe(), source.child) for source in (*logged, *self.detached.all(), *sessions)]
        children = {str(number): child for number, (_, child) in enumerate(listed) if child is not None}
        result = measure(children, processes)
        trees = result.pop("trees")
        result["sessions"] = [
            {name: listed[int(number)][0][name] for name in ("id", "kind", "pid", "cmd")} | tree
            for number, tree in trees.items()
        ]
        return result

    def describe_health(self) -> dict[str, Any]:
        """What ``GET /health`` answers."""
        state: dict[str, Any] = {"status": "ok"}
        if self._main is not None:
            code = self._main.code
            state |= {"pid": self._main.pid, "exited": code is not None}
            if code is not None:
                state["exitCode"] = code
        if self._describe_health is not None:
            state["health"] = self._describe_health()
        return state

    def health_message(self, call_id: str = "") -> Health:
        state = self.describe_health()
        check = state.get("health", {})
        last = check["log"][-1]["Output"] if check.get("log") else ""
        return Health(check.get("status", ""), last, state, call_id)

    def push_health(self) -> None:
        """The health has changed: tell all clients of version 2."""
        message = self.health_message()
        for peer in self.peers():
            if peer.version == 2:
                peer.push_health(message)

    def start_parking(self, end: Callable[[Sequence[Child]], None]) -> None:
        """Start the thread that ends sessions nobody has resumed, before there is one: then a cut can fail at nothing.

        Args:
            end: ends what children have started, and does not wait for that.

        Raises:
            RuntimeError: if the system refuses the thread.
        """
        threading.Thread(target=self._end_parked, args=(end,), name="parking", daemon=True).start()

    def park(self, session: FlowSession, peer: Peer, window: float) -> bool:
        """``peer`` has left a session: keep it for ``window`` seconds, unless another connection has it already.

        Returns:
            False if its client is done with it, or the agent ends: it is ``peer``'s still, who is to release() it.
        """
        with self._lock:
            if not self._has(peer, session):
                return True
            if session.tie.ending or self._closed:
                return False
            self._park(session, window)
        session.record.park(window)
        return True

    def release(self, session: FlowSession, peer: Peer) -> bool:
        """``peer`` has left a session for good: nobody resumes it. False if another connection has it already."""
        with self._lock:
            if not self._has(peer, session):
                return False
            del self._resumable[session.tie.secret]
            self._remember(session.tie.secret)
            self._count -= 1
            peer.drop(cast(Session, session))
            return True

    def _has(self, peer: Peer, session: FlowSession) -> bool:
        """Whether a session is this connection's. Holds the lock."""
        return session.host is peer and session.tie.secret in self._resumable

    def _park(self, session: FlowSession, window: float) -> None:
        """Holds the lock."""
        session.host = self
        session.tie.flow.disconnect(session.channel)
        self._parked[session] = time.monotonic() + window
        self._parking.notify()

    def claim(self, request: Resume, peer: Peer) -> bool:
        """Give a session to another connection; False if there is none with this secret, and was none of late.

        Raises:
            ClaimError: if it is over, or the request makes no sense.
        """
        with self._lock:
            session = self._resumable.get(request.secret)
        if session is None:
            if request.secret in self._over:
                raise ClaimError("no session to resume: it has ended, or its time is over", Reason.UNKNOWN_SESSION)
            return False
        tie = session.tie
        with tie.lock:
            if request.connection and request.connection <= tie.connection:
                raise ClaimError("a later connection has the session", Reason.DUPLICATE_SESSION)
            try:
                tie.flow.check(request.offset, request.acked)
            except ValueError as exc:
                raise ClaimError(f"resume: {exc}", Reason.BAD_REQUEST) from None
            channel = peer.open_channel(request.id)
            with self._lock:
                if session.id != request.id or request.secret not in self._resumable:
                    raise ClaimError("no session to resume: its id is wrong, or its time is over",
                                     Reason.UNKNOWN_SESSION)  # fmt: skip
                session.host.drop(cast(Session, session))  # its connection may not be known to be dead yet
                peer.adopt(cast(Session, session))
                session.host, session.channel = peer, channel
                self._parked.pop(session, None)
            tie.connection = request.connection
            message = Resumed(request.id, request.offset, tie.received, tie.closed, tie.heard)
            tie.flow.resume(channel, message, request.acked, _window_of(request))
            tie.flow.send(Ack(request.id, session.consumed(), tie.heard))  # the client may have missed that
            session.record.resume(peer.who)
        return True

    def end(self, request: End) -> None:
        """End a session by its secret, whichever connection has it."""
        with self._lock:
            session = self._resumable.get(request.secret)
        if session is not None and session.id == request.id:
            session.record.because(Cause.CLIENT)
            session.end()

    # What a parked session uses: SessionHost.

    def open_channel(self, session_id: str) -> Channel:
        raise AssertionError("a parked session has no connection")

    def open_record(self, request: Opening) -> Record:
        raise AssertionError("a parked session has no connection")

    def send(self, message: Event) -> None:
        """Nobody is there: what is worth keeping, its flow keeps."""

    def drop(self, session: Session) -> bool:
        """No connection has it: there is nothing to drop it from."""
        return True

    def settle(self, session: Session) -> None:
        self.forget(session)

    def forget(self, session: Session) -> None:
        """A version 2 session is over, whichever connection has it."""
        with self._lock:
            flow_session = cast(FlowSession, session)
            tie = flow_session.tie
            if self._resumable.pop(tie.secret, None) is None:
                return
            self._parked.pop(flow_session, None)
            flow_session.host.drop(session)
            self._count -= 1
            if tie.flow.begun:
                self._remember(tie.secret)

    def _remember(self, secret: str) -> None:
        """A request that started this session and comes late is not to start it again. Holds the lock."""
        self._over[secret] = None
        if len(self._over) > REMEMBERED_IDS:
            del self._over[next(iter(self._over))]

    def _end_parked(self, end: Callable[[Sequence[Child]], None]) -> None:
        while True:
            with self._lock:
                now = time.monotonic()
                over = [session for session, until in self._parked.items() if until <= now]
                if not over:
                    self._parking.wait(min(self._parked.values(), default=math.inf) - now if self._parked else None)
                    continue
                for session in over:
                    del self._parked[session]
                    del self._resumable[session.tie.secret]
                    self._remember(session.tie.secret)
                self._count -= len(over)
            for session in over:
                try:
                    if not session.tie.flow.finished:
                        session.record.expire()
                    child = session.leave()
                    if child is not None:
                        end([child])
                except Exception:  # one session's: the others are to be ended, too
                    log.exception("cannot end a parked session", extra=session.record.extra)

    def abandon_parked(self) -> None:
        """Leave every session that has no connection, for the agent's end."""
        with self._lock:
            sessions = list(self._parked)
        for session in sessions:
            session.leave()

    def take_place(self) -> None:
        """Count one more session.

        Raises:
            LimitError: if that is one too many.
        """
        with self._lock:
            if self._count >= self.limit:
                raise LimitError(f"too many sessions: the agent's limit is {self.limit}")
            self._count += 1

    def give_place(self) -> None:
        with self._lock:
            self._count -= 1

    def detached_ended(self, secret: str) -> None:
        """A detached command is over."""
        with self._lock:
            self._count -= 1
            if secret:
                self._remember(secret)


def describe_request(request: Request) -> str:
    """A message for the log: what it is, and of what it holds only what is no secret."""
    facts: dict[str, object] = {}
    if isinstance(request, Exec):
        facts = {"command": request.cmd[0][:200], "arguments": len(request.cmd) - 1, "variables": len(request.env)}
        facts |= {"tty": request.tty, "detach": request.detach}
    elif isinstance(request, Stdin):
        facts = {"bytes": len(request.data)}
    else:
        shown = ("signal", "width", "height", "offset", "path", "session", "processes")
        facts = {name: getattr(request, name) for name in shown if getattr(request, name, None) not in (None, "")}
    name = re.sub("(?<!^)(?=[A-Z])", "_", type(request).__name__).lower()
    return ", ".join([name, *(f"{fact} {value!r}" for fact, value in facts.items())])


class Forbidden(AgentError):
    """What --allow-cmd, --no-exec or --read-only forbid."""

    def __init__(self, message: str, reason: Reason = Reason.FORBIDDEN) -> None:
        super().__init__(message)
        self.reason = reason


class Policy:
    """What clients may do, beside being let in. The one place that knows; see docs/security.md for what it is worth."""

    def __init__(self, config: Config) -> None:
        self._programs = {os.path.basename(program): program for program in config.allow_cmd}
        self._no_exec = config.no_exec
        self._read_only = config.read_only

    def check_opening(self, request: Opening) -> Opening:
        """The request as it may be done.

        Raises:
            Forbidden: if it may not.
        """
        if isinstance(request, Attach):
            return request
        if self._no_exec:
            raise Forbidden("the agent runs with --no-exec: clients may only attach")
        if self._read_only and not isinstance(request, ArchiveGet):
            raise Forbidden("the agent runs with --read-only: clients may only look")
        if not self._programs or isinstance(request, ArchiveGet):
            return request
        if isinstance(request, ArchivePut):  # a file can be a program, or what one loads
            raise Forbidden("the agent runs with --allow-cmd: no files may be put")
        if request.env or request.user:  # PATH, LD_PRELOAD and many another variable decide on what is run
            raise Forbidden("the agent runs with --allow-cmd: no variables and no user may be set")
        name = request.cmd[0]
        program = self._programs.get(os.path.basename(name), "")
        if not program or name not in (program, os.path.basename(program)):
            raise Forbidden(f"the agent runs with --allow-cmd, and that does not name {name[:200]!r}")
        return dataclasses.replace(request, cmd=(program, *request.cmd[1:]))

    def check(self, request: ToSession | Call) -> None:
        """Check what is sent to a session, or asked.

        Raises:
            Forbidden: if it may not be.
        """
        if self._read_only and isinstance(request, Stdin | Signal):
            raise Forbidden("the agent runs with --read-only: no stdin and no signals", Reason.READ_ONLY)
        if self._no_exec and isinstance(request, ArchiveStat):
            raise Forbidden("the agent runs with --no-exec: no questions about files")

    @property
    def takes_input(self) -> bool:
        """Whether anything that clients send may change what a process sees."""
        return not self._read_only


class Peer:
    """One connected client: decodes and dispatches what it sends, owns its sessions.

    Session ids belong to the connection: no client can see or feed another's.
    """

    def __init__(
        self,
        runtime: Runtime,
        connection: QueuedConnection,
        registry: SessionRegistry,
        main: MainProcess | None,
    ) -> None:
        self.who = connection.who
        self._extra = {"peer": self.who.name}  # for the log
        self._policy = Policy(runtime.config)
        self._debugging = log.isEnabledFor(logging.DEBUG)
        self.version = 2 if connection.subprotocol == SUBPROTOCOL else 1
        self._runtime = runtime
        self._connection = connection
        self._registry = registry
        self._main = main
        self._lock = threading.Lock()  # guards the attributes below
        self._sessions: dict[str, Session] = {}
        self._ended_ids: dict[str, None] = {}  # the latest, oldest first
        self._calls: collections.deque[GetStats | ArchiveStat] = collections.deque()  # the first is being answered
        self.started = 0  # sessions so far; this and _received are of the thread that dispatches
        self._received = 0  # bytes of stdin
        runtime.books.counters.count(CONNECTIONS_OPENED, str(self.version))
        self._health = Channel(connection.outbox, "health")  # changes of it; used by the checking thread alone
        registry.add(self)

    def serve(self) -> None:
        """Handle the connection's messages until it ends; then end what it started, and leave the registry."""
        log.info("connected", extra=self._extra)
        how, why = "closed", "closed by the peer"
        try:
            self._connection.serve_messages(self._receive)
        except ConnectionClosed as exc:
            how = "lost"
            why = f"lost: {exc}" if exc.__cause__ is None else f"lost: {exc} ({exc.__cause__})"
        finally:
            with self._lock:
                sessions = list(self._sessions.values())
            try:
                self._leave(sessions)
            finally:
                self._runtime.books.counters.count(CONNECTIONS_CLOSED, how)
                self._registry.remove(self)  # only now: the agent's end looks here first, then at the endings
                log.info("connection %s; %d sessions were running", why, len(sessions), extra=self._extra)

    def close(self, code: int, reason: str) -> None:
        """Say goodbye: waits CLOSE_TIMEOUT at most for the peer to answer."""
        self._connection.close(code, reason)

    def taken(self) -> int | None:
        """How many bytes the peer has taken so far; None once there is nothing left for it to take."""
        with self._lock:
            attached = any(isinstance(session, AttachSession) for session in self._sessions.values())
        flushed = self._connection.outbox.flush(0)
        unsent = self._connection.unsent()
        if flushed is None or (flushed and not unsent and not attached):
            return None
        return self._connection._sent - unsent

    def sessions(self) -> list[Session]:
        with self._lock:
            return list(self._sessions.values())

    def moved(self) -> tuple[int, int, int]:
        """Bytes of each Stream so far."""
        sent = self._connection.outbox.sent
        return self._received, sent[Stream.STDOUT], sent[Stream.STDERR]

    def waiting(self) -> int:
        """Bytes that wait to be sent."""
        return self._connection.outbox.waiting()

    def linger(self, timeout: float) -> None:
        """Give the peer time to read: a deployed Go backend loses an exit that a close follows at once."""
        with self._lock:
            had_sessions = bool(self._ended_ids or self._sessions)
        if had_sessions:
            self._connection.recv_events_thread.join(timeout)  # ends early if the peer closes

    # What sessions use: SessionHost.

    def open_channel(self, session_id: str) -> Channel:
        return Channel(self._connection.outbox, session_id, binary=self.version == 2)

    def open_record(self, request: Opening) -> Record:
        return Record(self._runtime.books, self.who, request)

    def forget(self, session: Session) -> None:
        if self.version == 2:
            self._registry.forget(session)
        elif self.drop(session):
            self._registry.give_place()

    def settle(self, session: Session) -> None:
        """The client is here: it says itself when it has the exit."""

    def adopt(self, session: Session) -> None:
        """The session is this connection's from now on."""
        with self._lock:
            self._sessions[session.id] = session

    def drop(self, session: Session) -> bool:
        with self._lock:
            if self._sessions.get(session.id) is not session:
                return False
            del self._sessions[session.id]
            self._remember(session.id)
            return True

    def _remember(self, session_id: str) -> None:
        """Late messages for this id are to be expected. Holds the lock."""
        self._ended_ids[session_id] = None
        if len(self._ended_ids) > REMEMBERED_IDS:
            del self._ended_ids[next(iter(self._ended_ids))]

    def send(self, message: Event) -> None:
        self._connection.outbox.send(message)

    def push_health(self, message: Health) -> None:
        """Send it in place of one that waits: who does not read has the last word alone to come."""
        self._health.discard()
        self._health.send(message)

    # What the peer asks for.

    def _receive(self, message: str | bytes) -> None:
        if not isinstance(message, str):
            self._receive_data(message)
            return
        try:
            request = decode_request(message, self.version)
        except MessageError as exc:
            with self._lock:  # what an id in use names goes on
                reason = Reason.BAD_MESSAGE if exc.id in self._sessions else exc.reason
            self._refuse(exc.id, str(exc), reason)
            return
        if self._debugging and not isinstance(request, Ack):
            log.debug("request: %s", describe_request(request), extra={**self._extra, "session": request.id})
        if isinstance(request, Exec | Attach | ArchiveGet | ArchivePut):
            self._open_if_allowed(request)
        elif isinstance(request, Call):
            try:
                self._policy.check(request)
            except Forbidden as exc:
                self._runtime.books.tell(
                    "refused",
                    self.who,
                    kind="stat",
                    path=cast(ArchiveStat, request).path,
                    reason=exc.reason,
                    error=str(exc),
                )
                self._refuse(request.id, str(exc), exc.reason)
                return
            self._answer(request)
        elif isinstance(request, Resume):
            self._resume(request)
        else:
            with self._lock:
                session = self._sessions.get(request.id)
                ended = request.id in self._ended_ids
            if isinstance(request, End) and request.secret and session is not None:
                # Of an earlier session of this id, if the secret is another one.
                session = session if cast(FlowSession, session).tie.secret == request.secret else None
            if isinstance(request, Park):
                if session is not None:
                    self._park(session)
            elif session is not None:
                self._pass_on(request, session)
            elif isinstance(request, End) and request.secret:
                self._registry.end(request)
            elif not ended:  # what is late for an ended session is harmless
                self._refuse(request.id, f"no session has the id {request.id[:80]!r}", Reason.UNKNOWN_SESSION)

    def _open_if_allowed(self, request: Opening) -> None:
        try:
            allowed = self._policy.check_opening(request)
        except Forbidden as exc:
            with self._lock:
                if request.id not in self._sessions:
                    self._remember(request.id)  # stdin may be behind it
            self._refuse_opening(request, str(exc), exc.reason)
            return
        if not self._go_on(allowed):
            self._start(allowed)

    def _receive_data(self, message: bytes) -> None:
        if self.version == 1:
            self._refuse("", "binary messages need protocol version 2", Reason.BAD_MESSAGE)
            return
        try:
            stream, session_id, data = decode_data_frame(message)
        except MessageError as exc:
            self._refuse("", str(exc), Reason.BAD_MESSAGE)
            return
        if stream is not Stream.STDIN:
            self._refuse(session_id, "data frame: only stdin goes to an agent", Reason.BAD_MESSAGE)
            return
        if self._debugging:
            log.debug("request: stdin, %d bytes", len(data), extra={**self._extra, "session": session_id})
        with self._lock:
            session = self._sessions.get(session_id)
            ended = session_id in self._ended_ids
        if session is not None and not self._policy.takes_input:
            self._pass_on(Stdin(session_id, b""), session)  # which refuses it
        elif session is not None:
            self._received += len(data)
            tie = cast(FlowSession, session).tie
            with tie.lock:
                if cast(FlowSession, session).host is self:
                    session.write(data)
        elif not ended:
            self._refuse(session_id, f"no session has the id {session_id[:80]!r}", Reason.UNKNOWN_SESSION)

    def _answer(self, call: Call) -> None:
        """Answer at once, or where that takes system calls without end, in a pool thread: one at a time."""
        if isinstance(call, ListSessions | GetHealth):
            if isinstance(call, ListSessions):
                self.send(Sessions(self._registry.describe_sessions(), call.id))
            else:
                self.send(self._registry.health_message(call.id))
            self._connection.outbox.wait_for_calm(BACKLOG_LIMIT)  # as in _refuse()
            return
        with self._lock:
            start = not self._calls
            full = len(self._calls) >= CALLS_LIMIT
            if not full:
                self._calls.append(call)
        if full:
            self._refuse(call.id, f"more than {CALLS_LIMIT} questions are waiting for their answers", Reason.LIMIT)
        elif start:
            try:
                self._runtime.pool.submit(self._answer_calls)
            except RuntimeError as exc:
                with self._lock:
                    self._calls.clear()
                self._refuse(call.id, f"cannot answer: {exc}", Reason.LIMIT)

    def _answer_calls(self) -> None:
        while True:
            with self._lock:
                call = self._calls[0]
            try:
                self.send(self._look_up(call))
            except StatisticsError as exc:
                self._send_error(Error(call.id, str(exc), Reason.UNAVAILABLE))
            except ArchiveError as exc:
                self._send_error(Error(call.id, str(exc), exc.reason))
            except Exception as exc:
                log.exception("cannot answer", extra=self._extra)
                self._send_error(Error(call.id, f"unexpected error: {exc}", Reason.UNAVAILABLE))
            self._connection.outbox.wait_for_calm(BACKLOG_LIMIT)  # meanwhile no more than CALLS_LIMIT are taken
            with self._lock:
                self._calls.popleft()
                if not self._calls:
                    return

    def _look_up(self, call: GetStats | ArchiveStat) -> Answer:
        if isinstance(call, GetStats):
            return Stats(self._registry.describe_statistics(call.processes), call.id)
        return PathStat(call.id, stat_path(call.path))

    def _park(self, session: Session) -> None:
        """Whoever had the session, behind the listener that this peer is, has left it."""
        if isinstance(session, DetachingSession):
            return  # it lives on by itself
        self._leave([session])
        self.drop(session)

    def _resume(self, request: Resume) -> None:
        if not self._claim(request):
            self._refuse_opening(request, "no session to resume: its id or secret is wrong, or its time is over",
                         Reason.UNKNOWN_SESSION)  # fmt: skip

    def _go_on(self, request: Opening) -> bool:
        """Resume what an earlier connection started with the same request; False if none did."""
        if not request.secret:
            return False
        if isinstance(request, Exec) and request.detach:
            command = self._registry.detached.find_same(request)
            if command is not None:
                command.call_when_started(self.send)
                return True
        resume = Resume(request.id, request.secret, 0, request.window, connection=request.connection)
        return self._claim(resume)

    def _claim(self, request: Resume) -> bool:
        """Resume a session, or say why that cannot be; False if it is not known."""
        with self._lock:
            taken = request.id in self._sessions
        if taken:
            self._refuse_opening(request, "the session is this connection's already", Reason.DUPLICATE_SESSION)
            return True
        try:
            if not self._registry.claim(request, self):
                return False
        except ClaimError as exc:
            self._refuse_opening(request, str(exc), exc.reason)
            return True
        self.started += 1
        return True

    def _refuse(self, session_id: str, message: str, reason: Reason) -> None:
        log.info("refused: %s", message, extra={**self._extra, "session": session_id})
        self._send_error(Error(session_id, message, reason))
        # Only for a peer that floods us with nonsense and does not read the answers.
        self._connection.outbox.wait_for_calm(BACKLOG_LIMIT)

    def _refuse_opening(self, request: Opening | Resume, message: str, reason: Reason) -> None:
        facts = describe_opening(request) if not isinstance(request, Resume) else {"kind": "resume"}
        self._runtime.books.tell("refused", self.who, session=request.id, **facts, reason=reason, error=message)
        self._refuse(request.id, message, reason)

    def _send_error(self, error: Error) -> None:
        self._runtime.books.counters.count(ERRORS, error.reason)
        self.send(error)

    def _pass_on(self, request: ToSession, session: Session) -> None:
        """Forward a message to a session, and say what is wrong with it."""
        try:
            self._policy.check(request)
        except Forbidden as exc:
            session.record.forbid(request, exc.reason, str(exc), self.who)
            self._refuse(request.id, str(exc), exc.reason)
            return
        if isinstance(request, CloseStdin | Resize) and not self._policy.takes_input:
            return  # every client sends them, without being asked to
        fault = self._forward(request, session) if self.version == 1 else self._forward_once(request, session)
        if fault:
            self._refuse(request.id, fault, Reason.BAD_MESSAGE)
        elif isinstance(request, Stdin):
            self._connection.outbox.wait_for_calm(BACKLOG_LIMIT)  # if it was refused, as in _refuse()

    def _forward_once(self, request: ToSession, session: Session) -> str:
        """Forward what was not forwarded before, unless another connection has the session by now."""
        flow_session = cast(FlowSession, session)
        tie = flow_session.tie
        number = request.number if isinstance(request, Signal | Resize | End) else 0
        with tie.lock:
            if flow_session.host is not self or not tie.is_news(number):
                return ""
            if number % HEARD_STEP == 1:
                self.send(Ack(session.id, flow_session.consumed(), tie.heard))
            return self._forward(request, session)

    def _forward(self, request: ToSession, session: Session) -> str:
        """Do to a session what its client asks for; returns what is wrong with that, "" for nothing."""
        if isinstance(request, Stdin):
            self._received += len(request.data)
            session.write(request.data)
        elif isinstance(request, End):
            session.record.because(Cause.CLIENT)
            session.end()
        elif isinstance(request, Ack):
            try:
                cast(FlowSession, session).tie.flow.acknowledge(request.offset)
            except ValueError as exc:
                return f"ack: {exc}"
        elif isinstance(request, CloseStdin):
            session.end_input()
        elif isinstance(request, Resize):
            session.resize(request.width, request.height)
        else:
            try:
                number = parse_signal(request.signal)
                session.send_signal(number)
                session.record.signal(number, self.who)
            except ValueError as exc:
                return f"signal: {exc}"
            except PermissionError:
                return "signal: the process belongs to another user"
        return ""

    def _start(self, request: Opening) -> None:
        with self._lock:
            taken = request.id in self._sessions
            count = len(self._sessions)
            if not taken:
                self._remember(request.id)  # stdin may be behind a request that is refused
        limit = self._runtime.config.max_sessions
        if taken:
            self._refuse_opening(request, f"session id {request.id[:80]!r} is in use", Reason.DUPLICATE_SESSION)
        elif refusal := self._registry.refusal:
            self._refuse_opening(request, refusal, Reason.LIFETIME_EXPIRED)
        elif isinstance(request, Attach) and not request.session and self._main is None:
            self._refuse_opening(request, "there is no main process to attach to", Reason.NO_MAIN_PROCESS)
        elif isinstance(request, Attach) and request.session and self._registry.detached.find(request.session) is None:
            text = f"no detached command has the id {request.session[:80]!r}"
            self._refuse_opening(request, text, Reason.NO_DETACHED_COMMAND)
        elif count >= limit:
            self._refuse_opening(request, f"too many sessions: the connection's limit is {limit}", Reason.LIMIT)
        else:
            self._take_place_and_open(request)

    def _take_place_and_open(self, request: Opening) -> None:
        try:
            self._registry.take_place()
        except LimitError as exc:
            self._refuse_opening(request, str(exc), Reason.LIMIT)
            return
        try:
            self._open(request)
        except LookupError as exc:
            self._registry.give_place()
            if not self._go_on(request):
                self._refuse_opening(request, str(exc), Reason.ID_TAKEN)
        except SessionExists:  # by now: the same request was under way on an earlier connection
            self._registry.give_place()
            self._go_on(request)
        except (OSError, RuntimeError, ValueError, MemoryError) as exc:  # no descriptor, thread or memory left
            self._registry.give_place()
            self._refuse_opening(request, f"cannot start a session: {explain_want(exc)}", Reason.START_FAILED)

    def _open(self, request: Opening) -> None:
        """Raises OSError or RuntimeError if the system refuses a descriptor or thread, LookupError for a taken id,
        ValueError for one that no data frame can hold."""
        (thread,) = self._runtime.pool.reserve(1)
        try:
            run = self._begin(request)
        except Exception:
            self._runtime.pool.release([thread])
            raise
        self.started += 1
        thread.run(run)

    def _begin(self, request: Opening) -> Callable[[], None]:
        """Make a session that is this connection's; returns what its thread is to do."""
        if self.version == 1 or (isinstance(request, Exec) and request.detach):
            session = self._make_session(request)
            self.adopt(session)
            return session.run
        return self._registry.start(request.secret, self, lambda: cast(FlowSession, self._make_session(request))).run

    def _make_session(self, request: Opening) -> ExecSession | AttachSession | DetachingSession | ArchiveSession:
        if isinstance(request, ArchiveGet | ArchivePut):
            return ArchiveSession(self._runtime, self, request)
        if isinstance(request, Attach):
            target: LoggedProcess | None = self._main
            if request.session:
                target = self._registry.detached.find(request.session)
            if target is None:  # it has made room for another since _start() looked
                raise OSError("it has gone")
            return (AttachSession if self.version == 1 else FlowAttachSession)(self, request, target)
        if request.detach:
            detached = self._registry.detached
            return DetachingSession(
                self._runtime, self, request, detached, lambda: self._registry.detached_ended(request.secret)
            )
        return (ExecSession if self.version == 1 else FlowExecSession)(self._runtime, self, request)

    def _leave(self, sessions: Sequence[Session]) -> None:
        """End sessions as their connection ends, or in version 2 keep them for a while.

        By now another connection may have taken one over. Whose it is the registry decides, which parks and releases
        nobody else's.
        """
        left = list(sessions)
        if self.version == 2:
            window = self._runtime.config.resume_window
            flows = [cast(FlowSession, session) for session in sessions]
            to_end = [flow for flow in flows if not (window and self._registry.park(flow, self, window))]
            left = [cast(Session, flow) for flow in to_end if self._registry.release(flow, self)]
        for session in left:
            session.record.because(Cause.CONNECTION)
        self._runtime.end_later([child for session in left if (child := session.leave()) is not None])

    def abandon(self) -> None:
        """Leave every session, for the agent's end: a command that is being started is ended as it starts."""
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            session.record.because(Cause.AGENT)
            session.leave()


# ══════════════════════════════════════════════════════════════════════════════
# 13  Metrics
#     Owns the text of /metrics. Whoever asks makes it, in the thread of its own
#     connection; it takes locks one by one, and each for a moment.
# ══════════════════════════════════════════════════════════════════════════════

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def _label(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class _Exposition:
    """Prometheus's text format (https://prometheus.io/docs/instrumenting/exposition_formats/, version 0.0.4)."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def family(self, name: str, kind: str, help_text: str, samples: Iterable[tuple[Mapping[str, str], float]]) -> None:
        """Values of one name; ``samples`` are labels and value."""
        self._lines += [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"]
        for labels, value in samples:
            self.sample(name, labels, value)

    def sample(self, name: str, labels: Mapping[str, str], value: float) -> None:
        text = ",".join(f'{label}="{_label(content)}"' for label, content in labels.items())
        self._lines.append(f"{name}{{{text}}} {value}" if text else f"{name} {value}")

    def gauge(self, name: str, help_text: str, value: float) -> None:
        self.family(METRIC_PREFIX + name, "gauge", help_text, [({}, value)])

    def text(self) -> str:
        return "".join(line + "\n" for line in self._lines)


class Metrics:
    """Makes the answer to ``GET /metrics``."""

    def __init__(self, runtime: Runtime, registry: SessionRegistry, main: MainProcess | None) -> None:
        self._runtime = runtime
        self._registry = registry
        self._main = main

    def text(self) -> str:
        out = _Exposition()
        info = {"version": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
        out.family(METRIC_PREFIX + "build_info", "gauge", "What runs here.", [(info, 1)])
        totals = self._runtime.books.counters.totals()
        self._sessions(out, totals)
        self._queues(out)
        self._spawns(out, totals)
        self._processes(out)
        self._agent(out)
        return out.text()

    def _sessions(self, out: _Exposition, totals: Totals) -> None:
        for counter in COUNTERS:
            samples = [
                ({counter.label: value} if counter.label else {}, count)
                for (counted, value), count in totals.counts.items()
                if counted is counter
            ]
            out.family(METRIC_PREFIX + counter.name, "counter", counter.help, samples)
        counts = totals.counts
        running = [({"kind": kind}, counts[SESSIONS_STARTED, kind] - counts[SESSIONS_ENDED, kind]) for kind in Kind]
        out.family(METRIC_PREFIX + "sessions", "gauge", "Sessions that run.", running)
        out.gauge("parked_sessions", "Sessions that wait to be resumed.", self._registry.parked())
        out.gauge("connections", "WebSockets that are open.", len(self._registry.peers()))
        moved = zip(STREAM_NAMES.values(), self._registry.moved(), strict=True)
        help_text = "Bytes received (stdin) and put into frames (stdout, stderr), those sent again included."
        samples = [({"stream": name}, count) for name, count in moved]
        out.family(METRIC_PREFIX + "stream_bytes_total", "counter", help_text, samples)

    def _queues(self, out: _Exposition) -> None:
        outboxes, inputs, kept = self._registry.queues()
        for name, what, depths in (
            ("send_queue", "that wait to be sent", outboxes),
            ("stdin_queue", "of stdin that wait for commands to read them", inputs),
            ("unacknowledged", "of output that are kept until clients acknowledge them", kept),
        ):
            out.gauge(f"{name}_bytes", f"Bytes {what}.", sum(depths))
            out.gauge(f"{name}_largest_bytes", f"Bytes {what}, where they are most.", max(depths, default=0))

    def _spawns(self, out: _Exposition, totals: Totals) -> None:
        name = METRIC_PREFIX + "spawn_seconds"
        out.family(name, "histogram", "How long it took to start a process.", [])
        counts = list(itertools.accumulate(totals.spawns))
        for bound, count in zip([*map(str, SPAWN_BUCKETS), "+Inf"], counts, strict=True):
            out.sample(f"{name}_bucket", {"le": bound}, count)
        out.sample(f"{name}_sum", {}, totals.spawn_seconds)
        out.sample(f"{name}_count", {}, counts[-1])

    def _processes(self, out: _Exposition) -> None:
        orphans = self._runtime.reaper.orphans
        help_text = "Processes waited for that the agent did not start."
        out.family(METRIC_PREFIX + "reaped_orphans_total", "counter", help_text, [({}, orphans)])
        if self._main is not None:
            code = self._main.code
            out.gauge("main_process_up", "Whether the main process runs.", int(code is None))
            if code is not None:
                out.gauge("main_process_exit_code", "The main process's exit code.", code)
        health = self._registry.describe_health().get("health")
        if health is not None:
            states = [({"status": status}, int(status == health["status"])) for status in HEALTH_STATES]
            out.family(METRIC_PREFIX + "health_status", "gauge", "What the health check says.", states)
            out.gauge("health_failing_streak", "Failed health checks in a row.", health["failingStreak"])

    def _agent(self, out: _Exposition) -> None:
        lost = self._runtime.books.counters.log_lines_lost()
        help_text = "Lines of the log that were dropped because stderr was not read."
        out.family(METRIC_PREFIX + "log_lines_lost_total", "counter", help_text, [({}, lost)])
        busy, parked = self._runtime.pool.threads()
        samples = [({"state": "busy"}, busy), ({"state": "parked"}, parked)]
        out.family(METRIC_PREFIX + "pool_threads", "gauge", "Threads of the pool.", samples)
        out.gauge("threads", "Threads of the agent, the pool's included.", threading.active_count())
        # The names, and what they mean, are those of every Prometheus client.
        for name, kind, help_text, value in _own_figures():
            out.family(f"process_{name}", kind, help_text, [({}, value)])


def _own_figures() -> Iterator[tuple[str, str, str, float]]:
    """This process's own use of the machine: name, kind, help and value."""
    try:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # from the third field of proc_pid_stat(5) on
        with open("/proc/uptime", "rb") as file:
            booted = time.time() - float(file.read().split()[0])
        descriptors = len(os.listdir("/proc/self/fd")) - 1  # less the one that lists them
    except OSError:
        return
    ticks = os.sysconf("SC_CLK_TCK")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield "cpu_seconds_total", "counter", "CPU time in user and system mode.", sum(map(int, fields[11:13])) / ticks
    yield "resident_memory_bytes", "gauge", "Resident memory.", int(fields[21]) * resource.getpagesize()
    yield "virtual_memory_bytes", "gauge", "Virtual memory.", int(fields[20])
    yield "start_time_seconds", "gauge", "Start, in Unix time.", round(booted + int(fields[19]) / ticks, 2)
    yield "open_fds", "gauge", "Open descriptors.", descriptors
    yield "max_fds", "gauge", "How many there may be.", limit if limit != resource.RLIM_INFINITY else math.inf


# ══════════════════════════════════════════════════════════════════════════════
# 14  Server mode
#     Owns the listening socket, authentication and the HTTP endpoints. Threads:
#     the acceptor, and a pool thread for each connection once its request is there.
# ══════════════════════════════════════════════════════════════════════════════

LISTEN_BACKLOG = 1024
HANDSHAKE_TIMEOUT = 10.0  # seconds
REFUSAL_LINGER = 1.0  # seconds
GUESTS_LIMIT = 4096  # connections that are not let in yet; a quarter of the descriptors if that is less
TLS_GUESTS_LIMIT = 1024  # the same with TLS, where each may cost 80 KiB
STEPS_LIMIT = 64  # of them that have a thread
HEAD_LIMIT = 64 << 10  # bytes of a request before it is complete
SWEEP_INTERVAL = 0.1  # seconds between two looks for guests whose time is over, or whose answer is due
DELAY_FIRST, DELAY_LAST = 0.1, 1.0  # seconds that a refusal waits: more with each from one address
REFUSALS_REMEMBERED = 60.0  # seconds after which an address has a clean slate
REFUSING_ADDRESSES = 1024  # addresses that are counted
ACCEPT_PAUSE = 0.1  # seconds to wait when the system has no descriptor or thread left


class ServerWebSocket(QueuedConnection, ServerConnection):
    """A connection that a client dialled, and whose request has been read by the Doorway."""

    def __init__(
        self, sock: socket.socket, protocol: ServerProtocol, *args: Any, early: bytes = b"", **kwargs: Any
    ) -> None:
        """``early`` is what has been read: a whole request, and perhaps more."""
        self._early = early
        self._answered = threading.Event()  # the request has its answer, or gets none
        super().__init__(sock, protocol, *args, **kwargs)

    def handshake(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().handshake(*args, **kwargs)
        finally:
            self._answered.set()

    def send_data(self) -> None:
        super().send_data()
        if self.response is not None:  # handshake() has made it; where that is a refusal, it waits for the receiver
            self._answered.set()

    def receive_all(self) -> None:
        """Receive first what has been read before, then what comes.

        What follows the request waits for the answer to that: a pong or a close would overtake it.
        """
        head, end, rest = self._early.partition(b"\r\n\r\n")
        self._feed(head + end)
        self._answered.wait()
        if rest:
            self._feed(rest)
        super().receive_all()

    def _feed(self, data: bytes) -> None:
        with self.protocol_mutex:
            self.protocol.receive_data(data)
            events = self.protocol.events_received()
            with contextlib.suppress(OSError):  # the next read sees it
                self.send_data()
        for event in events:
            self.process_event(event)


def open_listener(address: Address) -> socket.socket:
    """A listening socket; "" means every interface, IPv4 and IPv6, as in Go.

    Raises:
        OSError: if the address is in use or does not exist.
    """
    if address.path:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.stat(address.path).st_mode):
                os.unlink(address.path)  # left by an agent that was killed
        return socket.create_server(address.path, family=socket.AF_UNIX, backlog=LISTEN_BACKLOG)
    if not address.host:
        if socket.has_dualstack_ipv6():
            with contextlib.suppress(OSError):  # IPv6 is compiled in but switched off
                return socket.create_server(
                    ("", address.port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=LISTEN_BACKLOG
                )
        return socket.create_server(("", address.port), backlog=LISTEN_BACKLOG)
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, where = found[0]
    return socket.create_server(where[:2], family=family, backlog=LISTEN_BACKLOG)


def address_of(sock: socket.socket) -> str:
    """Whom failures and places are counted by: a host, or the network of 64 bits that an IPv6 host has to itself."""
    if sock.family == socket.AF_UNIX:
        return "unix"
    try:
        address = ipaddress.ip_address(sock.getpeername()[0].partition("%")[0])
    except OSError:  # it has left
        return ""
    if isinstance(address, ipaddress.IPv6Address):
        network = ipaddress.ip_network((address, 64), strict=False)
        return str(address.ipv4_mapped or network.network_address)
    return str(address)


def is_power_of_two(count: int) -> bool:
    """Whether an address's ``count``-th failed attempt is told: the 1st, 2nd, 4th, 8th and so on are."""
    return not count & (count - 1)


def delay_after(count: int) -> float:
    """Seconds that the answer to an address's ``count``-th failed attempt waits."""
    return float(min(DELAY_FIRST * 2 ** min(count - 1, 10), DELAY_LAST))


class Refusals:
    """Counts attempts that failed to authenticate. Entered by the threads of steps.

    What keeps a guesser out is a token of 128 random bits. This makes guessing slow for who waits for the answers,
    and visible. It never delays a client with the right token, from whatever address: behind a proxy all have one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the attributes below
        self._recent: collections.OrderedDict[str, tuple[int, float]] = collections.OrderedDict()  # by address: how
        # many, and when the last was; least recent first
        self.total = 0

    def count(self, guest: Guest, why: str) -> int:
        """Count and log an attempt; returns how many there were from its address."""
        now = time.monotonic()
        with self._lock:
            self.total += 1
            count, last = self._recent.pop(guest.address, (0, now))
            count = 1 if now - last > REFUSALS_REMEMBERED else count + 1
            self._recent[guest.address] = (count, now)
            if len(self._recent) > REFUSING_ADDRESSES:
                self._recent.popitem(last=False)
        if is_power_of_two(count):  # a guesser does not fill the log
            times = f", {count} times from this address" if count > 1 else ""
            log.warning("client refused: %s%s", why, times, extra={"peer": who_is(guest.socket).name})
        return count


REQUEST_LINE = re.compile(rb"([A-Z]+) \S+ HTTP/1\.1\r$")


def make_response(status: http.HTTPStatus, text: str) -> HTTPResponse:
    """A response as websockets' ServerConnection.respond() makes it."""
    body = text.encode()
    headers = Headers(
        [
            ("Connection", "close"),
            ("Content-Length", str(len(body))),
            ("Content-Type", "text/plain; charset=utf-8"),
        ]
    )
    return HTTPResponse(status.value, status.phrase, headers, body)


def refuse_for_want(exc: BaseException) -> HTTPResponse:
    """The answer where the system has no descriptor, thread or memory left for a connection."""
    return make_response(http.HTTPStatus.SERVICE_UNAVAILABLE, f"the agent cannot serve more: {explain_want(exc)}\n")


def judge_head(head: bytes | bytearray) -> tuple[http.HTTPStatus, str] | None:
    """What to answer to the start of a request at once, if it can become none that makes sense; None else."""
    if head[:1] == b"\x16":  # a TLS handshake, see RFC 8446 §5.1
        return http.HTTPStatus.BAD_REQUEST, "this port speaks no TLS\n"
    if len(head) > HEAD_LIMIT:
        return http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "too long a request\n"
    line, newline, _ = head.partition(b"\n")
    if not newline:
        return None
    match = REQUEST_LINE.match(line)
    if match is None:
        return http.HTTPStatus.BAD_REQUEST, "not a request that makes sense\n"
    return None if match[1] == b"GET" else (http.HTTPStatus.METHOD_NOT_ALLOWED, "use GET\n")


def parse_request(head: bytes | bytearray) -> HTTPRequest | tuple[http.HTTPStatus, str]:
    """The request in a complete head, or what to answer to one that makes no sense."""
    reader = StreamReader()
    reader.feed_data(head)
    try:
        next(HTTPRequest.parse(reader.read_line))
    except StopIteration as exc:
        return cast(HTTPRequest, exc.value)
    except SecurityError:
        return http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "too long a request\n"
    except (EOFError, ValueError, NotImplementedError):  # the last: a transfer coding
        pass
    return http.HTTPStatus.BAD_REQUEST, "not a request that makes sense\n"


def log_response(request: HTTPRequest, response: HTTPResponse, sock: socket.socket) -> None:
    """Say what a request got; of what is usual, or is said elsewhere, only where everything is wanted."""
    level = logging.DEBUG if response.status_code in (101, 200, 401, 403) else logging.INFO
    path = request.path.partition("?")[0][:200]  # the query may hold the token
    log.log(level, "GET %s: HTTP status %d", path, response.status_code, extra={"peer": who_is(sock).name})


class Guest:
    """A connection that is not let in yet. One thread at a time has it: the acceptor, or a pool thread for a step."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock  # does not block
        self.address = address_of(sock)
        self.deadline = time.monotonic() + HANDSHAKE_TIMEOUT
        self.head = bytearray()
        self.secure: ssl.SSLSocket | None = None  # is ``socket`` then
        # Once it is answered: what it sends is read and thrown away, until it leaves.
        self.answered = False
        self.answer = bytearray()  # what is left of it to send
        self.answering = False  # some of it may have been sent
        self.due = 0.0  # when that may begin
        self.on_refusal: Callable[[int], None] = lambda times: None  # told how often its address was refused so far

    def respond(self, status: http.HTTPStatus, text: str) -> HTTPResponse:
        """See make_response()."""
        response = make_response(status, text)
        if status == http.HTTPStatus.METHOD_NOT_ALLOWED:
            response.headers["Allow"] = "GET"
        return response

    def refuse_nonsense(self, status: http.HTTPStatus, text: str) -> None:
        """Answer what is no request, and say so in the log."""
        log.info("client refused: HTTP status %d: %s", status, text.strip(), extra={"peer": who_is(self.socket).name})
        self.refuse(self.respond(status, text))

    def refuse(self, response: HTTPResponse, delay: float = 0.0) -> None:
        """Let the response be all that the guest gets, ``delay`` seconds from now."""
        self.answered = True
        self.answer += response.serialize()
        self.due = time.monotonic() + delay
        self.deadline = self.due + REFUSAL_LINGER

    def send(self) -> bool:
        """Send what may be sent of the answer, without waiting; True if more is to come."""
        secure = self.secure if self.secure is not None and self.secure.version() is not None else None
        try:
            while self.answer:
                sent = secure.send(self.answer) if secure is not None else socket.socket.send(self.socket, self.answer)
                del self.answer[:sent]
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return True
        except OSError:  # it has left
            self.answer.clear()
            return False
        with contextlib.suppress(OSError, ValueError):
            if secure is not None:
                secure.unwrap()  # TLS's goodbye; SSLWantReadError, since the guest has not said its own
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.socket, socket.SHUT_WR)  # no close: with something unread that is a reset
        return False


class Doorway:
    """Accepts connections, and holds each until its TLS handshake and the head of its request are there.

    Who says nothing, or says it slowly, or is to be refused, costs a descriptor and an entry here: one thread watches
    them all. Only a step that has something to work on gets a thread, STEPS_LIMIT at once. At the limit of guests the
    address that has most of them loses its oldest, so that thousands that hang about keep out nobody, at another
    address least of all.

    A subclass for other requests than a WebSocket's has its own judge(), examine() and ``guest_class``.
    """

    guest_class: ClassVar[type[Guest]] = Guest

    def __init__(
        self,
        listener: socket.socket,
        decide: Callable[[Guest, HTTPRequest], HTTPResponse | None],
        let_in: Callable[[socket.socket, bytes], None],
        pool: ThreadPool,
        tls: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        """Call start() once connections may come.

        Args:
            decide: gives the answer to a request, None to let it in. Those with status 401 and 403 are counted,
                logged and delayed, see Refusals.
            let_in: called in a pool thread with a connection and what has been read of it.
            tls: gives each connection what to speak TLS with.
        """
        self.listener = listener
        self.refusals = Refusals()
        self._decide = decide
        self._let_in = let_in
        self._pool = pool
        self._tls = tls
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()  # guards _steps, _ready, _returned and _closed
        self._steps = 0  # that have a thread
        self._ready: collections.deque[Guest] = collections.deque()  # for a step, once a thread may be had
        self._returned: list[Guest] = []  # from their steps
        self._closed = False
        # The acceptor thread's alone.
        self._epoll = select.epoll()
        self._guests: dict[int, Guest] = {}  # by descriptor, who was heard of last at the end
        self._by_address: dict[str, dict[int, Guest]] = {}
        self._limit = 0
        self._next_sweep = 0.0
        self._crowded_out = 0  # guests dismissed for others since the log was told
        self._deaf = 0  # tries in a row in which none could be accepted

    def start(self) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._limit = max(min(GUESTS_LIMIT if self._tls is None else TLS_GUESTS_LIMIT, soft // 4), 16)
        self.listener.setblocking(False)
        self._epoll.register(self.listener, select.EPOLLIN)
        self._epoll.register(self._wakeup, select.EPOLLIN)
        threading.Thread(target=self._run, name="acceptor", daemon=True).start()

    def close(self) -> None:
        """Accept no more, and let go of who is not in yet. Connections that are stay."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        with self._lock:
            self._closed = True
        os.eventfd_write(self._wakeup, 1)

    def _run(self) -> None:
        while True:
            try:
                if not self._attend_all():
                    return
            except MemoryError:  # nothing may end this thread: nobody would get in any more
                time.sleep(ERROR_PAUSE)
            except Exception:
                log.exception("unexpected error while accepting")
                time.sleep(ERROR_PAUSE)

    def _attend_all(self) -> bool:
        """See to all who have done something since the last time; False once it is closed."""
        events = self._epoll.poll(SWEEP_INTERVAL if self._guests else None)
        with self._lock:
            returned, self._returned = self._returned, []
            closed = self._closed
        if closed:
            for guest in (*self._guests.values(), *returned):
                guest.socket.close()
            return False
        for guest in returned:
            self._watch(guest)
        for fd, _ in events:
            try:
                if fd == self._wakeup:
                    os.eventfd_read(self._wakeup)
                elif fd in self._guests:
                    self._attend(self._guests[fd])
                else:
                    self._accept()
            except MemoryError:  # it is ready still, the next time
                time.sleep(ERROR_PAUSE)
            except Exception:
                log.exception("unexpected error while accepting")
        if time.monotonic() >= self._next_sweep:
            self._sweep()
        return True

    def _accept(self) -> None:
        try:
            sock, _ = self.listener.accept()
        except BlockingIOError:  # it left in between
            return
        except OSError as exc:
            if exc.errno not in (errno.EBADF, errno.EINVAL):  # closed, or shut
                if not self._deaf:
                    log.error("cannot accept connections, trying again: %s", exc.strerror)
                self._deaf += 1
                time.sleep(ACCEPT_PAUSE)
            return
        if self._deaf:
            log.warning("connections are accepted again, after %d tries", self._deaf)
            self._deaf = 0
        sock.setblocking(False)
        if len(self._guests) >= self._limit:
            self._crowded_out += 1
            crowd = max(self._by_address.values(), key=len)
            self._dismiss(next(iter(crowd.values())))
        self._watch(self.guest_class(sock))

    def _watch(self, guest: Guest) -> None:
        fd = guest.socket.fileno()
        try:
            self._epoll.register(fd, select.EPOLLIN)
        except OSError as exc:  # ENOSPC, ENOMEM: see epoll_ctl(2)
            log.error("cannot watch a connection: %s", exc.strerror, extra={"peer": who_is(guest.socket).name})
            guest.socket.close()
            return
        self._guests[fd] = guest
        self._by_address.setdefault(guest.address, {})[fd] = guest
        self._send(guest)

    def _unwatch(self, guest: Guest) -> None:
        fd = guest.socket.fileno()
        self._epoll.unregister(fd)
        del self._guests[fd]
        neighbours = self._by_address[guest.address]
        del neighbours[fd]
        if not neighbours:
            del self._by_address[guest.address]

    def _dismiss(self, guest: Guest) -> None:
        self._unwatch(guest)
        guest.socket.close()

    def _sweep(self) -> None:
        """Dismiss whose time is over."""
        now = time.monotonic()
        self._next_sweep = now + SWEEP_INTERVAL
        if self._crowded_out:
            log.warning(
                "%d clients dismissed: %d are not let in yet, and more do not fit", self._crowded_out, self._limit
            )
            self._crowded_out = 0
        for guest in list(self._guests.values()):
            if guest.answer and guest.due <= now:
                self._send(guest)
            if guest.deadline <= now:
                if not guest.answered:
                    log.debug("client dismissed: no request in time", extra={"peer": who_is(guest.socket).name})
                self._dismiss(guest)

    def _attend(self, guest: Guest) -> None:
        """A guest has sent something, has left, or takes more of its answer."""
        if guest.answered or self._tls is None:
            try:
                data = socket.socket.recv(guest.socket, HEAD_LIMIT)
            except BlockingIOError:
                data = None
            except OSError:
                data = b""
            if data == b"":
                self._dismiss(guest)
            elif guest.answered:
                self._send(guest)
            elif data:
                guest.head += data
                if fault := self.judge(guest.head):
                    guest.refuse_nonsense(*fault)
                    self._send(guest)
                elif b"\r\n\r\n" in guest.head:
                    self._request_step(guest)
        else:
            self._request_step(guest)

    def _send(self, guest: Guest) -> None:
        now = time.monotonic()
        if guest.answer and guest.due <= now:
            if not guest.answering:  # however late that is: the machine may be busy
                guest.answering, guest.deadline = True, now + REFUSAL_LINGER
            more = guest.send()
            self._epoll.modify(guest.socket, select.EPOLLIN | (select.EPOLLOUT if more else 0))

    def take_back(self, sock: socket.socket, early: bytes, patience: float) -> None:
        """Hold a connection that was let in and answered until its next request, for ``patience`` seconds.

        Args:
            early: what has been read of that already.
        """
        sock.setblocking(False)
        guest = self.guest_class(sock)
        guest.deadline = time.monotonic() + patience
        guest.head += early
        if isinstance(sock, ssl.SSLSocket):
            guest.secure = sock
        if fault := self.judge(early):
            guest.refuse_nonsense(*fault)
        elif b"\r\n\r\n" in early:  # nothing need come any more
            self._queue_step(guest)
            return
        with self._lock:
            closed = self._closed
            if not closed:
                self._returned.append(guest)
        if closed:
            sock.close()
        else:
            os.eventfd_write(self._wakeup, 1)

    # Steps: in a pool thread each.

    def _request_step(self, guest: Guest) -> None:
        self._unwatch(guest)
        self._queue_step(guest)

    def _queue_step(self, guest: Guest) -> None:
        with self._lock:
            if self._steps >= STEPS_LIMIT:
                self._ready.append(guest)
                return
            self._steps += 1
        self._begin_step(guest)

    def _begin_step(self, guest: Guest) -> None:
        """Give a guest a thread; where none is to be had, those that wait, too, cannot be served. The caller has
        counted the step."""
        waiting: Guest | None = guest
        while waiting is not None:
            try:
                self._pool.submit(self._step, waiting)
                return
            except RuntimeError as exc:
                log.error("cannot serve a connection: %s", exc, extra={"peer": who_is(waiting.socket).name})
                waiting.refuse(refuse_for_want(exc))
                if self._tls is not None:  # nothing can be said where nothing is encrypted yet
                    waiting.answer.clear()
                self._return(waiting)
            waiting = self._take_ready()

    def _return(self, guest: Guest) -> None:
        """Give a guest back to the acceptor."""
        with self._lock:
            self._returned.append(guest)
        os.eventfd_write(self._wakeup, 1)

    def _end_step(self) -> None:
        guest = self._take_ready()
        if guest is not None:
            self._begin_step(guest)

    def _take_ready(self) -> Guest | None:
        """Who is next, in the place of a step that is over; without anybody that is free."""
        with self._lock:
            if self._ready:
                return self._ready.popleft()
            self._steps -= 1
            return None

    def _step(self, guest: Guest) -> None:
        let_in = False
        try:
            let_in = (self._tls is None or self._advance_tls(guest, self._tls)) and self.examine(guest)
        except OSError:  # it has left
            guest.socket.close()
            return
        except Exception:
            guest.socket.close()
            raise
        finally:
            self._end_step()
        if let_in:
            guest.socket.settimeout(None)
            self._let_in(guest.socket, bytes(guest.head))
            return
        self._return(guest)

    def _advance_tls(self, guest: Guest, tls: Callable[[], ssl.SSLContext]) -> bool:
        """Take the TLS handshake, then the request, as far as what is there allows; True once it is all there.

        Raises:
            OSError: if the guest has left.
        """
        try:
            if guest.secure is None:
                guest.socket = guest.secure = tls().wrap_socket(
                    guest.socket, server_side=True, do_handshake_on_connect=False
                )
                guest.secure.settimeout(0)
            if guest.secure.version() is None:
                guest.secure.do_handshake()
            while b"\r\n\r\n" not in guest.head:
                data = guest.secure.recv(TLSStream.RECORD)
                if not data:
                    raise ConnectionResetError
                guest.head += data
                if fault := self.judge(guest.head):
                    guest.refuse_nonsense(*fault)
                    return False
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        except ssl.SSLEOFError:
            raise ConnectionResetError from None
        except ssl.SSLError as exc:
            why = getattr(exc, "verify_message", "") or exc.reason or str(exc)
            words = why.lower().replace("_", " ")
            log.info("client refused: the TLS handshake failed: %s", words, extra={"peer": who_is(guest.socket).name})
            guest.refuse(guest.respond(http.HTTPStatus.BAD_REQUEST, "this port speaks TLS: use https: or wss:\n"))
            if exc.reason != "HTTP_REQUEST":
                guest.answer.clear()  # OpenSSL has said it, in an alert
                guest.send()
            return False
        return True

    def judge(self, head: bytes | bytearray) -> tuple[http.HTTPStatus, str] | None:
        """See judge_head()."""
        return judge_head(head)

    def examine(self, guest: Guest) -> bool:
        """Whether the request of a guest, whose head is complete, is let in. Else it has been refused."""
        request = parse_request(guest.head)
        if not isinstance(request, HTTPRequest):
            guest.refuse_nonsense(*request)
            return False
        response = self._decide(guest, request)
        if response is None:
            try:
                check_descriptor(guest.socket.fileno())
            except OSError as exc:
                log.error("cannot serve a connection: %s", exc.strerror, extra={"peer": who_is(guest.socket).name})
                response = refuse_for_want(exc)
            else:
                return True
        delay = 0.0
        if response.status_code in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN):
            times = self.refusals.count(guest, (response.body or b"").decode().strip())
            guest.on_refusal(times)
            delay = delay_after(times)
        log_response(request, response, guest.socket)
        guest.refuse(response, delay)
        return False


def make_doorway(
    serve_connection: Callable[[ServerConnection], None],
    listener: socket.socket,
    pool: ThreadPool,
    process_request: Callable[[Guest, HTTPRequest], HTTPResponse | None],
    speaks_version_2: Callable[[ServerConnection], bool] = lambda connection: True,
    tls: Callable[[], ssl.SSLContext] | None = None,
    **options: Any,
) -> Doorway:
    """A Doorway to websockets' handshake, and to ``serve_connection`` for who is let in.

    Args:
        process_request: see Doorway's ``decide``.
        speaks_version_2: whether version 2 is selected for a client that offers it; no client has to.
        options: as for websockets.sync.server.serve().
    """
    read: dict[socket.socket, bytes] = {}  # what was read of a socket that is being let in

    def select_subprotocol(connection: ServerConnection, offered: Sequence[Subprotocol]) -> Subprotocol | None:
        return SUBPROTOCOL if SUBPROTOCOL in offered and speaks_version_2(connection) else None

    def create_connection(sock: socket.socket, *args: Any, **kwargs: Any) -> ServerWebSocket:
        try:
            return ServerWebSocket(sock, *args, early=read.pop(sock), **kwargs)
        except (OSError, RuntimeError, MemoryError) as exc:  # the library closes without a word
            log.error("cannot serve a connection: %s", explain_want(exc), extra={"peer": who_is(sock).name})
            with contextlib.suppress(OSError):
                sock.sendall(refuse_for_want(exc).serialize())
            raise

    server = serve(
        serve_connection,
        sock=listener,
        create_connection=cast(Any, create_connection),
        select_subprotocol=select_subprotocol,
        compression=None,
        open_timeout=HANDSHAKE_TIMEOUT,
        close_timeout=CLOSE_TIMEOUT,
        ping_interval=None,  # Heartbeat pings, see there
        **options,
    )
    # Only the library's own accept loop would use these.
    ends: tuple[Any, ...] = (server.shutdown_watcher, server.shutdown_notifier)
    for end in ends:
        if isinstance(end, int):  # before release 16
            os.close(end)
        else:
            end.close()

    def let_in(sock: socket.socket, early: bytes) -> None:
        read[sock] = early
        try:
            server.handler(sock, None)
        finally:
            read.pop(sock, None)

    return Doorway(listener, process_request, let_in, pool, tls)


def bearer_token(request: HTTPRequest) -> bytes:
    """The token that a request shows: in its header, or in its query where a client can set no header."""
    headers = request.headers.get_all("Authorization")
    if headers:
        scheme, _, given = headers[0].partition(" ")
        given = given.strip() if len(headers) == 1 and scheme.lower() == "bearer" else ""
    else:
        given = urllib.parse.parse_qs(request.path.partition("?")[2]).get("token", [""])[0]
    return given.encode("utf-8", "surrogateescape")


def is_foreign_page(request: HTTPRequest) -> bool:
    """Whether a browser's page of another host asks (RFC 6454): it must not reach what needs no token.

    The page must come from the host that it asks, and that must be an address
    or localhost: the owner of any other name can let it point here (DNS rebinding).
    """
    origins = request.headers.get_all("Origin")
    hosts = request.headers.get_all("Host")
    if not origins:
        return False
    try:
        if [urllib.parse.urlsplit(origin).netloc for origin in origins] != hosts:
            return True
        name = urllib.parse.urlsplit(f"//{hosts[0]}").hostname or ""
    except ValueError:  # no URL, says urlsplit
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name != "localhost"
    return False


class Server:
    """Accepts WebSocket clients and answers ``GET /health``."""

    def __init__(self, runtime: Runtime, registry: SessionRegistry, main: MainProcess | None) -> None:
        """Listen; connections are accepted from start() on.

        Raises:
            OSError: if the address is in use or does not exist.
        """
        config = runtime.config
        self._runtime = runtime
        self._registry = registry
        self._main = main
        self._metrics = Metrics(runtime, registry, main)
        self._heartbeat = Heartbeat(config.ping_interval, config.ping_timeout)
        self._tokens = Tokens(config.tokens, config.token_file)
        self._tls: ServerTLS | None = None
        if config.tls_cert:
            self._tls = ServerTLS(config.tls_cert, config.tls_key, config.tls_client_ca)
        tls = self._tls
        self._doorway = make_doorway(
            self._serve_peer,
            open_listener(config.addr),
            runtime.pool,
            self._process_request,
            tls=None if tls is None else lambda: tls.context,
            process_response=self._process_response,
            server_header=f"sockerless-agent/{__version__}",
            max_size=config.max_message_size,
            logger=logging.getLogger("sockerless.websockets"),
        )

    @property
    def address(self) -> str:
        """Where it listens, with the port that the system chose."""
        listener = self._doorway.listener
        if listener.family == socket.AF_UNIX:
            return f"unix:{listener.getsockname()}"
        host, port = listener.getsockname()[:2]
        return str(Address(host, port))

    def start(self) -> None:
        """Raises RuntimeError if the system refuses a thread."""
        self._heartbeat.start()
        self._doorway.start()
        log.info("listening on %s%s", self.address, " with TLS" if self._tls is not None else "")
        config = self._runtime.config
        if not self._tokens and not config.tls_client_ca and not config.addr.is_local:
            log.warning("NO TOKEN IS SET: whoever reaches %s can run commands here; "
                        "set SOCKERLESS_AGENT_TOKEN or --token-file", self.address)  # fmt: skip

    def reload(self) -> None:
        """Read tokens and certificates again. Connections that exist stay as they are; what cannot be used is not."""
        if self._runtime.config.token_file:
            reload_tokens(self._tokens)
        if self._tls is None:
            return
        try:
            self._tls.reload()
        except ValueError as exc:
            log.error("TLS goes on with the certificates that it has: %s", exc)
        else:
            log.info("TLS: new connections get the certificates that were read now")

    def close(self) -> None:
        """Accept no more connections. Those that exist stay."""
        self._doorway.close()
        if self._runtime.config.addr.path:
            with contextlib.suppress(OSError):
                os.unlink(self._runtime.config.addr.path)

    def _serve_peer(self, connection: ServerConnection) -> None:
        assert isinstance(connection, ServerWebSocket)
        try:
            connection.start_writer(self._runtime.pool)
        except RuntimeError as exc:
            log.error("cannot serve a connection: %s", exc, extra={"peer": connection.who.name})
            connection.close(CloseCode.TRY_AGAIN_LATER, f"the agent cannot serve more: {explain_want(exc)}")
            return
        self._heartbeat.add(connection)
        try:
            Peer(self._runtime, connection, self._registry, self._main).serve()
        finally:
            self._heartbeat.remove(connection)

    def _process_request(self, connection: Guest, request: HTTPRequest) -> HTTPResponse | None:
        """Answer a request, or None to let the WebSocket handshake go on."""
        path = request.path.partition("?")[0]
        if path not in ("/health", "/metrics", "/ws"):
            return connection.respond(http.HTTPStatus.NOT_FOUND, "not found; there are /health, /metrics and /ws\n")
        if path == "/health":
            return self._answer(connection, json.dumps(self._registry.describe_health()) + "\n", "application/json")
        if self._tls is not None and self._tls.wants_certificate and not peer_certificate(connection.socket):
            self._turn_away(connection, "certificate", "no certificate")
            return connection.respond(http.HTTPStatus.FORBIDDEN, "a client certificate is needed\n")
        if self._tokens and not self._tokens.accept(bearer_token(request)):
            self._turn_away(connection, "token", "missing or wrong token")
            response = connection.respond(http.HTTPStatus.UNAUTHORIZED, "missing or wrong bearer token\n")
            response.headers["WWW-Authenticate"] = "Bearer"
            return response
        if not self._tokens and is_foreign_page(request):
            self._turn_away(connection, "origin", "a web page of another host")
            return connection.respond(http.HTTPStatus.FORBIDDEN, "web pages of another host may not connect\n")
        if path == "/metrics":
            return self._answer(connection, self._metrics.text(), METRICS_TYPE)
        return None

    def _process_response(
        self, connection: ServerConnection, request: HTTPRequest, response: HTTPResponse
    ) -> HTTPResponse | None:
        response.headers[INSTANCE_HEADER] = self._registry.instance
        log_response(request, response, connection.socket)
        return None

    def _turn_away(self, guest: Guest, reason: str, message: str) -> None:
        """Tell everybody but the client about a client that may not connect."""
        books = self._runtime.books
        books.counters.count(AUTH_FAILURES, reason)

        def tell(times: int) -> None:  # the log has it from Refusals
            if is_power_of_two(times):  # nor does a guesser fill the disk
                books.tell("refused", who_is(guest.socket), reason=reason, error=message, times=times)

        guest.on_refusal = tell

    def _answer(self, connection: Guest, text: str, content_type: str) -> HTTPResponse:
        response = connection.respond(http.HTTPStatus.OK, text)
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = content_type
        return response


# ══════════════════════════════════════════════════════════════════════════════
# 15  Reverse mode
#     Owns the connection to a backend that this side dials, for functions that
#     accept none. One thread, the dialer, dials and then serves the connection.
# ══════════════════════════════════════════════════════════════════════════════

BACKOFF_FIRST, BACKOFF_LAST = 1.0, 30.0  # seconds between two tries
STEADY_AFTER = 10.0  # seconds after which a connection counts as one that held
GHOST_DROP = 5.0  # seconds within which a backend drops a dial whose predecessor it still has


class DialerSocket(DialledWebSocket):
    """A connection to a backend."""

    paced = True


class ReverseDialer:
    """Keeps a connection to the backend: dials, serves, and dials again.

    Tries that fail are spaced by exponential backoff with jitter and counted;
    a connection that held sets both back.
    """

    def __init__(
        self, runtime: Runtime, registry: SessionRegistry, main: MainProcess | None, on_give_up: Callable[[], None]
    ) -> None:
        config = runtime.config
        self._runtime = runtime
        self._registry = registry
        self._main = main
        self._on_give_up = on_give_up
        self._tokens = Tokens(config.tokens, config.token_file)
        self._heartbeat = Heartbeat(config.ping_interval, config.ping_timeout, strict=True)
        self._closing = threading.Event()
        self._settled = threading.Event()  # no dial is on its way: it failed, or its peer is in the registry
        self._settled.set()
        # The dialer thread's alone.
        self._failures = 0  # in a row
        self._served = False  # the last connection had sessions
        # The last connection ended without a close, so the backend may have it
        # still. It drops both when it sees one id twice: that costs no try.
        self._ghost = False

    def start(self) -> None:
        """Raises RuntimeError if the system refuses a thread."""
        self._heartbeat.start()
        log.info("reverse mode: dialling %s", self._runtime.config.callback)
        threading.Thread(target=self._run, name="dialer", daemon=True).start()

    def reload(self) -> None:
        """Read the token again, for the next dial; the certificates are read at each."""
        if self._runtime.config.token_file:
            reload_tokens(self._tokens)

    def close(self) -> None:
        """Dial no more. The connection that exists stays, and one that is on its way is waited for a little."""
        self._closing.set()
        self._settled.wait(LINGER)

    def _run(self) -> None:
        try:
            self._keep_connected()
        except Exception:
            log.exception("reverse mode: unexpected error; giving up")
            self._settled.set()
            self._on_give_up()

    def _keep_connected(self) -> None:
        while True:
            self._settled.clear()
            if self._closing.is_set():  # in this order: either close() waits, or this sees it
                self._settled.set()
                return
            try:
                connection = self._dial()
            # RuntimeError: no thread left; ImportError: a SOCKS proxy, which needs a package that is not here.
            except (OSError, EOFError, WebSocketException, ValueError, RuntimeError, ImportError, MemoryError) as exc:
                self._settled.set()
                if not self._wait_after(self._explain(exc)):
                    return
                continue
            started = time.monotonic()
            clean = self._serve(connection)
            held = time.monotonic() - started
            if self._closing.is_set():
                return
            if self._ghost and held < GHOST_DROP:
                log.info("reverse mode: the backend still had the lost connection; dialling again")
                self._ghost = False
                continue
            self._ghost = not clean
            if held >= STEADY_AFTER:
                self._failures = 0
            else:
                if self._served:  # no failure, but no reason to dial without a pause either
                    self._failures = 0
                if not self._wait_after(f"the connection ended after {held:.1f} s"):
                    return

    def _dial(self) -> DialerSocket:
        """Connect. Raises what websockets and the system have for it."""
        config = self._runtime.config
        context = None
        if config.callback.secure:
            context = make_client_tls(config.callback_ca, config.callback_cert, config.callback_key)
        headers = {INSTANCE_HEADER: self._registry.instance}
        if self._tokens:
            headers["Authorization"] = f"Bearer {self._tokens.first}"
        connection = connect(
            config.callback.url,
            create_connection=DialerSocket,
            additional_headers=headers,
            user_agent_header=f"sockerless-agent/{__version__}",
            subprotocols=[SUBPROTOCOL],  # offered: a version 1 backend does not select it
            ssl=context,
            compression=None,
            open_timeout=HANDSHAKE_TIMEOUT,
            close_timeout=CLOSE_TIMEOUT,
            ping_interval=None,  # Heartbeat pings, see there
            max_size=config.max_message_size,
            logger=logging.getLogger("sockerless.websockets"),
        ).__enter__()  # by hand: releases from 17.1 on warn of a connection that is not entered
        assert isinstance(connection, DialerSocket)
        return connection

    def _serve(self, connection: DialerSocket) -> bool:
        """Serve the backend until the connection ends; returns whether that was a closing handshake."""
        log.info("reverse mode: connected to %s", self._runtime.config.callback)
        connection.outbox.paced = connection.subprotocol is None  # version 2 has its own flow control
        try:
            connection.start_writer(self._runtime.pool)
        except RuntimeError as exc:
            log.error("reverse mode: %s", exc)
            self._settled.set()
            connection.close()
            return True
        connection.who = Who(str(self._runtime.config.callback))
        peer = Peer(self._runtime, connection, self._registry, self._main)
        self._settled.set()
        self._heartbeat.add(connection)
        try:
            peer.serve()
        finally:
            self._heartbeat.remove(connection)
        self._served = peer.started > 0
        # A clean Close before dialling again, so that the backend forgets the id.
        connection.close()
        return connection.protocol.close_rcvd is not None

    def _explain(self, exc: Exception) -> str:
        if isinstance(exc, InvalidStatus):
            status = exc.response.status_code
            meaning = {
                401: ": the token is missing or wrong",
                403: ": the backend forbids it",
                404: ": no such path, or the backend does not know this agent",
            }.get(status, "")
            return f"HTTP status {status}{meaning}"
        if isinstance(exc, TimeoutError):
            return f"no answer within {HANDSHAKE_TIMEOUT:g} s"
        return explain_tls_failure(exc) or _in_words(exc.__cause__ or exc)

    def _wait_after(self, failure: str) -> bool:
        """Wait for the next try; False if there is to be none."""
        config = self._runtime.config
        self._failures += 1
        limit = config.callback_retries
        if limit and self._failures >= limit:
            log.error("reverse mode: cannot connect to %s: %s; giving up after %d tries",
                      config.callback, failure, self._failures)  # fmt: skip
            self._on_give_up()
            return False
        longest = min(BACKOFF_LAST, BACKOFF_FIRST * 2 ** min(self._failures - 1, 10))
        pause = longest * random.uniform(0.5, 1)  # a herd of agents must not dial in step
        log.warning("reverse mode: cannot connect to %s: %s; try %d of %s, next in %.1f s",
                    config.callback, failure, self._failures, limit or "any number", pause)  # fmt: skip
        return not self._closing.wait(pause)


# ══════════════════════════════════════════════════════════════════════════════
# 16  Command line
#     Owns the order of start and end, the signals, and the exit code. The main
#     thread runs it, and after the start only waits.
# ══════════════════════════════════════════════════════════════════════════════

EXIT_FAILURE, EXIT_USAGE = 1, 2
# What may happen beside a signal, whose numbers are positive.
MAIN_ENDED, BACKEND_GIVEN_UP = -1, -2
CLOSE_LINGER = 1.0  # seconds between the last message and the close of a connection
LINGER = 3.0  # seconds that a client may take no byte before it is not waited for any longer
KILL_LINGER = 10.0  # seconds for a killed main process to be gone
# Without a main process to pass them on to, these end the agent.
ENDING_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class Agent:
    """The agent as a whole: starts its parts, waits, and takes them down in order."""

    def __init__(self, config: Config, books: Books | None = None, roll: Roll | None = None) -> None:
        self._config = config
        self._stop_signals = (signal.SIGTERM, config.stop_signal)
        self._runtime = Runtime(config, ThreadPool(), Reaper(config.init != "off", roll), TerminalPump(),
                                books=books or Books())  # fmt: skip
        self._main = MainProcess(self._runtime) if config.keep_alive else None
        self._health = HealthChecker(self._runtime, self._push_health) if config.health_cmd else None
        describe_health = self._health.describe if self._health is not None else None
        self._registry = SessionRegistry(config.max_total_sessions, self._main, describe_health)
        self._copier: OutputCopier | None = None
        # A signal's number, or one of the events above.
        self._events: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._expires = time.monotonic() + config.lifetime - config.lifetime_margin if config.lifetime else math.inf

    def _push_health(self) -> None:
        self._registry.push_health()

    def run(self) -> int:
        """Run until a signal, or the main process's end, ends it; returns the exit code."""
        try:
            self._receive_signals()
            self._start_threads()
        except RuntimeError as exc:
            log.error("cannot start: %s", exc)
            return EXIT_FAILURE
        raise_descriptor_limit()
        if (self._config.subreaper or self._config.init == "on") and os.getpid() != 1:
            try:
                become_subreaper()
            except OSError as exc:
                log.error("cannot become a subreaper: %s", exc.strerror)
                return EXIT_FAILURE
        front: Server | ReverseDialer
        try:
            if self._config.callback:
                front = ReverseDialer(
                    self._runtime, self._registry, self._main, lambda: self._events.put(BACKEND_GIVEN_UP)
                )
            else:
                front = Server(self._runtime, self._registry, self._main)
        except OSError as exc:
            log.error("cannot listen on %s: %s", self._config.addr, exc.strerror or exc)
            return EXIT_FAILURE
        try:
            self._start_main()
        except (SpawnError, RuntimeError) as exc:
            log.error("main process: %s", exc)
            front.close()
            reason = exc.reason if isinstance(exc, SpawnError) else Reason.START_FAILED
            return {Reason.NOT_FOUND: 127, Reason.NOT_EXECUTABLE: 126}.get(reason, EXIT_FAILURE)
        try:
            if self._health is not None:
                self._runtime.pool.submit(self._health.run)
            front.start()
        except RuntimeError as exc:
            log.error("cannot start: %s", exc)
            self._stop_main(signal.SIGTERM)
            return self._end(front, failed=True)
        event = self._wait(front)
        self._stop_main(signal.SIGTERM if event == BACKEND_GIVEN_UP else event)
        return self._end(front, failed=event == BACKEND_GIVEN_UP)

    def _start_threads(self) -> None:
        """Start what would come too late once the system refuses threads: then something has to go on without.

        Raises:
            RuntimeError: if it refuses them already.
        """
        runtime = self._runtime
        runtime.reaper.start()
        runtime.pool.start_retrying()
        runtime.books.start()
        self._registry.start_parking(runtime.end_later)

    def _receive_signals(self) -> None:
        """Take over the signals in a thread of their own, before any other thread exists.

        A Python handler would run in the main thread, and only once that wakes:
        the kernel may give the signal to any thread (signal(7)), which wakes no
        other. Blocked in every thread, it stays pending until sigwait(3) has it.
        """
        signal.pthread_sigmask(signal.SIG_SETMASK, PASSED_SIGNALS | TERMINAL_STOPS)

        def receive() -> None:
            while True:
                self._events.put(signal.sigwait(PASSED_SIGNALS))

        threading.Thread(target=receive, name="signals", daemon=True).start()

    def _start_main(self) -> None:
        main = self._main
        if main is None:
            return
        if self._config.copy_output:
            self._copier = OutputCopier(main)
            self._runtime.pool.submit(self._copier.run)
        if self._health is not None:
            main.call_on_exit(self._health.stop)
        main.call_on_exit(lambda: self._events.put(MAIN_ENDED))
        main.start()

    def _wait(self, front: Server | ReverseDialer) -> int:
        """Wait for what ends the agent, and return it: a signal, MAIN_ENDED or BACKEND_GIVEN_UP."""
        ends_with_main = self._config.exit_with_main or bool(self._config.callback)
        while True:
            event = self._next_event()
            if event == self._config.lifetime_signal:
                self._registry.expire()
            if event in self._stop_signals:
                log.info("%s: stopping", signal.Signals(event).name)
                return event
            if event == BACKEND_GIVEN_UP or (event == MAIN_ENDED and ends_with_main):
                return event
            if event == signal.SIGHUP and self._config.reloadable:
                try:
                    self._runtime.pool.submit(front.reload)
                except RuntimeError as exc:
                    log.error("cannot reload: %s", exc)
                if self._main is not None and self._main.child is not None and handles_signal(self._main.child, event):
                    self._signal_main(event)
            elif event > 0 and self._main is not None and not self._main.exited.is_set():
                self._signal_main(event)
                # Ctrl-C: a main process that handles it goes on; else both have been told to end.
                ends_with_main |= event == signal.SIGINT
            elif event in ENDING_SIGNALS:
                log.info("%s: stopping", signal.Signals(event).name)
                return event

    def _next_event(self) -> int:
        """The next event; meanwhile the lifetime may expire."""
        while True:
            left = None if self._expires == math.inf else max(self._expires - time.monotonic(), 0)
            try:
                return self._events.get(timeout=left)
            except queue.Empty:
                self._expires = math.inf
                self._registry.expire()

    def _signal_main(self, number: int) -> None:
        assert self._main is not None
        try:
            self._main.send_signal(number, alone=not self._config.signal_group)
        except PermissionError:
            log.error("cannot signal the main process: it belongs to another user")

    def _stop_main(self, number: int) -> None:
        """End the main process: the stop signal, the stop timeout or being told again, SIGKILL."""
        main = self._main
        if main is None:
            return
        if not main.exited.is_set() and number > 0:
            self._signal_main(self._config.stop_signal)
            deadline = time.monotonic() + self._config.stop_timeout
            while not main.exited.is_set():
                try:
                    again = self._events.get(timeout=max(deadline - time.monotonic(), 0))
                except queue.Empty:
                    log.warning("the main process did not end within %g s: SIGKILL", self._config.stop_timeout)
                    break
                if again in self._stop_signals or again == signal.SIGINT:
                    log.warning("stopped a second time: SIGKILL")
                    break
                if again > 0:
                    self._signal_main(again)
        if not main.exited.is_set():
            self._signal_main(signal.SIGKILL)
            if not main.exited.wait(KILL_LINGER):
                log.error("the main process cannot be killed: the agent ends without it")
        main.finished.wait(self._config.drain_timeout + LINGER)

    def _deliver(self, peers: Sequence[Peer]) -> None:
        """Wait while peers take what is theirs, the exit code last; for stop_timeout seconds at most."""
        now = time.monotonic()
        limit = now + max(self._config.stop_timeout, LINGER)
        waiting = {peer: (-1, now) for peer in peers}
        while waiting and now < limit:
            for peer, (before, since) in list(waiting.items()):
                taken = peer.taken()
                if taken is None or (taken == before and now - since > LINGER):
                    del waiting[peer]
                elif taken != before:
                    waiting[peer] = (taken, now)
            time.sleep(0.005)
            now = time.monotonic()

    def _end(self, front: Server | ReverseDialer, failed: bool) -> int:
        """Tell everybody, end every process, and return the exit code."""
        front.close()
        self._registry.close()
        if self._health is not None:
            self._health.stop()
        peers = self._registry.peers()
        self._deliver(peers)
        deadline = time.monotonic() + CLOSE_LINGER
        for peer in peers:
            peer.linger(max(deadline - time.monotonic(), 0))
        self._runtime.books.because(Cause.AGENT)
        if self._main is not None:
            self._main.end(0)
        for peer in peers:
            peer.abandon()
        self._registry.abandon_parked()
        self._runtime.archives.wait(LINGER)  # where a file has a name from its beginning, it is removed
        # Daemons whose command or connection has ended before, too.
        end_processes(None, self._config.kill_timeout)
        closing = [threading.Thread(target=peer.close, args=(CloseCode.GOING_AWAY, "agent ends")) for peer in peers]
        with contextlib.suppress(RuntimeError):  # no thread left: the others see the connection's end
            for thread in closing:
                thread.daemon = True
                thread.start()
        for thread in closing:
            if thread.ident is not None:
                thread.join(CLOSE_TIMEOUT)
        if self._health is not None:
            self._health.ended.wait(LINGER)
        self._runtime.endings.wait(self._config.kill_timeout + LINGER)
        if self._copier is not None:
            self._copier.finished.wait(LINGER)
        end_processes(None, 0)  # what was being started meanwhile
        self._runtime.books.close(LINGER)
        code = self._main.code if self._main is not None else 0
        code = EXIT_FAILURE if code is None else self._config.exit_codes.get(code, code)
        code = code or EXIT_FAILURE if failed else code
        log.info("agent ends: exit code %d", code)
        return code


PROBE_TIMEOUT = 10.0  # seconds


def probe(address: Address, tls: bool) -> str:
    """Ask an agent for its health, as a HEALTHCHECK in an image that has no curl; returns what is wrong, or nothing."""
    import http.client  # only here: an agent that serves has no use for it

    where = (address.host or "127.0.0.1", address.port)
    connection = http.client.HTTPConnection(*where, timeout=PROBE_TIMEOUT)
    if tls:
        # Not verified, as by Kubernetes' probes: the certificate is for the name by which others know the container.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(*where, timeout=PROBE_TIMEOUT, context=context)
    try:
        if address.path:
            connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.sock.settimeout(PROBE_TIMEOUT)
            connection.sock.connect(address.path)
        connection.request("GET", "/health", headers={"Host": "localhost"})
        response = connection.getresponse()
        state = json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError) as exc:
        return f"no answer from {address}: {getattr(exc, 'strerror', None) or exc}"
    finally:
        connection.close()
    if response.status != 200 or not isinstance(state, dict) or state.get("status") != "ok":
        return f"{address} is no healthy agent: HTTP status {response.status}"
    if state.get("exited"):
        return f"the main process has ended: exit code {state.get('exitCode')}"
    if state.get("health", {}).get("status") == "unhealthy":
        return f"the health check has failed {state['health'].get('failingStreak')} times"
    return ""


def ensure_standard_descriptors() -> None:
    """Open /dev/null in place of a closed stdin, stdout or stderr.

    Else the next pipe would get its number, and posix_spawn's dup2 would take
    it for the child's end.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            assert opened == fd  # open(2) gives the lowest that is free
            os.set_inheritable(fd, True)


def open_books(config: Config, handler: LogHandler) -> Books:
    """The books of an agent.

    Raises:
        OSError: if the audit log cannot be opened.
    """
    counters = Counters(lambda: handler.lost)
    if config.audit_log == "-":
        return Books(counters, AuditLines(handler, counters))
    if config.audit_log:
        formatter = LogFormatter("json", secrets_of(config))
        return Books(counters, AuditLog(config.audit_log, counters, formatter))
    return Books(counters)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the agent; ends the process with its exit code."""
    ensure_standard_descriptors()
    try:
        config = load_config(sys.argv[1:] if argv is None else argv, os.environ)
    except ConfigError as exc:
        print(f"sockerless-agent: {exc}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    if config.probe:
        fault = probe(config.addr, bool(config.tls_cert))
        if fault:
            print(fault)
        sys.exit(EXIT_FAILURE if fault else 0)
    handler = set_up_logging(config)
    threading.excepthook = log_thread_failure
    forget_coerced_locale()
    hide_secrets([*config.tokens, os.environ.get("SOCKERLESS_AGENT_TOKEN", ""), config.callback.given])
    hide_memory()
    share_malloc_arena()
    give_back_memory()  # 18 MiB, if Python has just compiled this file; the watchdog would keep them, too
    roll = None
    if os.getpid() != 1:  # the kernel ends everything with a PID 1
        try:
            roll = start_watchdog(config.kill_timeout)
        except OSError as exc:
            log.warning("no watchdog: if the agent is killed, its commands live on: %s", exc.strerror)
    try:
        books = open_books(config, handler)
    except OSError as exc:
        print(f"sockerless-agent: flag --audit-log: cannot open {config.audit_log!r}: {exc.strerror}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    try:
        code = Agent(config, books, roll).run()
    except Exception:
        log.exception("unexpected error")
        code = EXIT_FAILURE
    logging.shutdown()
    # Not sys.exit(): that would wait for threads, and nothing may keep an init from ending.
    os._exit(code)


if __name__ == "__main__":
    main()

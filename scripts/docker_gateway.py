#!/usr/bin/env python3
"""A Docker Engine API endpoint that shows each agent as a container.

    scripts/docker-gateway -H unix:///tmp/agents.sock --agent web=127.0.0.1:9111 &
    DOCKER_HOST=unix:///tmp/agents.sock docker exec -it web sh

Agents are dialled (--agent), or dial in (--listen). What Docker has and an agent
has not (images, networks, creating a container) is refused with a sentence.

The file reads top-down: errors, values in Docker's format, events, sessions on
an agent, containers, what the gateway knows, HTTP, the API by subject, the
routing table, the command line.
"""

from __future__ import annotations

import argparse
import base64
import bz2
import collections
import contextlib
import dataclasses
import errno
import fcntl
import fnmatch
import functools
import hashlib
import http
import http.server
import io
import itertools
import json
import logging
import lzma
import math
import os
import platform
import re
import secrets
import select
import shlex
import signal
import socket
import ssl
import struct
import sys
import termios
import threading
import time
import urllib.parse
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar, NoReturn, cast

from websockets.datastructures import Headers
from websockets.http11 import Response as HTTPResponse

from agent import (
    HEAD_LIMIT,
    RETRY_PAUSE,
    Address,
    Attach,
    CloseStdin,
    Doorway,
    Exec,
    Guest,
    Output,
    Reason,
    Resize,
    ServerTLS,
    Signal,
    Started,
    Stream,
    ThreadPool,
    TLSStream,
    __version__,
    delay_after,
    make_client_tls,
    open_listener,
    parse_address,
    parse_signal,
    peer_certificate,
    read_token_file,
)
from agent_client import (
    RESUME_PATIENCE,
    AgentConn,
    AgentProcess,
    ClientError,
    CommandNotExecutable,
    CommandNotFound,
    ConnectionLost,
    ReverseAgentConn,
    ReverseListener,
    SessionError,
    encode_docker_frame,
    fetch_health,
    read_duration,
    read_server_tls,
)

log = logging.getLogger("sockerless.gateway")

API_VERSION = (1, 47)
MIN_API_VERSION = (1, 24)
IMAGE = "sockerless-agent"  # what the containers are said to be made of
CHUNK = 256 << 10  # bytes in one read
BODY_LIMIT = 1 << 20  # bytes of a JSON body
BODY_TIMEOUT = 30.0  # seconds for all of one to come; an archive takes what it takes
SKIP_TIMEOUT = 2.0  # seconds to wait for the rest of a request that was refused
IDLE_TIMEOUT = 300.0  # seconds from an answer to the next request on its connection
UNSENT_LIMIT = 64 << 20  # bytes of output that may wait for a Docker client; version 2 agents are held back at 1 MiB
REDIAL_PAUSES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # seconds; the last one again and again
SIGNAL_TIMEOUT = 1.0  # seconds to wait for the refusal of a signal
POLL_INTERVAL = 2.0  # seconds between two questions whether the main process still runs
ANSWER_TIMEOUT = 10.0  # seconds for an answer of an agent
LINGER = 5.0  # seconds that a client has to close a hijacked connection after the end of its output
GOODBYE_TIMEOUT = 60.0  # seconds that a client with TLS may take nothing at the end of the output
HEAD_PATIENCE = 1.0  # seconds for a client to read the head of an answer before the first output is sent
TCP_HEAD_PAUSE = 0.01  # the same where it cannot be seen
KEPT_EXECS = 4096  # of which those that have ended, or never began, are forgotten first
KEPT_EVENTS = 256  # as many as dockerd keeps for "since"
STOP_TIMEOUT = 10  # seconds from SIGTERM to SIGKILL, as docker stop has it
SINCE_NOW = 2.0  # seconds in which a "since" still means now: clients cut a time to whole seconds
STATS_INTERVAL = 1.0  # seconds, as dockerd has it
DETACH_KEYS = b"\x10\x11"  # Ctrl-P Ctrl-Q
NEVER = "0001-01-01T00:00:00Z"  # Go's zero time
RAW_STREAM = "application/vnd.docker.raw-stream"
MULTIPLEXED_STREAM = "application/vnd.docker.multiplexed-stream"

pool = ThreadPool()


# ══════════════════════════════════════════════════════════════════════════════
# Errors: each is one HTTP status; the sentence is Docker's "message"
# ══════════════════════════════════════════════════════════════════════════════


class APIError(Exception):
    """What is answered instead of a result."""

    status = http.HTTPStatus.INTERNAL_SERVER_ERROR


class BadParameter(APIError):
    """The request makes no sense."""

    status = http.HTTPStatus.BAD_REQUEST


class Forbidden(APIError):
    """A web page sent it."""

    status = http.HTTPStatus.FORBIDDEN


class NotFound(APIError):
    """There is no such thing."""

    status = http.HTTPStatus.NOT_FOUND


class TooSlow(APIError):
    """The request did not come within its time."""

    status = http.HTTPStatus.REQUEST_TIMEOUT


class Conflict(APIError):
    """Not in the state that the thing is in."""

    status = http.HTTPStatus.CONFLICT


class NotSupported(APIError):
    """Docker can, an agent cannot."""

    status = http.HTTPStatus.NOT_IMPLEMENTED


class NotModified(APIError):
    """It is so already; answered without a body."""

    status = http.HTTPStatus.NOT_MODIFIED


# ══════════════════════════════════════════════════════════════════════════════
# Values in Docker's format
# ══════════════════════════════════════════════════════════════════════════════


def rfc3339(seconds: float) -> str:
    """A time as Docker's API writes it; 0 is Go's zero time."""
    if not seconds:
        return NEVER
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000Z")


def parse_time(text: str, name: str) -> float | None:
    """Seconds since the epoch of a ``since`` or ``until``; None without one.

    Clients convert dates and durations themselves: what arrives is ``seconds[.nanoseconds]``.
    """
    if text in ("", "0"):
        return None
    with contextlib.suppress(ValueError):
        seconds = float(text)
        if not math.isfinite(seconds):
            raise BadParameter(f"invalid value for {name!r}: {text!r}")
        return seconds
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        raise BadParameter(f"invalid value for {name!r}: {text!r}") from None
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()


def human_duration(seconds: float) -> str:
    """As docker ps says it (docker/go-units, HumanDuration)."""
    whole = int(seconds)
    minutes, hours = whole // 60, round(whole / 3600)
    if whole < 1:
        return "Less than a second"
    if whole == 1:
        return "1 second"
    if whole < 60:
        return f"{whole} seconds"
    if minutes == 1:
        return "About a minute"
    if minutes < 60:
        return f"{minutes} minutes"
    if hours == 1:
        return "About an hour"
    if hours < 48:
        return f"{hours} hours"
    if hours < 24 * 7 * 2:
        return f"{hours // 24} days"
    if hours < 24 * 30 * 2:
        return f"{hours // 24 // 7} weeks"
    if hours < 24 * 365 * 2:
        return f"{hours // 24 // 30} months"
    return f"{hours // 24 // 365} years"


def parse_detach_keys(text: str) -> bytes:
    """The bytes of a detach sequence such as ``ctrl-p,ctrl-q`` (moby/term, ToBytes); "" is the default."""
    if not text:
        return DETACH_KEYS
    keys = bytearray()
    for key in text.split(","):
        control = key[len("ctrl-") :].lower() if key.lower().startswith("ctrl-") else ""
        if len(key) == 1 and key.isascii():
            keys += key.encode()
        elif len(control) == 1 and (control in "@[\\]^_" or "a" <= control <= "z"):
            keys.append(ord(control.upper()) - 64)
        else:
            raise BadParameter(f"Invalid detach keys ({text}) provided")
    return bytes(keys)


class DetachFilter:
    """Looks for the detach keys in what is typed; a part of them is held back until the next key decides."""

    def __init__(self, keys: bytes) -> None:
        self._keys = keys
        self._held = b""

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """What to pass on, and whether the keys were typed."""
        data = self._held + data
        found = data.find(self._keys)
        if found >= 0:
            self._held = b""
            return data[:found], True
        kept = next((size for size in range(len(self._keys) - 1, 0, -1) if data.endswith(self._keys[:size])), 0)
        self._held = data[len(data) - kept :]
        return data[: len(data) - kept], False


class Filters:
    """The ``filters`` of a list or of events: each name with the values of which one must match."""

    def __init__(self, text: str, known: Iterable[str]) -> None:
        """Read a JSON map of lists, or of maps as clients before API 1.22 sent them."""
        try:
            raw = json.loads(text) if text else {}
            self.values = {name: [str(value) for value in values] for name, values in raw.items()}
        except (ValueError, AttributeError, TypeError):
            raise BadParameter(f"invalid filters: {text[:200]!r}") from None
        for name in self.values:
            if name not in known:
                raise BadParameter(f"invalid filter '{name}'")

    def get(self, name: str) -> list[str]:
        return self.values.get(name, [])

    def accepts(self, name: str, matches: Callable[[str], bool]) -> bool:
        """Whether one of the values matches, or there is no such filter."""
        return name not in self.values or any(matches(value) for value in self.values[name])

    def accepts_labels(self, labels: Mapping[str, str]) -> bool:
        """Whether all of ``label`` are there: ``name`` or ``name=value``."""
        for wanted in self.get("label"):
            name, equals, value = wanted.partition("=")
            if name not in labels or (equals and labels[name] != value):
                return False
        return True


def matches_text(pattern: str, text: str) -> bool:
    """As dockerd matches names and ids: equal, or a regular expression that is found in it."""
    try:
        return pattern == text or re.search(pattern, text) is not None
    except re.error:
        return False


def start_failure(error: SessionError, command: str, workdir: str, user: str) -> tuple[int, str]:
    """The exit code and the sentence of dockerd and runc for a command that did not start, as it was asked for."""
    head = "OCI runtime exec failed: exec failed: unable to start container process: "
    name = json.dumps(command)
    words = str(error)
    owner, _, group = user.partition(":")
    if words.startswith("no such user"):
        return 126, f"unable to find user {owner}: no matching entries in passwd file"
    if words.startswith("no such group"):
        return 126, f"unable to find group {group}: no matching entries in group file"
    if "cannot start: working directory" in words:
        reasons = ("no such file or directory", "not a directory", "permission denied")
        reason = next((reason for reason in reasons if words.endswith(reason)), reasons[0])
        return 126, f"{head}chdir to cwd ({json.dumps(workdir)}) set in config.json failed: {reason}: unknown"
    if isinstance(error, CommandNotFound):
        if "/" in command:
            return 127, f"{head}exec: {name}: stat {command}: no such file or directory: unknown"
        return 127, f"{head}exec: {name}: executable file not found in $PATH: unknown"
    if isinstance(error, CommandNotExecutable):
        reason = "exec format error" if "format" in words.lower() else "permission denied"
        if "directory" in words.lower():
            reason = "is a directory"
        return 126, f"{head}exec: {name}: {reason}: unknown"
    return 126, f"{head}{error}: unknown"


class Fields:
    """The fields of a JSON object that a client sent, each of the type that dockerd wants of it.

    What is wrong is said in the words of Go's encoding/json, which name the field.
    """

    def __init__(self, struct: str, values: Mapping[str, Any]) -> None:
        """Names in ``values`` are in lower case; ``struct`` is what dockerd calls the object."""
        self._struct = struct
        self._values = values

    def text(self, name: str) -> str:
        return self._text(name, self._take(name, str, "string") or "")

    def flag(self, name: str) -> bool:
        return bool(self._take(name, bool, "bool"))

    def texts(self, name: str) -> tuple[str, ...]:
        items = self._take(name, list, "[]string") or []
        for item in items:
            if item is not None and not isinstance(item, str):
                raise self._fault(name, item, "string")
        return tuple(self._text(name, item or "") for item in items)

    def size(self, name: str) -> tuple[int, int] | None:
        """Columns and rows of a terminal, which the API has the other way round; None without, or beyond all bounds."""
        size = self._take(name, list, "[2]uint")
        if not size:
            return None
        if len(size) != 2 or any(type(number) is not int for number in size):
            raise BadParameter(f"invalid console size: {size!r}")
        rows, columns = size
        return (columns, rows) if 0 < rows < 65536 and 0 < columns < 65536 else None

    def _take(self, name: str, wanted: type, go_type: str) -> Any:
        value = self._values.get(name.lower())
        if value is not None and not isinstance(value, wanted):
            raise self._fault(name, value, go_type)
        return value

    def _text(self, name: str, value: str) -> str:
        # As Go reads half a surrogate pair, which is no text.
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def _fault(self, name: str, value: object, go_type: str) -> BadParameter:
        kinds = {str: "string", bool: "bool", list: "array", dict: "object"}
        kind = kinds.get(type(value), "number")
        return BadParameter(
            f"invalid JSON: json: cannot unmarshal {kind} into Go struct field {self._struct}.{name} of type {go_type}"
        )


# ══════════════════════════════════════════════════════════════════════════════
# Events
# Threads: any thread publishes, each subscriber takes from its own.
# ══════════════════════════════════════════════════════════════════════════════


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a container."""

    action: str
    container_id: str
    attributes: Mapping[str, str]
    when: int  # nanoseconds since the epoch

    def to_json(self) -> dict[str, Any]:
        return {
            "status": self.action,
            "id": self.container_id,
            "from": self.attributes.get("image", ""),
            "Type": "container",
            "Action": self.action,
            "Actor": {"ID": self.container_id, "Attributes": dict(self.attributes)},
            "scope": "local",
            "time": self.when // 10**9,
            "timeNano": self.when,
        }


class Subscription:
    """The events from a moment on, for one thread that takes them."""

    def __init__(self, past: Iterable[Event]) -> None:
        self._changed = threading.Condition()  # guards the attributes below
        self._events = collections.deque(past)
        self._closed = False

    def put(self, event: Event) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    def take(self, timeout: float | None) -> Event | None:
        """Wait for the next event; None once it is closed, or nothing came in ``timeout`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._events or self._closed, timeout)
            return self._events.popleft() if self._events and not self._closed else None

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class EventBus:
    """What happened lately, and who wants to hear what will."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the attributes below
        self._past: collections.deque[Event] = collections.deque(maxlen=KEPT_EVENTS)
        self._subscriptions: set[Subscription] = set()

    def publish(self, event: Event) -> None:
        with self._lock:
            self._past.append(event)
            for subscription in self._subscriptions:
                subscription.put(event)

    @contextlib.contextmanager
    def subscribe(self, since: float | None) -> Iterator[Subscription]:
        """Events from ``since`` on, of which the newest KEPT_EVENTS are still known; None for new ones only."""
        with self._lock:
            past = [event for event in self._past if since is not None and event.when >= since * 1e9]
            subscription = Subscription(past)
            self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            with self._lock:
                self._subscriptions.discard(subscription)


# ══════════════════════════════════════════════════════════════════════════════
# Sessions on an agent
# Threads: the connection's receiving thread fills a queue and reports the end,
# one thread takes the output, any thread writes and signals.
# ══════════════════════════════════════════════════════════════════════════════


class OutputQueue:
    """A session's output over both streams, in its order, for one thread that takes it.

    Args:
        on_end: called once, from the receiving thread, with the exit code or None.
    """

    def __init__(self, on_end: Callable[[int | None], None] | None = None) -> None:
        self._on_end = on_end
        self._consumed: Callable[[int], None] = lambda count: None
        self._changed = threading.Condition()  # guards the attributes below
        self._chunks: collections.deque[tuple[Stream, bytes, int]] = collections.deque()  # the last: bytes of output
        self._size = 0
        self._dropping = False
        self.start: Started | None = None
        self._ended = False
        self.ended_at = 0.0  # after on_end
        self.code: int | None = None
        self.error: ClientError | None = None

    def tell_consumed(self, consumed: Callable[[int], None]) -> None:
        self._consumed = consumed

    def started(self, event: Started) -> None:
        with self._changed:
            self.start = event
            self._changed.notify_all()

    def wait_started(self) -> Started | None:
        """Wait until the agent has said that it has started; None if it did not, or speaks version 1."""
        with self._changed:
            self._changed.wait_for(lambda: self.start is not None or self.ended_at or self._dropping)
            return self.start

    def output(self, event: Output) -> None:
        data = event.data
        if event.lost and not data:
            data = b"[%d bytes of output are missing: the reader was too slow]\n" % event.lost
        with self._changed:
            dropped = self._dropping or self._ended
            if not dropped:
                self._chunks.append((event.stream, data, len(event.data)))
                self._size += len(event.data)
                self._changed.notify_all()
            overflow = self._size > UNSENT_LIMIT  # of version 1, which holds nothing back
        if dropped:
            self._consumed(len(event.data))
        if overflow:
            self.failed(SessionError(f"more than {UNSENT_LIMIT} bytes of output were not read"))

    def warning(self, error: SessionError) -> None:
        self.output(Output("", Stream.STDERR, f"{error}\n".encode()))

    def ended(self, code: int) -> None:
        self._end(code, None)

    def failed(self, error: ClientError) -> None:
        self._end(None, error)

    def _end(self, code: int | None, error: ClientError | None) -> None:
        with self._changed:
            if self._ended:
                return
            self.code, self.error, self._ended = code, error, True
        # Before the reader is told: who then asks for the exit code finds it.
        if self._on_end is not None:
            self._on_end(code)
        with self._changed:
            self.ended_at = time.time()
            self._changed.notify_all()

    def take(self, timeout: float | None = None) -> tuple[Stream, bytes] | None:
        """Wait for the next output; None at the end, once it is dropped, or after ``timeout`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._chunks or self.ended_at or self._dropping, timeout)
            if not self._chunks:
                return None
            stream, data, count = self._chunks.popleft()
            self._size -= count
        self._consumed(count)
        return stream, data

    def __iter__(self) -> Iterator[tuple[Stream, bytes]]:
        """The output up to the end."""
        while (item := self.take()) is not None:
            yield item

    def drop(self) -> None:
        """Nobody takes any more; the session goes on, and is not held up by what it writes."""
        with self._changed:
            count, self._size = self._size, 0
            self._dropping = True
            self._chunks.clear()
            self._changed.notify_all()
        self._consumed(count)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end; False after ``timeout`` seconds."""
        with self._changed:
            return bool(self._changed.wait_for(lambda: self.ended_at, timeout))

    @property
    def is_over(self) -> bool:
        """Whether the session has ended, of which some output may still wait."""
        with self._changed:
            return self._ended


class Session:
    """A command, or an attachment, on an agent's connection."""

    def __init__(self, conn: AgentConn, request: Exec | Attach, queue: OutputQueue) -> None:
        self.id = request.id
        self.conn = conn
        self.queue = queue
        self._exit_follows = isinstance(request, Exec)
        self._channel = conn.open_channel(request.id)
        self.request = request

    def start(self) -> None:
        """Send the request. Raises ConnectionLost."""
        self.conn.start_session(self.request, self.queue)

    def write(self, data: bytes) -> None:
        """Send to stdin; waits while the command does not read, is harmless once it has ended."""
        for start in range(0, len(data), CHUNK):
            if self.queue.is_over or not self._channel.wait_for_room():
                return
            self._channel.put(Stream.STDIN, data[start : start + CHUNK])

    def close_stdin(self) -> None:
        self._channel.send(CloseStdin(self.id))

    def resize(self, columns: int, rows: int) -> None:
        self.conn.send(Resize(self.id, columns, rows))

    def signal(self, number: int) -> None:
        self.conn.send(Signal(self.id, str(number)))

    def end(self) -> None:
        """End the command with all its descendants; or leave the attached process alone from now on."""
        self.conn.end_session(self.id, self._exit_follows)
        if not self._exit_follows:
            self.queue.failed(SessionError("detached"))


# ══════════════════════════════════════════════════════════════════════════════
# Containers: one for each agent
# Threads: a monitor for each changes the state, with the connection's receiving
# thread; any thread reads it.
# ══════════════════════════════════════════════════════════════════════════════


class WatchedConn(AgentConn):
    """A dialled connection of which one can wait for the end."""

    _renewable = False  # its Dialler makes another, and then knows of it

    def wait_closed(self) -> None:
        self._thread.join()


@dataclasses.dataclass(frozen=True, slots=True)
class MainProcess:
    """What is known of an agent's main process."""

    pid: int = 0
    cmd: tuple[str, ...] = ()
    tty: bool = False
    started_at: float = 0.0  # seconds since the epoch, as all times here
    exited: bool = False
    code: int = 0
    exited_at: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """A container at one moment.

    Attributes:
        status: ``running``; ``exited`` once the main process has, though the agent may still be there; ``dead``
            while the agent does not answer.
        main: None for an agent without a main process.
        health: the agent's ``health``: ``status``, ``failingStreak``, ``log``; None without checks.
    """

    status: str
    main: MainProcess | None = None
    health: Mapping[str, Any] | None = None
    started_at: float = 0.0
    finished_at: float = 0.0
    error: str = ""

    @property
    def running(self) -> bool:
        return self.status == "running"

    @property
    def exit_code(self) -> int:
        if self.running:
            return 0
        return self.main.code if self.main is not None and self.main.exited else 255

    def words(self) -> str:
        """The STATUS of docker ps."""
        now = time.time()
        if self.running:
            health = f" ({self.health_status()})" if self.health is not None else ""
            if health == " (starting)":
                health = " (health: starting)"
            return f"Up {human_duration(now - self.started_at)}{health}"
        if self.status == "dead":
            return "Dead"
        return f"Exited ({self.exit_code}) {human_duration(now - self.finished_at)} ago"

    def health_status(self) -> str:
        return str(self.health.get("status", "none")) if self.health is not None else "none"


class Container:
    """An agent as Docker's clients see it.

    Attributes:
        id: 64 hexadecimal digits that are the same for a name wherever the gateway runs.
    """

    def __init__(self, name: str, labels: Mapping[str, str], events: EventBus) -> None:
        self.name = name
        self.id = hashlib.sha256(f"sockerless-agent/{name}".encode()).hexdigest()
        self.labels = dict(labels)
        self.created_at = time.time()
        self._events = events
        self.changed = threading.Condition()  # guards the attributes below
        self._conn: AgentConn | None = None
        self._state = State("dead", error="the agent has not answered yet")
        self.removed = False

    @property
    def state(self) -> State:
        with self.changed:
            return self._state

    def has_ended(self, before: State) -> bool:
        """Whether it does not run, or was started anew since ``before``, when it ran."""
        now = self.state
        return not now.running or (before.running and now.started_at != before.started_at)

    def connection(self) -> AgentConn:
        """The agent's connection. Raises Conflict while there is none."""
        with self.changed:
            if self._conn is None:
                raise Conflict(f"container {self.id} is not running: {self._state.error}")
            return self._conn

    def modern_connection(self, what: str) -> AgentConn:
        """The same, for what version 1 of the protocol has not."""
        conn = self.connection()
        if conn.version == 1:
            raise NotSupported(f"{what}: the agent of {self.name} speaks version 1 of the protocol, which has none")
        return conn

    def main_process(self) -> MainProcess:
        """Raises Conflict without one."""
        main = self.state.main
        if main is None:
            raise Conflict(f"container {self.name} has no main process: its agent runs without --keep-alive")
        return main

    def publish(self, action: str, **attributes: object) -> None:
        extra = {name: str(value) for name, value in attributes.items()}
        details = {"image": IMAGE, "name": self.name, **self.labels, **extra}
        self._events.publish(Event(action, self.id, details, time.time_ns()))

    # What the monitor says.

    def connected(self, conn: AgentConn, main: MainProcess | None, health: Mapping[str, Any] | None) -> None:
        with self.changed:
            self._conn = conn
            started = main.started_at if main is not None and main.started_at else time.time()
            self.created_at = min(self.created_at, started)
            self._state = State("running", main, health, started)
            self.changed.notify_all()
        self.publish("start")
        if main is not None and main.exited:
            self.main_exited(main.code, main.exited_at)

    def main_exited(self, code: int, when: float = 0.0) -> None:
        with self.changed:
            state = self._state
            if not state.running or state.main is None:
                return
            main = dataclasses.replace(state.main, exited=True, code=code, exited_at=when or time.time())
            self._state = dataclasses.replace(state, status="exited", main=main, finished_at=main.exited_at)
            self.changed.notify_all()
        self.publish("die", exitCode=code)

    def health_changed(self, health: Mapping[str, Any] | None) -> None:
        with self.changed:
            before, self._state = self._state, dataclasses.replace(self._state, health=health)
            now = self._state
            self.changed.notify_all()
        if now.health is not None and now.health_status() != before.health_status():
            self.publish(f"health_status: {now.health_status()}")

    def disconnected(self, error: str) -> None:
        with self.changed:
            state, self._conn = self._state, None
            was_running = state.running
            # An exit code stays known after the agent has ended, too.
            status = "exited" if state.status == "exited" else "dead"
            finished = state.finished_at if not was_running else time.time()
            self._state = dataclasses.replace(state, status=status, error=error, finished_at=finished)
            self.changed.notify_all()
        if was_running:
            self.publish("die", exitCode=255)

    def remove(self) -> None:
        with self.changed:
            self.removed = True
            self.changed.notify_all()
        self.publish("destroy")


class Monitor:
    """Learns of an agent's main process and health while it is connected, and tells its container."""

    def __init__(
        self, container: Container, conn: AgentConn, addr: str = "", tls: ssl.SSLContext | None = None
    ) -> None:
        """``addr`` and ``tls`` are as for AgentConn.dial(); without an address it is an agent in reverse mode."""
        self._container = container
        self._conn = conn
        self._addr = addr
        self._tls = tls
        self._over = threading.Event()

    def begin(self) -> None:
        """Ask the agent, and tell the container that it is connected. Raises ClientError."""
        if self._conn.version == 1:
            answer = fetch_health(self._addr, self._tls) if self._addr else {}
            main = MainProcess(pid=int(answer["pid"])) if "pid" in answer else None
            self._container.connected(self._conn, main, answer.get("health"))
            self._take_health(answer)
            if self._addr:
                pool.submit(self._poll, lambda: fetch_health(self._addr, self._tls))
            return
        self._conn.on_health = self._take_health
        self._conn.on_outage = self._take_outage
        self._learn(self._ask_main())
        pool.submit(self._poll, self._conn.health)

    def _ask_main(self) -> MainProcess | None:
        entries = [entry for entry in self._conn.sessions() if entry.get("kind") == "main"]
        return main_process(entries[0]) if entries else None

    def _learn(self, main: MainProcess | None) -> None:
        answer = self._conn.health()
        self._container.connected(self._conn, main, answer.get("health"))
        self._take_health(answer)

    def _take_outage(self, lost: bool) -> None:
        if not lost:
            try:
                pool.submit(self._look_again)
            except RuntimeError as exc:  # the receiving thread is to go on
                log.error("agent %s: cannot see whether it was started anew: %s", self._container.name, exc)

    def _look_again(self) -> None:
        """The connection was made again, maybe with an agent that was started anew: that has another main process."""
        try:
            main, before = self._ask_main(), self._container.state.main
            if (main and (main.pid, main.started_at)) != (before and (before.pid, before.started_at)):
                log.info("agent %s: started anew", self._container.name)
                self._container.disconnected("its agent was started anew")
                self._learn(main)
        except ClientError as exc:  # it was lost again, and comes again
            log.debug("%s: %s", self._container.name, exc)

    def end(self) -> None:
        self._over.set()

    def _poll(self, ask: Callable[[], Mapping[str, Any]]) -> None:
        """What nobody pushes: the main process's end. Who waits for that learns of it at once, see watch_main()."""
        while not self._over.wait(POLL_INTERVAL):
            state = self._container.state
            if not state.running or state.main is None:
                continue
            try:
                self._take_health(ask())
            except ClientError as exc:
                log.debug("%s: %s", self._container.name, exc)

    def _take_health(self, answer: Mapping[str, Any]) -> None:
        if self._over.is_set():
            return
        self._container.health_changed(answer.get("health"))
        if answer.get("exited"):
            self._container.main_exited(int(answer.get("exitCode", 0)))


def main_process(entry: Mapping[str, Any]) -> MainProcess:
    """A main process from its entry in an agent's list of sessions."""
    return MainProcess(
        pid=int(entry.get("pid", 0)),
        cmd=tuple(entry.get("cmd") or ()),
        tty=bool(entry.get("tty")),
        started_at=float(entry.get("started_at") or 0),
        exited="code" in entry,
        code=int(entry.get("code", 0)),
        exited_at=float(entry.get("ended_at") or 0),
    )


class Dialler:
    """Keeps one agent in server mode connected, in a thread of its own."""

    def __init__(
        self,
        container: Container,
        addr: str,
        token: str | None,
        patience: float,
        make_tls: Callable[[], ssl.SSLContext | None],
    ) -> None:
        """``make_tls`` is asked at each dial: a certificate that was replaced is shown from the next one on."""
        self._container = container
        self._addr = addr
        self._token = token
        self._make_tls = make_tls
        self._patience = patience  # seconds for which sessions wait for a lost connection
        self._stopping = threading.Event()
        self._conn: WatchedConn | None = None  # the thread's, until it has ended
        self._thread = threading.Thread(target=self._run, name=f"dial {container.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Close the connection, and end what runs on it."""
        self._stopping.set()
        conn = self._conn
        if conn is not None:
            conn.close()
        self._thread.join(ANSWER_TIMEOUT)

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            try:
                self._stay_connected()
                failures = 0
                why = "its connection was lost"
            except (ClientError, ValueError, OSError, RuntimeError) as exc:  # the last two: no descriptor, no thread
                why = str(exc)
                failures += 1
            if not self._stopping.is_set():
                self._container.disconnected(f"its agent does not answer: {why}")
            self._stopping.wait(REDIAL_PAUSES[min(failures, len(REDIAL_PAUSES) - 1)])

    def _stay_connected(self) -> None:
        """Connect, and return once the connection is lost for good."""
        tls = self._make_tls()
        with WatchedConn.dial(self._addr, self._token, tls=tls, patience=self._patience) as conn:
            assert isinstance(conn, WatchedConn)
            self._conn = conn
            monitor = Monitor(self._container, conn, self._addr, tls)
            try:
                monitor.begin()
                log.info("agent %s: connected to %s", self._container.name, self._addr)
                conn.wait_closed()
            finally:
                monitor.end()
                self._conn = None


# ══════════════════════════════════════════════════════════════════════════════
# What the gateway knows: containers, and the commands that were run in them
# ══════════════════════════════════════════════════════════════════════════════


class ExecCommand:
    """A command that was created with ``exec``, from then until it is forgotten."""

    def __init__(self, container: Container, options: Fields) -> None:
        self.container = container
        self.id = secrets.token_hex(32)
        self.cmd = options.texts("Cmd")
        # A name without a value is to be unset; an agent only adds variables.
        self.env = tuple(item for item in options.texts("Env") if "=" in item)
        self.workdir = options.text("WorkingDir")
        self.user = options.text("User")
        self.tty = options.flag("Tty")
        self.stdin = options.flag("AttachStdin")
        self.stdout = options.flag("AttachStdout")
        self.stderr = options.flag("AttachStderr")
        self.detach_text = options.text("DetachKeys")
        self.detach_keys = parse_detach_keys(self.detach_text)
        self.size = options.size("ConsoleSize")
        if not self.cmd:
            raise BadParameter("No exec command specified")
        if options.flag("Privileged"):
            raise NotSupported("--privileged: an agent gives a command no more rights than it has itself")
        self._lock = threading.Lock()  # guards the attributes below
        self._taken = False  # started, or about to be
        self.session: Session | None = None
        self._pid = 0
        self.running = False
        self.code: int | None = None

    @property
    def words(self) -> str:
        return " ".join(self.cmd)

    def take(self) -> None:
        """Claim the one start. Raises Conflict at the second."""
        with self._lock:
            if self.running:
                raise Conflict(f"Error: Exec command {self.id} is already running")
            if self._taken:
                raise Conflict(f"Error: Exec command {self.id} has already run")
            self._taken = self.running = True

    def begun(self, session: Session, pid: int = 0) -> None:
        with self._lock:
            self.session = session
            self._pid = pid

    def ended(self, code: int | None) -> None:
        """The command is over; ``code`` is None if that is not known, or it did not start."""
        with self._lock:
            if not self.running:
                return
            session = self.session
            if code is None:
                error = session.queue.error if session is not None else None
                code = self.failure(error)[0] if isinstance(error, SessionError) else 255
            self.running, self.code = False, code
        self.container.publish("exec_die", execID=self.id, exitCode=code)

    def failure(self, error: SessionError) -> tuple[int, str]:
        """See start_failure()."""
        return start_failure(error, self.cmd[0], self.workdir, self.user)

    @property
    def pid(self) -> int:
        """In the container; 0 before the start, and from an agent that does not tell."""
        with self._lock:
            start = self.session.queue.start if self.session is not None else None
            return self._pid or (start.pid if start is not None else 0)

    def to_json(self) -> dict[str, Any]:
        return {
            "ID": self.id,
            "Running": self.running,
            "ExitCode": self.code,
            "ProcessConfig": {
                "tty": self.tty,
                "entrypoint": self.cmd[0],
                "arguments": list(self.cmd[1:]),
                "privileged": False,
                "user": self.user,
            },
            "OpenStdin": self.stdin,
            "OpenStderr": self.stderr,
            "OpenStdout": self.stdout,
            "CanRemove": False,
            "ContainerID": self.container.id,
            "DetachKeys": self.detach_text,
            "Pid": self.pid,
        }


class Gateway:
    """The containers by id, the exec commands by id, and the events of both."""

    def __init__(self, compose_project: str = "") -> None:
        self.events = EventBus()
        self.started_at = time.time()
        self.id = hashlib.sha256(f"{socket.gethostname()}/{os.getpid()}".encode()).hexdigest()[:32]
        self._compose_project = compose_project
        self._lock = threading.Lock()  # guards the attributes below
        self._containers: dict[str, Container] = {}
        self._execs: dict[str, ExecCommand] = {}

    # Containers.

    def new_container(self, name: str) -> Container:
        labels = {"io.sockerless.agent": name}
        if self._compose_project:
            labels |= {
                "com.docker.compose.project": self._compose_project,
                "com.docker.compose.service": name,
                "com.docker.compose.container-number": "1",
                "com.docker.compose.oneoff": "False",
            }
        return Container(name, labels, self.events)

    def add(self, container: Container) -> None:
        with self._lock:
            self._containers[container.id] = container
        container.publish("create")

    def remove(self, container: Container) -> None:
        with self._lock:
            if self._containers.get(container.id) is not container:
                return
            del self._containers[container.id]
        container.remove()

    def containers(self) -> list[Container]:
        """All of them, the newest first, as docker ps lists them."""
        with self._lock:
            known = list(self._containers.values())
        return sorted(known, key=lambda container: -container.created_at)

    def find(self, reference: str) -> Container:
        """A container by its id, name or the beginning of its id, in this order. Raises NotFound."""
        with self._lock:
            if reference in self._containers:
                return self._containers[reference]
            known = list(self._containers.values())
        name = reference.removeprefix("/")
        for container in known:
            if container.name == name:
                return container
        found = [container for container in known if reference and container.id.startswith(reference)]
        if len(found) > 1:
            raise BadParameter(f"Multiple IDs found with provided prefix: {reference}")
        if not found:
            raise NotFound(f"No such container: {reference}")
        return found[0]

    # Commands.

    def add_exec(self, command: ExecCommand) -> None:
        with self._lock:
            self._execs[command.id] = command
            if len(self._execs) > KEPT_EXECS:
                oldest = next((id for id, known in self._execs.items() if not known.running), None)
                if oldest is not None:
                    del self._execs[oldest]

    def find_exec(self, exec_id: str) -> ExecCommand:
        with self._lock:
            command = self._execs.get(exec_id)
        if command is None:
            raise NotFound(f"No such exec instance: {exec_id}")
        return command

    def execs_of(self, container: Container) -> list[str]:
        with self._lock:
            return [known.id for known in self._execs.values() if known.container is container and known.running]


class Joiner:
    """Shows agents that dial in as containers: what a ReverseListener calls back."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._lock = threading.Lock()  # guards _joined
        self._joined: dict[ReverseAgentConn, tuple[Container, Monitor]] = {}

    def joined(self, conn: ReverseAgentConn) -> None:
        """A listener's thread of this connection; the answers that the monitor waits for come from another."""
        name = container_name(conn.id)
        container = self._gateway.new_container(name)
        monitor = Monitor(container, conn)
        with self._lock:
            self._joined[conn] = container, monitor
        self._gateway.add(container)
        try:
            monitor.begin()
        except ClientError as exc:
            container.disconnected(f"its agent does not answer: {exc}")
        else:
            log.info("agent %s: joined", name)

    def left(self, conn: ReverseAgentConn) -> None:
        with self._lock:
            container, monitor = self._joined.pop(conn)
        monitor.end()
        container.disconnected("its agent has left")
        self._gateway.remove(container)
        log.info("agent %s: left", container.name)


def container_name(agent_id: str) -> str:
    """An agent's id as Docker allows a container's name: others of its characters become ``_``."""
    name = re.sub(r"[^a-zA-Z0-9_.-]", "_", agent_id)
    return name if name[0].isalnum() else f"agent{name}"


# ══════════════════════════════════════════════════════════════════════════════
# HTTP
# Threads: for each listening socket one, which holds the connections that ask
# nothing; one for each request, which runs the API's functions; for a hijacked
# connection another, that receives; one that watches for hang-ups.
# ══════════════════════════════════════════════════════════════════════════════


class HangupWatcher:
    """Tells, of connections on which nothing is read or written just now, that the client has gone."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._lock = threading.Lock()  # guards _watched, and registration with it
        self._watched: dict[int, tuple[Callable[[], None], int]] = {}  # what to call, and epoll's events
        threading.Thread(target=self._run, name="hang-ups", daemon=True).start()

    @contextlib.contextmanager
    def watch(
        self, sock: socket.socket | ClientStream, callback: Callable[[], None], *, half_close: bool
    ) -> Iterator[None]:
        """Call ``callback`` once, from a pool thread, when the peer has gone.

        Args:
            half_close: whether a peer that sends no more counts as gone, as with any plain HTTP request. On a
                hijacked connection that is the end of stdin only.
        """
        fd = sock.fileno()
        events = select.EPOLLONESHOT | (select.EPOLLRDHUP if half_close else 0)
        with self._lock:
            self._watched[fd] = callback, events
            self._epoll.register(fd, events)
        try:
            yield
        finally:
            with self._lock:
                del self._watched[fd]
                self._epoll.unregister(fd)

    def _run(self) -> None:
        while True:
            for fd, _ in self._epoll.poll():
                with self._lock:
                    watched = self._watched.get(fd)
                    # An event that was fetched before another connection got this number says nothing about it.
                    if watched is None or not has_hung_up(fd):
                        continue
                try:
                    pool.submit(watched[0])
                except RuntimeError as exc:
                    log.error("no thread to see to a client that has gone, trying again: %s", exc)
                    time.sleep(RETRY_PAUSE)
                    with self._lock:
                        if self._watched.get(fd) is watched:
                            self._epoll.modify(fd, watched[1])  # which says so again


def has_hung_up(fd: int) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLRDHUP)
    return bool(poller.poll(0))


class Peer:
    """The process at the other end of a unix socket: to tell a user's detach from a client that was killed.

    Docker's client looks for the detach keys itself. It then closes the
    connection without a word, which on the wire is what a kill looks like, too,
    and exits with status 1. A signal ends it, or SIGTERM makes it exit with 0.
    """

    PATIENCE = 2.0  # seconds for the client to exit after it has closed; a client that goes on just wants an end
    GET_INFO = (3 << 30) | (64 << 16) | (0xFF << 8) | 11  # ioctl_pidfd(2): _IOWR(PIDFS_IOCTL_MAGIC, 11, 64 bytes)
    INFO_EXIT = 1 << 3
    PF_EXITING = 0x4

    def __init__(self, sock: socket.socket | ClientStream) -> None:
        self._pid = 0
        self._lock = threading.Lock()  # guards _pidfd, and is held while it is waited on
        self._pidfd = -1
        if sock.family == socket.AF_UNIX:
            packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            self._pid = struct.unpack("3i", packed)[0]  # 0 for one in another PID namespace
        if self._pid:
            with contextlib.suppress(OSError):  # it has gone already
                self._pidfd = os.pidfd_open(self._pid)

    def close(self) -> None:
        with self._lock:
            if self._pidfd >= 0:
                os.close(self._pidfd)
                self._pidfd = -1

    def left_on_purpose(self) -> bool:
        """Whether the process closed the connection itself and then exited as after the detach keys.

        Waits PATIENCE seconds for that.
        """
        with self._lock:
            if self._pidfd < 0:
                return False
            closed_itself = not self._is_exiting()
            poller = select.poll()
            poller.register(self._pidfd, select.POLLIN)
            if not poller.poll(self.PATIENCE * 1000):
                return False
            status = self._exit_status()
        return closed_itself if status is None else os.WIFEXITED(status) and os.WEXITSTATUS(status) == 1

    def _stat(self) -> list[str]:
        """The fields of proc_pid_stat(5) from the third on; none if there is no such process."""
        try:
            with open(f"/proc/{self._pid}/stat", encoding="utf-8", errors="replace") as file:
                return file.read().rpartition(")")[2].split()
        except OSError:
            return []

    def _is_exiting(self) -> bool:
        fields = self._stat()
        return not fields or fields[0] in "ZX" or bool(int(fields[6]) & self.PF_EXITING)

    def _exit_status(self) -> int | None:
        """Its wait status; None if that cannot be known any more."""
        info = bytearray(struct.pack("=Q56x", self.INFO_EXIT))
        with contextlib.suppress(OSError):  # before Linux 6.15
            fcntl.ioctl(self._pidfd, self.GET_INFO, info)
            mask, status = struct.unpack("=Q52xi", info)
            if mask & self.INFO_EXIT:
                return int(status)
        fields = self._stat()
        return int(fields[49]) if fields and fields[0] == "Z" else None


class ClientStream(TLSStream):
    """A client's connection that speaks TLS: one thread reads, another writes.

    What TLS calls its goodbye (close_notify, RFC 8446 §6.1) is what a half-close is without TLS: Docker's client sends
    one at the end of stdin, and goes on to read. A connection that ends without one was cut, and nothing that came
    before is to be taken for the whole.
    """

    def __init__(self, sock: ssl.SSLSocket) -> None:
        super().__init__(sock)
        self.socket = sock
        sock.suppress_ragged_eofs = False  # type: ignore[attr-defined]
        self._deadline: float | None = None  # the reading thread's
        self._leaving = False  # guarded by _lock: nobody wants to know any more what the client sends

    def _read(self, size: int) -> bytes:
        """Raises ConnectionResetError if it was cut."""
        try:
            if self._leaving:
                while socket.socket.recv(self._sock, size):
                    pass
                return b""
            return super()._read(size)
        except BlockingIOError:
            raise ssl.SSLWantReadError from None
        except ssl.SSLEOFError:
            raise ConnectionResetError(errno.ECONNRESET, "the client left without TLS's goodbye") from None

    def _wait(self, event: int, deadline: float | None = None) -> None:
        """Raises TimeoutError after ``deadline``, or else that of the reading thread."""
        deadline = deadline if deadline is not None else self._deadline
        poller = select.poll()
        poller.register(self._sock, event)
        if not poller.poll(None if deadline is None else max(deadline - time.monotonic(), 0) * 1000):
            raise TimeoutError

    def settimeout(self, timeout: float | None) -> None:
        """How long recv() may take; for the thread that reads."""
        self._deadline = None if timeout is None else time.monotonic() + timeout

    def shutdown(self, how: int) -> None:
        """As the base class's, but SHUT_WR waits until the client has taken enough for the goodbye to be sent. One
        that takes nothing for GOODBYE_TIMEOUT seconds goes without.

        After that recv() waits for the client to leave, and throws away what it sends: OpenSSL takes data after our
        goodbye for an error, and to close with something unread would be a reset, which the client may see before
        the last output.
        """
        with contextlib.suppress(TimeoutError):
            while how == socket.SHUT_WR and not self._say_goodbye():
                self._wait(select.POLLOUT, time.monotonic() + GOODBYE_TIMEOUT)
        socket.socket.shutdown(self._sock, how)

    def _say_goodbye(self) -> bool:
        """False while there is no room for it."""
        with self._lock:
            if self._leaving:
                return True
            try:
                self._sock.unwrap()
            except ssl.SSLWantWriteError:
                return False
            except (OSError, ValueError):  # SSLWantReadError: the client has not said its own
                pass
            self._leaving = True
            return True

    def close(self) -> None:
        if not self._leaving:
            with contextlib.suppress(OSError):  # it has left
                self.shutdown(socket.SHUT_WR)
        super().close()


class Incoming(io.RawIOBase):
    """What a client sends: what the door has read of it, then the connection. Used by the thread that reads."""

    def __init__(self, sock: socket.socket | ClientStream, early: bytes) -> None:
        super().__init__()
        self._sock = sock
        self.early = early
        self.paused = False  # nothing more is to be read
        self._deadline: float | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Raises TimeoutError in within(), ConnectionResetError if the client has gone."""
        target = memoryview(buffer).cast("B")
        if not self.early:
            if self.paused:
                return None
            if self._deadline is not None:
                self._sock.settimeout(max(self._deadline - time.monotonic(), 0.001))
            self.early = self._sock.recv(len(target))  # maybe more, with TLS
        count = min(len(self.early), len(target))
        target[:count] = self.early[:count]
        self.early = self.early[count:]
        return count

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """All reading while entered may take that long together. Nobody sends meanwhile."""
        self._deadline = time.monotonic() + seconds
        try:
            yield
        finally:
            self._deadline = None
            self._sock.settimeout(None)


class Outgoing(io.RawIOBase):
    """What a client is sent, unbuffered."""

    def __init__(self, sock: socket.socket | ClientStream) -> None:
        super().__init__()
        self._sock = sock

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._sock.sendall(data)
        return len(data)


class Body(io.RawIOBase):
    """A request's body, whether it has a length or comes in chunks."""

    def __init__(self, source: io.BufferedIOBase, length: int, chunked: bool) -> None:
        super().__init__()
        self._source = source
        self._left = length  # bytes, of the chunk if there are chunks
        self._chunked = chunked
        self._broken = False  # where the next chunk begins is not known
        self.complete = not chunked and length == 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Raises EOFError if the client leaves before the end."""
        target = memoryview(buffer).cast("B")
        if not self.complete and self._left == 0:
            self._next_chunk()
        if self.complete:
            return 0
        data = self._source.read1(min(len(target), self._left))
        if not data:
            raise EOFError("the client left in the middle of the body")
        target[: len(data)] = data
        self._left -= len(data)
        if self._chunked and self._left == 0:
            self._source.readline(16)
        self.complete = not self._chunked and self._left == 0
        return len(data)

    def skip(self) -> bool:
        """Read on to the end, so that the connection can be used again; False if that is too far, or takes too long."""
        for _ in range(4):
            if self.complete or self._broken:
                break
            try:
                self.read(CHUNK)
            except (EOFError, OSError, BadParameter):
                return False
        return self.complete

    def give_up(self) -> None:
        """Nothing more of it is wanted."""
        self._broken = True

    def _next_chunk(self) -> None:
        line = self._source.readline(256)
        if not line:
            raise EOFError("the client left in the middle of the body")
        size = line.split(b";")[0].strip()
        if re.fullmatch(rb"[0-9A-Fa-f]{1,15}", size) is None:
            self._broken = True
            raise BadParameter("malformed chunk in the body")
        self._left = int(size, 16)
        if self._left == 0:
            while self._source.readline(4096).strip():  # trailers
                pass
            self.complete = True


class Answer:
    """A streamed answer, in chunks where the client understands them."""

    def __init__(self, handler: Handler, chunked: bool) -> None:
        self._handler = handler
        self._chunked = chunked

    def write(self, data: bytes) -> None:
        """Raises OSError once the client has gone."""
        if data:
            self._handler.wfile.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def write_json(self, value: object) -> None:
        self.write(json.dumps(value).encode() + b"\n")

    def finish(self) -> None:
        if self._chunked:
            self._handler.wfile.write(b"0\r\n\r\n")


class Call:
    """One request: its parameters, and the ways to answer it. Used by its connection's thread.

    Attributes:
        version: of the API that the client speaks.
    """

    def __init__(self, handler: Handler, version: tuple[int, int], query: str, body: Body) -> None:
        self.handler = handler
        self.gateway = handler.server.gateway
        self.version = version
        self.query = {name: values[0] for name, values in urllib.parse.parse_qs(query, True).items()}
        self.body = body
        self.answered = False

    # What is asked.

    def text(self, name: str, default: str = "") -> str:
        return self.query.get(name, default)

    def flag(self, name: str, default: bool = False) -> bool:
        """As dockerd reads one: all but ``0``, ``no``, ``false``, ``none`` and nothing is true."""
        if name not in self.query:
            return default
        return self.query[name].strip().lower() not in ("", "0", "no", "false", "none")

    def number(self, name: str, default: int) -> int:
        try:
            return int(self.query.get(name) or default)
        except ValueError:
            raise BadParameter(f"invalid value for {name!r}: {self.query[name]!r}") from None

    def json(self) -> dict[str, Any]:
        """The body, its names in lower case: Go takes them in any, and clients count on that.

        Raises:
            BadParameter: if it is no JSON object.
        """
        data = self._read_body()
        try:
            value = json.loads(data) if data.strip() else {}
        except (ValueError, RecursionError) as exc:
            raise BadParameter(f"invalid JSON: {exc}") from None
        if not isinstance(value, dict):
            raise BadParameter("invalid JSON: an object is wanted")
        return {name.lower(): item for name, item in value.items()}

    def _read_body(self) -> bytes:
        """All that is left of the body. Raises BadParameter or TooSlow."""
        data = bytearray()
        try:
            with self.handler.incoming.within(BODY_TIMEOUT):
                while part := self.body.read(CHUNK):
                    data += part
                    if len(data) > BODY_LIMIT:
                        raise BadParameter(f"the body has more than {BODY_LIMIT} bytes")
        except TimeoutError:
            self.body.give_up()
            raise TooSlow(f"the body did not come within {BODY_TIMEOUT:g} s") from None
        return bytes(data)

    # What is answered.

    def reply(self, value: object, status: int = http.HTTPStatus.OK) -> None:
        self.reply_bytes(json.dumps(value).encode() + b"\n", "application/json", status)

    def reply_bytes(
        self, data: bytes, content_type: str, status: int, headers: Mapping[str, str] | None = None
    ) -> None:
        self._head(status, {"Content-Type": content_type, "Content-Length": str(len(data)), **(headers or {})})
        if self.handler.command != "HEAD":
            self.handler.wfile.write(data)

    def reply_nothing(self, status: int = http.HTTPStatus.NO_CONTENT, headers: Mapping[str, str] | None = None) -> None:
        self._head(status, {**({"Content-Length": "0"} if status == http.HTTPStatus.OK else {}), **(headers or {})})

    def stream(self, content_type: str, headers: Mapping[str, str] | None = None) -> Answer:
        """Begin an answer of unknown length. Its head is sent now."""
        chunked = self.handler.request_version != "HTTP/1.0"
        length = {"Transfer-Encoding": "chunked"} if chunked else {"Connection": "close"}
        self._head(http.HTTPStatus.OK, {"Content-Type": content_type, **length, **(headers or {})})
        log.debug("stream %s %s", self.handler.command, self.handler.path)
        return Answer(self.handler, chunked)

    def until_gone(self, callback: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
        """While entered: ``callback`` is called if the client leaves."""
        return self.handler.server.watcher.watch(self.handler.connection, callback, half_close=True)

    def hijack(self, raw: bool) -> None:
        """Turn the connection into a stream, after what is left of the body."""
        self._read_body()
        upgrade = self.handler.headers.get("Upgrade")
        multiplexed = not raw and self.version >= (1, 42)
        self.handler.close_connection = True
        if upgrade is None:
            # dockerd sends no more than this, and HTTP/1.1 clients read to the end of the connection.
            self._head(http.HTTPStatus.OK, {"Content-Type": RAW_STREAM})
            return
        content_type = MULTIPLEXED_STREAM if multiplexed else RAW_STREAM
        self._head(
            http.HTTPStatus.SWITCHING_PROTOCOLS,
            {"Content-Type": content_type, "Connection": "Upgrade", "Upgrade": "tcp"},
            "UPGRADED",
        )

    def _head(self, status: int, headers: Mapping[str, str], phrase: str | None = None) -> None:
        self.answered = True
        handler = self.handler
        handler.send_response_only(status, phrase)
        for name, value in {**VERSION_HEADERS, **headers}.items():
            handler.send_header(name, value)
        handler.send_header("Date", handler.date_time_string())
        if handler.close_connection and status != http.HTTPStatus.SWITCHING_PROTOCOLS and "Connection" not in headers:
            handler.send_header("Connection", "close")
        handler.end_headers()


VERSION_HEADERS = {
    "Api-Version": ".".join(map(str, API_VERSION)),
    "Docker-Experimental": "false",
    "Ostype": "linux",
    "Server": f"sockerless-agent/{__version__} (linux)",
}


class Handler(http.server.BaseHTTPRequestHandler):
    """One request of a client, whose head has been read by the door. Made in the thread that answers it."""

    protocol_version = "HTTP/1.1"
    server: Server  # type: ignore[assignment]
    connection: socket.socket | ClientStream

    def __init__(self, sock: socket.socket | ClientStream, early: bytes, server: Server) -> None:
        self.incoming = Incoming(sock, early)
        super().__init__(cast(socket.socket, sock), None, server)  # type: ignore[arg-type]

    def setup(self) -> None:
        self.connection = self.request
        self.rfile = self._reader = io.BufferedReader(self.incoming)
        self.wfile = cast(io.BufferedIOBase, Outgoing(self.connection))
        if self.connection.family != socket.AF_UNIX:
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # What tells a client that was killed, or whose machine has gone, from one that waits.
            for option, value in ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
                self.connection.setsockopt(socket.IPPROTO_TCP, option, value)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def handle(self) -> None:
        """Answer the request; ``close_connection`` says whether there may be another."""
        self.close_connection = True
        self.handle_one_request()

    def finish(self) -> None:
        """The connection is the server's again."""

    def read_ahead(self) -> bytes:
        """What has been read of the next request."""
        self.incoming.paused = True
        return self._reader.peek() + self.incoming.early

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """The base class calls this for what is no HTTP."""
        self.close_connection = True
        body = json.dumps({"message": message or http.HTTPStatus(code).phrase}).encode() + b"\n"
        head = f"HTTP/1.1 {code} {http.HTTPStatus(code).phrase}\r\nContent-Type: application/json\r\n"
        self.wfile.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)

    def serve(self) -> None:
        """Answer one request."""
        call: Call | None = None
        log.debug("begin %s %s", self.command, self.path)
        try:
            call = self._read_call()
            self._check(call)
            self.server.dispatch(call, self.command, self._path)
        except APIError as exc:
            self._fail(call, exc.status, str(exc))
        except ClientError as exc:
            self._fail(call, http.HTTPStatus.INTERNAL_SERVER_ERROR, str(exc))
        except (OSError, EOFError) as exc:  # the client has gone
            log.debug("%s %s: %s", self.command, self.path, exc)
            self.close_connection = True
        except Exception:
            log.exception("unexpected error: %s %s", self.command, self.path)
            self._fail(call, http.HTTPStatus.INTERNAL_SERVER_ERROR, "unexpected error, see the gateway's log")
        if call is None or not call.body.complete:
            self.close_connection = True
        log.debug("end %s %s", self.command, self.path)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_PATCH = serve

    def _read_call(self) -> Call:
        codings = [coding.strip().lower() for coding in self.headers.get_all("Transfer-Encoding", [])]
        lengths = self.headers.get_all("Content-Length", [])
        # A proxy might take another one of them for the length (RFC 9112 §6.3).
        if codings not in ([], ["chunked"]) or len(lengths) + len(codings) > 1:
            raise BadParameter("the length of the body is doubtful")
        chunked = bool(codings)
        length_text = (lengths or ["0"])[0].strip() or "0"
        if re.fullmatch(r"[0-9]{1,18}", length_text) is None:
            raise BadParameter("invalid Content-Length")
        length = int(length_text)
        body = Body(self.rfile, 0 if chunked else length, chunked)
        path, _, query = self.path.partition("?")
        try:
            path = urllib.parse.unquote(urllib.parse.urlsplit(path).path if "://" in path else path)
        except ValueError as exc:
            raise BadParameter(f"invalid URL: {exc}") from None
        version = API_VERSION
        match = re.match(r"/v([0-9]{1,9})\.([0-9]{1,9})(/.*)", path)
        if match is not None:
            version, path = (int(match[1]), int(match[2])), match[3]
        self._path = path
        return Call(self, version, query, body)

    def _check(self, call: Call) -> None:
        """Refuse who may not ask, or not in this version."""
        if "Origin" in self.headers:
            # Docker's clients send none; whatever page a browser shows must not reach the containers.
            raise Forbidden("web pages may not use this endpoint")
        said = ".".join(map(str, call.version))
        if call.version > API_VERSION:
            newest = VERSION_HEADERS["Api-Version"]
            raise BadParameter(f"client version {said} is too new. Maximum supported API version is {newest}")
        if call.version < MIN_API_VERSION:
            oldest = ".".join(map(str, MIN_API_VERSION))
            raise BadParameter(
                f"client version {said} is too old. Minimum supported API version is {oldest}, "
                "please upgrade your client to a newer version"
            )

    def _fail(self, call: Call | None, status: int, message: str) -> None:
        if call is None:
            call = Call(self, API_VERSION, "", Body(self.rfile, 0, False))
            self.close_connection = True
        try:
            if call.answered:
                log.debug("%s %s: %s", self.command, self.path, message)
                self.close_connection = True  # before the answer's end: the client sees that something is missing
            elif status == http.HTTPStatus.NOT_MODIFIED:
                call.reply_nothing(status)
            else:
                with self.incoming.within(SKIP_TIMEOUT):
                    self.close_connection = not call.body.skip() or self.close_connection
                call.reply({"message": message}, status)
        except OSError as exc:
            log.debug("%s %s: %s", self.command, self.path, exc)
            self.close_connection = True


REQUEST_LINE = re.compile(rb"[A-Z]+ \S+ HTTP/1\.[01]\r$")


class Caller(Guest):
    """A connection whose request is not there yet, and who is refused in Docker's words."""

    def respond(self, status: http.HTTPStatus, text: str) -> HTTPResponse:
        body = json.dumps({"message": text.strip()}).encode() + b"\n"
        facts = {"Connection": "close", "Content-Length": str(len(body)), "Content-Type": "application/json"}
        return HTTPResponse(status.value, status.phrase, Headers({**VERSION_HEADERS, **facts}), body)


class Door(Doorway):
    """Holds connections until their TLS handshake and the head of a request are there, and between two requests.

    So that thousands that ask nothing, or ask it slowly, take no threads and keep out nobody, see there.
    """

    guest_class: ClassVar[type[Guest]] = Caller

    def __init__(self, listener: socket.socket, server: Server, tls: ServerTLS | None) -> None:
        self._server = server
        self._certificates = tls
        context = None if tls is None else lambda: tls.context
        super().__init__(listener, lambda guest, request: None, self._serve, pool, context)

    def judge(self, head: bytes | bytearray) -> tuple[http.HTTPStatus, str] | None:
        if head[:1] == b"\x16":  # a TLS handshake, see RFC 8446 §5.1
            return http.HTTPStatus.BAD_REQUEST, "this port speaks no TLS"
        if len(head.partition(b"\r\n\r\n")[0]) > HEAD_LIMIT:
            return http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "too long a request"
        line, newline, _ = head.partition(b"\n")
        if newline and REQUEST_LINE.match(line) is None:
            return http.HTTPStatus.BAD_REQUEST, "not a request that makes sense"
        return None

    def examine(self, guest: Guest) -> bool:
        """Who needs a certificate and has none is told so; what is asked for, the server looks at."""
        if self._certificates is None or not self._certificates.wants_certificate or peer_certificate(guest.socket):
            return True
        words = "a client certificate is needed"
        delay = delay_after(self.refusals.count(guest, words))
        guest.refuse(guest.respond(http.HTTPStatus.FORBIDDEN, words), delay)
        return False

    def _serve(self, sock: socket.socket, early: bytes) -> None:
        """Answer a request, in a pool thread."""
        stream = ClientStream(sock) if isinstance(sock, ssl.SSLSocket) else sock
        try:
            handler = Handler(stream, early, self._server)
            if not handler.close_connection:
                self.take_back(sock, handler.read_ahead(), IDLE_TIMEOUT)
                return
        except OSError as exc:
            log.debug("a client's connection: %s", exc)
        except BaseException:
            stream.close()
            raise
        stream.close()


class Server:
    """Listens, and gives each request to the function that the routing table names."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.watcher = HangupWatcher()
        self._doors: list[Door] = []  # the main thread's

    def listen(self, address: Address, tls: ServerTLS | None = None) -> int:
        """Accept connections from now on, over TCP with ``tls`` if given; returns the port. Raises OSError."""
        before = os.umask(0o177)  # as for Docker's own socket: who may use it is as good as root in the containers
        try:
            listener = open_listener(address)
        finally:
            os.umask(before)
        port = 0 if address.path else int(listener.getsockname()[1])
        door = Door(listener, self, None if address.path else tls)
        self._doors.append(door)
        door.start()
        return port

    def close(self) -> None:
        for door in self._doors:
            path = door.listener.getsockname() if door.listener.family == socket.AF_UNIX else ""
            door.close()
            if path:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)

    def dispatch(self, call: Call, method: str, path: str) -> None:
        for route in ROUTES:
            match = route.pattern.fullmatch(path)
            if match is not None and method in route.methods:
                route.function(call, **match.groupdict())
                return
        for pattern, reason in REFUSED:
            if fnmatch.fnmatchcase(path, pattern):
                raise NotSupported(f"{method} {path}: {reason}")
        raise NotFound("page not found")


class Bridge:
    """A hijacked connection and a session: the handler's thread sends, a pool thread receives.

    Attributes:
        on_eof: the client has closed its side: the end of stdin.
        on_gone: the client is not there any more.
        on_detach: the detach keys were typed.
    """

    def __init__(
        self,
        call: Call,
        session: Session,
        *,
        raw: bool,
        streams: frozenset[Stream],
        detach_keys: bytes,
        stdin: bool,
        on_eof: Callable[[], None],
        on_gone: Callable[[], None],
        on_detach: Callable[[], None],
    ) -> None:
        self._call = call
        self._session = session
        self._raw = raw
        self._streams = streams
        self._keys = DetachFilter(detach_keys)
        self._stdin = stdin
        self._on_eof, self._on_gone, self._on_detach = on_eof, on_gone, on_detach
        self._sock = call.handler.connection
        self._head_was_read = False
        self._received = threading.Event()  # the receiver is done
        self._lock = threading.Lock()  # guards left
        self.left = False  # the client has gone, or detached

    def run(self, output: Iterable[tuple[Stream, bytes]] | None = None) -> None:
        """Carry bytes until the session ends, or ``output`` if given, or the client leaves."""
        with self._call.handler.server.watcher.watch(self._sock, self._gone, half_close=False):
            try:
                self._start_receiving()
                for stream, data in output if output is not None else self._session.queue:
                    if stream in self._streams:
                        self._transmit(stream, data)
                if self._leave():  # from now on a client that closes has only seen the end
                    self._tell_failure()
            except OSError:
                self._gone()
            finally:
                self._finish()

    def _start_receiving(self) -> None:
        try:
            pool.submit(self._receive)
        except RuntimeError as exc:  # and nobody would notice that the client leaves: as if it had
            log.error("no thread for what a client sends: %s", exc)
            self._received.set()
            self._gone()
            self._transmit(Stream.STDOUT, f"the gateway cannot serve more: {exc}\r\n".encode())

    def _transmit(self, stream: Stream, data: bytes) -> None:
        if not self._head_was_read:
            self._head_was_read = True
            wait_for_reader(self._sock)
        self._sock.sendall(data if self._raw else encode_docker_frame(stream, data))

    def _tell_failure(self) -> None:
        """As dockerd: after the connection is hijacked, an error is output."""
        error = self._session.queue.error
        if isinstance(error, SessionError | ConnectionLost):
            self._transmit(Stream.STDOUT, f"{self.failure_words(error)}\r\n".encode())

    def failure_words(self, error: ClientError) -> str:
        return str(error)

    def _finish(self) -> None:
        """Close in order: a client that is still sending must not lose the output to a reset."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
        if not self._received.wait(LINGER):
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RD)
            self._received.wait()

    def _gone(self) -> None:
        if self._leave():
            self._on_gone()

    def _leave(self) -> bool:
        with self._lock:
            first, self.left = not self.left, True
        return first

    def _receive(self) -> None:
        try:
            while data := self._call.handler.rfile.read1(CHUNK):
                if not self._stdin:
                    continue
                if self._raw:
                    data, detached = self._keys.feed(data)
                    self._session.write(data)
                    if detached and self._leave():
                        self._on_detach()
                        return
                else:
                    self._session.write(data)
            if not has_closed(self._sock):
                self._on_eof()
        except OSError:
            self._gone()
        finally:
            self._received.set()


def wait_for_reader(sock: socket.socket | ClientStream) -> None:
    """Wait until the peer has read the head of the answer.

    The Docker SDK for Python loses what it receives in one piece with that.
    dockerd takes so long to start anything that this never shows.
    """
    if sock.family != socket.AF_UNIX:  # TCP tells of what the kernel has taken, not of what was read
        time.sleep(TCP_HEAD_PAUSE)
        return
    deadline = time.monotonic() + HEAD_PATIENCE
    unread = bytearray(4)
    while time.monotonic() < deadline:
        fcntl.ioctl(sock, termios.TIOCOUTQ, unread)  # SIOCOUTQ, unix(7)
        if not any(unread):
            return
        time.sleep(0.0005)


def has_closed(sock: socket.socket | ClientStream) -> bool:
    """Whether the peer has closed for good, where that can be told from the end of what it sends."""
    poller = select.poll()
    poller.register(sock, 0)
    return bool(poller.poll(0))


class ExecBridge(Bridge):
    """The hijacked connection of a command: its failure to start is told in dockerd's words."""

    def failure_words(self, error: ClientError) -> str:
        if isinstance(error, SessionError):
            request = self._session.request
            assert isinstance(request, Exec)
            return start_failure(error, request.cmd[0], request.workdir, request.user)[1]
        return str(error)


# ══════════════════════════════════════════════════════════════════════════════
# The API: the gateway itself
# ══════════════════════════════════════════════════════════════════════════════


def ping(call: Call) -> None:
    headers = {"Cache-Control": "no-cache, no-store, must-revalidate", "Pragma": "no-cache", "Swarm": "inactive"}
    call.reply_bytes(b"OK", "text/plain; charset=utf-8", http.HTTPStatus.OK, {**headers, "Builder-Version": "1"})


def show_version(call: Call) -> None:
    version, oldest = VERSION_HEADERS["Api-Version"], ".".join(map(str, MIN_API_VERSION))
    uname = os.uname()
    details = {"ApiVersion": version, "MinAPIVersion": oldest, "Os": "linux", "Arch": architecture()}
    call.reply(
        {
            "Platform": {"Name": "sockerless-agent gateway"},
            "Components": [{"Name": "Gateway", "Version": __version__, "Details": details}],
            "Version": __version__,
            **details,
            "GitCommit": "",
            "GoVersion": f"none (Python {platform.python_version()})",
            "KernelVersion": uname.release,
            "BuildTime": "",
        }
    )


def architecture() -> str:
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)


def show_info(call: Call) -> None:
    states = [container.state for container in call.gateway.containers()]
    running = sum(state.running for state in states)
    uname = os.uname()
    call.reply(
        {
            "ID": call.gateway.id,
            "Name": uname.nodename,
            "Containers": len(states),
            "ContainersRunning": running,
            "ContainersPaused": 0,
            "ContainersStopped": len(states) - running,
            "Images": 0,
            "Driver": "none",
            "DriverStatus": [],
            "Plugins": {"Volume": [], "Network": [], "Authorization": None, "Log": []},
            "LoggingDriver": "none",
            "CgroupDriver": "none",
            "SystemTime": rfc3339(time.time()),
            "KernelVersion": uname.release,
            "OperatingSystem": "containers behind sockerless-agent",
            "OSType": "linux",
            "Architecture": uname.machine,
            "NCPU": os.cpu_count() or 0,
            "MemTotal": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "DockerRootDir": "",
            "ServerVersion": __version__,
            "Labels": [],
            "Swarm": {"LocalNodeState": "inactive"},
            "Runtimes": {},
            "DefaultRuntime": "",
            "LiveRestoreEnabled": False,
            "Isolation": "",
            "InitBinary": "",
            "SecurityOptions": [],
            "Warnings": ["An agent is shown as a container; there are no images, networks and volumes here"],
        }
    )


EVENT_FILTERS = ("container", "daemon", "event", "image", "label", "scope", "type", "network", "volume", "plugin")


def show_events(call: Call) -> None:
    filters = Filters(call.text("filters"), EVENT_FILTERS)
    since, until = parse_time(call.text("since"), "since"), parse_time(call.text("until"), "until")
    if since is not None and until is not None and since > until:
        raise BadParameter("`since` time cannot be after `until` time")
    with call.gateway.events.subscribe(since) as subscription:
        answer = call.stream("application/json")
        with call.until_gone(subscription.close):
            while True:
                event = subscription.take(None if until is None else max(until - time.time(), 0))
                if event is None or (until is not None and event.when > until * 1e9):
                    break
                if event_matches(event, filters):
                    answer.write_json(event.to_json())
        answer.finish()


def event_matches(event: Event, filters: Filters) -> bool:
    name = event.attributes["name"]

    def action_matches(wanted: str) -> bool:
        # These have details behind a colon, which a filter may leave out.
        return wanted == event.action or event.action.startswith(f"{wanted}:")

    return (
        filters.accepts("event", action_matches)
        and filters.accepts("container", lambda wanted: event.container_id.startswith(wanted) or wanted == name)
        and filters.accepts("type", lambda wanted: wanted == "container")
        and filters.accepts("scope", lambda wanted: wanted == "local")
        and filters.accepts("image", lambda wanted: wanted == IMAGE)
        and filters.accepts_labels(event.attributes)
        and not any(filters.get(name) for name in ("network", "volume", "plugin", "daemon"))
    )


# ══════════════════════════════════════════════════════════════════════════════
# The API: containers
# ══════════════════════════════════════════════════════════════════════════════

LIST_FILTERS = (
    *("ancestor", "before", "exited", "expose", "health", "id", "is-task", "isolation"),
    *("label", "name", "network", "publish", "since", "status", "volume"),
)
STATUSES = ("created", "running", "paused", "restarting", "removing", "exited", "dead")
HEALTH_STATUSES = ("starting", "healthy", "unhealthy", "none")


def list_containers(call: Call) -> None:
    filters = Filters(call.text("filters"), LIST_FILTERS)
    for status in filters.get("status"):
        if status not in STATUSES:
            raise BadParameter(f"invalid filter 'status={status}'")
    for health in filters.get("health"):
        if health not in HEALTH_STATUSES:
            raise BadParameter(f"invalid filter 'health={health}'")
    limit = call.number("limit", 0)
    every = call.flag("all") or limit > 0 or bool(filters.get("status") or filters.get("exited"))
    before = [call.gateway.find(name) for name in filters.get("before")]
    since = [call.gateway.find(name) for name in filters.get("since")]
    found = []
    for container in call.gateway.containers():
        state = container.state
        if not (every or state.running) or not container_matches(container, state, filters):
            continue
        if any(container.created_at >= other.created_at for other in before):
            continue
        if any(container.created_at <= other.created_at for other in since):
            continue
        found.append(summary(container, state))
    call.reply(found[:limit] if limit > 0 else found)


def container_matches(container: Container, state: State, filters: Filters) -> bool:
    return (
        filters.accepts("id", lambda wanted: matches_text(wanted, container.id))
        and filters.accepts("name", lambda wanted: matches_name(wanted, container.name))
        and filters.accepts("status", lambda wanted: wanted == state.status)
        and filters.accepts("health", lambda wanted: wanted == state.health_status())
        and filters.accepts("exited", lambda wanted: not state.running and wanted == str(state.exit_code))
        and filters.accepts("ancestor", lambda wanted: wanted in (IMAGE, f"{IMAGE}:latest", IMAGE_ID))
        and filters.accepts("is-task", lambda wanted: wanted.lower() in ("false", "0"))
        and filters.accepts_labels(container.labels)
        # A container here is in no network, has no volume and publishes no port.
        and not any(filters.get(name) for name in ("network", "volume", "publish", "expose", "isolation"))
    )


def matches_name(wanted: str, name: str) -> bool:
    return matches_text(wanted, name) or matches_text(wanted, f"/{name}")


IMAGE_ID = "sha256:" + hashlib.sha256(IMAGE.encode()).hexdigest()


def summary(container: Container, state: State) -> dict[str, Any]:
    """An entry of the list of containers."""
    return {
        "Id": container.id,
        "Names": [f"/{container.name}"],
        "Image": IMAGE,
        "ImageID": IMAGE_ID,
        "Command": shlex.join(state.main.cmd) if state.main is not None else "",
        "Created": int(container.created_at),
        "Ports": [],
        "Labels": container.labels,
        "State": state.status,
        "Status": state.words(),
        "HostConfig": {"NetworkMode": "default"},
        "NetworkSettings": {"Networks": {}},
        "Mounts": [],
    }


def inspect_container(call: Call, name: str) -> None:
    container = call.gateway.find(name)
    state = container.state
    main = state.main or MainProcess()
    shown = {
        "Status": state.status,
        "Running": state.running,
        "Paused": False,
        "Restarting": False,
        "OOMKilled": False,
        "Dead": state.status == "dead",
        "Pid": main.pid if state.running else 0,
        "ExitCode": state.exit_code,
        "Error": state.error,
        "StartedAt": rfc3339(state.started_at),
        "FinishedAt": rfc3339(state.finished_at),
    }
    if state.health is not None:
        shown["Health"] = {
            "Status": state.health_status(),
            "FailingStreak": state.health.get("failingStreak", 0),
            "Log": state.health.get("log", []),
        }
    call.reply(
        {
            "Id": container.id,
            "Created": rfc3339(container.created_at),
            "Path": main.cmd[0] if main.cmd else "",
            "Args": list(main.cmd[1:]),
            "State": shown,
            "Image": IMAGE_ID,
            "ResolvConfPath": "",
            "HostnamePath": "",
            "HostsPath": "",
            "LogPath": "",
            "Name": f"/{container.name}",
            "RestartCount": 0,
            "Driver": "none",
            "Platform": "linux",
            "MountLabel": "",
            "ProcessLabel": "",
            "AppArmorProfile": "",
            "ExecIDs": call.gateway.execs_of(container) or None,
            "HostConfig": {
                "NetworkMode": "default",
                "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0},
                "LogConfig": {"Type": "json-file", "Config": {}},
            },
            "GraphDriver": {"Name": "none", "Data": None},
            "Mounts": [],
            "Config": {
                "Hostname": container.name,
                "Domainname": "",
                "User": "",
                "AttachStdin": False,
                "AttachStdout": True,
                "AttachStderr": True,
                "Tty": main.tty,
                "OpenStdin": state.main is not None,
                "StdinOnce": False,
                "Env": [],
                "Cmd": list(main.cmd) or None,
                "Image": IMAGE,
                "Volumes": None,
                "WorkingDir": "",
                "Entrypoint": None,
                "OnBuild": None,
                "Labels": container.labels,
            },
            "NetworkSettings": {"Ports": {}, "Networks": {}},
        }
    )


@contextlib.contextmanager
def watch_main(container: Container) -> Iterator[None]:
    """While entered, the container knows of its main process's end at once: an attachment that shows no output."""
    session: Session | None = None
    state = container.state
    if state.running and state.main is not None:
        conn = container.connection()

        def ended(code: int | None) -> None:
            if code is not None:
                container.main_exited(code)

        if conn.version > 1:
            session = Session(conn, attach_request(conn, replay=False), OutputQueue(ended))
            session.queue.drop()
            session.start()
    try:
        yield
    finally:
        if session is not None:
            session.end()


class SignalQueue(OutputQueue):
    """For an attachment that is there to send a signal."""

    def __init__(self) -> None:
        super().__init__()
        self.refusal: SessionError | None = None  # the receiving thread's, until an answer has come behind it

    def warning(self, error: SessionError) -> None:
        if error.reason == Reason.READ_ONLY:
            self.refusal = error


def signal_main(container: Container, number: int) -> None:
    """Send the main process a signal. Raises Conflict if it has ended, there is none, or its agent has --read-only."""
    main = container.main_process()
    if not container.state.running or main.exited:
        raise Conflict(f"Cannot kill container: {container.name}: container {container.id} is not running")
    conn = container.connection()
    queue = SignalQueue()
    session = Session(conn, attach_request(conn, replay=False), queue)
    session.queue.drop()
    session.start()
    session.signal(number)
    if conn.version > 1:
        with contextlib.suppress(ClientError):  # the agent may end with what the signal ends
            conn.sessions(timeout=SIGNAL_TIMEOUT)  # a signal has no answer, but a refusal comes before this one
    session.end()
    if queue.refusal is not None:
        raise Conflict(f"Cannot kill container: {container.name}: {queue.refusal}")


def read_signal(text: str) -> int:
    try:
        return parse_signal(text)
    except ValueError:
        raise BadParameter(f"Invalid signal: {text}") from None


def kill_container(call: Call, name: str) -> None:
    container = call.gateway.find(name)
    number = read_signal(call.text("signal") or "KILL")
    before = container.state
    signal_main(container, number)
    container.publish("kill", signal=number)
    if number == signal.SIGKILL:
        wait_until(call, container, lambda: container.has_ended(before), ANSWER_TIMEOUT)
    call.reply_nothing()


def stop_container(call: Call, name: str) -> None:
    container = call.gateway.find(name)
    number = read_signal(call.text("signal") or "TERM")
    timeout = call.number("t", STOP_TIMEOUT)
    container.main_process()
    before = container.state
    if not before.running:
        raise NotModified
    signal_main(container, number)
    container.publish("kill", signal=number)
    if not wait_until(call, container, lambda: container.has_ended(before), None if timeout < 0 else timeout):
        signal_main(container, signal.SIGKILL)
        container.publish("kill", signal=int(signal.SIGKILL))
        wait_until(call, container, lambda: container.has_ended(before), ANSWER_TIMEOUT)
    container.publish("stop")
    call.reply_nothing()


def start_container(call: Call, name: str) -> None:
    container = call.gateway.find(name)
    if container.state.running:
        raise NotModified
    raise NotSupported("start: the platform starts an agent's container, nobody else can")


def refuse_container(action: str, reason: str) -> Callable[..., None]:
    """A function that refuses, but tells of a container that does not exist first."""

    def refuse(call: Call, name: str) -> None:
        call.gateway.find(name)
        raise NotSupported(f"{action}: {reason}")

    return refuse


class ClientGone(OSError):
    """The client left while it waited."""


def wait_until(call: Call, container: Container, check: Callable[[], bool], timeout: float | None) -> bool:
    """Wait until ``check``, which is asked at each change of the container; False after ``timeout`` seconds.

    Raises:
        ClientGone: if nobody waits any more.
    """
    gone = False

    def leave() -> None:
        nonlocal gone
        with container.changed:
            gone = True
            container.changed.notify_all()

    with call.until_gone(leave), watch_main(container), container.changed:
        met = container.changed.wait_for(lambda: gone or check(), timeout)
    if gone:
        raise ClientGone("the client has left")
    return bool(met)


def wait_container(call: Call, name: str) -> None:
    container = call.gateway.find(name)
    condition = call.text("condition") or "not-running"
    if condition not in ("not-running", "next-exit", "removed"):
        raise BadParameter(f"invalid condition: {condition!r}")
    before = container.state

    def over() -> bool:
        if condition == "removed":
            return container.removed
        if condition == "next-exit" and not before.running:
            state = container.state
            return container.removed or (not state.running and state.finished_at != before.finished_at)
        return container.removed or container.has_ended(before)

    # Clients wait for the head before they start what they wait for the end of.
    answer = call.stream("application/json")
    wait_until(call, container, over, None)
    state = container.state
    if state.running and condition != "removed":  # already again: the end that was waited for had no exit code
        state = dataclasses.replace(before, status="dead", main=None, error="its agent was started anew")
    result: dict[str, Any] = {"StatusCode": state.exit_code}
    if state.main is None or not state.main.exited:
        result["Error"] = {"Message": f"the exit code is not known: {state.error}"}
    answer.write_json(result)
    answer.finish()


# ══════════════════════════════════════════════════════════════════════════════
# The API: the main process's output and input
# ══════════════════════════════════════════════════════════════════════════════


def attach_request(conn: AgentConn, *, replay: bool, session: str = "") -> Attach:
    """An attachment to the main process, or to a detached command; version 1 always replays."""
    return Attach(conn.new_id(), session=session, no_replay=not replay)


def wanted_streams(call: Call) -> frozenset[Stream]:
    return frozenset(
        stream for stream, name in ((Stream.STDOUT, "stdout"), (Stream.STDERR, "stderr")) if call.flag(name)
    )


def attach_container(call: Call, name: str) -> None:
    container = call.gateway.find(name)
    keys = parse_detach_keys(call.text("detachKeys"))
    main = container.main_process()
    conn = container.connection()
    logs, stream, stdin = call.flag("logs"), call.flag("stream"), call.flag("stdin")
    if logs and not stream and conn.version == 1:
        raise NotSupported(
            "attach: the agent speaks version 1 of the protocol, which does not tell where a replay ends"
        )
    queue = OutputQueue()
    session = Session(conn, attach_request(conn, replay=logs), queue)

    def leave() -> None:
        container.publish("detach")
        session.end()
        queue.drop()

    streams = wanted_streams(call)
    bridge = Bridge(
        call,
        session,
        raw=main.tty,
        streams=streams,
        detach_keys=keys,
        stdin=stdin and stream,
        # The next to attach will want to type, too: Docker closes a container's stdin only if it is for one client.
        on_eof=lambda: None,
        on_gone=leave,
        on_detach=leave,
    )
    session.start()
    call.hijack(raw=main.tty)
    container.publish("attach")
    try:
        if stream:
            bridge.run()
        elif logs:
            bridge.run(read_replay(session))
    finally:
        session.end()


def show_logs(call: Call, name: str) -> None:
    container = call.gateway.find(name)
    streams = wanted_streams(call)
    if not streams:
        raise BadParameter("Bad parameters: you must choose at least one stream")
    follow, stamped = call.flag("follow"), call.flag("timestamps")
    try:
        tail = None if call.text("tail", "all") in ("all", "") else int(call.text("tail"))
    except ValueError:
        tail = None  # as dockerd has it
    main = container.main_process()
    replay = tail is None or tail != 0
    replay = replay and replay_is_wanted(call, main)
    if replay and stamped:
        raise NotSupported(
            "logs --timestamps: an agent keeps its output without times; with --follow --tail 0 new lines get theirs"
        )
    conn = container.modern_connection("logs")
    session = Session(conn, attach_request(conn, replay=replay), OutputQueue())
    session.start()
    try:
        LogReader(call, session, main, streams, stamped).run(tail, follow, replay)
    finally:
        session.end()


def replay_is_wanted(call: Call, main: MainProcess) -> bool:
    """Whether ``since`` and ``until`` ask for what was written up to now. Raises NotSupported for a part of it."""
    now = time.time()
    since, until = parse_time(call.text("since"), "since"), parse_time(call.text("until"), "until")
    if until is not None and until < now - SINCE_NOW:
        if until <= main.started_at:
            return False
        raise NotSupported("logs --until: an agent keeps its output without times")
    if since is None or since <= main.started_at:
        return True
    if since >= now - SINCE_NOW:
        return False
    raise NotSupported(
        "logs --since: an agent keeps its output without times; it can be a time before its start, or 0s"
    )


class LogReader:
    """Answers a request for logs from an attachment. Used by the connection's thread."""

    def __init__(
        self, call: Call, session: Session, main: MainProcess, streams: frozenset[Stream], stamped: bool
    ) -> None:
        self._call = call
        self._session = session
        self._main = main
        self._streams = streams
        self._stamped = stamped
        self._line_start = True

    def run(self, tail: int | None, follow: bool, replay: bool) -> None:
        multiplexed = MULTIPLEXED_STREAM if self._call.version >= (1, 42) else RAW_STREAM
        past = read_replay(self._session) if replay else iter(())
        self._answer = self._call.stream(RAW_STREAM if self._main.tty else multiplexed)
        with self._call.until_gone(self._session.end):
            for stream, data in past if tail is None else last_lines(past, tail, self._streams):
                self._write(stream, data)
            while follow and (item := self._session.queue.take()) is not None:
                self._write(*item)
        self._answer.finish()

    def _write(self, stream: Stream, data: bytes) -> None:
        if stream not in self._streams:
            return
        if self._stamped:
            data = self._with_times(data)
        self._answer.write(data if self._main.tty else encode_docker_frame(stream, data))

    def _with_times(self, data: bytes) -> bytes:
        """Each line with the time at which it came here."""
        stamp = f"{rfc3339(time.time())} ".encode()
        parts = []
        for line in data.splitlines(keepends=True):
            parts += [stamp, line] if self._line_start else [line]
            self._line_start = line.endswith(b"\n")
        return b"".join(parts)


def last_lines(
    pieces: Iterable[tuple[Stream, bytes]], count: int, streams: frozenset[Stream]
) -> Sequence[tuple[Stream, bytes]]:
    """The last ``count`` lines, over the streams together as the log has them."""
    kept = [(stream, data) for stream, data in pieces if stream in streams]
    missing = count
    # Backwards to the line feed before the first line that is wanted.
    for index in range(len(kept) - 1, -1, -1):
        stream, data = kept[index]
        end = len(data)
        if index == len(kept) - 1 and data.endswith(b"\n"):
            end -= 1  # ends the last line, before which we look
        while missing and (end := data.rfind(b"\n", 0, end)) >= 0:
            missing -= 1
        if not missing:
            return [(stream, data[end + 1 :]), *kept[index + 1 :]]
    return kept


def read_replay(session: Session) -> Iterator[tuple[Stream, bytes]]:
    """What an attachment's session had written before it began."""
    start = session.queue.wait_started()
    left = start.replay if start is not None else 0  # bytes
    while left > 0 and (item := session.queue.take()) is not None:
        yield item
        left -= len(item[1])
    if session.queue.error is not None:
        raise session.queue.error


# ══════════════════════════════════════════════════════════════════════════════
# The API: exec
# ══════════════════════════════════════════════════════════════════════════════


def create_exec(call: Call, name: str) -> None:
    container = call.gateway.find(name)
    conn = container.connection()
    command = ExecCommand(container, Fields("ExecOptions", call.json()))
    if command.user and conn.version == 1:
        raise NotSupported("--user: the agent speaks version 1 of the protocol, which starts nothing as another user")
    call.gateway.add_exec(command)
    container.publish(f"exec_create: {command.words}", execID=command.id)
    call.reply({"Id": command.id}, http.HTTPStatus.CREATED)


def inspect_exec(call: Call, exec_id: str) -> None:
    call.reply(call.gateway.find_exec(exec_id).to_json())


def read_size(call: Call) -> tuple[int, int]:
    columns, rows = call.number("w", 0), call.number("h", 0)
    if not (0 < columns < 65536 and 0 < rows < 65536):
        raise BadParameter(f"invalid size: {columns} columns and {rows} rows")
    return columns, rows


def resize_exec(call: Call, exec_id: str) -> None:
    command = call.gateway.find_exec(exec_id)
    columns, rows = read_size(call)
    session = command.session
    if session is None or not command.running:
        raise Conflict(f"exec {exec_id} is not running")
    session.resize(columns, rows)
    call.reply_nothing(http.HTTPStatus.OK)


def resize_container(call: Call, name: str) -> None:
    container = call.gateway.find(name)
    columns, rows = read_size(call)
    container.main_process()
    conn = container.connection()
    session = Session(conn, attach_request(conn, replay=False), OutputQueue())
    session.queue.drop()
    session.start()
    session.resize(columns, rows)
    session.end()
    call.reply_nothing(http.HTTPStatus.OK)


def start_exec(call: Call, exec_id: str) -> None:
    command = call.gateway.find_exec(exec_id)
    options = Fields("ExecStartOptions", call.json())
    size, detach = options.size("ConsoleSize"), options.flag("Detach")
    options.flag("Tty")  # it is as it was created, which every client says again
    conn = command.container.connection()
    command.size = size or command.size
    command.take()
    try:
        if detach:
            start_detached(call, command, conn)
        else:
            start_attached(call, command, conn)
    except (ClientError, OSError):  # of the start: what comes later is told to the client
        command.ended(None)
        raise


def start_detached(call: Call, command: ExecCommand, conn: AgentConn) -> None:
    queue = OutputQueue(command.ended)
    queue.drop()
    if conn.version == 1:
        session = Session(conn, exec_request(command, conn, empty_stdin=True), queue)
        command.begun(session)
        command.container.publish(f"exec_start: {command.words}", execID=command.id)
        session.start()
        session.close_stdin()
    else:
        variables = dict(item.split("=", 1) for item in command.env)
        try:
            started = conn.start_detached(
                command.cmd,
                env=variables,
                cwd=command.workdir,
                tty=command.tty,
                size=command.size,
                user=command.user,
            )
        except SessionError as exc:
            code, words = command.failure(exc)
            command.ended(code)
            raise BadParameter(words) from None
        # Only to learn of its end: the command needs nobody who listens.
        session = Session(conn, attach_request(conn, replay=False, session=started.id), queue)
        command.begun(session, started.pid)
        command.container.publish(f"exec_start: {command.words}", execID=command.id)
        session.start()
    call.reply_nothing(http.HTTPStatus.OK)


def exec_request(command: ExecCommand, conn: AgentConn, empty_stdin: bool) -> Exec:
    request = Exec(conn.new_id(), command.cmd, command.env, command.workdir, command.tty)
    if conn.version == 1:
        return request
    columns, rows = command.size or (0, 0)
    return dataclasses.replace(
        request, user=command.user, width=columns, height=rows, no_stdin=empty_stdin and not command.tty
    )


def start_attached(call: Call, command: ExecCommand, conn: AgentConn) -> None:
    queue = OutputQueue(command.ended)
    session = Session(conn, exec_request(command, conn, empty_stdin=not command.stdin), queue)
    peer = Peer(call.handler.connection)

    def gone() -> None:
        # Docker's client leaves like this for its detach keys, too, which only make sense while keys are typed.
        if command.tty and command.stdin and peer.left_on_purpose():
            detach()
        else:
            session.end()
            queue.drop()

    def detach() -> None:
        log.info("container %s: detached from exec %s: %s", command.container.name, command.id[:12], command.words)
        command.container.publish("exec_detach", execID=command.id)
        queue.drop()

    streams = {Stream.STDOUT: command.stdout, Stream.STDERR: command.stderr}
    bridge = ExecBridge(
        call,
        session,
        raw=command.tty,
        streams=frozenset(stream for stream, wanted in streams.items() if wanted),
        detach_keys=command.detach_keys,
        stdin=command.stdin,
        on_eof=session.close_stdin if command.stdin else lambda: None,
        on_gone=gone,
        on_detach=detach,
    )
    try:
        call.hijack(raw=command.tty)
        # All of this before the start, which may be followed by the end at once.
        command.begun(session)
        command.container.publish(f"exec_start: {command.words}", execID=command.id)
        session.start()
        if conn.version == 1:
            if command.size is not None:
                session.resize(*command.size)
            if not command.stdin and not command.tty:
                session.close_stdin()
        bridge.run()
    finally:
        peer.close()


# ══════════════════════════════════════════════════════════════════════════════
# The API: processes and statistics
# ══════════════════════════════════════════════════════════════════════════════


def cpu_share(process: Mapping[str, Any]) -> float:
    """Percent of one CPU over the process's life, as ps has it."""
    return 100.0 * float(process["cpu_seconds"]) / max(time.time() - float(process["start_time"]), 0.01)


def start_words(process: Mapping[str, Any]) -> str:
    """The time of the start, of another day the day."""
    started, now = time.localtime(process["start_time"]), time.localtime()
    return time.strftime("%H:%M" if started[:3] == now[:3] else "%b%d", started)


def cpu_words(process: Mapping[str, Any]) -> str:
    minutes, seconds = divmod(int(process["cpu_seconds"]), 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}"


def command_words(process: Mapping[str, Any]) -> str:
    words = " ".join(process["cmd"]) or f"[{process.get('name') or '?'}]"
    # As ps shows what would break a line, or command a terminal.
    return "".join(character if character.isprintable() else "?" for character in words)


def elapsed_words(process: Mapping[str, Any]) -> str:
    minutes, seconds = divmod(max(int(time.time() - process["start_time"]), 0), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}-" if days else "") + (f"{hours:02}:" if days or hours else "") + f"{minutes:02}:{seconds:02}"


STATE_LETTERS = {"running": "R", "sleeping": "S", "disk-sleep": "D", "stopped": "T", "zombie": "Z", "idle": "I"}
Column = Callable[[Mapping[str, Any]], str]
PS_COLUMNS: dict[str, tuple[str, Column]] = {
    "pid": ("PID", lambda process: str(process["pid"])),
    "ppid": ("PPID", lambda process: str(process["ppid"])),
    "user": ("USER", lambda process: str(process["user"])),
    "uid": ("UID", lambda process: str(process["uid"])),
    "c": ("C", lambda process: str(int(min(cpu_share(process), 99)))),
    "pcpu": ("%CPU", lambda process: f"{cpu_share(process):.1f}"),
    "pmem": ("%MEM", lambda process: f"{100 * process['rss'] / max(process['memory_total'], 1):.1f}"),
    "stime": ("STIME", start_words),
    "start": ("START", start_words),
    "tty": ("TTY", lambda process: str(process["tty"]).removeprefix("/dev/") or "?"),
    "time": ("TIME", cpu_words),
    "etime": ("ELAPSED", elapsed_words),
    "rss": ("RSS", lambda process: str(process["rss"] // 1024)),
    "vsz": ("VSZ", lambda process: str(process["vsz"] // 1024)),
    "stat": ("STAT", lambda process: STATE_LETTERS.get(process["state"], "?")),
    "comm": ("COMMAND", lambda process: str(process.get("name") or command_words(process).split()[0])),
    "args": ("COMMAND", command_words),
    "cmd": ("CMD", command_words),
}
PS_ALIASES = {
    **{"%cpu": "pcpu", "%mem": "pmem", "s": "stat", "state": "stat", "command": "args", "euser": "user"},
    **{"euid": "uid", "tt": "tty", "tname": "tty", "rssize": "rss", "vsize": "vsz", "start_time": "stime"},
    **{"cputime": "time", "ucmd": "comm", "rsz": "rss", "ruser": "user", "ruid": "uid"},
}
# The UID of ps -f is a name.
PS_FULL = [("UID", PS_COLUMNS["user"][1])] + [
    PS_COLUMNS[name] for name in ("pid", "ppid", "c", "stime", "tty", "time", "cmd")
]
PS_BSD = [
    PS_COLUMNS[name] for name in ("user", "pid", "pcpu", "pmem", "vsz", "rss", "tty", "stat", "start", "time", "args")
]


def ps_columns(text: str) -> list[tuple[str, Column]]:
    """The columns that ps would show for these arguments. Raises NotSupported for others than the usual ones."""
    try:
        words = shlex.split(text)
    except ValueError as exc:
        raise NotSupported(f"top: {text!r}: {exc}") from None
    if not words or words in (["-ef"], ["ef"], ["-e", "-f"], ["-Af"], ["-fe"], ["-f"]):
        return PS_FULL
    if words in (["aux"], ["-aux"], ["u"], ["ax"], ["-ax"]):
        return PS_BSD
    chosen: list[tuple[str, Column]] = []
    while words:
        word = words.pop(0)
        if word in ("-e", "-A", "ax", "-ax", "x"):
            continue
        match = re.fullmatch(r"-?(?:e|A|ax)?o(.*)", word)
        if match is None:
            break
        for item in (match[1] or (words.pop(0) if words else "")).split(","):
            name, equals, title = item.partition("=")
            column = PS_COLUMNS.get(PS_ALIASES.get(name, name))
            if column is None:
                raise NotSupported(f"top: there is no column {name!r} here, but {', '.join(PS_COLUMNS)}")
            chosen.append((title if equals else column[0], column[1]))
    if words or not chosen:
        raise NotSupported(f"top: no ps runs in the container; {text!r} is not one of -ef, aux and -eo COLUMN,...")
    return chosen


def show_top(call: Call, name: str) -> None:
    container = call.gateway.find(name)
    columns = ps_columns(call.text("ps_args"))
    if container.state.status == "dead":
        raise Conflict(f"container {container.id} is not running")
    conn = container.modern_connection("top")
    stats = conn.stats(processes=True)
    processes = [{**process, "memory_total": stats["memory_total"]} for process in stats["processes"]]
    processes.sort(key=lambda process: int(process["pid"]))
    rows = [[value(process) for _, value in columns] for process in processes]
    container.publish("top")
    call.reply({"Titles": [title for title, _ in columns], "Processes": rows})


def cpu_stats(sample: Mapping[str, Any] | None) -> dict[str, Any]:
    """The ``cpu_stats`` of a sample. Docker's clients divide the growth of one by that of the other."""
    usage: dict[str, Any] = {"total_usage": 0, "usage_in_kernelmode": 0, "usage_in_usermode": 0}
    result: dict[str, Any] = {
        "cpu_usage": usage,
        "throttling_data": {"periods": 0, "throttled_periods": 0, "throttled_time": 0},
    }
    if sample is not None:
        usage["total_usage"] = int(sample["container"]["cpu_seconds"] * 1e9)
        result["system_cpu_usage"] = int(sample["container"]["system_cpu_seconds"] * 1e9)
        result["online_cpus"] = sample["cpus"]
    return result


def stats_to_json(
    container: Container, sample: Mapping[str, Any] | None, before: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A sample as Docker has it; with None that of a container that does not run."""
    result: dict[str, Any] = {
        "name": f"/{container.name}",
        "id": container.id,
        "read": rfc3339(sample["time"] if sample is not None else 0),
        "preread": rfc3339(before["time"] if before is not None else 0),
        "pids_stats": {},
        "blkio_stats": {"io_service_bytes_recursive": None},
        "num_procs": 0,
        "storage_stats": {},
        "cpu_stats": cpu_stats(sample),
        "precpu_stats": cpu_stats(before),
        "memory_stats": {},
    }
    if sample is not None:
        usage = sample["container"]
        result["pids_stats"] = {"current": usage["processes"]}
        result["memory_stats"] = {"usage": usage["memory"], "limit": usage["memory_limit"], "stats": {}}
        result["networks"] = {name: dict(counters) for name, counters in usage["network"].items() if name != "lo"}
        result["blkio_stats"]["io_service_bytes_recursive"] = [
            {"major": 0, "minor": 0, "op": op, "value": usage[f"{op}_bytes"]} for op in ("read", "write")
        ]
    return result


def take_sample(container: Container) -> dict[str, Any] | None:
    """An agent's statistics; None while it is not connected."""
    try:
        conn = container.modern_connection("stats")
        return conn.stats()
    except (Conflict, ConnectionLost):
        return None


def show_stats(call: Call, name: str) -> None:
    container = call.gateway.find(name)
    before = None
    sample = take_sample(container)  # also tells, before the answer's head, of an agent that has none
    cancelled = threading.Event()
    if not call.flag("stream", True):
        with call.until_gone(cancelled.set):
            if not call.flag("one-shot") and sample is not None and not cancelled.wait(STATS_INTERVAL):
                before, sample = sample, take_sample(container)
        call.reply(stats_to_json(container, sample, before))
        return
    answer = call.stream("application/json")
    with call.until_gone(cancelled.set):
        while not container.removed:
            answer.write_json(stats_to_json(container, sample, before))
            if cancelled.wait(STATS_INTERVAL):
                return
            before, sample = sample, take_sample(container)
    answer.finish()


# ══════════════════════════════════════════════════════════════════════════════
# The API: archives
# ══════════════════════════════════════════════════════════════════════════════


def archive_error(error: SessionError, container: Container, path: str) -> APIError:
    """Docker's words for what is wrong with a path."""
    if error.reason == Reason.NO_SUCH_PATH:
        return NotFound(f"Could not find the file {path} in container {container.name}")
    if error.reason == Reason.NOT_A_DIRECTORY:
        return BadParameter("extraction point is not a directory")
    if error.reason in (Reason.ARCHIVE_FAILED, Reason.BAD_MESSAGE):
        return BadParameter(str(error))
    return APIError(str(error))


def archive_path(call: Call) -> str:
    path = call.text("path")
    if not path:
        raise BadParameter("bad parameter: path cannot be empty")
    return path if path.startswith("/") else f"/{path}"


def stat_header(conn: AgentConn, container: Container, path: str) -> dict[str, str]:
    try:
        found = conn.stat_path(path)
    except SessionError as exc:
        raise archive_error(exc, container, path) from None
    return {"X-Docker-Container-Path-Stat": base64.b64encode(json.dumps(found).encode()).decode()}


def stat_archive(call: Call, name: str) -> None:
    container = call.gateway.find(name)
    conn = container.modern_connection("cp")
    path = archive_path(call)
    call.reply_nothing(http.HTTPStatus.OK, stat_header(conn, container, path))


def get_archive(call: Call, name: str) -> None:
    container = call.gateway.find(name)
    conn = container.modern_connection("cp")
    path = archive_path(call)
    headers = stat_header(conn, container, path)
    process = conn.archive_get(path)
    archive = cast(io.BufferedReader, process.stdout)
    try:
        with call.until_gone(process.detach):
            try:
                # Before the head: what cannot be read at all is an error of its own.
                data = archive.read1(CHUNK)
            except SessionError as exc:
                raise archive_error(exc, container, path) from None
            answer = call.stream("application/x-tar", headers)
            while data:
                answer.write(data)
                data = archive.read1(CHUNK)
            process.wait(ANSWER_TIMEOUT)
        answer.finish()
    finally:
        process.detach()


def put_archive(call: Call, name: str) -> None:
    container = call.gateway.find(name)
    conn = container.modern_connection("cp")
    path = archive_path(call)
    # With copyUIDGID dockerd gives everything to the user that the container was created with, if there was one: the
    # containers here have none. Without it, and here in any case, owners are those that the archive names.
    process = conn.archive_put(path, no_overwrite_dir_non_dir=call.flag("noOverwriteDirNonDir"))
    try:
        feed_archive(call, process)
        process.wait()
    except SessionError as exc:
        raise archive_error(exc, container, path) from None
    finally:
        process.detach()  # an archive that did not come whole is undone
    call.reply_nothing(http.HTTPStatus.OK)


def feed_archive(call: Call, process: AgentProcess) -> None:
    """Send the body to an archive that is unpacked, until its end or until the agent has had enough."""
    unpack = Decompressor()
    try:
        while data := call.body.read(CHUNK):
            process.stdin.write(unpack.feed(data))
        process.stdin.write(unpack.finish())
    except BrokenPipeError:  # wait() says why
        return
    # An EOFError leaves stdin open: what came is not to be taken for the whole.
    process.stdin.close()


class Decompressor:
    """Unpacks gzip, bzip2 and xz, which clients may send in place of a plain archive; told by their first bytes."""

    def __init__(self) -> None:
        self._start: bytes | None = b""  # until it is known what it is
        self._make: Callable[[], Any] | None = None
        self._stream: Any = None

    def feed(self, data: bytes) -> bytes:
        """Raises BadParameter if that is not what it began as."""
        if self._start is not None:
            data = self._start + data
            if len(data) < 6:
                self._start = data
                return b""
            self._start = None
            if data.startswith(b"\x1f\x8b"):
                self._make = lambda: zlib.decompressobj(wbits=31)
            elif data.startswith(b"BZh"):
                self._make = bz2.BZ2Decompressor
            elif data.startswith(b"\xfd7zXZ\0"):
                self._make = lzma.LZMADecompressor
            elif data.startswith(b"\x28\xb5\x2f\xfd"):
                raise BadParameter(
                    "the archive is compressed with zstd, which is not supported: gzip, bzip2 and xz are"
                )
        if self._make is None:
            return data
        parts = []
        try:
            while data:
                if self._stream is None or self._stream.eof:  # another member of the same file
                    self._stream = self._make()
                parts.append(self._stream.decompress(data))
                data = self._stream.unused_data if self._stream.eof else b""
        except (OSError, zlib.error, lzma.LZMAError) as exc:
            raise BadParameter(f"the archive cannot be unpacked: {exc}") from None
        return b"".join(parts)

    def finish(self) -> bytes:
        """What was held back. Raises BadParameter if the compressed data ended too early."""
        if self._stream is not None and not self._stream.eof:
            raise BadParameter("the archive cannot be unpacked: its compressed data ends too early")
        return self._start or b""


# ══════════════════════════════════════════════════════════════════════════════
# The routing table
# ══════════════════════════════════════════════════════════════════════════════


class Route:
    """Which function answers which requests."""

    def __init__(self, methods: str, path: str, function: Callable[..., None]) -> None:
        self.methods = methods.split()
        # Docker's names of objects have no slash; one before a container's name is allowed.
        self.pattern = re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>/?[^/]+)", path))
        self.function = function


def not_found(what: str) -> Callable[..., None]:
    """A function for the one object of a kind of which there are none."""

    def answer(call: Call, name: str) -> None:
        raise NotFound(f"No such {what}: {name}")

    return answer


PLATFORM = "the platform that runs the agents does that, not an agent"
ROUTES = (
    Route("GET HEAD", "/_ping", ping),
    Route("GET", "/version", show_version),
    Route("GET", "/info", show_info),
    Route("GET", "/events", show_events),
    Route("GET", "/containers/json", list_containers),
    Route("GET", "/containers/{name}/json", inspect_container),
    Route("GET", "/containers/{name}/logs", show_logs),
    Route("GET", "/containers/{name}/top", show_top),
    Route("GET", "/containers/{name}/stats", show_stats),
    Route("POST", "/containers/{name}/attach", attach_container),
    Route("POST", "/containers/{name}/resize", resize_container),
    Route("POST", "/containers/{name}/kill", kill_container),
    Route("POST", "/containers/{name}/stop", stop_container),
    Route("POST", "/containers/{name}/start", start_container),
    Route("POST", "/containers/{name}/wait", wait_container),
    Route("HEAD", "/containers/{name}/archive", stat_archive),
    Route("GET", "/containers/{name}/archive", get_archive),
    Route("PUT", "/containers/{name}/archive", put_archive),
    Route("POST", "/containers/{name}/exec", create_exec),
    Route("POST", "/exec/{exec_id}/start", start_exec),
    Route("POST", "/exec/{exec_id}/resize", resize_exec),
    Route("GET", "/exec/{exec_id}/json", inspect_exec),
    Route("POST", "/containers/{name}/restart", refuse_container("restart", PLATFORM)),
    Route("POST", "/containers/{name}/pause", refuse_container("pause", PLATFORM)),
    Route("POST", "/containers/{name}/unpause", refuse_container("unpause", PLATFORM)),
    Route("POST", "/containers/{name}/update", refuse_container("update", PLATFORM)),
    Route("POST", "/containers/{name}/rename", refuse_container("rename", "a container has the name of its agent")),
    Route("GET", "/containers/{name}/changes", refuse_container("diff", "an agent does not know its image")),
    Route("GET", "/containers/{name}/export", refuse_container("export", "docker cp CONTAINER:/ - is near it")),
    Route(
        "GET",
        "/containers/{name}/attach/ws",
        refuse_container("attach over a WebSocket", "use POST .../attach instead"),
    ),
    Route("DELETE", "/containers/{name}", refuse_container("rm", PLATFORM)),
    # docker inspect NAME asks for these one after the other, and wants to hear that there is none.
    Route("GET", "/images/{name}/json", not_found("image")),
    Route("GET", "/networks/{name}", not_found("network")),
    Route("GET", "/volumes/{name}", not_found("volume")),
    Route("GET", "/services/{name}", not_found("service")),
    Route("GET", "/tasks/{name}", not_found("task")),
    Route("GET", "/nodes/{name}", not_found("node")),
    Route("GET", "/secrets/{name}", not_found("secret")),
    Route("GET", "/configs/{name}", not_found("config")),
    Route("GET", "/plugins/{name}/json", not_found("plugin")),
)

# Shell patterns, and why what they match is refused.
REFUSED = (
    ("/containers/create", "containers are created by the platform that runs the agents; each shows up by itself"),
    ("/containers/prune", PLATFORM),
    ("/images/*", "there are no images here: an agent runs in a container that the platform made"),
    ("/build*", "nothing is built here: an agent runs in a container that the platform made"),
    ("/commit", "an agent makes no images"),
    ("/networks*", "an agent's networks are its platform's business"),
    ("/volumes*", "an agent's volumes are its platform's business"),
    ("/plugins*", "there are no plugins here"),
    ("/swarm*", "there is no swarm here"),
    ("/services*", "there is no swarm here"),
    ("/tasks*", "there is no swarm here"),
    ("/nodes*", "there is no swarm here"),
    ("/secrets*", "there is no swarm here"),
    ("/configs*", "there is no swarm here"),
    ("/distribution/*", "there are no images here"),
    ("/auth", "there are no registries here"),
    ("/session", "nothing is built here"),
    ("/grpc", "nothing is built here"),
    ("/system/df", "an agent does not know what takes space on its platform"),
)


# ══════════════════════════════════════════════════════════════════════════════
# Command line
# ══════════════════════════════════════════════════════════════════════════════

DEFAULT_HOST = "unix:///tmp/agents.sock"


def parse_host(text: str) -> Address:
    """An address as docker -H has it: ``unix:///path`` or ``tcp://host:port``. Raises ValueError."""
    scheme, colon, rest = text.partition("://")
    if not colon or scheme not in ("unix", "tcp") or not rest:
        raise ValueError(f"not an address such as unix:///tmp/agents.sock or tcp://127.0.0.1:2375: {text!r}")
    return Address(path=rest) if scheme == "unix" else parse_address(rest.rstrip("/"))


def parse_agents(texts: Sequence[str]) -> dict[str, str]:
    """``NAME=ADDR[,NAME=ADDR...]`` to addresses by name. Raises ValueError."""
    agents: dict[str, str] = {}
    for item in itertools.chain.from_iterable(text.split(",") for text in texts):
        name, equals, addr = item.partition("=")
        if not equals or not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*", name):
            raise ValueError(f"--agent: not NAME=HOST:PORT: {item!r}")
        if name in agents:
            raise ValueError(f"--agent: {name} is there twice")
        for scheme, of_websockets in (("http://", "ws://"), ("https://", "wss://")):
            if addr.startswith(scheme):
                addr = of_websockets + addr.removeprefix(scheme)
        if not addr.startswith(("ws://", "wss://")):
            read_address(f"--agent: {name}", addr)
        agents[name] = addr
    return agents


def client_tls_of(addr: str, options: argparse.Namespace) -> ssl.SSLContext | None:
    """What an agent's address is dialled with: TLS as --ca, --cert and --key say, but where it says that there is none.

    Raises:
        ValueError: if a file cannot be read or used.
    """
    if addr.startswith(("ws://", "unix:")) or not (options.ca or options.cert or addr.startswith("wss://")):
        return None
    return make_client_tls(options.ca or "", options.cert or "", options.key or "")


def check_hosts(hosts: Sequence[Address], tls: ServerTLS | None, insecure: bool) -> None:
    """Raises ValueError if the agents would be everybody's, and --insecure does not say that they are to be."""
    for host in hosts:
        if host.is_local or (tls is not None and tls.wants_certificate) or insecure:
            continue
        raise ValueError(
            f"tcp://{host}: whoever reaches it could run commands in every agent: add --tls-cert and --tls-client-ca, "
            "or --insecure if that is meant"
        )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="docker-gateway",
        description="Show agents as containers to Docker's clients: DOCKER_HOST=unix:///tmp/agents.sock docker ps",
    )
    parser.add_argument("--version", action="version", version=f"sockerless-agent {__version__}")
    parser.add_argument(
        "-H",
        "--host",
        action="append",
        metavar="ADDR",
        help=f"serve Docker's clients here: unix:///path or tcp://host:port; may be repeated (default: {DEFAULT_HOST})",
    )
    parser.add_argument(
        "--agent",
        action="append",
        default=[],
        metavar="NAME=ADDR[,...]",
        help="an agent in server mode, at host:port, unix:/path, or a ws://, wss://, http:// or https:// URL; "
        "may be repeated",
    )
    parser.add_argument("--listen", metavar="ADDR", help="accept agents in reverse mode here, such as 127.0.0.1:8080")
    parser.add_argument(
        "--token-file", metavar="PATH", help="the agents' bearer token, in PATH (or SOCKERLESS_AGENT_TOKEN)"
    )
    parser.add_argument(
        "--tls-cert",
        metavar="PATH",
        help="speak TLS on tcp:// with the certificate in PATH (PEM, with its chain); SIGHUP reloads it",
    )
    parser.add_argument("--tls-key", metavar="PATH", help="its private key (default: in the same file)")
    parser.add_argument(
        "--tls-client-ca",
        metavar="PATH",
        help="Docker's clients must have a certificate that one in PATH (PEM) has issued; SIGHUP reloads it",
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="serve tcp:// beyond the loopback interface without client certificates: whoever reaches it may do all",
    )
    parser.add_argument("--listen-tls-cert", metavar="PATH", help="the same as --tls-cert, for --listen")
    parser.add_argument("--listen-tls-key", metavar="PATH", help="its private key (default: in the same file)")
    parser.add_argument(
        "--listen-tls-client-ca", metavar="PATH", help="agents must have a certificate that one in PATH has issued"
    )
    parser.add_argument(
        "--ca", metavar="PATH", help="dial agents with TLS, and trust the certificates in PATH (PEM), no others"
    )
    parser.add_argument("--cert", metavar="PATH", help="dial them with TLS, and show the certificate in PATH (PEM)")
    parser.add_argument("--key", metavar="PATH", help="its private key (default: in the same file)")
    parser.add_argument(
        "--reconnect",
        type=read_duration,
        default=RESUME_PATIENCE,
        metavar="DURATION",
        help="how long commands wait when the connection to a dialled agent is lost, 0 for not at all (default: 60s)",
    )
    parser.add_argument(
        "--compose-project",
        default="",
        metavar="NAME",
        help="label each container as the service of its name in this project, for docker compose -p NAME exec",
    )
    parser.add_argument(
        "--log-level",
        default="info",
        choices=("debug", "info", "warn", "warning", "error"),
        metavar="LEVEL",
        help="debug, info, warn (or warning) or error (default: %(default)s)",
    )
    return parser


def read_token(path: str | None) -> str | None:
    if path is None:
        return os.environ.get("SOCKERLESS_AGENT_TOKEN") or None
    try:
        return read_token_file(path)[0]
    except ValueError as exc:
        raise ValueError(f"--token-file: {exc}") from None


def read_address(flag: str, text: str, parse: Callable[[str], Address] = parse_address) -> Address:
    """An address that a flag gives. Raises ValueError, which names the flag."""
    try:
        return parse(text)
    except ValueError as exc:
        raise ValueError(f"{flag}: {exc}") from None


def run(options: argparse.Namespace) -> None:
    """Serve until SIGINT or SIGTERM."""
    token = read_token(options.token_file)
    agents = parse_agents(options.agent)
    hosts = [read_address("-H", text, parse_host) for text in options.host or [DEFAULT_HOST]]
    listen = read_address("--listen", options.listen) if options.listen else None
    tls, listen_tls = read_server_tls(options), read_server_tls(options, "listen_")
    if listen_tls is not None and listen is None:
        raise ValueError("--listen-tls-cert needs --listen")
    if options.key and not options.cert:
        raise ValueError("--key needs --cert")
    if tls is not None and all(host.path for host in hosts):
        raise ValueError("--tls-cert needs -H tcp://host:port: a unix socket needs no TLS")
    for addr in agents.values():
        client_tls_of(addr, options)
    check_hosts(hosts, tls, options.insecure)
    # Before any thread exists, so that each inherits it and sigwait() alone gets them.
    reloaded = [source for source in (tls, listen_tls) if source is not None]
    awaited = {signal.SIGINT, signal.SIGTERM} | ({signal.SIGHUP} if reloaded else set())
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    gateway = Gateway(options.compose_project)
    server = Server(gateway)
    with contextlib.ExitStack() as stack:
        stack.callback(server.close)
        if listen is not None:
            if token is None and not options.listen_tls_client_ca and not listen.is_local:
                log.warning("NO TOKEN IS SET: whoever reaches %s can pose as an agent", listen)
            joiner = Joiner(gateway)
            listener = ReverseListener(
                listen.host, listen.port, token=token, tls=listen_tls, on_joined=joiner.joined, on_left=joiner.left
            )
            stack.enter_context(listener)
            log.info("agents may dial %s", Address(listen.host, listener.port))
        for name, addr in agents.items():
            container = gateway.new_container(name)
            gateway.add(container)
            dialler = Dialler(
                container, addr, token, options.reconnect, functools.partial(client_tls_of, addr, options)
            )
            dialler.start()
            stack.callback(dialler.stop)
        for host in hosts:
            if not host.is_local and not (tls is not None and tls.wants_certificate):
                log.warning("%s HAS NO AUTHENTICATION: whoever reaches it can run commands in every agent", host)
            port = server.listen(host, tls)
            where = host if host.path else Address(host.host, port)
            log.info("serving Docker's clients on %s%s", where, " with TLS" if tls and not host.path else "")
        if not agents and listen is None:
            log.warning("neither --agent nor --listen is given: there are no containers to show")
        while signal.sigwait(awaited) == signal.SIGHUP:
            reload(reloaded)
        log.info("ending")


def reload(sources: Sequence[ServerTLS]) -> None:
    """Read certificates again, for new connections."""
    for source in sources:
        try:
            source.reload()
        except ValueError as exc:
            log.error("what was read before stays in use: %s", exc)
        else:
            log.info("TLS: new connections get the certificates that were read now")


class LogFormatter(logging.Formatter):
    """Names the peer whom a line is about, where it is about one."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        peer = getattr(record, "peer", "")
        return f"{line} ({peer})" if peer else line


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command line; exit code 2 for what makes no sense, 1 if it cannot serve."""
    options = make_parser().parse_args(argv)
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter("docker-gateway: %(message)s"))
    logging.basicConfig(handlers=[handler], level=options.log_level.upper())
    logging.getLogger("websockets").setLevel(logging.WARNING)
    code = 0
    try:
        run(options)
    except ValueError as exc:
        print(f"docker-gateway: {exc}", file=sys.stderr)
        code = 2
    except (OSError, ClientError) as exc:
        print(f"docker-gateway: {exc}", file=sys.stderr)
        code = 1
    sys.stderr.flush()
    # Not sys.exit(): a thread may be in a read or write to a client that nothing ends.
    os._exit(code)


if __name__ == "__main__":
    main()

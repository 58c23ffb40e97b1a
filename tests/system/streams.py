"""Twenty sessions of every kind that stream while something else fails, each checked to the byte; and what is left."""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from support import DEADLINE, TOKEN, RawClient, eventually
from websockets.exceptions import ConnectionClosed

from agent_client import AgentConn, AgentProcess, ClientError

# What malloc keeps of freed memory is no leak, and hides one: as in scripts/soak.
LEAN_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}
MORE_MEMORY = 1.25  # times what it had while it streamed before the fault; see scripts/soak for what varies
LINE = 100  # bytes
CODE = 7  # of a numbered stream

# Writes numbered lines until its stdin ends, so many every 50 ms; a main process never ends.
_NUMBERED = f"""
import os, select, sys
number, step, stdin = 0, int(sys.argv[1]), [0] if sys.argv[2] == "session" else []
while not select.select(stdin, [], [], 0.05)[0]:
    data = b"".join(b"%0{LINE - 1}d\\n" % line for line in range(number, number + step))
    number += step
    while data:
        data = data[os.write(1, data):]
os.write(1, b"end %d\\n" % number)
sys.exit({CODE})
"""


def numbered(step: int = 40, role: str = "session") -> list[str]:
    return [sys.executable, "-ISc", _NUMBERED, str(step), role]


# Flags, for Streams to attach to. Who is away for a minute is to miss nothing.
MAIN = ("--replay-size", "16M", "--keep-alive", "--copy-output=false", "--", *numbered(role="main"))


class Numbers:
    """Checks numbered lines as they come, from wherever they begin; nothing of them is kept."""

    def __init__(self, tty: bool = False) -> None:
        self.end = b""  # the last line, which says how many there were
        self.next: int | None = None
        self._line_end = b"\r\n" if tty else b"\n"
        self._rest = b""

    def feed(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(self._line_end)
        for line in lines:
            assert not self.end, f"{line!r} came after the end"
            if line.startswith(b"end "):
                self.end = line
                continue
            number = int(line)
            assert len(line) == LINE - 1, line
            assert number == (number if self.next is None else self.next), f"{number} came instead of {self.next}"
            self.next = number + 1

    def finish(self) -> None:
        assert (self.end, self._rest) == (b"end %d" % (self.next or 0), b""), f"cut off after line {self.next}"


class Stream:
    """One session, and what became of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0  # bytes that were right so far
        self.code: int | None = None
        self.error = ""  # what its client was told in place of an exit code
        self.failure: BaseException | None = None  # what must not be: wrong bytes
        self.over = threading.Event()

    def __repr__(self) -> str:
        return f"{self.name}: {self.count} bytes, code {self.code}, error {self.error!r}, {self.failure!r}"


class _Version2:
    """A connection of ours with its sessions, each read by a thread of its own."""

    def __init__(self, url: str, number: int, attach: bool, patience: float) -> None:
        self.conn = AgentConn.dial(url, TOKEN, patience=patience)
        assert self.conn.version == 2
        self.stopping = threading.Event()
        self.streams: list[Stream] = []
        self._stops: list[Callable[[], None]] = []
        for kind in ("lines", "lines", "flood", "echo", "echo", "terminal", *(["attach"] if attach else [])):
            self._start(f"v2-{number}-{kind}-{len(self.streams)}", kind)

    def _start(self, name: str, kind: str) -> None:
        stream = Stream(name)
        if kind == "attach":
            process = self.conn.attach(replay=False)
            self._stops.append(process.detach)
        elif kind == "echo":
            process = self.conn.popen(["cat"])
        else:
            process = self.conn.popen(numbered(1000 if kind == "flood" else 40), tty=kind == "terminal")
            self._stops.append(process.stdin.close)
        self.streams.append(stream)
        target = self._echo if kind == "echo" else self._read
        threading.Thread(target=self._check, args=(target, stream, process, kind), daemon=True).start()

    def _check(self, target: Callable[..., None], stream: Stream, process: AgentProcess, kind: str) -> None:
        try:
            target(stream, process, kind)
        except ClientError as exc:
            stream.error = str(exc) or repr(exc)
        except BaseException as exc:
            stream.failure = exc
        finally:
            stream.over.set()

    def _read(self, stream: Stream, process: AgentProcess, kind: str) -> None:
        numbers = Numbers(kind == "terminal")
        try:
            while data := process.stdout.read1(65536):
                numbers.feed(data)
                stream.count += len(data)
        except ClientError:
            if not (kind == "attach" and self.stopping.is_set()):
                raise
        assert process.lost == 0
        if kind == "attach":
            assert self.stopping.is_set(), "the attachment ended by itself"
            stream.code = CODE
            return
        stream.code = process.wait(DEADLINE)
        numbers.finish()

    def _echo(self, stream: Stream, process: AgentProcess, kind: str) -> None:
        number = 0
        while not self.stopping.is_set():
            block = b"%09d," % number * 300
            process.stdin.write(block)
            assert process.stdout.read(len(block)) == block
            stream.count += len(block)
            number += 1
            time.sleep(0.01)
        process.stdin.close()
        assert process.stdout.read() == b""
        assert process.wait(DEADLINE) == 0
        stream.code = CODE

    def stop(self) -> None:
        self.stopping.set()
        for stop in self._stops:
            stop()

    def close(self) -> None:
        self.conn.close()


class _Version1:
    """A connection that shares no code with ours, whose sessions are one thread's."""

    def __init__(self, url: str, attach: bool) -> None:
        self._ws = RawClient(url).ws
        self.stopping = threading.Event()
        self.streams: list[Stream] = []
        self._numbers: dict[str, Numbers] = {}
        self._blocks: dict[str, bytes] = {}  # of an echo: what is still to come back
        kinds = ["lines", "lines", "lines", "echo", "echo", "terminal", *(["attach"] if attach else [])]
        for number, kind in enumerate(kinds):
            name = f"v1-{kind}-{number}"
            self.streams.append(Stream(name))
            if kind == "attach":
                self._send("attach", name)
            elif kind == "echo":
                self._send("exec", name, cmd=["cat"])
                self._write(name)
            else:
                self._send("exec", name, cmd=numbered(), tty=kind == "terminal")
            self._numbers[name] = Numbers(kind == "terminal")
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _send(self, kind: str, name: str, **fields: object) -> None:
        self._ws.send(json.dumps({"type": kind, "id": name, **fields}))

    def _write(self, name: str) -> None:
        self._blocks[name] = os.urandom(1500)
        self._send("stdin", name, data=base64.b64encode(self._blocks[name]).decode())

    def _run(self) -> None:
        told = False
        waiting = {stream.name: stream for stream in self.streams}
        try:
            while waiting:
                if self.stopping.is_set() and not told:
                    told = True
                    for stream in [*waiting.values()]:
                        if "attach" in stream.name:
                            self._end(waiting, stream, CODE)
                        elif "echo" not in stream.name:
                            self._send("close_stdin", stream.name)
                try:
                    event = json.loads(self._ws.recv(timeout=0.1))
                except TimeoutError:
                    continue
                if event.get("id") in waiting:
                    self._take(waiting, waiting[event["id"]], event)
        except ConnectionClosed as exc:
            for stream in waiting.values():
                stream.error = str(exc)
        except BaseException as exc:
            for stream in waiting.values():
                stream.failure = exc
        finally:
            for stream in waiting.values():
                stream.over.set()

    def _take(self, waiting: dict[str, Stream], stream: Stream, event: dict[str, Any]) -> None:
        if event["type"] == "exit":
            if "echo" in stream.name:
                assert (event["code"], self._blocks[stream.name]) == (0, b""), stream
            else:
                self._numbers[stream.name].finish()
            self._end(waiting, stream, CODE if "echo" in stream.name else event["code"])
        elif event["type"] == "error":
            stream.error = event["message"]
            self._end(waiting, stream, None)
        else:
            assert "lost" not in event, event
            data = base64.b64decode(event["data"])
            stream.count += len(data)
            if "echo" not in stream.name:
                self._numbers[stream.name].feed(data)
                return
            block = self._blocks[stream.name]
            assert block.startswith(data), "an echo differs"
            self._blocks[stream.name] = block[len(data) :]
            if len(data) == len(block):
                if self.stopping.is_set():
                    self._send("close_stdin", stream.name)
                else:
                    self._write(stream.name)

    @staticmethod
    def _end(waiting: dict[str, Stream], stream: Stream, code: int | None) -> None:
        stream.code = code
        del waiting[stream.name]
        stream.over.set()

    def stop(self) -> None:
        self.stopping.set()

    def close(self) -> None:
        self._thread.join(DEADLINE)
        self._ws.close()


@dataclass(frozen=True)
class Usage:
    """What an agent takes at one moment, parked threads aside."""

    memory: int  # bytes, resident
    threads: int
    descriptors: int


def metric(text: str, name: str, labels: str = "") -> float:
    """One value of /metrics, summed over what labels it has beside these."""
    found = re.findall(rf"^sockerless_agent_{name}(?:{{[^}}]*{labels}[^}}]*}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, found))


def scrape(address: str) -> str:
    request = urllib.request.Request(f"http://{address}/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=DEADLINE) as response:
        return str(response.read().decode())


def usage(pid: int, address: str = "") -> Usage:
    """What an agent uses; at an ``address`` without the threads that are parked, which leave after a while."""
    status = Path(f"/proc/{pid}/status").read_text()
    memory, threads = (int(re.findall(rf"^{name}:\s+(\d+)", status, re.MULTILINE)[0]) for name in ("VmRSS", "Threads"))
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    if address:
        text = scrape(address)
        # As of that moment, in which one thread and one descriptor are the question's own.
        threads = int(metric(text, "threads") - metric(text, "pool_threads", 'state="parked"')) - 1
    return Usage(memory << 10, threads, descriptors)


class Streams:
    """Twenty sessions beside a fault: start them, let the fault strike, and leave.

    Leaving ends them all, each with its exit code and with every byte, and waits
    until the agent uses what it did before: descriptors, threads, memory.

    Args:
        url: of the agent, or of the listener that it dials.
        pid: the agent's.
        address: where it answers /metrics; "" in reverse mode.
        attach: whether it has a main process, which must be MAIN.
        lost: part of the names of those that the fault may end, with an error; "v1" for all of version 1.
        patience: seconds for which lost connections are made again.
        margin: threads and descriptors that may be left.
    """

    def __init__(
        self,
        url: str,
        pid: int,
        address: str = "",
        attach: bool = True,
        lost: str = "",
        patience: float = DEADLINE,
        margin: int = 0,
    ) -> None:
        self._pid, self._address, self._lost, self._margin = pid, address, lost, margin
        with AgentConn.dial(url, TOKEN) as conn:  # what the first session starts for good
            assert conn.run(["true"], tty=True).returncode == 0
        eventually(lambda: not self._sessions(), "the first session has gone")
        self._before = usage(pid, address)
        self.connections = [
            _Version2(url, 1, attach, patience),
            _Version2(url, 2, attach, patience),
            _Version1(url, attach),
        ]
        self.streams = [stream for connection in self.connections for stream in connection.streams]
        assert len(self.streams) == (21 if attach else 18)

    def __enter__(self) -> Streams:
        self.wait_for_progress(50_000)
        self._streaming = usage(self._pid, self._address)
        return self

    def wait_for_progress(self, bytes: int = 20_000) -> None:
        """Wait until every session has moved on by so many bytes, or has ended as it may."""
        before = {stream: stream.count for stream in self.streams}
        deadline = time.monotonic() + DEADLINE
        for stream, count in before.items():
            while not stream.over.is_set() and stream.count < count + bytes:
                assert time.monotonic() < deadline, f"no progress: {stream}"
                time.sleep(0.01)
        self._check(ended=False)

    def _check(self, ended: bool) -> None:
        """Nothing is wrong with what is over; nothing is over too early."""
        for stream in self.streams:
            if not stream.over.is_set():
                continue
            if stream.failure is not None:
                raise AssertionError(f"{stream}") from stream.failure
            may_be_lost = bool(self._lost) and self._lost in stream.name
            assert (ended and stream.code == CODE) or (may_be_lost and stream.error), f"ended otherwise: {stream}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            for connection in self.connections:
                connection.stopping.set()
            return
        self.finish()

    def wait_for_loss(self) -> None:
        """The agent has gone: every client is told, and sees no exit code."""
        for stream in self.streams:
            assert stream.over.wait(DEADLINE), f"did not end: {stream}"
            assert stream.failure is None, f"{stream}"
            assert stream.error, f"ended otherwise: {stream}"
        for connection in self.connections:
            connection.close()

    def finish(self) -> None:
        """End every session; each must have all its output and its exit code, and nothing be left of them."""
        for connection in self.connections:
            connection.stop()
        for stream in self.streams:
            assert stream.over.wait(DEADLINE), f"did not end: {stream}"
        self._check(ended=True)
        for connection in self.connections:
            connection.close()
        self.check_baseline()

    def _sessions(self) -> float:
        return metric(scrape(self._address), "sessions") if self._address else 0

    def check_baseline(self) -> None:
        """Wait until nothing is left of what streamed, and of the fault."""
        deadline = time.monotonic() + DEADLINE
        while True:
            now = usage(self._pid, self._address)
            sessions, before = self._sessions(), self._before
            more = max(now.threads - before.threads, now.descriptors - before.descriptors)
            calm = more <= self._margin and not sessions
            if calm and now.memory <= self._streaming.memory * MORE_MEMORY:
                return
            assert time.monotonic() < deadline, f"left behind: {now} after {before}, {sessions} sessions"
            time.sleep(0.05)

"""What the tests are made of: a real agent process, and a version 1 client that shares no code with ours."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

AGENT = Path(__file__).resolve().parents[1] / "agent.py"
TOKEN = "correct-horse-battery"
DEADLINE = 60.0  # seconds; what is waited for comes at once, or something is broken
AS_PID_1 = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")  # a prefix for an agent
IN_CI = bool(os.environ.get("CI"))

# Python and the agent may be below /root, where nobody may go: in a mount namespace they are in another /root.
_ENTER = """
hold=$(mktemp -d) && mount -t tmpfs -o mode=755 none "$hold" && number=0
for directory in "$1" "$2" "$3"; do
    number=$((number + 1)) && mkdir "$hold/$number" && mount --bind "$directory" "$hold/$number" || exit 125
done
mount -t tmpfs -o mode=755 none /root && number=0
for directory in "$1" "$2" "$3"; do
    number=$((number + 1)) && mkdir -p "$directory" && mount --bind "$hold/$number" "$directory" || exit 125
done
umount -l "$hold" && rmdir "$hold" && shift 3
exec setpriv --reuid="$0" --regid="$0" --clear-groups --no-new-privs --bounding-set=-all "$@"
"""

Event = dict[str, Any]


def as_user(uid: int) -> tuple[str, ...]:
    """A prefix that becomes an agent, or another command, without a capability and as a user whose name is nobody's."""
    directories = (sys.base_prefix, sys.prefix, str(AGENT.parent))
    return ("unshare", "--mount", "sh", "-c", _ENTER, str(uid), *directories)


def need(*tools: str) -> None:
    """Skip the test where a tool is missing; in CI that is a failure."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        (pytest.fail if IN_CI else pytest.skip)(f"missing: {', '.join(missing)}")


def need_root() -> None:
    """Skip the test without root; in CI that is a failure."""
    if os.geteuid() != 0:
        (pytest.fail if IN_CI else pytest.skip)("needs root")


@contextlib.contextmanager
def file_system(directory: Path, size: str) -> Iterator[Path]:
    """Make a directory with a file system of its own, of so many bytes as tmpfs(5) writes them."""
    need("mount")
    need_root()
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)], check=True)
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


def eventually(check: Callable[[], object], what: str) -> Any:
    """Wait until ``check`` returns something true, and return that."""
    deadline = time.monotonic() + DEADLINE
    while not (value := check()):
        if time.monotonic() > deadline:
            pytest.fail(f"did not come in {DEADLINE:g} s: {what}")
        time.sleep(0.01)
    return value


def wait_gone(pid: int) -> None:
    """Wait until a process has ended, whoever its parent is."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poller = select.poll()
        poller.register(handle, select.POLLIN)
        if not poller.poll(DEADLINE * 1000):
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                signal.pidfd_send_signal(handle, signal.SIGKILL)
                pytest.fail(f"process {pid} still runs: {command!r}")
    finally:
        os.close(handle)


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in (b"Z", b"X")


def children_of(pid: int) -> list[int]:
    """The PIDs of a process's children, zombies among them."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has ended meanwhile
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


@contextlib.contextmanager
def killed_afterwards(pid: int) -> Iterator[None]:
    """End a process that a test expects to survive."""
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _environment(env: dict[str, str] | None, token: str) -> dict[str, str]:
    """The test's own environment without what would change the agent's ways."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SOCKERLESS_") and name != "TERM"}
    return {**kept, **({"SOCKERLESS_AGENT_TOKEN": token} if token else {}), **(env or {})}


def run_agent(*flags: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run an agent that is expected to end by itself."""
    return subprocess.run(
        [sys.executable, str(AGENT), *flags],
        env=_environment(env, ""),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )


class Agent:
    """A real agent process on a free port of the loopback interface.

    Args:
        directory: where its PID file goes.
        flags: behind ``--addr`` and ``--pid-file``, which may be given again.
        env: variables to add to the environment.
        token: "" for an agent without one.
        prefix: a command that runs the agent as its only child, such as unshare.
        execs: whether ``prefix`` becomes the agent instead, as setpriv does.
    """

    def __init__(
        self,
        directory: Path,
        *flags: str,
        env: dict[str, str] | None = None,
        token: str = TOKEN,
        prefix: Sequence[str] = (),
        program: Path = AGENT,
        execs: bool = False,
    ) -> None:
        self.token = token
        self.pid_file = directory / "main.pid"
        self._log: list[str] = []
        self._output: list[bytes] = []
        self._changed = threading.Condition()  # guards _log, _output and _log_ended
        self._log_ended = False
        self._forked = bool(prefix) and not execs
        command = [*prefix, sys.executable, str(program), "--addr", "127.0.0.1:0", "--pid-file", str(self.pid_file)]
        self.process = subprocess.Popen(
            [*command, *flags],
            env=_environment(env, token),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._read_log, self._read_output)]
        for thread in self._threads:
            thread.start()
        try:
            self.address = self.wait_for_log(r"listening on ([^\s\"]+)")[1]
        except BaseException:
            self.kill()
            raise

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self._log.append(line.decode("utf-8", "replace"))
                self._changed.notify_all()
        with self._changed:
            self._log_ended = True
            self._changed.notify_all()

    def _read_output(self) -> None:
        assert self.process.stdout is not None
        while data := self.process.stdout.read1(65536):  # type: ignore[attr-defined]
            with self._changed:
                self._output.append(data)
                self._changed.notify_all()

    @property
    def url(self) -> str:
        return f"ws://{self.address}/ws"

    @property
    def log(self) -> str:
        """Everything that it wrote to stderr so far."""
        with self._changed:
            return "".join(self._log)

    @property
    def output(self) -> bytes:
        """Everything that it wrote to stdout so far."""
        with self._changed:
            return b"".join(self._output)

    @property
    def pid(self) -> int:
        """The agent's PID, as this side of a PID namespace sees it."""
        if not self._forked:
            return self.process.pid
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0]) if children else self.process.pid

    def wait_for_log(self, pattern: str) -> re.Match[str]:
        """Wait for a line in the log that matches."""
        with self._changed:
            found: list[re.Match[str]] = []

            def look() -> bool:
                match = re.search(pattern, "".join(self._log))
                found.extend([match] if match else [])
                return bool(found) or self._log_ended

            self._changed.wait_for(look, DEADLINE)
            if not found:
                pytest.fail(f"not in the agent's log: {pattern}\n{''.join(self._log)}")
            return found[0]

    def wait_for_output(self, text: bytes) -> None:
        """Wait until it has written ``text`` to stdout."""
        with self._changed:
            if not self._changed.wait_for(lambda: text in b"".join(self._output), DEADLINE):
                pytest.fail(f"not in the agent's output: {text!r}\n{b''.join(self._output)!r}")

    def health(self) -> dict[str, Any]:
        """What ``GET /health`` answers."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{self.address}/health", timeout=DEADLINE) as response:
            answer = json.load(response)
        assert isinstance(answer, dict)
        return answer

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for its end, and return the exit code."""
        try:
            code = self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"the agent did not end:\n{self.log}")
        self._finish()
        return code

    def stop(self) -> int:
        """SIGTERM, and the exit code; ended already is fine, too."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """SIGKILL, to this one process and to what its prefix started."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
        try:
            self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(DEADLINE)
        self._finish()

    def _finish(self) -> None:
        for thread in self._threads:
            thread.join(DEADLINE)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        if not any(thread.is_alive() for thread in self._threads):
            self.process.stdout.close()
            self.process.stderr.close()


class Session:
    """What a client has received of one session so far."""

    def __init__(self, client: RawClient, session_id: str) -> None:
        self.id = session_id
        self.output: list[tuple[str, bytes]] = []  # in the order of arrival
        self.stdout = bytearray()
        self.stderr = bytearray()
        self.errors: list[Event] = []
        self.exit: Event | None = None
        self.client = client

    def take(self, event: Event) -> None:
        assert self.exit is None, f"{event} came after {self.exit}"
        kind = event["type"]
        if kind in ("stdout", "stderr"):
            data = base64.b64decode(event["data"], validate=True)
            self.output.append((kind, data))
            (self.stdout if kind == "stdout" else self.stderr).extend(data)
        elif kind == "exit":
            assert type(event["code"]) is int
            self.exit = event
        elif kind == "error":
            self.errors.append(event)
        else:
            pytest.fail(f"unexpected event {event}")

    def send(self, kind: str, **fields: object) -> None:
        self.client.send({"type": kind, "id": self.id, **fields})

    def write(self, data: bytes) -> None:
        self.send("stdin", data=base64.b64encode(data).decode())

    def close_stdin(self) -> None:
        self.send("close_stdin")

    def signal(self, name: str) -> None:
        self.send("signal", signal=name)

    def wait_for(self, text: bytes, stream: str = "stdout") -> bytes:
        """Wait until a stream holds ``text``; returns everything up to its end."""
        buffer = self.stdout if stream == "stdout" else self.stderr
        start = 0
        while (found := buffer.find(text, start)) < 0:
            assert self.exit is None, f"{text!r} never came: {self!r}"
            start = max(len(buffer) - len(text), 0)
            self.client.receive_one()
        return bytes(buffer[: found + len(text)])

    def wait_for_lines(self, count: int) -> list[str]:
        """Wait for so many whole lines of stdout."""
        while self.stdout.count(b"\n") < count:
            assert self.exit is None, f"too few lines: {self!r}"
            self.client.receive_one()
        return self.stdout.decode().split("\n")[:count]

    def wait_error(self) -> str:
        """Wait for an error of this session, and return its message."""
        while not self.errors:
            assert self.exit is None, f"there was no error: {self!r}"
            self.client.receive_one()
        message = self.errors[0]["message"]
        assert isinstance(message, str)
        return message

    def wait(self) -> int:
        """Wait for the exit code."""
        while self.exit is None:
            assert not self.errors, f"an error instead of an exit: {self.errors}"
            self.client.receive_one()
        return int(self.exit["code"])

    def wait_last(self) -> Event:
        """Wait for what ends the session: its exit, or an error instead of a start."""
        while self.exit is None and not self.errors:
            self.client.receive_one()
        return self.exit or self.errors[-1]

    def __repr__(self) -> str:
        return (
            f"<Session {self.id}: stdout {bytes(self.stdout[-500:])!r}, stderr {bytes(self.stderr[-500:])!r}, "
            f"errors {self.errors}, exit {self.exit}>"
        )


class RawClient:
    """A version 1 client: plain JSON over one WebSocket, used by one thread.

    Args:
        max_queue: messages that may wait before the client stops to read its socket.
    """

    def __init__(self, url: str, token: str = TOKEN, max_queue: int = 16) -> None:
        self.ws = connect(
            url,
            additional_headers={"Authorization": f"Bearer {token}"} if token else None,
            compression=None,
            max_size=None,
            max_queue=max_queue,
            ping_interval=None,
            open_timeout=DEADLINE,
            close_timeout=1,
            proxy=None,
        ).__enter__()  # close() is this class's business, but the library wants its connections entered
        self.sessions: dict[str, Session] = {}
        self.errors: list[Event] = []  # of no session that this client knows
        self._ids = (f"s{number}" for number in itertools.count())

    def send(self, message: Event) -> None:
        self.ws.send(json.dumps(message))

    def send_together(self, *messages: Event) -> None:
        """Send several messages in one system call, so that they arrive in one read."""
        with self.ws.protocol_mutex:
            for message in messages:
                self.ws.protocol.send_text(json.dumps(message).encode())
            self.ws.socket.sendall(b"".join(self.ws.protocol.data_to_send()))

    def receive(self) -> Event:
        """The next event, whatever it is about."""
        try:
            event = json.loads(self.ws.recv(timeout=DEADLINE))
        except TimeoutError:
            pytest.fail(f"nothing was received in {DEADLINE:g} s; sessions: {list(self.sessions.values())[-5:]}")
        assert isinstance(event, dict)
        return event

    def receive_one(self) -> None:
        """Wait for one event, and give it to its session."""
        event = self.receive()
        session = self.sessions.get(event.get("id", ""))
        if session is not None:
            session.take(event)
        else:
            assert event["type"] == "error", f"output of a session that was never started: {event}"
            self.errors.append(event)

    def wait_error(self) -> str:
        """Wait for an error that is of no session, and return its message; it is not kept."""
        while not self.errors:
            self.receive_one()
        return str(self.errors.pop(0)["message"])

    def expect(self, session_id: str | None = None) -> Session:
        """A session that is about to be started under this id, or a new one."""
        session_id = session_id or next(self._ids)
        session = self.sessions[session_id] = Session(self, session_id)
        return session

    def request(self, cmd: Sequence[str], id: str | None = None, **fields: object) -> tuple[Session, Event]:
        """A new session, and the message that will start it."""
        session = self.expect(id)
        return session, {"type": "exec", "id": session.id, "cmd": list(cmd), **fields}

    def exec(self, cmd: Sequence[str], id: str | None = None, **fields: object) -> Session:
        session, message = self.request(cmd, id, **fields)
        self.send(message)
        return session

    def attach(self, id: str | None = None) -> Session:
        session = self.expect(id)
        session.send("attach")
        return session

    def run(self, cmd: Sequence[str], stdin: bytes | None = None, **fields: object) -> tuple[bytes, bytes, Event]:
        """Run a command to its end: stdout, stderr and the last event."""
        session = self.exec(cmd, **fields)
        if stdin is not None:
            session.write(stdin)
            session.close_stdin()
        last = session.wait_last()
        return bytes(session.stdout), bytes(session.stderr), last

    def output(self, *cmd: str, **fields: object) -> str:
        """The stdout of a command that must succeed."""
        stdout, stderr, last = self.run(cmd, **fields)
        assert (last.get("code"), stderr) == (0, b""), (stdout, stderr, last)
        return stdout.decode()

    def assert_quiet(self) -> None:
        """Nothing but what belongs to its sessions has been sent before the answer to this request."""
        assert self.output("echo", "quiet") == "quiet\n"
        assert self.errors == []

    def close(self) -> None:
        """A closing handshake; quick, whatever is unread."""
        self.ws.close()

    def cut(self) -> None:
        """Lose the connection, as when a machine dies: no close frame, and RST if anything is unread."""
        with contextlib.suppress(OSError):
            # Wakes a thread that is in sendall() and has the lock that close_socket() needs.
            self.ws.socket.shutdown(socket.SHUT_RDWR)
        self.ws.close_socket()


def drain(client: RawClient) -> list[Event]:
    """Everything that is still received until the connection ends."""
    events = []
    with contextlib.suppress(ConnectionClosed):
        while True:
            events.append(client.receive())
    return events

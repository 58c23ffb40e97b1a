"""Faults that strike while twenty sessions stream: none loses a byte, and afterwards all is as before."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from streams import LEAN_MALLOC, MAIN, Streams, metric, scrape
from support import (
    AGENT,
    DEADLINE,
    TOKEN,
    Agent,
    RawClient,
    as_user,
    eventually,
    file_system,
    is_alive,
    need,
    need_root,
    wait_gone,
)

from agent_client import AgentConn, AgentProcess, ClientError, ConnectFailed, SessionError

StartAgent = Callable[..., Agent]
Connect = Callable[..., RawClient]


def streams_on(agent: Agent) -> Streams:
    return Streams(agent.url, agent.pid, agent.address)


@contextlib.contextmanager
def limited(pid: int, which: int, soft: int) -> Iterator[None]:
    """Lower a limit of a process that runs, and raise it again."""
    before = resource.prlimit(pid, which)
    resource.prlimit(pid, which, (soft, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, which, before)


def highest_descriptor(pid: int) -> int:
    return max(int(name) for name in os.listdir(f"/proc/{pid}/fd"))


def start_cat(conn: AgentConn) -> AgentProcess:
    """A cat that has started."""
    process = conn.popen(["cat"])
    process.stdin.write(b"x")
    assert process.stdout.read(1) == b"x"
    return process


def end_cat(process: AgentProcess) -> None:
    process.stdin.close()
    assert process.stdout.read() == b""
    assert process.wait(DEADLINE) == 0


def fill(conn: AgentConn) -> tuple[list[AgentProcess], str]:
    """Start commands until the agent refuses one: those, and what it says."""
    started = []
    while len(started) < 200:
        try:
            started.append(start_cat(conn))
        except SessionError as exc:
            return started, str(exc)
    pytest.fail("nothing was refused")


def why_not_connected(agent: Agent) -> str:
    """What a client is told that cannot connect, or whose connection is closed at once."""
    try:
        with AgentConn.dial(agent.address, TOKEN, patience=0) as conn:
            conn.run(["true"])
    except ClientError as exc:
        return str(exc)
    return ""


def connects_again(agent: Agent) -> None:
    eventually(lambda: not why_not_connected(agent), "a client that connects")


def tries(call: Callable[..., Any], *args: Any) -> Any:
    """What ``call`` returns, None if the agent refuses it."""
    try:
        return call(*args)
    except SessionError:
        return None


# Descriptors.


def test_at_the_limit_of_descriptors_new_work_is_refused_and_all_else_goes_on(start_agent: StartAgent) -> None:
    agent = start_agent(*MAIN, env=LEAN_MALLOC)
    with streams_on(agent) as streams, AgentConn.dial(agent.address, TOKEN) as conn:
        with limited(agent.pid, resource.RLIMIT_NOFILE, highest_descriptor(agent.pid) + 60):
            more, error = fill(conn)
            assert "too many open files" in error
            assert len(more) > 3
            assert "HTTP status 503: the agent cannot serve more: too many open files" in why_not_connected(agent)
            assert agent.health()["status"] == "ok"  # of the last descriptors, which are kept for such
            streams.wait_for_progress()
            end_cat(more.pop())
            eventually(lambda: tries(start_cat, conn), "a place that has become free is taken")
        connects_again(agent)
    agent.wait_for_log("cannot serve a connection: Too many open files")
    assert "unexpected error" not in agent.log


def test_without_a_single_descriptor_left_clients_wait_and_are_let_in_afterwards(start_agent: StartAgent) -> None:
    agent = start_agent(*MAIN, env=LEAN_MALLOC)
    with streams_on(agent) as streams:
        with limited(agent.pid, resource.RLIMIT_NOFILE, 20):
            calls = concurrent.futures.ThreadPoolExecutor(1)
            caller = calls.submit(AgentConn.dial, agent.address, TOKEN)
            agent.wait_for_log("cannot accept connections, trying again: Too many open files")
            streams.wait_for_progress()
        with calls, caller.result(DEADLINE) as conn:
            assert conn.run(["true"]).returncode == 0
    agent.wait_for_log("connections are accepted again, after [0-9]+ tries")
    assert agent.log.count("cannot accept connections") == 1
    assert "unexpected error" not in agent.log


# Processes and threads.


@pytest.fixture
def as_somebody(start_agent: StartAgent) -> Iterator[Callable[..., Agent]]:
    """Agents of a user of their own, since RLIMIT_NPROC counts all that a user has, and root is exempt from it."""
    need("setpriv", "unshare", "mount")
    need_root()
    uid = 20000 + os.getpid()
    home = Path(f"/tmp/as-somebody-{os.getpid()}")  # where others may go
    home.mkdir(mode=0o755)
    os.chown(home, uid, uid)

    def start(*flags: str, **options: Any) -> Agent:
        return start_agent("--pid-file", f"{home}/pid", *flags, prefix=as_user(uid), execs=True, **options)

    start.home = home  # type: ignore[attr-defined]
    yield start
    shutil.rmtree(home)


@contextlib.contextmanager
def without_new_threads(agent: Agent) -> Iterator[None]:
    """Let the system refuse an agent every process and thread."""
    (hard,) = re.findall(r"Max processes +\w+ +(\w+)", Path(f"/proc/{agent.pid}/limits").read_text())
    set_process_limit(agent, "1")
    try:
        yield
    finally:
        set_process_limit(agent, hard)


def set_process_limit(agent: Agent, soft: str) -> None:
    """As its own user: root alone may lack the capability."""
    uid = int(re.findall(r"Uid:\s+(\d+)", Path(f"/proc/{agent.pid}/status").read_text())[0])
    command = ["prlimit", "--pid", str(agent.pid), f"--nproc={soft}:"]
    subprocess.run(command, user=uid, group=uid, extra_groups=[], check=True)


WAITS = "import os, shutil, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {10}); os.write(1, b'.'); " \
    "signal.sigwait({10}); shutil.copyfileobj(sys.stdin.buffer, sys.stdout.buffer)"  # fmt: skip


def test_at_the_limit_of_processes_new_work_is_refused_and_all_else_goes_on(as_somebody: Callable[..., Agent]) -> None:
    agent = as_somebody(*MAIN, env=LEAN_MALLOC)
    with streams_on(agent) as streams, AgentConn.dial(agent.address, TOKEN) as conn:
        with without_new_threads(agent):
            _, error = fill(conn)
            assert "the limit of processes is reached" in error or "can't start new thread" in error
            for user in ("", str(os.stat(as_somebody.home).st_uid)):  # type: ignore[attr-defined]
                with pytest.raises(SessionError, match=r"the limit of processes is reached|can't start new thread"):
                    conn.popen(["true"], user=user).wait(DEADLINE)
            assert "can't start new thread" in why_not_connected(agent)
            streams.wait_for_progress()
        connects_again(agent)
        end_cat(start_cat(conn))
    assert "unexpected error" not in agent.log


def test_stdin_that_no_thread_can_be_had_for_is_written_once_there_is_one(as_somebody: Callable[..., Agent]) -> None:
    agent = as_somebody(*MAIN, env=LEAN_MALLOC)
    data = os.urandom(300_000)
    with streams_on(agent) as streams, AgentConn.dial(agent.address, TOKEN) as conn:
        waiting = [conn.popen([sys.executable, "-ISc", WAITS]) for _ in range(20)]  # more than threads are parked
        for process in waiting:
            assert process.stdout.read(1) == b"."
        with without_new_threads(agent):
            for process in waiting:
                process.stdin.write(data)
                process.stdin.close()
            agent.wait_for_log("stdin: no thread to write [0-9]+ bytes, trying again: can't start new thread")
            streams.wait_for_progress()
        for process in waiting:
            process.send_signal(signal.SIGUSR1)
        for process in waiting:
            assert process.stdout.read() == data
            assert process.wait(DEADLINE) == 0


def test_what_is_to_be_ended_at_the_limit_of_processes_is_ended_all_the_same(
    as_somebody: Callable[..., Agent], connect: Connect
) -> None:
    agent = as_somebody("--kill-timeout", "100ms", *MAIN, env=LEAN_MALLOC)
    with streams_on(agent) as streams:
        client = connect(agent)
        script = "setsid sh -c 'trap \"\" HUP; echo $$; exec sleep 300' & wait"
        sessions = [client.exec(["sh", "-c", script]) for _ in range(20)]  # more than threads are parked
        daemons = [int(session.wait_for_lines(1)[0]) for session in sessions]
        with without_new_threads(agent):
            for session in sessions:
                session.send("end")
            agent.wait_for_log("no thread to end processes in: .*can't start new thread")
            streams.wait_for_progress()
        for pid in daemons:
            wait_gone(pid)
        client.close()


def test_a_reload_and_a_health_check_at_the_limit_of_processes_fail_and_end_nothing(
    as_somebody: Callable[..., Agent],
) -> None:
    tokens = as_somebody.home / "tokens"  # type: ignore[attr-defined]
    tokens.write_text(TOKEN)
    tokens.chmod(0o644)
    flags = ("--token-file", str(tokens), "--health-cmd", "true", "--health-interval", "100ms", "--health-retries", "1")
    agent = as_somebody(*flags, *MAIN, env=LEAN_MALLOC)

    def health(status: str) -> bool:
        return agent.health()["health"]["status"] == status

    with streams_on(agent) as streams:
        eventually(lambda: health("healthy"), "the first check")
        with without_new_threads(agent):
            eventually(lambda: health("unhealthy"), "a check that cannot start")
            assert re.search("process|thread", agent.health()["health"]["log"][-1]["Output"])
            for _ in range(20):
                agent.signal(signal.SIGHUP)
                streams.wait_for_progress(1000)
        eventually(lambda: health("healthy"), "a check that can")
    assert "Traceback" not in agent.log


def test_an_agent_ends_at_the_limit_of_processes_with_the_exit_code_that_it_owes(
    as_somebody: Callable[..., Agent], connect: Connect
) -> None:
    agent = as_somebody("--keep-alive", "--", sys.executable, "-ISc",
                        "import signal, sys; signal.signal(15, lambda *_: sys.exit(5)); signal.pause()")  # fmt: skip
    clients = [connect(agent) for _ in range(20)]
    pids = [int(client.exec(["sh", "-c", "echo $$; exec sleep 300"]).wait_for_lines(1)[0]) for client in clients]
    set_process_limit(agent, "1")
    agent.signal(signal.SIGTERM)
    assert agent.wait() == 5
    for pid in pids:
        wait_gone(pid)


@pytest.mark.once
def test_an_agent_that_cannot_have_its_threads_says_so_and_leaves_nothing() -> None:
    """With ever more threads the start fails at another place, until it succeeds."""
    need("setpriv", "unshare", "mount")
    need_root()
    agent = (sys.executable, str(AGENT), "--addr", "127.0.0.1:0", "--pid-file", "", "--audit-log", "-")
    works: list[bool] = []
    while len(works) < 40 and not all(works[-2:] or [False]):
        limit = ("prlimit", f"--nproc={len(works) + 1}")
        command = [*as_user(40000 + os.getpid()), *limit, *agent, "--health-cmd", "true", "--keep-alive", "--", *SLEEP]
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
            assert process.stderr is not None
            log = []
            for line in process.stderr:
                log.append(line)
                if "listening on" in line:
                    process.terminate()
            code = process.wait(DEADLINE)
        works.append("listening on" in "".join(log))
        assert "Traceback" not in "".join(log)
        assert works[-1] or re.search("can't start new thread|the limit of processes", "".join(log)), log
        assert code in ((143,) if works[-1] else (1, 143)), log
        eventually(lambda: not running_for(40000 + os.getpid()), "its watchdog ends, too")
    assert works[-2:] == [True, True]
    assert len(works) > 8


SLEEP = ("sleep", "300")


def running_for(uid: int) -> list[int]:
    """The processes that a user has; one that has ended may wait for init to notice."""
    found = subprocess.run(["pgrep", "-u", str(uid)], capture_output=True, text=True).stdout
    return [pid for pid in map(int, found.split()) if is_alive(pid)]


# The log.


class Quiet:
    """An agent whose stderr is a file, or a pipe."""

    def __init__(self, tmp_path: Path, stderr: Any, *flags: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = "{}:{}".format(*free.getsockname())
        command = [
            sys.executable,
            str(AGENT),
            "--addr",
            self.address,
            "--pid-file",
            str(tmp_path / "pid"),
            *flags,
            *MAIN,
        ]
        environ = {**os.environ, **LEAN_MALLOC, "SOCKERLESS_AGENT_TOKEN": TOKEN}
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stderr, env=environ)
        eventually(self._answers, "the agent's start")

    def _answers(self) -> bool:
        with contextlib.suppress(ConnectFailed):
            AgentConn.dial(self.address, TOKEN, patience=0).close()
            return True
        return False

    def streams(self) -> Streams:
        return Streams(f"ws://{self.address}/ws", self.process.pid, self.address)

    def make_log(self, count: int) -> None:
        """Do what is refused, which is a line of the log each."""
        client = RawClient(f"ws://{self.address}/ws")
        for number in range(count):
            client.send({"type": "signal", "id": f"nobody-{number}", "signal": "TERM"})
            if number % 100 == 99:
                for _ in range(100):
                    client.wait_error()
        client.close()

    def lost(self) -> int:
        return int(metric(scrape(self.address), "log_lines_lost_total"))


@pytest.fixture
def quiet(tmp_path: Path) -> Iterator[Callable[..., Quiet]]:
    started: list[Quiet] = []

    def start(stderr: Any, *flags: str) -> Quiet:
        started.append(Quiet(tmp_path, stderr, *flags))
        return started[-1]

    yield start
    for agent in started:
        agent.process.terminate()
        agent.process.wait(DEADLINE)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a MiB."""
    with file_system(tmp_path / "disk", "512k") as disk:
        yield disk


@pytest.mark.root
def test_a_full_disk_for_log_and_audit_log_stops_nothing_and_loses_no_line(
    quiet: Callable[..., Quiet], small_disk: Path
) -> None:
    log, audit = small_disk / "log", small_disk / "audit"
    with open(log, "ab") as stderr:
        agent = quiet(stderr, "--audit-log", str(audit))
    with agent.streams() as streams:
        with open(small_disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(1000))
        agent.make_log(1000)
        with AgentConn.dial(agent.address, TOKEN) as conn:
            for number in range(20):
                assert conn.run(["true", str(number)]).returncode == 0
        streams.wait_for_progress()
        (small_disk / "filler").unlink()
        eventually(lambda: "nobody-999" in log.read_text(), "all lines")
        eventually(lambda: '["true", "19"]' in audit.read_text(), "all entries")
        assert agent.lost() == 0
    lines = log.read_text().splitlines()
    assert all(re.match(r"[0-9-]{10}T[0-9:.]{12}Z (info |warn |error) ", line) for line in lines)
    refused = re.findall(r"refused: no session has the id 'nobody-(\d+)'", "\n".join(lines))
    assert refused == list(map(str, range(1000)))
    assert len([line for line in lines if "audit log: cannot write to" in line]) == 1
    entries = [json.loads(line) for line in audit.read_text().splitlines()]
    commands = [entry["cmd"] for entry in entries if entry["event"] == "start" and entry.get("cmd", [""])[0] == "true"]
    assert commands[1:] == [["true", str(number)] for number in range(20)]  # the first is that of Streams


def test_a_log_that_is_not_read_for_long_says_how_much_is_missing(quiet: Callable[..., Quiet]) -> None:
    reading, writing = os.pipe()
    agent = quiet(writing, "--log-level", "debug")
    os.close(writing)
    with open(reading, "rb") as log:
        with agent.streams() as streams:
            agent.make_log(10000)
            streams.wait_for_progress()
            assert (lost := agent.lost()) > 0
            missing = 0
            while not missing:
                missing = sum(
                    map(int, re.findall(rb"(\d+) lines are missing here: stderr was not read", log.readline()))
                )
            assert missing >= lost
            reader = threading.Thread(target=log.read, daemon=True)
            reader.start()
        agent.process.terminate()
        assert agent.process.wait(DEADLINE) == 143
        reader.join(DEADLINE)


def test_a_log_that_is_closed_is_counted_and_stops_nothing(quiet: Callable[..., Quiet]) -> None:
    reading, writing = os.pipe()
    agent = quiet(writing)
    os.close(writing)
    os.close(reading)
    with agent.streams() as streams:
        before = agent.lost()
        agent.make_log(100)
        eventually(lambda: agent.lost() >= before + 100, "all lines are counted")
        streams.wait_for_progress()


# Memory.


@pytest.mark.once
def test_without_memory_work_waits_or_is_told_and_the_agent_lives_on(start_agent: StartAgent) -> None:
    agent = start_agent(*MAIN, env=LEAN_MALLOC)
    # A thread whose start fails half-way may be left waiting, a connection to the garbage collection.
    streams = Streams(agent.url, agent.pid, agent.address, lost="v1", margin=6)
    with streams, AgentConn.dial(agent.address, TOKEN) as conn:
        pages = int(Path(f"/proc/{agent.pid}/statm").read_text().split()[0])
        # Without the last 4 MiB a thread can begin that has no memory for its first line: then CPython's Thread.start()
        # waits for ever. So threads are refused here, and large buffers; test_faults_memory.py has the rest.
        with limited(agent.pid, resource.RLIMIT_AS, pages * resource.getpagesize() + (4 << 20)):
            flood = conn.popen(["head", "-c", "100000000", "/dev/zero"])
            for _ in range(10):
                tries(end_cat_of, conn)
            with contextlib.suppress(SessionError):
                assert sum(len(data) for data in iter(lambda: flood.stdout.read1(1 << 20), b"")) == 100_000_000
                assert flood.wait(DEADLINE) == 0
        streams.wait_for_progress()
        end_cat(start_cat(conn))


def end_cat_of(conn: AgentConn) -> None:
    end_cat(start_cat(conn))

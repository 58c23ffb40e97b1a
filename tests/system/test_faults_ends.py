"""What is stopped, killed, set back or never ends, while twenty sessions stream."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import RunningAgent, spawned
from streams import LEAN_MALLOC, MAIN, Streams, metric, scrape
from support import AS_PID_1, DEADLINE, TOKEN, Agent, RawClient, eventually, is_alive, need, need_root, wait_gone
from test_faults_streaming import end_cat, fill, start_cat, streams_on, tries
from test_least_privilege import watchdog_of

import agent_client
from agent_client import AgentConn, CommandNotExecutable, CommandNotFound

StartAgent = Callable[..., Agent]
Connect = Callable[..., RawClient]
IMPATIENT = ("--ping-interval", "200ms", "--ping-timeout", "1s")
CLIENT = (sys.executable, agent_client.__file__)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        eventually(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", "it is stopped")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


# Stopped.


@pytest.mark.once
def test_a_stopped_agent_loses_nothing(start_agent: StartAgent) -> None:
    agent = start_agent(*IMPATIENT, *MAIN, env=LEAN_MALLOC)
    with streams_on(agent) as streams:
        for seconds in (0.1, 2.5):  # shorter and longer than its own patience with its clients
            with stopped(agent.pid):
                time.sleep(seconds)
            streams.wait_for_progress()
    assert "nothing was heard" not in agent.log


@pytest.mark.once
def test_a_stopped_client_is_waited_for_and_holds_up_nobody(start_agent: StartAgent) -> None:
    """Its kernel acknowledges: a client that is suspended is no client that is gone."""
    agent = start_agent(*IMPATIENT, *MAIN, env=LEAN_MALLOC)
    environ = {**os.environ, "SOCKERLESS_AGENT_TOKEN": TOKEN, "SOCKERLESS_AGENT_ADDR": agent.address}
    command = [*CLIENT, "exec", "--", "seq", "1", "1000000"]
    with streams_on(agent) as streams, spawned(command, stdout=subprocess.PIPE, env=environ) as client:
        assert client.stdout.readline() == b"1\n"
        with stopped(client.pid):
            time.sleep(3)
            streams.wait_for_progress()
        numbers = client.stdout.read().split()
        assert client.wait(DEADLINE) == 0
        assert numbers == [b"%d" % number for number in range(2, 1_000_001)]
    assert "nothing was heard" not in agent.log


@pytest.mark.once
def test_a_backend_that_is_stopped_is_given_up_and_every_session_resumed(tmp_path: Path) -> None:
    environ = {**os.environ, "SOCKERLESS_AGENT_TOKEN": TOKEN}
    listen = [*CLIENT, "listen", "--addr", "127.0.0.1:0"]
    with spawned(listen, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environ, text=True) as backend:
        assert backend.stdout is not None
        port = next(found[1] for line in backend.stdout if (found := re.search(r"127\.0\.0\.1:(\d+)", line)))
        reading = threading.Thread(target=backend.stdout.read, daemon=True)
        reading.start()
        url = f"http://127.0.0.1:{port}/connect?id=box"
        box = RunningAgent(tmp_path, "--callback", url, *IMPATIENT, *MAIN, env=LEAN_MALLOC)
        box.wait_for_log("connected to")
        with Streams(f"ws://127.0.0.1:{port}/agents/box/ws", box.process.pid) as streams:
            with stopped(backend.pid):
                box.wait_for_log("nothing was heard of the peer")
            box.wait_for_log("session resumed", len(streams.streams))
            streams.wait_for_progress()
        assert box.stop() == 143


# The clock.

SHIFTED = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long shift(void) {
    static volatile long *shared;
    if (!shared) {
        int fd = open(getenv("CLOCK_SHIFT"), O_RDONLY);
        shared = mmap(0, 8, PROT_READ, MAP_SHARED, fd, 0);
        close(fd);
    }
    return *shared;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec += shift();
    return result;
}
time_t time(time_t *to) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (to) *to = now.tv_sec;
    return now.tv_sec;
}
int gettimeofday(struct timeval *to, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    to->tv_sec = now.tv_sec;
    to->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""


@pytest.mark.once
def test_a_clock_that_jumps_ends_nothing_and_holds_up_nothing(start_agent: StartAgent, tmp_path: Path) -> None:
    """The clock of the agent and its commands: that of the machine is others', too."""
    need("cc")
    (tmp_path / "clock.c").write_text(SHIFTED)
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", "clock.so", "clock.c", "-ldl"], cwd=tmp_path, check=True)
    shift = tmp_path / "shift"
    shift.write_bytes(bytes(8))
    audit = tmp_path / "audit"
    agent = start_agent(
        *IMPATIENT, "--resume-window", "60s", "--audit-log", str(audit), "--health-cmd", "true", "--health-interval",
        "100ms", "--lifetime", "1h", *MAIN,
        env={**LEAN_MALLOC, "LD_PRELOAD": str(tmp_path / "clock.so"), "CLOCK_SHIFT": str(shift)},
    )  # fmt: skip

    def last_check() -> str:
        return str(agent.health()["health"]["log"][-1]["Start"])

    def year_of(text: str) -> int:
        return int(text[:4])

    with streams_on(agent) as streams, AgentConn.dial(agent.address, TOKEN) as conn:
        now = time.gmtime().tm_year
        for years in (10, -20, 0):
            with open(shift, "r+b") as file:
                file.write((years * 365 * 86400).to_bytes(8, "little", signed=True))
            eventually(lambda years=years: abs(year_of(last_check()) - now - years) <= 1, "the next health check")
            assert abs(int(conn.run(["date", "+%Y"], capture_output=True).stdout) - now - years) <= 1
            streams.wait_for_progress()
            held = start_cat(conn)
            held.send_signal(signal.SIGKILL)
            assert held.wait(DEADLINE) == 137
    assert not re.search("nothing was heard|lifetime expired|nobody resumed|unexpected", agent.log)
    entries = [json.loads(line) for line in audit.read_text().splitlines()]
    years = {entry["time"][:4] for entry in entries}
    assert len(years) >= 3
    assert {entry["key"] for entry in entries if entry["event"] == "start"} == {
        entry["key"] for entry in entries if entry["event"] == "end"
    }


# Children.


@pytest.mark.once
def test_a_terminal_that_nobody_reads_holds_up_nobody_and_hears_ctrl_c(start_agent: StartAgent) -> None:
    agent = start_agent(*MAIN, env=LEAN_MALLOC)
    line = b"full" * 200 + b"\r\n"
    script = "trap 'exit 9' INT; while :; do echo \"$0\"; done"
    with streams_on(agent) as streams, AgentConn.dial(agent.address, TOKEN) as conn:
        process = conn.popen(["sh", "-c", script, "full" * 200], tty=True)
        eventually(lambda: metric(scrape(agent.address), "unacknowledged_largest_bytes") >= 1 << 20, "a full window")
        pid = process.started.pid  # type: ignore[union-attr]
        eventually(lambda: stands_still(pid), "it waits in its write")
        streams.wait_for_progress()
        assert process.stdout.read(3000 * len(line)) == line * 3000  # it goes on once it is read
        eventually(lambda: stands_still(pid), "it waits again")
        process.stdin.write(b"\x03")
        while process.stdout.read1(1 << 20):
            pass
        assert process.wait(DEADLINE) == 9


def stands_still(pid: int) -> bool:
    """Whether a process has used no CPU in a while."""
    before = Path(f"/proc/{pid}/stat").read_text().split()[13:15]
    time.sleep(0.1)
    return Path(f"/proc/{pid}/stat").read_text().split()[13:15] == before


def test_commands_that_end_at_once_have_all_a_start_and_an_end(start_agent: StartAgent, tmp_path: Path) -> None:
    """On a terminal such a command may be over before its start is told."""
    audit = tmp_path / "audit"
    agent = start_agent("--audit-log", str(audit), *MAIN, env=LEAN_MALLOC)
    with streams_on(agent), AgentConn.dial(agent.address, TOKEN) as conn:
        for _ in range(20):
            processes = [conn.popen(["true"], tty=number % 2 == 0) for number in range(20)]
            assert [process.wait(DEADLINE) for process in processes] == [0] * 20
    events = [json.loads(line) for line in audit.read_text().splitlines()]
    started = [entry["key"] for entry in events if entry["event"] == "start"]
    assert sorted(started) == sorted(entry["key"] for entry in events if entry["event"] == "end")


@pytest.mark.once
def test_what_cannot_be_executed_says_why(start_agent: StartAgent, tmp_path: Path) -> None:
    agent = start_agent(*MAIN, env=LEAN_MALLOC)
    busy, directory, text, plain = (tmp_path / name for name in ("busy", "directory", "text", "plain"))
    directory.mkdir()
    text.write_text("#!/no/such/interpreter\n")
    plain.write_text("no script\n")
    busy.write_bytes(Path("/bin/true").read_bytes())
    for path in (busy, text):
        path.chmod(0o755)
    expected = {
        str(busy): (CommandNotExecutable, "text file busy"),
        str(directory): (CommandNotExecutable, "is a directory"),
        str(text): (CommandNotFound, "the interpreter that it names is missing"),
        str(plain): (CommandNotExecutable, "permission denied"),
        str(plain / "x"): (CommandNotFound, "no such file"),
    }
    with open(busy, "r+b"), streams_on(agent), AgentConn.dial(agent.address, TOKEN) as conn:
        for user in ("", "root"):  # two ways to start a command
            for path, (kind, words) in expected.items():
                with pytest.raises(kind, match=words):
                    conn.popen([path], user=user).wait(DEADLINE)


# Limits of the agent's own.


@pytest.mark.once
def test_at_the_limit_of_sessions_one_more_is_refused_and_one_less_makes_room(start_agent: StartAgent) -> None:
    agent = start_agent("--max-total-sessions", "30", *MAIN, env=LEAN_MALLOC)
    with streams_on(agent) as streams, AgentConn.dial(agent.address, TOKEN) as conn:
        more, error = fill(conn)
        assert "the agent's limit is 30" in error
        assert len(more) == 30 - len(streams.streams)
        streams.wait_for_progress()
        end_cat(more.pop())
        more.append(eventually(lambda: tries(start_cat, conn), "the place that has become free"))
        for process in more:
            end_cat(process)
        eventually(lambda: metric(scrape(agent.address), "sessions") == len(streams.streams), "all places are free")
        more, error = fill(conn)
        assert len(more) == 30 - len(streams.streams)
        for process in more:
            end_cat(process)


# Killed.


class Marked:
    """An agent whose processes are known by a variable, and commands that try to outlive it."""

    def __init__(self, start_agent: StartAgent, **options: Any) -> None:
        self.mark = f"FAULT_MARK={uuid.uuid4()}"
        name, _, value = self.mark.partition("=")
        self.agent = start_agent("--kill-timeout", "200ms", *MAIN, env={**LEAN_MALLOC, name: value}, **options)

    def hide(self, conn: AgentConn) -> None:
        """Start what is hard to find."""
        conn.start_detached(["sh", "-c", "trap '' HUP TERM; while :; do sleep 1; done"])
        conn.start_detached(["sh", "-c", "setsid setsid sleep 300 & exit 0"])
        for script in ("(setsid sleep 300 &)", "setsid sh -c '(trap \"\" HUP; exec sleep 300) &'; exec sleep 300"):
            for tty in (False, True):
                conn.popen(["sh", "-c", script], tty=tty)
        eventually(lambda: len(self.processes()) >= 18 + 6, "they run")

    def processes(self) -> set[int]:
        """All that runs of it, but the agent itself and its watchdog."""
        found = set()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if self.mark.encode() in path.read_bytes() and is_alive(pid := int(path.parent.name)):
                    command = (path.parent / "cmdline").read_bytes()
                    if b"agent.py" not in command:
                        found.add(pid)
        return found


@pytest.mark.parametrize("prefix", [(), AS_PID_1], ids=["watched", "as PID 1"])
def test_an_agent_that_is_killed_takes_all_that_streams_and_hides(start_agent: StartAgent, prefix: Any) -> None:
    if prefix:
        need("unshare")
        need_root()
    marked = Marked(start_agent, prefix=prefix)
    agent = marked.agent
    streams = Streams(agent.url, agent.pid, agent.address, patience=1)
    streams.wait_for_progress(10_000)
    with AgentConn.dial(agent.address, TOKEN, patience=0) as conn:
        marked.hide(conn)
        agent.kill()
        streams.wait_for_loss()
    eventually(lambda: not marked.processes(), "nothing lives on")


@pytest.mark.once
def test_a_watchdog_that_is_stopped_does_its_work_later_and_one_that_is_killed_is_not_missed(
    start_agent: StartAgent,
) -> None:
    marked = Marked(start_agent)
    with streams_on(marked.agent) as streams:
        os.kill(watchdog_of(marked.agent), signal.SIGKILL)
        streams.wait_for_progress()
    assert marked.agent.stop() == 143
    eventually(lambda: not marked.processes(), "its own end takes all")

    marked = Marked(start_agent)
    watchdog = watchdog_of(marked.agent)
    with AgentConn.dial(marked.agent.address, TOKEN, patience=0) as conn:
        sleeping = conn.popen(["sh", "-c", "echo $$; exec sleep 300"])
        pid = int(sleeping.stdout.readline())
        with stopped(watchdog):
            marked.agent.kill()
            assert is_alive(pid)
        wait_gone(pid)
        wait_gone(watchdog)

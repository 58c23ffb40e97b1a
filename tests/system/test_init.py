"""The duties of an init: every signal, every orphan, the right exit code, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import (
    AGENT,
    AS_PID_1,
    DEADLINE,
    Agent,
    RawClient,
    children_of,
    eventually,
    is_alive,
    killed_afterwards,
    need,
    need_root,
    wait_gone,
)

import agent as agent_module

NAMES = {number: f"RT{number}" for number in range(1, 65)} | {number: number.name for number in signal.Signals}
PASSED = sorted(agent_module.PASSED_SIGNALS)
# Writes the number of every signal that it gets; ends on SIGTERM.
LISTENER = """
import os, signal, sys
numbers = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
print("ready", flush=True)
while True:
    print(f"got {signal.sigwait(numbers):d}.", flush=True)
"""


def main_of(agent: Agent) -> int:
    """The main process's PID, as this side of a PID namespace sees it."""
    (pid,) = children_of(agent.pid)
    return pid


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """An agent as a real PID 1, whose main process tells what signals it gets."""
    need("unshare")
    need_root()
    agent = Agent(tmp_path_factory.mktemp("init"), "--keep-alive", "--", sys.executable, "-c", LISTENER,
                  prefix=AS_PID_1)  # fmt: skip
    agent.wait_for_output(b"ready\n")
    yield agent
    assert agent.stop() == 143


def test_all_that_tini_passes_on_is_passed_on() -> None:
    needed = {"SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGWINCH", "SIGCONT", "SIGTSTP"}
    assert needed <= {NAMES[number] for number in PASSED}
    assert set(range(signal.SIGRTMIN, signal.SIGRTMAX + 1)) <= set(PASSED)


@pytest.mark.root
@pytest.mark.parametrize(
    "number", [number for number in PASSED if number != signal.SIGTERM], ids=lambda number: NAMES[number]
)
def test_a_signal_to_pid_1_is_passed_on(init: Agent, number: int) -> None:
    init.signal(number)
    init.wait_for_output(b"got %d.\n" % number)
    assert init.health()["exited"] is False


@pytest.mark.root
def test_a_signal_that_is_sent_often_arrives_at_last(init: Agent) -> None:
    # Realtime signals queue (signal(7)), so that each can be counted.
    before = init.output.count(b"got %d." % signal.SIGRTMAX)
    for _ in range(20):
        init.signal(signal.SIGRTMAX)
    eventually(lambda: init.output.count(b"got %d." % signal.SIGRTMAX) == before + 20, "all 20 signals")


@pytest.mark.parametrize("flags", [(), ("--signal-group",)], ids=["alone", "group"])
def test_a_signal_goes_to_the_main_process_alone_or_to_its_group(
    start_agent: Callable[..., Agent], flags: tuple[str, ...]
) -> None:
    script = (
        "sh -c 'trap \"echo child got it\" USR1; echo child up; while :; do sleep 0.02; done' & "
        "trap 'echo main got it; exit 5' USR1; while :; do sleep 0.02; done"
    )
    agent = start_agent(*flags, "--exit-with-main", "--keep-alive", "--", "sh", "-c", script)
    agent.wait_for_output(b"child up")
    agent.signal(signal.SIGUSR1)
    assert agent.wait() == 5
    assert (b"child got it" in agent.output) == bool(flags)


def test_a_signal_that_comes_before_the_main_process_is_not_lost(tmp_path: Path) -> None:
    # Pending since before the agent's first line; it ends the main process as soon as that is there.
    script = (
        "import os, signal, sys\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
    )
    flags = ("--addr", "127.0.0.1:0", "--pid-file", "", "--exit-with-main", "--keep-alive", "--", "sleep", "300")
    done = subprocess.run([sys.executable, "-c", script, str(AGENT), *flags], capture_output=True, timeout=DEADLINE)
    assert done.returncode == 128 + signal.SIGUSR1, done.stderr


def test_a_stop_signal_of_its_own(start_agent: Callable[..., Agent]) -> None:
    script = "trap 'exit 31' QUIT; trap 'exit 32' TERM; echo up; while :; do sleep 0.02; done"
    for number in (signal.SIGTERM, signal.SIGQUIT):
        agent = start_agent("--stop-signal", "QUIT", "--keep-alive", "--", "sh", "-c", script)
        agent.wait_for_output(b"up")
        agent.signal(number)
        assert agent.wait() == 31


def test_exit_codes_are_replaced(start_agent: Callable[..., Agent]) -> None:
    agent = start_agent("--exit-codes", "143:0,9:4", "--keep-alive", "--", "sh", "-c", "echo up; exec sleep 300")
    agent.wait_for_output(b"up")
    assert agent.stop() == 0
    agent = start_agent("--exit-codes", "143:0,9:4", "--exit-with-main", "--keep-alive", "--", "sh", "-c", "exit 9")
    assert agent.wait() == 4


def test_ctrl_c_ends_main_process_and_agent(start_agent: Callable[..., Agent]) -> None:
    agent = start_agent("--keep-alive", "--", "sh", "-c", "echo up; exec sleep 300")
    agent.wait_for_output(b"up")
    agent.signal(signal.SIGINT)
    assert agent.wait() == 130


def test_ctrl_c_that_the_main_process_handles_ends_nothing(start_agent: Callable[..., Agent]) -> None:
    script = "trap 'echo handled' INT; echo up; while :; do sleep 0.02; done"
    agent = start_agent("--stop-timeout", "1s", "--keep-alive", "--", "sh", "-c", script)
    agent.wait_for_output(b"up")
    for count in range(1, 4):
        agent.signal(signal.SIGINT)
        eventually(lambda count=count: agent.output.count(b"handled") == count, "the trap")
    assert agent.health()["exited"] is False
    assert agent.stop() == 143


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_without_a_main_process_these_end_the_agent(start_agent: Callable[..., Agent], number: int) -> None:
    agent = start_agent()
    agent.signal(number)
    assert agent.wait() == 0


DAEMON = "(setsid sh -c 'echo $$; exec >/dev/null 2>&1; exec sleep 300' &); exit 0"


@pytest.mark.parametrize("flags", [("--subreaper",), ("--init", "on")])
def test_a_subreaper_adopts_and_reaps(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient], flags: tuple[str, ...]
) -> None:
    agent = start_agent(*flags)
    pid = int(connect(agent).output("sh", "-c", DAEMON))
    eventually(lambda: pid in children_of(agent.pid), "the orphan's adoption")
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: pid not in children_of(agent.pid), "the orphan's end; a zombie is a child, too")


def test_without_it_an_orphan_is_somebody_elses(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    agent = start_agent()
    pid = int(connect(agent).output("sh", "-c", DAEMON))
    with killed_afterwards(pid):
        assert pid not in children_of(agent.pid)


@pytest.mark.root
def test_with_init_off_pid_1_leaves_orphans_and_knows_its_own_children(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    need("unshare")
    need_root()
    agent = start_agent("--init", "off", prefix=AS_PID_1)
    client = connect(agent)
    client.output("sh", "-c", "(setsid sh -c 'exec >/dev/null 2>&1; exit 1' &)")
    eventually(lambda: any(not is_alive(pid) for pid in children_of(agent.pid)), "a zombie that nobody waits for")
    for number in range(100):
        assert client.run(["sh", "-c", f"exit {number}"])[2]["code"] == number
    assert agent.stop() == 0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_daemon_whose_command_has_ended_does_not_outlive_the_agent(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient], how: int
) -> None:
    agent = start_agent()
    client = connect(agent)
    pid = int(client.output("sh", "-c", DAEMON))
    client.close()
    agent.wait_for_log("0 sessions were running")
    with killed_afterwards(pid):
        assert is_alive(pid)
        agent.signal(how)
        assert agent.wait() == 0
        wait_gone(pid)


def test_what_the_main_process_left_is_killed_with_it(start_agent: Callable[..., Agent]) -> None:
    script = f"trap 'exit 3' TERM; {DAEMON.removesuffix('exit 0')} while :; do sleep 0.02; done"
    agent = start_agent("--keep-alive", "--", "sh", "-c", script)
    agent.wait_for_output(b"\n")
    pid = int(agent.output.split()[0])
    assert agent.stop() == 3
    assert not is_alive(pid)


def test_in_the_background_of_a_terminal_it_is_not_stopped(tmp_path: Path) -> None:
    """A terminal with TOSTOP stops whoever writes to it from the background; the agent logs to it."""
    need("setsid")
    keyboard, line = os.openpty()
    command = f"stty tostop; {sys.executable} {AGENT} --addr unix:{tmp_path}/agent --pid-file '' & echo $!; wait"
    shell = subprocess.Popen(["setsid", "--ctty", "bash", "-mc", command], stdin=line, stdout=line, stderr=line)
    os.close(line)
    seen = b""
    try:
        deadline = time.monotonic() + DEADLINE
        while b"listening on" not in seen:
            assert time.monotonic() < deadline
            seen += os.read(keyboard, 65536)
        pid = int(seen.split()[0])
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
        assert state != b"T"
        os.kill(pid, signal.SIGTERM)
        while b"agent ends: exit code 0" not in seen:
            assert time.monotonic() < deadline
            seen += os.read(keyboard, 65536)
        wait_gone(pid)
    finally:
        shell.kill()
        shell.wait()
        os.close(keyboard)

"""The reaper: every exit code is exact, and nothing stays behind, as PID 1 too."""

from __future__ import annotations

import collections
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support import AS_PID_1, Agent, RawClient, Session, children_of, eventually, need, need_root

CHILDREN = 20_000
CONNECTIONS = 4
AT_ONCE = 8  # on each connection
# Orphans, whose parent is gone before they end: as PID 1 the agent inherits them.
WITH_ORPHANS = "(sleep 0.02 & true & sh -c 'exit 99' &) >/dev/null 2>&1; exit {}"


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def run_many(client: RawClient, count: int, offset: int) -> list[str]:
    """Run short children, several at once; what was wrong with any of them."""
    wrong = []
    running: collections.deque[tuple[int, Session]] = collections.deque()
    for number in range(count + AT_ONCE):
        if len(running) == AT_ONCE or number >= count:
            expected, session = running.popleft()
            if session.wait() != expected or session.stdout:
                wrong.append(f"{session!r} should have ended with {expected}")
            del client.sessions[session.id]
        if number < count:
            code = (number + offset) % 100
            script = WITH_ORPHANS if number % 10 == 0 else "exit {}"
            running.append((code, client.exec(["sh", "-c", script.format(code)])))
        if not running:
            break
    return wrong


@pytest.mark.once
@pytest.mark.root
def test_20000_short_children_with_orphans_leave_nothing_behind(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    need("unshare")
    need_root()
    agent = start_agent(prefix=AS_PID_1)
    warm_up = connect(agent)
    assert run_many(warm_up, 50, 0) == []
    assert warm_up.output("sh", "-c", "echo $PPID") == "1\n"
    warm_up.close()
    eventually(lambda: not children_of(agent.pid), "the end of the warm-up")
    # Its threads are parked for a while; the descriptors are all there is from now on.
    base_descriptors, base_threads = descriptors(agent.pid), threads(agent.pid)

    wrong: list[str] = []
    clients = [connect(agent) for _ in range(CONNECTIONS)]
    workers = [
        threading.Thread(target=lambda n=n: wrong.extend(run_many(clients[n], CHILDREN // CONNECTIONS, 25 * n)))
        for n in range(CONNECTIONS)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    for client in clients:
        client.close()
    # A zombie is a child, too.
    eventually(lambda: not children_of(agent.pid), f"no child is left, now {children_of(agent.pid)}")
    eventually(lambda: descriptors(agent.pid) <= base_descriptors, "the descriptors are as before")
    eventually(lambda: threads(agent.pid) <= base_threads, "the threads are as before")
    assert agent.stop() == 0


@pytest.mark.root
def test_pid_1_reaps_orphans_that_it_never_started(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    need("unshare", "setsid")
    need_root()
    agent = start_agent(prefix=AS_PID_1)
    client = connect(agent)
    client.output("sh", "-c", "for i in 1 2 3 4 5; do setsid -f sleep 0.05 >/dev/null 2>&1; done")
    eventually(lambda: not children_of(agent.pid), "the end of all orphans")


@pytest.mark.root
def test_pid_1_ends_on_sigterm_with_the_main_processs_code(start_agent: Callable[..., Agent]) -> None:
    need("unshare")
    need_root()
    script = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.02; done"
    agent = start_agent("--keep-alive", "--", "sh", "-c", script, prefix=AS_PID_1)
    agent.wait_for_output(b"ready\n")
    (main,) = children_of(agent.pid)
    status = Path(f"/proc/{main}/status").read_text()
    inside = re.search(r"^NSpid:.*\t(\d+)$", status, re.MULTILINE)  # what the namespace calls it, see proc(5)
    assert inside is not None
    assert agent.pid_file.read_text() == inside[1]
    assert agent.stop() == 7


def test_an_exit_code_is_not_taken_for_another_childs(client: RawClient) -> None:
    # Children that end before the spawn has returned, beside such that are killed.
    sessions = []
    for number in range(300):
        sessions.append((number % 50, client.exec(["sh", "-c", f"exit {number % 50}"])))
        if number % 3 == 0:
            sessions.append((137, client.exec(["sh", "-c", "kill -9 $$"])))
    for expected, session in sessions:
        assert session.wait() == expected


def test_commands_that_cannot_start_leave_nothing_behind(agent: Agent, client: RawClient, tmp_path: Path) -> None:
    client.run(["true"], tty=True)
    client.run(["true"])
    before = descriptors(agent.pid)
    for number in range(100):
        client.run(["/no/such/command"], tty=number % 2 == 0)
        client.run(["true"], workdir=f"{tmp_path}/missing", tty=number % 2 == 0)
    eventually(lambda: descriptors(agent.pid) <= before, "the descriptors are as before")

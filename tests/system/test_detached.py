"""Detached commands: they need no connection, are listed, and can be attached to while they run and afterwards."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import DEADLINE, TOKEN, RunningAgent, spawned
from support import Agent, eventually, is_alive, need_root, wait_gone
from test_version_2 import Client

import agent_client
from agent import DETACHED_KEPT, Reason
from agent_client import AgentConn, CommandNotExecutable, CommandNotFound, SessionError

CLIENT = [sys.executable, agent_client.__file__]


@pytest.fixture
def box(tmp_path: Path) -> Iterator[RunningAgent]:
    started = RunningAgent(tmp_path, "--resume-window", "0", "--kill-timeout", "1s")
    yield started
    started.stop()
    assert "unexpected error" not in started.log


@pytest.fixture
def environ(box: RunningAgent) -> dict[str, str]:
    return {**os.environ, "SOCKERLESS_AGENT_ADDR": box.addr, "SOCKERLESS_AGENT_TOKEN": TOKEN}


def listed(conn: AgentConn, session_id: str) -> dict[str, Any]:
    """What the list says of a detached command; {} if it is not there."""
    return next((entry for entry in conn.sessions() if entry["id"] == session_id), {})


def wait_ended(conn: AgentConn, session_id: str) -> dict[str, Any]:
    eventually(lambda: "code" in listed(conn, session_id), "it has ended")
    return listed(conn, session_id)


ECHO = "echo before; read line; echo got $line; exit 7"


def test_it_lives_on_without_a_connection_and_can_be_attached_to(box: RunningAgent) -> None:
    with AgentConn.dial(box.addr, TOKEN) as conn:
        started = conn.start_detached(["sh", "-c", ECHO], stdin=subprocess.PIPE)
        assert is_alive(started.pid)
    with AgentConn.dial(box.addr, TOKEN) as conn:
        entry = listed(conn, started.id)
        assert abs(entry.pop("started_at") - time.time()) < DEADLINE
        assert entry == {
            "id": started.id, "kind": "detached", "pid": started.pid, "tty": False, "user": "", "connected": False,
            "cmd": ["sh", "-c", ECHO],
        }  # fmt: skip
        first, second = conn.attach(started.id), conn.attach(started.id)
        assert first.stdout.readline() == second.stdout.readline() == b"before\n"
        first.detach()
        second.stdin.write(b"a word\n")
        assert second.stdout.read() == b"got a word\n"
        assert second.wait(DEADLINE) == 7


def test_who_attaches_after_the_end_has_all_output_and_the_code(conn: AgentConn) -> None:
    started = conn.start_detached(["sh", "-c", "echo out; echo err >&2; exit 3"])
    entry = wait_ended(conn, started.id)
    assert entry["code"] == 3
    assert entry["started_at"] <= entry["ended_at"]
    for _ in range(2):
        process = conn.attach(started.id)
        assert (process.stdout.read(), process.stderr.read(), process.wait(DEADLINE)) == (b"out\n", b"err\n", 3)
    process = conn.attach(started.id, replay=False)
    assert (process.stdout.read(), process.stderr.read(), process.wait(DEADLINE)) == (b"", b"", 3)


def test_how_much_is_replay_is_told(conn: AgentConn) -> None:
    started = conn.start_detached(["sh", "-c", "echo 12345; echo 678 >&2; read x; echo more"], stdin=subprocess.PIPE)
    with conn.attach(started.id) as process:
        assert process.stdout.readline() == b"12345\n"
        assert process.stderr.readline() == b"678\n"
    process = conn.attach(started.id)
    assert process.stdout.read(6) == b"12345\n"
    assert process.started is not None and process.started.replay == 10
    silent = conn.attach(started.id, replay=False)
    eventually(lambda: silent.started, "it is attached")
    assert silent.started is not None and silent.started.replay == 0
    process.stdin.write(b"\n")
    assert silent.stdout.read() == b"more\n"


def test_user_environment_directory_and_terminal(conn: AgentConn, tmp_path: Path) -> None:
    need_root()
    script = 'echo "$A $(id -u) $(pwd) $(stty size)"'
    options: dict[str, Any] = {"env": {"A": "1"}, "cwd": "/etc", "tty": True, "size": (91, 17), "user": "nobody"}
    started = conn.start_detached(["sh", "-c", script], **options)
    assert conn.attach(started.id).stdout.read() == b"1 65534 /etc 17 91\r\n"
    entry = wait_ended(conn, started.id)
    assert (entry["user"], entry["tty"]) == ("nobody", True)


def test_its_stdin_is_empty_unless_it_is_asked_for(conn: AgentConn) -> None:
    started = conn.start_detached(["cat"])
    assert conn.attach(started.id).wait(DEADLINE) == 0


def test_what_cannot_start_says_so_and_is_not_listed(conn: AgentConn) -> None:
    with pytest.raises(CommandNotFound, match="no-such-command"):
        conn.start_detached(["no-such-command"])
    with pytest.raises(CommandNotExecutable, match="/etc/passwd"):
        conn.start_detached(["/etc/passwd"])
    with pytest.raises(SessionError, match="/nowhere"):
        conn.start_detached(["true"], cwd="/nowhere")
    assert conn.sessions() == []


def test_an_id_that_is_not_there_cannot_be_attached_to(conn: AgentConn) -> None:
    process = conn.attach("nobody has this")
    with pytest.raises(SessionError, match="no detached command has the id 'nobody has this'") as caught:
        process.wait(DEADLINE)
    assert caught.value.reason == "no_detached_command"


def test_signals_reach_it_through_an_attachment(conn: AgentConn) -> None:
    started = conn.start_detached(["sleep", "300"])
    process = conn.attach(started.id)
    process.terminate()
    assert process.wait(DEADLINE) == 143


def test_the_agents_end_is_its_end(box: RunningAgent, conn: AgentConn) -> None:
    started = conn.start_detached(["sh", "-c", "sleep 300 & exec sleep 300"])
    assert box.stop() == 0
    wait_gone(started.pid)


def refused(conn: AgentConn, cmd: list[str]) -> bool:
    """Whether there is no room for it: what has ended still counts until its output has been read."""
    try:
        conn.start_detached(cmd)
    except CommandNotFound:
        return False
    except SessionError as exc:
        assert exc.reason == "limit"
        return True
    return False


def test_it_counts_as_a_session_and_gives_its_place_back(tmp_path: Path) -> None:
    box = RunningAgent(tmp_path, "--max-total-sessions", "2")
    with AgentConn.dial(box.addr, TOKEN) as conn:
        running = [conn.start_detached(["cat"], stdin=subprocess.PIPE) for _ in range(2)]
        for _ in range(3):
            with pytest.raises(SessionError, match="limit is 2") as caught:
                conn.start_detached(["true"])
            assert caught.value.reason == "limit"
    with AgentConn.dial(box.addr, TOKEN) as conn:
        with pytest.raises(SessionError, match="limit is 2"):
            conn.attach(running[0].id).wait(DEADLINE)
        os.kill(running[0].pid, 15)
        wait_ended(conn, running[0].id)
        for _ in range(5):  # one place is free again, whatever comes of it
            eventually(lambda: not refused(conn, ["no-such-command"]), "there is room")
            eventually(lambda: not refused(conn, ["true"]), "there is room")
        os.kill(running[1].pid, 15)
        for _ in range(2):
            eventually(lambda: not refused(conn, ["sleep", "300"]), "there is room")
        assert refused(conn, ["true"])
    assert box.stop() == 0


def test_the_newest_that_have_ended_are_kept(conn: AgentConn) -> None:
    """By their end, not by their start; and no more of them though nothing new starts."""
    oldest = conn.start_detached(["sh", "-c", "read x; echo last"], stdin=subprocess.PIPE)
    many = [conn.start_detached(["sh", "-c", "read x"], stdin=subprocess.PIPE) for _ in range(DETACHED_KEPT + 5)]
    for command in many:
        with conn.attach(command.id) as process:
            process.stdin.close()
            assert process.wait(DEADLINE) == 1
    with conn.attach(oldest.id) as process:
        process.stdin.write(b"\n")
        assert process.stdout.read() == b"last\n"
        assert process.wait(DEADLINE) == 0
    kept = [entry["id"] for entry in conn.sessions() if entry["kind"] == "detached"]
    assert sorted(kept) == sorted([oldest.id, *(command.id for command in many[6:])])
    with pytest.raises(SessionError, match="no detached command"):
        conn.attach(many[0].id).wait(DEADLINE)


def test_what_is_kept_of_them_is_bounded(tmp_path: Path) -> None:
    box = RunningAgent(tmp_path, "--replay-size", "64KiB")
    with AgentConn.dial(box.addr, TOKEN) as conn:
        for _ in range(3 * DETACHED_KEPT):
            started = conn.start_detached(["sh", "-c", "head -c 3000000 /dev/zero"])
            wait_ended(conn, started.id)
        status = Path(f"/proc/{box.process.pid}/status").read_text()
        resident = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert resident is not None and int(resident[1]) < 150 << 10
        assert len(conn.attach(started.id).stdout.read()) >= 64 << 10
    assert box.stop() == 0


def test_an_id_can_be_taken_once_at_a_time(start_agent: Callable[..., Agent]) -> None:
    agent = start_agent()
    client = Client(agent)
    try:
        first = client.exec(["sh", "-c", "read x"], "same", detach=True)
        client.until(lambda: first.started)
        second = client.exec(["true"], "same", detach=True)
        client.until(lambda: second.errors)
        assert second.errors[0]["reason"] == Reason.ID_TAKEN
        descriptors = len(os.listdir(f"/proc/{agent.pid}/fd"))
        for _ in range(20):
            again = client.exec(["true"], "same", detach=True)
            client.until(lambda again=again: again.errors)
        assert len(os.listdir(f"/proc/{agent.pid}/fd")) <= descriptors
        other = client.exec(["echo", "its own"], "same")  # a session of this name is another thing
        client.until(lambda: other.exit)
        assert other.stdout == b"its own\n"
        client.send("end", id="same")
        os.kill(first.started["pid"], 9)  # type: ignore[index]

        def ended() -> bool:
            client.lists.clear()
            client.send("sessions")
            client.until(lambda: client.lists)
            return any(entry.get("code") == 137 for entry in client.lists[0])

        eventually(ended, "it has ended")

        def taken_over() -> bool:
            third = client.exec(["true"], "same", detach=True)
            client.until(lambda: third.started or third.errors)
            assert third.started or third.errors[0]["reason"] == Reason.ID_TAKEN
            return third.started is not None

        eventually(taken_over, "its output has ended, too")
    finally:
        client.ws.close()


def test_nothing_that_is_said_to_a_start_under_way_breaks_the_connection(start_agent: Callable[..., Agent]) -> None:
    client = Client(start_agent())
    try:
        for number in range(50):
            name = f"d{number}"
            session = client.exec(["sh", "-c", "exit 0"], name, detach=True)
            client.send("ack", id=name, offset=0)
            client.send("park", id=name)
            client.send("signal", id=name, signal="CONT")
            client.send("resize", id=name, width=80, height=24)
            client.until(lambda session=session: session.started or session.errors)
        last = client.exec(["echo", "still there"])
        client.until(lambda: last.exit)
        assert last.stdout == b"still there\n"
    finally:
        client.ws.close()


# ── the command line ──────────────────────────────────────────────────────────


def cli(environ: dict[str, str], *words: str, data: bytes = b"") -> tuple[int, bytes, bytes]:
    done = subprocess.run([*CLIENT, *words], env=environ, input=data, capture_output=True, timeout=DEADLINE)
    return done.returncode, done.stdout, done.stderr


def test_exec_d_prints_an_id_that_attach_takes(environ: dict[str, str]) -> None:
    script = "echo $A; pwd; exit 5"
    code, stdout, stderr = cli(environ, "exec", "-d", "-e", "A=1", "-w", "/etc", "--", "sh", "-c", script)
    assert (code, stderr) == (0, b"")
    (session_id,) = stdout.decode().split()
    assert cli(environ, "attach", session_id) == (5, b"1\n/etc\n", b"")
    assert cli(environ, "attach", "--no-replay", session_id) == (5, b"", b"")
    code, stdout, _ = cli(environ, "ps")
    assert code == 0
    line = rf"^{session_id} +detached +\d+ +ended \(5\) +sh -c '{re.escape(script)}'$"
    assert re.search(line, stdout.decode(), re.MULTILINE)


def test_exec_d_i_waits_for_who_attaches(environ: dict[str, str]) -> None:
    _, stdout, _ = cli(environ, "exec", "-d", "-i", "cat")
    session_id = stdout.decode().strip()
    assert cli(environ, "attach", "-i", session_id, data=b"typed") == (0, b"typed", b"")


@pytest.mark.parametrize(("cmd", "code"), [("no-such-command", 127), ("/etc/passwd", 126)])
def test_what_cannot_start_has_the_shells_code(environ: dict[str, str], cmd: str, code: int) -> None:
    status, stdout, stderr = cli(environ, "exec", "-d", cmd)
    assert (status, stdout) == (code, b"")
    assert cmd.encode() in stderr


def test_attach_to_nobody_says_so(environ: dict[str, str]) -> None:
    code, stdout, stderr = cli(environ, "attach", "nobody")
    assert (code, stdout, stderr) == (125, b"", b"agent_client: no detached command has the id 'nobody'\n")


def test_a_client_that_is_killed_leaves_it_alone(environ: dict[str, str], conn: AgentConn) -> None:
    started = conn.start_detached(["sh", "-c", "echo up; read x; echo on"], stdin=subprocess.PIPE)
    with spawned([*CLIENT, "attach", started.id], env=environ, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        process.kill()
        process.wait()
    watcher = conn.attach(started.id)
    watcher.stdin.write(b"\n")
    assert watcher.stdout.read() == b"up\non\n"


def test_many_at_once_are_each_their_own(conn: AgentConn) -> None:
    found: dict[int, bytes] = {}

    def run(number: int) -> None:
        started = conn.start_detached(["sh", "-c", f"echo {number}"])
        found[number] = conn.attach(started.id).stdout.read()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(DETACHED_KEPT)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert found == {number: f"{number}\n".encode() for number in range(DETACHED_KEPT)}

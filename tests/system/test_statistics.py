"""What runs, what it uses, and how it is: lists, statistics, and health that is told on its change."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import DEADLINE, TOKEN, RunningAgent
from support import Agent, RawClient, eventually, need_root
from test_version_2 import Client

import agent_client
from agent_client import AgentConn, SessionError

CLIENT = [sys.executable, agent_client.__file__]
MAIN = "echo ready; read x; exit 9"


@pytest.fixture
def box(tmp_path: Path) -> Iterator[RunningAgent]:
    started = RunningAgent(tmp_path, "--keep-alive", "--", "sh", "-c", MAIN)
    yield started
    started.stop()
    assert "unexpected error" not in started.log


def usage(conn: AgentConn, session_id: str) -> dict[str, Any]:
    (found,) = (entry for entry in conn.stats()["sessions"] if entry["id"] == session_id)
    return found


WAIT = "print('done', flush=True)\ninput()"  # what a script ends with that is to be looked at


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def test_cpu_time_is_counted(conn: AgentConn) -> None:
    """That of children that have ended, too."""
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    script = f"import subprocess, sys\n{burn}\nsubprocess.run([sys.executable, '-c', {burn!r}])\n{WAIT}"
    process = conn.popen(python(script))
    assert process.stdout.readline() == b"done\n"
    spent = usage(conn, process.id)["cpu_seconds"]
    assert 0.9 <= spent < DEADLINE
    assert usage(conn, process.id)["cpu_seconds"] >= spent
    assert conn.stats()["container"]["cpu_seconds"] >= spent


def test_memory_descriptors_and_threads_are_counted(conn: AgentConn) -> None:
    script = """
import os, threading
block = bytearray(os.urandom(50 << 20))
files = [open("/dev/null") for _ in range(200)]
event = threading.Event()
for _ in range(7):
    threading.Thread(target=event.wait, daemon=True).start()
"""
    before, process = conn.popen(python(WAIT)), conn.popen(python(script + WAIT))
    assert before.stdout.readline() == process.stdout.readline() == b"done\n"
    less, more = usage(conn, before.id), usage(conn, process.id)
    assert 50 << 20 <= more["memory"] - less["memory"] < 80 << 20
    assert more["fds"] - less["fds"] == 200
    assert (less["threads"], more["threads"]) == (1, 8)
    assert less["processes"] == more["processes"] == 1
    assert more["kind"] == "exec" and more["cmd"][0] == sys.executable


def test_input_and_output_are_counted(conn: AgentConn, tmp_path: Path) -> None:
    script = f"f = open({str(tmp_path / 'file')!r}, 'wb')\nf.write(bytes(5 << 20))\nf.flush()\n{WAIT}"
    process = conn.popen(python(script))
    assert process.stdout.readline() == b"done\n"
    assert usage(conn, process.id)["write_bytes"] >= 5 << 20


def test_the_whole_tree_is_counted_a_daemon_too(conn: AgentConn) -> None:
    script = "setsid sh -c 'setsid sleep 300 & exec sleep 300' >/dev/null 2>&1 & sleep 300 & echo up; read x"
    process = conn.popen(["sh", "-c", script])
    other = conn.popen(["sleep", "300"])
    assert process.stdout.readline() == b"up\n"
    eventually(lambda: usage(conn, process.id)["processes"] == 4, "the tree is whole")
    assert usage(conn, other.id)["processes"] == 1
    process.stdin.write(b"\n")  # what it leaves behind is still its own
    assert usage(conn, other.id)["processes"] == 1


def test_main_process_and_detached_commands_are_counted(conn: AgentConn) -> None:
    started = conn.start_detached(["sh", "-c", "sleep 300 & sleep 300"])
    eventually(lambda: usage(conn, started.id)["processes"] == 3, "the tree is whole")
    main = usage(conn, "")
    assert (main["kind"], main["processes"], main["cmd"][:2]) == ("main", 1, ["sh", "-c"])
    os.kill(started.pid, 9)
    eventually(lambda: "code" in conn.sessions()[1], "it has ended")
    assert usage(conn, started.id)["memory"] >= 0


def test_the_container_is_described(conn: AgentConn) -> None:
    before = time.time()
    stats = conn.stats()
    assert before <= stats["time"] <= time.time()
    assert stats["cpus"] == os.cpu_count()
    container = stats["container"]
    assert container["memory"] > 0 and 0 < container["memory_limit"] <= stats["memory_total"]
    assert container["processes"] > 1 and container["threads"] > container["processes"]
    assert container["system_cpu_seconds"] >= container["cpu_seconds"] > 0
    assert container["network"]["lo"]["rx_bytes"] > 0
    assert set(container["network"]["lo"]) == {
        f"{way}_{what}" for way in ("rx", "tx") for what in ("bytes", "packets", "errors", "dropped")
    }
    assert "processes" not in stats


def test_every_process_is_described_when_asked_for(conn: AgentConn, box: RunningAgent) -> None:
    need_root()
    process = conn.popen(["sh", "-c", "exec sleep 300"], user="nobody", tty=True)
    started = eventually(lambda: process.started, "it runs")

    def found() -> dict[str, Any]:
        return {entry["pid"]: entry for entry in conn.stats(processes=True)["processes"]}.get(started.pid, {})

    eventually(lambda: found().get("cmd") == ["sleep", "300"], "sleep runs")
    entry = found()
    assert (entry["user"], entry["uid"], entry["ppid"]) == ("nobody", 65534, box.process.pid)
    assert entry["tty"].startswith("/dev/pts/")
    assert entry["name"] == "sleep" and entry["state"] == "sleeping"
    assert 0 < entry["rss"] <= entry["vsz"] and entry["cpu_seconds"] >= 0
    assert abs(entry["start_time"] - time.time()) < 3 * DEADLINE


def test_without_psutil_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/psutil.py").write_text("raise ImportError('not here')")
    box = RunningAgent(tmp_path, env={"PYTHONPATH": str(tmp_path / "hidden")})
    with AgentConn.dial(box.addr, TOKEN) as conn:
        for _ in range(2):
            with pytest.raises(SessionError, match="statistics need the Python package psutil") as caught:
                conn.stats()
            assert caught.value.reason == "unavailable"
        assert conn.run(["echo", "hello"], capture_output=True).stdout == b"hello\n"
    environ = {**os.environ, "SOCKERLESS_AGENT_ADDR": box.addr, "SOCKERLESS_AGENT_TOKEN": TOKEN}
    done = subprocess.run([*CLIENT, "stats"], env=environ, capture_output=True, timeout=DEADLINE)
    assert (done.returncode, done.stdout) == (125, b"")
    assert b"psutil" in done.stderr
    assert box.stop() == 0


def test_stats_are_printed(box: RunningAgent, conn: AgentConn) -> None:
    started = conn.start_detached(["sleep", "300"])
    environ = {**os.environ, "SOCKERLESS_AGENT_ADDR": box.addr, "SOCKERLESS_AGENT_TOKEN": TOKEN}
    done = subprocess.run([*CLIENT, "stats"], env=environ, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (0, "")
    head, *lines = done.stdout.splitlines()
    assert head.split()[:3] == ["ID", "CPU", "%"]
    figures = r" +\d+\.\d% +[\d.]+ \w+ +\d+ +\d+ +\d+ +[\d.]+ \w+ +[\d.]+ \w+"
    for name, line in zip(("main process", re.escape(started.id), r"\(all\)"), lines, strict=True):
        assert re.fullmatch(name + figures, line), line
    done = subprocess.run([*CLIENT, "stats", "--json"], env=environ, capture_output=True, timeout=DEADLINE)
    assert {entry["id"] for entry in json.loads(done.stdout)["sessions"]} == {"", started.id}


@pytest.mark.parametrize("kind", ["stats", "sessions", "health", "archive_stat"])
def test_a_flood_of_questions_is_bounded_and_stops_nobody(start_agent: Callable[..., Agent], kind: str) -> None:
    """10,000 of them, of which many have long answers, from a client that reads none meanwhile."""
    check = "head -c 4000 /dev/zero | tr '\\0' x"
    agent = start_agent("--health-cmd", check, "--health-interval", "10ms")
    # The one change of its health is over before anybody is there to be told.
    eventually(lambda: len(agent.health()["health"]["log"]) == 5, "five checks")
    flooder, other = Client(agent), Client(agent)
    try:
        long = other.exec(["sh", "-c", "sleep 300", "x" * 20_000], "long")
        other.until(lambda: long.started)
        for number in range(10_000):
            flooder.send(kind, id=f"q{number}", path="/etc")
            if number % 1000 == 0:
                session = other.exec(["echo", "hello"], f"s{number}")
                other.until(lambda session=session: session.exit)
                assert session.stdout == b"hello\n"
        status = Path(f"/proc/{agent.pid}/status").read_text()
        resident = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert resident is not None and int(resident[1]) < 130 << 10
        answers = {"answer": 0, "limit": 0}
        while sum(answers.values()) < 10_000:
            event = json.loads(flooder.ws.recv(DEADLINE))
            assert event["type"] == kind or event.get("reason") == "limit", event
            answers["answer" if event["type"] == kind else "limit"] += 1
        assert answers["answer"] > 0
        if kind in ("sessions", "health"):
            assert answers["limit"] == 0
    finally:
        flooder.ws.close()
        other.ws.close()


# ── health ────────────────────────────────────────────────────────────────────


@pytest.fixture
def checked(tmp_path: Path) -> Iterator[tuple[RunningAgent, Path]]:
    """An agent whose health is whether a file is there."""
    mark = tmp_path / "healthy"
    command = f"echo looked; test -e {mark}"
    flags = ("--health-cmd", command, "--health-interval", "50ms", "--health-retries", "2")
    started = RunningAgent(tmp_path, *flags, "--keep-alive", "--", "sleep", "300")
    yield started, mark
    started.stop()


def test_a_change_of_health_is_told_once_to_version_2_alone(checked: tuple[RunningAgent, Path]) -> None:
    box, mark = checked
    mark.touch()
    # The second result shows that the first one, with its change, has been dealt with.
    eventually(lambda: len(agent_client.fetch_health(box.addr)["health"]["log"]) > 1, "two checks")
    eventually(lambda: agent_client.fetch_health(box.addr)["health"]["status"] == "healthy", "healthy")
    old = RawClient(f"ws://{box.addr}/ws", token=TOKEN)
    told: list[dict[str, Any]] = []
    also: list[dict[str, Any]] = []
    with AgentConn.dial(box.addr, TOKEN) as conn, AgentConn.dial(box.addr, TOKEN) as second:
        conn.on_health, second.on_health = told.append, also.append
        states = []
        for wanted in ("unhealthy", "healthy", "unhealthy"):
            mark.touch() if wanted == "healthy" else mark.unlink()
            states.append(wanted)
            eventually(lambda: len(told) == len(also) == len(states), f"both are told: {wanted}")
            for _ in range(10):  # checks that change nothing tell nothing
                last = conn.health()["health"]["log"][-1]["Start"]
                eventually(lambda last=last: conn.health()["health"]["log"][-1]["Start"] != last, "another check")
        assert [state["health"]["status"] for state in told] == states
        assert [state["health"]["status"] for state in also] == states
        assert told[-1]["status"] == "ok" and told[-1]["exited"] is False
        assert told[-1]["health"]["log"][-1]["Output"] == "looked\n"
    output = old.run(["echo", "hello"])
    assert output[0] == b"hello\n"
    old.assert_quiet()
    old.close()


def test_health_is_answered_as_over_http(checked: tuple[RunningAgent, Path], conn: AgentConn) -> None:
    box, mark = checked
    mark.touch()
    with AgentConn.dial(box.addr, TOKEN) as asking:
        eventually(lambda: asking.health()["health"]["status"] == "healthy", "healthy")
        over_http = agent_client.fetch_health(box.addr)
        assert set(over_http) == set(asking.health())
        assert over_http["pid"] == asking.health()["pid"]
    assert "health" not in conn.health()
    assert conn.health()["status"] == "ok"


def test_who_does_not_read_gets_the_last_word_alone(start_agent: Callable[..., Agent], tmp_path: Path) -> None:
    """Changes of health that wait do not pile up."""
    mark, final = tmp_path / "flips", tmp_path / "final"
    check = f"""
        # Read once: what is printed and what is judged are the same word.
        if test -e {final}; then read -r word <{final}; printf %s "$word"; test "$word" = well; exit; fi
        if test -e {mark}; then rm {mark}; else touch {mark}; exit 1; fi
    """
    flags = ("--health-cmd", check, "--health-interval", "10ms", "--health-retries", "1")
    agent = start_agent(*flags, "--keep-alive", "--", "sleep", "300")
    client = Client(agent)
    try:
        # What the client does not read fills the connection.
        flood = client.exec(["head", "-c", "100000000", "/dev/zero"], window=64 << 20)
        eventually(lambda: agent.log.count("health:") > 300, "many changes")
        for word, verdict in (("ill", "unhealthy"), ("well", "healthy")):
            (tmp_path / "new").write_text(f"{word}\n")
            (tmp_path / "new").rename(final)
            eventually(lambda word=word: agent.health()["health"]["log"][-1]["Output"] == word, word)
            assert agent.health()["health"]["status"] == verdict
        told: list[str] = []
        while "well" not in told:
            message = client.ws.recv(DEADLINE)
            if isinstance(message, bytes):
                flood.received += len(message) - 3
                client.send("ack", id=flood.id, offset=flood.received)
                continue
            event = json.loads(message)
            if event["type"] == "health":
                told.append(event.get("log", ""))
        assert len(told) < 100
    finally:
        client.ws.close()

"""The client on a connection that is cut: every session goes on, to the byte."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from proxy import Proxy
from running import DEADLINE, TOKEN, RunningAgent, spawned

import agent_client
from agent_client import AgentConn, ConnectionLost, SessionError


@pytest.fixture
def box(tmp_path: Path) -> Iterator[RunningAgent]:
    started = RunningAgent(tmp_path, "--keep-alive", "--", "sh", "-c", "echo ready; read x; echo got $x; exit 9")
    yield started
    started.stop()


@pytest.fixture
def conn(proxy: Proxy) -> Iterator[AgentConn]:
    with AgentConn.dial(proxy.addr, TOKEN) as connection:
        assert connection.version == 2
        yield connection


def test_everything_goes_on_after_a_cut(conn: AgentConn, proxy: Proxy) -> None:
    shell = conn.popen(["sh"])
    main = conn.attach()
    assert main.stdout.readline() == b"ready\n"
    shell.stdin.write(b"echo one\n")
    assert shell.stdout.readline() == b"one\n"
    for count in range(5):
        proxy.cut()
        shell.stdin.write(b"echo %d\n" % count)
        assert shell.stdout.readline() == b"%d\n" % count
    main.stdin.write(b"line\n")
    assert main.stdout.read() == b"got line\n"
    assert main.wait(DEADLINE) == 9
    shell.stdin.write(b"exit 4\n")
    assert shell.wait(DEADLINE) == 4
    assert proxy.connections >= 2


def test_what_ends_while_the_link_is_down_is_told(conn: AgentConn, proxy: Proxy, tmp_path: Path) -> None:
    script = f"echo up; while [ ! -e {tmp_path}/go ]; do sleep 0.02; done; seq 1 50000; touch {tmp_path}/done; exit 21"
    process = conn.popen(["sh", "-c", script])
    assert process.stdout.readline() == b"up\n"
    outages: list[bool] = []
    conn.on_outage = outages.append
    proxy.refusing = True
    proxy.cut()
    (tmp_path / "go").touch()
    deadline = time.monotonic() + DEADLINE
    while not (tmp_path / "done").exists() or not outages:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    proxy.refusing = False
    assert process.stdout.read() == "".join(f"{number}\n" for number in range(1, 50001)).encode()
    assert process.wait(DEADLINE) == 21
    assert outages == [True, False]


def test_a_command_that_is_started_while_the_link_is_down_runs_when_it_is_up(conn: AgentConn, proxy: Proxy) -> None:
    keeper = conn.popen(["sh", "-c", "echo up; exec sleep 1000"])
    assert keeper.stdout.readline() == b"up\n"
    down = threading.Event()
    conn.on_outage = lambda lost: down.set()
    proxy.refusing = True
    proxy.cut()
    assert down.wait(DEADLINE)
    process = conn.popen(["sh", "-c", "cat; exit 3"])
    process.stdin.write(b"early")
    process.stdin.close()
    proxy.refusing = False
    assert process.stdout.read() == b"early"
    assert process.wait(DEADLINE) == 3
    keeper.kill()
    assert keeper.wait(DEADLINE) == 137


@pytest.mark.once
@pytest.mark.parametrize("seed", range(int(os.environ.get("CUT_SEEDS", "4"))))
def test_cuts_at_any_time_lose_and_repeat_nothing(conn: AgentConn, proxy: Proxy, seed: int) -> None:
    chances = random.Random(seed)
    data = chances.randbytes(12_000_000)
    cat, counter = conn.popen(["cat"]), conn.popen(["sh", "-c", "seq 1 400000; exit 5"])
    digest = conn.popen(["sha256sum"])
    for process in (cat, counter, digest):  # a cut before the agent has said so ends a session
        while process.started is None:
            time.sleep(0.001)
    stop = threading.Event()
    cuts = 0

    def cut() -> None:
        nonlocal cuts
        # After progress, not after time: on a busy machine no connection would live long enough to make any.
        while not stop.is_set():
            enough = proxy.carried + chances.randrange(1, 1_000_000)
            while proxy.carried < enough and not stop.wait(0.001):
                pass
            proxy.cut()
            cuts += 1

    results: dict[str, bytes] = {}
    cutter = threading.Thread(target=cut)
    readers = [
        threading.Thread(target=lambda name=name, process=process: results.update({name: process.stdout.read()}))
        for name, process in (("cat", cat), ("counter", counter), ("digest", digest))
    ]
    for thread in (*readers, cutter):
        thread.start()
    at = 0
    while at < len(data):
        size = chances.randrange(1, 100_000)
        cat.stdin.write(data[at : at + size])
        digest.stdin.write(data[at : at + size])
        at += size
    cat.stdin.close()
    digest.stdin.close()
    deadline = time.monotonic() + DEADLINE
    while any(thread.is_alive() for thread in readers):
        if time.monotonic() > deadline - DEADLINE / 2:
            stop.set()  # a link that is cut all the time may never get to the end
        assert time.monotonic() < deadline
        time.sleep(0.01)
    stop.set()
    cutter.join()
    assert results["cat"] == data
    assert results["counter"] == "".join(f"{number}\n" for number in range(1, 400001)).encode()
    assert results["digest"].split()[0].decode() == hashlib.sha256(data).hexdigest()
    assert [process.wait(DEADLINE) for process in (cat, counter, digest)] == [0, 5, 0]
    assert cuts


def test_past_the_agents_window_the_session_is_lost(tmp_path: Path) -> None:
    box = RunningAgent(tmp_path, "--resume-window", "300ms")
    proxy = Proxy(box.addr)
    with AgentConn.dial(proxy.addr, TOKEN) as conn:
        process = conn.popen(["sh", "-c", "echo up; exec sleep 1000"])
        assert process.stdout.readline() == b"up\n"
        proxy.refusing = True
        proxy.cut()
        box.wait_for_log("nobody resumed the session in time")
        proxy.refusing = False
        with pytest.raises(ConnectionLost, match="session lost"):
            process.wait(DEADLINE)
        assert conn.run(["true"]).returncode == 0
    proxy.close()
    box.stop()


def test_an_agent_that_was_started_anew_knows_no_session(tmp_path: Path) -> None:
    first = RunningAgent(tmp_path)
    proxy = Proxy(first.addr)
    with AgentConn.dial(proxy.addr, TOKEN) as conn:
        process = conn.popen(["sh", "-c", "echo up; exec sleep 1000"])
        assert process.stdout.readline() == b"up\n"
        proxy.refusing = True
        first.process.kill()
        first.wait()
        second = RunningAgent(tmp_path)
        host, _, port = second.addr.rpartition(":")
        proxy._target = (host, int(port))
        proxy.refusing = False
        with pytest.raises(ConnectionLost, match="session lost"):
            process.wait(DEADLINE)
    proxy.close()
    second.stop()


def test_closing_ends_what_runs_at_once(tmp_path: Path) -> None:
    box = RunningAgent(tmp_path)
    conn = AgentConn.dial(box.addr, TOKEN)
    process = conn.popen(["sh", "-c", "echo $$; exec sleep 1000"])
    pid = int(process.stdout.readline())
    conn.close()
    deadline = time.monotonic() + DEADLINE
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises((ConnectionLost, SessionError)):
        process.wait(DEADLINE)
    box.stop()


def test_the_command_line_says_that_it_pauses_and_goes_on(box: RunningAgent, proxy: Proxy) -> None:
    environ = {**os.environ, "SOCKERLESS_AGENT_TOKEN": TOKEN, "SOCKERLESS_AGENT_ADDR": proxy.addr}
    command = [sys.executable, agent_client.__file__, "exec", "-i", "--", "sh", "-c", "echo up; cat; exit 8"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with spawned(command, env=environ, **pipes) as process:
        assert process.stdout.readline() == b"up\n"
        proxy.refusing = True
        proxy.cut()
        assert process.stderr.readline() == b"\n"
        assert process.stderr.readline() == b"agent_client: connection lost, trying to resume\n"
        process.stdin.write(b"typed meanwhile\n")
        process.stdin.close()
        proxy.refusing = False
        assert process.stderr.readline() == b"agent_client: resumed\n"
        assert process.stdout.read() == b"typed meanwhile\n"
        assert process.wait(DEADLINE) == 8

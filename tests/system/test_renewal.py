"""A client's connection that was lost while nothing ran on it: the next start makes it again, or says why not."""

from __future__ import annotations

import gc
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import NoReturn

import pytest
from lossy import LossyLink
from proxy import Proxy
from running import DEADLINE, TOKEN, RunningAgent
from support import eventually, need, need_root
from test_resume_networks import dial_within

import agent_client
from agent import ThreadPool
from agent_client import AgentConn, ConnectFailed, ConnectionLost


@pytest.fixture
def box(tmp_path: Path) -> Iterator[RunningAgent]:
    started = RunningAgent(tmp_path)
    yield started
    started.stop()


@pytest.fixture(params=[2, 1])
def conn(request: pytest.FixtureRequest, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[AgentConn]:
    """Of both versions of the protocol."""
    if request.param == 1:
        monkeypatch.setattr(agent_client, "SUBPROTOCOL", "none")
    with AgentConn.dial(proxy.addr, TOKEN) as connection:
        assert connection.version == request.param
        yield connection


def echo(conn: AgentConn, word: str = "hi") -> str:
    return str(conn.run(["echo", word], capture_output=True, text=True).stdout)


def lose(conn: AgentConn, proxy: Proxy) -> None:
    """Cut an idle connection, and wait until that is known here."""
    proxy.cut()
    conn._thread.join(DEADLINE)
    assert not conn._thread.is_alive()


def test_the_next_start_makes_it_again(conn: AgentConn, proxy: Proxy) -> None:
    for count in range(1, 4):
        assert echo(conn) == "hi\n"
        assert proxy.connections == count
        lose(conn, proxy)
    with conn.popen(["cat"]) as process:
        process.stdin.write(b"typed\n")
        assert process.stdout.readline() == b"typed\n"


@pytest.mark.parametrize("conn", [2], indirect=True)  # version 1 has neither
def test_what_is_detached_or_asked_makes_it_again_too(conn: AgentConn, proxy: Proxy) -> None:
    lose(conn, proxy)
    assert conn.health()["status"] == "ok"
    lose(conn, proxy)
    started = conn.start_detached(["sh", "-c", "echo out; exit 3"])
    lose(conn, proxy)
    process = conn.attach(started.id)
    assert (process.stdout.read(), process.wait(DEADLINE)) == (b"out\n", 3)
    assert proxy.connections == 4


def test_many_starts_at_once_make_it_once(conn: AgentConn, proxy: Proxy) -> None:
    lose(conn, proxy)
    with ThreadPoolExecutor(20) as executor:
        words = list(executor.map(lambda number: echo(conn, str(number)), range(20)))
    assert words == [f"{number}\n" for number in range(20)]
    assert proxy.connections == 2


def test_if_it_cannot_be_made_the_start_says_so_and_the_one_after_tries_again(conn: AgentConn, proxy: Proxy) -> None:
    lose(conn, proxy)
    proxy.refusing = True
    for _ in range(2):
        with pytest.raises(ConnectionLost, match=r"lost.*; it cannot be made again: "):
            echo(conn)
    gc.collect()  # nothing half-made is left to complain
    proxy.refusing = False
    assert echo(conn) == "hi\n"


def test_a_command_that_was_lost_is_not_started_a_second_time(box: RunningAgent, proxy: Proxy, tmp_path: Path) -> None:
    """Its connection is given up, after which there is another for what comes next."""
    marks = tmp_path / "marks"
    with AgentConn.dial(proxy.addr, TOKEN, patience=0.2) as conn:
        process = conn.popen(["sh", "-c", f"echo x >> {marks}; exec cat"])
        eventually(marks.exists, "its start")
        proxy.refusing = True
        proxy.cut()
        with pytest.raises(ConnectionLost):
            process.wait(DEADLINE)
        proxy.refusing = False
        assert echo(conn) == "hi\n"
        with pytest.raises(ConnectionLost):
            process.wait(DEADLINE)
    assert marks.read_text() == "x\n"


def test_who_wants_to_hear_of_the_loss_does(proxy: Proxy) -> None:
    with AgentConn.dial(proxy.addr, TOKEN, patience=0) as conn:
        lose(conn, proxy)
        with pytest.raises(ConnectionLost):
            echo(conn)
        with pytest.raises(ConnectionLost):
            conn.health()
    assert proxy.connections == 1


def test_what_was_closed_stays_closed(conn: AgentConn, proxy: Proxy) -> None:
    conn.close()
    with pytest.raises(ConnectionLost):
        echo(conn)
    assert proxy.connections == 1


@pytest.mark.root
def test_an_agent_whose_machine_has_gone_is_given_up_after_the_times_that_were_asked_for(tmp_path: Path) -> None:
    """With those that it has of itself this would take two minutes."""
    need_root()
    need("ip", "ss")
    link = LossyLink(seed=1, loss=0.0, delay=0.0)
    try:
        prefix = ("ip", "netns", "exec", link.names[1])
        box = RunningAgent(tmp_path, "--addr", f"{link.addresses[1]}:0", prefix=prefix)
        times = {"patience": 0.5, "ping_interval": 0.2, "ping_timeout": 1.0}
        with dial_within(link, box.addr.rpartition(":")[2], **times) as conn:
            process = conn.popen(["cat"])
            process.stdin.write(b"here\n")
            assert process.stdout.readline() == b"here\n"
            link.take(1, "down")
            with pytest.raises(ConnectionLost):
                process.wait(DEADLINE)
    finally:
        link.close()


def test_times_that_make_no_sense_are_refused(box: RunningAgent) -> None:
    for times in ({"ping_interval": 0.0}, {"ping_timeout": -1.0}):
        with pytest.raises(ValueError, match="must be more than 0 s"):
            AgentConn.dial(box.addr, TOKEN, **times)


@pytest.mark.parametrize("conn", [2], indirect=True)  # version 1 resumes nothing
def test_one_that_was_made_again_is_given_its_own_time_when_it_is_lost(
    conn: AgentConn, box: RunningAgent, proxy: Proxy
) -> None:
    conn._patience = 0.2
    process = conn.popen(["cat"])
    proxy.refusing = True
    proxy.cut()
    with pytest.raises(ConnectionLost):
        process.wait(DEADLINE)
    proxy.refusing = False
    conn._patience = DEADLINE
    conn._renew()
    box.process.send_signal(signal.SIGSTOP)  # so that nothing comes on this one
    try:
        with ThreadPoolExecutor(1) as executor:
            word = executor.submit(echo, conn)
            eventually(lambda: conn._flows, "its request")
            proxy.cut()
            box.process.send_signal(signal.SIGCONT)
            assert word.result(DEADLINE) == "hi\n"
    finally:
        box.process.send_signal(signal.SIGCONT)


def refuse_threads(monkeypatch: pytest.MonkeyPatch, function: str) -> list[str]:
    """Refuse every new thread for a function of this name; returns the names of those that were."""
    refused: list[str] = []
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if getattr(thread._target, "__name__", "") == function:  # type: ignore[attr-defined]
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")  # the system's own limit is not for a test to reach
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    return refused


@pytest.mark.parametrize("conn", [2], indirect=True)
def test_what_runs_goes_on_once_a_thread_is_to_be_had_again(conn: AgentConn, proxy: Proxy) -> None:
    process = conn.popen(["cat"])
    with pytest.MonkeyPatch.context() as patch:
        refused = refuse_threads(patch, "recv_events")
        proxy.cut()
        eventually(lambda: refused, "a thread that is refused")
    process.stdin.write(b"still here\n")
    assert process.stdout.readline() == b"still here\n"


@pytest.mark.parametrize("function", ["recv_events", "_receive", "_loop"])
def test_a_start_that_gets_no_thread_for_a_connection_says_so(conn: AgentConn, proxy: Proxy, function: str) -> None:
    lose(conn, proxy)
    with pytest.MonkeyPatch.context() as patch:
        if function == "_loop":  # else a parked thread is good enough
            patch.setattr(agent_client, "_pool", ThreadPool())
        refuse_threads(patch, function)
        with pytest.raises(ConnectionLost, match=r"it cannot be made again: .*can't start new thread"):
            echo(conn)
    assert echo(conn) == "hi\n"


@pytest.mark.parametrize("function", ["recv_events", "_receive", "_loop"])
def test_a_first_connection_that_gets_no_thread_is_an_error_and_leaves_nothing_open(
    box: RunningAgent, function: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if function == "_loop":
            patch.setattr(agent_client, "_pool", ThreadPool())
        refuse_threads(patch, function)
        with pytest.raises(ConnectFailed, match="can't start new thread"):
            AgentConn.dial(box.addr, TOKEN)
    if function != "recv_events":  # else the agent was not asked for anything yet
        box.wait_for_log("connection (closed|lost)")


@pytest.mark.parametrize("conn", [2], indirect=True)
def test_who_hears_of_an_outage_hears_of_its_end_even_if_a_start_has_ended_it(conn: AgentConn, proxy: Proxy) -> None:
    told: list[bool] = []
    conn.on_outage = told.append
    conn._patience = 0.2
    process = conn.popen(["cat"])
    proxy.refusing = True
    proxy.cut()
    with pytest.raises(ConnectionLost):
        process.wait(DEADLINE)
    assert told == [True]
    proxy.refusing = False
    assert echo(conn) == "hi\n"
    assert told == [True, False]


def test_many_starts_at_once_fail_with_one_try(conn: AgentConn, proxy: Proxy) -> None:
    """Each would take as long as the handshake may, one after the other."""
    lose(conn, proxy)
    tries: list[str] = []
    failing = threading.Event()
    redial = conn._redial

    def fail() -> NoReturn:
        tries.append("one")
        assert failing.wait(DEADLINE)
        raise ConnectFailed("no answer")

    def waiting() -> bool:
        """Whether all have seen how many tries failed before."""
        return sum(is_renewing(frame) for frame in sys._current_frames().values()) == 20

    conn._redial = fail
    with ThreadPoolExecutor(20) as executor:
        starts = [executor.submit(echo, conn) for _ in range(20)]
        eventually(waiting, "20 starts that wait")
        failing.set()
        for start in starts:
            with pytest.raises(ConnectionLost, match=r"it cannot be made again: no answer"):
                start.result(DEADLINE)
    assert tries == ["one"]
    conn._redial = redial
    assert echo(conn) == "hi\n"


def is_renewing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "_renew" and "failures" in frame.f_locals:
            return True
        frame = frame.f_back
    return False

"""Sessions over links that lose and delay packets, that are cut, and whose ends are stopped; in both modes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cutting import CuttingProxy, Direction, Doom, How, Place
from lossy import LossyLink
from running import DEADLINE, TOKEN, RunningAgent
from support import eventually, need, need_root
from test_command_line import Terminal
from test_resume_properties import Checked, SignalTeller, numbers, run_with_a_token, within_deadline

import agent_client
from agent_client import AgentConn, ConnectionLost, ReverseListener


@pytest.fixture
def link() -> Iterator[LossyLink]:
    need_root()
    need("ip", "ss")
    started = LossyLink(seed=1, loss=0.02, delay=0.004)
    yield started
    started.close()


def dial_within(link: LossyLink, port: str, **options: Any) -> AgentConn:
    """A connection whose sockets are in the first namespace, those of the redials too."""

    def dial() -> Any:
        return link.call(0, lambda: agent_client._dial(f"{link.addresses[1]}:{port}", TOKEN, 5.0, None))

    return AgentConn(dial(), dial, **options)


@pytest.mark.root
def test_a_link_that_loses_delays_and_is_cut(link: LossyLink, tmp_path: Path) -> None:
    box = RunningAgent(tmp_path, "--addr", f"{link.addresses[1]}:0", prefix=("ip", "netns", "exec", link.names[1]))
    chances = random.Random(1)
    with dial_within(link, box.addr.rpartition(":")[2]) as conn:
        outages: list[bool] = []
        conn.on_outage = outages.append
        echo, teller = conn.popen(["cat"]), SignalTeller(conn, 4)
        counter = Checked(conn.popen(["seq", "1", "200000"]), numbers(200000))
        data = chances.randbytes(2_000_000)
        received: list[bytes] = []
        reader = threading.Thread(target=lambda: received.append(echo.stdout.read()), daemon=True)
        reader.start()
        events: list[Callable[[], None]] = [
            lambda: pull_the_cable(link),
            lambda: link.reset_connections(0),
            lambda: link.reset_connections(1),
            lambda: take_down_and_up(link, 0),
            lambda: link.reset_connections(0),
            lambda: take_down_and_up(link, 1),
            lambda: link.reset_connections(1),
        ]
        size = len(data) // 20
        for number in range(20):
            echo.stdin.write(data[number * size : (number + 1) * size])
            teller.send([number % 8])
            if number % 3 == 1 and events:
                events.pop(0)()
            run_with_a_token(conn, tmp_path / f"token{number}", number)
        assert not events
        teller.finish()
        echo.stdin.close()
        counter.finish()
        reader.join(DEADLINE)
        assert hashlib.sha256(received[0]).digest() == hashlib.sha256(data).digest()
        assert echo.wait(DEADLINE) == 0
        assert outages.count(True) >= 4  # the resets; TCP itself gets over the rest
    assert link.lost
    box.stop()


LINK_DOWN = 1.0  # seconds: several retransmissions' time


def pull_the_cable(link: LossyLink) -> None:
    """Nothing passes for longer than one retransmission timeout (RFC 6298), and nobody is told."""
    loss, link.loss = link.loss, 1.0
    time.sleep(LINK_DOWN)
    link.loss = loss


def take_down_and_up(link: LossyLink, side: int) -> None:
    link.take(side, "down")
    time.sleep(LINK_DOWN)
    link.take(side, "up")


@pytest.mark.root
def test_an_agent_that_gives_a_silent_link_up_has_its_sessions_resumed(link: LossyLink, tmp_path: Path) -> None:
    flags = ("--ping-interval", "200ms", "--ping-timeout", "1s", "--addr", f"{link.addresses[1]}:0")
    box = RunningAgent(tmp_path, *flags, prefix=("ip", "netns", "exec", link.names[1]))
    with dial_within(link, box.addr.rpartition(":")[2]) as conn:
        echo = Checked(conn.popen(["cat"]))
        echo.echoes = True
        echo.write(b"before")
        echo.read(6)
        link.loss = 1.0
        echo.write(b"meanwhile")
        box.wait_for_log("nothing was heard of the peer")
        box.wait_for_log("1 sessions were running")
        link.loss = 0.0
        echo.read(9)
        echo.finish()
    box.stop()


def test_an_agent_behind_a_link_that_is_cut_dials_again_and_all_goes_on(tmp_path: Path) -> None:
    """Reverse mode: here the agent is the client of the proxy."""
    with ReverseListener("127.0.0.1", 0, token=TOKEN) as listener:
        proxy = CuttingProxy(f"127.0.0.1:{listener.port}")
        flags = ("--callback", f"http://{proxy.addr}/cb?id=box", "--callback-retries", "0")
        box = RunningAgent(tmp_path, *flags)
        conn = listener.wait_for("box")
        assert conn.version == 2
        echo, teller = Checked(conn.popen(["cat"])), SignalTeller(conn, 9)
        echo.echoes = True
        for number, how in enumerate((*How, *How)):
            place = list(Place)[number % 3 + 1]
            proxy.doom(Doom(how, place, list(Direction)[number % 2], number % 4 + 1))
            while proxy.doomed():
                run_with_a_token(conn, tmp_path / "token", number)
                echo.write(bytes(range(250)))
                teller.send([number % 8])
                echo.read(250)
        assert proxy.total() == 2 * len(How)
        teller.finish()
        echo.finish()
        assert listener.wait_for("box") is conn
        box.stop()
        proxy.close()


# Ends that are stopped, as a laptop is that is suspended.


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[CuttingProxy]:
    box = RunningAgent(tmp_path, "--ping-interval", "200ms", "--ping-timeout", "1s",
                       "--keep-alive", "--", "sh", "-c", "echo ready; cat; exit 9")  # fmt: skip
    started = CuttingProxy(box.addr)
    started.box = box  # type: ignore[attr-defined]
    yield started
    started.close()
    box.stop()


def test_a_stopped_agent_goes_on_with_its_sessions(proxy: CuttingProxy) -> None:
    pid = proxy.box.process.pid  # type: ignore[attr-defined]
    with AgentConn.dial(proxy.addr, TOKEN) as conn:
        echo = Checked(conn.popen(["cat"]))
        echo.echoes = True
        echo.write(b"x" * 1000)
        os.kill(pid, signal.SIGSTOP)
        try:
            echo.write(b"y" * 100_000)
            proxy.cut()
        finally:
            os.kill(pid, signal.SIGCONT)
        echo.write(b"z" * 1000)
        echo.read(102_000)
        echo.finish()


def test_a_shell_on_a_terminal_shows_the_pause_and_goes_on_after_a_suspension(proxy: CuttingProxy) -> None:
    environ = {**os.environ, "SOCKERLESS_AGENT_TOKEN": TOKEN, "SOCKERLESS_AGENT_ADDR": proxy.addr}
    box: RunningAgent = proxy.box  # type: ignore[attr-defined]
    terminal = Terminal(environ, "exec", "-it", "-e", "PS1=box> ", "-e", "ENV=", "--", "sh", "-i")
    try:
        terminal.wait_for("^box>")
        proxy.refusing = True
        proxy.cut()
        terminal.wait_for("^agent_client: connection lost, trying to resume")
        terminal.type("echo mean''while\r")
        proxy.refusing = False
        terminal.wait_for("^agent_client: resumed")
        terminal.wait_for("^meanwhile$")
        terminal.process.send_signal(signal.SIGSTOP)
        terminal.type("echo sus''pended\r")
        proxy.cut(How.RST_AGENT)
        box.wait_for_log("1 sessions were running", 2)
        terminal.process.send_signal(signal.SIGCONT)
        terminal.wait_for("^suspended$")
        terminal.type("exit 6\r")
        assert terminal.wait() == 6
        assert terminal.attributes() == terminal.before
    finally:
        terminal.close()


def test_every_kind_of_session_survives_a_cut(proxy: CuttingProxy, tmp_path: Path) -> None:
    with AgentConn.dial(proxy.addr, TOKEN) as conn:
        results: dict[str, Any] = {}

        def start(name: str, call: Callable[[], Any]) -> threading.Thread:
            thread = threading.Thread(target=lambda: results.update({name: call()}), daemon=True)
            thread.start()
            return thread

        exec_ours, exec_theirs = socket.socketpair()
        attach_ours, attach_theirs = socket.socketpair()
        process, main = conn.popen(["cat"]), conn.attach()
        assert main.stdout.readline() == b"ready\n"
        script = f"while [ ! -e {tmp_path}/go ]; do sleep 0.02; done; cat; exit 3"
        threads = [
            start("run", lambda: conn.run(["sh", "-c", script], input=b"in", capture_output=True)),
            start("exec", lambda: conn.bridge_exec(exec_ours, "e", ["sh", "-c", "echo up; cat; exit 4"], tty=True)),
            start("attach", lambda: conn.bridge_attach(attach_ours, "a", tty=True)),
        ]
        with contextlib.closing(exec_ours), contextlib.closing(attach_ours):
            for theirs, word in ((exec_theirs, b"up\r\n"), (attach_theirs, b"ready\n")):
                theirs.settimeout(DEADLINE)
                assert read_exactly(theirs, len(word)) == word
            for how in How:
                proxy.cut(how)
                process.stdin.write(b"p")
                exec_theirs.sendall(b"e\n")
                main.stdin.write(b"m\n")
                assert within_deadline("popen", lambda: process.stdout.read(1)) == b"p"
                assert within_deadline("attach", lambda: main.stdout.read(2)) == b"m\n"
                assert read_exactly(exec_theirs, 6) == b"e\r\ne\r\n"  # echoed by the terminal, and by cat
                assert read_exactly(attach_theirs, 2) == b"m\n"
            (tmp_path / "go").touch()
            process.stdin.close()
            assert process.wait(DEADLINE) == 0
            exec_theirs.sendall(b"\x04")
            main.stdin.close()
            assert main.wait(DEADLINE) == 9
            for thread in threads:
                thread.join(DEADLINE)
            assert (results["run"].returncode, results["run"].stdout) == (3, b"in")
            assert (results["exec"], results["attach"]) == (4, 9)
        exec_theirs.close()
        attach_theirs.close()


def read_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := sock.recv(count - len(data))):
        data += more
    return data


def test_past_the_window_each_kind_of_session_says_that_it_is_lost(tmp_path: Path) -> None:
    box = RunningAgent(tmp_path, "--resume-window", "300ms", "--keep-alive", "--", "cat")
    proxy = CuttingProxy(box.addr)
    errors: dict[str, BaseException] = {}

    def note(name: str, call: Callable[[], Any]) -> threading.Thread:
        def run() -> None:
            try:
                call()
            except BaseException as exc:
                errors[name] = exc

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    with AgentConn.dial(proxy.addr, TOKEN) as conn:
        ends = [socket.socketpair() for _ in range(2)]
        process, main = conn.popen(["cat"]), conn.attach()
        threads = [
            note("popen", process.wait),
            note("attach", main.wait),
            note("run", lambda: conn.run(["sleep", "1000"])),
            note("bridge_exec", lambda: conn.bridge_exec(ends[0][0], "e", ["cat"])),
            note("bridge_attach", lambda: conn.bridge_attach(ends[1][0], "a")),
        ]
        eventually(lambda: len([s for s in conn.sessions() if s["kind"] in ("exec", "attach")]) == 5, "all run")
        proxy.refusing = True
        proxy.cut()
        box.wait_for_log("nobody resumed the session in time", 5)
        proxy.refusing = False
        for thread in threads:
            thread.join(DEADLINE)
        assert sorted(errors) == ["attach", "bridge_attach", "bridge_exec", "popen", "run"]
        for name, error in errors.items():
            assert isinstance(error, ConnectionLost), name
            assert "session lost" in str(error), name
    for end in ends:
        for sock in end:
            sock.close()
    proxy.close()
    box.stop()


# Who does not read.


def test_50_commands_that_do_not_read_hold_back_no_other(proxy: CuttingProxy, tmp_path: Path) -> None:
    """Each is sent more than a window of stdin: the writer waits, and no byte is lost, cuts or not."""
    go = tmp_path / "go"
    data = random.Random(50).randbytes(1_500_000)
    digest = hashlib.sha256(data).hexdigest()
    script = f"while [ ! -e {go} ]; do sleep 0.05; done; exec sha256sum"
    with AgentConn.dial(proxy.addr, TOKEN) as conn:
        deaf = [conn.popen(["sh", "-c", script]) for _ in range(50)]
        writers = [threading.Thread(target=write_all, args=(process, data), daemon=True) for process in deaf]
        for writer in writers:
            writer.start()
        eventually(lambda: all(conn._senders[process.id]._end >= 1 << 20 for process in deaf), "full windows")
        result = within_deadline("run", lambda: conn.run(["sha256sum"], input=data * 10, capture_output=True))
        assert result.stdout.split()[0].decode() == hashlib.sha256(data * 10).hexdigest()
        for process in deaf:
            sender = conn._senders[process.id]
            # A window, the piece that was the last to be let in, and what the pipe has taken.
            assert sender._end - sender._acked <= (1 << 20) + agent_client.STDIN_CHUNK
        proxy.cut()
        go.touch()
        for writer in writers:
            writer.join(DEADLINE)
        for process in deaf:
            assert within_deadline("a digest", process.stdout.read).split()[0].decode() == digest
            assert process.wait(DEADLINE) == 0


def write_all(process: Any, data: bytes) -> None:
    process.stdin.write(data)
    process.stdin.close()


def test_paused_readers_keep_no_more_than_their_window_however_often_the_link_is_cut(proxy: CuttingProxy) -> None:
    with AgentConn.dial(proxy.addr, TOKEN) as conn:
        paused = [Checked(conn.popen(["seq", "1", "300000"]), numbers(300000)) for _ in range(10)]
        for _ in range(15):
            run = within_deadline("run", lambda: conn.run(["seq", "1", "300000"], capture_output=True))
            assert run.stdout == numbers(300000)
            for session in paused:
                assert session.unread() <= 1 << 20
            proxy.cut()
        for session in paused:
            session.finish()

"""The client library against a real agent: what a script sees of a command in a container."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import DEADLINE, TOKEN, RunningAgent

import agent
import agent_client
from agent_client import (
    AgentConn,
    CommandNotExecutable,
    CommandNotFound,
    ConnectFailed,
    ConnectionLost,
    DockerStreamDecoder,
    SessionError,
    Unauthorized,
)

MAIN = 'echo ready; while read -r line; do echo "got $line"; done; exit 9'


@pytest.fixture
def running(tmp_path: Path) -> Iterator[RunningAgent]:
    started = RunningAgent(tmp_path, "--keep-alive", "--", "sh", "-c", MAIN)
    yield started
    started.stop()


@pytest.fixture
def conn(running: RunningAgent) -> Iterator[AgentConn]:
    with AgentConn.dial(running.addr, TOKEN) as connection:
        yield connection


def test_run_returns_output_and_exit_code(conn: AgentConn) -> None:
    result = conn.run(["sh", "-c", "echo out; echo err >&2; exit 3"], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (3, "out\n", "err\n")


def test_run_checks_the_exit_code_when_asked_to(conn: AgentConn) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        conn.run(["sh", "-c", "echo why; exit 4"], capture_output=True, check=True)
    assert (caught.value.returncode, caught.value.stdout) == (4, b"why\n")


def test_a_signal_is_128_plus_its_number(conn: AgentConn) -> None:
    assert conn.run(["sh", "-c", "kill -9 $$"]).returncode == 137


def test_a_command_that_does_not_exist_says_so(conn: AgentConn) -> None:
    with pytest.raises(CommandNotFound, match="no-such-command"):
        conn.run(["no-such-command"])


def test_a_file_that_is_not_executable_says_so(conn: AgentConn) -> None:
    with pytest.raises(CommandNotExecutable, match="/etc/passwd"):
        conn.run(["/etc/passwd"])


def test_a_missing_working_directory_is_named(conn: AgentConn) -> None:
    with pytest.raises(SessionError, match="/no/such/directory"):
        conn.run(["true"], cwd="/no/such/directory")


def test_environment_and_directory_arrive(conn: AgentConn, tmp_path: Path) -> None:
    result = conn.run(["sh", "-c", 'echo "$COLOUR"; pwd'], env={"COLOUR": "blue"}, cwd=str(tmp_path),
                      capture_output=True, text=True)  # fmt: skip
    assert result.stdout == f"blue\n{tmp_path}\n"


def test_the_token_is_in_no_child_and_not_in_the_process_listing(running: RunningAgent, conn: AgentConn) -> None:
    result = conn.run(["sh", "-c", "env; cat /proc/$PPID/environ /proc/$PPID/cmdline"], capture_output=True, text=True)
    assert "PATH=" in result.stdout
    assert TOKEN not in result.stdout
    own = Path(f"/proc/{running.process.pid}/environ").read_bytes()
    assert b"SOCKERLESS_AGENT_TOKEN=****" in own
    assert TOKEN.encode() not in own


def test_64_mib_of_stdin_arrive_whole(conn: AgentConn) -> None:
    data = os.urandom(64 << 20)
    result = conn.run(["sha256sum"], input=data, capture_output=True, text=False)
    assert result.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()


def test_two_million_lines_arrive_in_order_and_before_the_exit(conn: AgentConn) -> None:
    result = conn.run(["seq", "1", "2000000"], capture_output=True)
    assert result.returncode == 0
    assert result.stdout == b"".join(b"%d\n" % number for number in range(1, 2000001))


def test_256_mib_go_through_cat_in_both_directions_at_once(conn: AgentConn) -> None:
    block = os.urandom(1 << 20)
    sent, received = hashlib.sha256(), hashlib.sha256()
    process = conn.popen(["cat"])

    def feed() -> None:
        for _ in range(256):
            sent.update(block)
            process.stdin.write(block)
        process.stdin.close()

    feeder = threading.Thread(target=feed)
    feeder.start()
    while data := process.stdout.read(1 << 20):
        received.update(data)
    feeder.join(DEADLINE)
    assert process.wait(DEADLINE) == 0
    assert received.digest() == sent.digest()


def test_stdin_sent_right_behind_the_exec_is_not_dropped(conn: AgentConn) -> None:
    for number in range(100):
        process = conn.popen(["cat"])
        process.stdin.write(b"%d" % number)
        process.stdin.close()
        assert process.stdout.read() == b"%d" % number


def test_output_goes_on_after_stdin_was_closed(conn: AgentConn) -> None:
    result = conn.run(["sh", "-c", "cat; echo after"], input=b"before\n", capture_output=True)
    assert result.stdout == b"before\nafter\n"


def test_300_commands_run_at_once_on_one_connection(conn: AgentConn) -> None:
    processes = [conn.popen(["sh", "-c", f"read x; echo {number}; exit {number % 100}"]) for number in range(300)]
    for process in processes:
        process.stdin.write(b"go\n")
    for number, process in enumerate(processes):
        assert process.wait(DEADLINE) == number % 100
        assert process.stdout.read() == b"%d\n" % number


def test_20_connections_work_at_once(running: RunningAgent) -> None:
    results: dict[int, bytes] = {}

    def work(number: int) -> None:
        with AgentConn.dial(running.addr, TOKEN) as own:
            results[number] = own.run(["sh", "-c", f"echo {number}"], capture_output=True).stdout

    threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert results == {number: b"%d\n" % number for number in range(20)}


def test_popen_is_like_subprocess(conn: AgentConn) -> None:
    with conn.popen(
        ["sh", "-c", "trap 'echo term; exit 5' TERM; echo up; while :; do sleep 0.05; done"], text=True
    ) as process:
        assert process.stdout.readline() == "up\n"
        assert process.poll() is None
        process.terminate()
        assert list(process.stdout) == ["term\n"]
        assert process.wait(DEADLINE) == 5
    assert process.returncode == 5


def test_wait_and_run_time_out_and_run_kills(conn: AgentConn, tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        conn.run(["sh", "-c", f"echo $$ > {tmp_path}/child; exec sleep 1000"], timeout=0.5)
    child = int((tmp_path / "child").read_text())
    # The agent answers in order: once this has run, the kill has been seen to.
    conn.run(["sh", "-c", f"while kill -0 {child} 2>/dev/null; do sleep 0.01; done"], timeout=DEADLINE)


def test_a_terminal_has_its_size_and_can_be_resized(conn: AgentConn) -> None:
    script = "stty size; trap 'stty size; exit' WINCH; echo up; while :; do sleep 0.05; done"
    process = conn.popen(["sh", "-c", script], tty=True, size=(132, 50))
    assert process.stdout.readline() == b"50 132\r\n"
    assert process.stdout.readline() == b"up\r\n"
    process.resize(90, 30)
    assert process.stdout.readline() == b"30 90\r\n"
    assert process.wait(DEADLINE) == 0


def test_attach_replays_and_feeds_the_main_process(running: RunningAgent, conn: AgentConn) -> None:
    first, second = conn.attach(text=True), conn.attach(text=True)
    assert first.stdout.readline() == second.stdout.readline() == "ready\n"
    first.stdin.write("hello\n")
    first.stdin.flush()
    assert first.stdout.readline() == second.stdout.readline() == "got hello\n"
    first.stdin.close()
    assert first.wait(DEADLINE) == second.wait(DEADLINE) == 9
    assert conn.attach(text=True).stdout.read() == "ready\ngot hello\n"
    assert running.stop() == 9


def test_a_lost_connection_is_an_error_and_never_an_exit_code(tmp_path: Path) -> None:
    running = RunningAgent(tmp_path)
    conn = AgentConn.dial(running.addr, TOKEN, patience=0.2)
    process = conn.popen(["sh", "-c", "echo up; exec sleep 1000"])
    assert process.stdout.readline() == b"up\n"
    running.process.kill()
    with pytest.raises(ConnectionLost):
        process.wait(DEADLINE)
    with pytest.raises(ConnectionLost):
        process.stdout.read()
    with pytest.raises(ConnectionLost):
        conn.run(["true"])
    assert process.returncode is None
    conn.close()
    running.stop()


def test_what_runs_on_a_closed_connection_is_ended_with_its_daemons(running: RunningAgent, tmp_path: Path) -> None:
    conn = AgentConn.dial(running.addr, TOKEN)
    script = (
        "echo $$; setsid sleep 1000 & echo $!; (setsid sh -c 'echo $$; exec >/dev/null 2>&1; sleep 1000' &); sleep 1000"
    )
    process = conn.popen(["sh", "-c", script])
    pids = [int(process.stdout.readline()) for _ in range(3)]
    conn.close()
    with AgentConn.dial(running.addr, TOKEN) as other:
        for pid in pids:
            other.run(["sh", "-c", f"while kill -0 {pid} 2>/dev/null; do sleep 0.01; done"], timeout=DEADLINE)


def test_closing_is_quick_whatever_is_unread_and_leaves_no_thread(running: RunningAgent) -> None:
    before = set(threading.enumerate())
    conn = AgentConn.dial(running.addr, TOKEN)
    process = conn.popen(["cat", "/dev/zero"])
    assert process.stdout.read(1) == b"\0"
    conn.close()
    names = {thread.name for thread in set(threading.enumerate()) - before}
    assert names <= {"pool", "heartbeat"}  # parked threads, and the one for all connections


def test_a_wrong_token_is_refused(running: RunningAgent) -> None:
    with pytest.raises(Unauthorized):
        AgentConn.dial(running.addr, "wrong")
    with pytest.raises(Unauthorized):
        AgentConn.dial(running.addr)
    running.wait_for_log("client refused: missing or wrong bearer token")


def test_no_agent_is_a_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        addr = f"127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(ConnectFailed, match=re.escape(addr)):
        AgentConn.dial(addr)


@pytest.mark.parametrize("tty", [False, True])
def test_bridge_exec_speaks_dockers_stream(conn: AgentConn, tty: bool) -> None:
    docker, ours = socket.socketpair()
    codes: list[int] = []
    script = "stty -echo 2>/dev/null; read x; echo out $x; echo err >&2; exit 6"
    thread = threading.Thread(
        target=lambda: codes.append(conn.bridge_exec(ours, "bridge", ["sh", "-c", script], [], "", tty))
    )
    thread.start()
    docker.sendall(b"line\n")
    docker.shutdown(socket.SHUT_WR)
    thread.join(DEADLINE)
    ours.close()
    received = b""
    while data := docker.recv(65536):
        received += data
    assert codes == [6]
    if tty:
        assert received.endswith(b"out line\r\nerr\r\n")
    else:
        frames = DockerStreamDecoder().feed(received)
        assert sorted(frames) == [(agent.Stream.STDOUT, b"out line\n"), (agent.Stream.STDERR, b"err\n")]
    docker.close()


def test_a_docker_client_that_vanishes_ends_its_command(conn: AgentConn) -> None:
    docker, ours = socket.socketpair()
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(conn.bridge_exec(ours, "bridge", ["sleep", "1000"])))
    thread.start()
    docker.close()
    thread.join(DEADLINE)
    assert codes in ([129], [137])
    ours.close()


def test_bridge_exec_of_a_missing_command_is_127_and_says_why(conn: AgentConn) -> None:
    docker, ours = socket.socketpair()
    assert conn.bridge_exec(ours, "bridge", ["no-such-command"]) == 127
    ((stream, message),) = DockerStreamDecoder().feed(docker.recv(65536))
    assert stream is agent.Stream.STDERR
    assert b"no-such-command" in message
    docker.close()
    ours.close()


def test_an_id_is_free_again_after_the_exit(conn: AgentConn) -> None:
    for _ in range(50):
        docker, ours = socket.socketpair()
        assert conn.bridge_exec(ours, "fixed-id", ["true"]) == 0
        docker.close()
        ours.close()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL, signal.SIGRTMIN + 3])
def test_signals_reach_the_command(conn: AgentConn, number: int) -> None:
    process = conn.popen(["sh", "-c", "echo up; exec sleep 1000"])
    assert process.stdout.readline() == b"up\n"
    process.send_signal(number)
    assert process.wait(DEADLINE) == 128 + number


# What reviews have found.


def test_input_that_cannot_be_written_is_an_error_at_once(conn: AgentConn) -> None:
    with pytest.raises(TypeError, match="must be str"):
        conn.run(["cat"], input=b"bytes", text=True)
    with pytest.raises(UnicodeEncodeError):
        conn.run(["cat"], input="\u00e9", encoding="ascii")
    with pytest.raises(TypeError):
        conn.popen(["cat"]).communicate("text")


def test_a_timeout_holds_what_has_arrived(conn: AgentConn) -> None:
    process = conn.popen(["sh", "-c", "echo hi; echo oh >&2; exec sleep 300"])
    process.receiver.stderr.readinto(bytearray(1))
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        process.communicate(timeout=0.1)
    assert (caught.value.output, caught.value.stderr) == (b"hi\n", b"h\n")
    process.kill()
    assert process.communicate() == (b"hi\n", b"h\n")


def test_leaving_a_with_block_ends_who_writes_what_nobody_reads(conn: AgentConn) -> None:
    with conn.popen(["yes"]) as process:
        assert process.stdout.readline() == b"y\n"
    assert process.returncode == 129


def test_leaving_a_with_block_detaches_from_the_main_process(conn: AgentConn, running: RunningAgent) -> None:
    with conn.attach() as main:
        assert main.stdout.readline() == b"ready\n"
    running.wait_for_log("attach ended")
    with conn.attach() as main:
        assert main.stdout.readline() == b"ready\n"


def test_an_attacher_that_does_not_read_holds_up_nobody_and_is_told_its_loss(tmp_path: Path) -> None:
    script = "echo up; read x; seq 1 1000000; exit 3"
    flooding = RunningAgent(tmp_path, "--replay-size", "64k", "--keep-alive", "--", "sh", "-c", script)
    with AgentConn.dial(flooding.addr, TOKEN) as conn:
        attached = conn.attach()
        attached.stdin.write(b"go\n")
        flooding.wait_for_log("main process ended")
        assert conn.run(["true"]).returncode == 0
        rest = attached.stdout.read()
        assert attached.wait(DEADLINE) == 3
        total = sum(len(f"{number}\n") for number in range(1, 1000001)) + len("up\n")
        assert len(rest) + attached.lost == total
        assert rest.endswith(b"1000000\n")
    flooding.stop()


def test_paths_are_taken_as_they_are(conn: AgentConn, tmp_path: Path) -> None:
    assert conn.run([Path("/bin/pwd")], cwd=tmp_path, capture_output=True, text=True).stdout == f"{tmp_path}\n"
    assert conn.run(Path("/bin/true")).returncode == 0


def in_thread(function: Callable[..., Any], *args: object) -> concurrent.futures.Future[Any]:
    """Runs ``function`` in a thread."""
    result: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            result.set_result(function(*args))
        except BaseException as exc:
            result.set_exception(exc)

    threading.Thread(target=run, daemon=True).start()
    return result


def test_a_docker_client_that_does_not_read_holds_up_its_own_command_only(conn: AgentConn, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    script = f"head -c 64M /dev/zero; touch {tmp_path}/written; exit 6"
    with ours, theirs:
        bridge = in_thread(conn.bridge_exec, ours, "flood", ["sh", "-c", script], (), "", True)
        assert conn.run(["head", "-c", "64M", "/dev/zero"], capture_output=True).stdout == bytes(64 << 20)
        assert not (tmp_path / "written").exists()
        count = 0
        while count < 64 << 20:
            count += len(theirs.recv(1 << 20))
        assert bridge.result(DEADLINE) == 6


def test_what_is_late_for_a_session_never_reaches_the_next_under_its_id(conn: AgentConn) -> None:
    for _ in range(20):
        first, client = socket.socketpair()
        with first, client:
            bridge = in_thread(conn.bridge_exec, first, "archive-x", ["true"])
            with contextlib.suppress(BrokenPipeError):
                client.sendall(b"OLD" * 30_000)  # no more than the socket holds: the bridge may have gone by then
            client.shutdown(socket.SHUT_WR)
            assert bridge.result(DEADLINE) == 0
        second, client = socket.socketpair()
        with second, client:
            bridge = in_thread(conn.bridge_exec, second, "archive-x", ["cat"], (), "", True)
            client.sendall(b"NEW")
            client.shutdown(socket.SHUT_WR)
            seen = client.recv(65536)
            assert seen.startswith(b"NEW")
            client.close()
            bridge.exception(DEADLINE)


def test_a_docker_client_that_leaves_takes_the_whole_tree_with_it(conn: AgentConn, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    script = f"trap 'touch {tmp_path}/hung-up; exit 1' HUP; setsid sleep 300 & echo $!; while :; do sleep 0.02; done"
    with ours:
        bridge = in_thread(conn.bridge_exec, ours, "doomed", ["sh", "-c", script], (), "", True)
        child = int(theirs.recv(100))
        theirs.close()
        assert bridge.result(DEADLINE) == 1
    assert (tmp_path / "hung-up").exists()
    deadline = time.monotonic() + DEADLINE
    while os.path.exists(f"/proc/{child}"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_docker_client_that_leaves_the_main_process_is_detached(tmp_path: Path) -> None:
    quiet = RunningAgent(tmp_path, "--keep-alive", "--", "sh", "-c", "echo ready; exec sleep 300")
    with AgentConn.dial(quiet.addr, TOKEN) as conn:
        for count in range(1, 3):
            ours, theirs = socket.socketpair()
            with ours:
                bridge = in_thread(conn.bridge_attach, ours, "attach-x", True)
                assert theirs.recv(100) == b"ready\n"
                theirs.close()
                with pytest.raises(ConnectionLost):
                    bridge.result(DEADLINE)
            quiet.wait_for_log("attach ended", count)
        assert agent_client.fetch_health(quiet.addr)["exited"] is False
    quiet.stop()


@pytest.mark.parametrize(
    ("cmd", "env"), [([""], {}), (["echo", "a\0b"], {}), (["true"], {"": "x"})], ids=["no name", "NUL", "no variable"]
)
def test_a_request_that_makes_no_sense_ends_at_once(conn: AgentConn, cmd: list[str], env: dict[str, str]) -> None:
    process = conn.popen(cmd, env=env)
    with pytest.raises(SessionError) as failure:
        process.wait(DEADLINE)
    assert failure.value.reason == "bad_request"
    with pytest.raises(SessionError):
        conn.start_detached(cmd, env=env)

"""What reviews and attacks have found, each as a test: readers that stall, processes that hide, ids that overlap."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import (
    AGENT,
    DEADLINE,
    TOKEN,
    Agent,
    RawClient,
    eventually,
    killed_afterwards,
    run_agent,
    wait_gone,
)
from websockets.exceptions import ConnectionClosed

StartAgent = Callable[..., Agent]
Connect = Callable[..., RawClient]


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


# The log.


def test_a_log_that_nobody_reads_stops_nothing(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    command = [sys.executable, str(AGENT), "--addr", f"unix:{tmp_path}/agent", "--pid-file", ""]
    with subprocess.Popen(command, stderr=writing, env={**os.environ, "SOCKERLESS_AGENT_TOKEN": TOKEN}) as process:
        os.close(writing)
        try:
            eventually((tmp_path / "agent").exists, "the agent's start")
            import agent_client

            with agent_client.AgentConn.dial(f"unix:{tmp_path}/agent", TOKEN) as conn:
                for _ in range(700):  # far more lines than a pipe holds
                    assert conn.run(["true"]).returncode == 0
            process.terminate()
            assert process.wait(DEADLINE) == 0
        finally:
            process.kill()
            os.close(reading)


# Descriptors.


def test_a_command_that_is_not_in_path_costs_no_descriptor(agent: Agent, client: RawClient) -> None:
    client.run(["true"])
    before = descriptors(agent.pid)
    for _ in range(100):
        assert client.run(["no-such-command"])[2]["reason"] == "not_found"
    eventually(lambda: descriptors(agent.pid) <= before, "the descriptors are as before")


def test_the_soft_limit_of_descriptors_is_raised_but_not_for_commands(
    start_agent: StartAgent, connect: Connect
) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert hard >= 4096
    client = connect(start_agent(prefix=("sh", "-c", 'ulimit -S -n 256; "$@" & wait $!', "sh")))
    sessions = [client.exec(["cat"]) for _ in range(300)]
    for session in sessions:
        session.close_stdin()
        assert session.wait() == 0
    # The limit is set as soon as the command has started: a shell looks at it later than that.
    assert client.output("sh", "-c", "sleep 0.1; ulimit -S -n; ulimit -H -n") == f"256\n{hard}\n"


# Ids.


def test_an_id_is_in_use_until_its_exit_is_on_its_way(start_agent: StartAgent, connect: Connect) -> None:
    client = connect(start_agent(), max_queue=1)
    # Its output does not fit what the kernel takes while this client does not read.
    first = client.exec(["sh", "-c", "head -c 20M /dev/zero | tr '\\0' x; exit 3"], id="x")
    first.wait_for(b"x")
    client.send({"type": "exec", "id": "x", "cmd": ["sh", "-c", "echo SECOND; exit 4"]})
    while first.exit is None:
        client.receive_one()
    assert b"SECOND" not in first.stdout
    assert len(first.stdout) == 20 << 20
    assert first.exit["code"] == 3
    assert [error["reason"] for error in first.errors] == ["duplicate_session"]


# Processes.

HIDING = {
    "without the mark": "env -i setsid sh -c 'trap \"\" HUP; echo $$; exec sleep 300' & wait",
    "without the mark, its leader gone": "env -i sh -c 'echo $$; while :; do sleep 1; done' & exit 0",
    "a zombie that has threads": f"exec {sys.executable} -c '"
    "import ctypes, os, signal, threading, time; signal.signal(1, signal.SIG_IGN); print(os.getpid(), flush=True); "
    "threading.Thread(target=time.sleep, args=(300,)).start(); ctypes.CDLL(None).pthread_exit(None)'",
}


@pytest.mark.parametrize("script", HIDING.values(), ids=HIDING)
@pytest.mark.parametrize("how", ["disconnect", "end"])
def test_a_process_that_hides_is_found(agent: Agent, connect: Connect, script: str, how: str) -> None:
    client = connect(agent)
    session = client.exec(["sh", "-c", script])
    pid = int(session.wait_for_lines(1)[0])
    if how == "end":
        session.send("end")
    else:
        client.close()
    with killed_afterwards(pid):
        wait_gone(pid)


def test_a_session_that_drains_can_be_killed(client: RawClient) -> None:
    session = client.exec(["sh", "-c", "(echo $$; while :; do echo x; sleep 0.1; done) & exit 7"])
    session.wait_for(b"x\nx\nx\n")
    session.signal("KILL")
    assert session.wait() == 7


def test_end_ends_the_whole_tree_and_the_exit_is_sent(client: RawClient) -> None:
    script = "trap 'echo hung up; exit 4' HUP; setsid sh -c 'trap \"\" HUP; echo $$; exec sleep 300' & " \
        "while :; do sleep 0.02; done"  # fmt: skip
    session = client.exec(["sh", "-c", script])
    pid = int(session.wait_for_lines(1)[0])
    session.send("end")
    assert session.wait() == 4
    assert b"hung up" in session.stdout
    with killed_afterwards(pid):
        wait_gone(pid)


def test_end_detaches_from_the_main_process(start_agent: StartAgent, connect: Connect) -> None:
    agent = start_agent("--keep-alive", "--", "sh", "-c", "echo up; exec sleep 300")
    client = connect(agent)
    session = client.attach()
    session.wait_for(b"up")
    session.send("end")
    agent.wait_for_log("attach ended")
    assert agent.health()["exited"] is False
    assert client.output("echo", "on") == "on\n"
    assert session.exit is None


# Output.


def test_a_pipe_is_heard_while_the_other_one_talks(client: RawClient) -> None:
    script = "(for i in 1 2 3 4 5; do sleep 0.4; echo e >&2; done; echo late) & exit 0"
    stdout, stderr, last = client.run(["sh", "-c", script])
    assert (stdout, stderr, last["code"]) == (b"late\n", b"e\n" * 5, 0)


def test_a_terminal_is_read_to_its_end_however_short_the_drain_timeout(
    start_agent: StartAgent, connect: Connect
) -> None:
    client = connect(start_agent("--drain-timeout", "0"))
    sessions = [client.exec(["seq", "1", "20000"], tty=True) for _ in range(20)]
    for session in sessions:
        assert session.wait() == 0
        assert session.stdout.endswith(b"\r\n20000\r\n")


def test_a_slow_client_gets_the_last_output_and_the_exit_before_the_agent_ends(
    start_agent: StartAgent, connect: Connect
) -> None:
    script = "read x; head -c 8M /dev/zero | tr '\\0' x; exit 7"
    agent = start_agent("--replay-size", "16M", "--exit-with-main", "--keep-alive", "--", "sh", "-c", script)
    client = connect(agent, max_queue=1)
    session = client.attach()
    session.write(b"go\n")
    while session.exit is None:
        client.receive_one()
        # Long enough for the main process to end, whose output may come in thousands of messages.
        time.sleep(0.05 if len(session.stdout) < 1 << 20 else 0)
    assert (len(session.stdout), session.exit["code"]) == (8 << 20, 7)
    assert agent.wait() == 7


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_stdin_for_a_terminal_that_its_command_has_closed_costs_nothing(
    start_agent: StartAgent, connect: Connect
) -> None:
    agent = start_agent()
    client = connect(agent)
    session = client.exec(["sh", "-c", "echo up; exec <&- >&- 2>&-; exec sleep 300"], tty=True)
    session.wait_for(b"up")
    for _ in range(10):
        session.write(b"line\n" * 2000)
    assert client.output("true") == ""
    before = cpu_ticks(agent.pid)
    time.sleep(2)
    assert cpu_ticks(agent.pid) - before < os.sysconf("SC_CLK_TCK")  # of two seconds; it was nearly all of them
    session.signal("KILL")
    assert session.wait() == 137


def test_a_carriage_return_ends_a_line_of_a_terminal(client: RawClient) -> None:
    session = client.exec(["sh", "-c", "cat; echo first; cat; echo second"], tty=True)
    session.write(b"hello\r")
    session.close_stdin()
    session.wait_for(b"first")
    session.write(b"again\r")
    session.wait_for(b"again\r\nagain")
    session.close_stdin()
    assert session.wait() == 0


# Connections.


def test_a_ping_timeout_shorter_than_the_interval_ends_no_healthy_connection(
    start_agent: StartAgent, connect: Connect
) -> None:
    agent = start_agent("--ping-timeout", "1s")
    client = connect(agent)
    time.sleep(3)
    client.assert_quiet()


def test_a_slow_reader_on_a_unix_socket_is_not_cut_off(start_agent: StartAgent, tmp_path: Path) -> None:
    start_agent("--addr", f"unix:{tmp_path}/agent", "--ping-timeout", "1s")
    import agent_client

    command = [sys.executable, agent_client.__file__, "exec", "--addr", f"unix:{tmp_path}/agent", "--",
               "head", "-c", "40000000", "/dev/zero"]  # fmt: skip
    environ = {**os.environ, "SOCKERLESS_AGENT_TOKEN": TOKEN}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environ) as process:
        assert process.stdout is not None
        count = 0
        while data := process.stdout.read(1 << 20):
            count += len(data)
            time.sleep(0.1)
        assert (count, process.wait(DEADLINE)) == (40_000_000, 0)


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("127.0.0.1:80", "http://127.0.0.1:80", 101),
        ("localhost", "http://localhost", 101),
        ("[::1]:80", "http://[::1]:80", 101),
        ("evil.example", "http://evil.example", 403),  # its owner lets the name point here
        ("127.0.0.1", "http://evil.example", 403),
        ("127.0.0.1", "null", 403),
        ("127.0.0.1", "http://[", 403),
        ("[", "http://[", 403),
    ],
)
def test_a_web_page_of_another_host_reaches_nothing(
    start_agent: StartAgent, host: str, origin: str, status: int
) -> None:
    agent = start_agent(token="")
    name, _, port = agent.address.rpartition(":")
    with socket.create_connection((name, int(port)), DEADLINE) as sock:
        sock.sendall(
            f"GET /ws HTTP/1.1\r\nHost: {host}\r\nOrigin: {origin}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        answer = sock.recv(65536)
    assert int(answer.split()[1]) == status
    assert "Traceback" not in agent.log


def test_clients_that_reset_at_once_put_no_traceback_into_the_log(start_agent: StartAgent, connect: Connect) -> None:
    agent = start_agent(token="")
    name, _, port = agent.address.rpartition(":")
    for number in range(200):
        sock = socket.create_connection((name, int(port)), DEADLINE)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.sendall(
            b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        if number % 2:
            sock.recv(1)
        sock.close()
    connect(agent, token="").assert_quiet()
    assert "Traceback" not in agent.log


def test_a_proxy_that_cannot_be_used_is_a_failed_try() -> None:
    done = run_agent("--callback", "http://host.invalid/?id=x", "--callback-retries", "1",
                     env={"http_proxy": "socks5://127.0.0.1:9", "ALL_PROXY": "socks5://127.0.0.1:9"})  # fmt: skip
    assert done.returncode == 1
    assert "giving up after 1 tries" in done.stderr


def test_a_huge_id_is_refused_and_not_logged(agent: Agent, client: RawClient) -> None:
    client.send({"type": "exec", "id": "x" * 1_000_000, "cmd": ["true"]})
    assert "1000000 characters" in client.wait_error()
    client.assert_quiet()
    assert "xxxxx" not in agent.log


def test_many_refusals_that_nobody_reads_cost_no_memory(start_agent: StartAgent, connect: Connect) -> None:
    agent = start_agent("--stdin-limit", "1k", "--keep-alive", "--", "sleep", "300")
    client = connect(agent, max_queue=1)
    session = client.attach()
    message = json.dumps({"type": "stdin", "id": session.id, "data": "A" * 8000})

    def flood() -> None:
        with contextlib.suppress(OSError, ConnectionClosed):
            for _ in range(50_000):
                client.ws.send(message)

    flooding = threading.Thread(target=flood, daemon=True)
    flooding.start()
    status = Path(f"/proc/{agent.pid}/status")

    def resident() -> int:
        found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text())
        assert found is not None
        return int(found[1]) << 10

    highest = 0
    for _ in range(40):
        highest = max(highest, resident())
        time.sleep(0.1)
    assert highest < 100 << 20
    assert connect(agent).output("echo", "on") == "on\n"
    client.ws.socket.shutdown(socket.SHUT_RDWR)  # not close(): the flooding thread has the library's lock
    flooding.join(DEADLINE)
    assert not flooding.is_alive()


@pytest.mark.once
def test_health_is_quick_while_thousands_of_threads_end(start_agent: StartAgent, connect: Connect) -> None:
    agent = start_agent()
    client = connect(agent)
    sessions = [client.exec(["cat"]) for _ in range(500)]
    for session in sessions:
        session.close_stdin()
        assert session.wait() == 0
    slowest = 0.0
    started = time.monotonic()
    tasks = Path(f"/proc/{agent.pid}/task")
    while len(list(tasks.iterdir())) > 100:
        before = time.monotonic()
        agent.health()
        slowest = max(slowest, time.monotonic() - before)
        assert time.monotonic() - started < DEADLINE
        time.sleep(0.05)
    assert slowest < 5

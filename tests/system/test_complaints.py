"""What users of other such systems complain about, each by the name of its report."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
from support import DEADLINE, Agent, RawClient, eventually, wait_gone
from websockets.exceptions import ConnectionClosed


def threads(agent: Agent) -> int:
    return len(os.listdir(f"/proc/{agent.pid}/task"))


def test_kubernetes_124571_a_pipeline_is_not_cut_short(client: RawClient) -> None:
    for _ in range(3):
        assert client.output("sh", "-c", "seq 1 2000000 | tail -1") == "2000000\n"


def test_kubernetes_124571_output_is_not_cut_short_on_a_slow_link(
    agent: Agent, connect: Callable[..., RawClient]
) -> None:
    client = connect(agent, max_queue=1)
    session = client.exec(["seq", "1", "2000000"])
    while session.exit is None:
        client.receive_one()
        time.sleep(0.02)
    assert session.exit["code"] == 0
    assert session.stdout == b"".join(b"%d\n" % number for number in range(1, 2000001))


def test_kubernetes_124571_a_lost_connection_is_never_a_0(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    agent = start_agent()
    client = connect(agent)
    session = client.exec(["seq", "1", "100000000"])
    session.wait_for(b"\n1000\n")
    agent.kill()
    with pytest.raises(ConnectionClosed):
        while True:
            client.receive_one()
    assert session.exit is None


@pytest.mark.parametrize("tty", [False, True])
def test_kubernetes_89899_closing_stdin_loses_no_output(client: RawClient, tty: bool) -> None:
    session = client.exec(["sh", "-c", "cat >/dev/null; sleep 0.2; seq 1 50000; exit 4"], tty=tty)
    session.write(b"input\n")
    session.close_stdin()
    assert session.wait() == 4
    lines = session.stdout.decode().split()
    assert [line for line in lines if line != "input"] == [str(number) for number in range(1, 50001)]


def test_kubernetes_client_csharp_1723_a_filter_ends_when_its_input_does(client: RawClient) -> None:
    stdout, _, last = client.run(["sort", "-n"], stdin=b"3\n1\n2\n")
    assert (stdout, last["code"]) == (b"1\n2\n3\n", 0)


def test_kubernetes_core_510_an_archive_goes_in_through_stdin_and_its_listing_comes_out(client: RawClient) -> None:
    archive, _, last = client.run(["tar", "-C", "/etc", "-cf", "-", "passwd", "group"])
    assert last["code"] == 0
    listing, _, last = client.run(["tar", "-tf", "-"], stdin=archive)
    assert (listing, last["code"]) == (b"passwd\ngroup\n", 0)


@pytest.mark.parametrize("tty", [False, True])
def test_kubernetes_112834_stdin_is_not_dropped_at_the_start(client: RawClient, tty: bool) -> None:
    for number in range(100):
        session, request = client.request(["sh", "-c", "read line; echo got $line"], tty=tty)
        client.send_together(request, {"type": "stdin", "id": session.id, "data": "aXQK"})
        assert session.wait() == 0, number
        assert b"got it" in session.stdout, number


@pytest.mark.parametrize("fields", [{}, {"stdin": False}, {"stdin": False, "tty": True}], ids=str)
def test_kata_containers_13640_a_session_without_stdin_does_not_end_after_the_first_flush(
    client: RawClient, fields: dict[str, object]
) -> None:
    script = "for i in 1 2 3 4; do echo line $i; sleep 0.1; done; exit 3"
    session = client.exec(["sh", "-c", script], **fields)
    assert session.wait() == 3
    assert session.stdout.decode().split("\n")[:4] == [
        f"line {number}\r" if fields.get("tty") else f"line {number}" for number in range(1, 5)
    ]


def test_moby_35407_a_terminal_never_starts_at_0_by_0(client: RawClient) -> None:
    for _ in range(20):
        session = client.exec(["stty", "size"], tty=True)
        assert session.wait() == 0
        assert session.stdout == b"24 80\r\n"


@pytest.mark.parametrize("report", ["moby_31223", "docker_cli_3554"])
def test_a_resize_right_behind_the_start_is_not_lost(client: RawClient, report: str) -> None:
    script = 'until [ "$(stty size)" = "43 132" ]; do sleep 0.01; done; echo resized'
    for _ in range(20):
        session = client.exec(["sh", "-c", script], tty=True)
        session.send("resize", width=132, height=43)
        assert session.wait() == 0
        assert session.stdout == b"resized\r\n"


def test_moby_35561_a_resize_of_an_ended_exec_is_harmless(client: RawClient) -> None:
    for tty in (True, False):
        session = client.exec(["true"], tty=tty)
        assert session.wait() == 0
        session.send("resize", width=132, height=43)
    client.assert_quiet()


def test_python_websockets_1336_closing_with_unread_messages_leaves_no_thread(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    agent = start_agent("--kill-timeout", "100ms")
    first = connect(agent)
    assert first.output("echo", "up") == "up\n"
    first.close()
    eventually(lambda: agent.log.count("sessions were running") == 1, "the end of the first connection")
    base = threads(agent)
    for number in range(6):
        client = connect(agent, max_queue=1)
        session = client.exec(["sh", "-c", "echo $$; cat /dev/zero & exec sleep 300"])
        pid = int(session.wait_for(b"\n"))
        for _ in range(8):
            session.write(bytes(1 << 20))  # which nobody reads, either
        client.cut() if number % 2 else client.close()
        wait_gone(pid)
    eventually(lambda: agent.log.count("sessions were running") == 7, "the end of every connection")
    eventually(lambda: threads(agent) <= base, f"the threads are {base} again, now {threads(agent)}")


def test_python_websockets_1336_the_agent_ends_though_nobody_reads(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    agent = start_agent("--keep-alive", "--", "cat", "/dev/zero")
    clients = [connect(agent, max_queue=1) for _ in range(3)]
    for client in clients:
        client.attach().wait_for(b"\0")
        client.exec(["cat", "/dev/zero"]).wait_for(b"\0")
    ended = threading.Event()
    watcher = threading.Thread(target=lambda: (agent.process.wait(DEADLINE), ended.set()))
    watcher.start()
    agent.signal(signal.SIGTERM)
    assert ended.wait(DEADLINE)
    watcher.join(DEADLINE)
    assert agent.wait() == 143

"""A gateway to which the system refuses threads: what a client started does not run on without it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import docker_gateway
import pytest
from by_hand import UPGRADE, Connection
from docking import DEADLINE
from support import TOKEN, Agent, eventually

from agent import Address, ThreadPool


class FullPool(ThreadPool):
    """The system's limit of threads is reached, now and then, and that is not for a test to reach."""

    def __init__(self) -> None:
        super().__init__()
        self.refuse: Callable[[Callable[..., None]], bool] = lambda job: False

    def submit(self, job: Callable[..., None], *args: object) -> None:
        if self.refuse(job):
            raise RuntimeError("can't start new thread")
        super().submit(job, *args)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> FullPool:
    pool = FullPool()
    monkeypatch.setattr(docker_gateway, "pool", pool)
    return pool


@pytest.fixture
def port(web: Agent, full: FullPool) -> Iterator[int]:
    """Of a gateway in this process, with an agent called web."""
    gateway = docker_gateway.Gateway("")
    found = gateway.new_container("web")
    gateway.add(found)
    dialler = docker_gateway.Dialler(found, web.address, TOKEN, 5.0, lambda: None)
    dialler.start()
    with contextlib.closing(docker_gateway.Server(gateway)) as server:

        def connected() -> bool:
            with contextlib.suppress(docker_gateway.Conflict):
                return bool(found.connection())
            return False

        eventually(connected, "the agent's connection")
        yield server.listen(Address("127.0.0.1", 0))
        dialler.stop()


def test_a_command_whose_client_gets_no_thread_is_ended_and_the_client_told(port: int, full: FullPool) -> None:
    with socket.create_connection(("127.0.0.1", port), DEADLINE) as sock:
        client = Connection(sock)
        exec_id = client.create("sleep", "1000", AttachStdin=True, Tty=True)
        full.refuse = lambda job: getattr(job, "__name__", "") == "_receive"
        client.send("POST", f"/exec/{exec_id}/start", "Content-Type: application/json", *UPGRADE, body=b"{}")
        assert client.read_head()[0] == 101
        assert client.read_rest() == b"the gateway cannot serve more: can't start new thread\r\n"
    with socket.create_connection(("127.0.0.1", port), DEADLINE) as sock:
        client = Connection(sock)
        eventually(lambda: not client.ask("GET", f"/exec/{exec_id}/json")[1]["Running"], "the command's end")


def test_a_client_that_leaves_while_there_is_no_thread_is_noticed_once_there_is_one(full: FullPool) -> None:
    refused: list[object] = []

    def refuse(job: Callable[..., None]) -> bool:
        refused.append(job)
        return len(refused) <= 3

    full.refuse = refuse
    watcher = docker_gateway.HangupWatcher()
    gone = threading.Event()
    near, far = socket.socketpair()
    with near, far, watcher.watch(far, gone.set, half_close=False):
        near.close()
        assert gone.wait(DEADLINE)
    assert len(refused) == 4

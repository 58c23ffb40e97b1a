"""The Docker SDK for Python through the gateway: what programs rather than people use."""

from __future__ import annotations

import gc
import io
import itertools
import os
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import docker.errors
import pytest
from docking import DEADLINE, Gateway
from support import Agent, eventually, wait_gone

Box = tuple[Agent, Gateway]

# The SDK leaves the sockets of its streams to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@pytest.fixture(autouse=True)
def collect_garbage() -> Iterator[None]:
    """So that the warning comes where it is ignored, not in whichever test is next."""
    yield
    gc.collect()


def connect(gateway: Gateway) -> Any:
    return docker.DockerClient(base_url=f"unix://{gateway.path}", timeout=int(DEADLINE))


@pytest.fixture
def sdk(gateway: Gateway) -> Iterator[Any]:
    client = connect(gateway)
    yield client
    client.close()


@pytest.fixture
def web_container(sdk: Any) -> Any:
    return sdk.containers.get("web")


def test_the_endpoint_answers(sdk: Any) -> None:
    assert sdk.ping() is True
    assert sdk.version()["ApiVersion"] == "1.47"
    assert sdk.info()["OSType"] == "linux"
    assert [container.name for container in sdk.containers.list()] == ["web"]
    with pytest.raises(docker.errors.NotFound, match="No such container: nobody"):
        sdk.containers.get("nobody")
    with pytest.raises(docker.errors.APIError, match="created by the platform"):
        sdk.containers.create("alpine")


def test_exec_run_collects_output(web_container: Any) -> None:
    result = web_container.exec_run(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (result.exit_code, sorted(result.output.splitlines())) == (3, [b"err", b"out"])
    result = web_container.exec_run(["sh", "-c", "echo out; echo err >&2"], demux=True)
    assert (result.exit_code, result.output) == (0, (b"out\n", b"err\n"))
    result = web_container.exec_run(["sh", "-c", "echo out; echo err >&2"], stderr=False)
    assert result.output == b"out\n"
    result = web_container.exec_run(
        "sh -c 'echo $A; pwd; id -u'", environment={"A": "b c"}, workdir="/usr", user="nobody"
    )
    assert result.output == b"b c\n/usr\n65534\n"
    result = web_container.exec_run("tty", tty=True)
    assert result.output.startswith(b"/dev/pts/")


def test_exec_run_tells_what_could_not_start(web_container: Any) -> None:
    result = web_container.exec_run("nosuch")
    assert result.exit_code == 127
    assert b'exec: "nosuch": executable file not found in $PATH' in result.output


def test_exec_run_streams(web_container: Any) -> None:
    result = web_container.exec_run(["sh", "-c", "echo one; read x </dev/zero & sleep 0.1; echo two"], stream=True)
    assert b"".join(result.output) == b"one\ntwo\n"
    pairs = list(web_container.exec_run(["sh", "-c", "echo out; echo err >&2"], stream=True, demux=True).output)
    assert b"".join(pair[0] or b"" for pair in pairs) == b"out\n"
    assert b"".join(pair[1] or b"" for pair in pairs) == b"err\n"


class Hijacked:
    """A socket that the SDK gives out. It keeps more than one reference, of which each is to be closed."""

    def __init__(self, given: Any) -> None:
        self._given = given
        self._sock = given._sock
        self._sock.settimeout(DEADLINE)

    def read_until(self, text: bytes) -> bytes:
        received = b""
        while text not in received:
            data = self._sock.recv(65536)
            assert data, received
            received += data
        return received

    def read_to_the_end(self) -> None:
        while self._sock.recv(65536):
            pass

    def send(self, data: bytes) -> None:
        self._sock.sendall(data)

    def end_input(self) -> None:
        self._sock.shutdown(socket.SHUT_WR)

    def __enter__(self) -> Hijacked:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._given._response.close()
        self._sock.close()


@pytest.mark.parametrize("tty", [False, True])
def test_exec_run_gives_a_socket(web_container: Any, tty: bool) -> None:
    script = "stty -echo 2>/dev/null; echo ready; cat"
    with Hijacked(web_container.exec_run(["sh", "-c", script], stdin=True, socket=True, tty=tty).output) as sock:
        sock.read_until(b"ready")
        sock.send(b"hello\n")
        received = sock.read_until(b"hello")
        assert tty or received.startswith(b"\x01\0\0\0")
        sock.end_input()
        sock.read_to_the_end()


def read_pid(path: Path) -> int:
    """The PID that a command has written to a file."""
    return int(eventually(lambda: path.exists() and path.read_text().strip(), f"a PID in {path}"))


@pytest.mark.parametrize("tty", [False, True])
def test_a_socket_that_is_closed_ends_its_command(web_container: Any, tmp_path: Path, tty: bool) -> None:
    """Also on a terminal: a program that closes its end and goes on has not typed the detach keys."""
    command = ["sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 1000"]
    with Hijacked(web_container.exec_run(command, stdin=True, socket=True, tty=tty).output):
        pid = read_pid(tmp_path / "pid")
    wait_gone(pid)


def ended(sdk: Any, exec_id: str) -> Any:
    """What is shown of a command, once it has ended."""
    return eventually(lambda: not (state := sdk.api.exec_inspect(exec_id))["Running"] and state, "its end")


@pytest.mark.parametrize(("keys", "typed"), [(None, b"\x10\x11"), ("ctrl-a,b", b"\x01b")])
def test_the_detach_keys_are_looked_for_by_the_gateway(
    sdk: Any, tmp_path: Path, keys: str | None, typed: bytes
) -> None:
    command = ["sh", "-c", f"stty raw -echo; echo $$ > {tmp_path}/pid; echo up; exec cat"]
    exec_id = sdk.api.exec_create("web", command, stdin=True, tty=True, detach_keys=keys)["Id"]
    with Hijacked(sdk.api.exec_start(exec_id, socket=True, tty=True)) as sock:
        sock.read_until(b"up")
        sock.send(typed[:1])
        sock.send(b"x")
        sock.read_until(typed[:1] + b"x")
        sock.send(b"bye" + typed[:1])
        sock.read_until(b"bye")
        sock.send(typed[1:])
        sock.read_to_the_end()
    assert sdk.api.exec_inspect(exec_id)["Running"] is True
    os.kill(read_pid(tmp_path / "pid"), 9)
    assert ended(sdk, exec_id)["ExitCode"] == 137


def test_exec_inspect_shows_the_command_before_while_and_after(sdk: Any, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    created = sdk.api.exec_create("web", ["sh", "-c", f"echo $$ > {path}; exec sleep 1000"], environment=["A=b"])
    assert len(created["Id"]) == 64
    state = sdk.api.exec_inspect(created["Id"])
    assert (state["Running"], state["ExitCode"], state["ProcessConfig"]["entrypoint"]) == (False, None, "sh")
    sdk.api.exec_start(created["Id"], detach=True)
    pid = read_pid(path)
    state = sdk.api.exec_inspect(created["Id"])
    assert (state["Running"], state["Pid"], state["ExitCode"]) == (True, pid, None)
    assert created["Id"] in sdk.api.inspect_container("web")["ExecIDs"]
    with pytest.raises(docker.errors.APIError, match="already running"):
        sdk.api.exec_start(created["Id"], detach=True)
    os.kill(pid, 15)
    state = ended(sdk, created["Id"])
    assert (state["ExitCode"], state["Pid"]) == (143, pid)
    with pytest.raises(docker.errors.NotFound, match="No such exec instance"):
        sdk.api.exec_inspect("0" * 64)


def test_a_terminal_can_be_resized(sdk: Any) -> None:
    created = sdk.api.exec_create(
        "web",
        ["sh", "-c", "stty -echo; trap 'stty size' WINCH; echo up; while sleep 0.05; do :; done"],
        tty=True,
        stdin=True,
    )
    with Hijacked(sdk.api.exec_start(created["Id"], tty=True, socket=True)) as sock:
        sock.read_until(b"up")
        sdk.api.exec_resize(created["Id"], height=33, width=111)
        sock.read_until(b"33 111")


def test_attach_follows_the_main_process(box: Box) -> None:
    _, gateway = box
    client = connect(gateway)
    container = client.containers.get("box")
    eventually(lambda: container.logs(stderr=False) == b"ready\n", "its first line")
    assert container.attach(logs=True, stream=False, stdout=True, stderr=False) == b"ready\n"
    given = container.attach_socket(params={"stdin": 1, "stdout": 1, "stream": 1, "logs": 1})
    with Hijacked(given) as sock:
        sock.read_until(b"ready\n")
        sock.send(b"hello\n")
        sock.read_until(b"got hello\n")
        following = container.attach(stream=True)
        sock.send(b"more\n")
        assert next(iter(following)) == b"got more\n"
        following.close()
    client.close()


def test_logs_are_a_stream(box: Box) -> None:
    _, gateway = box
    client = connect(gateway)
    container = client.containers.get("box")
    eventually(lambda: b"warning" in container.logs(), "its lines")
    assert sorted(container.logs().splitlines()) == [b"ready", b"warning"]
    assert container.logs(stdout=False) == b"warning\n"
    lines = container.logs(stream=True, follow=True, stderr=False)
    assert next(lines) == b"ready\n"
    container.kill("TERM")
    assert list(lines) == []
    assert container.wait()["StatusCode"] == 21
    client.close()


@pytest.mark.parametrize("condition", ["not-running", "next-exit"])
def test_wait_has_its_conditions(box: Box, condition: str) -> None:
    _, gateway = box
    client = connect(gateway)
    results: list[Any] = []
    waiting = threading.Thread(target=lambda: results.append(client.containers.get("box").wait(condition=condition)))
    waiting.start()
    gateway.wait_for_log(r"stream POST \S+/wait")
    client.containers.get("box").kill("TERM")
    waiting.join(DEADLINE)
    assert results == [{"StatusCode": 21}]
    with pytest.raises(docker.errors.APIError, match="invalid condition"):
        client.containers.get("box").wait(condition="tired")
    client.close()


def test_an_agent_that_leaves_is_an_error_for_who_waits(
    start_agent: Callable[..., Agent], start_gateway: Callable[..., Gateway]
) -> None:
    agent = start_agent()
    gateway = start_gateway(f"--agent=box={agent.address}", "--reconnect=0")
    gateway.wait_for_log("agent box: connected")
    client = connect(gateway)
    results: list[Any] = []
    waiting = threading.Thread(target=lambda: results.append(client.containers.get("box").wait()))
    waiting.start()
    gateway.wait_for_log(r"stream POST \S+/wait")
    agent.kill()
    waiting.join(DEADLINE)
    assert results[0]["StatusCode"] == 255
    assert "the exit code is not known" in results[0]["Error"]["Message"]
    client.close()


def test_archives_go_both_ways(web_container: Any, tmp_path: Path) -> None:
    data = os.urandom(300_000)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        info = tarfile.TarInfo("dir/file")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    assert web_container.put_archive(str(tmp_path), packed.getvalue()) is True
    assert (tmp_path / "dir/file").read_bytes() == data
    stream, found = web_container.get_archive(str(tmp_path / "dir"))
    assert (found["name"], bool(found["mode"] & 1 << 31)) == ("dir", True)
    with tarfile.open(fileobj=io.BytesIO(b"".join(stream))) as tar:
        member = tar.extractfile("dir/file")
        assert member is not None and member.read() == data
    with pytest.raises(docker.errors.NotFound, match="Could not find the file /no/such"):
        web_container.get_archive("/no/such")
    with pytest.raises(docker.errors.NotFound, match="Could not find the file /no/such"):
        web_container.put_archive("/no/such", packed.getvalue())
    with pytest.raises(docker.errors.APIError):
        web_container.put_archive(str(tmp_path), b"this is no archive" * 100)


def test_top_and_stats_have_numbers(web_container: Any, web: Agent) -> None:
    top = web_container.top()
    assert top["Titles"] == ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]
    assert str(web.health()["pid"]) in [row[1] for row in top["Processes"]]
    for stats in (
        web_container.stats(stream=False),
        *itertools.islice(web_container.stats(decode=True), 2),
        web_container.stats(stream=False, one_shot=True),
    ):
        assert stats["memory_stats"]["usage"] > 0 and stats["memory_stats"]["limit"] > 0
        assert stats["cpu_stats"]["system_cpu_usage"] > 0 and stats["cpu_stats"]["online_cpus"] >= 1
        assert stats["pids_stats"]["current"] > 1
    before, now = itertools.islice(web_container.stats(decode=True), 2)
    assert now["precpu_stats"]["system_cpu_usage"] == before["cpu_stats"]["system_cpu_usage"]
    assert now["cpu_stats"]["system_cpu_usage"] >= now["precpu_stats"]["system_cpu_usage"]


def test_events_are_a_stream(box: Box) -> None:
    _, gateway = box
    client = connect(gateway)
    events = client.events(decode=True, filters={"event": ["exec_create", "exec_die"], "type": "container"})
    client.containers.get("box").exec_run("true")
    assert next(events)["Action"] == "exec_create: true"
    last = next(events)
    assert (last["Action"], last["Actor"]["Attributes"]["exitCode"], last["Actor"]["Attributes"]["name"]) == (
        "exec_die",
        "0",
        "box",
    )
    events.close()
    client.close()

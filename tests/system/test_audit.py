"""--audit-log: who ran what, when, and how it ended."""

from __future__ import annotations

import datetime
import json
import os
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from support import DEADLINE, TOKEN, Agent, RawClient, eventually, file_system, run_agent
from test_authentication import dial
from test_authentication import request as ask_for
from test_http import request
from test_version_2 import Client
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect as websocket
from websockets.sync.client import unix_connect

from agent_client import AgentConn

Entry = dict[str, Any]


class Audited:
    """An agent with an audit log."""

    def __init__(self, agent: Agent, path: Path) -> None:
        self.agent = agent
        self.path = path

    def entries(self, event: str = "") -> list[Entry]:
        """All entries so far, or those of one event; each line must be whole and valid."""
        lines = self.path.read_text().splitlines(keepends=True)
        assert all(line.endswith("\n") for line in lines)
        entries = [json.loads(line) for line in lines]
        return [entry for entry in entries if not event or entry["event"] == event]

    def wait_for(self, event: str, count: int = 1) -> list[Entry]:
        return eventually(
            lambda: len(found := self.entries(event)) >= count and found, f"{count} times {event} in the audit log"
        )


@pytest.fixture
def audited(start_agent: Callable[..., Agent], tmp_path: Path) -> Callable[..., Audited]:
    def start(*flags: str, **options: Any) -> Audited:
        path = tmp_path / "audit.log"
        return Audited(start_agent("--audit-log", str(path), *flags, **options), path)

    return start


def when(text: str) -> datetime.datetime:
    assert text.endswith("Z")
    return datetime.datetime.fromisoformat(text)


def local_address(client: RawClient | Client) -> str:
    host, port = client.ws.socket.getsockname()[:2]
    return f"{host}:{port}"


def test_a_command_has_a_start_and_an_end(
    audited: Callable[..., Audited], connect: Callable[..., RawClient], tmp_path: Path
) -> None:
    box = audited()
    client = connect(box.agent)
    before = datetime.datetime.now(datetime.UTC)
    command = ["sh", "-c", "exit 3", 'with "quotes"\nand ünicode']
    assert client.run(command, env=["PASSWORD=hunter2", "X=1"], workdir=str(tmp_path), user="0:0")[2]["code"] == 3
    start, end = box.wait_for("", 2)
    shared = {"peer": local_address(client), "session": "s0", "key": start["key"], "kind": "exec"}
    times = [when(start.pop("time")), when(end.pop("time")), when(end.pop("started")), when(end.pop("ended"))]
    assert start.pop("pid") > 0
    assert start == {
        **{"event": "start", **shared, "cmd": command, "env": ["PASSWORD", "X"]},
        **{"workdir": str(tmp_path), "user": "", "tty": False},  # version 1 knows no user
    }
    assert end == {"event": "end", **shared, "code": 3}
    slack = datetime.timedelta(milliseconds=1)  # to which they are written
    assert all(before - slack <= moment <= datetime.datetime.now(datetime.UTC) for moment in times)
    assert times[2] <= times[3]
    assert "hunter2" not in box.path.read_text()


def test_a_signal_and_what_it_did_are_told(audited: Callable[..., Audited], connect: Callable[..., RawClient]) -> None:
    box = audited()
    client, nosy = connect(box.agent), connect(box.agent)
    session = client.exec(["sh", "-c", "echo up; exec sleep 1000"], tty=True)
    session.wait_for(b"up")
    session.signal("KILL")
    assert session.wait() == 137
    nosy.output("true")
    (sent,) = box.wait_for("signal")
    (end,) = [entry for entry in box.wait_for("end", 2) if entry["key"] == sent["key"]]
    assert (sent["signal"], sent["peer"], sent["session"]) == ("SIGKILL", local_address(client), session.id)
    assert (end["signal"], end["code"]) == ("SIGKILL", 137)
    assert "because" not in end  # it is the signal's doing, and that is told


def test_attempts_that_were_refused_are_told(
    audited: Callable[..., Audited], connect: Callable[..., RawClient]
) -> None:
    box = audited("--max-sessions", "1")
    assert request(box.agent, "GET", "/metrics?token=wr0ng")[0] == 401
    client = connect(box.agent)
    client.run(["/no/such", "argument"])
    client.attach().wait_last()
    client.exec(["cat"])
    client.exec(["true"]).wait_last()
    refused = box.wait_for("refused", 4)
    assert [entry["reason"] for entry in refused] == ["token", "not_found", "no_main_process", "limit"]
    assert [entry.get("cmd") for entry in refused] == [None, ["/no/such", "argument"], None, ["true"]]
    assert all(entry["peer"].startswith("127.0.0.1:") and entry["error"] for entry in refused)
    assert len(box.wait_for("start")) == 1
    assert "wr0ng" not in box.path.read_text()
    assert TOKEN not in box.path.read_text()


def test_guessing_does_not_fill_the_disk(audited: Callable[..., Audited]) -> None:
    box = audited()
    # Those who wait for the answer would wait for a minute; who leaves is counted before the next one comes.
    for _ in range(60):
        with dial(box.agent) as guesser:
            guesser.sendall(ask_for(box.agent, "Authorization: Bearer guess", path="/metrics"))
    refused = box.wait_for("refused", 6)
    assert sorted(entry["times"] for entry in refused) == [1, 2, 4, 8, 16, 32]  # each was examined by its own thread


def test_a_secret_that_is_guessed_wrong_is_told(audited: Callable[..., Audited]) -> None:
    box = audited()
    client = Client(box.agent)
    session = client.exec(["cat"], id="a")
    while session.started is None:
        client.receive()
    thief = Client(box.agent)
    thief.resume(session, secret="0" * 32)
    while not session.errors:
        thief.receive()
    (refused,) = box.wait_for("refused")
    assert (refused["kind"], refused["session"], refused["reason"]) == ("resume", "a", "unknown_session")
    assert refused["peer"] == local_address(thief)
    for each in (client, thief):
        each.ws.close()


@pytest.mark.parametrize("how", ["close", "cut"])
def test_a_command_that_ends_with_its_connection_says_so(
    audited: Callable[..., Audited], connect: Callable[..., RawClient], how: str
) -> None:
    box = audited()
    client = connect(box.agent)
    client.exec(["sh", "-c", "echo up; exec sleep 1000"]).wait_for(b"up")
    getattr(client, how)()
    (end,) = box.wait_for("end")
    assert (end["because"], end["signal"], end["code"]) == ("its connection ended", "SIGHUP", 129)


def test_who_resumed_a_session_is_told_and_what_nobody_did(audited: Callable[..., Audited]) -> None:
    box = audited("--resume-window", "2s")
    first = Client(box.agent)
    sessions = [first.exec(["cat"], id=name) for name in ("gone", "kept")]
    while not all(session.started for session in sessions):
        first.receive()
    before = local_address(first)
    first.ws.close()
    parked = box.wait_for("parked", 2)
    assert {entry["peer"] for entry in parked} == {before}
    second = Client(box.agent)
    second.resume(sessions[1])
    (resumed,) = box.wait_for("resumed")
    assert (resumed["session"], resumed["peer"]) == ("kept", local_address(second))
    (gone,) = box.wait_for("end")
    assert (gone["session"], gone["peer"], gone["because"]) == ("gone", before, "nobody resumed it in time")
    second.send("end", id="kept")
    kept = box.wait_for("end", 2)[1]
    assert (kept["session"], kept["peer"]) == ("kept", local_address(second))
    assert (kept["because"], kept["key"]) == ("ended by its client", resumed["key"])
    second.ws.close()


def test_every_kind_of_session_is_told(audited: Callable[..., Audited], tmp_path: Path) -> None:
    box = audited("--keep-alive", "--", "sh", "-c", "read line; exit 5")
    (tmp_path / "file").write_text("x")
    with AgentConn.dial(box.agent.address, token=TOKEN) as conn:
        detached = conn.start_detached(["sh", "-c", "read line; exit 4"], stdin=subprocess.PIPE, user="0")
        followed = conn.attach(session_id=detached.id)
        archive = conn.archive_get(str(tmp_path / "file"))
        archive.stdout.read()
        archive.wait()
        missing = conn.archive_get(str(tmp_path / "missing"))
        with pytest.raises(Exception, match="missing"):
            missing.wait()
        followed.stdin.write(b"\n")
        followed.stdin.flush()
        assert followed.wait() == 4
        main = conn.attach()
        left = conn.attach()
        eventually(lambda: len(box.entries("start")) == 6, "six starts")
        left.detach()
        main.stdin.write(b"\n")
        main.stdin.flush()
        assert main.wait() == 5
    ends = {entry["key"]: entry for entry in box.wait_for("end", 6)}
    told = [(start, ends[start["key"]]) for start in box.entries("start")]
    detached_told = next(pair for pair in told if pair[0]["kind"] == "detached")
    assert detached_told[0]["cmd"] == ["sh", "-c", "read line; exit 4"]
    assert (detached_told[0]["user"], detached_told[0]["pid"], detached_told[1]["code"]) == ("0", detached.pid, 4)
    attached = [pair for pair in told if pair[0]["kind"] == "attach"]
    assert {(start["to"], end.get("code"), end.get("because")) for start, end in attached} == {
        (detached.id, 4, None),
        ("", 5, None),
        ("", None, "ended by its client"),
    }
    got, failed = (pair for pair in told if pair[0]["kind"] == "archive")
    assert (got[0]["direction"], got[0]["path"], got[1]["code"]) == ("get", str(tmp_path / "file"), 0)
    assert failed[1]["reason"] == "no_such_path"
    assert "missing" in failed[1]["error"]


def test_what_runs_when_the_agent_is_stopped_has_an_end(
    audited: Callable[..., Audited], connect: Callable[..., RawClient]
) -> None:
    box = audited()
    client = connect(box.agent)
    sessions = [client.exec(["sh", "-c", "echo up; exec sleep 1000"]) for _ in range(20)]
    for session in sessions:
        session.wait_for(b"up")
    parked = Client(box.agent)
    other = parked.exec(["cat"], id="parked")
    while other.started is None:
        parked.receive()
    parked.ws.close()
    box.wait_for("parked")
    box.agent.stop()
    ends = box.entries("end")
    assert {entry["key"] for entry in ends} == {entry["key"] for entry in box.entries("start")}
    assert [entry["because"] for entry in ends] == ["the agent ended"] * 21


def test_a_dash_puts_it_among_the_log_lines(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    agent = start_agent("--audit-log", "-")
    connect(agent).output("true")
    agent.wait_for_log('"event": "end"')
    start, end = (json.loads(line) for line in agent.log.splitlines() if line.startswith("{"))
    assert (start["cmd"], end["code"]) == (["true"], 0)


def test_a_unix_sockets_client_is_named_by_its_process(audited: Callable[..., Audited], tmp_path: Path) -> None:
    path = tmp_path / "socket"
    box = audited("--addr", f"unix:{path}", token="")
    with unix_connect(str(path), uri="ws://localhost/ws", compression=None) as ws:
        ws.send(json.dumps({"type": "exec", "id": "a", "cmd": ["true"]}))
        assert json.loads(ws.recv(DEADLINE))["type"] == "exit"
    assert box.wait_for("end")[0]["peer"] == f"unix socket, pid {os.getpid()}, uid {os.getuid()}"


def test_a_file_that_cannot_be_opened_is_a_mistake_of_the_start(tmp_path: Path) -> None:
    done = run_agent("--addr", "127.0.0.1:0", "--audit-log", str(tmp_path / "no" / "such"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--audit-log" in done.stderr
    assert "no/such" in done.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    with file_system(tmp_path / "disk", "64k") as disk:
        yield disk


@pytest.mark.root
def test_a_full_disk_holds_up_no_session_and_loses_nothing_that_can_wait(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient], small_disk: Path
) -> None:
    box = Audited(start_agent("--audit-log", str(small_disk / "audit")), small_disk / "audit")
    client = connect(box.agent)
    with open(small_disk / "filler", "wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
        while True:
            filler.write(bytes(1000))
    for number in range(50):  # each start of 500 bytes and more
        assert client.output("sh", "-c", 'echo "${#0}"', f"{number}".rjust(500)) == "500\n"
    box.agent.wait_for_log("audit log: cannot write to .*: No space left on device")
    assert request(box.agent, "GET", "/health")[0] == 200
    (small_disk / "filler").unlink()
    eventually(lambda: box.path.read_bytes().count(b'"event": "end"') == 50, "all entries")
    assert [int(entry["cmd"][3]) for entry in box.entries("start")] == list(range(50))
    assert box.entries("lost") == []
    assert box.agent.log.count("audit log: cannot write") == 1


def test_a_client_certificate_is_named(audited: Callable[..., Audited], tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    authority.issue_cert("alice@example.org", common_name="alice").private_key_and_cert_chain_pem.write_to_path(
        str(tmp_path / "alice.pem")
    )
    box = audited("--tls-cert", str(tmp_path / "server.pem"), "--tls-client-ca", str(tmp_path / "ca.pem"))
    tls = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    with pytest.raises(InvalidStatus), websocket(f"wss://{box.agent.address}/ws", ssl=tls, proxy=None):
        pass
    (refused,) = box.wait_for("refused")
    assert (refused["reason"], refused.get("subject")) == ("certificate", None)
    tls.load_cert_chain(tmp_path / "alice.pem")
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with websocket(f"wss://{box.agent.address}/ws", ssl=tls, additional_headers=headers, proxy=None) as ws:
        ws.send(json.dumps({"type": "exec", "id": "a", "cmd": ["true"]}))
        assert json.loads(ws.recv(DEADLINE))["type"] == "exit"
        peer = "{}:{}".format(*ws.socket.getsockname())
    (end,) = box.wait_for("end")
    assert (end["peer"], end["subject"]) == (peer, "alice")

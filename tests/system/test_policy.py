"""What --allow-cmd, --no-exec and --read-only forbid, and what they leave."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import TOKEN, Agent, RawClient, Session, eventually

from agent_client import AgentConn, ClientError, SessionError

ECHO = shutil.which("echo") or "/bin/echo"
ENV = shutil.which("env") or "/usr/bin/env"

StartAgent = Callable[..., Agent]
Connect = Callable[..., RawClient]


def forbidden(session: Session) -> bool:
    """Whether the session was refused, by the reason that a client goes by."""
    session.wait_last()
    assert session.exit is None
    assert [error.get("reason") for error in session.errors] == ["forbidden"], session
    return True


def put(conn: AgentConn, directory: Path) -> int:
    """Put a file into a directory."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("x"))
    process = conn.archive_put(str(directory))
    process.stdin.write(made.getvalue())
    process.stdin.close()
    return process.wait()


def refused_as_forbidden(call: Callable[[], object]) -> bool:
    with pytest.raises(SessionError) as caught:
        call()
    assert caught.value.reason == "forbidden"
    return True


# --allow-cmd


def test_only_the_programs_that_are_named_start(start_agent: StartAgent, connect: Connect, tmp_path: Path) -> None:
    agent = start_agent("--allow-cmd", f"{ECHO},{ENV}")
    client = connect(agent)
    assert client.output(ECHO, "by path") == "by path\n"
    assert client.output("echo", "by name") == "by name\n"
    evil = tmp_path / "echo"
    evil.write_text("#!/bin/sh\necho evil\n")
    evil.chmod(0o755)
    for command in ("sh", "/bin/sh", str(evil), "./echo", f"{ECHO}/", f"/../{ECHO}", "ECHO", "", ".", "/", "echo "):
        assert forbidden(client.exec([command, "x"])) if command else True
    for workdir in (str(tmp_path), "/"):  # a name is that of the program, not of what lies about
        assert client.output("echo", "still", workdir=workdir) == "still\n"
    client.assert_quiet()


def test_a_client_cannot_turn_an_allowed_program_into_another(
    start_agent: StartAgent, connect: Connect, tmp_path: Path
) -> None:
    agent = start_agent("--allow-cmd", f"{ECHO},{ENV}")
    client = connect(agent)
    for env in (["PATH=/tmp"], ["LD_PRELOAD=/tmp/x.so"], ["A=b"]):
        assert forbidden(client.exec(["echo", "x"], env=env))
    with AgentConn.dial(agent.address, TOKEN) as conn:
        assert refused_as_forbidden(lambda: conn.popen(["echo"], user="nobody").wait())
        assert refused_as_forbidden(lambda: conn.run(["sh", "-c", "true"]))
        assert refused_as_forbidden(lambda: conn.start_detached(["sh", "-c", "true"]))
        assert refused_as_forbidden(lambda: put(conn, tmp_path))
        assert conn.run(["echo", "hi"], capture_output=True).stdout == b"hi\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "agent0"]


def test_stdin_behind_a_forbidden_command_is_no_second_error(start_agent: StartAgent, connect: Connect) -> None:
    client = connect(start_agent("--allow-cmd", ECHO))
    session = client.exec(["cat"])
    session.write(b"text")
    session.close_stdin()
    assert forbidden(session)
    assert client.output("echo", "quiet") == "quiet\n"
    assert len(session.errors) == 1
    assert client.errors == []


# --no-exec


def test_no_exec_leaves_attach_and_questions(start_agent: StartAgent, connect: Connect, tmp_path: Path) -> None:
    agent = start_agent("--no-exec", "--keep-alive", "--", "sh", "-c", "read line; echo got $line; exec sleep 1000")
    client = connect(agent)
    assert forbidden(client.exec(["true"]))
    attached = client.attach()
    attached.write(b"word\n")
    attached.wait_for(b"got word\n")
    with AgentConn.dial(agent.address, TOKEN) as conn:
        assert refused_as_forbidden(lambda: conn.run(["true"]))
        assert refused_as_forbidden(lambda: conn.archive_get("/etc/hostname").wait())
        assert refused_as_forbidden(lambda: put(conn, tmp_path))
        assert refused_as_forbidden(lambda: conn.stat_path("/etc/passwd"))
        assert [entry["kind"] for entry in conn.sessions()] == ["main"]
        assert conn.health()["exited"] is False
    attached.signal("TERM")
    assert attached.wait() == 143


# --read-only


@pytest.mark.parametrize("tty", [False, True], ids=["pipes", "terminal"])
def test_read_only_shows_everything_and_changes_nothing(
    start_agent: StartAgent, connect: Connect, tmp_path: Path, tty: bool
) -> None:
    script = "trap 'echo got a signal' INT TERM; echo hello; stty size; cat <&0 & while :; do sleep 0.05; done"
    flags = ("--tty",) if tty else ()
    agent = start_agent("--read-only", "--keep-alive", *flags, "--", "sh", "-c", script)
    client = connect(agent)
    assert forbidden(client.exec(["true"]))
    attached = client.attach()
    attached.wait_for(b"hello")
    attached.write(b"typed\n")
    attached.signal("INT")
    attached.send("resize", width=77, height=33)
    attached.close_stdin()
    while len(attached.errors) < 2:
        client.receive_one()
    assert [error["reason"] for error in attached.errors] == ["read_only"] * 2
    with AgentConn.dial(agent.address, TOKEN) as conn:
        assert refused_as_forbidden(lambda: conn.run(["true"]))
        assert refused_as_forbidden(lambda: put(conn, tmp_path))
        (tmp_path / "shown").write_text("for reading")
        with conn.archive_get(str(tmp_path / "shown")) as got:
            assert b"for reading" in got.stdout.read()
        with conn.attach() as view:
            assert b"hello" in view.stdout.readline()
            view.stdin.write(b"typed too\n")
            view.stdin.flush()
            view.send_signal(15)
            eventually(lambda: len(view.warnings) == 2, "that both are forbidden")
            assert [warning.reason for warning in view.warnings] == ["read_only"] * 2
    assert b"typed" not in attached.stdout
    assert b"signal" not in attached.stdout
    assert b"33 77" not in attached.stdout
    agent.process.send_signal(2)  # whoever may signal the agent may end the main process: it is no client
    attached.wait_for(b"got a signal")
    assert b"typed" not in attached.stdout


def test_who_is_forbidden_something_is_in_the_audit_log(
    start_agent: StartAgent, connect: Connect, tmp_path: Path
) -> None:
    path = tmp_path / "audit"
    agent = start_agent("--read-only", "--audit-log", str(path))
    assert forbidden(connect(agent).exec(["rm", "-rf", "/somewhere"]))
    agent.stop()
    (line,) = [line for line in path.read_text().splitlines() if "forbidden" in line]
    assert "/somewhere" in line


def test_forbidden_stdin_signals_and_questions_are_in_the_audit_log(
    start_agent: StartAgent, connect: Connect, tmp_path: Path
) -> None:
    path = tmp_path / "audit"

    def refused() -> list[dict[str, Any]]:
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        return [entry for entry in entries if entry["event"] == "refused"]

    agent = start_agent("--read-only", "--audit-log", str(path), "--keep-alive", "--", "sleep", "300")
    session = connect(agent).attach()
    for _ in range(3):
        session.write(b"words\n")
    session.signal("TERM")
    with AgentConn.dial(agent.url, TOKEN) as conn:
        watching = conn.attach()
        watching.stdin.write(b"more\n")
        watching.stdin.flush()
        eventually(lambda: len(refused()) == 3, "one entry for the stdin of each session, and one for the signal")
        watching.detach()
    by_session = [(entry.get("kind"), entry.get("signal"), entry["reason"]) for entry in refused()]
    assert sorted(by_session, key=str) == [
        ("stdin", None, "read_only"),
        ("stdin", None, "read_only"),
        (None, "TERM", "read_only"),
    ]
    agent.stop()
    path.unlink()
    agent = start_agent("--no-exec", "--audit-log", str(path))
    with AgentConn.dial(agent.url, TOKEN) as conn, pytest.raises(ClientError):
        conn.stat_path("/etc/passwd")
    (entry,) = eventually(refused, "the question")
    assert (entry["kind"], entry["path"], entry["reason"]) == ("stat", "/etc/passwd", "forbidden")

"""The main process: its PID file, the signals it gets, its end, and the agent's end with it."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support import AGENT, TOKEN, Agent, RawClient, children_of, drain, eventually, is_alive, run_agent, wait_gone

MAIN = ("--keep-alive", "--", "sh", "-c")
IDLE = "echo ready; while :; do sleep 0.02; done"


# PID file.


def test_the_pid_file_holds_the_pid_while_it_runs(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    agent = start_agent(*MAIN, "echo $$; read x; exit 3")
    session = connect(agent).attach()
    (pid,) = session.wait_for_lines(1)
    assert agent.pid_file.read_text() == pid
    assert agent.health()["pid"] == int(pid)
    session.write(b"\n")
    assert session.wait() == 3
    assert not agent.pid_file.exists()
    assert list(agent.pid_file.parent.iterdir()) == []


def test_no_main_process_means_no_pid_file(start_agent: Callable[..., Agent]) -> None:
    agent = start_agent()
    assert agent.health() == {"status": "ok"}
    assert not agent.pid_file.exists()


def test_a_symlink_at_the_path_is_replaced_and_not_followed(start_agent: Callable[..., Agent], tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    link = tmp_path / "link"
    link.symlink_to(victim)
    agent = start_agent("--pid-file", str(link), *MAIN, IDLE)
    agent.wait_for_output(b"ready")
    assert victim.read_text() == "precious"
    assert not link.is_symlink()
    assert link.read_text() == str(agent.health()["pid"])
    agent.stop()
    assert victim.read_text() == "precious"
    assert not link.exists()


def test_a_symlink_put_there_later_is_not_followed(start_agent: Callable[..., Agent], tmp_path: Path) -> None:
    agent = start_agent(*MAIN, IDLE)
    agent.wait_for_output(b"ready")
    victim = tmp_path / "victim"
    victim.write_text(agent.pid_file.read_text())
    agent.pid_file.unlink()
    agent.pid_file.symlink_to(victim)
    agent.stop()
    assert victim.exists()
    assert agent.pid_file.is_symlink()


def test_a_pid_file_of_somebody_else_is_left(start_agent: Callable[..., Agent]) -> None:
    agent = start_agent(*MAIN, IDLE)
    agent.wait_for_output(b"ready")
    agent.pid_file.write_text("1")
    agent.stop()
    assert agent.pid_file.read_text() == "1"


def test_a_pid_file_that_cannot_be_written_is_logged_and_not_fatal(
    start_agent: Callable[..., Agent], tmp_path: Path
) -> None:
    agent = start_agent("--pid-file", f"{tmp_path}/missing/pid", *MAIN, IDLE)
    agent.wait_for_output(b"ready")
    agent.wait_for_log(r"cannot write the PID file \S*/missing/pid: No such file")
    assert agent.health()["exited"] is False


# Signals and the agent's end.


def test_sigterm_is_forwarded_and_the_agent_ends_with_its_code(start_agent: Callable[..., Agent]) -> None:
    agent = start_agent(*MAIN, f"trap 'echo term; exit 7' TERM; {IDLE}")
    agent.wait_for_output(b"ready\n")
    assert agent.stop() == 7
    assert agent.output == b"ready\nterm\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_main_process_that_a_stop_signal_ends(start_agent: Callable[..., Agent], number: int, code: int) -> None:
    agent = start_agent(*MAIN, "echo ready; exec sleep 300")
    agent.wait_for_output(b"ready\n")
    agent.signal(number)
    assert agent.wait() == code


def test_without_a_main_process_sigterm_ends_the_agent_with_0(start_agent: Callable[..., Agent]) -> None:
    assert start_agent().stop() == 0


def test_the_stop_timeout_ends_with_sigkill(start_agent: Callable[..., Agent]) -> None:
    agent = start_agent("--stop-timeout", "300ms", *MAIN, f"trap 'echo no' TERM; {IDLE}")
    agent.wait_for_output(b"ready\n")
    assert agent.stop() == 137
    assert agent.output == b"ready\nno\n"


def test_a_second_sigterm_hurries(start_agent: Callable[..., Agent]) -> None:
    agent = start_agent("--stop-timeout", "10m", *MAIN, f"trap 'echo no' TERM; {IDLE}")
    agent.wait_for_output(b"ready\n")
    agent.signal(signal.SIGTERM)
    agent.wait_for_output(b"no\n")
    assert agent.stop() == 137


def test_while_it_stops_the_agent_still_serves(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    agent = start_agent("--stop-timeout", "10m", *MAIN, f"trap 'echo stopping; read x; exit 5' TERM; {IDLE}")
    agent.wait_for_output(b"ready\n")
    client = connect(agent)
    agent.signal(signal.SIGTERM)
    session = client.attach()
    session.wait_for(b"stopping\n")
    assert client.output("echo", "served") == "served\n"
    session.write(b"now\n")
    assert session.wait() == 5
    assert agent.wait() == 5


@pytest.mark.parametrize("name", ["HUP", "QUIT", "USR1", "USR2", "WINCH"])
def test_other_signals_are_forwarded(start_agent: Callable[..., Agent], name: str) -> None:
    agent = start_agent(*MAIN, f"trap 'echo got {name}' {name}; trap 'exit 0' TERM; {IDLE}")
    agent.wait_for_output(b"ready\n")
    for _ in range(3):
        before = agent.output.count(b"got")
        agent.signal(signal.Signals[f"SIG{name}"])
        eventually(lambda before=before: agent.output.count(b"got") > before, f"SIG{name}")
    assert agent.stop() == 0


def test_exit_with_main_delivers_the_exit_and_ends_with_the_code(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    agent = start_agent("--exit-with-main", *MAIN, "echo ready; read x; seq 1 100000; exit 12")
    clients = [connect(agent) for _ in range(3)]
    sessions = [client.attach() for client in clients]
    for session in sessions:
        session.wait_for(b"ready\n")
    sessions[0].write(b"go\n")
    for session in sessions:
        assert session.wait() == 12
        assert session.stdout.endswith(b"\n100000\n")
    assert agent.wait() == 12
    for client in clients:
        assert drain(client) == []
        assert client.ws.close_code == 1001


def test_without_it_the_agent_goes_on_answering(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    agent = start_agent(*MAIN, "echo out; exit 12")
    eventually(lambda: agent.health()["exited"], "the end of the main process")
    health = agent.health()
    assert (health["status"], health["exited"], health["exitCode"]) == ("ok", True, 12)
    client = connect(agent)
    session = client.attach()
    assert session.wait() == 12
    assert session.stdout == b"out\n"
    assert client.output("echo", "still") == "still\n"
    session = client.attach()
    session.write(b"late\n")  # for a dead process: harmless
    assert session.wait() == 12
    assert agent.stop() == 12


def test_while_it_runs_health_says_so(start_agent: Callable[..., Agent]) -> None:
    agent = start_agent(*MAIN, IDLE)
    agent.wait_for_output(b"ready")
    health = agent.health()
    assert health == {"status": "ok", "pid": int(agent.pid_file.read_text()), "exited": False}


def test_a_main_process_ended_by_a_signal_has_128_plus_its_number(start_agent: Callable[..., Agent]) -> None:
    agent = start_agent("--exit-with-main", *MAIN, "kill -9 $$")
    assert agent.wait() == 137


# Output.


def test_its_output_is_copied_to_the_agents_own(start_agent: Callable[..., Agent]) -> None:
    agent = start_agent("--exit-with-main", *MAIN, "seq 1 100000; echo problem >&2; exit 1")
    assert agent.wait() == 1
    assert agent.output == b"".join(b"%d\n" % number for number in range(1, 100001))
    assert "problem\n" in agent.log


def test_its_output_is_not_copied_when_that_is_off(start_agent: Callable[..., Agent]) -> None:
    agent = start_agent("--exit-with-main", "--copy-output=false", *MAIN, "echo out; echo problem >&2")
    assert agent.wait() == 0
    assert agent.output == b""
    assert "problem" not in agent.log


def test_a_background_child_that_holds_the_output_does_not_hold_the_agent(start_agent: Callable[..., Agent]) -> None:
    agent = start_agent("--exit-with-main", *MAIN, "sleep 300 & echo $!; exit 2")
    assert agent.wait() == 2
    wait_gone(int(agent.output))


def test_it_inherits_nothing_of_the_agent(start_agent: Callable[..., Agent]) -> None:
    # Of ls itself, whose directory is the next number: a shell may still have the other end of its own pipe.
    script = "ls /proc/self/fd | tr '\\n' ' '; test $(ps -o sid= $$) = $$ && echo leader; env"
    agent = start_agent("--exit-with-main", *MAIN, script)
    assert agent.wait() == 0
    assert agent.output.startswith(b"0 1 2 3 leader\n")
    assert TOKEN.encode() not in agent.output


def test_without_a_command_it_is_a_shell(start_agent: Callable[..., Agent], connect: Callable[..., RawClient]) -> None:
    agent = start_agent("-keep-alive")
    session = connect(agent).attach()
    session.write(b"echo $((6 * 7)); exit 3\n")
    assert session.wait() == 3
    assert session.stdout == b"42\n"


# A main process that cannot start.


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("no-such-command", 127, "not found"),
        ("/no/such/command", 127, "not found"),
        ("/etc/passwd", 126, "not executable"),
        ("/etc", 126, "not executable"),
    ],
)
def test_a_command_that_cannot_start_is_one_line_and_the_shells_code(
    tmp_path: Path, command: str, code: int, words: str
) -> None:
    result = run_agent("--addr", "127.0.0.1:0", "--pid-file", f"{tmp_path}/pid", "--keep-alive", "--", command)
    assert result.returncode == code
    (line,) = result.stderr.splitlines()
    assert command in line
    assert words in line
    assert list(tmp_path.iterdir()) == []


# What is left.

STUBBORN = """trap "" HUP INT TERM; echo $$; while :; do sleep 1; done"""
LEFTOVERS = [
    "echo $$; exec sleep 300",
    "setsid -f sh -c 'echo $$; exec sleep 300'; sleep 300",
    "setsid -f sh -c 'echo $$; exec sleep 300 <&- >/dev/null 2>&1'; sleep 300",
    STUBBORN,
    f"setsid -f sh -c '{STUBBORN}'; sleep 300",
]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_of_the_sessions_is_left_after_the_agents_end(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient], number: int
) -> None:
    agent = start_agent()
    sessions = [connect(agent).exec(["sh", "-c", script], tty=tty) for script in LEFTOVERS for tty in (False, True)]
    pids = [int(session.wait_for_lines(1)[0]) for session in sessions]
    agent.signal(number)
    assert agent.wait() == 0
    assert [pid for pid in pids if is_alive(pid)] == []


@pytest.mark.parametrize("script", LEFTOVERS)
def test_nothing_of_the_main_process_is_left_after_the_agents_end(
    start_agent: Callable[..., Agent], script: str
) -> None:
    agent = start_agent("--stop-timeout", "100ms", *MAIN, script)
    agent.wait_for_output(b"\n")
    pid = int(agent.output)
    agent.stop()
    assert not is_alive(pid)


def test_nothing_is_left_of_a_connection_that_ends_just_before_the_agent(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    # These take the kill timeout to end, and the agent is told to end meanwhile.
    agent = start_agent("--kill-timeout", "1s")
    client = connect(agent)
    sessions = [client.exec(["sh", "-c", script]) for script in LEFTOVERS]
    pids = [int(session.wait_for_lines(1)[0]) for session in sessions]
    client.close()
    agent.wait_for_log("sessions were running")
    assert agent.stop() == 0
    left = [pid for pid in pids if is_alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def test_the_agent_leaves_no_file_behind(start_agent: Callable[..., Agent], tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.mkdir()
    shutil.copy(AGENT, image)
    agent = start_agent(*MAIN, IDLE, program=image / "agent.py")
    agent.wait_for_output(b"ready")
    assert [path.name for path in agent.pid_file.parent.iterdir()] == ["main.pid"]
    agent.stop()
    assert [path.name for path in image.iterdir()] == ["agent.py"]
    assert list(agent.pid_file.parent.iterdir()) == []


def test_the_agent_has_no_child_but_the_main_process(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    agent = start_agent(*MAIN, "echo ready; exec sleep 300")
    agent.wait_for_output(b"ready")
    client = connect(agent)
    for _ in range(20):
        client.run(["true"])
    assert children_of(agent.pid) == [agent.health()["pid"]]

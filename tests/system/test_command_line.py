"""The client's command line against a real agent, on real terminals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import screens
from running import DEADLINE, TOKEN, RunningAgent, spawned
from support import eventually

import agent_client

CLIENT = [sys.executable, agent_client.__file__]
MAIN = 'trap "exit 21" TERM; echo ready; while read -r line; do echo "got $line"; done; exit 9'


@pytest.fixture
def box(tmp_path: Path) -> Iterator[RunningAgent]:
    """An agent with a main process."""
    started = RunningAgent(tmp_path, "--keep-alive", "--", "sh", "-c", MAIN)
    yield started
    started.stop()


@pytest.fixture
def environ(box: RunningAgent) -> dict[str, str]:
    """The client finds address and token in its environment."""
    return {**os.environ, "SOCKERLESS_AGENT_ADDR": box.addr, "SOCKERLESS_AGENT_TOKEN": TOKEN, "TERM": "xterm"}


def client(environ: dict[str, str], *words: str, data: bytes = b"") -> tuple[int, bytes, bytes]:
    done = subprocess.run([*CLIENT, *words], env=environ, input=data, capture_output=True, timeout=DEADLINE)
    return done.returncode, done.stdout, done.stderr


def resident_memory(pid: int) -> int:
    """Bytes, see proc_pid_status(5)."""
    found = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


# ── without a terminal ────────────────────────────────────────────────────────


def test_output_goes_to_its_stream_and_the_exit_status_is_the_commands(environ: dict[str, str]) -> None:
    assert client(environ, "exec", "--", "sh", "-c", "echo out; echo err >&2; exit 3") == (3, b"out\n", b"err\n")
    assert client(environ, "exec", "true") == (0, b"", b"")


def test_stdin_is_forwarded_only_when_asked_for(environ: dict[str, str]) -> None:
    assert client(environ, "exec", "-i", "cat", data=b"typed") == (0, b"typed", b"")
    assert client(environ, "exec", "cat", data=b"typed") == (0, b"", b"")


def test_environment_and_directory_are_set(environ: dict[str, str], tmp_path: Path) -> None:
    words = ("-e", "A=1 2", "-e", "FROM_HERE", "-e", "NOT_SET_ANYWHERE", "-w", str(tmp_path))
    script = 'echo "$A|$FROM_HERE|${NOT_SET_ANYWHERE-unset}|$(pwd)"'
    result = client({**environ, "FROM_HERE": "yes"}, "exec", *words, "--", "sh", "-c", script)
    assert result == (0, f"1 2|yes|unset|{tmp_path}\n".encode(), b"")


@pytest.mark.parametrize(
    ("cmd", "status", "words"),
    [
        (["no-such-command"], 127, b"no-such-command"),
        (["/etc/passwd"], 126, b"/etc/passwd"),
        (["sh", "-c", "kill -KILL $$"], 137, b""),
        (["sh", "-c", "kill -TERM $$"], 143, b""),
        (["sh", "-c", "exit 255"], 255, b""),
    ],
)
def test_the_exit_status_is_that_of_docker_exec(
    environ: dict[str, str], cmd: list[str], status: int, words: bytes
) -> None:
    code, _, stderr = client(environ, "exec", "--", *cmd)
    assert code == status
    assert words in stderr


def test_a_failure_of_the_client_itself_is_125_and_one_line(environ: dict[str, str]) -> None:
    for words, variables, expected in (
        (("exec", "--", "true"), {"SOCKERLESS_AGENT_ADDR": "127.0.0.1:1"}, b"127.0.0.1:1"),
        (("exec", "--", "true"), {"SOCKERLESS_AGENT_TOKEN": "wrong"}, b"refuses the token"),
        (("exec", "--addr", "nonsense:x", "true"), {}, b"nonsense:x"),
        (("exec", "--token-file", "/no/such/file", "true"), {}, b"/no/such/file"),
        (("exec", "-e", "=x", "true"), {}, b"=x"),
        (("exec", "-it", "true"), {}, b"not a terminal"),
        (("exec", "--via", "127.0.0.1:1", "true"), {}, b"--agent"),
    ):
        code, stdout, stderr = client({**environ, **variables}, *words)
        assert (code, stdout) == (125, b""), stderr
        assert expected in stderr
        assert stderr.count(b"\n") == 1
    for words in (("exec",), ("exec", "--no-such-flag", "true"), ("nonsense",)):
        code, stdout, stderr = client(environ, *words)
        assert (code, stdout) == (125, b""), stderr


def test_a_connection_that_is_lost_is_125_and_never_an_exit_status_of_the_command(
    box: RunningAgent, environ: dict[str, str]
) -> None:
    command = [*CLIENT, "exec", "--reconnect", "0", "--", "sh", "-c", "echo up; exec sleep 300"]
    with spawned(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "up\n"
        box.process.kill()
        assert "lost" in process.stderr.read()
        assert process.wait(DEADLINE) == 125


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_passed_on(environ: dict[str, str], number: signal.Signals) -> None:
    name = number.name.removeprefix("SIG")
    script = f"trap 'echo caught; exit 40' {name}; echo up; while :; do sleep 0.02; done"
    with spawned([*CLIENT, "exec", "--", "sh", "-c", script], env=environ, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"up\n"
        process.send_signal(number)
        assert process.stdout.read() == b"caught\n"
        assert process.wait(DEADLINE) == 40


def test_without_sig_proxy_a_signal_ends_the_client_and_with_it_the_command(
    environ: dict[str, str], tmp_path: Path
) -> None:
    script = f"trap 'touch {tmp_path}/hung-up; exit' HUP; echo up; while :; do sleep 0.02; done"
    command = [*CLIENT, "exec", "--no-sig-proxy", "--", "sh", "-c", script]
    with spawned(command, env=environ, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"up\n"
        process.terminate()
        assert process.wait(DEADLINE) == 143
    eventually((tmp_path / "hung-up").exists, "the command's end")


def test_a_reader_that_leaves_ends_the_command(environ: dict[str, str]) -> None:
    with spawned([*CLIENT, "exec", "--", "yes"], env=environ, stdout=subprocess.PIPE) as process:
        assert process.stdout.read(1 << 20)
        process.stdout.close()
        assert process.wait(DEADLINE) == 128 + signal.SIGPIPE


def test_a_reader_that_waits_stops_the_command_and_not_the_client(environ: dict[str, str], tmp_path: Path) -> None:
    script = f"head -c 256M /dev/zero; touch {tmp_path}/written"
    command = [*CLIENT, "exec", "--", "sh", "-c", script]
    with spawned(command, env=environ, stdout=subprocess.PIPE) as process:
        assert process.stdout.read(1 << 20)
        before = -1
        while before != (before := resident_memory(process.pid)):
            time.sleep(0.5)  # until it grows no more
        assert before < 128 << 20
        assert not (tmp_path / "written").exists()
        rest = sum(map(len, iter(lambda: process.stdout.read(1 << 20), b"")))
        assert rest == 255 << 20
        assert process.wait(DEADLINE) == 0


def test_health_is_printed(environ: dict[str, str]) -> None:
    code, stdout, stderr = client(environ, "health")
    assert (code, stderr) == (0, b"")
    state = json.loads(stdout)
    assert state["status"] == "ok"
    assert state["exited"] is False
    assert client({**environ, "SOCKERLESS_AGENT_ADDR": "127.0.0.1:1"}, "health")[0] == 125


def test_attach_replays_feeds_and_has_the_main_processs_status(environ: dict[str, str]) -> None:
    assert client(environ, "attach", "-i", data=b"a\nb\n") == (9, b"ready\ngot a\ngot b\n", b"")


def test_attach_passes_signals_on(environ: dict[str, str]) -> None:
    with spawned([*CLIENT, "attach"], env=environ, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        assert process.wait(DEADLINE) == 21


# ── on a terminal ─────────────────────────────────────────────────────────────


class Terminal(screens.Terminal):
    """Our client on a terminal."""

    def __init__(self, environ: dict[str, str], *words: str, columns: int = 80, rows: int = 24) -> None:
        super().__init__([*CLIENT, *words], environ, columns, rows)


@pytest.fixture
def open_terminal(environ: dict[str, str]) -> Iterator[Callable[..., Terminal]]:
    """Run the client on a terminal."""
    terminals: list[Terminal] = []

    def start(*words: str, **options: Any) -> Terminal:
        terminals.append(Terminal(environ, *words, **options))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


def test_a_shell_is_interactive_and_the_terminal_is_put_back(open_terminal: Callable[..., Terminal]) -> None:
    terminal = open_terminal("exec", "-it", "-e", "PS1=box> ", "-e", "ENV=", "--", "sh", "-i", columns=100, rows=30)
    terminal.wait_for(r"^box>")
    assert terminal.attributes() != terminal.before  # raw: keys belong to the shell over there
    terminal.type("stty size; tty\r")
    terminal.wait_for(r"^30 100$")
    terminal.wait_for(r"^/dev/pts/\d+$")
    terminal.type("sh -c 'echo now; exec sleep 300'\r")
    # The echo of what was typed says nothing about who has the terminal; it may come before the prompt.
    terminal.wait_for(r"^(box> )?now$")
    terminal.type("\x03")
    terminal.wait_for(r"\^C\s+box>")
    terminal.resize(90, 20)
    terminal.type("until [ \"$(stty size)\" = '20 90' ]; do sleep 0.02; done; echo it is\r")
    terminal.wait_for(r"^it is$")
    terminal.type("exit 6\r")
    assert terminal.wait() == 6
    assert terminal.attributes() == terminal.before


def test_vi_is_drawn_resized_and_quit(open_terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("first line\n")
    # A vt100, since pyte does not know all that vim sends to an xterm.
    terminal = open_terminal("exec", "-it", "-e", "TERM=vt100", "-w", str(tmp_path), "--", "vi", "-u", "NONE", "text")
    terminal.wait_for(r"\Afirst line\n~\n")
    terminal.type("osecond line\x1b")
    terminal.wait_for(r"\Afirst line\nsecond line\n~\n")
    terminal.resize(60, 10)
    terminal.wait_for(r"\Afirst line\nsecond line\n(~\n){7}")
    terminal.type(":wq\r")
    assert terminal.wait() == 0
    assert terminal.attributes() == terminal.before
    assert path.read_text() == "first line\nsecond line\n"


def test_top_is_drawn_and_quit(open_terminal: Callable[..., Terminal]) -> None:
    terminal = open_terminal("exec", "-it", "--", "top")
    terminal.wait_for(r"^top - .* load average")
    terminal.wait_for(r"PID USER")
    terminal.type("q")
    assert terminal.wait() == 0
    assert terminal.attributes() == terminal.before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_is_attached_to_an_agent_that_takes_no_signals_leaves_with_one(
    tmp_path: Path, environ: dict[str, str], number: signal.Signals
) -> None:
    agent = RunningAgent(tmp_path, "--read-only", "--keep-alive", "--", "sleep", "300")
    try:
        command = [*CLIENT, "attach", "--addr", agent.addr]
        process = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE)
        agent.wait_for_log("attach started")
        process.send_signal(number)
        _, said = process.communicate(timeout=DEADLINE)
        assert process.returncode == 128 + number
        assert said == b"agent_client: the agent runs with --read-only: no stdin and no signals\n"
    finally:
        agent.stop()


@pytest.mark.parametrize(("flag", "status"), [("--tty", 143), ("--no-sig-proxy", 143)])
def test_a_signal_to_the_client_puts_the_terminal_back(
    open_terminal: Callable[..., Terminal], flag: str, status: int
) -> None:
    terminal = open_terminal("exec", "-it", flag, "--", "sh", "-c", "echo up; exec sleep 300")
    terminal.wait_for("^up")
    terminal.process.terminate()
    assert terminal.wait() == status
    assert terminal.attributes() == terminal.before


def test_a_lost_connection_puts_the_terminal_back(box: RunningAgent, open_terminal: Callable[..., Terminal]) -> None:
    terminal = open_terminal("exec", "-it", "--reconnect", "300ms", "--", "sh", "-c", "echo up; exec sleep 300")
    terminal.wait_for("^up")
    box.process.kill()
    terminal.wait_for("^agent_client: connection lost, trying to resume")
    assert terminal.wait() == 125
    terminal.wait_for("lost")
    assert terminal.attributes() == terminal.before


def test_detach_keys_leave_the_main_process_alone(
    open_terminal: Callable[..., Terminal], environ: dict[str, str]
) -> None:
    terminal = open_terminal("attach", "-it")
    terminal.wait_for("^ready")
    terminal.type("hello\r")  # nobody makes a line end of it: the main process has a pipe
    terminal.type("\x10x\n")  # one of the keys alone is passed on
    terminal.wait_for("got hello")
    terminal.type("\x10\x11")
    assert terminal.wait() == 0
    assert terminal.attributes() == terminal.before
    assert client(environ, "attach", "-i", data=b"")[0] == 9


def test_sessions_are_listed(environ: dict[str, str]) -> None:
    with spawned([*CLIENT, "exec", "--", "sh", "-c", "echo up; exec sleep 300"], env=environ,
                 stdout=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout.readline() == b"up\n"
        code, stdout, _ = client(environ, "ps")
        assert code == 0
        assert re.search(rb"^[-\w]+ +exec +\d+ running +sh -c 'echo up; exec sleep 300'$", stdout, re.MULTILINE), stdout


@pytest.mark.root
def test_a_command_runs_as_another_user(environ: dict[str, str]) -> None:
    assert client(environ, "exec", "-u", "nobody", "--", "id", "-un") == (0, b"nobody\n", b"")
    code, _, stderr = client(environ, "exec", "-u", "no-such-user", "--", "id")
    assert code == 125
    assert b"no-such-user" in stderr

"""docker exec with Docker's own client, through the gateway, in front of a real agent."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from docking import DEADLINE, Gateway, Terminal
from support import Agent, eventually, is_alive, killed_afterwards, wait_gone

OpenTerminal = Callable[..., Terminal]


@pytest.fixture
def pid_of(tmp_path: Path) -> Iterator[Callable[[str], int]]:
    """The PID that a command wrote to a file of the test's directory."""

    def read(name: str) -> int:
        path = tmp_path / name
        return int(eventually(lambda: path.exists() and path.read_text().strip(), f"a PID in {path}"))

    yield read


# ── without a terminal ────────────────────────────────────────────────────────


def test_output_goes_to_its_stream_and_the_exit_status_is_the_commands(gateway: Gateway) -> None:
    assert gateway.docker("exec", "web", "sh", "-c", "echo out; echo err >&2; exit 3") == (3, b"out\n", b"err\n")
    assert gateway.docker("exec", "web", "true") == (0, b"", b"")
    assert gateway.docker("exec", "web", "sh", "-c", "kill -KILL $$") == (137, b"", b"")


def test_both_streams_keep_their_order_where_they_go_to_one_place(gateway: Gateway) -> None:
    script = "for i in 1 2 3 4 5; do echo out $i; sleep 0.05; echo err $i >&2; sleep 0.05; done"
    with gateway.start("exec", "web", "sh", "-c", script, stderr=subprocess.STDOUT) as process:
        stdout, _ = process.communicate(timeout=DEADLINE)
    assert stdout.decode().split("\n")[:-1] == [f"{name} {i}" for i in range(1, 6) for name in ("out", "err")]


def test_stdin_is_forwarded_to_its_end_and_only_when_asked_for(gateway: Gateway) -> None:
    data = os.urandom(3 << 20)
    digest = hashlib.sha256(data).hexdigest()
    assert gateway.output("exec", "-i", "web", "sha256sum", data=data).split()[0] == digest
    assert gateway.docker("exec", "-i", "web", "cat", data=data) == (0, data, b"")
    assert gateway.docker("exec", "web", "cat", data=b"typed") == (0, b"", b"")


def test_a_command_that_does_not_read_its_input_ends_as_it_likes(gateway: Gateway) -> None:
    code, stdout, _ = gateway.docker("exec", "-i", "web", "sh", "-c", "echo early; exit 5", data=bytes(8 << 20))
    assert (code, stdout) == (5, b"early\n")


@pytest.mark.parametrize("count", [0, 1, 65536, 64 << 20])
def test_output_of_any_size_arrives_whole(gateway: Gateway, count: int) -> None:
    code, stdout, stderr = gateway.docker("exec", "web", "head", "-c", str(count), "/dev/zero")
    assert (code, len(stdout), stdout.strip(b"\0"), stderr) == (0, count, b"", b"")


def test_environment_directory_and_user_are_set(gateway: Gateway, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    env_file = tmp_path / "env"
    env_file.write_text("# a comment\nFROM_FILE=a file's\n")
    words = ("-e", "A=1 2", "-e", "FROM_HERE", "--env-file", str(env_file), "-w", "/usr")
    script = 'echo "$A|$FROM_HERE|$FROM_FILE|$(pwd)"'
    code, stdout, stderr = gateway.docker("exec", *words, "web", "sh", "-c", script, env={"FROM_HERE": "yes"})
    assert (code, stdout, stderr) == (0, b"1 2|yes|a file's|/usr\n", b"")
    assert gateway.output("exec", "-u", "nobody", "web", "id", "-un") == "nobody\n"
    assert gateway.output("exec", "-u", "1234:4321", "web", "sh", "-c", "id -u; id -g") == "1234\n4321\n"


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["nosuch"], 127, 'exec: "nosuch": executable file not found in $PATH: unknown'),
        (["/no/such"], 127, 'exec: "/no/such": stat /no/such: no such file or directory: unknown'),
        (["/etc/passwd"], 126, 'exec: "/etc/passwd": permission denied: unknown'),
        (["/etc"], 126, 'exec: "/etc": '),
    ],
)
def test_a_command_that_cannot_start_fails_with_dockers_words_and_status(
    gateway: Gateway, words: list[str], status: int, message: str
) -> None:
    code, stdout, stderr = gateway.docker("exec", "web", *words)
    assert code == status
    said = "OCI runtime exec failed: exec failed: unable to start container process: " + message
    assert (stdout + stderr).decode().startswith(said)


def test_what_cannot_be_done_is_refused_with_a_sentence(gateway: Gateway) -> None:
    assert "no more rights than it has itself" in gateway.refused("exec", "--privileged", "web", "true")
    assert "No such container: nobody" in gateway.refused("exec", "nobody", "true")


RUNC = "OCI runtime exec failed: exec failed: unable to start container process: "


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["-w", "/no/such/dir"],
            f'{RUNC}chdir to cwd ("/no/such/dir") set in config.json failed: no such file or directory: unknown',
        ),
        (
            ["-w", "/etc/passwd"],
            f'{RUNC}chdir to cwd ("/etc/passwd") set in config.json failed: not a directory: unknown',
        ),
        (["-u", "nosuchuser"], "unable to find user nosuchuser: no matching entries in passwd file"),
        (["-u", "root:nosuchgroup"], "unable to find group nosuchgroup: no matching entries in group file"),
    ],
)
def test_a_directory_or_user_that_is_not_there_is_said_in_dockers_words(
    gateway: Gateway, words: list[str], message: str
) -> None:
    code, stdout, stderr = gateway.docker("exec", *words, "web", "true")
    assert (code, (stdout + stderr).decode().strip()) == (126, message)
    code, stdout, stderr = gateway.docker("exec", "-d", *words, "web", "true")
    assert code != 0 and message in (stdout + stderr).decode()


def test_a_container_is_found_by_its_name_its_id_and_the_beginning_of_that(gateway: Gateway) -> None:
    full = gateway.output("ps", "--no-trunc", "--quiet").strip()
    assert re.fullmatch("[0-9a-f]{64}", full)
    for reference in (full, full[:12], full[:2], "web"):
        assert gateway.output("exec", reference, "echo", "here") == "here\n"


def test_fifty_at_once_have_each_their_own_output_and_status(gateway: Gateway) -> None:
    def run(number: int) -> tuple[int, bytes, bytes]:
        script = f"read x; for i in 1 2 3; do echo {number} $x $i; echo err {number} >&2; done; exit {number}"
        return gateway.docker("exec", "-i", "web", "sh", "-c", script, data=f"in{number}\n".encode())

    with ThreadPoolExecutor(50) as executor:
        results = list(executor.map(run, range(50)))
    for number, result in enumerate(results):
        stdout = "".join(f"{number} in{number} {i}\n" for i in (1, 2, 3))
        assert result == (number, stdout.encode(), f"err {number}\n".encode() * 3)


def test_a_client_that_is_killed_leaves_nothing_running(
    gateway: Gateway, tmp_path: Path, pid_of: Callable[[str], int]
) -> None:
    script = f"sleep 1000 & echo $! > {tmp_path}/child; echo $$ > {tmp_path}/shell; wait"
    for words in (["exec"], ["exec", "-i"], ["exec", "-t"]):
        with gateway.start(*words, "web", "sh", "-c", script) as process:
            pids = [pid_of("child"), pid_of("shell")]
            process.kill()
        for pid in pids:
            wait_gone(pid)
        for name in ("child", "shell"):
            (tmp_path / name).unlink()


def test_a_client_that_is_killed_while_it_sends_or_receives_leaves_nothing_running(
    gateway: Gateway, tmp_path: Path, pid_of: Callable[[str], int]
) -> None:
    for name, command in (("in", "exec sleep 1000"), ("out", "exec yes")):
        script = f"echo $$ > {tmp_path}/{name}; {command}"
        with (
            open("/dev/zero", "rb") as zeros,
            gateway.start("exec", "-i", "web", "sh", "-c", script, stdin=zeros) as process,
        ):
            pid = pid_of(name)
            process.kill()
        wait_gone(pid)


def test_a_detached_command_runs_on_and_its_failure_to_start_is_an_error(
    gateway: Gateway, tmp_path: Path, pid_of: Callable[[str], int]
) -> None:
    assert gateway.docker("exec", "-d", "web", "sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 1000")[0] == 0
    with killed_afterwards(pid_of("pid")):
        assert is_alive(pid_of("pid"))
        assert 'exec: "nosuch": executable file not found in $PATH' in gateway.refused("exec", "-d", "web", "nosuch")


def test_a_detached_command_outlives_the_gateway(
    box: tuple[Agent, Gateway], tmp_path: Path, pid_of: Callable[[str], int]
) -> None:
    _, gateway = box
    gateway.output("exec", "-d", "box", "sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 1000")
    with killed_afterwards(pid_of("pid")):
        assert gateway.stop() == 0
        assert is_alive(pid_of("pid"))


def test_commands_that_are_attached_end_with_the_gateway(
    box: tuple[Agent, Gateway], tmp_path: Path, pid_of: Callable[[str], int]
) -> None:
    _, gateway = box
    with gateway.start("exec", "box", "sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 1000") as process:
        pid = pid_of("pid")
        assert gateway.stop() == 0
        wait_gone(pid)
        assert process.wait(DEADLINE) != 0


# ── on a terminal ─────────────────────────────────────────────────────────────


def test_a_terminal_has_the_size_of_the_persons_and_follows_it(gateway: Gateway, open_terminal: OpenTerminal) -> None:
    script = "trap 'stty size; exit 7' WINCH; stty size; tty; while sleep 0.05; do :; done"
    terminal = open_terminal(gateway, "exec", "-it", "web", "sh", "-c", script, columns=91, rows=31)
    terminal.wait_for(r"^31 91\n/dev/pts/\d+$")
    terminal.resize(70, 20)
    terminal.wait_for(r"^20 70$")
    assert terminal.wait() == 7
    terminal.assert_as_before()


def test_ctrl_c_interrupts_what_runs_and_ctrl_d_ends_the_shell(gateway: Gateway, open_terminal: OpenTerminal) -> None:
    terminal = open_terminal(gateway, "exec", "-it", "web", "sh")
    terminal.wait_for("^[#$]")
    terminal.type("echo $((6*7)); sleep 1000\n")
    terminal.wait_for("^42$")
    terminal.type("\x03")
    terminal.wait_for(r"\^C\n[#$]")  # what is typed before that is dropped with the interrupt
    terminal.type("echo status $?\n")
    terminal.wait_for("^status 130$")
    terminal.type("\x04")
    assert terminal.wait() == 0
    terminal.assert_as_before()


def test_ctrl_p_ctrl_q_detaches_and_the_command_runs_on(
    gateway: Gateway, open_terminal: OpenTerminal, tmp_path: Path, pid_of: Callable[[str], int]
) -> None:
    script = f"echo $$ > {tmp_path}/pid; echo up; while sleep 0.1; do echo x; done; exec sleep 1000"
    terminal = open_terminal(gateway, "exec", "-it", "web", "sh", "-c", script)
    terminal.wait_for("up")
    terminal.type("\x10\x11")
    terminal.wait_for("read escape sequence")
    assert terminal.wait() == 1
    terminal.assert_as_before()
    with killed_afterwards(pid_of("pid")):
        gateway.wait_for_log(f"detached from exec .*{tmp_path}")
        assert is_alive(pid_of("pid"))


def test_other_detach_keys_can_be_chosen_and_then_ctrl_p_is_a_key_like_any_other(
    gateway: Gateway, open_terminal: OpenTerminal, tmp_path: Path, pid_of: Callable[[str], int]
) -> None:
    script = f"echo $$ > {tmp_path}/pid; stty raw -echo; echo up; head -c 2 | od -An -tx1; exec sleep 1000"
    terminal = open_terminal(gateway, "exec", "-it", "--detach-keys", "ctrl-a,x", "web", "sh", "-c", script)
    terminal.wait_for("up")
    terminal.type("\x10\x11")
    terminal.wait_for(r"10 11")
    terminal.type("\x01x")
    terminal.wait_for("read escape sequence")
    terminal.wait()
    with killed_afterwards(pid_of("pid")):
        gateway.wait_for_log(f"detached from exec .*{tmp_path}")
        assert is_alive(pid_of("pid"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM])
def test_a_client_on_a_terminal_that_is_killed_leaves_nothing_running(
    gateway: Gateway,
    open_terminal: OpenTerminal,
    tmp_path: Path,
    pid_of: Callable[[str], int],
    number: signal.Signals,
) -> None:
    script = f"echo $$ > {tmp_path}/pid; echo up; exec sleep 1000"
    terminal = open_terminal(gateway, "exec", "-it", "web", "sh", "-c", script)
    terminal.wait_for("up")
    terminal.process.send_signal(number)
    wait_gone(pid_of("pid"))
    terminal.wait()


def test_a_full_screen_program_works(gateway: Gateway, open_terminal: OpenTerminal, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("first\nsecond\n")
    terminal = open_terminal(
        gateway, "exec", "-it", "-e", "TERM=vt100", "-w", str(tmp_path), "web", "vi", "-u", "NONE", "text"
    )
    terminal.wait_for("^first$")
    terminal.type("Gothird\x1b:wq\r")
    assert terminal.wait() == 0
    assert path.read_text() == "first\nsecond\nthird\n"

"""Commands on a terminal: size, keys, job control, and the end of input and output."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
from support import Agent, RawClient, Session, killed_afterwards, need, wait_gone

# A loop, since a resize may come while a trap's own stty runs.
AWAIT_SIZE = 'while [ "$(stty size)" != "$1" ]; do sleep 0.02; done; echo it is "$1"'


def on_terminal(client: RawClient, *cmd: str, **fields: object) -> str:
    """The output of a command that must succeed."""
    session = client.exec(cmd, tty=True, **fields)
    assert session.wait() == 0, session
    assert session.stderr == b""
    return session.stdout.decode()


def start_shell(client: RawClient) -> Session:
    """An interactive shell, waiting at its prompt."""
    session = client.exec(["sh", "-i"], tty=True, env=["PS1=ready> ", "ENV="])
    session.wait_for(b"ready> ")
    return session


def start_job(shell: Session) -> int:
    """Start a foreground job that sleeps; its PID."""
    shell.write(b"""sh -c 'echo "job=$$="; exec sleep 300'\n""")
    shell.wait_for(b"job=")
    # The echo of what was typed has job=$$=, the job's own line a number.
    while b"=\r\n" not in shell.stdout.rpartition(b"\njob=")[2]:
        shell.wait_for_lines(shell.stdout.count(b"\n") + 1)
    return int(shell.stdout.rpartition(b"\njob=")[2].partition(b"=")[0])


def assert_shell_lives(shell: Session) -> None:
    shell.write(b"echo alive=$((40 + 2))\n")
    shell.wait_for(b"alive=42")
    shell.write(b"exit 5\n")
    assert shell.wait() == 5


def test_the_terminal_is_the_controlling_one(client: RawClient) -> None:
    assert on_terminal(client, "sh", "-c", "echo hello >/dev/tty; tty").startswith("hello\r\n/dev/pts/")


def test_all_three_descriptors_are_the_terminal(client: RawClient) -> None:
    script = "test -t 0 && test -t 1 && test -t 2 && echo yes; echo err >&2"
    assert on_terminal(client, "sh", "-c", script) == "yes\r\nerr\r\n"


def test_without_a_terminal_there_is_none(client: RawClient) -> None:
    script = 'test -t 0 || test -t 1 || test -t 2 || echo none; (: >/dev/tty) 2>/dev/null || echo "TERM=$TERM"'
    assert client.output("sh", "-c", script) == "none\nTERM=\n"


def test_it_starts_with_80_columns_and_24_rows(client: RawClient) -> None:
    assert on_terminal(client, "stty", "size") == "24 80\r\n"


def test_term_is_xterm_unless_given(client: RawClient) -> None:
    assert on_terminal(client, "sh", "-c", "echo $TERM") == "xterm\r\n"
    assert on_terminal(client, "sh", "-c", "echo $TERM", env=["TERM=vt100"]) == "vt100\r\n"


def test_term_of_the_image_is_kept(start_agent: Callable[..., Agent], connect: Callable[..., RawClient]) -> None:
    client = connect(start_agent(env={"TERM": "screen"}))
    assert on_terminal(client, "sh", "-c", "echo $TERM") == "screen\r\n"


def test_a_resize_right_behind_the_exec_is_applied(client: RawClient) -> None:
    for _ in range(10):
        session, request = client.request(["sh", "-c", AWAIT_SIZE, "sh", "40 100"], tty=True)
        client.send_together(request, {"type": "resize", "id": session.id, "width": 100, "height": 40})
        assert session.wait() == 0
        assert session.stdout == b"it is 40 100\r\n"


def test_a_resize_is_seen_as_sigwinch(client: RawClient) -> None:
    script = "trap 'stty size; exit 7' WINCH; echo up; while :; do sleep 0.02; done"
    session = client.exec(["sh", "-c", script], tty=True)
    session.wait_for(b"up\r\n")
    session.send("resize", width=132, height=50)
    assert session.wait() == 7
    assert session.stdout == b"up\r\n50 132\r\n"


@pytest.mark.parametrize(("width", "height"), [(0, 24), (80, 0), (-1, 24), (70000, 24), ("80", 24), (80.5, 24)])
def test_a_size_that_makes_no_sense_is_an_error_and_changes_nothing(
    client: RawClient, width: object, height: object
) -> None:
    session = client.exec(["sh", "-c", "read x; stty size"], tty=True)
    session.send("resize", width=width, height=height)
    session.wait_error()
    session.errors.clear()
    session.write(b"\n")
    assert session.wait() == 0
    assert session.stdout.endswith(b"24 80\r\n")


def test_a_resize_after_the_end_is_harmless(client: RawClient) -> None:
    session = client.exec(["true"], tty=True)
    assert session.wait() == 0
    session.send("resize", width=100, height=40)
    client.assert_quiet()


def test_a_resize_without_a_terminal_is_harmless(client: RawClient) -> None:
    session = client.exec(["cat"])
    session.send("resize", width=100, height=40)
    session.write(b"alive")
    session.close_stdin()
    assert session.wait() == 0
    client.assert_quiet()


def test_ctrl_c_ends_the_foreground_job_and_not_the_shell(client: RawClient) -> None:
    shell = start_shell(client)
    job = start_job(shell)
    shell.write(b"\x03")
    wait_gone(job)
    assert_shell_lives(shell)


@pytest.mark.parametrize("name", ["INT", "QUIT", "USR1"])
def test_a_signal_goes_to_the_foreground_job_and_not_the_shell(client: RawClient, name: str) -> None:
    shell = start_shell(client)
    job = start_job(shell)
    shell.signal(name)
    wait_gone(job)
    assert_shell_lives(shell)


@pytest.mark.parametrize(("name", "code"), [("HUP", 129), ("KILL", 137)])
def test_a_signal_that_no_key_sends_ends_the_job_and_the_shell(client: RawClient, name: str, code: int) -> None:
    shell = start_shell(client)
    job = start_job(shell)
    shell.signal(name)
    assert shell.wait() == code
    wait_gone(job)


def test_job_control_works(client: RawClient) -> None:
    shell = start_shell(client)
    job = start_job(shell)
    shell.write(b"\x1a")
    shell.wait_for(b"Stopped")
    shell.write(b"bg\n")
    shell.write(b"kill %1; wait; echo gone=$((40 + 1))\n")
    shell.wait_for(b"gone=41")
    wait_gone(job)
    assert_shell_lives(shell)


@pytest.mark.parametrize("text", [b"", b"line\n", b"one\ntwo\n", b"partial", b"line\npartial"])
def test_close_stdin_is_the_end_of_input(client: RawClient, text: bytes) -> None:
    session = client.exec(["sh", "-c", 'x=$(cat; echo .); printf "<%s>" "$x"'], tty=True)
    if text:
        session.write(text)
    session.close_stdin()
    assert session.wait() == 0
    assert session.stdout.endswith(b"<%s.>" % text.replace(b"\n", b"\r\n")), session


def test_the_end_of_input_right_behind_the_exec_is_not_lost(client: RawClient) -> None:
    for _ in range(20):
        session, request = client.request(["cat"], tty=True)
        client.send_together(
            request,
            {"type": "stdin", "id": session.id, "data": "bGluZQo="},
            {"type": "close_stdin", "id": session.id},
        )
        assert session.wait() == 0
        # The line, its echo, or both: a terminal echoes what is typed before the command reads, too.
        assert b"line\r\n" in session.stdout


def test_output_goes_on_after_the_end_of_input(client: RawClient) -> None:
    session = client.exec(["sh", "-c", "stty -echo; cat; seq 1 5000"], tty=True)
    session.close_stdin()
    assert session.wait() == 0
    assert session.stdout.endswith(b"4999\r\n5000\r\n")
    assert session.stdout.count(b"\n") == 5000


def test_the_last_bytes_before_the_exit_arrive(client: RawClient) -> None:
    expected = b"".join(b"%d\r\n" % number for number in range(1, 2001))
    for number in range(40):
        session = client.exec(["sh", "-c", f"seq 1 2000; printf last; exit {number}"], tty=True)
        assert session.wait() == number
        assert session.stdout == expected + b"last"


def test_a_flood_on_a_terminal_is_whole(client: RawClient) -> None:
    session = client.exec(["sh", "-c", "stty -opost; seq 1 500000"], tty=True)
    assert session.wait() == 0
    assert session.stdout == b"".join(b"%d\n" % number for number in range(1, 500001))


def test_a_megabyte_typed_into_a_raw_terminal_arrives(client: RawClient) -> None:
    data = bytes(range(256)) * 4096
    session = client.exec(["sh", "-c", "stty raw -echo; echo ready; head -c 1048576 | sha256sum"], tty=True)
    session.wait_for(b"ready\n")
    session.write(data)
    assert session.wait() == 0
    assert hashlib.sha256(data).hexdigest().encode() in session.stdout


def test_a_background_child_on_the_terminal_does_not_hold_the_session(client: RawClient) -> None:
    session = client.exec(["sh", "-c", "trap '' HUP; sleep 300 & echo $!; exit 3"], tty=True)
    assert session.wait() == 3
    with killed_afterwards(int(session.stdout)):
        client.assert_quiet()


def test_full_screen_programs_draw(client: RawClient) -> None:
    need("vi")
    session = client.exec(["vi", "-u", "NONE"], tty=True)
    session.wait_for(b"~")
    session.write(b"ihello\x1b:q!\r")
    assert session.wait() == 0


def test_several_terminals_at_once_stay_apart(client: RawClient) -> None:
    sessions = [client.exec(["sh", "-c", f"read x; echo {n} $x; seq 1 3000"], tty=True) for n in range(50)]
    for session in sessions:
        session.write(b"go\n")
    for number, session in enumerate(sessions):
        assert session.wait() == 0
        assert session.stdout.startswith(b"go\r\n%d go\r\n1\r\n" % number)
        assert session.stdout.endswith(b"2999\r\n3000\r\n")


def test_a_command_that_cannot_start_on_a_terminal_is_named(client: RawClient) -> None:
    _, _, last = client.run(["no-such-command"], tty=True)
    assert last["type"] == "error"
    assert "no-such-command" in last["message"]
    _, _, last = client.run(["true"], tty=True, workdir="/no/such/directory")
    assert last["type"] == "error"
    assert "/no/such/directory" in last["message"]

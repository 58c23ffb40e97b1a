"""Commands on pipes: how they start, what they inherit, what they read and write, how they end."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from support import Agent, RawClient

# Exit codes.


@pytest.mark.parametrize("code", [0, 1, 2, 42, 127, 128, 255])
def test_the_exit_code_is_the_commands_own(client: RawClient, code: int) -> None:
    assert client.run(["sh", "-c", f"exit {code}"])[2]["code"] == code


def test_the_code_is_a_json_integer_even_when_it_is_0(client: RawClient) -> None:
    client.send({"type": "exec", "id": "zero", "cmd": ["true"]})
    text = client.ws.recv()
    assert json.loads(text) == {"type": "exit", "id": "zero", "code": 0}
    assert "0.0" not in str(text)


@pytest.mark.parametrize("number", [1, 2, 3, 6, 9, 11, 13, 15, 31, 34, 64])
def test_a_signal_is_128_plus_its_number(client: RawClient, number: int) -> None:
    assert client.run(["sh", "-c", f"kill -{number} $$"])[2]["code"] == 128 + number


# Commands that cannot start.


def test_a_command_that_is_not_found_is_named(client: RawClient) -> None:
    _, _, last = client.run(["no-such-command", "argument"])
    assert last["type"] == "error"
    assert "no-such-command" in last["message"]
    assert "not found" in last["message"]
    client.assert_quiet()


def test_a_path_that_is_not_found_is_named(client: RawClient, tmp_path: Path) -> None:
    _, _, last = client.run([f"{tmp_path}/nothing"])
    assert last["type"] == "error"
    assert f"{tmp_path}/nothing" in last["message"]
    assert "not found" in last["message"]


def test_a_script_without_its_interpreter_is_not_found(client: RawClient, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    _, _, last = client.run([str(script)])
    assert last["type"] == "error"
    assert str(script) in last["message"]
    assert "not found" in last["message"]
    assert "interpreter" in last["message"]


def make_plain_file(path: Path) -> Path:
    path.write_text("echo never\n")
    path.chmod(0o644)
    return path


def make_text_file(path: Path) -> Path:
    path.write_text("no program and no script\n")
    path.chmod(0o755)
    return path


def make_directory(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize("make", [make_plain_file, make_text_file, make_directory])
def test_what_is_not_executable_is_named(client: RawClient, tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path / "thing")
    _, _, last = client.run([str(path)])
    assert last["type"] == "error"
    assert str(path) in last["message"]
    assert "not executable" in last["message"]
    client.assert_quiet()


def test_a_file_in_the_path_that_is_not_executable_is_named(client: RawClient, tmp_path: Path) -> None:
    make_plain_file(tmp_path / "thing")
    _, _, last = client.run(["thing"], env=[f"PATH={tmp_path}"])
    assert last["type"] == "error"
    assert last["message"].startswith("thing")
    assert "not executable" in last["message"]


def test_an_argument_that_the_kernel_refuses_is_an_error(client: RawClient) -> None:
    _, _, last = client.run(["echo", "x" * (1 << 20)])
    assert last["type"] == "error"
    assert "echo" in last["message"]
    client.assert_quiet()


# What a command inherits.


def test_a_command_runs_in_its_working_directory(client: RawClient, tmp_path: Path) -> None:
    assert client.output("pwd", workdir=str(tmp_path)) == f"{tmp_path}\n"


def test_a_relative_command_is_looked_up_in_the_working_directory(client: RawClient, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\necho here\n")
    script.chmod(0o755)
    assert client.output("./script", workdir=str(tmp_path)) == "here\n"


def test_a_missing_working_directory_is_named(client: RawClient, tmp_path: Path) -> None:
    _, _, last = client.run(["pwd"], workdir=f"{tmp_path}/missing")
    assert last["type"] == "error"
    assert f"{tmp_path}/missing" in last["message"]
    assert "directory" in last["message"]
    assert "not found" not in last["message"], "a client would take it for a missing command"
    client.assert_quiet()


def test_a_working_directory_that_is_a_file_is_named(client: RawClient, tmp_path: Path) -> None:
    path = make_plain_file(tmp_path / "file")
    _, _, last = client.run(["pwd"], workdir=str(path))
    assert last["type"] == "error"
    assert str(path) in last["message"]
    assert "not a directory" in last["message"]


def test_the_requests_environment_wins_over_the_agents(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    client = connect(start_agent(env={"COLOUR": "red", "SHAPE": "round"}))
    env = ["COLOUR=blue", "EMPTY=", "EQUATION=a=b", "TWICE=1", "TWICE=2", "UMLAUT=ä"]
    lines = client.output("env", env=env).splitlines()
    for line in ("COLOUR=blue", "SHAPE=round", "EMPTY=", "EQUATION=a=b", "TWICE=2", "UMLAUT=ä"):
        assert line in lines
    names = [line.partition("=")[0] for line in lines]
    assert len(names) == len(set(names)), "a variable is there twice"


def test_a_command_is_looked_up_in_the_requests_path(client: RawClient, tmp_path: Path) -> None:
    tool = tmp_path / "my-tool"
    tool.write_text("#!/bin/sh\necho found\n")
    tool.chmod(0o755)
    assert client.output("my-tool", env=[f"PATH={tmp_path}:/usr/bin:/bin"]) == "found\n"
    assert client.run(["sh", "-c", "true"], env=[f"PATH={tmp_path}"])[2]["type"] == "error"


def test_the_token_and_the_callback_url_are_in_no_child_and_no_listing(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    # The URL would start reverse mode if it were not empty for the flag: a stale variable must still not leak.
    token = "a-token-of-this-test-alone"  # another test's process may show its own
    agent = start_agent("--keep-alive", "--", "sh", "-c", "env; echo complete", token=token)
    client = connect(agent)
    child = client.output("sh", "-c", "env; cat /proc/self/environ")
    assert "PATH=" in child
    assert token not in child
    assert "SOCKERLESS_AGENT_TOKEN" not in child
    main = client.attach()
    assert main.wait() == 0
    assert main.stdout.endswith(b"complete\n")
    assert token.encode() not in main.stdout
    for name in ("environ", "cmdline"):
        text = Path(f"/proc/{agent.pid}/{name}").read_bytes()
        assert text
        assert token.encode() not in text
    # The same to whoever looks from inside.
    seen = client.output("sh", "-c", f"cat /proc/{agent.pid}/environ /proc/{agent.pid}/cmdline; ps axeww")
    assert "PATH=" in seen
    assert token not in seen


def test_the_token_of_a_file_is_in_no_child(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient], tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("token-of-a-file\n")
    agent = start_agent("--token-file", str(tmp_path / "token"), token="")
    client = connect(agent, token="token-of-a-file")
    assert "token-of-a-file" not in client.output("env")


DESCRIPTORS = ["sh", "-c", "ls /proc/$$/fd"]


@pytest.mark.parametrize("tty", [False, True])
def test_a_command_inherits_no_descriptor_beyond_the_three(client: RawClient, tty: bool) -> None:
    # dash keeps a duplicate of a terminal for job control, but only when interactive.
    assert client.output(*DESCRIPTORS, tty=tty).split() == ["0", "1", "2"]


def test_commands_that_start_at_once_inherit_nothing_of_each_other(agent: Agent, client: RawClient) -> None:
    sessions = [client.exec(DESCRIPTORS, tty=number % 4 == 0) for number in range(100)]
    for session in sessions:
        assert session.wait() == 0
        assert session.stdout.split() == [b"0", b"1", b"2"]


@pytest.mark.parametrize("redirection", ["<&-", ">&-", "2>&1 <&- >&-"])
def test_an_agent_without_standard_descriptors_gives_a_command_the_right_ones(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient], redirection: str
) -> None:
    # The log goes to a stderr that is a duplicate of stdout in the last case: keep it readable.
    if "2>&1" in redirection:
        redirection = "<&- >&-"
    agent = start_agent(prefix=("sh", "-c", f'"$@" {redirection} & trap "" TERM; wait $!; exit $?', "sh"))
    client = connect(agent)
    stdout, stderr, last = client.run(["sh", "-c", "cat; echo err >&2; ls /proc/$$/fd"], stdin=b"in\n")
    assert (stdout, stderr, last["code"]) == (b"in\n0\n1\n2\n", b"err\n", 0)


STATUS = ["grep", "-E", "^Sig(Blk|Ign|Pnd)", "/proc/self/status"]
CLEAR = [f"Sig{name}:\t0000000000000000" for name in ("Pnd", "Blk", "Ign")]


@pytest.mark.parametrize("tty", [False, True])
def test_a_command_has_no_blocked_and_no_ignored_signal(client: RawClient, tty: bool) -> None:
    assert client.output(*STATUS, tty=tty).splitlines() == CLEAR


def test_signals_that_the_agent_inherits_ignored_are_not_ignored_in_a_command(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    prefix = ("sh", "-c", 'trap "" HUP INT QUIT USR1 PIPE CHLD TSTP TTOU; "$@" & wait $!; exit $?', "sh")
    client = connect(start_agent(prefix=prefix))
    assert client.output(*STATUS).splitlines() == CLEAR
    assert client.run(["sh", "-c", "kill -HUP $$"])[2]["code"] == 129


def test_each_command_leads_its_own_session(client: RawClient) -> None:
    fields = client.output("sh", "-c", "cat /proc/$$/stat").rpartition(")")[2].split()
    pid = int(client.output("sh", "-c", "exec sh -c 'echo $$'"))
    assert pid > 0
    group, session = int(fields[2]), int(fields[3])
    assert group == session
    # The shell that printed it was the leader.
    assert client.output("sh", "-c", "set -- $(cat /proc/$$/stat); test $5 = $$ && test $6 = $$ && echo leader") == (
        "leader\n"
    )


# Output.


def test_two_million_lines_arrive_in_order_and_before_the_exit(client: RawClient) -> None:
    stdout, stderr, last = client.run(["seq", "1", "2000000"])
    assert (stderr, last["code"]) == (b"", 0)
    assert hashlib.sha256(stdout).digest() == hashlib.sha256(b"".join(b"%d\n" % n for n in range(1, 2000001))).digest()


def test_stdout_and_stderr_are_whole_before_the_exit(client: RawClient) -> None:
    script = 'seq 1 "$1"; seq 1 "$1" >&2; exit 3'
    for size in [1, 10, 100, 1000, 20000] * 6:
        stdout, stderr, last = client.run(["sh", "-c", script, "sh", str(size)])
        expected = b"".join(b"%d\n" % number for number in range(1, size + 1))
        assert stdout == expected
        assert stderr == expected
        assert last["code"] == 3
    client.assert_quiet()


def test_stdout_and_stderr_at_once_stay_apart(client: RawClient) -> None:
    stdout, stderr, last = client.run(["sh", "-c", "yes out | head -c 4000000 & yes err | head -c 4000000 >&2; wait"])
    assert last["code"] == 0
    assert stdout == b"out\n" * 1000000
    assert stderr == b"err\n" * 1000000


def test_binary_data_arrive_as_they_are(client: RawClient) -> None:
    data = bytes(range(256)) * 1000 + random.Random(1).randbytes(100001)
    stdout, stderr, last = client.run(["sh", "-c", "tee /dev/stderr"], stdin=data)
    assert last["code"] == 0
    assert stdout == data
    assert stderr == data


def test_a_command_that_closes_its_output_goes_on(client: RawClient) -> None:
    stdout, _, last = client.run(["sh", "-c", "echo before; exec >&- 2>&-; sleep 0.2; exit 4"])
    assert (stdout, last["code"]) == (b"before\n", 4)


def test_an_output_is_sent_while_the_command_goes_on(client: RawClient) -> None:
    session = client.exec(["sh", "-c", "printf prompt; read answer; echo $answer"])
    session.wait_for(b"prompt")
    session.write(b"yes\n")
    assert session.wait() == 0
    assert session.stdout == b"promptyes\n"


def test_output_that_waits_is_sent_in_few_large_messages(client: RawClient) -> None:
    # A deployed Go backend buffers 64 messages a session and drops the rest.
    session = client.exec(["head", "-c", "16777216", "/dev/zero"])
    assert session.wait() == 0
    assert len(session.stdout) == 16 << 20
    assert max(len(data) for _, data in session.output) >= 256 << 10


# Arguments and stdin.


def test_a_large_single_argument_arrives(client: RawClient) -> None:
    argument = "x" * 131071  # MAX_ARG_STRLEN without the NUL, execve(2)
    assert client.output("sh", "-c", 'printf %s "$1" | wc -c', "sh", argument).strip() == "131071"


def test_arguments_arrive_as_they_are(client: RawClient) -> None:
    arguments = ["", " ", "a b", "'\"", "$HOME", "*", "ä€𝄞", "line\nbreak", "-n", "\\"]
    printed = client.output("sh", "-c", 'for x; do printf "%s|" "$x"; done', "sh", *arguments)
    assert printed == "".join(f"{argument}|" for argument in arguments)


def test_stdin_in_the_same_packet_right_behind_the_exec_arrives(client: RawClient) -> None:
    for number in range(100):
        session, request = client.request(["cat"])
        client.send_together(
            request,
            {"type": "stdin", "id": session.id, "data": "Zmlyc3Qg"},
            {"type": "stdin", "id": session.id, "data": "c2Vjb25k"},
            {"type": "close_stdin", "id": session.id},
        )
        assert session.wait() == 0, number
        assert session.stdout == b"first second", number


def test_output_goes_on_after_stdin_was_closed(client: RawClient) -> None:
    session = client.exec(["sh", "-c", "cat; echo end of input; sleep 0.3; seq 1 100000"])
    session.write(b"input\n")
    session.close_stdin()
    assert session.wait() == 0
    assert session.stdout == b"input\nend of input\n" + b"".join(b"%d\n" % number for number in range(1, 100001))


def test_a_command_without_stdin_waits_for_it(client: RawClient) -> None:
    session = client.exec(["sh", "-c", "echo up; read line; echo got $line"])
    session.wait_for(b"up\n")
    client.assert_quiet()
    assert session.exit is None
    session.write(b"it\n")
    assert session.wait() == 0
    assert session.stdout == b"up\ngot it\n"


def test_empty_stdin_is_no_end_of_input(client: RawClient) -> None:
    session = client.exec(["cat"])
    session.write(b"")
    session.write(b"more")
    session.wait_for(b"more")
    session.close_stdin()
    assert session.wait() == 0


def test_stdin_that_nobody_reads_is_harmless(client: RawClient) -> None:
    stdout, _, last = client.run(["sh", "-c", "exec <&-; sleep 0.2; echo fine"], stdin=bytes(1 << 20))
    assert (stdout, last["code"]) == (b"fine\n", 0)


def test_64_mib_of_stdin_arrive_whole(client: RawClient) -> None:
    block = os.urandom(1 << 20)
    expected = hashlib.sha256()
    session = client.exec(["sha256sum"])
    for number in range(64):
        data = number.to_bytes(4, "big") + block[4:]
        expected.update(data)
        session.write(data)
    session.close_stdin()
    assert session.wait() == 0
    assert session.stdout.split()[0].decode() == expected.hexdigest()


def test_a_message_of_8_mib_arrives_fragmented_or_not(client: RawClient) -> None:
    text = "A" * (8 << 20)  # base64 of zeros
    for parts in (1, 37):
        session = client.exec(["sha256sum"])
        message = json.dumps({"type": "stdin", "id": session.id, "data": text})
        size = -(-len(message) // parts)
        client.ws.send(message[at : at + size] for at in range(0, len(message), size))
        session.close_stdin()
        assert session.wait() == 0
        assert session.stdout.split()[0].decode() == hashlib.sha256(bytes(6 << 20)).hexdigest()


def test_the_environment_is_the_images_and_nothing_is_added_but_the_mark(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    # Where the locale is C, Python would set LC_CTYPE for itself, and so for every command.
    agent = start_agent(prefix=("env", "-i", "PATH=/usr/bin:/bin", "A=b"), token="")
    names = [line.partition("=")[0] for line in connect(agent, token="").output("env").splitlines()]
    assert sorted(names) == ["A", "PATH", "SOCKERLESS_AGENT_SESSION"]
    agent = start_agent(prefix=("env", "-i", "PATH=/usr/bin:/bin", "LC_CTYPE=C.UTF-8"), token="")
    assert "LC_CTYPE=C.UTF-8\n" in connect(agent, token="").output("env")

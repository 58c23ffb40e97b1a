"""Sessions beside each other: their ids, their signals, their limits, and what is left of them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import pytest
from support import DEADLINE, Agent, RawClient, children_of, eventually, killed_afterwards, need, wait_gone

LATE = (
    {"type": "stdin", "data": "bGF0ZQ=="},
    {"type": "close_stdin"},
    {"type": "resize", "width": 100, "height": 40},
    {"type": "signal", "signal": "SIGTERM"},
)


# Ids.


def test_an_id_belongs_to_its_connection(agent: Agent, connect: Callable[..., RawClient]) -> None:
    first, second = connect(agent), connect(agent)
    mine = first.exec(["cat"], id="same")
    second.send({"type": "stdin", "id": "same", "data": "Zm9yZWlnbg=="})
    assert "same" in second.wait_error()
    second.send({"type": "signal", "id": "same", "signal": "KILL"})
    assert "same" in second.wait_error()
    theirs = second.exec(["cat"], id="same")
    theirs.write(b"theirs")
    mine.write(b"mine")
    mine.close_stdin()
    theirs.close_stdin()
    assert (mine.wait(), theirs.wait()) == (0, 0)
    assert (mine.stdout, theirs.stdout) == (b"mine", b"theirs")


def test_a_duplicate_id_is_an_error_and_leaves_the_first_alone(client: RawClient) -> None:
    session = client.exec(["cat"], id="taken")
    session.write(b"one ")
    session.wait_for(b"one ")
    client.send({"type": "exec", "id": "taken", "cmd": ["echo", "intruder"]})
    assert "taken" in session.wait_error()
    session.errors.clear()
    session.write(b"two")
    session.close_stdin()
    assert session.wait() == 0
    assert session.stdout == b"one two"
    client.assert_quiet()


def test_an_id_is_free_again_once_its_exit_is_sent(client: RawClient) -> None:
    for number in range(200):
        stdout, _, last = client.run(["sh", "-c", f"echo {number}; exit {number % 7}"], id="top-container")
        assert (stdout, last["code"]) == (b"%d\n" % number, number % 7)


def test_an_id_is_free_again_after_an_error(client: RawClient) -> None:
    assert client.run(["no-such-command"], id="again")[2]["type"] == "error"
    assert client.run(["true"], id="again")[2]["type"] == "exit"


@pytest.mark.parametrize("tty", [False, True])
def test_what_is_late_for_an_ended_session_is_ignored(client: RawClient, tty: bool) -> None:
    client.run(["true"], id="gone", tty=tty)
    client.run(["no-such-command"], id="never", tty=tty)
    for message in LATE:
        client.send({**message, "id": "gone"})
        client.send({**message, "id": "never"})
    client.assert_quiet()


@pytest.mark.parametrize("message", LATE, ids=lambda message: str(message["type"]))
def test_an_id_that_never_was_is_an_error(client: RawClient, message: dict[str, object]) -> None:
    client.send({**message, "id": "unheard-of"})
    event = client.receive()
    assert (event["type"], event["id"]) == ("error", "unheard-of")
    assert "unheard-of" in event["message"]
    client.assert_quiet()


def test_ids_may_be_any_text(client: RawClient) -> None:
    for session_id in (" ", "a/b", '"quoted"', "ä€𝄞", "x" * 1000, "\\", "line\nbreak"):
        stdout, _, last = client.run(["cat"], stdin=b"text", id=session_id)
        assert (stdout, last["code"]) == (b"text", 0)


# Background children and the end of a session.


def test_a_background_child_that_holds_the_pipe_does_not_hold_the_session(client: RawClient) -> None:
    stdout, _, last = client.run(["sh", "-c", "sleep 300 & echo $!; exit 3"])
    with killed_afterwards(int(stdout)):
        assert last["code"] == 3


def test_a_background_child_that_keeps_writing_is_heard_until_it_is_quiet(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    # It closes the pipe before the drain time is over, which the test so never waits for.
    client = connect(start_agent("--drain-timeout", "5m"))
    stdout, _, last = client.run(["sh", "-c", "(for i in 1 2 3; do sleep 0.2; echo late $i; done) & echo now"])
    assert (stdout, last["code"]) == (b"now\nlate 1\nlate 2\nlate 3\n", 0)


SLEEPER = "sh -c 'echo $$; exec sleep 300'"
SILENT = "sh -c 'echo $$; exec sleep 300 <&- >/dev/null 2>&1'"
STUBBORN = """sh -c 'trap "" HUP INT TERM; echo $$; while :; do sleep 1; done'"""
TREES = {
    "the command itself": ["exec " + SLEEPER],
    "a background child": [SLEEPER + " &", "wait"],
    "a child that called setsid": [f"setsid {SLEEPER} &", "wait"],
    "setsid -f": [f"setsid -f {SLEEPER}", "sleep 300"],
    "a double fork with redirected output": [f"(setsid {SILENT} &)", f"(setsid -f {SILENT} &)", "sleep 300"],
    "a daemon of a child that has gone": [f"(setsid -f setsid -f {SILENT}; exit) &", "wait; sleep 300"],
    "children that ignore SIGHUP": [STUBBORN + " &", f"setsid {STUBBORN} &", "trap '' HUP TERM", STUBBORN],
    "a stopped child": ["sh -c 'echo $$; kill -STOP $$; sleep 300' &", "wait"],
    "nohup": [f"nohup {SLEEPER} 2>/dev/null | cat &", "sleep 300"],
}
PIDS = {"a double fork with redirected output": 2, "children that ignore SIGHUP": 3}


@pytest.mark.parametrize("way", ["closed", "cut"])
@pytest.mark.parametrize("tty", [False, True], ids=["pipes", "terminal"])
@pytest.mark.parametrize("tree", TREES)
def test_a_connection_that_ends_takes_with_it(
    agent: Agent, connect: Callable[..., RawClient], tree: str, tty: bool, way: str
) -> None:
    need("setsid", "nohup")
    client = connect(agent)
    session = client.exec(["sh", "-c", "\n".join(TREES[tree])], tty=tty)
    pids = [int(line) for line in session.wait_for_lines(PIDS.get(tree, 1))]
    client.close() if way == "closed" else client.cut()
    for pid in pids:
        wait_gone(pid)


def test_a_connection_that_ends_during_the_start_takes_the_command_with_it(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    agent = start_agent()
    for number in range(20):
        client = connect(agent)
        _, request = client.request(["sleep", "300"], tty=number % 4 < 2)
        client.send_together(request)
        client.cut() if number % 2 else client.close()
    eventually(lambda: agent.log.count("sessions were running") == 20, "the end of 20 connections")
    eventually(lambda: not children_of(agent.pid), "the end of all commands")


def test_another_connections_sessions_go_on(agent: Agent, connect: Callable[..., RawClient]) -> None:
    first, second = connect(agent), connect(agent)
    ended = first.exec(["sh", "-c", "echo $$; exec sleep 300"])
    survivor = second.exec(["cat"])
    (pid,) = ended.wait_for_lines(1)
    first.cut()
    wait_gone(int(pid))
    survivor.write(b"alive")
    survivor.close_stdin()
    assert survivor.wait() == 0
    assert survivor.stdout == b"alive"


# Signals.


@pytest.mark.parametrize(
    ("spelling", "number"),
    [
        ("SIGTERM", 15),
        ("TERM", 15),
        ("term", 15),
        ("sigterm", 15),
        ("SigTerm", 15),
        ("15", 15),
        ("SIGKILL", 9),
        ("kill", 9),
        ("9", 9),
        ("HUP", 1),
        ("int", 2),
        ("SIGUSR1", 10),
        ("usr2", 12),
        ("SIGPOLL", 29),
        ("SIGIO", 29),
        ("SIGRTMIN", int(signal.SIGRTMIN)),
        ("RTMIN+3", int(signal.SIGRTMIN) + 3),
        ("rtmax-1", int(signal.SIGRTMAX) - 1),
    ],
)
def test_a_signal_may_be_spelt(client: RawClient, spelling: str, number: int) -> None:
    session = client.exec(["sh", "-c", "echo up; exec sleep 300"])
    session.wait_for(b"up")
    session.signal(spelling)
    assert session.wait() == 128 + number


@pytest.mark.parametrize("name", ["SIGNONSENSE", "0x9", "-9", "99", "SIG", "TERM KILL"])
def test_a_signal_that_does_not_exist_is_an_error_and_the_command_goes_on(client: RawClient, name: str) -> None:
    session = client.exec(["cat"])
    session.signal(name)
    assert name in session.wait_error()
    session.errors.clear()
    session.write(b"alive")
    session.close_stdin()
    assert session.wait() == 0
    assert session.stdout == b"alive"


def test_a_signal_right_behind_the_exec_is_not_lost(client: RawClient) -> None:
    for _ in range(20):
        session, request = client.request(["sleep", "300"])
        client.send_together(request, {"type": "signal", "id": session.id, "signal": "TERM"})
        assert session.wait() == 143


def test_a_signal_reaches_the_whole_group(client: RawClient) -> None:
    session = client.exec(["sh", "-c", "sleep 300 & echo $!; sleep 300 & echo $!; echo $$; wait"])
    pids = [int(line) for line in session.wait_for_lines(3)]
    session.signal("SIGTERM")
    assert session.wait() == 143
    for pid in pids:
        wait_gone(pid)


def test_a_signal_can_be_handled(client: RawClient) -> None:
    session = client.exec(["sh", "-c", "trap 'echo caught; exit 6' USR1; echo up; while :; do sleep 0.02; done"])
    session.wait_for(b"up")
    session.signal("USR1")
    assert session.wait() == 6
    assert session.stdout == b"up\ncaught\n"


# Numbers.


def test_a_connection_has_a_limit_of_sessions(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    agent = start_agent("--max-sessions", "3", "--max-total-sessions", "4")
    first, second = connect(agent), connect(agent)
    running = [first.exec(["cat"]) for _ in range(3)]
    refused = first.exec(["cat"])
    assert "limit is 3" in refused.wait_error()
    running.append(second.exec(["cat"]))
    running[-1].write(b"up")
    running[-1].wait_for(b"up")
    refused = second.exec(["cat"])
    assert "limit is 4" in refused.wait_error()
    # A place is free again once a session has ended, or could not start.
    running[0].close_stdin()
    assert running.pop(0).wait() == 0
    for _ in range(10):
        assert first.run(["no-such-command"])[2]["type"] == "error"
        assert first.run(["true"])[2]["type"] == "exit"
    for session in running:
        session.close_stdin()
        assert session.wait() == 0


def test_a_closed_connection_gives_its_places_back(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    agent = start_agent("--max-total-sessions", "2")
    for _ in range(5):
        client = connect(agent)
        sessions = [client.exec(["sh", "-c", "echo $$; exec sleep 300"]) for _ in range(2)]
        pids = [int(session.wait_for_lines(1)[0]) for session in sessions]
        client.cut()
        for pid in pids:
            wait_gone(pid)
        other = connect(agent)
        # The place is given back when the agent has seen the end, which is soon after the process's.
        while other.run(["true"])[2]["type"] == "error":
            pass
        other.close()


def test_300_commands_run_at_once_on_one_connection(client: RawClient) -> None:
    sessions = [client.exec(["sh", "-c", f"echo up; read line; echo $line {n}; exit {n % 100}"]) for n in range(300)]
    for session in sessions:
        session.wait_for(b"up\n")
    for session in reversed(sessions):
        session.write(b"go\n")
    for number, session in enumerate(sessions):
        assert session.wait() == number % 100
        assert session.stdout == b"up\ngo %d\n" % number


def test_20_connections_work_at_once(agent: Agent, connect: Callable[..., RawClient]) -> None:
    barrier = threading.Barrier(20)
    results: dict[int, list[tuple[bytes, int]]] = {}

    def work(number: int, client: RawClient) -> None:
        barrier.wait(DEADLINE)
        done = []
        for turn in range(10):
            stdout, _, last = client.run(["sh", "-c", f"cat; exit {number}"], stdin=b"%d" % turn, id="same")
            done.append((stdout, last["code"]))
        results[number] = done

    threads = [threading.Thread(target=work, args=(number, connect(agent))) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert results == {number: [(b"%d" % turn, number) for turn in range(10)] for number in range(20)}

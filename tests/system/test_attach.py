"""Attaching to the main process: replay, live output, input, and clients that are slow."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable

import pytest
from support import DEADLINE, Agent, RawClient, eventually

# Answers each line of stdin, on stdout and stderr in turn.
TALKER = (
    'echo ready; while read -r x; do case $x in err*) echo "$x" >&2;; end) exit 9;; *) echo "$x";; esac; done; exit 4'
)


@pytest.fixture
def talker(start_agent: Callable[..., Agent]) -> Agent:
    return start_agent("--keep-alive", "--", "sh", "-c", TALKER)


def test_it_replays_and_goes_on_live(talker: Agent, connect: Callable[..., RawClient]) -> None:
    first = connect(talker).attach()
    first.wait_for(b"ready\n")
    first.write(b"one\n")
    first.wait_for(b"one\n")
    late = connect(talker).attach()
    late.wait_for(b"ready\none\n")
    late.write(b"two\n")
    for session in (first, late):
        session.wait_for(b"ready\none\ntwo\n")


def test_the_replay_keeps_the_true_order_of_stdout_and_stderr(talker: Agent, connect: Callable[..., RawClient]) -> None:
    live = connect(talker).attach()
    live.wait_for(b"ready\n")
    expected = [("stdout", b"ready\n")]
    for number in range(100):
        stream = "stdout" if number % 3 else "stderr"
        line = b"%s %d\n" % (b"out" if stream == "stdout" else b"err", number)
        live.write(line)
        live.wait_for(line, stream)  # so the order is no accident of two pipes
        expected.append((stream, line))

    def joined(output: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        result: list[tuple[str, bytes]] = []
        for stream, data in output:
            for line in data.splitlines(keepends=True):
                result.append((stream, line))
        return result

    late = connect(talker).attach()
    late.wait_for(b"out 98\n")
    late.write(b"end\n")
    for session in (live, late):
        assert session.wait() == 9
        assert joined(session.output) == expected


def test_every_attacher_gets_everything(start_agent: Callable[..., Agent], connect: Callable[..., RawClient]) -> None:
    # More output than one client may have waiting; all of it fits into the replay log, however slow this machine is.
    agent = start_agent(
        "--replay-size", "64MiB", "--keep-alive", "--", "sh", "-c", "echo ready; read x; seq 1 1000000; exit 3"
    )
    results: list[tuple[bytes, int | None]] = []
    sessions = [connect(agent).attach() for _ in range(6)]
    for session in sessions:
        session.wait_for(b"ready\n")

    def follow(number: int) -> None:
        code = sessions[number].wait()
        results.append((bytes(sessions[number].stdout), code))

    threads = [threading.Thread(target=follow, args=(number,)) for number in range(1, 6)]
    for thread in threads:
        thread.start()
    sessions[0].write(b"go\n")
    follow(0)
    for thread in threads:
        thread.join(DEADLINE)
    expected = b"ready\n" + b"".join(b"%d\n" % number for number in range(1, 1000001))
    assert len(results) == 6
    assert all(result == (expected, 3) for result in results), [(len(out), code) for out, code in results]


def test_one_connection_may_attach_several_times(talker: Agent, connect: Callable[..., RawClient]) -> None:
    client = connect(talker)
    sessions = [client.attach() for _ in range(3)]
    for session in sessions:
        session.wait_for(b"ready\n")
    sessions[1].write(b"end\n")
    for session in sessions:
        assert session.wait() == 9
        assert session.stdout == b"ready\n"


def test_an_attach_after_the_end_gets_the_replay_and_the_code(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    agent = start_agent("--keep-alive", "--", "sh", "-c", "echo out; exit 7")
    assert connect(agent).attach().wait() == 7
    for _ in range(3):
        session = connect(agent).attach()
        assert session.wait() == 7
        assert session.stdout == b"out\n"
    client = connect(agent)
    assert client.attach(id="same").wait() == 7
    assert client.attach(id="same").wait() == 7


def test_the_replay_is_the_newest_output(start_agent: Callable[..., Agent], connect: Callable[..., RawClient]) -> None:
    agent = start_agent("--replay-size", "64k", "--keep-alive", "--", "sh", "-c", "seq 1 200000; exit 1")
    eventually(lambda: agent.health()["exited"], "the end of the main process")
    session = connect(agent).attach()
    assert session.wait() == 1
    whole = b"".join(b"%d\n" % number for number in range(1, 200001))
    assert whole.endswith(session.stdout)
    assert len(session.stdout) >= 60 << 10  # each read of the output weighs CHUNK_COST bytes of it


def test_without_a_main_process_it_is_an_error(agent: Agent, connect: Callable[..., RawClient]) -> None:
    client = connect(agent)
    session = client.attach()
    assert "main process" in session.wait_error()
    client.assert_quiet()
    assert session.exit is None


def test_a_client_that_leaves_does_not_end_the_main_process(talker: Agent, connect: Callable[..., RawClient]) -> None:
    for number in range(4):
        client = connect(talker)
        client.attach().wait_for(b"ready\n")
        client.cut() if number % 2 else client.close()
    session = connect(talker).attach()
    session.wait_for(b"ready\n")
    session.write(b"still there\n")
    session.wait_for(b"still there\n")


LOSS_SIZE = 48 << 20


def test_a_client_that_stops_reading_slows_nobody_and_is_told_its_loss(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    script = f"echo ready; read x; head -c {LOSS_SIZE} /dev/zero; exit 5"
    agent = start_agent("--keep-alive", "--", "sh", "-c", script)
    stalled = connect(agent, max_queue=1)
    session = stalled.attach()
    session.wait_for(b"ready\n")
    # It reads no more from here on, and still the main process comes to its end.
    reader = connect(agent)
    watching = reader.attach()
    watching.wait_for(b"ready\n")
    watching.write(b"go\n")
    eventually(lambda: agent.health()["exited"], "the end of the main process")
    # Now it goes on: what it gets, and what it is told to have lost, are the whole together.
    received, lost = len(b"ready\n"), 0
    while True:
        event = stalled.receive()
        if event["type"] == "exit":
            assert event["code"] == 5
            break
        if event.get("lost"):
            assert type(event["lost"]) is int
            lost += event["lost"]
            assert b"missing" in base64.b64decode(event["data"])
        else:
            assert event["type"] == "stdout"
            data = base64.b64decode(event["data"])
            assert data.count(0) == len(data)
            received += len(data)
    assert lost > 0
    assert received + lost == LOSS_SIZE + len(b"ready\n")


def test_input_goes_to_the_main_process_and_ends(talker: Agent, connect: Callable[..., RawClient]) -> None:
    first, second = connect(talker).attach(), connect(talker).attach()
    first.write(b"from the first\n")
    second.wait_for(b"from the first\n")
    second.write(b"from the second\n")
    first.wait_for(b"from the first\nfrom the second\n")
    second.close_stdin()
    assert first.wait() == 4
    assert second.wait() == 4


def test_a_signal_goes_to_the_main_process(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    script = "trap 'echo caught; exit 6' USR1; echo ready; while :; do sleep 0.02; done"
    agent = start_agent("--keep-alive", "--", "sh", "-c", script)
    session = connect(agent).attach()
    session.wait_for(b"ready\n")
    session.signal("USR1")
    assert session.wait() == 6
    assert session.stdout == b"ready\ncaught\n"


def test_a_main_process_without_a_terminal_ignores_a_resize(talker: Agent, connect: Callable[..., RawClient]) -> None:
    session = connect(talker).attach()
    session.send("resize", width=100, height=40)
    session.write(b"end\n")
    assert session.wait() == 9


def test_a_main_process_on_a_terminal(start_agent: Callable[..., Agent], connect: Callable[..., RawClient]) -> None:
    script = "stty size; echo $TERM; trap 'stty size' WINCH; echo ready >/dev/tty; while :; do read x && break; done; "
    script += "echo got $x; cat; exit 8"
    agent = start_agent("--tty", "--keep-alive", "--", "sh", "-c", script)
    session = connect(agent).attach()
    session.wait_for(b"24 80\r\nxterm\r\nready\r\n")
    session.send("resize", width=100, height=40)
    session.wait_for(b"40 100\r\n")
    session.write(b"it\n")
    session.wait_for(b"got it\r\n")
    session.close_stdin()
    assert session.wait() == 8
    assert session.stderr == b""


def test_close_stdin_of_one_client_leaves_a_terminal_open_for_the_next(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    script = 'echo ready; cat; echo again; read x; echo "got $x"'
    agent = start_agent("--tty", "--keep-alive", "--", "sh", "-c", script)
    first = connect(agent).attach()
    first.wait_for(b"ready\r\n")
    first.close_stdin()
    first.wait_for(b"again\r\n")
    second = connect(agent).attach()
    second.write(b"more\n")
    assert second.wait() == 0
    assert second.stdout.endswith(b"got more\r\n")


def test_output_before_the_first_client_is_not_lost(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    agent = start_agent("--keep-alive", "--", "sh", "-c", "seq 1 1000; exec cat")
    agent.wait_for_output(b"\n1000\n")
    session = connect(agent).attach()
    assert session.wait_for(b"\n1000\n") == b"".join(b"%d\n" % number for number in range(1, 1001))

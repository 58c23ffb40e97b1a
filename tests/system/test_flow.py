"""Flow: slow peers, peers that do not read, commands that do not read, and messages that make no sense."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import DEADLINE, Agent, RawClient, Session, eventually
from websockets.exceptions import ConnectionClosedError

BLOCK = os.urandom(1 << 20)


def feed(session: Session, count: int, digest: hashlib._Hash) -> threading.Thread:
    """Send so many megabytes to a session's stdin, and its end, from a thread."""

    def work() -> None:
        for number in range(count):
            data = number.to_bytes(8, "big") + BLOCK[8:]
            digest.update(data)
            session.write(data)
        session.close_stdin()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def follow(client: RawClient, session: Session, pause: float = 0.0) -> tuple[int, bytes]:
    """Receive a session's stdout to its end, without keeping it: its size and hash."""
    digest, size = hashlib.sha256(), 0
    while session.exit is None:
        client.receive_one()
        size += len(session.stdout)
        digest.update(session.stdout)
        session.stdout.clear()
        session.output.clear()
        if pause:
            time.sleep(pause)
    return size, digest.digest()


# Both directions at once.


def test_128_mib_go_through_cat_in_both_directions_at_once(client: RawClient) -> None:
    sent = hashlib.sha256()
    session = client.exec(["cat"])
    feeder = feed(session, 128, sent)
    size, received = follow(client, session)
    feeder.join(DEADLINE)
    assert (session.wait(), size) == (0, 128 << 20)
    assert received == sent.digest()


def test_several_sessions_stream_in_both_directions_at_once(client: RawClient) -> None:
    digests = [hashlib.sha256() for _ in range(4)]
    sessions = [client.exec(["cat"]) for _ in range(4)]
    feeders = [feed(session, 16, digest) for session, digest in zip(sessions, digests, strict=True)]
    for session, digest in zip(sessions, digests, strict=True):
        assert session.wait() == 0
        assert hashlib.sha256(session.stdout).digest() == digest.digest()
    for feeder in feeders:
        feeder.join(DEADLINE)


def test_a_client_that_reads_slowly_gets_everything(agent: Agent, connect: Callable[..., RawClient]) -> None:
    # About a tenth of the speed: a message, at most 1 MiB, takes a few milliseconds without the pause.
    client = connect(agent, max_queue=1)
    sent = hashlib.sha256()
    session = client.exec(["cat"])
    feeder = feed(session, 48, sent)
    size, received = follow(client, session, pause=0.03)
    feeder.join(DEADLINE)
    assert (session.wait(), size) == (0, 48 << 20)
    assert received == sent.digest()


def test_a_slow_client_is_answered_in_the_middle_of_a_flood(agent: Agent, connect: Callable[..., RawClient]) -> None:
    client = connect(agent, max_queue=1)
    flood = client.exec(["cat", "/dev/zero"])
    while len(flood.stdout) < 8 << 20:
        client.receive_one()
        time.sleep(0.01)
    # The flood has no end by itself: whatever is answered is answered in the middle of it.
    pong = client.ws.ping()
    assert client.output("echo", "answer") == "answer\n"
    while not pong.is_set():
        client.receive_one()
        time.sleep(0.01)
    flood.signal("TERM")
    assert follow(client, flood)[0] > 0
    assert flood.wait() == 143


# A client that stops reading.


@pytest.fixture
def stalled(agent: Agent, connect: Callable[..., RawClient], tmp_path: Path) -> Iterator[Session]:
    """A session whose client does not read, and whose command can write no more for it.

    On USR1 it makes the file `signalled`, for a line of stdin the file `fed`.
    """
    client = connect(agent, max_queue=1)
    script = f"trap 'touch {tmp_path}/signalled; exit 9' USR1; cat /dev/zero & echo $! >&2; "
    script += f"while read -r line; do touch {tmp_path}/$line; done; wait"
    session = client.exec(["sh", "-c", script])
    pid = int(session.wait_for(b"\n", "stderr"))

    def written() -> int:
        return int(Path(f"/proc/{pid}/io").read_text().partition("wchar: ")[2].split()[0])

    def is_stuck() -> bool:
        before = written()
        time.sleep(0.3)
        return before > 0 and written() == before

    eventually(is_stuck, "the command is blocked in its pipe")
    yield session
    client.cut()


def test_a_client_that_does_not_read_has_its_signal_and_stdin_delivered(stalled: Session, tmp_path: Path) -> None:
    stalled.write(b"fed\n")
    eventually((tmp_path / "fed").exists, "stdin of a client that does not read")
    stalled.signal("USR1")
    eventually((tmp_path / "signalled").exists, "a signal of a client that does not read")


def test_a_client_that_does_not_read_has_its_pings_answered(stalled: Session, tmp_path: Path) -> None:
    client = stalled.client
    pongs = [client.ws.ping() for _ in range(3)]
    stalled.write(b"fed\n")
    eventually((tmp_path / "fed").exists, "stdin, which was sent behind the pings")
    # The command goes on writing, so all that can be seen now is in front of endless output.
    while not all(pong.is_set() for pong in pongs):
        client.receive_one()
    stalled.signal("KILL")
    assert follow(client, stalled)[0] > 0
    assert stalled.wait() == 137


def test_a_client_that_does_not_read_disturbs_no_other(agent: Agent, stalled: Session, client: RawClient) -> None:
    assert stalled.exit is None
    assert client.run(["seq", "1", "200000"])[2]["code"] == 0
    session = client.exec(["sh", "-c", "read x; echo got $x"], tty=True)
    session.write(b"it\n")
    assert session.wait() == 0
    assert agent.health()["status"] == "ok"


def test_a_terminal_whose_client_does_not_read_disturbs_no_other_terminal(
    agent: Agent, connect: Callable[..., RawClient], client: RawClient
) -> None:
    # All terminals share one thread.
    stuck = connect(agent, max_queue=1)
    flood = stuck.exec(["sh", "-c", "stty raw; echo up; exec cat /dev/zero"], tty=True)
    flood.wait_for(b"up")
    for number in range(20):
        session = client.exec(["sh", "-c", f"seq 1 20000; exit {number}"], tty=True)
        assert session.wait() == number
        assert session.stdout.endswith(b"\r\n20000\r\n")
    flood.signal("KILL")
    assert follow(stuck, flood)[0] > 0
    assert flood.wait() == 137


def test_a_client_that_sends_nonsense_and_reads_no_answer_disturbs_no_other(
    agent: Agent, connect: Callable[..., RawClient], client: RawClient
) -> None:
    rude = connect(agent, max_queue=1)
    nonsense = json.dumps({"type": "x" * 60, "id": "y" * 4000})

    def flood() -> None:
        try:
            for _ in range(20000):
                rude.ws.send(nonsense)
        except ConnectionClosedError:
            pass  # cut below

    thread = threading.Thread(target=flood)
    thread.start()
    for _ in range(20):
        client.assert_quiet()
    rude.cut()
    thread.join(DEADLINE)
    assert not thread.is_alive()


# A command that does not read.


def test_a_command_that_does_not_read_its_stdin_blocks_nothing(client: RawClient) -> None:
    deaf = client.exec(["sleep", "300"])
    for _ in range(48):
        deaf.write(BLOCK)
    pong = client.ws.ping()
    assert client.output("echo", "goes on") == "goes on\n"
    assert pong.wait(DEADLINE)
    session = client.exec(["cat"])
    session.write(b"fine")
    session.close_stdin()
    assert session.wait() == 0
    deaf.signal("TERM")
    assert deaf.wait() == 143


def test_stdin_over_the_limit_is_an_error_that_names_it_and_the_command_is_killed(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    client = connect(start_agent("--stdin-limit", "2MiB"))
    fine = client.exec(["cat"])
    deaf = client.exec(["sleep", "300"])
    for _ in range(4):
        deaf.write(BLOCK)
    assert str(2 << 20) in deaf.wait_error()
    deaf.errors.clear()
    assert deaf.wait() == 137
    fine.write(b"goes on")
    fine.close_stdin()
    assert fine.wait() == 0
    assert fine.stdout == b"goes on"
    client.assert_quiet()


def test_a_main_process_that_does_not_read_is_not_killed_for_it(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    script = "trap 'exit 3' USR1; echo up; while :; do sleep 0.02; done"
    agent = start_agent("--stdin-limit", "2MiB", "--keep-alive", "--", "sh", "-c", script)
    session = connect(agent).attach()
    for _ in range(4):
        session.write(BLOCK)
    while len(session.errors) < 2:  # the pipe takes 64 KiB, so the third block does not fit, and the fourth
        session.client.receive_one()
    assert all(str(2 << 20) in error["message"] for error in session.errors)
    session.errors.clear()
    assert agent.health()["exited"] is False
    session.signal("USR1")
    assert session.wait() == 3


# Messages that make no sense.

NONSENSE = {
    "no JSON": "nonsense",
    "empty": "",
    "cut off": '{"type":"exec","id":"x"',
    "an array": "[]",
    "null": "null",
    "a number": "1e999",
    "no type": '{"id":"x"}',
    "type is a number": '{"type":1,"id":"x"}',
    "unknown type": '{"type":"launch","id":"x"}',
    "an event's type": '{"type":"exit","id":"x","code":0}',
    "no id": '{"type":"exec","cmd":["true"]}',
    "id is a number": '{"type":"exec","id":7,"cmd":["true"]}',
    "id is empty": '{"type":"exec","id":"","cmd":["true"]}',
    "no cmd": '{"type":"exec","id":"x"}',
    "cmd is empty": '{"type":"exec","id":"x","cmd":[]}',
    "cmd holds an empty name": '{"type":"exec","id":"x","cmd":[""]}',
    "cmd is a string": '{"type":"exec","id":"x","cmd":"true"}',
    "cmd holds a number": '{"type":"exec","id":"x","cmd":["sleep",1]}',
    "cmd holds a NUL": '{"type":"exec","id":"x","cmd":["echo","a\\u0000b"]}',
    "cmd is half a character": '{"type":"exec","id":"x","cmd":["echo","\\ud800"]}',
    "env without =": '{"type":"exec","id":"x","cmd":["true"],"env":["A"]}',
    "env is an object": '{"type":"exec","id":"x","cmd":["true"],"env":{"A":"b"}}',
    "env without a name": '{"type":"exec","id":"x","cmd":["true"],"env":["=b"]}',
    "tty is a string": '{"type":"exec","id":"x","cmd":["true"],"tty":"yes"}',
    "workdir is a number": '{"type":"exec","id":"x","cmd":["true"],"workdir":1}',
    "data is no base64": '{"type":"stdin","id":"live","data":"###"}',
    "data lacks padding": '{"type":"stdin","id":"live","data":"YQ"}',
    "data is a number": '{"type":"stdin","id":"live","data":1}',
    "data is not ASCII": '{"type":"stdin","id":"live","data":"ä"}',
    "signal is missing": '{"type":"signal","id":"live"}',
    "signal is an array": '{"type":"signal","id":"live","signal":[]}',
    "resize without a size": '{"type":"resize","id":"live"}',
    "deep": "[" * 100000,
    "a huge number": '{"type":"resize","id":"live","width":' + "9" * 5000 + ',"height":1}',
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_is_an_error_and_all_goes_on(client: RawClient, what: str) -> None:
    live = client.exec(["cat"], id="live")
    live.write(b"one ")
    live.wait_for(b"one ")
    client.ws.send(NONSENSE[what])
    event = client.receive()
    assert event["type"] == "error"
    assert isinstance(event["message"], str)
    assert event["message"]
    live.write(b"two")
    live.close_stdin()
    assert live.wait() == 0
    assert live.stdout == b"one two"
    client.assert_quiet()


@pytest.mark.parametrize("data", [b"", b"\x00", b"\x01\x01xpayload", b"{}", bytes(100000)])
def test_a_binary_message_is_an_error_in_version_1(client: RawClient, data: bytes) -> None:
    client.ws.send(data)
    assert "binary" in client.wait_error()
    client.assert_quiet()


def test_the_error_names_the_session_and_the_fault(client: RawClient) -> None:
    for message, fault in [
        ({"type": "exec", "id": "mine"}, "cmd"),
        ({"type": "stdin", "id": "mine", "data": "#"}, "base64"),
        ({"type": "launch", "id": "mine"}, "launch"),
        ({"type": "resize", "id": "mine", "width": 0, "height": 1}, "width"),
    ]:
        client.send(message)
        event = client.receive()
        assert (event["type"], event["id"]) == ("error", "mine")
        assert fault in event["message"]


def test_a_fault_without_a_session_has_no_id(client: RawClient) -> None:
    client.ws.send("nonsense")
    event = client.receive()
    assert event["type"] == "error"
    assert not event.get("id")


def test_unknown_fields_and_null_are_as_absent(client: RawClient) -> None:
    fields = {"env": None, "workdir": None, "tty": None, "window": 5, "future": {"a": [1]}, "status": 7, "log": None}
    assert client.output("echo", "fine", **fields) == "fine\n"
    session = client.exec(["cat"])
    session.send("stdin", data=None)
    session.send("close_stdin", data="ignored", code="ignored")
    assert session.wait() == 0


def test_fragments_with_pings_between_them_are_one_message(client: RawClient) -> None:
    session = client.exec(["cat"])
    text = json.dumps({"type": "stdin", "id": session.id, "data": base64.b64encode(b"whole").decode()})
    pongs = []

    def fragments() -> Iterator[str]:
        for character in text:
            yield character
            pongs.append(client.ws.ping())

    client.ws.send(fragments())
    session.wait_for(b"whole")
    session.close_stdin()
    assert session.wait() == 0
    assert all(pong.wait(DEADLINE) for pong in pongs[-1:])


def test_a_message_over_the_limit_closes_that_connection_and_says_why(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    agent = start_agent("--max-message-size", "64k")
    client, other = connect(agent), connect(agent)
    client.ws.send("x" * 65537)
    with pytest.raises(ConnectionClosedError):
        client.receive()
    assert client.ws.close_code == 1009
    other.assert_quiet()


def test_text_that_is_not_utf_8_closes_that_connection_only(
    agent: Agent, connect: Callable[..., RawClient], client: RawClient
) -> None:
    other = connect(agent)
    other.ws.send(b"\xff\xfe", text=True)
    with pytest.raises(ConnectionClosedError):
        other.receive()
    assert other.ws.close_code == 1007
    client.assert_quiet()


def test_the_agent_pings_so_that_idle_connections_live(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    agent = start_agent("--ping-interval", "50ms")
    client = connect(agent)
    seen = threading.Event()
    acknowledge = client.ws.protocol.receive_data

    def spy(data: bytes) -> None:
        if data[:1] == b"\x89":  # a ping
            seen.set()
        acknowledge(data)

    client.ws.protocol.receive_data = spy  # type: ignore[method-assign]
    assert seen.wait(DEADLINE)
    client.assert_quiet()

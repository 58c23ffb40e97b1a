"""The router of a real agent: messages good and bad, in and out of order, of both versions of the protocol.

Afterwards the same agent serves a valid client, and nothing is left: no session, child, thread or descriptor.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from messages import REQUESTS_1, REQUESTS_2, damaged, mutated
from support import Agent, RawClient, children_of, eventually
from wire import BINARY, PING, PONG, TEXT, VERSION_2, Baseline, Wire, close, frame

from agent import Reason
from agent_client import AgentConn

SEQUENCES = int(os.environ.get("FUZZ_INPUTS", "40"))  # for each version, of 20 messages at most
IDS = ["a", "b", "c"]
COMMANDS = [["cat"], ["true"], ["sh", "-c", "echo out; echo err >&2"], ["nosuch"], ["/etc/passwd"], ["sleep", "60"]]
SECRETS = ["0123456789abcdef", "fedcba9876543210"]

# What the good ones may hold. No command or path among them changes this machine's files.
GOOD: dict[str, dict[str, Any]] = {
    "exec": {"cmd": COMMANDS, "tty": [False, True], "detach": [False, False, True], "stdin": [True, False],
             "window": [0, 1, 70_000], "secret": ["", *SECRETS], "connection": [0, 1, 2], "user": ["", "root", "?"]},
    "attach": {"session": ["", *IDS], "replay": [True, False], "secret": ["", *SECRETS], "connection": [0, 1, 2]},
    "stdin": {"data": ["", "aGVsbG8K", "AA=="]},
    "close_stdin": {},
    "signal": {"signal": ["TERM", "KILL", "WINCH", "0", "99", "STOP", "CONT"], "number": [0, 1, 2, 17]},
    "resize": {"width": [1, 80, 65535], "height": [1, 24, 65535], "number": [0, 1, 2]},
    "end": {"number": [0, 1, 2], "secret": ["", *SECRETS]},
    "ack": {"offset": [0, 1, 7, 2**60]},
    "resume": {"secret": ["", *SECRETS], "offset": [0, 1, 2**60], "window": [0, 9], "connection": [0, 1, 2, 3]},
    "park": {},
    "sessions": {},
    "stats": {"processes": [True, False]},
    "health": {},
    "archive_get": {"path": ["/nosuch", "/etc/hostname"], "window": [0, 1]},
    "archive_put": {"path": ["/nosuch"]},
    "archive_stat": {"path": ["/", "/nosuch", "/etc/hostname/x"]},
}  # fmt: skip


@st.composite
def good(draw: Callable[..., Any], kinds: list[str]) -> str:
    """A message that is well-formed, and may or may not make sense where it comes."""
    kind = draw(st.sampled_from(kinds))
    fields = {name: draw(st.sampled_from(values)) for name, values in GOOD[kind].items()}
    return json.dumps({"type": kind, "id": draw(st.sampled_from(IDS)), **fields})


def harmless(text: str) -> bool:
    """Mutation may make a command or path of its own: none but those above are to be run."""
    return '"archive_' not in text and ('"exec"' not in text or '["true"]' in text)


def frames(version: int) -> st.SearchStrategy[bytes]:
    samples = REQUESTS_1 if version == 1 else REQUESTS_2
    kinds = list(REQUESTS_1) if version == 1 else list(GOOD)
    bad = (mutated(samples) | damaged(samples)).filter(harmless).map(lambda text: text.encode("utf-8", "replace"))
    data = st.builds(
        lambda stream, session, data: bytes([stream, len(session)]) + session.encode() + data,
        st.sampled_from([0, 0, 0, 1, 3, 255]), st.sampled_from([*IDS, "", "nosuch"]), st.binary(max_size=40),
    )  # fmt: skip
    return st.one_of(
        *[good(kinds).map(lambda text: frame(TEXT, text.encode()))] * 3,
        bad.map(lambda text: frame(TEXT, text)),
        (data | st.binary(max_size=20)).map(lambda payload: frame(BINARY, payload)),
    )


@pytest.mark.parametrize("version", [1, 2])
def test_no_sequence_of_messages_confuses_the_agent(
    start_agent: Callable[..., Agent],
    connect: Callable[..., RawClient],
    version: int,
    record_property: Callable[[str, object], None],
) -> None:
    agent = start_agent(
        "--resume-window", "1s", "--kill-timeout", "100ms", "--health-cmd", "true", "--keep-alive", "--", "cat"
    )
    bystander = connect(agent)
    session = bystander.exec(["cat"])
    session.write(b"before\n")
    session.wait_for(b"before\n")
    baseline = Baseline(agent.pid)
    children = len(children_of(agent.pid))
    sent = sequences = 0
    reasons = {str(reason) for reason in Reason}

    @settings(max_examples=SEQUENCES, deadline=None, database=None, suppress_health_check=list(HealthCheck),
              phases=[Phase.generate])  # fmt: skip
    @given(st.lists(frames(version), min_size=1, max_size=20), st.integers(0, 2))
    def send(messages: list[bytes], end: int) -> None:
        nonlocal sent, sequences
        with Wire.dial(agent.address, "/ws", *[VERSION_2] * (version - 1)) as peer:
            assert peer.status == 101
            if random.random() < 0.5:
                peer.send(b"".join(messages))
            else:
                for message in messages:
                    peer.send(message)
            peer.send(frame(PING, b"all taken"))
            while (message := peer.read()) != (PONG, b"all taken"):
                assert message is not None, "the agent closed the connection"
                if message[0] == TEXT:
                    event = json.loads(message[1])
                    assert event["type"] != "error" or event["reason"] in reasons, event
            if end:
                peer.send(close())
            if end == 2:
                assert peer.read_all()[1] == 1000
        sent += len(messages)
        sequences += 1

    send()
    session.write(b"after\n")
    session.wait_for(b"after\n")
    newcomer = connect(agent)
    newcomer.assert_quiet()
    newcomer.close()
    # Detached commands are there to stay, and are ended by a client.
    with AgentConn.dial(agent.address, agent.token) as conn:
        for entry in conn.sessions():
            if entry["kind"] == "detached" and "code" not in entry:
                conn.attach(entry["id"]).kill()
        eventually(lambda: not unfinished(conn), "the end of every session")
    eventually(lambda: len(children_of(agent.pid)) <= children, "the children of before")
    # A detached command's output is kept, and needs no descriptor.
    baseline.assert_back(60)
    agent.stop()  # with whatever code: the main process may have been sent any signal
    assert "unexpected error" not in agent.log and "Traceback" not in agent.log, agent.log[-5000:]
    record_property("inputs", (f"messages of version {version}, in {sequences} sequences", sent))


def unfinished(conn: AgentConn) -> list[str]:
    return [entry["id"] for entry in conn.sessions() if entry["kind"] != "main" and "code" not in entry]

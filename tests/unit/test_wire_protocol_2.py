"""The messages that version 2 of the protocol adds: to bytes and back, and never seen by a version 1 peer."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import (
    Ack,
    ArchiveGet,
    ArchivePut,
    ArchiveStat,
    Attach,
    End,
    Exec,
    GetHealth,
    GetStats,
    Health,
    ListSessions,
    Lost,
    MessageError,
    Park,
    PathStat,
    Resize,
    Resume,
    Resumed,
    Sessions,
    Signal,
    Started,
    Stats,
    decode_event,
    decode_request,
    encode,
)

IDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
CALL_IDS = IDS | st.just("")
# What os.fsdecode makes of bytes that are no UTF-8 is a path, too.
PATHS = st.binary(min_size=1, max_size=300).map(
    lambda data: (data.replace(b"\0", b"") or b"/").decode("utf-8", "surrogateescape")
)
COUNTS = st.integers(0, 2**63)
SECRETS = st.just("") | st.text(st.characters(exclude_categories=["Cs"]), min_size=16, max_size=40)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=10,
)
OBJECTS = st.dictionaries(st.text(), JSON, max_size=5)
TIE = {"secret": SECRETS, "connection": COUNTS}

REQUESTS = st.one_of(
    st.builds(
        Exec, IDS, st.just(("sh",)), user=st.text("abc:0"), width=st.just(80), height=st.just(24),
        no_stdin=st.booleans(), window=COUNTS, detach=st.booleans(), **TIE,
    ),
    st.builds(Attach, IDS, COUNTS, st.text(st.characters(exclude_categories=["Cs"])), st.booleans(), **TIE),
    st.builds(ArchiveGet, IDS, PATHS, COUNTS, **TIE),
    st.builds(ArchivePut, IDS, PATHS, COUNTS, st.booleans(), st.booleans(), **TIE),
    st.builds(ArchiveStat, IDS, PATHS),
    st.builds(GetStats, CALL_IDS, st.booleans()),
    st.builds(GetHealth, CALL_IDS),
    st.builds(ListSessions, CALL_IDS),
    st.builds(Park, IDS),
    st.builds(Ack, IDS, COUNTS),
    st.builds(Signal, IDS, st.just("TERM"), COUNTS),
    st.builds(Resize, IDS, st.integers(1, 65535), st.integers(1, 65535), COUNTS),
    st.builds(End, IDS, COUNTS, SECRETS),
    st.builds(Resume, IDS, st.text(), COUNTS, COUNTS, COUNTS, COUNTS),
)  # fmt: skip
EVENTS = st.one_of(
    st.builds(Started, IDS, st.integers(0, 2**22), st.text(), COUNTS),
    st.builds(Ack, IDS, COUNTS, COUNTS),
    st.builds(Resumed, IDS, COUNTS, COUNTS, COUNTS, COUNTS),
    st.builds(Lost, IDS, COUNTS, COUNTS),
    st.builds(Sessions, st.lists(OBJECTS, max_size=3).map(tuple), CALL_IDS),
    st.builds(Stats, OBJECTS, CALL_IDS),
    st.builds(Health, st.sampled_from(["", "starting", "healthy", "unhealthy"]), st.text(), OBJECTS, CALL_IDS),
    st.builds(PathStat, IDS, OBJECTS),
)


@given(REQUESTS)
def test_every_request_survives_the_way_to_the_agent(request_):
    assert decode_request(encode(request_).decode("ascii"), 2) == request_


@given(EVENTS)
def test_every_event_survives_the_way_to_the_client(event):
    assert decode_event(encode(event).decode("ascii"), 2) == event


@pytest.mark.parametrize(
    "kind", ["archive_get", "archive_put", "archive_stat", "stats", "health", "sessions", "park", "resume", "ack"]
)
def test_version_1_has_none_of_them(kind):
    text = json.dumps({"type": kind, "id": "s", "path": "/", "secret": "x" * 16, "offset": 0})
    with pytest.raises(MessageError, match=f"unknown message type '{kind}'"):
        decode_request(text)
    assert not isinstance(decode_request(text, 2), Exec)


@pytest.mark.parametrize(
    "kind", ["started", "ack", "resumed", "lost", "sessions", "stats", "health", "archive_stat"]
)  # fmt: skip
def test_a_version_1_client_takes_none_of_them_for_something_else(kind):
    assert decode_event(json.dumps({"type": kind, "id": "s", "status": "healthy", "log": "x"})) is None


def test_version_1_ignores_what_version_2_adds_to_its_requests():
    more = {"window": -5, "session": 7, "replay": "no", "detach": "yes", "secret": 0, "connection": [], "number": "x"}
    assert decode_request(json.dumps({"type": "attach", "id": "s", **more})) == Attach("s")
    assert decode_request(json.dumps({"type": "exec", "id": "s", "cmd": ["a"], **more})) == Exec("s", ("a",))
    assert decode_request(json.dumps({"type": "end", "id": "s", **more})) == End("s")


def test_what_is_true_unless_said_otherwise_is_sent_only_otherwise():
    assert json.loads(encode(Attach("s"))) == {"type": "attach", "id": "s"}
    assert json.loads(encode(Attach("s", no_replay=True))) == {"type": "attach", "id": "s", "replay": False}
    assert decode_request('{"type":"attach","id":"s","replay":true}', 2) == Attach("s")


def test_a_call_without_an_id_has_none():
    for call in (GetStats(), GetHealth(), ListSessions()):
        assert "id" not in json.loads(encode(call))
    assert "id" not in json.loads(encode(Health("healthy", "", {})))


@pytest.mark.parametrize("kind", ["archive_get", "archive_put", "archive_stat"])
@pytest.mark.parametrize("path", ["", None, 7, [], "nul\0byte", "\ud800", "a/\udfff"])
def test_a_path_that_can_be_none_is_refused_by_its_field(kind, path):
    with pytest.raises(MessageError, match="'path'") as caught:
        decode_request(json.dumps({"type": kind, "id": "s", "path": path}), 2)
    assert caught.value.id == "s"


@pytest.mark.parametrize("kind", ["archive_get", "archive_put", "archive_stat", "park"])
def test_what_is_a_session_needs_an_id(kind):
    with pytest.raises(MessageError, match="'id' is missing"):
        decode_request(json.dumps({"type": kind, "path": "/"}), 2)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("archive_put", "no_overwrite_dir_non_dir", "yes"),
        ("archive_put", "no_owners", 1),
        ("archive_get", "window", -1),
        ("archive_get", "window", 1.5),
        ("stats", "processes", "all"),
        ("attach", "session", 5),
        ("attach", "replay", "no"),
        ("exec", "detach", 1),
        ("exec", "secret", "short"),
    ],
)
def test_a_field_of_another_kind_is_refused_by_its_name(kind, field, value):
    message = {"type": kind, "id": "s", "path": "/", "cmd": ["true"], field: value}
    with pytest.raises(MessageError, match=f"'{field}'"):
        decode_request(json.dumps(message), 2)


@pytest.mark.parametrize(("kind", "field"), [("stats", "stats"), ("health", "state"), ("archive_stat", "stat")])
@pytest.mark.parametrize("value", [[], "text", 5, True])
def test_an_answer_that_is_no_object_is_refused(kind, field, value):
    with pytest.raises(MessageError, match=f"'{field}' must be an object"):
        decode_event(json.dumps({"type": kind, "id": "s", field: value}), 2)


@pytest.mark.parametrize("value", ["text", [1], ["text"], [[]], {}])
def test_a_list_of_sessions_holds_objects_alone(value):
    with pytest.raises(MessageError, match="'sessions'"):
        decode_event(json.dumps({"type": "sessions", "sessions": value}), 2)


@pytest.mark.parametrize("kind", ["exec", "attach", "resume", "archive_get", "archive_put"])
def test_an_id_that_no_data_frame_can_hold_is_refused(kind):
    fields = {"type": kind, "cmd": ["true"], "path": "/", "secret": "x" * 16, "offset": 0}
    assert decode_request(json.dumps({**fields, "id": "\xe9" * 127}), 2).id == "\xe9" * 127
    with pytest.raises(MessageError, match="'id' has 256 bytes, and 255 is the limit") as caught:
        decode_request(json.dumps({**fields, "id": "\xe9" * 128}), 2)
    assert caught.value.id == "\xe9" * 128
    if kind in ("exec", "attach"):
        assert decode_request(json.dumps({**fields, "id": "\xe9" * 128}), 1).id == "\xe9" * 128


@pytest.mark.parametrize("kind", ["exec", "attach", "resume", "end", "archive_get", "archive_put"])
def test_a_secret_that_is_not_unicode_is_refused(kind):
    fields = {"type": kind, "id": "s", "cmd": ["true"], "path": "/", "secret": "\ud800" * 16, "offset": 0}
    with pytest.raises(MessageError, match="'secret' is not valid Unicode"):
        decode_request(json.dumps(fields), 2)

"""Messages to bytes and back: what a peer may send, what it may not, and what a Go peer sees."""

import base64
import contextlib
import json
import re
import signal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import agent
from agent import (
    Attach,
    CloseStdin,
    Error,
    Exec,
    Exit,
    LifetimeExpired,
    MessageError,
    Output,
    Resize,
    Signal,
    Stdin,
    Stream,
    decode_event,
    decode_request,
    encode,
    parse_signal,
)

IDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
SYSTEM_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
# What os.fsdecode makes of bytes that are no UTF-8 is a string too, and reaches execve(2) as the same bytes.
RAW_TEXT = st.binary(max_size=40).map(lambda data: data.replace(b"\0", b"").decode("utf-8", "surrogateescape"))
WORDS = SYSTEM_TEXT | RAW_TEXT
COMMANDS = st.tuples(WORDS.filter(bool), st.lists(WORDS, max_size=4)).map(lambda parts: (parts[0], *parts[1]))
NAMES = WORDS.map(lambda text: text.replace("=", "")).filter(bool)
ENVIRONMENTS = st.lists(st.tuples(NAMES, WORDS).map("=".join), max_size=4).map(tuple)
SIZES = st.integers(1, 65535)
OUTPUTS = st.sampled_from([Stream.STDOUT, Stream.STDERR])

REQUESTS = st.one_of(
    st.builds(Exec, IDS, COMMANDS, ENVIRONMENTS, WORDS, st.booleans()),
    st.builds(Attach, IDS),
    st.builds(Stdin, IDS, st.binary()),
    st.builds(CloseStdin, IDS),
    st.builds(Signal, IDS, st.text(min_size=1, max_size=20)),
    st.builds(Resize, IDS, SIZES, SIZES),
)
EVENTS = st.one_of(
    st.builds(Output, IDS, OUTPUTS, st.binary(), st.integers(0, 2**63)),
    st.builds(Exit, IDS, st.integers(0, 255)),
    st.builds(Error, IDS | st.just(""), st.text(), st.sampled_from(["", *agent.Reason])),
    st.just(LifetimeExpired()),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=10,
)

# A well-formed message of every type, with every field that it may have.
REQUEST_SAMPLES = {
    "exec": {"id": "s", "cmd": ["true"], "env": ["K=V"], "workdir": "/", "tty": True},
    "attach": {"id": "s"},
    "stdin": {"id": "s", "data": "AAEC"},
    "close_stdin": {"id": "s"},
    "signal": {"id": "s", "signal": "SIGTERM"},
    "resize": {"id": "s", "width": 80, "height": 24},
}
EVENT_SAMPLES = {
    "stdout": {"id": "s", "data": "AAEC", "lost": 1},
    "stderr": {"id": "s", "data": "AAEC", "lost": 1},
    "exit": {"id": "s", "code": 3},
    "error": {"id": "s", "message": "m", "reason": "limit"},
    "lifetime_expired": {},
}
SAMPLES = REQUEST_SAMPLES | EVENT_SAMPLES
# For every field, values of the JSON types that it may not have. A number that
# is an integer is in none of them where a Go peer would take it.
NOT_STRINGS = [0, 1.5, True, False, [], ["x"], {}]
NOT_INTEGERS = ["1", "", 1.5, 0.0, True, False, [], {}]
WRONG_TYPES = {
    "id": NOT_STRINGS,
    "cmd": ["sh", 1, True, {}, [1], [None], [["sh"]], ["sh", True]],
    "env": ["K=V", 1, True, {"K": "V"}, [1], [None], ["K=V", {}]],
    "workdir": NOT_STRINGS,
    "tty": [0, 1, "true", "", [], {}],
    "data": NOT_STRINGS,
    "signal": [1.5, True, False, [], ["TERM"], {}, ""],
    "width": NOT_INTEGERS,
    "height": NOT_INTEGERS,
    "lost": NOT_INTEGERS,
    "code": NOT_INTEGERS,
    "message": NOT_STRINGS,
    "reason": NOT_STRINGS,
}
BAD_VALUES = {
    "id": ["", "\ud800", "a\udfff"],
    "cmd": [[], [""], ["", "x"], ["a\0b"], ["sh", "\0"], ["\ud800"], ["sh", "a\udfffb"]],
    "env": [["K"], ["=V"], [""], ["K=a\0b"], ["K=\ud800"], ["K=V", "nothing"]],
    "workdir": ["/a\0b", "/\ud834"],
    "data": ["A", "AA", "AA=", "AA==AA==", "====", "A===", "AA A", "AAA\n", "A-_A", "ÄÄÄÄ", "\ud800", "AA\0A"],
    "width": [0, -1, 65536, 10**4000],
    "height": [0, -1, 65536, 10**4000],
}


def bad_fields(table: dict) -> list:
    """A parameter for each field of each message and each value that ``table`` has for it."""
    return [
        pytest.param(kind, name, value, id=f"{kind}.{name}={json.dumps(value):.24}")
        for kind, fields in SAMPLES.items()
        for name in fields
        # An error's id may be unreadable: it is the answer to messages whose id is.
        if (kind, name) != ("error", "id")
        for value in table.get(name, [])
    ]


def decode(kind: str, fields: dict):
    text = json.dumps({"type": kind, **fields})
    return decode_request(text) if kind in REQUEST_SAMPLES else decode_event(text)


# ── encode and decode ─────────────────────────────────────────────────────────


@given(REQUESTS)
def test_every_request_survives_the_way_to_the_agent(request_):
    assert decode_request(encode(request_).decode()) == request_


@given(EVENTS)
def test_every_event_survives_the_way_to_the_client(event):
    assert decode_event(encode(event).decode()) == event


@given(REQUESTS | EVENTS)
def test_a_message_is_one_object_in_one_line_of_ascii(message):
    text = encode(message).decode("ascii")
    assert "\n" not in text
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("kind", [*REQUEST_SAMPLES, *EVENT_SAMPLES])
def test_fields_that_are_not_known_are_ignored(kind):
    fields = SAMPLES[kind]
    more = {**fields, "window": 7, "Zukunft": {"a": [None]}, "": []}
    assert decode(kind, more) == decode(kind, fields)


@pytest.mark.parametrize("kind", ["", "exec2", "EXEC", "exit", "stdout", "resume", "\ud800", "x" * 100_000])
def test_a_request_of_unknown_type_is_refused_by_its_name(kind):
    with pytest.raises(MessageError, match="unknown message type") as caught:
        decode_request(json.dumps({"type": kind, "id": "s"}))
    assert caught.value.id == "s"
    assert repr(kind[:64]) in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("kind", ["", "exec", "health", "started", "EXIT"])
def test_an_event_of_unknown_type_is_skipped_by_the_client(kind):
    assert decode_event(json.dumps({"type": kind, "id": 5, "code": {}})) is None


def test_an_error_about_no_session_has_no_id():
    assert json.loads(encode(Error("", "what?"))) == {"type": "error", "message": "what?"}


# ── refusals ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("kind", "name", "value"), bad_fields(WRONG_TYPES))
def test_a_field_of_another_type_is_refused_by_its_name(kind, name, value):
    fields = SAMPLES[kind]
    with pytest.raises(MessageError) as caught:
        decode(kind, fields | {name: value})
    assert f"field {name!r}" in str(caught.value)
    assert str(caught.value).startswith(f"{kind}: ")
    assert caught.value.id == ("" if name == "id" else "s")


@pytest.mark.parametrize(("kind", "name", "value"), bad_fields(BAD_VALUES))
def test_a_value_that_makes_no_sense_is_refused_by_its_field(kind, name, value):
    fields = SAMPLES[kind]
    with pytest.raises(MessageError) as caught:
        decode(kind, fields | {name: value})
    assert f"field {name!r}" in str(caught.value)
    assert caught.value.id == ("" if name == "id" else "s")
    # The refusal itself can be sent.
    assert decode_event(encode(Error(caught.value.id, str(caught.value))).decode()).message == str(caught.value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, "id") for kind in REQUEST_SAMPLES),
        ("exec", "cmd"),
        ("signal", "signal"),
        ("resize", "width"),
        ("resize", "height"),
        ("exit", "id"),
        ("stdout", "id"),
    ],
)
def test_a_field_that_must_be_there_is_missed_by_its_name(kind, name):
    fields = dict(SAMPLES[kind])
    del fields[name]
    with pytest.raises(MessageError, match=f"field '{name}'"):
        decode(kind, fields)


def outcome(kind, fields):
    try:
        return decode(kind, fields)
    except MessageError as exc:
        return str(exc), exc.id


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, fields in SAMPLES.items() for name in fields])
def test_null_means_the_same_as_absent(kind, name):
    fields = SAMPLES[kind]
    absent = {key: value for key, value in fields.items() if key != name}
    assert outcome(kind, fields | {name: None}) == outcome(kind, absent)


@given(st.text("AZaz09+/=", max_size=9) | st.binary(max_size=9).map(lambda data: base64.b64encode(data).decode()))
def test_data_is_taken_if_and_only_if_it_is_standard_base64(text):
    fields = {"id": "s", "data": text}
    # binascii forgives padding behind what needs none, whatever the version: "AAAA=" is three bytes for certain.
    whole = re.fullmatch(r"((?:[\w+/]{4})+)=*", text)
    if whole:
        with contextlib.suppress(MessageError):
            assert decode("stdin", fields).data == base64.b64decode(whole[1])
    if re.fullmatch(r"(?:[\w+/]{4})*(?:[\w+/]{2}==|[\w+/]{3}=)?", text):
        assert decode("stdin", fields).data == base64.b64decode(text)
    elif not whole:
        with pytest.raises(MessageError, match="field 'data' is not valid base64"):
            decode("stdin", fields)


@pytest.mark.parametrize("text", ["", " ", "{", "nul", "'x'", '{"type":"attach","id":"s"}x', "\ud800", '{"a":\t"\n"}'])
@pytest.mark.parametrize("decoder", [decode_request, decode_event])
def test_text_that_is_no_json_is_refused(decoder, text):
    with pytest.raises(MessageError, match="not valid JSON") as caught:
        decoder(text)
    assert caught.value.id == ""


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("null", "null"),
        ("true", "a boolean"),
        ("1", "a number"),
        ("NaN", "a number"),
        ("[]", "an array"),
        ('""', "a string"),
    ],
)
@pytest.mark.parametrize("decoder", [decode_request, decode_event])
def test_json_that_is_no_object_is_refused_and_called_what_it_is(decoder, text, what):
    with pytest.raises(MessageError, match=f"must be a JSON object, not {what}"):
        decoder(text)


@pytest.mark.parametrize("kind", [None, 1, True, [], {}])
@pytest.mark.parametrize("decoder", [decode_request, decode_event])
def test_a_type_that_is_no_string_is_refused_and_the_session_named(decoder, kind):
    with pytest.raises(MessageError, match="field 'type'") as caught:
        decoder(json.dumps({"type": kind, "id": "s"}))
    assert caught.value.id == "s"


@pytest.mark.parametrize("unit", ["[", '{"a":', '{"type":"attach","id":"s","x":['], ids=["arrays", "objects", "field"])
@pytest.mark.parametrize("decoder", [decode_request, decode_event])
def test_nesting_a_hundred_thousand_deep_is_refused(decoder, unit):
    with pytest.raises(MessageError, match=r"nested too deeply|not valid JSON"):
        decoder(unit * 100_000)


def test_a_number_of_a_million_digits_is_refused():
    with pytest.raises(MessageError, match="not valid JSON"):
        decode_request('{"type":"resize","id":"s","width":%s,"height":24}' % ("9" * 1_000_000))


@given(
    st.dictionaries(st.sampled_from([*WRONG_TYPES, "status", "log"]), JSON, max_size=8),
    st.sampled_from([*REQUEST_SAMPLES, *EVENT_SAMPLES]) | JSON,
)
@example({"id": "s", "width": 10**4299, "height": 1}, "resize")
@example({"id": "s", "signal": -(10**4299)}, "signal")
def test_no_json_object_breaks_a_decoder(fields, kind):
    text = json.dumps({"type": kind, **fields})
    for decoder in (decode_request, decode_event):
        try:
            message = decoder(text)
        except MessageError as exc:
            encode(Error(exc.id, str(exc)))
        else:
            assert message is None or isinstance(message, agent.Request | agent.Event)


@given(st.text() | JSON.map(json.dumps))
def test_no_text_breaks_a_decoder(text):
    for decoder in (decode_request, decode_event):
        try:
            message = decoder(text)
        except MessageError as exc:
            str(exc).encode("utf-8", "backslashreplace")
        else:
            assert message is None or isinstance(message, agent.Request | agent.Event)


# ── what a Go peer sees ───────────────────────────────────────────────────────

# The fields of the deployed Go peers' struct, and what each has to be in JSON.
GO_TYPES = {
    "type": str,
    "id": str,
    "cmd": list,
    "env": list,
    "workdir": str,
    "tty": bool,
    "data": str,
    "signal": str,
    "code": int,
    "message": str,
    "status": str,
    "width": int,
    "height": int,
    "log": str,
}


@given(REQUESTS | EVENTS)
def test_every_field_that_is_sent_has_the_type_that_a_go_peer_decodes(message):
    for name, value in json.loads(encode(message)).items():
        if name in GO_TYPES:
            assert type(value) is GO_TYPES[name], name
            if isinstance(value, list):
                assert all(type(item) is str for item in value), name
        # encoding/json matches names without regard to case: "Code" would be decoded as "code".
        elif name.lower() in GO_TYPES:
            pytest.fail(f"a Go peer takes {name!r} for {name.lower()!r}")


@given(EVENTS)
def test_an_event_never_has_a_null(event):
    assert None not in json.loads(encode(event)).values()


@given(IDS, st.integers(0, 255))
@example("s", 0)
def test_an_exit_always_has_its_code_as_an_integer(session_id, code):
    # 0.0 would make a Go peer drop the message, and its caller wait for ever.
    assert re.search(rb'"code":%d[,}]' % code, encode(Exit(session_id, code)))


def test_no_bytes_are_still_a_data_field():
    assert json.loads(encode(Output("s", Stream.STDOUT, b""))) == {"type": "stdout", "id": "s", "data": ""}


@given(st.binary())
def test_data_is_standard_base64_with_padding(data):
    assert json.loads(encode(Output("s", Stream.STDERR, data)))["data"] == base64.b64encode(data).decode()


@given(IDS, OUTPUTS, st.binary())
def test_a_data_message_in_parts_is_the_same_as_in_one(session_id, stream, data):
    parts = agent.encode_data(agent.data_prefix(stream, session_id), memoryview(data))
    assert b"".join(parts) == encode(Output(session_id, stream, data))


# ── signals ───────────────────────────────────────────────────────────────────

SIGNALS = sorted(signal.Signals.__members__.items())


@pytest.mark.parametrize(("name", "number"), SIGNALS)
@pytest.mark.parametrize(
    "spell", [str, str.lower, lambda name: name[3:], lambda name: name[3:].lower(), " {} ".format],
    ids=["SIGX", "sigx", "X", "x", "blanks"],
)  # fmt: skip
def test_every_signal_of_the_platform_has_its_names(name, number, spell):
    assert parse_signal(spell(name)) == number


@pytest.mark.parametrize("number", sorted(signal.valid_signals()))
def test_every_signal_of_the_platform_has_its_number(number):
    assert parse_signal(str(int(number))) == number


@pytest.mark.parametrize("offset", range(signal.SIGRTMAX - signal.SIGRTMIN + 1))
def test_every_realtime_signal_is_counted_from_both_ends(offset):
    assert parse_signal(f"SIGRTMIN+{offset}") == parse_signal(f"rtmin+{offset}") == signal.SIGRTMIN + offset
    assert parse_signal(f"SIGRTMAX-{offset}") == parse_signal(f"rtmax-{offset}") == signal.SIGRTMAX - offset


@pytest.mark.parametrize(
    "text",
    ["", "SIG", "0", "-1", "65", "1000", "9" * 5000, "1.5", "TERMINATE", "SIGSIGTERM", "SIG_DFL", "SIGRTMIN-1",
     "SIGRTMAX+1", "SIGRTMIN+99", "RTMIN+", "RTMIN 3", "TERM,KILL", "\0", "\ud800", "²", "1_0"],
)  # fmt: skip
def test_what_is_no_signal_is_refused(text):
    with pytest.raises(ValueError, match="unknown signal"):
        parse_signal(text)


@given(st.text(max_size=20) | st.from_regex(r"(SIG)?RT(MIN|MAX)[+-]\d{1,3}", fullmatch=True))
def test_no_text_breaks_parse_signal(text):
    try:
        number = parse_signal(text)
    except ValueError:
        return
    assert type(number) is int
    assert number in signal.valid_signals()


def test_a_signal_may_be_sent_as_a_number():
    assert decode("signal", {"id": "s", "signal": 15}) == Signal("s", "15")

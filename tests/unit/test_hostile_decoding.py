"""Bytes and messages that nobody should send, for every decoder: a refusal that can be sent, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from messages import EVENTS_1, EVENTS_2, REQUESTS_1, REQUESTS_2, damaged, mutated

import agent
from agent import (
    Error,
    MessageError,
    Stream,
    data_frame_prefix,
    decode_data_frame,
    decode_event,
    decode_request,
    describe_request,
    encode,
)
from agent_client import DockerStreamDecoder, DockerStreamError, encode_docker_frame


def assert_refusal_can_be_sent(exc: MessageError, text: str) -> None:
    message = decode_event(encode(Error(exc.id, str(exc), exc.reason)).decode("ascii"), 2)
    assert isinstance(message, Error)
    assert message.id == exc.id
    assert len(str(exc)) < 10_000, "a refusal that quotes it all"


@pytest.mark.parametrize("version", [1, 2])
@given(data=st.data())
@example(data=None)
def test_any_request_is_taken_or_refused(version: int, data: Any) -> None:
    samples = REQUESTS_1 if version == 1 else REQUESTS_2
    text = (
        data.draw(mutated(samples) | damaged(samples)) if data is not None else '{"type":"ack","id":"s","offset":1e999}'
    )
    try:
        request = decode_request(text, version)
    except MessageError as exc:
        assert_refusal_can_be_sent(exc, text)
    else:
        describe_request(request).encode("utf-8", "backslashreplace")
        if not isinstance(request, agent.Stdin):  # in version 2 its data is a frame's
            assert decode_request(encode(request).decode("ascii"), version) is not None


@pytest.mark.parametrize("version", [1, 2])
@given(data=st.data())
def test_any_event_is_taken_skipped_or_refused(version: int, data: Any) -> None:
    samples = EVENTS_1 if version == 1 else EVENTS_2
    text = data.draw(mutated(samples) | damaged(samples))
    try:
        event = decode_event(text, version)
    except MessageError as exc:
        assert_refusal_can_be_sent(exc, text)
    else:
        assert event is None or isinstance(event, agent.Event)
        if isinstance(event, Error):
            event.message.encode()  # people read it
        if event is not None:
            encode(event).decode("ascii")


@pytest.mark.parametrize("depth", [100, 900, 1_000, 10_000, 200_000])
@pytest.mark.parametrize("unit", ['{"x":', "[", '{"type":"exec","id":"s","cmd":['])
@pytest.mark.parametrize("end", ["", "0"])
def test_nesting_of_any_depth_is_refused(depth: int, unit: str, end: str) -> None:
    for decode in (decode_request, decode_event):
        for version in (1, 2):
            with pytest.raises(MessageError, match=r"nested too deeply|not valid JSON|must be a JSON object"):
                decode(unit * depth + end, version)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-0.0", "1E5", "0.1", "1" * 4301])
@pytest.mark.parametrize(
    ("kind", "name"), [("resize", "width"), ("ack", "offset"), ("resume", "window"), ("stats", "processes")]
)
def test_a_number_that_is_no_integer_of_ours_is_refused(kind: str, name: str, number: str) -> None:
    fields = {key: value for key, value in REQUESTS_2[kind].items() if key != name}
    text = json.dumps({"type": kind, **fields})[:-1] + f',"{name}":{number}}}'
    with pytest.raises(MessageError, match=f"{name}|not valid JSON"):
        decode_request(text, 2)


def test_of_a_name_that_is_there_twice_the_last_one_counts() -> None:
    assert decode_request('{"type":"attach","id":"first","type":"close_stdin","id":"last"}') == agent.CloseStdin("last")


# Data frames.


@given(st.binary(max_size=600))
@example(b"")
@example(b"\x00")
@example(b"\x00\x00x")
@example(b"\x03\x01s")
@example(b"\x01\x02\xc3")
@example(b"\x01\xff" + b"s" * 254)
def test_any_bytes_are_a_data_frame_or_refused(frame: bytes) -> None:
    for kind in (bytes, bytearray):
        try:
            stream, session_id, data = decode_data_frame(kind(frame))
        except MessageError as exc:
            assert_refusal_can_be_sent(exc, "")
        else:
            assert data_frame_prefix(stream, session_id) + data == frame


@given(
    st.sampled_from(Stream), st.text(min_size=1, max_size=60).filter(lambda text: len(text.encode()) < 256), st.binary()
)
def test_every_data_frame_survives_the_way(stream: Stream, session_id: str, data: bytes) -> None:
    assert decode_data_frame(data_frame_prefix(stream, session_id) + data) == (stream, session_id, data)


# Docker's stream.

FRAMES = st.lists(st.tuples(st.sampled_from(Stream), st.binary(max_size=300)), max_size=8)


def in_pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts})
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]


@given(FRAMES, st.lists(st.integers(0, 5000), max_size=12))
def test_dockers_frames_come_back_from_pieces_of_any_size(frames: list[tuple[Stream, bytes]], cuts: list[int]) -> None:
    decoder = DockerStreamDecoder()
    whole = b"".join(encode_docker_frame(stream, data) for stream, data in frames)
    found = [frame for piece in in_pieces(whole, cuts) for frame in decoder.feed(piece)]
    assert found == frames
    decoder.finish()


@given(FRAMES.filter(bool), st.integers(1, 300))
def test_dockers_stream_that_is_cut_within_a_frame_is_an_error(frames: list[tuple[Stream, bytes]], cut: int) -> None:
    decoder = DockerStreamDecoder()
    *before, last = [encode_docker_frame(stream, data) for stream, data in frames]
    assert decoder.feed(b"".join(before) + last[: -min(cut, len(last) - 1)]) == frames[:-1]
    with pytest.raises(DockerStreamError, match="within a frame"):
        decoder.finish()


@given(st.lists(st.binary(max_size=100), max_size=10))
@example([b"\x01\0\0\0\xff\xff\xff\xff", b"x"])
@example([b"\x01", b"\0\0", b"\x01\0\0\0\0"])
def test_any_bytes_are_dockers_frames_or_an_error_however_they_are_cut(pieces: list[bytes]) -> None:
    def outcome(parts: list[bytes]) -> tuple[list[tuple[Stream, bytes]], bool]:
        decoder, found = DockerStreamDecoder(), []
        try:
            for part in parts:
                found += decoder.feed(part)
        except DockerStreamError:
            return found, False
        return found, True

    data = b"".join(pieces)
    in_parts, by_byte = outcome(pieces), outcome([data[at : at + 1] for at in range(len(data))])
    assert in_parts[1] == by_byte[1]
    assert in_parts[0] == by_byte[0][: len(in_parts[0])]  # what a bad header in the same piece takes with it
    assert (
        b"".join(encode_docker_frame(stream, part) for stream, part in by_byte[0])
        == data[: sum(8 + len(part) for _, part in by_byte[0])]
    )

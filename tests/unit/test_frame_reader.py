"""agent.FrameReader: what it makes of a stream that is cut anywhere is what the library's reader would."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import CloseCode, Frame, Opcode
from websockets.protocol import SERVER, Protocol

import agent
from agent import LARGE_PART, LARGE_PAYLOAD, FrameReader, make_frame

SIZES = [0, 1, 125, LARGE_PAYLOAD - 1, LARGE_PAYLOAD, LARGE_PAYLOAD + 1, 3 * LARGE_PAYLOAD]
cuts = st.lists(st.sampled_from([1, 2, LARGE_PART - 1, LARGE_PART, LARGE_PAYLOAD, 1 << 20]), min_size=1, max_size=8)


def protocol_with_our_reader() -> Protocol:
    protocol = Protocol(SERVER, max_size=None)
    protocol.reader = FrameReader()
    protocol.parser = protocol.parse()
    next(protocol.parser)
    return protocol


def content(size: int) -> bytes:
    return bytes(range(251)) * (size // 251) + bytes(size % 251)


@given(sizes=st.lists(st.sampled_from(SIZES), min_size=1, max_size=6), cuts=cuts)
def test_frames_that_come_in_any_pieces_are_the_frames_that_were_sent(sizes, cuts):
    stream = b"".join(b"".join(make_frame(Opcode.BINARY, [content(size)], masked=True)) for size in sizes)
    protocol = protocol_with_our_reader()
    received = []
    position = index = 0
    while position < len(stream):
        step = cuts[index % len(cuts)] if index < 50 else 1 << 20
        protocol.receive_data(stream[position : position + step])
        received += protocol.events_received()
        position, index = position + step, index + 1
    assert all(isinstance(frame, Frame) and frame.fin for frame in received)
    assert [bytes(frame.data) for frame in received] == [content(size) for size in sizes]
    assert not protocol.reader.buffer


def test_a_payload_in_tiny_pieces_takes_no_more_memory_than_it_has_bytes():
    protocol = protocol_with_our_reader()
    size = 256 << 10
    stream = b"".join(make_frame(Opcode.BINARY, [content(size)], masked=True))
    tracemalloc.start()
    try:
        for position in range(0, len(stream), 2):
            protocol.receive_data(stream[position : position + 2])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    (frame,) = protocol.events_received()
    assert frame.data == content(size)
    assert peak < 5 * size  # as many objects as pieces would be twenty times that


def test_an_end_of_the_stream_within_a_large_payload_is_an_error():
    protocol = protocol_with_our_reader()
    protocol.receive_data(b"".join(make_frame(Opcode.BINARY, [content(1 << 20)], masked=True))[:-1])
    protocol.receive_eof()
    assert isinstance(protocol.parser_exc, EOFError)
    assert "1048575" in str(protocol.parser_exc)


@pytest.mark.parametrize("cut", [100, LARGE_PAYLOAD, 5 * LARGE_PAYLOAD])
def test_what_comes_after_an_error_is_not_kept(cut):
    protocol = protocol_with_our_reader()
    protocol.state = agent.OPEN
    protocol.receive_data(b"".join(make_frame(Opcode.BINARY, [content(1 << 20)], masked=True))[:cut])
    protocol.fail(CloseCode.INTERNAL_ERROR)
    for _ in range(50):
        protocol.receive_data(bytes(LARGE_PAYLOAD))
    reader = protocol.reader
    assert isinstance(reader, FrameReader)
    assert len(reader.buffer) + sum(map(len, reader._parts or ())) <= LARGE_PAYLOAD

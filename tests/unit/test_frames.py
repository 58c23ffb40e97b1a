"""The agent's own WebSocket framing against the library's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode
from websockets.streams import StreamReader

from agent import frame_header, make_frame

# The length's encoding changes at 126 and at 65536 (RFC 6455 §5.2).
BOUNDARIES = [0, 1, 125, 126, 127, 65535, 65536, 65537, 1 << 20]
sides = pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])


def parse(data: bytes, masked: bool) -> tuple[Frame, bytes]:
    """What the library makes of ``data``: a frame, and the bytes behind it."""
    reader = StreamReader()
    reader.feed_data(data)
    parser = Frame.parse(reader.read_exact, mask=masked)
    try:
        next(parser)
    except StopIteration as done:
        rest = b""
        left = reader.read_exact(len(reader.buffer))
        try:
            next(left)
        except StopIteration as read:
            rest = read.value
        return done.value, rest
    raise AssertionError("the frame's header promises more bytes than there are")


@sides
@pytest.mark.parametrize("size", BOUNDARIES)
def test_the_library_reads_a_frame_of_any_size(size, masked):
    payload = bytes(range(251)) * (size // 251 + 1)
    frame, rest = parse(b"".join(make_frame(Opcode.TEXT, [payload[:size]], masked)), masked)
    assert (frame.opcode, frame.fin, frame.data, rest) == (Opcode.TEXT, True, payload[:size], b"")
    assert not (frame.rsv1 or frame.rsv2 or frame.rsv3)


@pytest.mark.parametrize("size", BOUNDARIES)
def test_an_unmasked_frame_is_byte_for_byte_the_librarys(size):
    expected = Frame(Opcode.BINARY, b"x" * size).serialize(mask=False)
    assert b"".join(make_frame(Opcode.BINARY, [b"x" * size], masked=False)) == expected


@pytest.mark.parametrize("size", BOUNDARIES)
def test_a_masked_header_is_the_librarys_up_to_the_key(size):
    expected = Frame(Opcode.BINARY, b"x" * size).serialize(mask=True)
    header = frame_header(Opcode.BINARY, size, b"KEY!")
    assert header[-4:] == b"KEY!"
    assert header[:-4] == expected[: len(header) - 4]
    assert len(header) + size == len(expected)


@sides
@given(payload=st.lists(st.binary(max_size=200), max_size=6), opcode=st.sampled_from([Opcode.TEXT, Opcode.BINARY]))
def test_a_payload_in_pieces_is_one_payload(masked, payload, opcode):
    pieces = [memoryview(piece) if index % 2 else piece for index, piece in enumerate(payload)]
    frame, rest = parse(b"".join(make_frame(opcode, pieces, masked)), masked)
    assert (frame.opcode, bytes(frame.data), rest) == (opcode, b"".join(payload), b"")


@sides
def test_frames_follow_each_other_without_a_gap(masked):
    payloads = [b"", b"x" * 125, b"y" * 126, b"z" * 65536, b"end"]
    data = b"".join(b"".join(make_frame(Opcode.TEXT, [payload], masked)) for payload in payloads)
    for payload in payloads:
        frame, data = parse(data, masked)
        assert frame.data == payload
    assert data == b""


def test_an_unmasked_payload_is_not_copied():
    payload = [b"a" * 1000, memoryview(b"b" * 1000)]
    _, *buffers = make_frame(Opcode.TEXT, payload, masked=False)
    assert all(sent is given_ for sent, given_ in zip(buffers, payload, strict=True))


def test_every_masked_frame_has_a_key_of_its_own():
    # RFC 6455 §5.3: the key must not be predictable from the last one.
    keys = {bytes(make_frame(Opcode.TEXT, [b"x"], masked=True)[0][2:6]) for _ in range(50)}
    assert len(keys) > 45


def test_masking_leaves_the_callers_buffer_alone():
    data = bytearray(b"keep me")
    make_frame(Opcode.TEXT, [data], masked=True)
    assert data == b"keep me"

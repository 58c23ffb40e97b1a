"""What waits to be sent on one connection: order, turns, bounds, and who is woken when."""

import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting import PATIENCE, InThread, wait_until
from websockets.frames import Frame, Opcode
from websockets.streams import StreamReader

import agent
from agent import (
    BATCH_SIZE,
    CHANNEL_LIMIT,
    CHANNEL_MINIMUM,
    FRAME_LIMIT,
    OUTBOX_LIMIT,
    PACED_BURST,
    PACED_RATE,
    PONGS_LIMIT,
    SEND_NOW_LIMIT,
    Ack,
    Channel,
    Error,
    Exit,
    Flow,
    LifetimeExpired,
    Outbox,
    Output,
    Resumed,
    Started,
    Stream,
    decode_event,
)

OUT, ERR = Stream.STDOUT, Stream.STDERR
PING, PONG, CLOSE = b"\x89\x00", b"\x8a\x00", b"\x88\x02\x03\xe8"
NOISE = random.Random(3).randbytes(8 << 20)


def frames_of(data: bytes, masked: bool = False):
    """The frames in ``data``, as the library reads them; fails if they are not whole."""
    reader = StreamReader()
    reader.feed_data(data)
    found = []
    while reader.buffer:
        parser = Frame.parse(reader.read_exact, mask=masked)
        try:
            next(parser)
        except StopIteration as done:
            found.append(done.value)
        else:
            raise AssertionError("a frame is not whole")
    return found


def events_of(data: bytes, masked: bool = False):
    """The events in ``data``; a control frame stands as its opcode."""
    return [
        decode_event(bytes(frame.data).decode()) if frame.opcode is Opcode.TEXT else frame.opcode
        for frame in frames_of(data, masked)
    ]


def wire(outbox: Outbox, batch) -> bytes:
    """The bytes of a batch, as the writer makes them."""
    return b"".join(
        item if isinstance(item, bytes) else b"".join(item.frame(outbox.masked))  # a turn of a channel
        for item in batch
    )


def take_batch(outbox: Outbox):
    """The events of the next batch."""
    rest, batch = outbox.take()
    assert rest == []
    return events_of(wire(outbox, batch), outbox.masked)


def take_all(outbox: Outbox):
    events = []
    while outbox._frames or outbox._ready:
        events += take_batch(outbox)
    return events


def run_writer(outbox: Outbox, sent: list[bytes]) -> None:
    """A connection's writer: takes until the end."""
    while (taken := outbox.take()) is not None:
        rest, batch = taken
        sent.append(b"".join(rest) + wire(outbox, batch))


def merged(events):
    """Events with neighbouring output of one session and stream joined."""
    result = []
    for event in events:
        last = result[-1] if result else None
        if (
            isinstance(event, Output)
            and isinstance(last, Output)
            and (last.id, last.stream) == (event.id, event.stream)
        ):
            result[-1] = Output(event.id, event.stream, last.data + event.data)
        else:
            result.append(event)
    return result


@pytest.fixture
def outbox():
    return Outbox(masked=False)


# ── order ─────────────────────────────────────────────────────────────────────

OUTPUTS = st.tuples(st.sampled_from([OUT, ERR]), st.binary(min_size=1, max_size=50))
MESSAGES = st.builds(Exit, st.just("x"), st.integers(0, 255)) | st.builds(Error, st.just("x"), st.text(max_size=5))


@given(
    st.lists(st.tuples(st.integers(0, 2), OUTPUTS | MESSAGES) | st.just("take"), max_size=60),
    st.booleans(),
)
def test_a_sessions_messages_keep_their_order_whatever_others_send(steps, masked):
    outbox = Outbox(masked)
    channels = [Channel(outbox, f"session {number}") for number in range(3)]
    put = [[], [], []]
    sent = []
    for step in steps:
        if step == "take":
            if outbox._ready:
                sent += take_batch(outbox)
            continue
        number, what = step
        if isinstance(what, tuple):
            channels[number].put(*what)
            put[number].append(Output(f"session {number}", *what))
        else:
            message = type(what)(f"session {number}", *[getattr(what, name) for name in what.__slots__[1:2]])
            channels[number].send(message)
            put[number].append(message)
    sent += take_all(outbox)
    for number in range(3):
        own = [event for event in sent if event.id == f"session {number}"]
        assert merged(own) == merged(put[number])


def test_output_that_waits_is_sent_as_one_frame(outbox):
    # A deployed Go backend drops what exceeds 64 messages a session.
    channel = Channel(outbox, "s")
    for at in range(0, 100_000, 100):
        channel.put(OUT, NOISE[at : at + 100])
    channel.send(Exit("s", 0))
    assert take_all(outbox) == [Output("s", OUT, NOISE[:100_000]), Exit("s", 0)]


def test_output_of_two_streams_is_never_mixed(outbox):
    channel = Channel(outbox, "s")
    for stream, data in ((OUT, b"1"), (OUT, b"2"), (ERR, b"3"), (OUT, b"4"), (OUT, b"5")):
        channel.put(stream, data)
    expected = [Output("s", OUT, b"12"), Output("s", ERR, b"3"), Output("s", OUT, b"45")]
    assert take_all(outbox) == expected


def test_output_is_not_merged_across_a_message(outbox):
    channel = Channel(outbox, "s")
    channel.put(OUT, b"before")
    channel.send(Error("s", "in between"))
    channel.put(OUT, b"after")
    expected = [Output("s", OUT, b"before"), Error("s", "in between"), Output("s", OUT, b"after")]
    assert take_all(outbox) == expected


def test_a_frame_of_output_has_a_limit(outbox):
    channel = Channel(outbox, "s")
    for at in range(0, 8 << 20, 192 << 10):
        channel.put(OUT, NOISE[at : at + (192 << 10)])
    events = take_all(outbox)
    assert b"".join(event.data for event in events) == NOISE
    assert max(len(event.data) for event in events) <= FRAME_LIMIT
    assert len(events) <= 11, "the frames are smaller than they have to be"


def test_sessions_take_turns_of_a_frame(outbox):
    flood, quiet = Channel(outbox, "flood"), Channel(outbox, "quiet")
    for at in range(0, 8 << 20, 256 << 10):
        flood.put(OUT, NOISE[at : at + (256 << 10)])
    quiet.put(OUT, b"me too")
    ids = [event.id for event in take_all(outbox)]
    assert ids.index("quiet") <= 1
    assert ids.count("flood") == 8


def test_many_busy_sessions_all_get_their_turn(outbox):
    channels = [Channel(outbox, str(number)) for number in range(20)]
    for _ in range(3):
        for channel in channels:
            channel.put(OUT, NOISE[: FRAME_LIMIT // 2 + 1])
    ids = [event.id for event in take_all(outbox)]
    for start in range(0, 60, 20):
        assert sorted(ids[start : start + 20], key=int) == [str(number) for number in range(20)]


def test_control_frames_and_messages_without_a_session_go_first(outbox):
    channel = Channel(outbox, "s")
    channel.put(OUT, NOISE)
    outbox.push_frame(PING)
    outbox.send(LifetimeExpired())
    outbox.push_frame(PONG)
    assert take_batch(outbox)[:3] == [Opcode.PING, LifetimeExpired(), Opcode.PONG]


def test_a_batch_is_not_larger_than_it_has_to_be(outbox):
    # So that a ping that comes meanwhile is in the next one.
    for number in range(50):
        Channel(outbox, str(number)).put(OUT, NOISE[: BATCH_SIZE // 4])
    assert len(take_batch(outbox)) == 4


def test_a_masked_outbox_sends_masked_frames():
    outbox = Outbox(masked=True)
    channel = Channel(outbox, "s")
    channel.put(OUT, b"a" * 70_000)
    channel.put(OUT, b"b")
    outbox.send(LifetimeExpired())
    assert take_all(outbox) == [LifetimeExpired(), Output("s", OUT, b"a" * 70_000 + b"b")]


# ── pongs ─────────────────────────────────────────────────────────────────────


def test_every_pong_waits_up_to_a_bound_and_then_the_latest(outbox):
    pongs = [b"\x8a\x0a%010d" % number for number in range(20_000)]
    fitting = PONGS_LIMIT // len(pongs[0]) + 1
    for pong in pongs[: fitting - 1]:
        outbox.push_frame(pong)
    assert outbox.take()[1] == pongs[: fitting - 1]
    for pong in pongs:
        outbox.push_frame(pong)
    assert outbox.take()[1] == [*pongs[: fitting - 1], pongs[-1]]
    assert outbox.waiting() == 0


def test_a_masked_pong_is_a_pong_too():
    outbox = Outbox(masked=True)
    for number in range(5000):
        outbox.push_frame(b"\x8a\x84key!%04d" % number)
    *_, last = outbox.take()[1]
    assert last == b"\x8a\x84key!4999"
    assert outbox.waiting() == 0


def test_a_pong_replaces_nothing_but_a_pong(outbox):
    for frame in (PONG, PING, PONG, CLOSE):
        outbox.push_frame(frame)
    assert outbox.take()[1] == [PONG, PING, PONG, CLOSE]


# ── bounds ────────────────────────────────────────────────────────────────────


def test_a_session_may_queue_up_to_its_limit(outbox):
    channel = Channel(outbox, "s")
    channel.put(OUT, NOISE[: CHANNEL_LIMIT - 1])
    assert channel.call_when_room(lambda: None) is True
    assert channel.wait_for_room() is True
    channel.put(OUT, b"x")
    assert channel.call_when_room(lambda: None) is False


def test_a_session_that_is_full_does_not_fill_another(outbox):
    full, other = Channel(outbox, "full"), Channel(outbox, "other")
    full.put(OUT, NOISE[:CHANNEL_LIMIT])
    assert other.call_when_room(lambda: None) is True


@pytest.mark.parametrize("count", [1, 10, 256, 1024])
def test_many_sessions_share_a_bound(outbox, count):
    chunk = NOISE[: 32 << 10]
    channels = [Channel(outbox, str(number)) for number in range(count)]
    total, went_on = 0, True
    while went_on:
        went_on = False
        for channel in channels:
            if channel.call_when_room(lambda: None):
                channel.put(OUT, chunk)
                total += len(chunk)
                went_on = True
    assert total <= max(OUTBOX_LIMIT, count * CHANNEL_MINIMUM) + count * len(chunk)
    assert total >= min(CHANNEL_LIMIT, OUTBOX_LIMIT // count) * count


def test_room_comes_back_as_frames_are_taken(outbox):
    channel = Channel(outbox, "s")
    channel.put(OUT, NOISE[: 2 * CHANNEL_LIMIT])
    waiter = InThread(channel.wait_for_room)
    take_all(outbox)
    assert waiter.result() is True


@pytest.mark.parametrize("leave", [Outbox.end, Outbox.stop])
def test_who_waits_for_room_is_let_go_at_the_end(outbox, leave):
    channels = [Channel(outbox, str(number)) for number in range(3)]
    for channel in channels:
        channel.put(OUT, NOISE[:CHANNEL_LIMIT])
    waiters = [InThread(channel.wait_for_room) for channel in channels for _ in range(2)]
    leave(outbox)
    assert [waiter.result() for waiter in waiters] == [False] * 6


def test_a_callback_comes_once_and_when_there_is_room(outbox):
    channel = Channel(outbox, "s")
    channel.put(OUT, NOISE[:CHANNEL_LIMIT])
    calls = []
    assert channel.call_when_room(lambda: calls.append(channel._size)) is False
    assert calls == []
    take_all(outbox)
    assert calls == [0]
    channel.put(OUT, NOISE[:CHANNEL_LIMIT])
    take_all(outbox)
    outbox.end()
    assert calls == [0]


def test_where_there_is_room_no_callback_is_kept(outbox):
    channel = Channel(outbox, "s")
    calls = []
    assert channel.call_when_room(lambda: calls.append("room")) is True
    channel.put(OUT, NOISE[:CHANNEL_LIMIT])
    take_all(outbox)
    outbox.end()
    assert calls == []


@pytest.mark.parametrize("leave", [Outbox.end, Outbox.stop])
def test_a_callback_comes_once_at_the_end(outbox, leave):
    channel = Channel(outbox, "s")
    channel.put(OUT, NOISE[:CHANNEL_LIMIT])
    calls = []
    channel.call_when_room(lambda: calls.append(channel.call_when_room(lambda: None)))
    leave(outbox)
    outbox.stop()
    outbox.end()
    assert calls == [True], "at the end there is room: what is put is dropped"


def test_a_callback_may_use_the_outbox(outbox):
    # It would block for ever if it were called with the lock held.
    channel = Channel(outbox, "s")
    channel.put(OUT, NOISE[:CHANNEL_LIMIT])

    def put_more():
        channel.put(ERR, b"more")
        outbox.push_frame(PING)

    channel.call_when_room(put_more)
    assert InThread(take_all, outbox).result()[-2:] == [Opcode.PING, Output("s", ERR, b"more")]


# ── end ───────────────────────────────────────────────────────────────────────


def test_the_writer_is_let_go_at_the_end(outbox):
    writer = InThread(outbox.take)
    outbox.end()
    assert writer.result() is None


def test_after_the_closing_handshake_began_only_control_frames_go_out(outbox):
    channel = Channel(outbox, "s")
    channel.put(OUT, b"too late")
    outbox.push_frame(CLOSE)
    outbox.stop()
    channel.put(OUT, b"too late")
    channel.send(Exit("s", 0))
    outbox.send(LifetimeExpired())
    outbox.push_frame(b"")
    assert outbox.take()[1] == [CLOSE, b""]


def test_after_the_end_nothing_is_kept(outbox):
    channel = Channel(outbox, "s")
    channel.put(OUT, b"x")
    outbox.push_frame(PING)
    outbox.end()
    channel.put(OUT, b"x")
    channel.send(Exit("s", 0))
    outbox.push_frame(PING)
    outbox.send(LifetimeExpired())
    assert (list(outbox._frames), list(outbox._ready), channel._size) == ([], [], 0)
    assert outbox.take() is None


# ── flush and calm ────────────────────────────────────────────────────────────


def test_flush_waits_until_the_writer_has_sent_what_it_took(outbox):
    Channel(outbox, "s").put(OUT, b"x")
    flush = InThread(outbox.flush, 20)
    outbox.take()
    assert outbox.flush(0.01) is False  # taken, but not sent
    writer = InThread(outbox.take)  # it comes back for more: the first batch is sent
    assert flush.result() is True
    outbox.end()
    assert writer.result() is None


def test_flush_gives_up_in_time(outbox):
    Channel(outbox, "s").put(OUT, b"x")
    assert outbox.flush(0.01) is False


def test_flush_has_nothing_to_wait_for_in_an_empty_outbox(outbox):
    assert outbox.flush(0) is True


@pytest.mark.parametrize("leave", [Outbox.end, Outbox.stop])
def test_flush_is_let_go_at_the_end(outbox, leave):
    Channel(outbox, "s").put(OUT, b"x")
    flush = InThread(outbox.flush, 20)
    leave(outbox)
    assert flush.result() is None


def test_calm_comes_when_the_replies_are_taken(outbox):
    for _ in range(100):
        outbox.send(Error("", "no"))
    outbox.wait_for_calm(1 << 20)  # far below: does not wait
    waiter = InThread(outbox.wait_for_calm, 100)
    sent = []
    writer = InThread(run_writer, outbox, sent)
    waiter.result()
    outbox.end()
    writer.result()
    assert len(events_of(b"".join(sent))) == 100


def test_who_waits_for_calm_is_let_go_at_the_end(outbox):
    outbox.send(Error("", "no" * 1000))
    waiter = InThread(outbox.wait_for_calm, 100)
    outbox.end()
    waiter.result()


# ── sending from the thread that puts ─────────────────────────────────────────


class Socket:
    """What a socket does to a send that may not wait: takes ``room`` bytes of it."""

    def __init__(self, outbox: Outbox, room: int) -> None:
        self.outbox = outbox
        self.room = room
        self.sent = b""
        outbox.allow_sending_now(self.send_now)

    def send_now(self, batch):
        data = wire(self.outbox, batch)
        self.sent += data[: self.room]
        rest = data[self.room :]
        self.room -= min(self.room, len(data))
        return [rest] if rest else []

    def write_all(self) -> None:
        """Send what is left, as the writer does."""
        while self.outbox._rest or self.outbox._frames or self.outbox._ready:
            rest, batch = self.outbox.take()
            self.sent += b"".join(rest) + wire(self.outbox, batch)


def test_something_small_goes_out_at_once(outbox):
    sock = Socket(outbox, room=1 << 20)
    channel = Channel(outbox, "s")
    channel.put(OUT, b"echo")
    outbox.send(LifetimeExpired())
    channel.send(Exit("s", 0))
    assert events_of(sock.sent) == [Output("s", OUT, b"echo"), LifetimeExpired(), Exit("s", 0)]
    assert outbox.flush(0) is True


def test_something_large_is_left_to_the_writer(outbox):
    sock = Socket(outbox, room=1 << 30)
    Channel(outbox, "s").put(OUT, NOISE[: SEND_NOW_LIMIT + 1])
    assert sock.sent == b""
    assert len(take_all(outbox)) == 1


def test_nothing_is_sent_at_once_while_the_writer_sends(outbox):
    sock = Socket(outbox, room=1 << 20)
    channel = Channel(outbox, "s")
    channel.put(OUT, NOISE[: SEND_NOW_LIMIT + 1])
    outbox.take()
    channel.put(OUT, b"behind it")
    assert sock.sent == b""


def test_nothing_is_sent_at_once_before_the_stream_ends(outbox):
    sock = Socket(outbox, room=1 << 20)
    outbox.push_frame(b"")
    Channel(outbox, "s").put(OUT, b"x")
    assert sock.sent == b""


def test_what_the_socket_did_not_take_goes_out_before_anything_else(outbox):
    sock = Socket(outbox, room=10)
    channel = Channel(outbox, "s")
    channel.put(OUT, b"first")
    assert len(sock.sent) == 10
    sock.room = 1 << 20  # the peer reads again, before the writer is awake
    channel.put(OUT, b"second")
    outbox.send(LifetimeExpired())
    sock.write_all()
    events = events_of(sock.sent)
    assert LifetimeExpired() in events
    assert [event.data for event in events if isinstance(event, Output)] == [b"first", b"second"]


def test_flush_waits_for_what_the_socket_did_not_take(outbox):
    sock = Socket(outbox, room=3)
    Channel(outbox, "s").put(OUT, b"first")
    assert outbox.flush(0.01) is False
    writer = InThread(run_writer, outbox, [])
    assert outbox.flush(20) is True
    outbox.end()
    writer.result()
    assert sock.sent


def test_the_writer_does_not_take_the_turn_of_a_thread_that_sends(outbox):
    # The writer may come for the first time while somebody sends already.
    sends, go_on = [], threading.Event()

    def send_now(batch):
        sends.append(wire(outbox, batch))
        go_on.wait(PATIENCE)
        return []

    outbox.allow_sending_now(send_now)
    channel = Channel(outbox, "s")
    first = InThread(channel.put, OUT, b"first")
    wait_until(lambda: sends, "the first sends")
    written = []
    writer = InThread(run_writer, outbox, written)
    wait_until(lambda: outbox._work._waiters, "the writer waits")
    second = InThread(channel.put, OUT, b"second")
    wait_until(lambda: not second.running or len(sends) > 1, "the second is queued, or sent")
    at_once = len(sends) + len(written)
    go_on.set()
    for thread in (first, second):
        thread.result()
    outbox.flush(PATIENCE)
    outbox.end()
    writer.result()
    assert at_once == 1, "two threads sent at once"
    assert [event.data for event in events_of(b"".join(sends + written))] == [b"first", b"second"]


def test_many_threads_at_once_keep_every_session_in_order(outbox):
    """Sessions that put as fast as they can, a writer, and a socket that often has no room."""
    pieces, mutex, whims = [], threading.Lock(), random.Random(5)
    busy = []  # whoever sends; more than one at a time is wrong

    def send(data: bytes) -> None:
        busy.append(threading.get_ident())
        pieces.append(data)
        assert busy == [threading.get_ident()], "two threads send at once"
        busy.clear()

    def send_now(batch):
        data = wire(outbox, batch)
        with mutex:
            taken = whims.choice([0, 1, len(data) // 2, len(data), len(data)])
        send(data[:taken])
        return [data[taken:]] if taken < len(data) else []

    def write() -> None:
        while (taken := outbox.take()) is not None:
            rest, batch = taken
            send(b"".join(rest) + wire(outbox, batch))

    def produce(number: int) -> None:
        channel = Channel(outbox, str(number))
        for count in range(500):
            channel.wait_for_room()
            channel.put(OUT if count % 3 else ERR, b"%d;" % count)
        channel.send(Exit(str(number), 0))

    outbox.allow_sending_now(send_now)
    writer = InThread(write)
    producers = [InThread(produce, number) for number in range(8)]
    for producer in producers:
        producer.result()
    assert outbox.flush(20) is True
    outbox.end()
    writer.result()
    events = events_of(b"".join(pieces))
    expected = b"".join(b"%d;" % count for count in range(500))
    for number in range(8):
        own = [event for event in events if event.id == str(number)]
        assert own[-1] == Exit(str(number), 0)
        assert b"".join(event.data for event in own[:-1]) == expected


def test_the_outboxs_limits_fit_each_other():
    assert SEND_NOW_LIMIT < CHANNEL_MINIMUM <= CHANNEL_LIMIT <= OUTBOX_LIMIT
    assert agent.SEND_NOW_BINARY_LIMIT <= FRAME_LIMIT
    assert agent.BATCH_SIZE <= FRAME_LIMIT


def test_a_putting_thread_wakes_the_writer(outbox):
    sent = []
    writer = InThread(run_writer, outbox, sent)
    Channel(outbox, "s").put(OUT, b"x")
    wait_until(lambda: sent, "the writer takes what was put")
    outbox.end()
    writer.result()
    assert events_of(b"".join(sent)) == [Output("s", OUT, b"x")]


# ── pacing ────────────────────────────────────────────────────────────────────


@pytest.fixture
def paced(monkeypatch):
    """A paced outbox whose clock stands still; move it with outbox.advance()."""
    now = [1000.0]
    outbox = Outbox(masked=False, paced=True)
    monkeypatch.setattr(agent.time, "monotonic", lambda: now[0])
    outbox.advance = lambda seconds: now.__setitem__(0, now[0] + seconds)
    return outbox


def small_writes(channel: Channel, count: int, start: int = 0) -> None:
    for number in range(start, start + count):
        channel.put(OUT, b"%d;" % number)


def test_a_session_that_writes_little_by_little_is_made_to_wait_after_a_burst(paced):
    sock = Socket(paced, room=1 << 20)
    channel = Channel(paced, "s")
    small_writes(channel, 100)
    burst = [event.data for event in events_of(sock.sent)]
    assert burst == [b"%d;" % number for number in range(PACED_BURST)]
    paced.advance(1 / PACED_RATE)
    (rest,) = take_batch(paced)
    assert rest.data == b"".join(b"%d;" % number for number in range(PACED_BURST, 100))


def test_the_writer_wakes_when_a_rest_is_over():
    outbox = Outbox(masked=False, paced=True)
    sent = []
    writer = InThread(run_writer, outbox, sent)
    small_writes(Channel(outbox, "s"), 100)
    expected = b"".join(b"%d;" % number for number in range(100))
    wait_until(lambda: sum(len(e.data) for e in events_of(b"".join(sent))) == len(expected), "all of it is sent")
    outbox.end()
    writer.result()
    events = events_of(b"".join(sent))
    assert b"".join(event.data for event in events) == expected
    assert len(events) < 100


def test_what_is_large_or_ends_the_session_or_answers_the_client_does_not_wait(paced):
    sock = Socket(paced, room=1 << 30)
    channels = [Channel(paced, name) for name in ("large", "ends", "answers", "rests")]
    for channel in channels:
        small_writes(channel, PACED_BURST + 1)
    sock.sent = b""
    assert len(paced._ready) == 0
    large, ends, answers, rests = channels
    large.put(OUT, NOISE[:BATCH_SIZE])
    ends.send(Exit("ends", 0))
    answers.refill()
    events = events_of(sock.sent) + take_all(paced)
    assert {event.id for event in events} == {"large", "ends", "answers"}
    assert Exit("ends", 0) in events
    assert rests._entries


def test_a_flush_waits_for_no_rest(paced):
    Socket(paced, room=1 << 20)
    channel = Channel(paced, "s")
    small_writes(channel, PACED_BURST + 1)
    assert paced.flush(0) is False
    assert len(take_batch(paced)) == 1


def test_the_end_frees_those_who_rest(paced):
    channel = Channel(paced, "s")
    Socket(paced, room=1 << 20)
    small_writes(channel, PACED_BURST + 1)
    paced.end()
    assert not channel._entries
    assert paced.take() is None


def test_a_session_that_pauses_has_its_burst_again(paced):
    sock = Socket(paced, room=1 << 20)
    channel = Channel(paced, "s")
    small_writes(channel, PACED_BURST)
    paced.advance(PACED_BURST / PACED_RATE + 1)
    sock.sent = b""
    small_writes(channel, PACED_BURST, start=PACED_BURST)
    assert len(events_of(sock.sent)) == PACED_BURST


def test_an_outbox_that_is_not_paced_makes_nobody_wait(outbox):
    sock = Socket(outbox, room=1 << 20)
    small_writes(Channel(outbox, "s"), 200)
    assert len(events_of(sock.sent)) == 200


def test_a_flow_sends_without_its_lock():
    """Whoever sends may be told of other sessions' ends, and so take the registry's lock, which comes first."""
    outbox = Outbox(masked=False)
    flow = Flow(1 << 20)
    seen = []

    def send_now(batch):
        seen.append((len(batch), flow._lock.locked()))
        return []

    outbox.allow_sending_now(send_now)
    flow.connect(Channel(outbox, "s", binary=True))
    flow.begin(Started("s", 1, "secret"))
    flow.put(OUT, b"data")
    flow.send(Ack("s", 1))
    flow.resume(Channel(outbox, "s", binary=True), Resumed("s", 0, 1), 0, 1 << 20)
    flow.finish(Exit("s", 0))
    assert len(seen) == 5
    assert not any(locked for _, locked in seen)

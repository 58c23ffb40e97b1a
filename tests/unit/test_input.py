"""A child's stdin over real pipes and terminals: order, the limit, and what is left behind: nothing."""

import contextlib
import fcntl
import os
import random
import threading
import tty

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import InThread, open_descriptors, wait_until

import agent
from agent import Input, InputOverflow, ThreadPool, Wakeup

NOISE = random.Random(7).randbytes(4 << 20)


class Pipe:
    """An Input on a pipe, with the pipe's other end and the wake-up of its child's exit."""

    def __init__(self, limit: int = 1 << 30, opened: bool = True) -> None:
        self.pool = ThreadPool()
        self.input = Input(self.pool, limit)
        self.exited = Wakeup()
        self.read_end, self._write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._write_end, False)
        self.capacity = fcntl.fcntl(self._write_end, fcntl.F_GETPIPE_SZ)
        if opened:
            self.open()

    def open(self) -> None:
        self.input.open(self._write_end, self.exited)
        self._write_end = -1

    def read(self, size: int) -> bytes:
        """Read exactly ``size`` bytes, or up to the end."""
        data = b""
        while len(data) < size and (piece := os.read(self.read_end, min(size - len(data), 1 << 20))):
            data += piece
        return data

    def read_to_end(self) -> bytes:
        return self.read(1 << 40)

    def close_read_end(self) -> None:
        if self.read_end >= 0:
            os.close(self.read_end)
            self.read_end = -1

    def close(self) -> None:
        """What a Process does once its child is gone."""
        self.exited.set()
        self.input.discard()
        self.exited.release()
        self.close_read_end()
        if self._write_end >= 0:
            os.close(self._write_end)


def pool_threads():
    return [thread for thread in threading.enumerate() if thread.name == "pool"]


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch):
    """After each test no descriptor is open and no pool thread runs that was not before."""
    monkeypatch.setattr(agent, "IDLE_THREAD_LIFE", 0.02)
    descriptors, threads = open_descriptors(), pool_threads()
    yield
    wait_until(lambda: set(pool_threads()) <= set(threads), "the writer's thread ends")
    wait_until(lambda: open_descriptors() <= descriptors, "every descriptor is closed")


@pytest.fixture
def make_pipe():
    with contextlib.ExitStack() as stack:

        def make(**settings_):
            pipe = Pipe(**settings_)
            stack.callback(pipe.close)
            return pipe

        yield make


def in_pieces(data: bytes, sizes=(1, 10, 1000, 70_000)):
    chance, at = random.Random(len(data)), 0
    while at < len(data):
        size = chance.choice(sizes)
        yield data[at : at + size]
        at += size


# ── order ─────────────────────────────────────────────────────────────────────


@settings(max_examples=50)
@given(st.lists(st.binary(max_size=20) | st.integers(1, 100_000).map(lambda size: NOISE[:size]), max_size=20))
def test_what_is_written_arrives_in_order_and_then_ends(pieces):
    pipe = Pipe()
    try:
        reader = InThread(pipe.read_to_end)
        for piece in pieces:
            pipe.input.write(piece)
        pipe.input.end()
        assert reader.result() == b"".join(pieces)
    finally:
        pipe.close()


def test_a_child_that_reads_late_gets_everything(make_pipe):
    pipe = make_pipe()
    for piece in in_pieces(NOISE):
        pipe.input.write(piece)  # far more than a pipe holds: nothing of it may block
    pipe.input.end()
    assert pipe.read_to_end() == NOISE


def test_what_comes_while_the_rest_is_written_comes_after_it(make_pipe):
    pipe = make_pipe()
    reader = InThread(pipe.read, len(NOISE))
    for piece in in_pieces(NOISE, sizes=(1, 50_000, 200_000)):
        pipe.input.write(piece)
    assert reader.result() == NOISE


def test_what_comes_before_the_child_waits_for_it(make_pipe):
    pipe = make_pipe(opened=False)
    pipe.input.write(b"early ")
    pipe.input.write(b"bird")
    pipe.input.end()
    pipe.open()
    assert pipe.read_to_end() == b"early bird"


def test_an_end_that_comes_before_the_child_closes_at_once(make_pipe):
    pipe = make_pipe(opened=False)
    pipe.input.end()
    pipe.open()
    assert pipe.read_to_end() == b""


def test_a_small_write_needs_no_thread(make_pipe):
    pipe = make_pipe()
    before = len(pool_threads())
    pipe.input.write(b"x" * 1000)
    assert len(pool_threads()) == before
    assert pipe.read(1000) == b"x" * 1000


# ── limit ─────────────────────────────────────────────────────────────────────


def test_more_than_the_limit_is_refused_and_nothing_of_it_taken(make_pipe):
    pipe = make_pipe(limit=200_000)
    first = NOISE[:150_000]
    pipe.input.write(first)
    waiting = len(first) - pipe.capacity
    with pytest.raises(InputOverflow, match=f"{waiting} bytes are waiting, and 200000 is the limit"):
        pipe.input.write(NOISE[:200_000])
    pipe.input.write(b"what fits")
    pipe.input.end()
    assert pipe.read_to_end() == first + b"what fits"


def test_the_limit_counts_what_the_child_has_not_been_given(make_pipe):
    pipe = make_pipe(limit=100_000)
    reader = InThread(pipe.read, 2_000_000)
    for at in range(0, 2_000_000, 50_000):
        wait_until(lambda: pipe.input._queued <= 50_000, "the child reads")
        pipe.input.write(NOISE[at : at + 50_000])
    assert reader.result() == NOISE[:2_000_000]


def test_exactly_the_limit_fits(make_pipe):
    pipe = make_pipe(limit=100_000)
    pipe.input.write(NOISE[:100_000])
    with pytest.raises(InputOverflow):
        pipe.input.write(NOISE[:100_000])
    assert pipe.read(100_000) == NOISE[:100_000]


def test_the_limit_holds_before_the_child_is_there(make_pipe):
    pipe = make_pipe(limit=10, opened=False)
    pipe.input.write(b"0123456789")
    with pytest.raises(InputOverflow):
        pipe.input.write(b"x")


def test_no_bytes_never_exceed_the_limit(make_pipe):
    pipe = make_pipe(limit=0)
    pipe.input.write(b"")
    with pytest.raises(InputOverflow):
        pipe.input.write(b"x")


# ── end ───────────────────────────────────────────────────────────────────────


def test_the_end_comes_after_the_queue(make_pipe):
    pipe = make_pipe()
    pipe.input.write(NOISE[:1_000_000])
    pipe.input.end()
    assert pipe.read(999_999) == NOISE[:999_999]
    assert pipe.read_to_end() == NOISE[999_999:1_000_000]


def test_what_comes_after_the_end_is_dropped(make_pipe):
    pipe = make_pipe()
    pipe.input.write(b"last")
    pipe.input.end()
    pipe.input.write(b" words")
    pipe.input.end()
    assert pipe.read_to_end() == b"last"


def test_a_child_that_closes_its_stdin_is_no_error(make_pipe):
    pipe = make_pipe()
    pipe.input.write(NOISE)
    pipe.close_read_end()
    wait_until(lambda: pipe.input._fd < 0, "the broken pipe is closed")
    pipe.input.write(b"into the void")
    pipe.input.end()
    assert pipe.input._queued == 0


# ── the child is gone ─────────────────────────────────────────────────────────


def blocked(make_pipe) -> Pipe:
    """A pipe whose writer waits, because nobody reads."""
    pipe = make_pipe()
    pipe.input.write(NOISE)
    wait_until(lambda: pipe.input._writing, "a thread writes")
    return pipe


@pytest.mark.parametrize("order", ["exit first", "discard first"])
def test_discarding_lets_a_blocked_writer_go_and_leaves_nothing(make_pipe, order):
    # A background child may hold the pipe's other end for ever: only the exit says that it is over.
    pipe = blocked(make_pipe)
    if order == "exit first":
        pipe.exited.set()
    pipe.input.discard()
    pipe.exited.set()
    wait_until(lambda: pipe.input._fd < 0, "the pipe is closed")
    wait_until(lambda: not pool_threads(), "the writer's thread ends")
    assert pipe.input._queued == 0
    assert set(pipe.read_to_end()) <= set(NOISE)  # its end is seen


def test_an_exit_alone_ends_a_blocked_writer(make_pipe):
    pipe = blocked(make_pipe)
    pipe.exited.set()
    wait_until(lambda: pipe.input._fd < 0, "the pipe is closed")
    assert pipe.input._queued == 0


def test_a_closed_reader_ends_a_blocked_writer(make_pipe):
    pipe = blocked(make_pipe)
    pipe.close_read_end()
    wait_until(lambda: pipe.input._fd < 0, "the pipe is closed")


def test_discarding_twice_and_writing_afterwards_is_harmless(make_pipe):
    pipe = make_pipe()
    pipe.input.discard()
    pipe.input.discard()
    pipe.input.write(b"x")
    pipe.input.end()
    assert pipe.read_to_end() == b""


def test_discarding_before_the_child_is_there_closes_its_pipe_later(make_pipe):
    pipe = make_pipe(opened=False)
    pipe.input.write(b"x")
    pipe.input.discard()
    pipe.open()
    assert pipe.read_to_end() == b""


def test_discarding_and_writing_at_once_leave_nothing():
    for _ in range(100):
        pipe = Pipe()
        threads = [InThread(pipe.input.write, NOISE[:100_000]), InThread(pipe.input.end), InThread(pipe.close)]
        for thread in threads:
            thread.result()
    # nothing_is_left says the rest


def test_without_a_thread_for_the_rest_input_goes_on(monkeypatch, make_pipe, caplog):
    pipe = make_pipe()

    def refuse(thread):
        raise RuntimeError("can't start new thread")  # the system's own limit is not for a test to reach

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        pipe.input.write(NOISE[:200_000])
    assert [record.message[:18] for record in caplog.records] == ["stdin: no thread t"]
    assert pipe.read(pipe.capacity) == NOISE[: pipe.capacity]
    pipe.input.write(b"more")  # by now there is a thread again
    pipe.input.end()
    assert pipe.read_to_end() == NOISE[pipe.capacity : 200_000] + b"more"


def test_however_much_comes_while_there_is_no_thread_one_retry_is_enough(monkeypatch, make_pipe):
    pipe = make_pipe()

    def refuse(thread):
        raise RuntimeError("can't start new thread")  # the system's own limit is not for a test to reach

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        pipe.input.write(NOISE[:200_000])
        for number in range(100):
            pipe.input.write(NOISE[200_000 + number : 200_001 + number])
        assert pipe.pool._retries.qsize() == 1
        pipe.pool._retries.get()()  # nor is there one by then
        assert pipe.pool._retries.qsize() == 1
    pipe.pool._retries.get()()
    pipe.input.end()
    assert pipe.read_to_end() == NOISE[:200_100]


# ── terminals ─────────────────────────────────────────────────────────────────


@pytest.fixture
def terminal():
    """An Input on a terminal, and the terminal's other end."""
    master, slave = os.openpty()
    keyboard = os.dup(master)
    os.set_blocking(keyboard, False)
    typed, exited = Input(ThreadPool(), 1 << 20), Wakeup()
    yield typed, slave, lambda: typed.open(keyboard, exited, terminal=True)
    exited.set()
    typed.discard()
    exited.release()
    os.close(master)
    os.close(slave)


@pytest.mark.parametrize("text", [b"", b"a line\n", b"half a line"])
def test_the_end_of_a_terminals_input_is_typed(terminal, text):
    typed, slave, start = terminal
    start()
    typed.write(text)
    typed.end()
    read = b""
    while piece := InThread(os.read, slave, 100).result():
        read += piece
    assert read == text


def test_a_terminal_takes_input_after_its_end(terminal):
    typed, slave, start = terminal
    start()
    typed.end()
    assert InThread(os.read, slave, 100).result() == b""
    typed.write(b"again\n")
    assert InThread(os.read, slave, 100).result() == b"again\n"


def test_a_program_that_reads_raw_is_typed_no_end(terminal):
    typed, slave, start = terminal
    tty.setraw(slave)
    start()
    typed.write(b"abc")
    typed.end()
    typed.write(b"def")
    read = b""
    while len(read) < 6:
        read += InThread(os.read, slave, 100).result()
    assert read == b"abcdef"

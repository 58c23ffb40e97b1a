"""agent.PipeReader: one thread for both pipes of a process."""

import os
import threading
from collections.abc import Callable

import pytest
from waiting import InThread, open_descriptors, wait_until

from agent import PipeReader, Stream, Wakeup


class Collected:
    """A sink that keeps everything, and has room while it is told so."""

    def __init__(self) -> None:
        self.got = {Stream.STDOUT: b"", Stream.STDERR: b""}
        self.room = threading.Event()
        self.room.set()

    def wait_for_room(self) -> bool:
        return self.room.wait()

    def call_when_room(self, callback: Callable[[], None]) -> bool:
        raise AssertionError("a pipe's reader waits")

    def put(self, stream: Stream, data: bytes) -> None:
        self.got[stream] += data


class Reading:
    """A PipeReader in a thread, and the ends of its pipes."""

    def __init__(self, drain_timeout: float = 1000.0) -> None:
        stdout, self.stdout = os.pipe()
        stderr, self.stderr = os.pipe()
        self.sink = Collected()
        self.exited = Wakeup()
        self.ended = threading.Event()
        reader = PipeReader({stdout: Stream.STDOUT, stderr: Stream.STDERR}, self.sink, self.exited, drain_timeout)
        self.failures: list[Exception] = []
        self.thread = InThread(reader.run, self.ended.set, self.failures.append)

    def close(self) -> None:
        self.exited.set()
        self.exited.release()
        for fd in (self.stdout, self.stderr):
            os.close(fd)


@pytest.fixture
def reading():
    reading = Reading()
    yield reading
    reading.close()
    reading.thread.result()


def write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def test_both_streams_arrive_whole_and_in_order_and_the_end_is_told_once():
    before = open_descriptors()
    reading = Reading()
    out, err = bytes(range(256)) * 40_000, b"err" * 1_000_000
    writers = [InThread(write_all, reading.stdout, out), InThread(write_all, reading.stderr, err)]
    for writer in writers:
        writer.result()
    reading.close()
    reading.thread.result()
    assert reading.ended.is_set()
    assert reading.sink.got == {Stream.STDOUT: out, Stream.STDERR: err}
    assert open_descriptors() == before


def test_the_end_of_one_pipe_is_not_that_of_the_other(reading):
    os.write(reading.stdout, b"one")
    os.dup2(reading.stderr, reading.stdout)  # closes stdout's pipe
    os.write(reading.stderr, b"two")
    wait_until(lambda: reading.sink.got == {Stream.STDOUT: b"one", Stream.STDERR: b"two"}, "both")
    assert not reading.ended.is_set()


def test_once_the_process_has_ended_silence_is_the_end_though_the_pipes_are_held():
    reading = Reading(drain_timeout=0.05)
    os.write(reading.stdout, b"last words")
    reading.exited.set()
    reading.thread.result()
    assert reading.ended.is_set()
    assert reading.sink.got[Stream.STDOUT] == b"last words"
    reading.close()


def test_without_a_drain_timeout_what_is_in_the_pipes_is_read_nevertheless():
    reading = Reading(drain_timeout=0)
    reading.sink.room.clear()
    os.write(reading.stdout, b"x" * 50_000)
    os.write(reading.stderr, b"y" * 50_000)
    reading.exited.set()
    reading.sink.room.set()
    reading.thread.result()
    assert {stream: len(data) for stream, data in reading.sink.got.items()} == {
        Stream.STDOUT: 50_000,
        Stream.STDERR: 50_000,
    }
    reading.close()


def test_a_sink_without_room_for_longer_than_the_drain_timeout_loses_nothing():
    reading = Reading(drain_timeout=0.01)
    reading.sink.room.clear()
    os.write(reading.stdout, b"x" * 50_000)
    reading.exited.set()
    threading.Event().wait(0.1)
    assert not reading.ended.is_set()
    reading.sink.room.set()
    reading.thread.result()
    assert len(reading.sink.got[Stream.STDOUT]) == 50_000
    reading.close()

"""The audit log's file: every entry is in it, or counted, whatever happens to the disk."""

import json
import os
import stat
import threading

import pytest
from waiting import PATIENCE, InThread

import agent
from agent import AUDIT_LOST, AuditLog, Books, Counters, Exec, LogFormatter, Who

ME = Who("127.0.0.1:1")


def entries(path):
    """Each line of a file, parsed."""
    with open(path) as file:
        return [json.loads(line) for line in file]


@pytest.fixture
def counters():
    return Counters()


@pytest.fixture
def open_log(tmp_path, counters):
    """Opens audit logs, whose threads end with the test process."""

    def open_one(path=tmp_path / "audit", hidden=()):
        log = AuditLog(str(path), counters, LogFormatter("json", hidden))
        log.start()
        return log

    return open_one


@pytest.fixture(autouse=True)
def soon_again(monkeypatch):
    monkeypatch.setattr(agent, "AUDIT_RETRY", 0.01)


def lost(counters):
    return counters.totals().counts[AUDIT_LOST, ""]


def test_entries_are_appended_to_a_file_that_only_its_owner_reads(tmp_path, open_log):
    path = tmp_path / "audit"
    for number in range(2):
        log = open_log()
        log.write({"number": number})
        log.flush(PATIENCE)
    assert entries(path) == [{"number": 0}, {"number": 1}]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_symbolic_link_is_not_followed(tmp_path, open_log):
    (tmp_path / "audit").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic links"):
        open_log()
    assert not (tmp_path / "target").exists()


def test_a_secret_is_hidden_in_every_text(tmp_path, open_log):
    log = open_log(hidden=["s3cret", '"'])
    log.write({"cmd": ["x", "--token=s3cret"], "more": {"deep": 's3cret"'}, "number": 5})
    log.flush(PATIENCE)
    assert entries(tmp_path / "audit") == [
        {"cmd": ["x", "--token=[hidden]"], "more": {"deep": "[hidden][hidden]"}, "number": 5}
    ]


@pytest.mark.parametrize("gone", [os.unlink, lambda path: os.rename(path, f"{path}.1")], ids=["removed", "renamed"])
def test_a_file_that_is_rotated_is_made_again(tmp_path, open_log, gone):
    path = tmp_path / "audit"
    log = open_log()
    log.write({"number": 1})
    log.flush(PATIENCE)
    gone(path)
    log.write({"number": 2})
    log.flush(PATIENCE)
    assert entries(path) == [{"number": 2}]
    if (tmp_path / "audit.1").exists():
        assert entries(tmp_path / "audit.1") == [{"number": 1}]


def test_a_link_that_takes_the_files_place_gets_nothing(tmp_path, open_log, counters):
    path = tmp_path / "audit"
    log = open_log()
    path.rename(tmp_path / "kept")
    path.symlink_to(tmp_path / "stolen")
    log.write({"number": 1})
    log.flush(PATIENCE)
    assert entries(tmp_path / "kept") == [{"number": 1}]
    (tmp_path / "kept").unlink()  # now there is nothing left to write to
    log.write({"number": 2})
    log.flush(0.1)
    path.unlink()
    log.flush(PATIENCE)
    assert entries(path) == [{"number": 2}]
    assert not (tmp_path / "stolen").exists()
    assert lost(counters) == 0


@pytest.mark.parametrize("pieces", [1, 7])
def test_what_is_written_in_pieces_and_fails_between_them_is_whole_in_the_end(tmp_path, open_log, monkeypatch, pieces):
    write = os.write
    turns = iter(range(10**9))

    def write_little(fd, data):
        if next(turns) % 3 == 2:
            raise OSError(28, "No space left on device")
        return write(fd, bytes(data[:pieces]))

    monkeypatch.setattr(agent.os, "write", write_little)
    log = open_log()
    written = [{"number": number, "text": "x" * number} for number in range(5)]
    for entry in written:
        log.write(entry)
    log.flush(PATIENCE)
    monkeypatch.undo()
    assert entries(tmp_path / "audit") == written


def test_what_a_reader_that_stands_still_makes_it_lose_is_counted_and_said(tmp_path, open_log, counters, monkeypatch):
    monkeypatch.setattr(agent, "AUDIT_BACKLOG", 100_000)
    path = tmp_path / "audit"
    os.mkfifo(path)
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as reader:
        log = open_log()
        count = 3000
        for number in range(count):  # each of 100 bytes: the FIFO and the queue hold far less
            log.write({"number": number, "text": "x" * 70})
        assert 0 < lost(counters) < count
        os.set_blocking(reader.fileno(), True)

        def read_to_the_last():
            received = []
            while "last" not in (entry := json.loads(reader.readline())):
                received.append(entry)
            return received

        reading = InThread(read_to_the_last)
        log.flush(PATIENCE)
        log.write({"last": True})
        received = reading.result()
    numbers = [entry["number"] for entry in received if "number" in entry]
    assert numbers == sorted(set(numbers))
    assert sum(entry["entries"] for entry in received if entry.get("event") == "lost") == lost(counters)
    assert len(numbers) + lost(counters) == count


def test_who_tells_it_something_never_waits_for_the_disk(tmp_path, open_log, monkeypatch):
    stuck, go = threading.Event(), threading.Event()
    write = os.write

    def write_late(fd, data):
        stuck.set()
        assert go.wait(PATIENCE)
        return write(fd, data)

    monkeypatch.setattr(agent.os, "write", write_late)
    books = Books(audit=open_log())
    record_count = 100
    for number in range(record_count):
        books.tell("start", ME, number=number)
    assert stuck.wait(PATIENCE)
    assert not (tmp_path / "audit").read_bytes()
    go.set()
    books.close(PATIENCE)
    assert [entry["number"] for entry in entries(tmp_path / "audit")] == list(range(record_count))


def test_what_is_open_when_the_agent_ends_has_an_end(tmp_path, open_log):
    books = Books(audit=open_log())
    record = agent.Record(books, ME, Exec("a", ("true",), ("PASSWORD=s3cret",)))
    record.start(7)
    books.close(PATIENCE)
    record.end(0)  # too late
    start, end = entries(tmp_path / "audit")
    assert (start["event"], end["event"]) == ("start", "end")
    assert start["key"] == end["key"]
    assert start["env"] == ["PASSWORD"]
    assert end["because"] == "the agent ended"
    assert "s3cret" not in (tmp_path / "audit").read_text()

"""The gateway's values and small machines, alone."""

from __future__ import annotations

import bz2
import gzip
import itertools
import logging
import lzma

import docker_gateway as gateway
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import Stream


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("", b"\x10\x11"), ("ctrl-p,ctrl-q", b"\x10\x11"), ("ctrl-@", b"\0"), ("ctrl-[,a", b"\x1ba"),
        ("x,y,Z", b"xyZ"), ("CTRL-A", b"\x01"), ("ctrl-_", b"\x1f"),
    ],
)  # fmt: skip
def test_detach_keys_are_read_as_docker_reads_them(text: str, keys: bytes) -> None:
    assert gateway.parse_detach_keys(text) == keys


@pytest.mark.parametrize("text", ["ctrl-", "ctrl-pp", "ab", ",", "ctrl-1", "é"])
def test_detach_keys_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(gateway.BadParameter, match="Invalid detach keys"):
        gateway.parse_detach_keys(text)


@given(st.lists(st.binary(max_size=5)), st.sampled_from([b"\x10\x11", b"aab", b"x", b"aaa"]))
def test_the_detach_filter_passes_everything_before_the_keys_on(pieces: list[bytes], keys: bytes) -> None:
    """However it is cut: what comes out with what is held back is what went in, up to the keys."""
    filter_ = gateway.DetachFilter(keys)
    passed = b""
    typed = b"".join(pieces)
    for piece in pieces:
        data, detached = filter_.feed(piece)
        passed += data
        if detached:
            assert passed == typed[: typed.find(keys)]
            return
    assert keys not in typed
    assert typed.startswith(passed) and keys.startswith(typed[len(passed) :])


@given(
    st.lists(st.tuples(st.sampled_from([Stream.STDOUT, Stream.STDERR]), st.text("ab\n", min_size=1, max_size=6))),
    st.integers(1, 6),
)
def test_the_tail_is_that_of_the_text(pieces: list[tuple[Stream, str]], count: int) -> None:
    encoded = [(stream, text.encode()) for stream, text in pieces]
    both = frozenset((Stream.STDOUT, Stream.STDERR))
    found = b"".join(data for _, data in gateway.last_lines(encoded, count, both))
    text = "".join(text for _, text in pieces)
    assert found.decode() == "".join(text.splitlines(keepends=True)[-count:])


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "Less than a second"), (1, "1 second"), (59, "59 seconds"), (60, "About a minute"), (150, "2 minutes"),
        (3600, "About an hour"), (2.4 * 3600, "2 hours"), (47 * 3600, "47 hours"), (72 * 3600, "3 days"),
        (15 * 86400, "2 weeks"), (70 * 86400, "2 months"), (800 * 86400, "2 years"),
    ],
)  # fmt: skip
def test_durations_are_said_as_docker_says_them(seconds: float, words: str) -> None:
    assert gateway.human_duration(seconds) == words


@pytest.mark.parametrize(
    "pack", [gzip.compress, bz2.compress, lzma.compress, bytes], ids=["gzip", "bzip2", "xz", "plain"]
)
@pytest.mark.parametrize("size", [1, 3, 1000, 1 << 20])
def test_archives_are_unpacked_from_pieces_of_any_size(pack: object, size: int) -> None:
    data = b"".join(b"%d " % number for number in range(5000))
    packed = pack(data) + (pack(b"more") if pack is not bytes else b"more")  # type: ignore[operator]
    unpack = gateway.Decompressor()
    parts = [unpack.feed(packed[start : start + size]) for start in range(0, len(packed), size)]
    assert b"".join([*parts, unpack.finish()]) == data + b"more"


def test_what_is_damaged_is_refused() -> None:
    for packed in (gzip.compress(b"x" * 1000)[:-9], b"\x1f\x8b" + b"nonsense" * 9, b"\x28\xb5\x2f\xfd" + bytes(9)):
        unpack = gateway.Decompressor()
        with pytest.raises(gateway.BadParameter, match="archive"):
            unpack.feed(packed)
            unpack.finish()


PROCESS = {
    "pid": 7, "ppid": 1, "user": "nobody", "uid": 65534, "cpu_seconds": 3725.5, "start_time": 1.0, "tty": "/dev/pts/3",
    "rss": 2048, "vsz": 4096, "state": "sleeping", "cmd": ["sh", "-c", "a\nb"], "name": "sh", "memory_total": 4096,
}  # fmt: skip


def test_processes_are_shown_as_ps_shows_them() -> None:
    shown = {title: value(PROCESS) for title, value in gateway.ps_columns("-ef")}
    assert list(shown) == ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]
    assert [shown[name] for name in ("UID", "PID", "PPID", "TTY", "TIME")] == ["nobody", "7", "1", "pts/3", "01:02:05"]
    assert shown["CMD"] == "sh -c a?b"
    assert [title for title, _ in gateway.ps_columns("-eo pid,user,%mem,args=WHAT")] == ["PID", "USER", "%MEM", "WHAT"]
    assert [value(PROCESS) for _, value in gateway.ps_columns("axo stat,rss,pmem,comm")] == ["S", "2", "50.0", "sh"]


@pytest.mark.parametrize("text", ["--forest", "-eo nonsense", "-o", "-u root", "-C x"])
def test_other_arguments_of_ps_are_refused(text: str) -> None:
    with pytest.raises(gateway.NotSupported):
        gateway.ps_columns(text)


def test_agents_are_read_from_the_command_line() -> None:
    found = gateway.parse_agents(["a=h:1,b=unix:/x", "c=wss://h/ws"])
    assert found == {"a": "h:1", "b": "unix:/x", "c": "wss://h/ws"}
    for bad in (["a"], ["=h:1"], ["a=h"], ["a=h:1", "a=h:2"], ["-a=h:1"], ["a=ftp://h"]):
        with pytest.raises(ValueError):
            gateway.parse_agents(bad)
    assert gateway.parse_host("unix:///a/b").path == "/a/b"
    assert gateway.parse_host("tcp://127.0.0.1:2375").port == 2375
    for bad_host in ("/a/b", "unix://", "ssh://h", "tcp://h"):
        with pytest.raises(ValueError):
            gateway.parse_host(bad_host)


@given(st.text(max_size=20).filter(bool))
def test_every_id_becomes_a_name_that_docker_allows(agent_id: str) -> None:
    name = gateway.container_name(agent_id)
    assert name[0].isascii() and name[0].isalnum()
    assert all(c.isascii() and (c.isalnum() or c in "_.-") for c in name)


def test_filters_come_as_lists_or_as_maps() -> None:
    for text in ('{"a": ["x", "y"]}', '{"a": {"x": true, "y": true}}'):
        filters = gateway.Filters(text, ["a", "b"])
        assert filters.get("a") == ["x", "y"]
        assert (
            filters.accepts("a", "y".__eq__)
            and not filters.accepts("a", "z".__eq__)
            and filters.accepts("b", "z".__eq__)
        )
    for text, name in itertools.product(("[]", '{"a": 1}', "nonsense", '{"c": ["x"]}'), ["invalid filter"]):
        with pytest.raises(gateway.BadParameter, match=name):
            gateway.Filters(text, ["a", "b"])


@pytest.mark.parametrize("level", ["warn", "warning"])
def test_a_level_of_the_log_may_be_spelled_as_the_agent_and_as_python_spell_it(level: str) -> None:
    options = gateway.make_parser().parse_args(["--log-level", level])
    assert logging.getLevelName(options.log_level.upper()) == logging.WARNING

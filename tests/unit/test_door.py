"""Tokens, the delays of refusals, and what the start of a request tells."""

from __future__ import annotations

import contextlib
import hmac
import http
import inspect
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import DEADLINE

import agent
from agent import DELAY_FIRST, DELAY_LAST, HEAD_LIMIT, Doorway, Guest, ThreadPool, Tokens, delay_after, judge_head
from agent_client import ReverseListener

BAD, METHOD, LONG = (
    http.HTTPStatus.BAD_REQUEST,
    http.HTTPStatus.METHOD_NOT_ALLOWED,
    http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
)


def test_every_token_is_good_and_nothing_else() -> None:
    tokens = Tokens(["old", "new"])
    assert (tokens.accept(b"old"), tokens.accept(b"new")) == (True, True)
    for wrong in (b"", b"ol", b"oldnew", b"old\nnew", b"OLD", b"x" * (1 << 20)):
        assert not tokens.accept(wrong)
    assert not Tokens([]).accept(b"")
    assert not Tokens([])


def test_every_token_is_compared_in_constant_time_whichever_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    compare_digest = hmac.compare_digest

    def count(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return compare_digest(one, other)

    monkeypatch.setattr(hmac, "compare_digest", count)
    tokens = Tokens(["first", "second", "third"])
    for given_token in (b"first", b"third", b"none", b"", b"f", b"x" * 5000):
        compared.clear()
        tokens.accept(given_token)
        assert compared == [(32, 32)] * 3


def test_a_reload_that_fails_leaves_the_tokens_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("one\ntwo\n")
    tokens = Tokens(["one", "two"], str(path))
    for content in ("", "a b\n", "x" * 70000):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"tokens|token contains"):
            tokens.reload()
        assert tokens.accept(b"two")
    path.unlink()
    with pytest.raises(ValueError, match="cannot read"):
        tokens.reload()
    path.write_text("two\nthree")
    assert tokens.reload() == ("two", "three")
    assert (tokens.first, tokens.accept(b"one"), tokens.accept(b"three")) == ("two", False, True)


@given(st.integers(1, 10**9))
def test_a_delay_grows_and_has_a_bound(count: int) -> None:
    assert DELAY_FIRST <= delay_after(count) <= delay_after(count + 1) <= DELAY_LAST
    assert delay_after(1) == DELAY_FIRST
    assert delay_after(10**6) == DELAY_LAST


def test_a_refusal_that_comes_late_is_an_answer_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine its time may be over before it begins."""
    monkeypatch.setattr(agent, "REFUSAL_LINGER", -1.0)
    with (
        ReverseListener("127.0.0.1", token="right") as listener,
        socket.create_connection(("127.0.0.1", listener.port), DEADLINE) as sock,
    ):
        sock.sendall(b"GET /agents HTTP/1.1\r\nHost: h\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 401 ")


class FullPool(ThreadPool):
    """The system's limit of threads is reached, and that is not for a test to reach."""

    def submit(self, job: Callable[..., None], *args: object) -> None:
        raise RuntimeError("can't start new thread")


@pytest.fixture
def shallow() -> Iterator[None]:
    """Python nests 300 calls more than it does already."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 300)
    yield
    sys.setrecursionlimit(before)


def test_however_many_wait_where_there_is_no_thread_each_is_told_so_and_no_place_is_lost(shallow: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
        doorway = Doorway(listener, lambda guest, request: None, lambda sock, early: None, FullPool())
        peers = []
        for _ in range(200):
            near, far = socket.socketpair()
            peers.append(stack.enter_context(near))
            stack.enter_context(far).setblocking(False)
            doorway._ready.append(Guest(far))
        doorway._steps = 1
        doorway._end_step()
        assert (doorway._steps, len(doorway._ready)) == (0, 0)
        doorway.start()
        for near in peers:
            near.settimeout(DEADLINE)
            assert near.recv(4096).startswith(b"HTTP/1.1 503 ")
        doorway.close()


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"", None),
        (b"G", None),
        (b"GET /ws HTTP/1.1\r", None),
        (b"GET /ws HTTP/1.1\r\nHost: x\r\n", None),
        (b"GET /ws?token=%20 HTTP/1.1\r\n\r\n", None),
        (b"\x16\x03\x01", BAD),
        (b"GET /ws HTTP/1.1\n", BAD),
        (b"GET /ws HTTP/1.0\r\n", BAD),
        (b"GET /ws HTTP/2\r\n", BAD),
        (b"GET  /ws HTTP/1.1\r\n", BAD),
        (b"GET /a b HTTP/1.1\r\n", BAD),
        (b"get /ws HTTP/1.1\r\n", BAD),
        (b"\r\n", BAD),
        (b"PRI * HTTP/2.0\r\n\r\n", BAD),
        (b"POST /ws HTTP/1.1\r\n", METHOD),
        (b"CONNECT evil.example:80 HTTP/1.1\r\n", METHOD),
        (b"G" * HEAD_LIMIT, None),
        (b"G" * (HEAD_LIMIT + 1), LONG),
    ],
)
def test_what_can_become_no_request_is_known_at_once(head: bytes, status: http.HTTPStatus | None) -> None:
    verdict = judge_head(head)
    assert (verdict and verdict[0]) == status


@given(st.binary(max_size=200))
def test_any_bytes_are_judged(head: bytes) -> None:
    verdict = judge_head(head)
    assert verdict is None or verdict[0] in (BAD, METHOD)
    if verdict is not None and head:  # more of it makes it no better
        assert judge_head(head + b"GET /ws HTTP/1.1\r\n\r\n") == verdict

"""Messages of both versions of the protocol, good ones and what can be made of them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

REQUESTS_1: dict[str, dict[str, Any]] = {
    "exec": {"id": "s", "cmd": ["true"], "env": ["K=V"], "workdir": "/", "tty": True},
    "attach": {"id": "s"},
    "stdin": {"id": "s", "data": "AAEC"},
    "close_stdin": {"id": "s"},
    "end": {"id": "s"},
    "signal": {"id": "s", "signal": "SIGTERM"},
    "resize": {"id": "s", "width": 80, "height": 24},
}
EVENTS_1: dict[str, dict[str, Any]] = {
    "stdout": {"id": "s", "data": "AAEC", "lost": 1},
    "stderr": {"id": "s", "data": "AAEC", "lost": 1},
    "exit": {"id": "s", "code": 3},
    "error": {"id": "s", "message": "m", "reason": "limit"},
    "lifetime_expired": {},
}
HUGE = 10**4299  # the longest integer that json takes
REQUESTS_2: dict[str, dict[str, Any]] = {
    **REQUESTS_1,
    "exec": {**REQUESTS_1["exec"], "window": 9, "width": 80, "height": 24, "user": "root", "stdin": True,
             "detach": False, "secret": "0123456789abcdef", "connection": 1},
    "attach": {"id": "s", "window": 9, "session": "d", "replay": True, "secret": "0123456789abcdef", "connection": 1},
    "end": {"id": "s", "number": 1, "secret": "0123456789abcdef"},
    "ack": {"id": "s", "offset": 7},
    "resume": {"id": "s", "secret": "x", "offset": 7, "window": 9, "acked": 3, "connection": 2},
    "park": {"id": "s"},
    "sessions": {"id": "q"},
    "stats": {"id": "q", "processes": True},
    "health": {"id": "q"},
    "archive_get": {"id": "s", "path": "/", "window": 9},
    "archive_put": {"id": "s", "path": "/", "no_overwrite_dir_non_dir": True, "no_owners": True},
    "archive_stat": {"id": "s", "path": "/"},
}  # fmt: skip
EVENTS_2: dict[str, dict[str, Any]] = {
    **EVENTS_1,
    "started": {"id": "s", "pid": 1, "secret": "x", "replay": 0},
    "ack": {"id": "s", "offset": 7, "heard": 1},
    "resumed": {"id": "s", "offset": 7, "stdin": 1, "closed": 0, "heard": 1},
    "lost": {"id": "s", "offset": 7, "bytes": 1},
    "sessions": {"id": "q", "sessions": [{}]},
    "stats": {"id": "q", "stats": {}},
    "health": {"id": "q", "status": "healthy", "log": "", "state": {}},
    "archive_stat": {"id": "s", "stat": {}},
}
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([HUGE, -HUGE, 2**31, 2**63, 2**64, -1, 0, 65535, 65536]),
    st.floats(),
    st.text(),
    st.text(st.characters(categories=["Cs", "Cc", "Lu"])),
    st.sampled_from(["", "\0", "\ud800", "\udc80", "s" * 5000, "é" * 200, "../..", "/\0", "K=V", "=", "%%%", "AA=="]),
    st.lists(st.text(max_size=3) | st.integers() | st.none(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
WORDS = ["type", "id", "cmd", "env", "data", "window", "secret", "offset", "path", "signal", "session", "state", "code"]


@st.composite
def mutated(draw: Callable[..., Any], samples: dict[str, dict[str, Any]]) -> str:
    """A good message, and then fields of it left out, replaced, added, or there twice."""
    kind = draw(st.sampled_from(sorted(samples)))
    fields = {"type": kind, **samples[kind]}
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from([*fields, *WORDS]))
        if draw(st.booleans()):
            fields[name] = draw(VALUES)
        else:
            fields.pop(name, None)
    items = list(fields.items())
    if draw(st.booleans()) and items:
        items.append((draw(st.sampled_from(items))[0], draw(VALUES)))  # a name that is there twice
    return "{" + ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in items) + "}"


def damaged(samples: dict[str, dict[str, Any]]) -> st.SearchStrategy[str]:
    """The text of a mutated message, with characters lost, repeated or replaced."""

    def damage(text: str, seed: int) -> str:
        rng = random.Random(seed)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(text) + 1)
            text = (
                text[:at]
                + rng.choice(["", '"', "\\", "{", "[", "\ud800", "\0", "9" * 5000, "NaN", "-"])
                + text[at + rng.randrange(3) :]
            )
        return text

    return st.builds(damage, mutated(samples), st.integers(0, 2**32))

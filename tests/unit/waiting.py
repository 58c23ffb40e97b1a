"""Waiting for what another thread does: with a deadline that only a hang can miss."""

import os
import threading
import time
from collections.abc import Callable
from typing import Any

PATIENCE = 20.0  # seconds


def wait_until(condition: Callable[[], Any], what: str) -> None:
    """Wait until ``condition()`` is true, and fail by saying ``what`` did not come true."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE:g} s: {what}"
        time.sleep(0.002)


class InThread:
    """A call in a thread of its own; result() waits for it, and raises what it raised."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._function = function
        self._args = args
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._function(*self._args)
        except BaseException as exc:
            self._error = exc

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> Any:
        self._thread.join(PATIENCE)
        assert not self.running, f"{self._function} did not return within {PATIENCE:g} s"
        if self._error is not None:
            raise self._error
        return self._value


def open_descriptors() -> set[str]:
    """This process's descriptors, each with what it is open on."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except OSError:  # the one that listed the directory
            pass
    return found

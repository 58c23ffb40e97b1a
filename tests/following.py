"""What a process writes to its stderr, read as it comes, for tests that wait for a line of it."""

from __future__ import annotations

import re
import subprocess
import threading

from support import DEADLINE


class Log:
    """The stderr, in text, of a process; a thread of its own reads it, so that nothing the process writes blocks."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        self._stream = process.stderr
        self._changed = threading.Condition()  # guards _lines and _ended
        self._lines: list[str] = []
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._stream:
            with self._changed:
                self._lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def text(self) -> str:
        """All of it so far."""
        with self._changed:
            return "".join(self._lines)

    def wait_for(self, pattern: str, count: int = 1) -> re.Match[str]:
        """Wait until it has ``count`` matches of ``pattern``; returns the last of them."""
        found: list[re.Match[str]] = []

        def look() -> bool:
            found[:] = re.finditer(pattern, "".join(self._lines))
            return len(found) >= count or self._ended

        with self._changed:
            self._changed.wait_for(look, DEADLINE)
            assert len(found) >= count, f"no {pattern!r} in the log:\n{''.join(self._lines)}"
        return found[count - 1]

    def close(self) -> None:
        """The process has ended: read the rest. Who has inherited its stderr may keep it open."""
        self._reader.join(DEADLINE)
        if not self._reader.is_alive():
            self._stream.close()

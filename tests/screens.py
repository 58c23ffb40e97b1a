"""A program on a terminal, and the screen that it draws, for the tests of both command lines."""

from __future__ import annotations

import os
import re
import subprocess
import termios
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pyte
from support import DEADLINE

END = b"\x1b[0mthe test ends"  # ends a Terminal's reader


class Terminal:
    """A terminal with a person in front: types, and sees the screen."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], columns: int, rows: int) -> None:
        self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        self._changed = threading.Condition()  # guards screen
        # The client's end stays open here, so that its attributes can be read after the client's end.
        self._keyboard, self._line = os.openpty()
        termios.tcsetwinsize(self._line, (rows, columns))
        self.before = self.attributes()
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command], env=environ, stdin=self._line, stdout=self._line, stderr=self._line
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while data := os.read(self._keyboard, 65536):
            with self._changed:
                self._stream.feed(data)
                self._changed.notify_all()
            if END in data:
                return

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display)

    def wait_for(self, pattern: str) -> None:
        with self._changed:
            seen = self._changed.wait_for(lambda: re.search(pattern, self.text, re.MULTILINE), DEADLINE)
        assert seen, f"no {pattern!r} on the screen:\n{self.text}"

    def type(self, keys: str) -> None:
        os.write(self._keyboard, keys.encode())

    def resize(self, columns: int, rows: int) -> None:
        with self._changed:
            self.screen.resize(rows, columns)
            self.screen.reset()  # what was there says nothing about what will be drawn
        termios.tcsetwinsize(self._keyboard, (rows, columns))

    def attributes(self) -> list[Any]:
        return termios.tcgetattr(self._line)

    def wait(self) -> int:
        """Wait for the client's end."""
        return self.process.wait(DEADLINE)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.write(self._line, END)
        self._reader.join(DEADLINE)
        os.close(self._line)
        os.close(self._keyboard)

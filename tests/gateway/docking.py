"""A real gateway process, and Docker's own client as a process: with pipes, or with a person at a terminal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import termios
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyte
import pytest
from support import DEADLINE, TOKEN

ROOT = Path(__file__).resolve().parents[2]
GATEWAY = ROOT / "scripts/docker_gateway.py"
END = b"\x1b[0mthe test ends"  # ends a Terminal's reader


class Gateway:
    """A gateway on a unix socket of its own; ``flags`` name its agents, ``prefix`` is a command that becomes it."""

    def __init__(self, directory: Path, *flags: str, token: str = TOKEN, prefix: tuple[str, ...] = ()) -> None:
        self.path = directory / "docker.sock"
        self.config = directory / "docker-config"
        self.config.mkdir(exist_ok=True)
        self._changed = threading.Condition()  # guards _log and _ended
        self._log = ""
        self._ended = False
        environ = {name: value for name, value in os.environ.items() if not name.startswith("SOCKERLESS_")}
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-P", str(GATEWAY), "-H", f"unix://{self.path}", "--log-level", "debug", *flags],
            env={**environ, "SOCKERLESS_AGENT_TOKEN": token, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.wait_for_log(rf"serving Docker's clients on unix:{re.escape(str(self.path))}")
        except BaseException:
            self.kill()
            raise

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self._log += line
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def log(self) -> str:
        with self._changed:
            return self._log

    @property
    def host(self) -> str:
        return f"unix://{self.path}"

    def wait_for_log(self, pattern: str, count: int = 1) -> re.Match[str]:
        """Wait until the log has so many matches; returns the last of them."""
        found: list[re.Match[str]] = []

        def look() -> bool:
            found[:] = re.finditer(pattern, self._log)
            return len(found) >= count or self._ended

        with self._changed:
            self._changed.wait_for(look, DEADLINE)
            assert len(found) >= count, f"no {pattern!r} in the gateway's log:\n{self._log}"
        return found[count - 1]

    @property
    def environ(self) -> dict[str, str]:
        """For Docker's client: this endpoint, and nobody's configuration."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("DOCKER_")}
        return {**kept, "DOCKER_HOST": self.host, "DOCKER_CONFIG": str(self.config), "TERM": "xterm"}

    def docker(self, *words: str, data: bytes = b"", env: dict[str, str] | None = None) -> tuple[int, bytes, bytes]:
        """Run Docker's client to its end: exit status, stdout, stderr."""
        done = subprocess.run(
            ["docker", *words], env={**self.environ, **(env or {})}, input=data, capture_output=True, timeout=DEADLINE
        )
        return done.returncode, done.stdout, done.stderr

    def output(self, *words: str, data: bytes = b"") -> str:
        """The stdout of a call of Docker's client that must succeed."""
        code, stdout, stderr = self.docker(*words, data=data)
        assert (code, stderr) == (0, b""), (code, stdout[-2000:], stderr[-2000:])
        return stdout.decode()

    def refused(self, *words: str) -> str:
        """The error of a call that must fail."""
        code, stdout, stderr = self.docker(*words)
        assert code != 0, stdout
        return stderr.decode()

    def json(self, *words: str) -> Any:
        return json.loads(self.output(*words))

    def start(self, *words: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start Docker's client, and leave it running."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(["docker", *words], env=self.environ, **{**pipes, **options})

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.terminate()
        try:
            code = self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"the gateway did not end:\n{self.log}")
        self._finish()
        return code

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE)
        self._finish()

    def _finish(self) -> None:
        self._reader.join(DEADLINE)
        if self.process.stderr is not None and not self._reader.is_alive():
            self.process.stderr.close()


class Terminal:
    """Docker's client on a terminal, with a person in front: types, and sees the screen."""

    def __init__(self, gateway: Gateway, words: Iterable[str], columns: int = 80, rows: int = 24) -> None:
        self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        self._changed = threading.Condition()  # guards screen
        # The client's end stays open here, so that its attributes can be read after the client's end.
        self._keyboard, self._line = os.openpty()
        termios.tcsetwinsize(self._line, (rows, columns))
        self.before = termios.tcgetattr(self._line)
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "docker", *words],
            env=gateway.environ,
            stdin=self._line,
            stdout=self._line,
            stderr=self._line,
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

    def assert_as_before(self) -> None:
        """The client has put its terminal back."""
        assert termios.tcgetattr(self._line) == self.before

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

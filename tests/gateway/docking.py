"""A real gateway process, and Docker's own client as a process: with pipes, or with a person at a terminal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import following
import pytest
import screens
from support import DEADLINE, TOKEN

ROOT = Path(__file__).resolve().parents[2]
GATEWAY = ROOT / "scripts/docker_gateway.py"


class Gateway:
    """A gateway on a unix socket of its own; ``flags`` name its agents, ``prefix`` is a command that becomes it."""

    def __init__(self, directory: Path, *flags: str, token: str = TOKEN, prefix: tuple[str, ...] = ()) -> None:
        self.path = directory / "docker.sock"
        self.config = directory / "docker-config"
        self.config.mkdir(exist_ok=True)
        environ = {name: value for name, value in os.environ.items() if not name.startswith("SOCKERLESS_")}
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-P", str(GATEWAY), "-H", f"unix://{self.path}", "--log-level", "debug", *flags],
            env={**environ, "SOCKERLESS_AGENT_TOKEN": token, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._log = following.Log(self.process)
        try:
            self.wait_for_log(rf"serving Docker's clients on unix:{re.escape(str(self.path))}")
        except BaseException:
            self.kill()
            raise

    @property
    def log(self) -> str:
        return self._log.text

    @property
    def host(self) -> str:
        return f"unix://{self.path}"

    def wait_for_log(self, pattern: str, count: int = 1) -> re.Match[str]:
        """Wait until the log has so many matches; returns the last of them."""
        return self._log.wait_for(pattern, count)

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
        self._log.close()
        return code

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE)
        self._log.close()


class Terminal(screens.Terminal):
    """Docker's client on a terminal."""

    def __init__(self, gateway: Gateway, words: Iterable[str], columns: int = 80, rows: int = 24) -> None:
        super().__init__(["docker", *words], gateway.environ, columns, rows)

    def assert_as_before(self) -> None:
        """The client has put its terminal back."""
        assert self.attributes() == self.before

"""A real agent process for the tests of the client and of reverse mode."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import following
from support import DEADLINE, TOKEN

import agent

all_started: list[RunningAgent] = []  # of one test; see conftest.py


class RunningAgent:
    """A real agent process: on a free port, or in reverse mode with --callback among the flags.

    Attributes:
        addr: where it listens, "" in reverse mode.
    """

    def __init__(
        self,
        tmp_path: Path,
        *flags: str,
        token: str = TOKEN,
        env: dict[str, str] | None = None,
        prefix: tuple[str, ...] = (),
    ) -> None:
        self.reverse = any("callback" in flag for flag in flags)
        where = () if self.reverse else ("--addr", "127.0.0.1:0")
        command = (sys.executable, agent.__file__, "--pid-file", str(tmp_path / "pid"), *where, *flags)
        environ = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        self.process = subprocess.Popen(
            [*prefix, *command],
            env={**environ, "SOCKERLESS_AGENT_TOKEN": token, **(env or {})},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.addr = ""
        all_started.append(self)
        self._log = following.Log(self.process)
        if not self.reverse:
            try:
                self.addr = self.wait_for_log(r"listening on (\S+)")[1]
            except BaseException:
                self.kill()
                raise

    def kill(self) -> None:
        """SIGKILL; ended already is fine, too."""
        if self.process.poll() is None:
            self.process.kill()
        self.wait()

    @property
    def log(self) -> str:
        return self._log.text

    def wait_for_log(self, pattern: str, count: int = 1) -> re.Match[str]:
        """Wait until the log has ``count`` matches of ``pattern``; returns the last of them."""
        return self._log.wait_for(pattern, count)

    def wait(self) -> int:
        """Wait until it ends by itself; returns its exit code."""
        code = self.process.wait(DEADLINE)
        self._log.close()
        return code

    def stop(self) -> int:
        """SIGTERM, and the exit code; ended already is fine, too."""
        self.process.terminate()
        return self.wait()


@contextlib.contextmanager
def spawned(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process that is killed at the end, if it is still there then: no wait for one that will not end."""
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.kill()

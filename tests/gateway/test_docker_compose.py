"""docker-compose exec, with Debian's Compose, through the gateway."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from docking import DEADLINE, Gateway
from support import Agent, need


def test_an_agent_is_a_service_of_its_name(
    start_agent: Callable[..., Agent], start_gateway: Callable[..., Gateway], tmp_path: Path
) -> None:
    need("docker-compose")
    agents = {name: start_agent() for name in ("web", "db")}
    flags = [f"--agent={name}={agent.address}" for name, agent in agents.items()]
    gateway = start_gateway(*flags, "--compose-project=shop")
    for name in agents:
        gateway.wait_for_log(f"agent {name}: connected")
    services = "".join(f"  {name}:\n    image: sockerless-agent\n" for name in agents)
    (tmp_path / "docker-compose.yml").write_text(f'version: "3"\nservices:\n{services}')

    def compose(*words: str, data: bytes = b"") -> tuple[int, bytes, bytes]:
        command = ["docker-compose", "-p", "shop", *words]
        done = subprocess.run(
            command, cwd=tmp_path, env=gateway.environ, input=data, capture_output=True, timeout=DEADLINE
        )
        return done.returncode, done.stdout, done.stderr

    for name, agent in agents.items():
        code, stdout, stderr = compose(
            "exec", "-T", "-e", "A=b c", name, "sh", "-c", "echo $A $PPID; cat; exit 6", data=b"in"
        )
        assert (code, stdout, stderr) == (6, f"b c {agent.pid}\nin".encode(), b"")
    code, stdout, _ = compose("ps", "-q")
    assert (code, len(stdout.split())) == (0, 2)
    assert compose("exec", "-T", "nobody", "true")[0] != 0

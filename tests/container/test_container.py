"""The agent as PID 1 of real containers: an image of Debian with Python, and one that holds nothing but busybox."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import eventually, need, need_root

import agent_client
from agent_client import AgentConn, SessionError

# One group: whoever runs one of these has built the images for all.
pytestmark = [
    pytest.mark.root,
    pytest.mark.container,
    pytest.mark.xdist_group("container"),
    pytest.mark.timeout(600),  # the first one waits for the images
]

ROOT = Path(agent_client.__file__).resolve().parent
PATIENCE = 300.0  # seconds
# What the limits of the machines that these run on leave: no network of a container's own, and few descriptors.
PODMAN = ("podman", "--runtime", "runc", "--storage-driver=vfs")
RUN = ("--network=none", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")
PREFIX = "localhost/sockerless-test"
TOKEN = "correct-horse-battery"


def podman(*words: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*PODMAN, *words], capture_output=True, text=True, timeout=PATIENCE, **options)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def build_script(name: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def needed() -> None:
    need_root()
    need("podman", "runc", "debootstrap", "busybox", "cc", "ldd")


@pytest.fixture(scope="session")
def python_image(needed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The Containerfile on a base of Debian's packages; no image can be pulled here."""
    root = tmp_path_factory.mktemp("debian")
    targets = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME)", "Created-By: Packages"],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    names = [line.split() for line in targets]
    (mirror, codename), *_ = [words for words in names if "-" not in words[1]] or names
    options = ["--variant=minbase", "--include=python3", codename, str(root), mirror]
    done = subprocess.run(["debootstrap", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    left_out = ("usr/share/doc", "usr/share/locale", "usr/share/man", "var/cache/apt", "var/lib/apt/lists")
    for path in left_out:
        shutil.rmtree(root / path, ignore_errors=True)
    root.chmod(0o755)  # as the image's / will be
    with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as tar:
        podman("import", "-", f"{PREFIX}-debian", stdin=tar.stdout)
    shutil.rmtree(root, ignore_errors=True)
    build_script("build-pyz")
    podman(
        "build", "--isolation", "chroot", "--format", "docker", "--build-arg", f"BASE={PREFIX}-debian",
        "-t", f"{PREFIX}-agent", str(ROOT),
    )  # fmt: skip
    yield f"{PREFIX}-agent"
    podman("rmi", "--force", f"{PREFIX}-agent", f"{PREFIX}-debian", check=False)
    podman("image", "prune", "--force", check=False)


@pytest.fixture(scope="session")
def scratch_image(needed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An image that holds a static busybox, an entrypoint and a command of its own, wrapped by scripts/wrap-image."""
    root = tmp_path_factory.mktemp("scratch")
    root.chmod(0o755)
    (root / "bin").mkdir()
    shutil.copy(shutil.which("busybox") or "busybox", root / "bin/busybox")
    for name in ("sh", "cat", "dd", "echo", "env", "ls", "sleep", "tty", "id", "true"):
        (root / "bin" / name).symlink_to("busybox")
    with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as tar:
        script = "echo $0 $1 $IMAGES; trap 'exit 9' TERM; while :; do sleep 1; done"
        entrypoint = json.dumps(["/bin/sh", "-c", script])
        changes = [f"ENTRYPOINT {entrypoint}", 'CMD ["their", "command"]', "ENV IMAGES=own"]
        podman("import", *(word for change in changes for word in ("--change", change)), "-", f"{PREFIX}-theirs",
               stdin=tar.stdout)  # fmt: skip
    build_script("build-standalone")
    done = subprocess.run(
        [str(ROOT / "scripts/wrap-image"), f"{PREFIX}-theirs", f"{PREFIX}-wrapped"],
        env={**os.environ, "ENGINE": " ".join(PODMAN), "BUILD_OPTIONS": "--isolation chroot"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    yield f"{PREFIX}-wrapped"
    podman("rmi", "--force", f"{PREFIX}-wrapped", f"{PREFIX}-theirs", check=False)


class Container:
    """A running container, whose agent listens on a unix socket in a directory that this side has, too."""

    _numbers = itertools.count()

    def __init__(self, directory: Path, image: str, *options: str, command: tuple[str, ...] = ()) -> None:
        self.name = f"sockerless-test-{os.getpid()}-{next(self._numbers)}"
        self.directory = directory
        directory.chmod(0o777)
        environment = ("-e", "SOCKERLESS_AGENT_ADDR=unix:/shared/agent", "-e", f"SOCKERLESS_AGENT_TOKEN={TOKEN}")
        podman("run", "--detach", "--name", self.name, *RUN, *environment, "-v", f"{directory}:/shared", *options,
               image, *command)  # fmt: skip
        eventually(lambda: "listening on" in self.log() or not self.running(), "the agent's start")
        assert self.running(), self.log()

    def running(self) -> bool:
        return bool(self.state()["Running"])

    def state(self) -> dict[str, Any]:
        state = json.loads(podman("inspect", "--format", "{{json .State}}", self.name).stdout)
        assert isinstance(state, dict)
        return state

    def log(self) -> str:
        done = podman("logs", self.name)
        return done.stdout + done.stderr

    def client(self, *words: str, data: str = "") -> str:
        """The output of the client's command line in the container's network, which has no way out."""
        pid = str(self.state()["Pid"])
        done = subprocess.run(
            ["nsenter", "--target", pid, "--net", sys.executable, agent_client.__file__, *words],
            env={**os.environ, "SOCKERLESS_AGENT_TOKEN": TOKEN, "SOCKERLESS_AGENT_ADDR": "127.0.0.1:9111"},
            input=data, capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def dial(self) -> AgentConn:
        return AgentConn.dial(f"unix:{self.directory}/agent", TOKEN)

    def output(self, *cmd: str) -> str:
        with self.dial() as conn:
            done = conn.run(cmd, capture_output=True, text=True, timeout=PATIENCE)
        assert (done.returncode, done.stderr) == (0, ""), done
        assert isinstance(done.stdout, str)
        return done.stdout

    def stop(self) -> int:
        """``podman stop``, which kills after a while; the exit code."""
        podman("stop", "--time", "60", self.name)
        return int(self.state()["ExitCode"])

    def remove(self) -> None:
        podman("rm", "--force", "--time", "0", self.name, check=False)


Start = Callable[..., Container]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    containers: list[Container] = []

    def run(image: str, *options: str, command: tuple[str, ...] = ()) -> Container:
        directory = tmp_path / f"shared{len(containers)}"
        directory.mkdir()
        containers.append(Container(directory, image, *options, command=command))
        return containers[-1]

    yield run
    for container in containers:
        container.remove()


TRAPPING = ("--keep-alive", "--", "sh", "-c", "trap 'echo told; exit 7' TERM; echo up; while :; do sleep 0.1; done")


def test_pid_1_runs_attaches_is_healthy_and_stops_with_its_main_processs_code(python_image: str, start: Start) -> None:
    container = start(python_image, command=TRAPPING)
    assert "/sockerless" in container.output("cat", "/proc/1/cmdline")
    assert podman("healthcheck", "run", container.name).returncode == 0
    with container.dial() as conn:
        done = conn.run(["sh", "-c", "cat; echo err >&2; exit 5"], input=b"in", capture_output=True)
        assert (done.returncode, done.stdout, done.stderr) == (5, b"in", b"err\n")
        shell = conn.popen(["sh"], tty=True, size=(100, 30))
        shell.stdin.write(b"stty size; exit 4\n")
        assert b"30 100" in shell.stdout.read()
        assert shell.wait(PATIENCE) == 4
        attached = conn.attach(text=True)
        assert attached.stdout.readline() == "up\n"
        assert container.stop() == 7
        assert attached.stdout.readline() == "told\n"
        assert attached.wait(PATIENCE) == 7
    assert "agent ends: exit code 7" in container.log()


def test_1000_orphans_leave_no_zombie(python_image: str, start: Start) -> None:
    container = start(python_image, command=TRAPPING)
    script = "for i in $(seq 1000); do (true & exec true) & done; wait"
    container.output("sh", "-c", script)
    states = "cat /proc/[0-9]*/stat 2>/dev/null | sed 's/.*) //' | cut -c 1 | sort | uniq -c"
    eventually(lambda: "Z" not in container.output("sh", "-c", states), "the end of every zombie")
    assert container.stop() == 7


def test_nothing_is_written_to_the_image(python_image: str, start: Start) -> None:
    container = start(python_image, command=TRAPPING)
    container.output("true")
    changed = {line for line in podman("diff", container.name).stdout.splitlines() if not line.startswith("C ")}
    # What the engine makes for its mounts, and the PID file of the protocol.
    assert {line.split()[1] for line in changed} - {"/shared", "/tmp/.sockerless-mainpid"} <= {
        "/etc/mtab", "/run/.containerenv", "/run/secrets",
    }  # fmt: skip


def test_a_read_only_root_and_no_tmp(python_image: str, start: Start) -> None:
    container = start(python_image, "--read-only", "--read-only-tmpfs=false", command=TRAPPING)
    assert container.output("echo", "on") == "on\n"
    assert "cannot write the PID file" in container.log()
    assert container.stop() == 7


def test_as_a_user_who_is_not_root(python_image: str, start: Start) -> None:
    container = start(python_image, "--user", "54321:54321", command=TRAPPING)
    assert container.output("id", "-u") == "54321\n"
    assert podman("healthcheck", "run", container.name).returncode == 0
    assert container.stop() == 7


def test_where_no_process_is_left_to_be_had_it_says_so_and_lives(python_image: str, start: Start) -> None:
    # A user of its own: the limit counts all processes of the user, outside this container too.
    limits = ("--user", "54322:54322", "--ulimit", "nproc=60:60")
    container = start(python_image, *limits, command=TRAPPING)
    with container.dial() as conn:
        processes = [conn.popen(["sleep", "300"]) for _ in range(60)]
        errors = []
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                try:
                    process.wait(0.2)
                except SessionError as exc:
                    errors.append(str(exc))
        assert errors
        assert all(
            re.search(r"cannot start.*(the limit of processes is reached|new thread)", error) for error in errors
        ), errors
        for process in processes:
            process.kill()
        eventually(lambda: all(process.receiver.finished.is_set() for process in processes), "the end of all")
        assert conn.run(["echo", "on"], capture_output=True).stdout == b"on\n"
    assert container.stop() == 7


def test_a_child_that_takes_too_much_memory_dies_and_the_agent_lives(python_image: str, start: Start) -> None:
    container = start(python_image, "--memory", "150m", command=TRAPPING)
    with container.dial() as conn:
        greedy = conn.run(["python3", "-c", "bytearray(500 << 20)"], capture_output=True)
        assert greedy.returncode == 137
        assert conn.run(["echo", "on"], capture_output=True).stdout == b"on\n"
    assert container.stop() == 7


def test_a_main_process_that_ends_ends_the_container_when_told_to(python_image: str, start: Start) -> None:
    container = start(python_image, command=("--exit-with-main", "--keep-alive", "--", "sh", "-c", "sleep 1; exit 3"))
    assert podman("wait", container.name).stdout == "3\n"


def test_an_image_with_nothing_but_a_static_busybox(scratch_image: str, start: Start) -> None:
    container = start(scratch_image)
    eventually(lambda: "their command own\n" in container.log(), "their own entrypoint and command")

    def output(*cmd: str) -> str:
        return container.client("exec", "--", *cmd)

    assert not {"lib", "lib64", "usr", "tmp"} & set(output("ls", "/").split())
    assert output("id", "-u") == "0\n"
    assert container.client("exec", "-t", "--", "tty").startswith("/dev/pts/")
    assert container.client("exec", "-i", "--", "cat", data="x" * (16 << 20)) == "x" * (16 << 20)
    names = [line.partition("=")[0] for line in output("env").splitlines()]
    assert not [name for name in names if name.startswith(("PYTHON", "LD_", "LC_"))]
    output("sh", "-c", "i=0; while [ $i -lt 1000 ]; do (true & exec true) & i=$((i + 1)); done; wait")
    states = "for f in /proc/[0-9]*/stat; do read -r line < $f && echo ${line##*) }; done 2>/dev/null"
    eventually(lambda: not re.search("^Z", output("sh", "-c", states), re.MULTILINE), "the end of every zombie")
    assert container.stop() == 9


def test_the_same_image_read_only_and_not_as_root(scratch_image: str, start: Start) -> None:
    container = start(scratch_image, "--read-only", "--read-only-tmpfs=false", "--user", "54323:54323")
    eventually(lambda: "their command own\n" in container.log(), "their own entrypoint and command")
    assert container.client("exec", "--", "id", "-u") == "54323\n"
    probe = ("/sockerless/bin/sockerless-agent", "--probe", "--addr", ":9111")
    assert podman("exec", container.name, *probe).stdout == ""
    assert "cannot write the PID file" in container.log()
    assert container.stop() == 9


def test_the_same_image_with_limits(scratch_image: str, start: Start) -> None:
    limits = ("--memory", "100m", "--user", "54324:54324", "--ulimit", "nproc=40:40")
    container = start(scratch_image, *limits)
    greedy = "dd if=/dev/zero of=/dev/null bs=500M count=1; echo $?"
    assert "137" in container.client("exec", "--", "sh", "-c", greedy)
    many = "i=0; while [ $i -lt 60 ]; do sleep 300 & i=$((i + 1)); done; echo made"
    with contextlib.suppress(AssertionError):
        container.client("exec", "--", "sh", "-c", many)
    eventually(lambda: "on" in container.client("exec", "--", "echo", "on"), "the agent's answer")
    assert container.stop() == 9

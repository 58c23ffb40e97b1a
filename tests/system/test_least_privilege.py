"""The agent without root, its secrets beside others of its user, hostile files in its way, and its sudden end."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import (
    AGENT,
    AS_PID_1,
    DEADLINE,
    IN_CI,
    TOKEN,
    Agent,
    RawClient,
    as_user,
    eventually,
    is_alive,
    need,
    need_root,
    wait_gone,
)

from agent_client import AgentConn

NOBODY = as_user(65534)
PTRACE_SEIZE = 0x4206  # <linux/ptrace.h>
StartAgent = Callable[..., Agent]


@pytest.fixture
def as_nobody(start_agent: StartAgent, tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    """Agents of a user without a single capability."""
    need("setpriv", "unshare", "mount")
    need_root()
    home = Path(f"/tmp/as-nobody-{os.getpid()}")  # where nobody may go, as it may not in pytest's directories
    home.mkdir(mode=0o755)
    os.chown(home, 65534, 65534)

    def start(*flags: str, **options: Any) -> Agent:
        return start_agent("--pid-file", f"{home}/pid", *flags, prefix=NOBODY, execs=True, **options)

    yield start
    shutil.rmtree(home)


def as_same_user(*command: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*NOBODY, *command], capture_output=True, timeout=DEADLINE)


# Not root.


def test_everything_works_without_root_and_capabilities(as_nobody: Callable[..., Agent]) -> None:
    agent = as_nobody("--keep-alive", "--", "sh", "-c", "echo main; exec sleep 1000")
    status = Path(f"/proc/{agent.pid}/status").read_text()
    assert re.search(r"^Uid:\t65534\t65534\t65534", status, re.MULTILINE)
    assert set(re.findall(r"^Cap(?:Inh|Prm|Eff|Bnd|Amb):\t(\w+)", status, re.MULTILINE)) == {"0" * 16}
    with AgentConn.dial(agent.address, TOKEN) as conn:
        assert conn.run(["id", "-u"], capture_output=True).stdout == b"65534\n"
        assert conn.run(["sh", "-c", "tty; stty size"], tty=True, capture_output=True).returncode == 0
        assert conn.run(["cat"], input=b"x" * 300_000, capture_output=True).stdout == b"x" * 300_000
        with conn.archive_get("/etc/hostname") as got:
            tar = got.stdout.read()
        with conn.archive_put(f"/tmp/as-nobody-{os.getpid()}", no_owners=True) as put:
            put.stdin.write(tar)
            put.stdin.close()
            assert put.wait() == 0
        assert Path(f"/tmp/as-nobody-{os.getpid()}/hostname").read_bytes() == Path("/etc/hostname").read_bytes()
        assert conn.stats(processes=True)["sessions"]
        assert {entry["kind"] for entry in conn.sessions()} == {"main"}
        with conn.attach() as view:
            assert view.stdout.readline() == b"main\n"
    assert agent.stop() == 143
    assert "unexpected error" not in agent.log


# Secrets.


def test_no_process_of_the_same_user_reads_the_token(as_nobody: Callable[..., Agent]) -> None:
    agent = as_nobody()
    control = subprocess.Popen([*NOBODY, "sleep", "1000"], env={"SECRET": TOKEN})
    try:
        readable = eventually(
            lambda: as_same_user("cat", f"/proc/{control.pid}/environ").stdout, "sleep's own environment"
        )
        assert TOKEN.encode() in readable  # so reading it works, where nothing is done about it
        for name in ("environ", "mem", "maps", "auxv", "fd/0", "cwd/x", "root/x"):
            tried = as_same_user("head", "-c", "1", f"/proc/{agent.pid}/{name}")
            assert tried.returncode == 1, (name, tried)
            assert b"ermission denied" in tried.stderr, (name, tried)
        for pid, expected in ((control.pid, 10), (agent.pid, 20)):
            attach = (
                f"import ctypes, sys; sys.exit(20 if ctypes.CDLL(None).ptrace({PTRACE_SEIZE}, {pid}, 0, 0) else 10)"
            )
            assert as_same_user(sys.executable, "-c", attach).returncode == expected
        cmdline = as_same_user("cat", f"/proc/{agent.pid}/cmdline").stdout
        assert b"agent.py" in cmdline
        assert TOKEN.encode() not in cmdline
    finally:
        control.kill()
        control.wait()


def test_a_command_is_as_readable_and_dumpable_as_ever(as_nobody: Callable[..., Agent]) -> None:
    agent = as_nobody()
    with AgentConn.dial(agent.address, TOKEN) as conn, conn.popen(["sh", "-c", "echo $$; exec sleep 1000"]) as process:
        pid = int(process.stdout.readline())
        assert os.stat(f"/proc/{pid}/environ").st_uid == 65534
        assert b"SOCKERLESS_AGENT_SESSION" in as_same_user("cat", f"/proc/{pid}/environ").stdout
        assert TOKEN.encode() not in as_same_user("cat", f"/proc/{pid}/environ").stdout
        process.kill()


def test_the_token_is_in_no_environment_and_command_line(start_agent: StartAgent) -> None:
    agent = start_agent()
    for pid in (agent.pid, *watchdogs()):
        for name in ("environ", "cmdline"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # another test's watchdog
                assert TOKEN.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()


def test_a_crash_of_the_agent_dumps_no_core(tmp_path: Path) -> None:
    def unlimited() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    command = [sys.executable, str(AGENT), "--addr", "127.0.0.1:0", "--pid-file", ""]
    dumped = []
    control = [sys.executable, "-c", "import sys, time; print('listening', file=sys.stderr); time.sleep(1000)"]
    for crashing in (control, command):
        with subprocess.Popen(
            crashing, cwd=tmp_path, stderr=subprocess.PIPE, preexec_fn=unlimited, env={"SOCKERLESS_AGENT_TOKEN": TOKEN}
        ) as process:
            assert process.stderr is not None
            while b"listening" not in process.stderr.readline():
                assert process.poll() is None
            process.send_signal(signal.SIGSEGV)
            _, status = os.waitpid(process.pid, 0)
            process.returncode = -signal.SIGSEGV
        assert os.WTERMSIG(status) == signal.SIGSEGV
        dumped.append(os.WCOREDUMP(status))
    if not dumped[0]:
        (pytest.fail if IN_CI else pytest.skip)("this system dumps no core of anybody")
    assert dumped == [True, False]


# The PID file.


@pytest.mark.parametrize("hostile", ["symlink", "dangling", "fifo", "directory", "socket", "hard link"])
def test_whatever_lies_where_the_pid_file_goes_does_no_harm(
    start_agent: StartAgent, tmp_path: Path, hostile: str
) -> None:
    path, victim = tmp_path / "mainpid", tmp_path / "victim"
    victim.write_text("precious")
    if hostile == "symlink":
        path.symlink_to(victim)
    elif hostile == "dangling":
        path.symlink_to(tmp_path / "not-there")
    elif hostile == "fifo":
        os.mkfifo(path)
    elif hostile == "directory":
        path.mkdir()
        (path / "inside").write_text("kept")
    elif hostile == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o666)
    else:
        os.link(victim, path)
    agent = start_agent("--pid-file", str(path), "--keep-alive", "--", "sh", "-c", "echo up; exec sleep 1000")
    agent.wait_for_output(b"up\n")
    if hostile == "directory":
        agent.wait_for_log("cannot write the PID file")
        assert (path / "inside").read_text() == "kept"
    else:
        assert path.read_text() == str(agent.health()["pid"])
        assert stat.S_ISREG(path.lstat().st_mode)
    assert agent.stop() == 143
    assert victim.read_text() == "precious"
    assert not (tmp_path / "not-there").exists()
    assert path.is_dir() == (hostile == "directory")


@pytest.mark.parametrize("hostile", ["symlink", "fifo", "directory", "gone"])
def test_whatever_is_put_there_later_holds_up_no_end(start_agent: StartAgent, tmp_path: Path, hostile: str) -> None:
    path, victim = tmp_path / "mainpid", tmp_path / "victim"
    agent = start_agent("--pid-file", str(path), "--keep-alive", "--", "sh", "-c", "echo up; exec sleep 1000")
    agent.wait_for_output(b"up\n")
    victim.write_text(path.read_text())
    path.unlink()
    if hostile == "symlink":
        path.symlink_to(victim)
    elif hostile == "fifo":
        os.mkfifo(path)
    elif hostile == "directory":
        path.mkdir()
    assert agent.stop() == 143
    assert victim.exists()
    assert path.is_symlink() == (hostile == "symlink")


def test_a_race_for_the_pid_file_is_never_won(start_agent: StartAgent, tmp_path: Path) -> None:
    path, victim = tmp_path / "mainpid", tmp_path / "victim"
    victim.write_text("precious")
    over = threading.Event()

    def attack() -> None:
        scratch = tmp_path / "attack"
        while not over.is_set():
            with contextlib.suppress(OSError):
                scratch.symlink_to(victim)
            with contextlib.suppress(OSError):
                scratch.rename(path)

    attacker = threading.Thread(target=attack)
    attacker.start()
    try:
        for _ in range(8):
            agent = start_agent("--pid-file", str(path), "--exit-with-main", "--keep-alive", "--", "true")
            assert agent.wait() == 0
            assert victim.read_text() == "precious"
    finally:
        over.set()
        attacker.join()


# The agent's sudden end.


def watchdogs() -> list[int]:
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            with contextlib.suppress(OSError):
                if (directory / "comm").read_text() == "agent-watchdog\n":
                    found.append(int(directory.name))
    return found


def watchdog_of(agent: Agent) -> int:
    """The watchdog that shares the agent's command line: its PID file is nobody else's."""

    def find() -> list[int]:
        found = []
        for pid in watchdogs():
            with contextlib.suppress(OSError):  # another test's, and gone by now
                if str(agent.pid_file).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    (watchdog,) = eventually(find, "a watchdog")
    return int(watchdog)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_an_agent_that_is_killed_leaves_no_session_behind(
    start_agent: StartAgent, connect: Callable[..., RawClient], tmp_path: Path, number: int
) -> None:
    agent = start_agent("--kill-timeout", "200ms", "--keep-alive", "--", "sh", "-c", "trap '' HUP; exec sleep 1000")
    watchdog = watchdog_of(agent)
    client = connect(agent)
    scripts = {
        "plain": "echo $$; exec sleep 1000",
        "deaf": "trap '' HUP TERM INT; echo $$; while :; do sleep 1; done",
        "cleaned": "echo $$; exec env -i sleep 1000",
        "daemon": "setsid sh -c 'echo $$; exec sleep 1000' & wait",
        "orphan": "(setsid sh -c 'echo $$; exec sleep 1000' &)",
        "child of the cleaned": "env -i sh -c 'sleep 1000 & echo $!; wait'",
    }
    pids = {name: int(client.exec(["sh", "-c", script]).wait_for_lines(1)[0]) for name, script in scripts.items()}
    terminal = client.exec(["sh", "-c", "echo $$; exec sleep 1000"], tty=True)
    pids["on a terminal"] = int(terminal.wait_for_lines(1)[0])
    pids["main"] = agent.health()["pid"]
    assert all(map(is_alive, pids.values()))
    os.kill(agent.pid, number)
    for pid in pids.values():
        wait_gone(pid)
    wait_gone(watchdog)


def test_an_agent_that_is_killed_before_anything_ran_leaves_no_watchdog(start_agent: StartAgent) -> None:
    agent = start_agent()
    watchdog = watchdog_of(agent)
    assert is_alive(watchdog)
    agent.kill()
    wait_gone(watchdog)


def test_the_watchdog_ends_with_the_agent_and_holds_nothing_of_it(start_agent: StartAgent) -> None:
    agent = start_agent("--keep-alive", "--", "sleep", "1000")
    watchdog = watchdog_of(agent)
    targets = {os.readlink(f"/proc/{watchdog}/fd/{fd}") for fd in os.listdir(f"/proc/{watchdog}/fd")}
    assert {re.sub(r":.*", "", target) for target in targets} == {"/dev/null", "pipe"}
    assert os.readlink(f"/proc/{watchdog}/cwd") == "/"
    assert agent.stop() == 143  # its log ends, too: nobody else has it
    wait_gone(watchdog)


def test_processes_of_others_are_left_alone_by_the_watchdog(
    start_agent: StartAgent, connect: Callable[..., RawClient]
) -> None:
    bystander = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    other = start_agent()
    others = int(connect(other).exec(["sh", "-c", "echo $$; exec sleep 1000"]).wait_for_lines(1)[0])
    agent = start_agent("--kill-timeout", "0s")
    mine = int(connect(agent).exec(["sh", "-c", "echo $$; exec sleep 1000"]).wait_for_lines(1)[0])
    watchdog = watchdog_of(agent)
    agent.kill()
    wait_gone(mine)
    wait_gone(watchdog)
    try:
        assert bystander.poll() is None
        assert is_alive(others)
        assert other.health() == {"status": "ok"}
    finally:
        bystander.kill()
        bystander.wait()


def test_a_pid_1_has_no_watchdog(start_agent: StartAgent, connect: Callable[..., RawClient]) -> None:
    need("unshare")
    need_root()
    agent = start_agent(prefix=AS_PID_1)
    names = connect(agent).output("sh", "-c", "cat /proc/[0-9]*/comm")
    assert "watchdog" not in names

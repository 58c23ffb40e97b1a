"""What is shipped beside agent.py: one file that any Python runs, and a directory that needs no Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support import AGENT, AS_PID_1, DEADLINE, Agent, RawClient, children_of, eventually, need, need_root

from agent_client import AgentConn

ROOT = AGENT.parent


def build(script: str, target: Path, **env: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), str(target)],
        env={**os.environ, **env}, capture_output=True, text=True, timeout=DEADLINE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("pyz") / "agent.pyz"
    build("build-pyz", target)
    return target


@pytest.fixture(scope="module")
def standalone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("cc", "ldd")
    target = tmp_path_factory.mktemp("standalone") / "anywhere"
    build("build-standalone", target)
    return target


def test_the_file_is_the_same_bytes_each_time(pyz: Path, tmp_path: Path) -> None:
    again = tmp_path / "elsewhere.pyz"
    build("build-pyz", again, TZ="Asia/Tokyo", LC_ALL="C", PYTHONHASHSEED="7")
    assert again.read_bytes() == pyz.read_bytes()
    assert pyz.stat().st_size < 1_000_000
    names = zipfile.ZipFile(pyz).namelist()
    assert names == sorted(names)
    assert "websockets/LICENSE" in names


def test_the_file_runs_without_anything_installed(pyz: Path, tmp_path: Path) -> None:
    # -I -S: no site-packages, no PYTHONPATH, no directory of the caller's.
    done = subprocess.run([sys.executable, "-I", "-S", str(pyz), "--version"], capture_output=True, cwd=tmp_path)
    assert re.fullmatch(rb"sockerless-agent \d+\.\d+\.\d+\n", done.stdout), done
    assert subprocess.run([str(pyz), "--version"], capture_output=True).stdout == done.stdout


def test_the_file_serves_and_leaves_nothing_behind(
    pyz: Path, start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    agent = start_agent("--keep-alive", "--", "sh", "-c", "echo up; exec sleep 300", program=pyz)
    client = connect(agent)
    assert client.output("echo", "on") == "on\n"
    assert client.run(["cat"], stdin=b"x" * 1_000_000)[0] == b"x" * 1_000_000
    assert agent.stop() == 143
    assert [path.name for path in pyz.parent.iterdir()] == ["agent.pyz"]


def run_standalone(standalone: Path, *words: str) -> subprocess.CompletedProcess[str]:
    program = str(standalone / "sockerless-agent")
    return subprocess.run([program, *words], env={}, capture_output=True, text=True, timeout=DEADLINE)


def test_the_directory_says_its_version_and_refuses_nonsense(standalone: Path) -> None:
    done = run_standalone(standalone, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"sockerless-agent \d+\.\d+\.\d+\n", done.stdout)
    done = run_standalone(standalone, "--addr", "nonsense")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_the_directory_may_be_moved_and_called_through_a_link(standalone: Path, tmp_path: Path) -> None:
    shutil.copytree(standalone, tmp_path / "moved to")
    (tmp_path / "link").symlink_to(tmp_path / "moved to" / "sockerless-agent")
    done = subprocess.run([str(tmp_path / "link"), "--version"], env={}, capture_output=True, text=True)
    assert done.stdout.startswith("sockerless-agent ")


@pytest.mark.root
def test_the_directory_is_all_that_a_root_file_system_needs(standalone: Path, tmp_path: Path) -> None:
    need("unshare", "chroot", "busybox")
    need_root()
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "proc").mkdir()
    shutil.copy(shutil.which("busybox") or "", root / "bin/sh")
    shutil.copytree(standalone, root / "sockerless/bin")
    script = 'mount -t proc proc "$1/proc" && shift && exec chroot "$@"'
    agent = ("/sockerless/bin/sockerless-agent", "--addr", "unix:/agent", "--exit-with-main", "--keep-alive", "--")
    done = subprocess.run(
        ["unshare", "--pid", "--mount", "--fork", "--kill-child", "sh", "-c", script, "sh", str(root), str(root),
         *agent, "/bin/sh", "-c", "echo $PPID; env -i 2>/dev/null; exit 6"],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, capture_output=True, text=True, timeout=DEADLINE,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (6, "1\n"), done.stderr


@pytest.mark.root
def test_the_directory_is_an_init(
    standalone: Path, start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    need("unshare")
    need_root()
    launcher = standalone / "sockerless-agent"
    # As the interpreter of its own launcher: `python agent.py` is what Agent starts, so this takes its place.
    agent = start_agent(prefix=(*AS_PID_1, "sh", "-c", f'shift 2; exec {launcher} "$@"', "sh"))
    client = connect(agent)
    client.output("sh", "-c", "for i in 1 2 3 4 5; do (true & exec true) & done; wait")
    names = [line.partition("=")[0] for line in client.output("env").splitlines()]
    assert not [name for name in names if name.startswith(("LD_LIBRARY", "PYTHONHOME", "PYTHONPATH"))]
    eventually(lambda: not children_of(agent.pid), "the end of all orphans")
    assert agent.stop() == 0


def test_the_directory_has_all_that_is_imported_late(
    standalone: Path, start_agent: Callable[..., Agent], tmp_path: Path
) -> None:
    """Copies in and out, over what lies there too, statistics, and another user."""
    launcher = standalone / "sockerless-agent"
    agent = start_agent(prefix=("sh", "-c", f'shift; exec {launcher} "$@"'))
    (tmp_path / "tree/sub").mkdir(parents=True)
    (tmp_path / "to/tree/sub").mkdir(parents=True)
    (tmp_path / "tree/sub/file").write_bytes(b"content")
    with AgentConn.dial(agent.address, agent.token) as conn:
        data = conn.archive_get(str(tmp_path / "tree")).stdout.read()
        (tmp_path / "tree/sub/file").unlink()
        (tmp_path / "tree/sub").rmdir()
        (tmp_path / "tree/sub").write_bytes(b"a file")  # in place of a directory
        for archive in (data, conn.archive_get(str(tmp_path / "tree")).stdout.read()):
            process = conn.archive_put(str(tmp_path / "to"))
            process.stdin.write(archive)
            process.stdin.close()
            assert process.wait(DEADLINE) == 0
        assert (tmp_path / "to/tree/sub").read_bytes() == b"a file"
        assert conn.stats(processes=True)["container"]["processes"] > 1
        if os.geteuid() == 0:
            assert conn.popen(["id", "-u"], user="nobody").stdout.read() == b"65534\n"

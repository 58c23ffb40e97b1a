"""docker cp both ways, with Docker's own client, in a container whose tar it does not use."""

from __future__ import annotations

import filecmp
import hashlib
import io
import os
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest
from docking import DEADLINE, Gateway
from support import TOKEN, Agent, eventually, need_root

from agent_client import AgentConn

Box = tuple[Agent, Gateway]
ODD_NAMES = ["with space", "new\nline", "quote'\"", "ümläut", "-rf", "*", "back\\slash", "x" * 200]


def make_tree(top: Path) -> None:
    (top / "sub/deep/empty").mkdir(parents=True)
    (top / "file").write_bytes(os.urandom(100_000))
    (top / "empty").touch()
    (top / "run").write_text("#!/bin/sh\n")
    (top / "run").chmod(0o4751)
    (top / "sub/deep").chmod(0o1777)
    (top / "sub/link").symlink_to("../file")
    (top / "dangling").symlink_to("/no/such/target")
    os.link(top / "file", top / "sub/hard")
    os.mkfifo(top / "fifo", 0o600)
    for name in ODD_NAMES:
        (top / name).write_text(name)
    os.utime(top / "file", (1_000_000_000, 1_000_000_000))


def describe(top: Path) -> dict[str, tuple[object, ...]]:
    """Everything about a tree that a copy is to keep."""
    found: dict[str, tuple[object, ...]] = {}
    for path in [top, *top.rglob("*")]:
        status = path.lstat()
        content: object = None
        if stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest(), int(status.st_mtime)
        name = str(path.relative_to(top))
        found[name] = stat.filemode(status.st_mode), content
    return found


def test_a_tree_survives_both_ways(gateway: Gateway, tmp_path: Path) -> None:
    source, there, back = tmp_path / "source", tmp_path / "there", tmp_path / "back"
    source.mkdir()
    make_tree(source)
    there.mkdir()
    gateway.output("cp", str(source), f"web:{there}/copy")
    assert describe(there / "copy") == describe(source)
    assert (there / "copy/file").stat().st_ino == (there / "copy/sub/hard").stat().st_ino
    gateway.output("cp", f"web:{there}/copy", str(back))
    (back / "fifo").unlink(missing_ok=True)
    (source / "fifo").unlink()
    assert describe(back) == describe(source)


def test_a_file_goes_where_docker_puts_it(gateway: Gateway, tmp_path: Path) -> None:
    source = tmp_path / "a"
    source.write_text("text")
    there = tmp_path / "there"
    there.mkdir()
    gateway.output("cp", str(source), f"web:{there}")
    assert (there / "a").read_text() == "text"
    gateway.output("cp", str(source), f"web:{there}/b")
    assert (there / "b").read_text() == "text"
    gateway.output("cp", f"web:{there}/b", f"{tmp_path}/c")
    assert (tmp_path / "c").read_text() == "text"
    (there / "link").symlink_to("b")
    gateway.output("cp", "-L", f"web:{there}/link", f"{tmp_path}/followed")
    assert (tmp_path / "followed").read_text() == "text" and not (tmp_path / "followed").is_symlink()


def test_what_is_not_there_is_said(gateway: Gateway, tmp_path: Path) -> None:
    assert "/no/such/file" in gateway.refused("cp", "web:/no/such/file", str(tmp_path))
    (tmp_path / "a").touch()
    assert "no such directory" in gateway.refused("cp", str(tmp_path / "a"), "web:/no/such/dir/")
    assert gateway.refused("cp", str(tmp_path / "a"), f"web:{tmp_path}/a/b")
    (tmp_path / "dir").mkdir()
    assert gateway.refused("cp", str(tmp_path / "dir"), f"web:{tmp_path}/a")
    assert (tmp_path / "a").is_file()


@pytest.mark.parametrize("way", ["in", "out"])
def test_a_gibibyte_goes_through_while_little_memory_is_used(
    gateway: Gateway, web: Agent, tmp_path: Path, way: str
) -> None:
    source, target = tmp_path / "big", tmp_path / "copied"
    with source.open("wb") as file:
        for _ in range(64):
            file.write(os.urandom(1 << 20) * 16)
    before = [peak_memory(pid) for pid in (gateway.process.pid, web.pid)]
    words = (str(source), f"web:{target}") if way == "in" else (f"web:{source}", str(target))
    gateway.output("cp", *words)
    after = [peak_memory(pid) for pid in (gateway.process.pid, web.pid)]
    assert filecmp.cmp(source, target, shallow=False)
    source.unlink()
    target.unlink()
    # Of 1 GiB: what is on its way, not what was copied.
    assert [new - old < 128 << 20 for new, old in zip(after, before, strict=True)] == [True, True], (before, after)


def peak_memory(pid: int) -> int:
    """Bytes, see proc_pid_status(5)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def test_a_stream_is_copied_as_an_archive(gateway: Gateway, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a").write_text("text")
    code, archive, _ = gateway.docker("cp", f"web:{tmp_path}/sub", "-")
    assert code == 0
    (tmp_path / "x.tar").write_bytes(archive)
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert tar.getnames() == ["sub", "sub/a"]
    (tmp_path / "there").mkdir()
    assert gateway.docker("cp", "-", f"web:{tmp_path}/there", data=archive)[0] == 0
    assert (tmp_path / "there/sub/a").read_text() == "text"


@pytest.mark.parametrize("packer", ["gzip", "bzip2", "xz"])
def test_a_compressed_archive_is_unpacked(gateway: Gateway, tmp_path: Path, packer: str) -> None:
    (tmp_path / "a").write_text("text" * 10000)
    (tmp_path / "there").mkdir()
    plain = subprocess.run(["tar", "-cf", "-", "-C", tmp_path, "a"], stdout=subprocess.PIPE, check=True).stdout
    packed = subprocess.run([packer, "-c"], input=plain, stdout=subprocess.PIPE, check=True).stdout
    assert gateway.docker("cp", "-", f"web:{tmp_path}/there", data=packed)[0] == 0
    assert (tmp_path / "there/a").read_text() == "text" * 10000
    code, _, stderr = gateway.docker("cp", "-", f"web:{tmp_path}/there", data=packed[: len(packed) // 2])
    assert code == 1 and b"the archive cannot be unpacked" in stderr


def test_a_copy_that_is_interrupted_leaves_no_half_written_file(gateway: Gateway, web: Agent, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    small, big = tarfile.TarInfo("small"), tarfile.TarInfo("big")
    big.size = 1 << 30
    with gateway.start("cp", "-", f"web:{there}") as process, AgentConn.dial(web.address, TOKEN) as conn:
        assert process.stdin is not None
        process.stdin.write(small.tobuf() + big.tobuf() + bytes(8 << 20))
        process.stdin.flush()
        eventually(lambda: (there / "small").exists(), "the first file")
        process.kill()
        eventually(lambda: all(entry["kind"] != "archive" for entry in conn.sessions()), "the end of the copy")
    assert os.listdir(there) == ["small"]


def test_owners_are_those_of_the_archive(gateway: Gateway, tmp_path: Path) -> None:
    need_root()
    source, kept = tmp_path / "a", tmp_path / "b"
    source.write_text("text")
    os.chown(source, 1234, 4321)
    for words in (["cp"], ["cp", "-a"]):
        gateway.output(*words, str(source), f"web:{kept}")
        assert (kept.stat().st_uid, kept.stat().st_gid) == (1234, 4321)
        kept.unlink()
    gateway.output("cp", str(source), f"web:{kept}")
    code, archive, _ = gateway.docker("cp", f"web:{kept}", "-")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        assert (code, tar.getmember("b").uid, tar.getmember("b").gid) == (0, 1234, 4321)


def test_the_client_can_copy_while_commands_run(gateway: Gateway, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(os.urandom(1 << 20))
    with gateway.start("exec", "web", "sh", "-c", "sleep 0.2; echo done") as process:
        gateway.output("cp", f"web:{tmp_path}/a", f"{tmp_path}/b")
        assert process.communicate(timeout=DEADLINE)[0] == b"done\n"
    assert filecmp.cmp(tmp_path / "a", tmp_path / "b", shallow=False)

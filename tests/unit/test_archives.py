"""Archives: a tree comes back as it was, and nothing in an archive leads out of the directory that it is put into."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies
from support import need_root
from waiting import PATIENCE

import agent
from agent import ArchiveError, Reason, Unpacker, pack, stat_path

NOBODY = 65534


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user may enter, as pytest's own are not."""
    path = Path(tempfile.mkdtemp(prefix="archive-"))
    path.chmod(0o755)
    yield path
    subprocess.run(["rm", "-rf", path], check=True)  # whatever the depth


class Pieces:
    """A stream that comes in pieces of any size."""

    def __init__(self, data: bytes, seed: int = 0) -> None:
        self._file = io.BytesIO(data)
        self._random = random.Random(seed)

    def read(self, size: int) -> bytes:
        return self._file.read(min(size, self._random.choice((1, 7, 511, 512, 513, 4096, 1 << 20))))


def packed(path: str | Path, name: str = "") -> bytes:
    parts: list[bytes] = []
    pack(str(path), parts.append, name)
    return b"".join(parts)


def unpack(data: bytes, target: str | Path, seed: int | None = None, **options: Any) -> None:
    with contextlib.closing(Unpacker(str(target), **options)) as unpacker:
        unpacker.unpack(io.BytesIO(data) if seed is None else Pieces(data, seed))


def look(top: str | Path | bytes) -> dict[bytes, tuple[object, ...]]:
    """All that is to be the same again of a tree, by name; what has several names, by its first."""
    first: dict[tuple[int, int], bytes] = {}
    seen: dict[bytes, tuple[object, ...]] = {}
    left = [b""]
    while left:
        name = left.pop()
        path = os.path.join(os.fsencode(top), name) if name else os.fsencode(top)
        found = os.lstat(path)
        content: object = None
        if stat.S_ISREG(found.st_mode):
            with open(path, "rb") as file:
                content = hashlib.sha256(file.read()).hexdigest()
        elif stat.S_ISLNK(found.st_mode):
            content = os.readlink(path)
        elif stat.S_ISDIR(found.st_mode):
            left += sorted((os.path.join(name, below) for below in os.listdir(path)), reverse=True)
        alias = first.setdefault((found.st_dev, found.st_ino), name)
        facts = (found.st_mode, found.st_uid, found.st_gid, found.st_mtime_ns, found.st_rdev)
        seen[name] = (*facts, content, alias)
    return seen


class Archive:
    """An archive made by hand."""

    def __init__(self) -> None:
        self._file = io.BytesIO()
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)

    def add(self, name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, pax: dict[str, str] | None = None,
            **fields: Any) -> Archive:  # fmt: skip
        info = tarfile.TarInfo(name)
        info.type, info.size, info.pax_headers = kind, len(content), pax or {}
        info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
        info.uid, info.gid = os.geteuid(), os.getegid()
        for field, value in fields.items():
            setattr(info, field, value)
        self._tar.addfile(info, io.BytesIO(content))
        return self

    def directory(self, name: str, **fields: Any) -> Archive:
        return self.add(name, kind=tarfile.DIRTYPE, **fields)

    def link(self, name: str, target: str, **fields: Any) -> Archive:
        return self.add(name, kind=tarfile.SYMTYPE, linkname=target, **fields)

    def hard_link(self, name: str, target: str) -> Archive:
        return self.add(name, kind=tarfile.LNKTYPE, linkname=target)

    def bytes(self) -> bytes:
        self._tar.close()
        return self._file.getvalue()


# ── there and back ────────────────────────────────────────────────────────────

NAMES = strategies.binary(min_size=1, max_size=12).filter(lambda name: b"/" not in name and b"\0" not in name) | (
    strategies.sampled_from([
        b"plain", b"with space", b"new\nline", b"-rf", b"\xff\xfe", "ü".encode(), b"a=b", b"n" * 255, b"\xe9" * 200,
        b"..x", b"...", b"x" * 100, b"x" * 101, b"\\", b"*", b"\x1b[31m", b"ends with a dot.",
    ])
)  # fmt: skip
MODES = strategies.integers(0, 0o7777)
OWNERS = strategies.sampled_from([0, 1, 1000, NOBODY, 2**21, 2**31, 2**32 - 2])
TIMES = strategies.sampled_from([0, 1, -1, -1_500_000_001, 10**18 + 123_456_789, 8_589_934_592 * 10**9]) | (
    strategies.integers(-(2**31) * 10**9, 2**33 * 10**9)
)
CONTENTS = strategies.tuples(
    strategies.binary(max_size=40) | strategies.just(b"\0"), strategies.sampled_from([1, 1, 511, 512, 513, 20_000])
)
TARGETS = strategies.sampled_from([b"/etc/passwd", b"../../../..", b"nowhere", b".", b"l" * 150, b"\xff", b"a/../b"])
LEAVES = (
    strategies.tuples(strategies.just("file"), CONTENTS)
    | strategies.tuples(strategies.just("link"), TARGETS)
    | strategies.tuples(strategies.just("fifo"), strategies.none())
    | strategies.tuples(strategies.just("alias"), strategies.integers(0, 5))
)
ATTRIBUTES = strategies.tuples(MODES, OWNERS, OWNERS, TIMES)


def _directories(children: Any) -> Any:
    usable = NAMES.filter(lambda name: name not in (b".", b".."))
    entries = strategies.dictionaries(usable, strategies.tuples(children, ATTRIBUTES), max_size=5)
    return strategies.tuples(strategies.just("directory"), entries)


TREES = _directories(strategies.recursive(LEAVES, _directories, max_leaves=12))


def _plant(path: bytes, node: tuple[str, Any], attributes: tuple[int, int, int, int], files: list[bytes]) -> None:
    kind, value = node
    mode, uid, gid, time = attributes
    if kind == "alias":
        if files:
            os.link(files[value % len(files)], path, follow_symlinks=False)
            return
        kind, value = "file", (b"", 0)
    if kind == "file":
        with open(path, "wb") as file:
            file.write(value[0] * value[1])
    elif kind == "link":
        os.symlink(value, path)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        os.mkdir(path)
        for name, (child, its) in value.items():
            _plant(os.path.join(path, name), child, its, files)
    if kind != "directory":
        files.append(path)
    if os.geteuid() == 0:
        os.chown(path, uid, gid, follow_symlinks=False)
    if kind != "link":
        os.chmod(path, mode if os.geteuid() == 0 else mode & 0o777 | 0o700)
    os.utime(path, ns=(time, time), follow_symlinks=False)


@hypothesis.given(TREES, ATTRIBUTES, strategies.integers(0, 1 << 30))
def test_a_tree_comes_back_as_it_was(tree: tuple[str, Any], attributes: tuple[int, int, int, int], seed: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        source, target = os.path.join(directory, "source"), os.path.join(directory, "target")
        _plant(os.fsencode(source), tree, attributes, [])
        os.mkdir(target)
        data = packed(source)
        for _ in range(2):  # a second time over what is there
            unpack(data, target, seed)
            assert look(os.path.join(target, "source")) == look(source)
            assert os.listdir(target) == ["source"]


@hypothesis.given(TREES, ATTRIBUTES)
@hypothesis.settings(max_examples=25)
def test_gnu_tar_reads_what_is_packed_and_the_other_way_round(tree: Any, attributes: tuple[int, int, int, int]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        source = os.path.join(directory, "source")
        _plant(os.fsencode(source), tree, attributes, [])
        theirs, ours = os.path.join(directory, "theirs"), os.path.join(directory, "ours")
        os.mkdir(theirs)
        os.mkdir(ours)
        tar = ["tar", "--numeric-owner", "--same-permissions", "--absolute-names", "-C"]
        subprocess.run([*tar, theirs, "-xf", "-"], input=packed(source), check=True, stderr=subprocess.DEVNULL)
        assert look(os.path.join(theirs, "source")) == look(source)
        expected = look(source)
        for kind in ("--format=gnu", "--format=pax"):
            made = subprocess.run([*tar, directory, kind, "-cf", "-", "source"], check=True, capture_output=True).stdout
            unpack(made, ours)
            seen = look(os.path.join(ours, "source"))
            for facts in (seen, expected):
                for name, (mode, uid, gid, time, device, content, alias) in facts.items():
                    # It knows no second name of a FIFO, and in its own format no part of a second.
                    alias = alias if not stat.S_ISFIFO(mode) else b""
                    time = time // 10**9 if kind == "--format=gnu" else time
                    facts[name] = (mode, uid, gid, time, device, content, alias)
            assert seen == expected
            expected = look(source)


def test_paths_of_any_length_come_back(place: Path) -> None:
    """Longer than what a header holds, and than what one system call takes."""
    (place / "source").mkdir()
    (place / "target").mkdir()
    name = "n" * 250
    fd = os.open(place / "source", os.O_RDONLY)
    for level in range(40):
        with os.fdopen(os.open(f"file{level}", os.O_WRONLY | os.O_CREAT, dir_fd=fd), "wb") as file:
            file.write(b"%d" % level)
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    before = set(os.listdir("/proc/self/fd"))
    unpack(packed(place / "source"), place / "target")
    assert len(os.listdir("/proc/self/fd")) == len(before)
    ends = []
    for top in ("source", "target/source"):
        fd = os.open(place / top, os.O_RDONLY)
        for level in range(40):
            with open(os.open(f"file{level}", os.O_RDONLY, dir_fd=fd), "rb") as file:
                assert file.read() == b"%d" % level
            below = os.open(name, os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        ends.append(os.listdir(fd))
        os.close(fd)
    assert ends == [[], []]


def test_a_tree_deeper_than_the_stack_comes_back(place: Path) -> None:
    (place / "target").mkdir()
    depth = sys.getrecursionlimit() + 100
    fd = os.open(place, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    unpack(packed(place / "d"), place / "target")
    found = subprocess.run(["find", place / "target", "-name", "d"], check=True, capture_output=True).stdout
    assert len(found.splitlines()) == depth


def test_a_capability_comes_back(place: Path) -> None:
    need_root()
    program, value = place / "ping", bytes.fromhex("0100000200200000000000000000000000000000")
    program.write_bytes(b"#!/bin/sh\n")
    os.setxattr(program, "security.capability", value)
    (place / "target").mkdir()
    unpack(packed(program), place / "target")
    assert os.getxattr(place / "target/ping", "security.capability") == value


@pytest.mark.parametrize("size", [(8 << 30) - 1, 8 << 30, 1 << 40])
def test_a_size_beyond_eight_gib_is_told(place: Path, size: int) -> None:
    """Such a file is a hole: only its header is looked at."""
    with open(place / "large", "wb") as file:
        file.truncate(size)

    class Enough(Exception):
        pass

    seen: list[bytes] = []

    def write(data: bytes) -> None:
        seen.append(data)
        raise Enough

    with pytest.raises(Enough):
        pack(str(place / "large"), write)
    with tarfile.open(fileobj=io.BytesIO(seen[0]), mode="r:") as tar:
        member = tar.next()
    assert member is not None and member.size == size


@pytest.mark.parametrize("version", ["0.0", "0.1", "1.0", "gnu"])
def test_a_sparse_file_comes_back_with_its_holes(place: Path, version: str) -> None:
    with open(place / "sparse", "wb") as file:
        for offset in (1 << 20, 5 << 20, 60 << 20):
            file.seek(offset)
            file.write(b"data" * 5000)
        file.truncate(64 << 20)
    os.utime(place / "sparse", (1, 1))  # GNU's own format has whole seconds only
    kind = ["--format=gnu"] if version == "gnu" else ["--format=pax", f"--sparse-version={version}"]
    command = ["tar", "-C", place, *kind, "--sparse", "-cf", "-", "sparse"]
    made = subprocess.run(command, check=True, capture_output=True).stdout
    assert len(made) < 1 << 20
    (place / "target").mkdir()
    unpack(made, place / "target", seed=3)
    assert look(place / "target/sparse") == look(place / "sparse")
    assert (place / "target/sparse").stat().st_blocks * 512 < 8 << 20


def test_device_nodes_come_back(place: Path) -> None:
    need_root()
    (place / "source").mkdir()
    os.mknod(place / "source/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(place / "source/disk", stat.S_IFBLK | 0o600, os.makedev(259, 100_000))
    (place / "target").mkdir()
    unpack(packed(place / "source"), place / "target")
    assert look(place / "target/source") == look(place / "source")


# Puts each of two names in the other's place, in one step (renameat2(2)), as often as it can. The second is a link;
# where somebody has replaced that, there is soon another one.
EXCHANGE = """
import ctypes, os, sys
user, *names = sys.argv[1:]
if int(user):
    os.setgroups([])
    os.setgid(int(user))
    os.setuid(int(user))
renameat2 = ctypes.CDLL(None).renameat2
names = [os.fsencode(name) for name in names]
targets = {name: os.readlink(name) for name in names[1::2]}
print("exchanging", flush=True)
count = 0
while True:
    for first, second in zip(names[::2], names[1::2]):
        renameat2(-100, first, -100, second, 2)  # AT_FDCWD, RENAME_EXCHANGE
        if not os.path.islink(first) and not os.path.islink(second):
            count += 1
            try:
                os.rename(second, second + b"-%d" % count)
                os.symlink(targets[second], second)
            except OSError:
                pass
"""


@contextlib.contextmanager
def exchanging(*pairs: tuple[Path, Path], user: int = 0) -> Iterator[None]:
    command = [sys.executable, "-c", EXCHANGE, str(user), *(str(path) for pair in pairs for path in pair)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"exchanging\n"
            yield
        finally:
            process.kill()


# ── what is packed ────────────────────────────────────────────────────────────


def names_in(data: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return tar.getnames()


def test_names_begin_as_dockers_do(place: Path) -> None:
    (place / "d").mkdir()
    (place / "d/f").write_bytes(b"")
    (place / "link").symlink_to("d")
    assert names_in(packed(place / "d")) == ["d", "d/f"]
    assert names_in(packed(f"{place}/d/")) == ["d", "d/f"]
    assert names_in(packed(f"{place}/d/.")) == [".", "./f"]
    assert names_in(packed(place / "d/f")) == ["f"]
    assert names_in(packed(place / "link")) == ["link"]
    assert names_in(packed(f"{place}/link/")) == ["link", "link/f"]
    assert names_in(packed(place / "d", "other")) == ["other", "other/f"]
    assert names_in(packed(f"{place}/../{place.name}/d/f")) == ["f"]


def test_no_owner_is_named(place: Path) -> None:
    """Names differ from container to container, and GNU tar would take them before the numbers."""
    (place / "f").write_bytes(b"")
    with tarfile.open(fileobj=io.BytesIO(packed(place / "f")), mode="r:") as tar:
        member = tar.getmember("f")
    assert (member.uname, member.gname, member.uid) == ("", "", os.geteuid())


def test_sockets_are_left_out(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        (place / "d").mkdir()
        listener.bind(str(place / "d/socket"))
        assert names_in(packed(place / "d")) == ["d"]
        with pytest.raises(ArchiveError, match="a socket"):
            packed(place / "d/socket")


@pytest.mark.parametrize("path", ["/proc", "/proc/cpuinfo", "/sys/kernel"])
def test_what_the_kernel_makes_up_is_refused(path: str) -> None:
    with pytest.raises(ArchiveError, match="the kernel makes this up"):
        packed(path)


def test_what_the_kernel_makes_up_is_left_out_of_a_tree() -> None:
    """As when / is copied; in a mount namespace with a small one."""
    need_root()
    script = """
        import subprocess
        top = sys.argv[1]
        for name in ("proc", "sys", "tmp"):
            os.mkdir(f"{top}/{name}")
        open(f"{top}/file", "w").close()
        subprocess.run(["mount", "-t", "proc", "proc", f"{top}/proc"], check=True)
        subprocess.run(["mount", "-t", "sysfs", "sysfs", f"{top}/sys"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", f"{top}/tmp"], check=True)
        subprocess.run(["mount", "--bind", "/proc/kmsg", f"{top}/file"], check=True)
        open(f"{top}/tmp/kept", "w").close()
        os.chroot(top)
        os.chdir("/")
        pack("/", sys.stdout.buffer.write)
    """
    with tempfile.TemporaryDirectory() as top:
        assert names_in(in_namespace(script, top)) == [".", "./proc", "./sys", "./tmp", "./tmp/kept"]


# The interpreter may be where only root can read: another user runs what root has loaded.
AS_USER = """
import os, shutil, sys, tarfile
from agent import ArchiveError, Reason, Unpacker, pack, stat_path
def become(user):
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
"""


def in_namespace(script: str, *args: object, user: int | None = None) -> bytes:
    """What a script writes that has mounts of its own, or that runs as another user."""
    source = AS_USER + (f"become({user})\n" if user is not None else "") + textwrap.dedent(script)
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", sys.executable, "-B", "-c", source, *map(str, args)],
        env={**os.environ, "PYTHONPATH": os.path.dirname(agent.__file__)},
        capture_output=True,
        timeout=PATIENCE * 3,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def test_a_file_that_shrinks_is_an_error(place: Path) -> None:
    path = place / "log"
    path.write_bytes(b"x" * (4 << 20))
    seen = 0

    def write(data: bytes) -> None:
        nonlocal seen
        seen += len(data)
        path.write_bytes(b"")

    with pytest.raises(ArchiveError, match="log: became shorter while it was read"):
        pack(str(path), write)
    assert seen


def test_a_file_that_grows_has_the_size_that_it_had(place: Path) -> None:
    (place / "d").mkdir()
    path = place / "d/log"
    path.write_bytes(b"x" * (1 << 20))
    (place / "d/next").write_bytes(b"next")
    parts: list[bytes] = []

    def write(data: bytes) -> None:
        parts.append(data)
        with open(path, "ab") as file:
            file.write(b"y" * 100_000)

    pack(str(place / "d"), write)
    with tarfile.open(fileobj=io.BytesIO(b"".join(parts)), mode="r:") as tar:
        content, following = tar.extractfile("d/log"), tar.extractfile("d/next")
        assert content is not None and content.read() == b"x" * (1 << 20)
        assert following is not None and following.read() == b"next"


@pytest.mark.parametrize(
    "error", [BrokenPipeError("nobody reads"), FileNotFoundError(2, "other"), KeyError("x")], ids=str
)
def test_what_fails_in_who_takes_the_archive_is_passed_on(place: Path, error: Exception) -> None:
    """And is not taken for a fault of the file that is read."""
    (place / "file").write_bytes(b"x" * 300_000)

    def write(data: bytes) -> None:
        raise error

    for path in (place / "file", place):
        with pytest.raises(type(error)) as caught:
            pack(str(path), write)
        assert caught.value is error


def test_what_vanishes_is_left_out(place: Path) -> None:
    for name in ("a", "b", "c"):
        (place / "d" / name).mkdir(parents=True)
        (place / "d" / name / "file").write_bytes(b"x" * 300_000)
    parts: list[bytes] = []

    def write(data: bytes) -> None:
        parts.append(data)
        shutil.rmtree(place / "d/b", ignore_errors=True)
        (place / "d/c/file").unlink(missing_ok=True)

    pack(str(place / "d"), write)
    assert names_in(b"".join(parts)) == ["d", "d/a", "d/a/file", "d/c"]


def test_a_directory_that_is_moved_away_while_it_is_read_is_an_error(place: Path) -> None:
    """Its way up would lead to what nobody has asked for."""
    (place / "d/sub").mkdir(parents=True)
    (place / "d/sub/file").write_bytes(b"x" * 300_000)
    (place / "d/z").write_bytes(b"last")
    (place / "elsewhere").mkdir()
    (place / "elsewhere/secret").write_bytes(b"secret")

    def write(data: bytes) -> None:
        with contextlib.suppress(FileNotFoundError):
            (place / "d/sub").rename(place / "elsewhere/sub")

    with pytest.raises(ArchiveError, match="moved while it was read"):
        pack(str(place / "d"), write)


def test_a_link_that_takes_a_files_or_a_directorys_place_is_never_followed(place: Path) -> None:
    (place / "d/sub").mkdir(parents=True)
    (place / "d/file").write_bytes(b"harmless")
    (place / "out").mkdir()
    (place / "out/file").write_bytes(b"secret" * 50_000)  # more than what is sent at once
    (place / "file").symlink_to(f"{place}/out/file")
    (place / "sub").symlink_to(f"{place}/out")
    pairs = [(place / "d" / name, place / name) for name in ("file", "sub")]
    seen = set()
    with exchanging(*pairs):
        for _ in range(800):
            parts: list[bytes] = []
            with contextlib.suppress(ArchiveError):  # a directory that has moved; what has been sent, has been sent
                pack(str(place / "d"), parts.append)
                with tarfile.open(fileobj=io.BytesIO(b"".join(parts)), mode="r:") as tar:
                    seen |= {(member.name, member.type) for member in tar.getmembers()}
            assert b"secret" not in b"".join(parts)
    file, directory, link = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE
    assert seen == {("d", directory), ("d/file", file), ("d/file", link), ("d/sub", directory), ("d/sub", link)}


def test_what_a_user_cannot_read_is_an_error_with_its_name(place: Path) -> None:
    need_root()
    (place / "d").mkdir()
    (place / "d/open").write_bytes(b"")
    (place / "d/secret").write_bytes(b"secret")
    (place / "d/secret").chmod(0o600)
    script = """
        try:
            pack(sys.argv[1], lambda data: None)
        except ArchiveError as exc:
            print(exc.reason, exc)
    """
    said = in_namespace(script, place / "d", user=NOBODY)
    assert said == f"archive_failed {place}/d/secret: permission denied\n".encode()
    (place / "d/secret").unlink()
    (place / "d").chmod(0o700)
    said = in_namespace(script, place / "d", user=NOBODY)
    assert said == f"archive_failed {place}/d: permission denied\n".encode()


@pytest.mark.parametrize("path", ["/nowhere", "/etc/passwd/file", "/etc/passwd/", "/etc/passwd/."])
def test_nothing_there_is_told_as_such(path: str) -> None:
    for ask in (stat_path, packed, Unpacker):
        with pytest.raises(ArchiveError) as caught:
            ask(path)  # type: ignore[operator]
        assert caught.value.reason in (Reason.NO_SUCH_PATH, Reason.NOT_A_DIRECTORY)
        if ask is not Unpacker:
            assert caught.value.reason == Reason.NO_SUCH_PATH


# ── a path's state ────────────────────────────────────────────────────────────


def test_a_state_is_as_dockers_api_has_it(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"12345")
    path.chmod(0o6751)
    os.utime(path, ns=(0, 1_700_000_000_000_000_042))
    assert stat_path(str(path)) == {
        "name": "file", "size": 5, "mode": 0o751 | 1 << 23 | 1 << 22, "mtime": "2023-11-14T22:13:20.000000042Z",
        "linkTarget": "",
    }  # fmt: skip
    place.chmod(0o1777)
    state = stat_path(f"{place}/")
    assert (state["name"], state["mode"]) == (place.name, 1 << 31 | 1 << 20 | 0o777)
    assert stat_path("/")["name"] == "/"
    assert stat_path("relative/../etc/passwd")["name"] == "passwd"
    assert stat_path("/dev/null")["mode"] == 0o666 | 1 << 26 | 1 << 21


def test_a_links_target_is_given_from_the_root(place: Path) -> None:
    (place / "d").mkdir()
    (place / "near").symlink_to("d")
    (place / "far").symlink_to("/nowhere/at/all")
    state = stat_path(str(place / "near"))
    assert (state["linkTarget"], state["mode"] >> 27 & 1) == (os.path.realpath(place / "d"), 1)
    assert stat_path(str(place / "far"))["linkTarget"] == "/nowhere/at/all"
    assert stat_path(f"{place}/near/")["mode"] >> 31 == 1


@pytest.mark.parametrize("seconds", [-(2**31), -1, 0, 2**33])
def test_any_time_has_a_state(place: Path, seconds: int) -> None:
    (place / "file").write_bytes(b"")
    os.utime(place / "file", (seconds, seconds))
    assert stat_path(str(place / "file"))["mtime"].endswith(":00.000000000Z" if seconds == 0 else "Z")


def test_a_time_beyond_the_year_9999_has_a_state() -> None:
    need_root()
    script = """
        import subprocess
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", sys.argv[1]], check=True)
        path = f"{sys.argv[1]}/file"
        open(path, "w").close()
        for seconds in (2**60, -(2**60)):
            subprocess.run(["touch", "-d", f"@{seconds}", path], check=True)
            print(stat_path(path)["mtime"][:5], end="")
    """
    with tempfile.TemporaryDirectory() as top:
        assert in_namespace(script, top) == b"9999-0001-"


# ── what is put where ─────────────────────────────────────────────────────────


def test_the_directory_itself_keeps_its_mode_and_owner(place: Path) -> None:
    """As for Docker: `cp x/. :/tmp` does not change /tmp."""
    place.chmod(0o1777)
    unpack(Archive().directory("./", mode=0o700, uid=NOBODY).add("./file").bytes(), place)
    assert stat.S_IMODE(place.stat().st_mode) == 0o1777
    assert place.stat().st_uid == os.geteuid()
    assert os.listdir(place) == ["file"]


def test_a_directory_is_merged_and_takes_the_archives_mode(place: Path) -> None:
    (place / "d").mkdir(mode=0o700)
    (place / "d/old").write_bytes(b"old")
    unpack(Archive().directory("d", mode=0o750, mtime=77).add("d/new", b"new").bytes(), place)
    assert sorted(os.listdir(place / "d")) == ["new", "old"]
    assert stat.S_IMODE((place / "d").stat().st_mode) == 0o750
    assert (place / "d").stat().st_mtime == 77


def test_a_file_is_replaced_and_never_written_through(place: Path) -> None:
    (place / "file").write_bytes(b"old")
    os.link(place / "file", place / "alias")
    (place / "link").symlink_to("alias")
    with open(place / "file", "rb") as before:
        unpack(Archive().add("file", b"new").add("link", b"new").bytes(), place)
        assert before.read() == b"old"
    assert (place / "file").read_bytes() == (place / "link").read_bytes() == b"new"
    assert (place / "alias").read_bytes() == b"old"
    assert not (place / "link").is_symlink()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", ["file", "link", "fifo", "hard link"])
def test_a_directory_gives_way_to_a_file_unless_that_is_forbidden(place: Path, strict: bool, kind: str) -> None:
    (place / "x/below").mkdir(parents=True)
    archive = Archive().add("other", b"other")
    if kind == "file":
        archive.add("x", b"new")
    elif kind == "link":
        archive.link("x", "target")
    elif kind == "fifo":
        archive.add("x", kind=tarfile.FIFOTYPE)
    else:
        archive.hard_link("x", "other")
    if strict:
        with pytest.raises(ArchiveError, match="cannot overwrite directory 'x' with non-directory"):
            unpack(archive.bytes(), place, no_overwrite_dir_non_dir=True)
        assert (place / "x/below").is_dir()
    else:
        unpack(archive.bytes(), place)
        assert not stat.S_ISDIR((place / "x").lstat().st_mode)
    assert sorted(os.listdir(place)) == ["other", "x"]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_gives_way_to_a_directory_unless_that_is_forbidden(place: Path, strict: bool, kind: str) -> None:
    (place / "real").mkdir()
    if kind == "file":
        (place / "x").write_bytes(b"old")
    else:
        (place / "x").symlink_to("real")
    data = Archive().directory("x").add("x/file").bytes()
    if strict:
        with pytest.raises(ArchiveError, match="cannot overwrite non-directory 'x' with directory"):
            unpack(data, place, no_overwrite_dir_non_dir=True)
        assert not stat.S_ISDIR((place / "x").lstat().st_mode)
    else:
        unpack(data, place)
        assert (place / "x").is_dir() and not (place / "x").is_symlink()
    assert os.listdir(place / "real") == []


def test_parents_that_are_missing_are_made(place: Path) -> None:
    unpack(Archive().add("a/b/c", b"deep").bytes(), place)
    assert (place / "a/b/c").read_bytes() == b"deep"
    assert stat.S_IMODE((place / "a/b").stat().st_mode) == 0o755


def test_of_a_member_that_comes_twice_the_last_one_counts(place: Path) -> None:
    archive = Archive().add("f", b"first").directory("d", mode=0o700).add("f", b"second").directory("d", mode=0o711)
    archive.add("g", b"a file").directory("g").directory("h").add("h", b"then a file")
    unpack(archive.bytes(), place)
    assert (place / "f").read_bytes() == b"second"
    assert stat.S_IMODE((place / "d").stat().st_mode) == 0o711
    assert (place / "g").is_dir()
    assert (place / "h").read_bytes() == b"then a file"


def test_without_owners_all_is_the_users_own_and_runs_as_nobody_else(place: Path) -> None:
    need_root()
    archive = Archive().add("theirs", mode=0o6755, uid=1000, gid=1000).add("ours", mode=0o6755, uid=0, gid=0)
    archive.directory("d", mode=0o2755, uid=1000, gid=1000).link("link", "x", uid=1000)
    unpack(archive.bytes(), place, no_owners=True)
    assert {path.lstat().st_uid for path in place.iterdir()} == {0}
    assert stat.S_IMODE((place / "theirs").stat().st_mode) == 0o755
    assert stat.S_IMODE((place / "ours").stat().st_mode) == 0o6755
    assert stat.S_IMODE((place / "d").stat().st_mode) == 0o2755  # there it is inheritance
    data = archive.bytes()
    unpack(data, place)
    assert {path.lstat().st_uid for path in place.iterdir()} == {0, 1000}
    assert stat.S_IMODE((place / "theirs").stat().st_mode) == 0o6755


def test_who_is_not_root_owns_what_it_unpacks(place: Path) -> None:
    need_root()
    (place / "target").mkdir()
    os.chown(place / "target", NOBODY, NOBODY)
    archive = Archive().directory("d", mode=0o500, uid=0).add("d/f", b"x", mode=0o4755, uid=0)
    (place / "archive").write_bytes(archive.link("d/l", "f", uid=0).bytes())
    script = """
        unpacker = Unpacker(sys.argv[1])
        unpacker.unpack(open(sys.argv[2], "rb"))
        try:
            Unpacker("/etc").unpack(open(sys.argv[2], "rb"))
        except ArchiveError as exc:
            print(exc.reason, exc)
    """
    assert in_namespace(script, place / "target", place / "archive", user=NOBODY) == (
        b"archive_failed /etc/d: permission denied\n"
    )
    assert {facts[1] for facts in look(place / "target").values()} == {NOBODY}
    assert stat.S_IMODE((place / "target/d/f").stat().st_mode) == 0o755
    assert stat.S_IMODE((place / "target/d").stat().st_mode) == 0o500


def test_where_it_cannot_be_put_is_told(place: Path) -> None:
    (place / "file").write_bytes(b"")
    with pytest.raises(ArchiveError, match="no such file or directory") as caught:
        Unpacker(str(place / "missing"))
    assert caught.value.reason == Reason.NO_SUCH_PATH
    for path in ("file", "file/"):
        with pytest.raises(ArchiveError, match="not a directory") as caught:
            Unpacker(f"{place}/{path}")
        assert caught.value.reason == Reason.NOT_A_DIRECTORY if path == "file" else True


def test_a_full_disk_and_a_read_only_one_are_errors_that_leave_no_part_of_a_file(place: Path) -> None:
    need_root()
    archive = Archive().directory("d").add("d/small", b"s" * 1000).add("d/large", b"l" * (2 << 20)).add("d/after", b"a")
    (place / "archive").write_bytes(archive.bytes())
    (place / "disk").mkdir()
    script = """
        import subprocess
        disk, archive = sys.argv[1:]
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True)
        for options in ("remount,rw", "remount,ro"):
            subprocess.run(["mount", "-o", options, disk], check=True)
            try:
                Unpacker(disk).unpack(open(archive, "rb"))
            except ArchiveError as exc:
                print(exc)
            print(sorted(os.listdir(disk)), sorted(os.listdir(f"{disk}/d")), os.path.getsize(f"{disk}/d/small"))
        print(os.statvfs(disk).f_blocks - os.statvfs(disk).f_bfree)
    """
    first, left, second, still, blocks = in_namespace(script, place / "disk", place / "archive").decode().splitlines()
    assert first == f"{place}/disk/d/large: no space left on device"
    assert left == still == "['d'] ['small'] 1000"
    assert second == f"{place}/disk/d/small: read-only file system"
    assert int(blocks) < 10  # what was written of it is free again


def test_a_file_system_without_unnamed_files_is_used_as_well(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file system that is to be had here is like that: old overlays are, and network file systems."""
    real_open = os.open

    def open_(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "Operation not supported")
        return real_open(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", open_)
    data = Archive().add("a", b"a" * 1000, mode=0o4750).add("b", b"b" * 5000).bytes()
    (place / "a").write_bytes(b"old")
    unpack(data, place)
    assert (place / "a").read_bytes() == b"a" * 1000
    assert stat.S_IMODE((place / "a").stat().st_mode) == 0o4750
    with pytest.raises(ArchiveError, match="unexpected end"):
        unpack(data[:4000], place)
    assert sorted(os.listdir(place)) == ["a", "b"]
    assert (place / "b").read_bytes() == b"b" * 5000


# ── hostile archives ──────────────────────────────────────────────────────────


@pytest.fixture
def fortress(place: Path) -> Iterator[Path]:
    """A directory to unpack into, beside one of which not a bit may change."""
    outside = place / "outside"
    (outside / "d").mkdir(parents=True)
    (outside / "secret").write_bytes(b"secret")
    (place / "inside").mkdir()
    before = look(outside)
    yield place / "inside"
    assert look(outside) == before
    assert sorted(os.listdir(place)) == ["inside", "outside"]
    assert not [name for name in os.listdir(place / "inside") if name.startswith(".sockerless")]


@pytest.mark.parametrize("name", ["../outside/secret", "a/../../outside/secret", "..", "/../outside/secret", "a/.."])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE])
def test_names_that_lead_out_are_refused(fortress: Path, name: str, kind: bytes) -> None:
    with pytest.raises(ArchiveError, match="leads out of the directory"):
        unpack(Archive().add(name, kind=kind, linkname="x").bytes(), fortress)
    assert os.listdir(fortress) == []


def test_absolute_names_begin_in_the_directory(fortress: Path) -> None:
    unpack(Archive().add(f"{fortress.parent}/outside/secret", b"new").bytes(), fortress)
    assert (fortress / str(fortress.parent)[1:] / "outside/secret").read_bytes() == b"new"


@pytest.mark.parametrize("target", ["../outside", "/{}/outside", "d/../../outside", "second", "."])
@pytest.mark.parametrize("twice", [False, True])
def test_a_link_of_the_archive_is_not_followed(fortress: Path, target: str, twice: bool) -> None:
    target = target.format(fortress.parent)
    archive = Archive().directory("d").link("second", "../outside").link("link", target)
    if twice:
        archive.hard_link("name", "link")
    with pytest.raises(ArchiveError, match="a link of this archive, which is not followed"):
        unpack(archive.add("name/secret" if twice else "link/secret", b"new").bytes(), fortress)


def test_a_link_that_was_there_is_followed_if_root_or_this_user_made_it(fortress: Path) -> None:
    (fortress / "lib").mkdir()
    (fortress / "usr").mkdir()
    (fortress / "usr/lib").symlink_to("../lib")
    unpack(Archive().add("usr/lib/file", b"new").bytes(), fortress)
    assert (fortress / "lib/file").read_bytes() == b"new"
    (fortress / "loop").symlink_to("loop")
    with pytest.raises(ArchiveError, match="too many levels of symbolic links"):
        unpack(Archive().add("loop/file").bytes(), fortress)
    need_root()
    (fortress / "theirs").symlink_to("../outside")
    os.chown(fortress / "theirs", NOBODY, NOBODY, follow_symlinks=False)
    with pytest.raises(ArchiveError, match="a link of another user's"):
        unpack(Archive().add("theirs/secret", b"new").bytes(), fortress)


@pytest.mark.parametrize(
    ("target", "fault"),
    [
        ("../outside/secret", "leads out"),
        ("/../outside/secret", "leads out"),
        ("nowhere", "which is not there"),
        ("d", "operation not permitted"),
        (".", "a hard link to a directory"),
        ("d/../../outside/secret", "leads out"),
        ("to-outside/secret", "a link of this archive"),
    ],
)
def test_a_hard_link_cannot_reach_out(fortress: Path, target: str, fault: str) -> None:
    archive = Archive().directory("d").link("to-outside", "../outside").hard_link("hard", target)
    with pytest.raises(ArchiveError, match=fault):
        unpack(archive.bytes(), fortress)


def test_a_hard_link_to_a_link_is_a_name_of_the_link(fortress: Path) -> None:
    archive = Archive().link("soft", "../outside/secret").hard_link("hard", "soft").add("hard", b"new")
    unpack(archive.bytes(), fortress)
    assert (fortress / "hard").read_bytes() == b"new"
    assert os.readlink(fortress / "soft") == "../outside/secret"


def test_a_hard_link_to_itself_is_what_it_was(fortress: Path) -> None:
    unpack(Archive().add("file", b"x").hard_link("file", "file").hard_link("./file", "/file").bytes(), fortress)
    assert (fortress / "file").read_bytes() == b"x"
    assert os.listdir(fortress) == ["file"]


@pytest.mark.parametrize("below", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE])
def test_nothing_is_below_a_file(fortress: Path, below: bytes) -> None:
    with pytest.raises(ArchiveError, match="not a directory") as caught:
        unpack(Archive().add("file", b"x").add("file/below", kind=below, linkname="x").bytes(), fortress)
    assert caught.value.reason == Reason.ARCHIVE_FAILED
    assert (fortress / "file").read_bytes() == b"x"


def test_a_device_is_for_root_alone(fortress: Path) -> None:
    need_root()
    archive = Archive().add("memory", kind=tarfile.CHRTYPE, devmajor=1, devminor=1, mode=0o666)
    fortress.chmod(0o777)
    (fortress / "archive").write_bytes(archive.bytes())
    script = """
        try:
            Unpacker(sys.argv[1]).unpack(open(sys.argv[2], "rb"))
        except ArchiveError as exc:
            print(exc)
    """
    said = in_namespace(script, fortress, fortress / "archive", user=NOBODY)
    assert said == f"{fortress}/memory: operation not permitted\n".encode()
    (fortress / "archive").unlink()
    assert os.listdir(fortress) == []


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"pax": {"mtime": "nan"}}, "not a time"),
        ({"pax": {"mtime": "inf"}}, "not a time"),
        ({"pax": {"mtime": "1e400"}}, "not a time"),
        ({"pax": {"mtime": "9" * 4000}}, "not a time"),
        ({"pax": {"path": "nul\0byte"}}, "null"),
        ({"pax": {"size": "-5"}}, "below 0"),
        ({"pax": {"size": "99999999999999999999"}}, "unexpected end of data"),
        ({"kind": b"V"}, "unknown type"),
        ({"kind": b"~"}, "unknown type"),
        ({"name": "n" * 300}, "file name too long"),
        ({"name": "/"}, "names the directory itself"),
        ({"kind": tarfile.SYMTYPE, "linkname": "x" * 5000}, "file name too long"),
        ({"kind": tarfile.SYMTYPE, "linkname": ""}, "no such file"),
        ({"kind": tarfile.SYMTYPE, "pax": {"linkpath": "nul\0byte"}}, "null"),
    ],
    ids=str,
)
def test_a_member_that_no_system_call_takes_is_an_error(fortress: Path, fields: dict[str, Any], fault: str) -> None:
    fields = {"name": "x", **fields}
    with pytest.raises(ArchiveError, match=fault):
        unpack(Archive().add(**fields).bytes(), fortress)
    assert os.listdir(fortress) == []


@pytest.mark.parametrize("number", ["-1", "4294967295", "4294967296", "99999999999999999999"])
@pytest.mark.parametrize("key", ["uid", "gid"])
def test_an_owner_that_cannot_be_is_an_error(fortress: Path, key: str, number: str) -> None:
    """-1 would leave a set-user-ID file root's."""
    need_root()
    with pytest.raises(ArchiveError, match="no user can have the number"):
        unpack(Archive().add("x", mode=0o4755, pax={key: number}).bytes(), fortress)
    assert os.listdir(fortress) == []


def test_a_header_without_end_is_refused_before_it_fills_the_memory(fortress: Path) -> None:
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, 4 << 30
        with pytest.raises(ArchiveError, match="a header of more than"):
            unpack(info.tobuf(), fortress)


def test_headers_of_headers_without_end_are_refused(fortress: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1
    one = info.tobuf() + b"x".ljust(512, b"\0")
    with pytest.raises(ArchiveError, match="not a"):
        unpack(one * 5000, fortress)


def sparse(offset: int, length: int, size: int, content: bytes) -> bytes:
    """A GNU sparse member of one piece."""
    info = tarfile.TarInfo("x")
    info.type, info.size, info.mtime = tarfile.GNUTYPE_SPARSE, len(content), 0
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:398], header[398:410] = (tarfile.itn(value, 12, tarfile.GNU_FORMAT) for value in (offset, length))  # type: ignore[attr-defined]
    header[483:495] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined]
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:512]))
    return bytes(header) + content.ljust(-(-len(content) // 512) * 512, b"\0") + bytes(1024)


def test_a_hole_without_end_takes_no_time(fortress: Path) -> None:
    """Of 16 TiB, or of more than any file may have: neither is written out, nor counted through."""
    unpack(sparse(1000, 5, 1 << 40, b"data!"), fortress)
    with open(fortress / "x", "rb") as file:
        file.seek(995)
        assert file.read(20) == b"\0" * 5 + b"data!" + b"\0" * 10
    assert (fortress / "x").stat().st_size == 1 << 40
    (fortress / "x").unlink()
    with pytest.raises(ArchiveError):
        unpack(sparse(0, 5, (1 << 63) - 1, b"data!"), fortress)
    assert os.listdir(fortress) == []


@pytest.mark.parametrize(
    ("offset", "length", "size"), [(100, 600, 200), (-5, 5, 100), (0, -5, 100), (0, 1 << 62, 1 << 62), (5, 5, -1)]
)
def test_a_sparse_file_that_contradicts_itself_is_an_error(fortress: Path, offset: int, length: int, size: int) -> None:
    with pytest.raises(ArchiveError):
        unpack(sparse(offset, length, size, b"x" * 512), fortress)
    assert os.listdir(fortress) == []


def _sample() -> tuple[bytes, dict[str, bytes]]:
    contents = {"small": b"s", "block": b"b" * 512, "large": bytes(range(256)) * 20}
    contents |= {"n" * 120: b"long", "ü": b"", "last": b"z" * 777}
    archive = Archive()
    for name, content in contents.items():
        archive.add(name, content)
    return archive.bytes(), contents


def test_an_archive_that_ends_too_early_leaves_whole_files_and_is_an_error(fortress: Path) -> None:
    data, contents = _sample()
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        members = tar.getmembers()
    # Where one may end: in front of each member (with its extended header), and behind the last one and a block.
    starts = {member.offset: index for index, member in enumerate(members)}
    end = members[-1].offset_data + 1024
    odd = random.Random(5).sample(range(len(data)), 60)
    for cut in sorted({*range(0, len(data) + 1, 512), *odd, end - 1, end + 1}):
        shutil.rmtree(fortress)
        fortress.mkdir()
        if cut in starts or cut == end or cut >= end + 512:
            unpack(data[:cut], fortress, seed=cut)
            expected = len(members) if cut >= end else starts[cut]
            assert len(os.listdir(fortress)) == expected, cut
        else:
            with pytest.raises(ArchiveError):
                unpack(data[:cut], fortress, seed=cut)
        for name in os.listdir(fortress):
            assert (fortress / name).read_bytes() == contents[name], cut


@pytest.mark.parametrize(
    "data",
    [b"x", b"x" * 511, b"x" * 512, b"x" * 100_000, b"\x1f\x8b" + b"\0" * 5000, b"BZh9" * 300, b"PK\x03\x04" * 300],
    ids=len,
)
def test_what_is_no_archive_is_an_error(fortress: Path, data: bytes) -> None:
    """A compressed one is none, either: who sends it unpacks it first."""
    with pytest.raises(ArchiveError, match="not a"):
        unpack(data, fortress)
    assert os.listdir(fortress) == []


@pytest.mark.parametrize("data", [b"", bytes(512), bytes(1024), bytes(10240), bytes(1024) + b"what is behind the end"])
def test_nothing_at_all_is_an_empty_archive(fortress: Path, data: bytes) -> None:
    unpack(data, fortress)
    assert os.listdir(fortress) == []


def test_garbage_behind_a_member_is_an_error(fortress: Path) -> None:
    """tarfile itself takes it for the end of the archive."""
    data, _ = _sample()
    with pytest.raises(ArchiveError, match="not a whole tar archive"):
        unpack(data[:1024] + b"garbage" * 300, fortress)
    assert os.listdir(fortress) == ["small"]


@hypothesis.given(strategies.data())
@hypothesis.settings(max_examples=400)
def test_a_damaged_archive_is_unpacked_or_an_error_and_nothing_else(data: Any) -> None:
    archive = Archive().directory("d").add("d/f", b"f" * 600).link("l", "../outside").hard_link("h", "d/f")
    archive.add("n" * 130, b"long", mtime=1.5).add("p", kind=tarfile.FIFOTYPE)
    whole = archive.bytes()[: 9 * 1024]
    bad = bytearray(whole)
    for _ in range(data.draw(strategies.integers(1, 6))):
        at = data.draw(strategies.integers(0, len(bad) - 1))
        piece = data.draw(strategies.binary(min_size=1, max_size=12))
        bad[at : at + len(piece)] = piece
    if data.draw(strategies.booleans()):  # with right checksums: else nearly all end there
        for at in range(0, len(bad) - 511, 512):
            block = bad[at : at + 512]
            if any(block[148:156]):
                bad[at + 148 : at + 156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
    with tempfile.TemporaryDirectory() as top:
        os.mkdir(f"{top}/outside")
        os.mkdir(f"{top}/inside")
        with contextlib.suppress(ArchiveError):
            unpack(bytes(bad), f"{top}/inside", no_owners=True)
        assert sorted(os.listdir(top)) == ["inside", "outside"]
        assert os.listdir(f"{top}/outside") == []
        subprocess.run(["chmod", "-R", "u+rwX", top], check=True)


# ── hostile neighbours ────────────────────────────────────────────────────────


@pytest.mark.parametrize("strict", [True, False])
def test_who_swaps_directories_and_links_meanwhile_gets_nothing_out_of_it(place: Path, strict: bool) -> None:
    """Another user owns the directory, and never stops to put links in the way of root's unpacking."""
    need_root()
    inside, outside = place / "inside", place / "outside"
    (outside / "sub").mkdir(parents=True)
    (outside / "secret").write_bytes(b"secret")
    (outside / "secret").chmod(0o600)
    inside.mkdir()
    # Each name is a link of the neighbour's half of the time.
    pairs = []
    for name, target in (("d", "."), ("d/sub", "sub"), ("f", "secret"), ("p", "secret"), ("d/f", "secret"), ("s", ".")):
        link = inside / f"link-{name.replace('/', '-')}"
        link.symlink_to(outside / target)
        os.chown(link, NOBODY, NOBODY, follow_symlinks=False)
        pairs.append((inside / name, link))
    os.chown(inside, NOBODY, NOBODY)
    before = look(outside)
    archive = Archive().directory("d", mode=0o777, uid=NOBODY).directory("d/sub", mode=0o777, uid=NOBODY)
    archive.add("d/sub/x", b"x", uid=NOBODY, mode=0o666).add("d/f", b"y", uid=NOBODY).add("f", b"f" * 600, uid=NOBODY)
    archive.add("p", kind=tarfile.FIFOTYPE, mode=0o666, uid=NOBODY).link("s", "nowhere", uid=NOBODY).add("d/last", b"z")
    data = archive.bytes()
    unpack(data, inside)  # left alone, it succeeds
    refused = rounds = 0
    deadline = time.monotonic() + PATIENCE
    with exchanging(*pairs, user=NOBODY):
        while rounds < 400 or (not refused and time.monotonic() < deadline):
            rounds += 1
            try:
                unpack(data, inside, no_overwrite_dir_non_dir=strict)
            except ArchiveError:
                refused += 1
            assert look(outside) == before
    assert refused  # else the neighbour did nothing


def test_an_archive_may_be_given_up_at_any_moment(place: Path) -> None:
    """What is there is whole, and no descriptor is left open."""
    data, contents = _sample()
    descriptors = len(os.listdir("/proc/self/fd"))

    class GivenUp(Exception):
        pass

    class Source:
        def __init__(self, left: int) -> None:
            self.file, self.left = io.BytesIO(data), left

        def read(self, size: int) -> bytes:
            if self.left == 0:
                raise GivenUp
            self.left -= 1
            return self.file.read(min(size, 700))

    for reads in range(len(data) // 700):
        with pytest.raises(GivenUp), contextlib.closing(Unpacker(str(place))) as unpacker:
            unpacker.unpack(Source(reads))
        for name in os.listdir(place):
            assert (place / name).read_bytes() == contents[name]
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_every_member_counts_for_itself_in_memory(place: Path) -> None:
    """An archive of any number of members takes no memory that grows with it, but for its directories."""
    archive = Archive()
    for number in range(2000):
        archive.add("f", b"%d" % number)
    unpacker = Unpacker(str(place))
    with contextlib.closing(unpacker):
        unpacker.unpack(io.BytesIO(archive.bytes()))
        assert (place / "f").read_bytes() == b"1999"
        assert not unpacker._made_links and not unpacker._directories

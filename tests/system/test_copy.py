"""`agent_client cp`, both ways, against the rules of https://docs.docker.com/reference/cli/docker/container/cp/."""

from __future__ import annotations

import io
import os
import random
import re
import signal
import socket
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from running import DEADLINE, TOKEN, RunningAgent, spawned
from support import eventually, need_root
from test_command_line import Terminal

import agent_client

CLIENT = [sys.executable, agent_client.__file__]
FAILED = 125


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    started = RunningAgent(tmp_path_factory.mktemp("agent"))
    yield started
    started.stop()
    assert "unexpected error" not in started.log


@pytest.fixture(autouse=True)
def no_agent_outlives_its_test() -> None:
    """This module's agent does, until the module ends."""


@pytest.fixture
def environ(box: RunningAgent) -> dict[str, str]:
    return {**os.environ, "SOCKERLESS_AGENT_ADDR": box.addr, "SOCKERLESS_AGENT_TOKEN": TOKEN, "TERM": "xterm"}


class Copy:
    """Copies from ``here`` to ``there``; one of them is in the container."""

    def __init__(self, environ: dict[str, str], here: Path, there: Path, into: bool) -> None:
        self.here, self.there, self.into = here, there, into
        self._environ = environ

    def __call__(self, source: str, target: str, *flags: str) -> tuple[int, str]:
        """Run ``cp`` with paths in these two directories; returns its exit status, and what it has said."""
        source, target = f"{self.here}/{source}", f"{self.there}/{target}"
        words = (source, f":{target}") if self.into else (f":{source}", target)
        done = subprocess.run([*CLIENT, "cp", *flags, *words], env=self._environ, capture_output=True, timeout=DEADLINE)
        assert done.stdout == b""
        return done.returncode, done.stderr.decode()


@pytest.fixture(params=["into", "out of"])
def copy(request: pytest.FixtureRequest, environ: dict[str, str], tmp_path: Path) -> Copy:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    (here / "file").write_bytes(b"content")
    (here / "tree/sub").mkdir(parents=True)
    (here / "tree/sub/file").write_bytes(b"deep")
    (here / "link").symlink_to("file")
    (here / "tree-link").symlink_to("tree")
    (there / "file").write_bytes(b"old")
    (there / "directory").mkdir()
    return Copy(environ, here, there, request.param == "into")


OK = (0, "")


def seen(top: Path) -> dict[str, bytes | str | None]:
    """What is in a directory: bytes of files, targets of links."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(top.rglob("*")):
        name = str(path.relative_to(top))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


# ── SRC is a file ─────────────────────────────────────────────────────────────


def test_a_file_to_a_new_name(copy: Copy) -> None:
    assert copy("file", "new") == OK
    assert seen(copy.there) == {"directory": None, "file": b"old", "new": b"content"}


@pytest.mark.parametrize("ending", ["/", "/."])
def test_a_file_to_a_directory_that_is_not_there(copy: Copy, ending: str) -> None:
    code, said = copy("file", f"new{ending}")
    assert (code, said) == (FAILED, f"agent_client: cp: {copy.there}/new/: no such directory\n")
    assert seen(copy.there) == {"directory": None, "file": b"old"}


def test_a_file_over_a_file(copy: Copy) -> None:
    assert copy("file", "file") == OK
    assert seen(copy.there) == {"directory": None, "file": b"content"}


@pytest.mark.parametrize("ending", ["", "/", "/."])
def test_a_file_into_a_directory(copy: Copy, ending: str) -> None:
    assert copy("file", f"directory{ending}") == OK
    assert seen(copy.there / "directory") == {"file": b"content"}


def test_a_file_to_what_is_a_file_and_no_directory(copy: Copy) -> None:
    code, said = copy("file", "file/")
    assert (code, said) == (FAILED, f"agent_client: cp: {copy.there}/file/: not a directory\n")


def test_a_file_over_a_directory_of_its_name(copy: Copy) -> None:
    (copy.there / "directory/file").mkdir()
    code, said = copy("file", "directory")
    assert code == FAILED
    assert "cannot overwrite directory 'file' with non-directory" in said
    assert (copy.there / "directory/file").is_dir()


@pytest.mark.parametrize("ending", ["/", "/."])
def test_a_file_that_is_called_a_directory(copy: Copy, ending: str) -> None:
    code, said = copy(f"file{ending}", "new")
    assert (code, said) == (FAILED, f"agent_client: cp: {copy.here}/file{ending}: no such file or directory\n")


# ── SRC is a directory ────────────────────────────────────────────────────────


@pytest.mark.parametrize("ending", ["", "/", "/."])
@pytest.mark.parametrize("target_ending", ["", "/", "/."])
def test_a_directory_to_a_new_name(copy: Copy, ending: str, target_ending: str) -> None:
    assert copy(f"tree{ending}", f"new{target_ending}") == OK
    assert seen(copy.there / "new") == {"sub": None, "sub/file": b"deep"}


def test_a_directory_over_a_file(copy: Copy) -> None:
    code, said = copy("tree", "file")
    assert (code, said) == (FAILED, f"agent_client: cp: {copy.there}/file: cannot copy a directory over a file\n")
    assert (copy.there / "file").read_bytes() == b"old"


@pytest.mark.parametrize("ending", ["", "/"])
def test_a_directory_into_a_directory(copy: Copy, ending: str) -> None:
    assert copy(f"tree{ending}", "directory") == OK
    assert seen(copy.there / "directory") == {"tree": None, "tree/sub": None, "tree/sub/file": b"deep"}


def test_what_a_directory_holds_into_a_directory(copy: Copy) -> None:
    (copy.there / "directory").chmod(0o1777)
    assert copy("tree/.", "directory") == OK
    assert seen(copy.there / "directory") == {"sub": None, "sub/file": b"deep"}
    assert stat.S_IMODE((copy.there / "directory").stat().st_mode) == 0o1777


def test_a_directory_into_one_that_has_it_already(copy: Copy) -> None:
    (copy.there / "directory/tree/sub").mkdir(parents=True)
    (copy.there / "directory/tree/sub/mine").write_bytes(b"mine")
    assert copy("tree", "directory") == OK
    assert seen(copy.there / "directory/tree") == {"sub": None, "sub/file": b"deep", "sub/mine": b"mine"}


def test_what_is_not_there(copy: Copy) -> None:
    code, said = copy("nowhere", "new")
    assert (code, said) == (FAILED, f"agent_client: cp: {copy.here}/nowhere: no such file or directory\n")
    code, said = copy("file", "nowhere/new")
    assert code == FAILED
    assert f"{copy.there}/nowhere: no such file or directory" in said
    code, said = copy("file", "file/new")
    assert code == FAILED
    assert f"{copy.there}/file: not a directory" in said


# ── links ─────────────────────────────────────────────────────────────────────


def test_a_link_is_copied_as_a_link(copy: Copy) -> None:
    assert copy("link", "new") == OK
    assert copy("tree-link", "directory") == OK
    assert os.readlink(copy.there / "new") == "file"
    assert os.readlink(copy.there / "directory/tree-link") == "tree"


def test_with_l_what_it_links_to_is_copied_under_its_name(copy: Copy) -> None:
    assert copy("link", "new", "-L") == OK
    assert copy("link", "directory", "--follow-link") == OK
    assert copy("tree-link", "directory", "-L") == OK
    assert copy("tree-link/.", "contents", "-L") == OK
    assert copy("tree-link/.", "followed") == OK
    assert (copy.there / "new").read_bytes() == b"content"
    assert seen(copy.there / "directory") == {
        "link": b"content", "tree-link": None, "tree-link/sub": None, "tree-link/sub/file": b"deep",
    }  # fmt: skip
    assert seen(copy.there / "contents") == seen(copy.there / "followed") == {"sub": None, "sub/file": b"deep"}


def test_a_slash_follows_a_link(copy: Copy) -> None:
    assert copy("tree-link/", "directory") == OK
    assert seen(copy.there / "directory") == {"tree-link": None, "tree-link/sub": None, "tree-link/sub/file": b"deep"}


def test_a_link_at_the_target_is_followed(copy: Copy) -> None:
    (copy.there / "to-file").symlink_to("file")
    (copy.there / "to-directory").symlink_to("directory")
    (copy.there / "to-nothing").symlink_to(copy.there / "nothing")
    for target in ("to-file", "to-directory", "to-nothing"):
        assert copy("file", target) == OK
        assert (copy.there / target).is_symlink()
    assert (copy.there / "file").read_bytes() == (copy.there / "nothing").read_bytes() == b"content"
    assert seen(copy.there / "directory") == {"file": b"content"}


def test_links_in_a_tree_stay_what_they_are(copy: Copy) -> None:
    for name, target in (("absolute", "/etc/passwd"), ("dangling", "nowhere"), ("out", "../../../..")):
        (copy.here / "tree" / name).symlink_to(target)
    assert copy("tree", "new", "-L") == OK
    assert os.readlink(copy.there / "new/absolute") == "/etc/passwd"
    assert os.readlink(copy.there / "new/dangling") == "nowhere"
    assert os.readlink(copy.there / "new/out") == "../../../.."


def test_a_device_or_a_socket_is_not_replaced(copy: Copy) -> None:
    os.mkfifo(copy.there / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(copy.there / "s"))
        for name in ("fifo", "s"):
            code, said = copy("file", name)
            assert (code, said) == (
                FAILED, f"agent_client: cp: {copy.there}/{name}: not a regular file, and not replaced by one\n",
            )  # fmt: skip
    words = (str(copy.here / "file"), ":/dev/null") if copy.into else (f":{copy.here}/file", "/dev/null")
    done = subprocess.run([*CLIENT, "cp", *words], env=copy._environ, capture_output=True, timeout=DEADLINE)
    assert b"/dev/null: not a regular file" in done.stderr
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


# ── modes, owners, names ──────────────────────────────────────────────────────


def test_modes_and_times_are_kept_and_owners_with_a_alone(copy: Copy) -> None:
    need_root()
    path = copy.here / "tree/sub/file"
    os.chown(path, 1234, 4321)
    path.chmod(0o6754)
    os.utime(path, ns=(0, 1_600_000_000_123_456_789))
    assert copy("tree", "plain") == OK
    assert copy("tree", "kept", "-a") == OK
    plain, kept = (copy.there / "plain/sub/file").stat(), (copy.there / "kept/sub/file").stat()
    assert plain.st_mtime_ns == kept.st_mtime_ns == 1_600_000_000_123_456_789
    assert (kept.st_uid, kept.st_gid, stat.S_IMODE(kept.st_mode)) == (1234, 4321, 0o6754)
    # Not set-user-ID for somebody else than it was.
    assert (plain.st_uid, plain.st_gid, stat.S_IMODE(plain.st_mode)) == (0, 0, 0o754)


@pytest.mark.parametrize("name", ["with space", "-rf", "new\nline", "ü", "\udcff\udcfe", "a:b", "'\"$(id)", "n" * 255])
def test_odd_names(copy: Copy, name: str) -> None:
    (copy.here / name).write_bytes(name.encode("utf-8", "surrogateescape"))
    assert copy(name, "directory") == OK
    assert (copy.there / "directory" / name).read_bytes() == name.encode("utf-8", "surrogateescape")
    assert copy("file", name) == OK
    assert (copy.there / name).read_bytes() == b"content"


def test_relative_paths(environ: dict[str, str], tmp_path: Path) -> None:
    """Here they begin in this directory, in the container in its root."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d/file").write_bytes(b"content")
    (tmp_path / "to").mkdir()

    def cp(*words: str, cwd: str) -> int:
        return subprocess.run([*CLIENT, "cp", *words], env=environ, cwd=tmp_path / cwd, timeout=DEADLINE).returncode

    assert cp("file", f":{str(tmp_path)[1:]}/to", cwd="d") == 0
    assert cp(".", f":{tmp_path}/to/all", cwd="d") == 0  # what it holds
    assert cp("../d", f":{tmp_path}/to", cwd="d") == 0
    assert cp(f":{tmp_path}/d/../d/file", ".", cwd="to/all") == 0
    assert cp(f":{tmp_path}/d/file", "../renamed", cwd="to/all") == 0
    assert seen(tmp_path / "to") == {
        "file": b"content", "all": None, "all/file": b"content", "d": None, "d/file": b"content", "renamed": b"content",
    }  # fmt: skip


# ── archives on stdin and stdout ──────────────────────────────────────────────


def test_an_archive_on_stdout(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_bytes(b"content")
    done = subprocess.run([*CLIENT, "cp", f":{tmp_path}/tree", "-"], env=environ, capture_output=True, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (0, b"")
    with tarfile.open(fileobj=io.BytesIO(done.stdout), mode="r:") as tar:
        assert tar.getnames() == ["tree", "tree/file"]
    done = subprocess.run([*CLIENT, "cp", ":/nowhere", "-"], env=environ, capture_output=True, timeout=DEADLINE)
    assert (done.returncode, done.stdout) == (FAILED, b"")
    assert done.stderr == b"agent_client: /nowhere: no such file or directory\n"


def test_an_archive_on_stdin(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_bytes(b"content")
    made = subprocess.run(["tar", "-C", tmp_path, "-cf", "-", "tree"], check=True, capture_output=True).stdout
    (tmp_path / "to").mkdir()
    (tmp_path / "link").symlink_to("to")
    (tmp_path / "file").write_bytes(b"")

    def cp(target: str, data: bytes) -> tuple[int, str]:
        command = [*CLIENT, "cp", "-", f":{tmp_path}/{target}"]
        done = subprocess.run(command, env=environ, input=data, capture_output=True, timeout=DEADLINE)
        return done.returncode, done.stderr.decode()

    assert cp("link", made) == OK
    assert seen(tmp_path / "to") == {"tree": None, "tree/file": b"content"}
    assert cp("file", made) == (FAILED, f"agent_client: {tmp_path}/file: not a directory\n")
    assert cp("nowhere", made) == (FAILED, f"agent_client: {tmp_path}/nowhere: no such file or directory\n")
    code, said = cp("to", b"no archive" * 100)
    assert code == FAILED and "not a" in said
    code, said = cp("to", made[:1000])
    assert code == FAILED and "not a whole tar archive" in said


def test_a_reader_that_leaves_ends_it_without_a_word(environ: dict[str, str], tmp_path: Path) -> None:
    with open(tmp_path / "hole", "wb") as file:
        file.truncate(1 << 40)
    command = [*CLIENT, "cp", f":{tmp_path}/hole", "-"]
    with spawned(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1000)
        process.stdout.close()
        assert process.stderr.read().count(b"\n") <= 1
        assert process.wait(DEADLINE) != 0


@pytest.mark.parametrize(
    "words", [("a", "b"), (":a", ":b"), ("-", "-"), (":", "a"), ("a", ":"), ("-", "b"), ("a",), (":a", "")]
)
def test_what_makes_no_sense_is_refused(environ: dict[str, str], words: tuple[str, ...]) -> None:
    done = subprocess.run([*CLIENT, "cp", *words], env=environ, capture_output=True, timeout=DEADLINE)
    assert done.returncode == FAILED
    assert b"Traceback" not in done.stderr
    assert b"cp" in done.stderr


# ── large, interrupted, watched ───────────────────────────────────────────────


def test_a_large_file_comes_whole(copy: Copy) -> None:
    content = random.Random(5).randbytes(48 << 20)
    (copy.here / "large").write_bytes(content)
    assert copy("large", "directory") == OK
    assert (copy.there / "directory/large").read_bytes() == content


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_copy_that_is_interrupted_leaves_no_half_written_file(copy: Copy, number: int) -> None:
    (copy.here / "tree/a").write_bytes(b"a" * 1000)
    with open(copy.here / "tree/hole", "wb") as file:
        file.truncate(1 << 40)
    source, target = f"{copy.here}/tree", f"{copy.there}/directory"
    words = (source, f":{target}") if copy.into else (f":{source}", target)
    with spawned([*CLIENT, "cp", *words], env=copy._environ, stderr=subprocess.PIPE) as process:
        eventually((copy.there / "directory/tree/a").exists, "the first file has come")
        process.send_signal(number)
        assert process.wait(DEADLINE) == (128 + number if number == signal.SIGINT else -number)
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    assert seen(copy.there / "directory") == {"tree": None, "tree/a": b"a" * 1000}


@pytest.fixture
def open_terminal(environ: dict[str, str]) -> Iterator[Callable[..., Terminal]]:
    terminals: list[Terminal] = []

    def start(*words: str) -> Terminal:
        terminals.append(Terminal(environ, *words))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


@pytest.mark.parametrize("into", [True, False])
def test_a_progress_bar_is_drawn_on_a_terminal_unless_that_is_not_wanted(
    box: RunningAgent, open_terminal: Callable[..., Terminal], tmp_path: Path, into: bool
) -> None:
    source, target = tmp_path / "large", tmp_path / "to"
    with open(source, "wb") as file:
        file.truncate(1 << 40)
    words = (str(source), f":{target}") if into else (f":{source}", str(target))
    watched, quiet = open_terminal("cp", *words), open_terminal("cp", "--quiet", *words)
    watched.wait_for(r"\d+%.*\d/1\.00T.*B/s\]")
    # The quiet one runs, too, and so minds a signal. Its own path: an earlier test's line may come only now.
    box.wait_for_log(f"archive (into|out of): {tmp_path}", 2)
    assert quiet.text.strip() == ""
    for terminal in (watched, quiet):
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.wait() == 130
    assert not target.exists()


def test_an_agent_cannot_send_a_file_under_another_name(environ: dict[str, str], tmp_path: Path) -> None:
    """As a server of scp could (CVE-2019-6111): one that answers with another archive than it was asked for."""
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/.bashrc").write_bytes(b"evil")
    (tmp_path / "home").mkdir()
    script = f"""
        import agent, sys
        pack = agent.pack
        agent.pack = lambda path, write, name="": pack({str(tmp_path)!r} + "/evil/.bashrc", write)
        agent.main(sys.argv[1:])
    """
    command = [sys.executable, "-c", re.sub("(?m)^ +", "", script), "--addr", "127.0.0.1:0", "--pid-file", ""]
    hostile = {**environ, "PYTHONPATH": os.path.dirname(agent_client.__file__)}
    with spawned(command, env=hostile, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while (found := re.search(r"listening on (\S+)", process.stderr.readline())) is None:
            assert process.poll() is None
        words = ["cp", "--addr", found[1], ":/etc/hosts", str(tmp_path / "home")]
        subprocess.run([*CLIENT, *words], env=environ, timeout=DEADLINE, check=True)
    assert seen(tmp_path / "home") == {"hosts": b"evil"}

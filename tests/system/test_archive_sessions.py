"""Archives over a connection: out of a container and into it, whatever is cut, killed or given up meanwhile."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from proxy import Proxy
from running import DEADLINE, TOKEN, RunningAgent, spawned
from support import eventually, need_root

import agent
import agent_client
from agent_client import AgentConn, AgentProcess, ConnectionLost, SessionError

CLIENT = [sys.executable, agent_client.__file__]


@pytest.fixture
def box(tmp_path: Path) -> Iterator[RunningAgent]:
    started = RunningAgent(tmp_path, "--resume-window", "60s")
    yield started
    started.stop()
    assert "unexpected error" not in started.log


def archive_of(contents: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size, info.uid, info.gid = len(content), os.geteuid(), os.getegid()
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def put(conn: AgentConn, target: Path | str, data: bytes, **options: Any) -> None:
    process = conn.archive_put(str(target), **options)
    with contextlib.suppress(BrokenPipeError):  # wait() says why
        process.stdin.write(data)
        process.stdin.close()
    assert process.wait(DEADLINE) == 0


def get(conn: AgentConn, path: Path | str) -> bytes:
    process = conn.archive_get(str(path))
    data = process.stdout.read()
    assert process.wait(DEADLINE) == 0
    assert isinstance(data, bytes)
    return data


def places(conn: AgentConn) -> int:
    """How many sessions there are."""
    return len(conn.sessions())


def test_a_tree_goes_out_and_in_again(conn: AgentConn, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "sub").mkdir(parents=True)
    target.mkdir()
    os.write(os.open(os.fsencode(source) + b"/\xff\n", os.O_CREAT | os.O_WRONLY), b"odd")
    (source / "sub/large").write_bytes(random.Random(1).randbytes(20 << 20))
    (source / "link").symlink_to("../../nowhere")
    os.link(source / "sub/large", source / "alias")
    os.mkfifo(source / "fifo")
    data = get(conn, source)
    put(conn, target, data)
    subprocess.run(["diff", "--recursive", "--no-dereference", "--exclude=fifo", source, target / "source"], check=True)
    assert (target / "source/alias").samefile(target / "source/sub/large")
    assert get(conn, target / "source") == data


def test_what_is_wrong_has_a_reason(conn: AgentConn, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path, reason in (("/nowhere", "no_such_path"), ("/proc", "archive_failed")):
        with pytest.raises(SessionError, match=path) as caught:
            get(conn, path)
        assert caught.value.reason == reason
    for path, reason in (("/nowhere", "no_such_path"), (f"{tmp_path}/file", "not_a_directory")):
        with pytest.raises(SessionError, match=path) as caught:
            put(conn, path, archive_of({"x": b""}))
        assert caught.value.reason == reason
    with pytest.raises(SessionError, match="leads out of the directory") as caught:
        put(conn, tmp_path, archive_of({"../x": b""}))
    assert caught.value.reason == "archive_failed"
    with pytest.raises(SessionError, match="no such file") as caught:
        conn.stat_path("/nowhere")
    assert caught.value.reason == "no_such_path"
    with pytest.raises(SessionError, match="'path' is missing or empty"):
        conn.stat_path("")
    assert places(conn) == 0


def test_a_state_comes_over_the_connection(conn: AgentConn, tmp_path: Path) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe\n")
    os.symlink("/etc", odd)
    state = conn.stat_path(odd)
    assert state == agent.stat_path(odd)
    assert os.fsencode(state["name"]) == b"\xff\xfe\n"
    assert (state["linkTarget"], state["mode"] >> 27 & 1) == ("/etc", 1)


def test_who_is_not_root_reads_what_it_may_and_owns_what_it_puts(tmp_path: Path) -> None:
    """The agent itself runs as another user: so from a copy where that may read."""
    need_root()
    script = (
        "import os, sys, runpy, tarfile, shutil, psutil, agent, websockets.sync.server, encodings.idna\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "agent.main(sys.argv[1:])"
    )
    place = Path(tempfile.mkdtemp(prefix="archive-"))
    place.chmod(0o777)
    command = [sys.executable, "-c", script, "--addr", "127.0.0.1:0", "--pid-file", ""]
    environ = {**os.environ, "PYTHONPATH": os.path.dirname(agent.__file__), "SOCKERLESS_AGENT_TOKEN": TOKEN}
    try:
        with spawned(command, env=environ, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            said = ""
            while (found := re.search(r"listening on (\S+)", said)) is None:
                line = process.stderr.readline()
                assert line, said
                said += line
            with AgentConn.dial(found[1], TOKEN) as conn:
                put(conn, place, archive_of({"file": b"content"}))
                assert (place / "file").stat().st_uid == 65534
                (place / "secret").write_bytes(b"secret")
                (place / "secret").chmod(0o600)
                with pytest.raises(SessionError, match=f"{place}/secret: permission denied"):
                    get(conn, place)
                with pytest.raises(SessionError, match="/etc/file: permission denied"):
                    put(conn, "/etc", archive_of({"file": b"content"}))
    finally:
        shutil.rmtree(place)


def test_who_does_not_read_holds_up_nobody_and_fills_no_memory(
    conn: AgentConn, box: RunningAgent, tmp_path: Path
) -> None:
    with open(tmp_path / "hole", "wb") as file:
        file.truncate(1 << 40)
    idle = [conn.archive_get(str(tmp_path / "hole")) for _ in range(20)]
    for process in idle:
        assert b"hole" in process.stdout.read(10_000)
    assert conn.run(["echo", "hello"], capture_output=True).stdout == b"hello\n"
    status = Path(f"/proc/{box.process.pid}/status").read_text()
    resident = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert resident is not None and int(resident[1]) < 200 << 10
    for process in idle:
        process.end()
    eventually(lambda: places(conn) == 0, "the archives that were given up are gone")


def test_a_put_that_waits_fills_no_memory(conn: AgentConn, box: RunningAgent, tmp_path: Path) -> None:
    """The archive goes to a FIFO's place in a stopped agent: no more than a window is sent."""
    data = archive_of({"x": bytes(8 << 20)})
    process = conn.archive_put(str(tmp_path))
    process.stdin.write(data[:1000])
    eventually(lambda: box.log.count("archive into"), "the archive has begun")
    box.process.send_signal(signal.SIGSTOP)
    sent = threading.Event()

    def send() -> None:
        process.stdin.write(data[1000:])
        sent.set()

    thread = threading.Thread(target=send)
    thread.start()
    assert not sent.wait(0.5)
    box.process.send_signal(signal.SIGCONT)
    assert sent.wait(DEADLINE)
    process.stdin.close()
    assert process.wait(DEADLINE) == 0
    thread.join(DEADLINE)
    assert (tmp_path / "x").stat().st_size == 8 << 20


@pytest.mark.parametrize("cuts", [1, 8])
def test_a_get_goes_on_after_a_cut_to_the_byte(box: RunningAgent, tmp_path: Path, cuts: int) -> None:
    proxy = Proxy(box.addr)
    content = random.Random(2).randbytes(12 << 20)
    (tmp_path / "large").write_bytes(content)
    expected: list[bytes] = []
    agent.pack(str(tmp_path / "large"), expected.append)
    try:
        with AgentConn.dial(proxy.addr, TOKEN) as conn:
            process = conn.archive_get(str(tmp_path / "large"))
            parts = []
            for _ in range(cuts):
                parts.append(process.stdout.read(random.randrange(1, 1 << 20)))
                proxy.cut()
            parts.append(process.stdout.read())
            assert process.wait(DEADLINE) == 0
            assert b"".join(parts) == b"".join(expected)
            assert proxy.connections > 1
    finally:
        proxy.close()


@pytest.mark.parametrize("cuts", [1, 8])
def test_a_put_goes_on_after_a_cut_to_the_byte(box: RunningAgent, tmp_path: Path, cuts: int) -> None:
    proxy = Proxy(box.addr)
    (tmp_path / "target").mkdir()
    contents = {f"file{number}": random.Random(number).randbytes(700_000) for number in range(15)}
    data = archive_of(contents)
    try:
        with AgentConn.dial(proxy.addr, TOKEN) as conn:
            process = conn.archive_put(str(tmp_path / "target"))
            at = 0
            for _ in range(cuts):
                end = at + random.randrange(1, len(data) // cuts)
                process.stdin.write(data[at:end])
                at = end
                proxy.cut()
            process.stdin.write(data[at:])
            process.stdin.close()
            assert process.wait(DEADLINE) == 0
            assert {path.name: path.read_bytes() for path in (tmp_path / "target").iterdir()} == contents
            assert proxy.connections > 1
    finally:
        proxy.close()


def test_a_put_whose_client_never_comes_back_is_given_up(tmp_path: Path) -> None:
    box = RunningAgent(tmp_path, "--resume-window", "1s")
    proxy = Proxy(box.addr)
    (tmp_path / "target").mkdir()
    data = archive_of({"whole": b"w" * 1000, "half": b"h" * 1_000_000})
    try:
        with AgentConn.dial(proxy.addr, TOKEN, patience=0) as conn:
            process = conn.archive_put(str(tmp_path / "target"))
            process.stdin.write(data[:500_000])
            eventually(lambda: (tmp_path / "target/whole").exists(), "the first file is there")
            proxy.close()
            with pytest.raises(ConnectionLost):
                process.wait(DEADLINE)
        box.wait_for_log("archive abandoned")
        assert os.listdir(tmp_path / "target") == ["whole"]
        with AgentConn.dial(box.addr, TOKEN) as conn:
            assert places(conn) == 0
    finally:
        proxy.close()
    assert box.stop() == 0


def test_what_is_given_up_gives_its_place_back(tmp_path: Path) -> None:
    box = RunningAgent(tmp_path, "--max-sessions", "3", "--max-total-sessions", "3")
    (tmp_path / "target").mkdir()
    (tmp_path / "some").write_bytes(bytes(5 << 20))
    with AgentConn.dial(box.addr, TOKEN) as conn:
        for _ in range(30):
            processes: list[AgentProcess] = [conn.archive_get(str(tmp_path / "some")) for _ in range(2)]
            processes.append(conn.archive_put(str(tmp_path / "target")))
            processes[0].stdout.read(random.randrange(1 << 20))
            processes[2].stdin.write(bytes(random.randrange(2000)))
            for process in processes:
                process.end()
        # The agent reads in order: whatever was given up before is gone.
        for _ in range(30):  # one that ends at the same moment, too
            process = conn.archive_get(str(tmp_path / "target"))
            process.end()
        assert get(conn, tmp_path / "target")
        assert places(conn) == 0
    assert box.stop() == 0


def look_whole(target: Path, contents: dict[str, bytes], old: dict[str, bytes]) -> None:
    """Every file is the old one or the new one, and there is no other."""
    for path in target.iterdir():
        assert path.name in contents, path.name
        content = path.read_bytes()
        assert content == contents[path.name] or content == old.get(path.name), f"{path.name} is half-written"


@pytest.fixture
def contents() -> dict[str, bytes]:
    return {f"file{number}": random.Random(number).randbytes(number * 40_000) for number in range(30)}


def test_a_client_that_is_killed_leaves_no_half_written_file(
    box: RunningAgent, tmp_path: Path, contents: dict[str, bytes]
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name, content in contents.items():
        (source / name).write_bytes(content)
    old = {name: b"old" for name in list(contents)[::2]}
    environ = {**os.environ, "SOCKERLESS_AGENT_ADDR": box.addr, "SOCKERLESS_AGENT_TOKEN": TOKEN}
    feed = random.Random(3)
    outcomes = set()

    def arrived() -> int:
        return sum(
            name not in old or os.path.getsize(target / name) > 3 for name in os.listdir(target) if name[0] != "."
        )

    for _ in range(25):
        for path in target.iterdir():
            path.unlink()
        for name, content in old.items():
            (target / name).write_bytes(content)
        with spawned([*CLIENT, "cp", f"{source}/.", f":{target}"], env=environ) as process:
            count = feed.randrange(len(contents))
            while process.poll() is None and arrived() <= count:
                time.sleep(0.001)
            process.kill()
            process.wait()
        # What the agent has read already, it unpacks; a file that is replaced has two names for a moment.
        eventually(lambda: not any(name.startswith(".") for name in os.listdir(target)), "it waits for more")
        outcomes.add(len(os.listdir(target)))
        look_whole(target, contents, old)
    assert len(outcomes) > 1  # it was killed at different moments


def test_an_agent_that_is_killed_leaves_no_half_written_file(tmp_path: Path, contents: dict[str, bytes]) -> None:
    target = tmp_path / "target"
    target.mkdir()
    old = {name: b"old" for name in list(contents)[::2]}
    data = archive_of(contents)
    feed = random.Random(4)
    for _ in range(12):
        for path in target.iterdir():
            path.unlink()
        for name, content in old.items():
            (target / name).write_bytes(content)
        box = RunningAgent(tmp_path)
        with AgentConn.dial(box.addr, TOKEN, patience=0) as conn:
            process = conn.archive_put(str(target))
            killer = threading.Timer(feed.random() * 0.03, box.kill)
            killer.start()
            with contextlib.suppress(BrokenPipeError, ConnectionLost):
                process.stdin.write(data)
                process.stdin.close()
            killer.join()
        # In the moment between a file's second name and its first one, it has both.
        for path in list(target.iterdir()):
            if path.name.startswith(".sockerless-"):
                assert path.read_bytes() in contents.values()
                path.unlink()
        look_whole(target, contents, old)


def test_an_agent_that_is_told_to_end_leaves_no_half_written_file(tmp_path: Path) -> None:
    box = RunningAgent(tmp_path, "--stop-timeout", "1s")
    (tmp_path / "target").mkdir()
    data = archive_of({"whole": b"w" * 1000, "half": b"h" * 1_000_000})
    with AgentConn.dial(box.addr, TOKEN, patience=0) as conn:
        process = conn.archive_put(str(tmp_path / "target"))
        process.stdin.write(data[:500_000])
        eventually(lambda: (tmp_path / "target/whole").exists(), "the first file is there")
        assert box.stop() == 0
        assert os.listdir(tmp_path / "target") == ["whole"]
        with pytest.raises(ConnectionLost):
            process.wait(DEADLINE)


def test_what_changes_while_it_is_read_is_an_error_or_as_it_was(conn: AgentConn, tmp_path: Path) -> None:
    """Grows, shrinks, vanishes: seen through a window that holds the agent back meanwhile."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a").write_bytes(b"a" * (6 << 20))
    (tree / "b").write_bytes(b"b" * 1000)
    process = conn.archive_get(str(tree))
    start = process.stdout.read(100_000)
    with open(tree / "a", "ab") as file:
        file.write(b"more")
    (tree / "b").unlink()
    (tree / "c").write_bytes(b"too late")
    data = start + process.stdout.read()
    assert process.wait(DEADLINE) == 0
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        assert {member.name: member.size for member in tar} == {"tree": 0, "tree/a": 6 << 20}
    process = conn.archive_get(str(tree))
    process.stdout.read(100_000)
    (tree / "a").write_bytes(b"")
    with pytest.raises(SessionError, match="tree/a: became shorter while it was read"):
        process.stdout.read()
        process.wait(DEADLINE)


def test_archives_are_listed_while_they_last(conn: AgentConn, tmp_path: Path) -> None:
    process = conn.archive_put(str(tmp_path))
    (entry,) = conn.sessions()
    started = entry.pop("started_at")
    assert abs(started - time.time()) < DEADLINE
    assert entry == {
        "id": process.id, "kind": "archive", "pid": 0, "cmd": ["archive_put", str(tmp_path)], "tty": False, "user": "",
        "connected": True,
    }  # fmt: skip
    process.stdin.close()
    assert process.wait(DEADLINE) == 0
    eventually(lambda: not conn.sessions(), "it is listed no more")


def test_signals_and_sizes_do_nothing_to_an_archive(conn: AgentConn, tmp_path: Path) -> None:
    process = conn.archive_put(str(tmp_path))
    process.send_signal(signal.SIGKILL)
    process.resize(80, 24)
    process.stdin.write(archive_of({"x": b"content"}))
    process.stdin.close()
    assert process.wait(DEADLINE) == 0
    assert (tmp_path / "x").read_bytes() == b"content"


def test_ten_archives_at_once_are_each_their_own(conn: AgentConn, tmp_path: Path) -> None:
    digests = {}
    for number in range(10):
        content = random.Random(number).randbytes(3 << 20)
        (tmp_path / f"file{number}").write_bytes(content)
        digests[number] = hashlib.sha256(content).hexdigest()
    seen: dict[int, str] = {}

    def copy(number: int) -> None:
        (tmp_path / f"to{number}").mkdir()
        put(conn, tmp_path / f"to{number}", get(conn, tmp_path / f"file{number}"))
        seen[number] = hashlib.sha256((tmp_path / f"to{number}/file{number}").read_bytes()).hexdigest()

    threads = [threading.Thread(target=copy, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert seen == digests


def test_a_put_with_more_behind_the_archive_takes_that_too(conn: AgentConn, tmp_path: Path) -> None:
    """A client that sends padding is not left waiting."""
    put(conn, tmp_path, archive_of({"x": b"1"}) + bytes(5 << 20))
    assert (tmp_path / "x").read_bytes() == b"1"


def test_version_1_has_no_archives(box: RunningAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_client, "SUBPROTOCOL", "none.of.this")
    with AgentConn.dial(box.addr, TOKEN) as conn:
        assert conn.version == 1
        for ask in (lambda: conn.archive_get("/etc"), lambda: conn.archive_put("/tmp"), lambda: conn.stat_path("/etc")):
            with pytest.raises(SessionError, match="speaks version 1"):
                ask()

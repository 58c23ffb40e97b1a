"""Reverse mode: the agent dials a backend, here ReverseListener or a raw socket that misbehaves."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from running import DEADLINE, TOKEN, RunningAgent, spawned
from websockets.sync.server import ServerConnection, serve

import agent_client
from agent import PACED_BURST, PACED_RATE
from agent_client import AgentConn, ConnectFailed, ConnectionLost, ReverseListener, SessionError, Unauthorized

MAIN = 'echo ready; while read -r line; do echo "got $line"; done; exit 9'


@pytest.fixture
def listener() -> Iterator[ReverseListener]:
    with ReverseListener("127.0.0.1", token=TOKEN) as started:
        yield started


@contextlib.contextmanager
def dialling(
    tmp_path: Path,
    port: int,
    *flags: str,
    query: str = "?id=box",
    token: str = TOKEN,
    env: dict[str, str] | None = None,
) -> Iterator[RunningAgent]:
    url = f"http://127.0.0.1:{port}/v1/x/reverse{query}"
    running = RunningAgent(tmp_path, "--callback", url, *flags, token=token, env=env)
    yield running
    running.stop()


class RawBackend:
    """A listening socket; the test answers each dial by hand."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.socket.settimeout(DEADLINE)
        self.port: int = self.socket.getsockname()[1]

    def accept(self) -> tuple[socket.socket, str]:
        """The next dial, and the head of its request."""
        sock, _ = self.socket.accept()
        sock.settimeout(DEADLINE)
        head = b""
        while b"\r\n\r\n" not in head:
            data = sock.recv(65536)
            assert data, "the agent hung up during the handshake"
            head += data
        return sock, head.decode()

    def upgrade(self) -> socket.socket:
        """Accept the next dial as a WebSocket."""
        from websockets.utils import accept_key

        sock, head = self.accept()
        key = re.search(r"(?i)sec-websocket-key: (\S+)", head)
        assert key is not None
        sock.sendall(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: %s\r\n\r\n" % accept_key(key[1]).encode()
        )
        return sock

    def __enter__(self) -> RawBackend:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.socket.close()


def reset(sock: socket.socket) -> None:
    """End a connection with RST, as a machine does that has lost it."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


def test_a_function_from_start_to_end(tmp_path: Path) -> None:
    """Listener, main process, execs side by side, a terminal, the listener restarted in the middle, the exit code."""
    first = ReverseListener("127.0.0.1", token=TOKEN)
    running = RunningAgent(
        tmp_path, "--callback", f"http://127.0.0.1:{first.port}/cb?id=box", "--keep-alive", "--", "sh", "-c", MAIN
    )
    conn = first.wait_for("box", DEADLINE)
    processes = [conn.popen(["sh", "-c", f"echo {number}; exit {number}"]) for number in range(20)]
    for number, process in enumerate(processes):
        assert process.wait(DEADLINE) == number
        assert process.stdout.read() == b"%d\n" % number
    shell = conn.popen(["sh"], tty=True, size=(100, 30))
    shell.stdin.write(b"stty -echo; PS1=; echo si''ze; stty size; exit 4\n")
    assert b"size\r\n30 100\r\n" in shell.stdout.read()
    assert shell.wait(DEADLINE) == 4
    main_pid = (tmp_path / "pid").read_text()
    attached = conn.attach()
    assert attached.stdout.readline() == b"ready\n"

    first.close()
    with pytest.raises(ConnectionLost):
        attached.wait(DEADLINE)

    with ReverseListener("127.0.0.1", first.port, token=TOKEN) as second:
        conn = second.wait_for("box", DEADLINE)
        attached = conn.attach()
        assert attached.stdout.readline() == b"ready\n"
        assert (tmp_path / "pid").read_text() == main_pid
        attached.stdin.write(b"again\n")
        attached.stdin.close()
        assert attached.stdout.read() == b"got again\n"
        assert attached.wait(DEADLINE) == 9
        assert running.wait() == 9


@pytest.mark.parametrize(
    ("query", "container_id", "seen"),
    [
        ("?id=a+b&token=x%2Fy%20z&&empty=", "", "?id=a+b&token=x%2Fy%20z&&empty="),
        ("?id=a", "c/1", "?id=a&session_id=c%2F1"),
        ("?session_id=mine", "other", "?session_id=mine"),
        ("", "c1", "?session_id=c1"),
    ],
)
def test_path_and_query_arrive_byte_for_byte(tmp_path: Path, query: str, container_id: str, seen: str) -> None:
    with RawBackend() as backend:
        env = {"SOCKERLESS_CONTAINER_ID": container_id} if container_id else {}
        with dialling(tmp_path, backend.port, query=query, env=env):
            sock, head = backend.accept()
            assert head.startswith(f"GET /v1/x/reverse{seen} HTTP/1.1\r\n")
            assert f"Authorization: Bearer {TOKEN}\r\n" in head
            assert "Sec-WebSocket-Extensions" not in head
            sock.close()


def test_the_callback_is_in_no_log_child_or_process_listing(tmp_path: Path, listener: ReverseListener) -> None:
    url = f"http://127.0.0.1:{listener.port}/cb?id=box&token=very-secret-value"
    for flags, env in ((("--callback", url), {}), (("--callback-retries", "9"), {"SOCKERLESS_CALLBACK_URL": url})):
        running = RunningAgent(tmp_path, *flags, "--log-level", "debug", env=env)
        conn = listener.wait_for("box", DEADLINE)
        seen = conn.run(["sh", "-c", "env; cat /proc/$PPID/environ /proc/$PPID/cmdline"], capture_output=True).stdout
        assert b"PATH=" in seen
        assert b"very-secret-value" not in seen
        running.stop()
        assert "very-secret-value" not in running.log
        with contextlib.suppress(ConnectionLost):
            conn.run(["true"])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n", "HTTP status 401: the token is missing or wrong"),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", "HTTP status 403: the backend forbids it"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "HTTP status 404: no such path"),
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n", "HTTP status 502"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "invalid HTTP status line"),
        (b"", "connection closed while reading HTTP status line"),
    ],
)
def test_a_refusal_is_said_plainly_and_tried_again_until_the_tries_are_used_up(
    tmp_path: Path, answer: bytes, words: str
) -> None:
    with RawBackend() as backend, dialling(tmp_path, backend.port, "--callback-retries", "2") as running:
        for _ in range(2):
            sock, _ = backend.accept()
            sock.sendall(answer)
            sock.close()
        assert running.wait() == 1
        assert words in running.log
        assert "giving up after 2 tries" in running.log


def test_nobody_there_and_no_such_name_are_survived_until_given_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with dialling(tmp_path, port, "--callback-retries", "2", "--keep-alive", "--", "sleep", "1000") as running:
        assert running.wait() == 143  # the main process is ended, and its code is a failure already
        assert "Connection refused; try 1 of 2" in running.log
    running = RunningAgent(tmp_path, "--callback", "http://no-such-host.invalid/", "--callback-retries", "1")
    assert running.wait() == 1
    assert re.search("cannot connect to ws://no-such-host.invalid/: .*giving up after 1 tries", running.log)


def test_a_hang_during_the_handshake_is_given_up_and_tried_again(tmp_path: Path) -> None:
    with RawBackend() as backend, dialling(tmp_path, backend.port) as running:
        silent, _ = backend.accept()
        running.wait_for_log("no answer within 10 s; try 1 of 10")
        answered = backend.upgrade()
        running.wait_for_log("reverse mode: connected")
        silent.close()
        answered.close()


def test_the_ghost_of_a_lost_link_costs_no_try(tmp_path: Path) -> None:
    with RawBackend() as backend, dialling(tmp_path, backend.port) as running:
        reset(backend.upgrade())
        running.wait_for_log("try 1 of 10")
        reset(backend.upgrade())  # the backend drops both when it sees one id twice
        running.wait_for_log("the backend still had the lost connection; dialling again")
        sock = backend.upgrade()
        running.wait_for_log("reverse mode: connected", 3)
        assert "try 2 of" not in running.log
        sock.close()


def test_sigterm_ends_main_process_and_agent_with_its_code(tmp_path: Path, listener: ReverseListener) -> None:
    script = "trap 'echo bye; exit 21' TERM; echo up; while :; do sleep 0.05; done"
    with dialling(tmp_path, listener.port, "--keep-alive", "--", "sh", "-c", script) as running:
        attached = listener.wait_for("box", DEADLINE).attach()
        assert attached.stdout.readline() == b"up\n"
        running.process.terminate()
        assert attached.stdout.read() == b"bye\n"
        assert attached.wait(DEADLINE) == 21
        assert running.wait() == 21


def test_the_lifetime_is_announced_once_and_nothing_is_started_after_it(
    tmp_path: Path, listener: ReverseListener
) -> None:
    flags = ("--lifetime", "1h", "--lifetime-margin", "3599s")
    with dialling(tmp_path, listener.port, *flags) as running:
        conn = listener.wait_for("box", DEADLINE)
        before = conn.popen(["cat"])
        before.stdin.write(b"x")
        assert before.stdout.read(1) == b"x"
        assert conn.lifetime_expired.wait(DEADLINE)
        with pytest.raises(SessionError, match="lifetime has expired"):
            conn.run(["true"])
        before.stdin.close()
        assert before.wait(DEADLINE) == 0  # what ran goes on
        running.wait_for_log("lifetime expired:")
    assert running.log.count("lifetime expired:") == 1


def test_a_signal_can_announce_the_end_of_the_lifetime(tmp_path: Path) -> None:
    expired: list[str] = []
    with (
        ReverseListener("127.0.0.1", token=TOKEN, on_lifetime_expired=lambda conn: expired.append(conn.id)) as listener,
        dialling(tmp_path, listener.port, "--lifetime-signal", "TERM") as running,
    ):
        conn = listener.wait_for("box", DEADLINE)
        running.process.send_signal(signal.SIGTERM)
        assert running.wait() == 0
        conn.wait_closed()
        assert expired == ["box"]


def test_a_second_dial_under_an_id_wins(tmp_path: Path) -> None:
    left: list[agent_client.ReverseAgentConn] = []
    with (
        ReverseListener("127.0.0.1", token=TOKEN, on_left=left.append) as listener,
        dialling(tmp_path, listener.port) as first,
    ):
        old = listener.wait_for("box", DEADLINE)
        process = old.popen(["sleep", "1000"])
        first.process.send_signal(signal.SIGSTOP)  # it cannot answer, as if its link were cut
        try:
            with dialling(tmp_path, listener.port):
                with pytest.raises(ConnectionLost):
                    process.wait(DEADLINE)
                new = listener.get("box")
                assert new is not None
                assert new is not old
                assert new.run(["echo", "new"], capture_output=True).stdout == b"new\n"
        finally:
            first.process.send_signal(signal.SIGCONT)
    assert left[0] is old


def test_wrong_tokens_are_refused_and_each_id_may_have_its_own(tmp_path: Path) -> None:
    tokens = {"one": "token-of-one", "two": "token-of-two"}
    with ReverseListener("127.0.0.1", token=tokens.get) as listener:
        once = ("--callback-retries", "1")
        with dialling(tmp_path, listener.port, *once, query="?id=one", token="token-of-two") as wrong:
            assert wrong.wait() == 1
            assert "HTTP status 401" in wrong.log
        with dialling(tmp_path, listener.port, query="?session_id=two", token="token-of-two"):
            assert listener.wait_for("two", DEADLINE).run(["true"]).returncode == 0
        with pytest.raises(Unauthorized):
            AgentConn.dial(f"ws://127.0.0.1:{listener.port}/agents/one/ws", "wrong")
        with pytest.raises(ConnectFailed, match="404"):
            AgentConn.dial(f"ws://127.0.0.1:{listener.port}/agents/one/ws", "token-of-one")


def test_a_slow_reader_costs_no_other_session_a_byte(tmp_path: Path, listener: ReverseListener) -> None:
    with dialling(tmp_path, listener.port):
        conn = listener.wait_for("box", DEADLINE)
        slow = conn.popen(["head", "-c", "64M", "/dev/zero"])
        for number in range(50):
            assert conn.run(["echo", str(number)], capture_output=True).stdout == b"%d\n" % number
        assert len(slow.stdout.read()) == 64 << 20
        assert slow.wait(DEADLINE) == 0


def test_a_backend_that_is_stopped_is_noticed_and_dialled_again(tmp_path: Path) -> None:
    script = (
        "import sys, agent_client\n"
        "listener = agent_client.ReverseListener('127.0.0.1', int(sys.argv[1]), token=sys.argv[2])\n"
        "print(listener.port, flush=True)\n"
        "while True:\n"
        "    conn = listener.wait_for('box')\n"
        "    print('joined', flush=True)\n"
        "    conn.wait_closed()\n"
    )
    command = [sys.executable, "-c", script, "0", TOKEN]
    with spawned(command, stdout=subprocess.PIPE, text=True) as backend:
        assert backend.stdout is not None
        port = int(backend.stdout.readline())
        with dialling(tmp_path, port, "--ping-interval", "200ms", "--ping-timeout", "1s") as running:
            assert backend.stdout.readline() == "joined\n"
            backend.send_signal(signal.SIGSTOP)  # its kernel still acknowledges every ping
            running.wait_for_log("nothing was heard of the peer")
            backend.send_signal(signal.SIGCONT)
            running.wait_for_log("reverse mode: connected", 2)
            backend.kill()


@pytest.fixture
def certificates(tmp_path: Path) -> tuple[ssl.SSLContext, Path]:
    """A server's TLS context for 127.0.0.1 and localhost, and the CA to trust."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return context, path


def test_a_private_ca_is_trusted_when_told_to(tmp_path: Path, certificates: tuple[ssl.SSLContext, Path]) -> None:
    context, ca = certificates
    with ReverseListener("127.0.0.1", token=TOKEN, tls=context) as listener:
        url = f"https://localhost:{listener.port}/cb?id=box"
        refused = RunningAgent(tmp_path, "--callback", url, "--callback-retries", "1")
        assert refused.wait() == 1
        assert "its certificate is not trusted: unable to get local issuer certificate" in refused.log
        running = RunningAgent(tmp_path, "--callback", url, "--callback-ca", str(ca))
        conn = listener.wait_for("box", DEADLINE)
        data = os.urandom(16 << 20)
        assert conn.run(["cat"], input=data, capture_output=True).stdout == data  # both directions at once, over TLS
        running.stop()


def test_https_proxy_is_used_and_no_proxy_is_heeded(tmp_path: Path, certificates: tuple[ssl.SSLContext, Path]) -> None:
    context, ca = certificates
    with socket.create_server(("127.0.0.1", 0)) as unused:
        proxy_port = unused.getsockname()[1]
    (tmp_path / "tinyproxy.conf").write_text(f"Port {proxy_port}\nListen 127.0.0.1\nTimeout 600\nLogLevel Info\n")
    with (
        ReverseListener("127.0.0.1", token=TOKEN, tls=context) as listener,
        spawned(
            ["tinyproxy", "-d", "-c", str(tmp_path / "tinyproxy.conf")], stdout=subprocess.PIPE, text=True
        ) as proxy,
    ):
        assert proxy.stdout is not None
        seen: list[str] = []
        ready = threading.Event()

        def watch() -> None:
            for line in proxy.stdout or ():
                seen.append(line)
                if "Accepting connections" in line or "Now accepting" in line or "Starting main loop" in line:
                    ready.set()

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert ready.wait(DEADLINE), "".join(seen)
        flags = ("--callback", f"https://localhost:{listener.port}/cb?id=box", "--callback-ca", str(ca))
        proxied = {"HTTPS_PROXY": f"http://127.0.0.1:{proxy_port}"}
        running = RunningAgent(tmp_path, *flags, env=proxied)
        assert listener.wait_for("box", DEADLINE).run(["echo", "hi"], capture_output=True).stdout == b"hi\n"
        running.stop()
        through_proxy = sum("CONNECT" in line for line in seen)
        assert through_proxy, "".join(seen)
        direct = RunningAgent(tmp_path, *flags, env={**proxied, "NO_PROXY": "localhost"})
        direct.wait_for_log("reverse mode: connected")
        direct.stop()
        assert sum("CONNECT" in line for line in seen) == through_proxy
        proxy.terminate()
        watcher.join(DEADLINE)


def test_exec_goes_through_a_listener_from_another_terminal(tmp_path: Path) -> None:
    client = [sys.executable, agent_client.__file__]
    environ = {**os.environ, "SOCKERLESS_AGENT_TOKEN": TOKEN}
    command = [*client, "listen", "--addr", "127.0.0.1:0"]
    with spawned(command, env=environ, stdout=subprocess.PIPE, text=True) as backend:
        assert backend.stdout is not None
        match = re.fullmatch(r"listening on (127.0.0.1:(\d+))\n", backend.stdout.readline())
        assert match is not None
        with dialling(tmp_path, int(match[2]), "--resume-window", "1s"):
            assert backend.stdout.readline() == "agent box joined\n"
            through = ["--via", match[1], "--agent", "box"]
            result = subprocess.run([*client, "exec", "-i", *through, "--", "sh", "-c", "cat; echo err >&2; exit 5"],
                                    env=environ, input=b"hello\n", capture_output=True, timeout=DEADLINE)  # fmt: skip
            assert (result.returncode, result.stdout, result.stderr) == (5, b"hello\n", b"err\n")
            missing = subprocess.run([*client, "exec", *through, "no-such-command"],
                                     env=environ, capture_output=True, timeout=DEADLINE)  # fmt: skip
            assert missing.returncode == 127
            # A client that does not come back takes its command with it.
            with spawned([*client, "exec", *through, "--", "sh", "-c", "echo $$; exec sleep 1000"],
                                  env=environ, stdout=subprocess.PIPE) as doomed:  # fmt: skip
                assert doomed.stdout is not None
                child = int(doomed.stdout.readline())
                doomed.kill()
            wait = ["sh", "-c", f"while kill -0 {child} 2>/dev/null; do sleep 0.01; done"]
            assert subprocess.run([*client, "exec", *through, *wait], env=environ, timeout=DEADLINE).returncode == 0
        assert backend.stdout.readline() == "agent box left\n"
        backend.terminate()
        assert backend.wait(DEADLINE) == 0


@pytest.mark.root
def test_a_link_that_is_cut_without_a_word_is_noticed_and_every_session_goes_on(tmp_path: Path) -> None:
    """Two network namespaces; the cable between them is pulled. No socket is closed by anybody."""
    names = [f"sl{os.getpid()}{side}" for side in "ab"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    script = (
        "import sys, agent_client\n"
        "listener = agent_client.ReverseListener('10.99.1.1', 8080, token=sys.argv[1])\n"
        "print('up', flush=True)\n"
        "conn = listener.wait_for('box')\n"
        "process = conn.popen(['sh', '-c', 'echo started; read word; echo $word; exit 7'])\n"
        "print(process.stdout.readline().decode().strip(), flush=True)\n"
        "sys.stdin.readline()\n"
        "process.stdin.write(b'goes on\\n')\n"
        "print(process.stdout.readline().decode().strip(), process.wait(), flush=True)\n"
        "result = listener.wait_for('box').run(['echo', 'again'], capture_output=True, text=True)\n"
        "print(result.stdout.strip(), flush=True)\n"
        "sys.stdin.read()\n"
    )
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        for name, address in zip(names, ("10.99.1.1/24", "10.99.1.2/24"), strict=True):
            ip("-n", name, "addr", "add", address, "dev", name)
            ip("-n", name, "link", "set", name, "up")
        command = ["ip", "netns", "exec", names[0], sys.executable, "-c", script, TOKEN]
        with spawned(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as backend:
            assert backend.stdout is not None
            assert backend.stdout.readline() == "up\n"
            running = RunningAgent(tmp_path, "--callback", "http://10.99.1.1:8080/cb?id=box", "--callback-retries", "0",
                                   "--ping-interval", "300ms", "--ping-timeout", "2s",
                                   prefix=("ip", "netns", "exec", names[1]))  # fmt: skip
            assert backend.stdout.readline() == "started\n"
            ip("-n", names[0], "link", "set", names[0], "down")
            running.wait_for_log("nothing was heard of the peer")
            running.wait_for_log("1 sessions were running")
            running.wait_for_log("cannot connect to .* try 1 of any number")
            time.sleep(float(os.environ.get("LINK_DOWN", "0")))  # seconds more, by hand
            assert backend.stdin is not None
            backend.stdin.write("write\n")  # into the cut link
            backend.stdin.flush()
            ip("-n", names[0], "link", "set", names[0], "up")
            assert backend.stdout.readline() == "goes on 7\n"
            assert backend.stdout.readline() == "again\n"
            running.stop()
            backend.stdin.close()
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_many_small_writes_are_few_messages(tmp_path: Path) -> None:
    """A deployed Go backend buffers 64 messages of a session, and drops the rest without a word, the exit too."""
    messages: list[dict[str, Any]] = []
    took = 0.0
    received, over = threading.Event(), threading.Event()

    def backend(connection: ServerConnection) -> None:
        nonlocal took
        script = "i=0; while [ $i -lt 5000 ]; do echo $i; i=$((i + 1)); done; exit 3"
        started = time.monotonic()
        connection.send(json.dumps({"type": "exec", "id": "e", "cmd": ["sh", "-c", script]}))
        for text in connection:
            messages.append(json.loads(text))
            if messages[-1]["type"] == "exit":
                break
        took = time.monotonic() - started
        received.set()
        over.wait(DEADLINE)  # else the agent would dial again

    with serve(backend, "127.0.0.1", 0, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with dialling(tmp_path, server.socket.getsockname()[1]):
            assert received.wait(DEADLINE)
        over.set()
        server.shutdown()
        thread.join()
    assert messages.pop() == {"type": "exit", "id": "e", "code": 3}
    output = b"".join(base64.b64decode(message["data"]) for message in messages)
    assert output == b"".join(b"%d\n" % number for number in range(5000))
    assert len(messages) <= PACED_BURST + 1 + PACED_RATE * took


LAUNCHER = """
import os, sys
import agent

for number in range(int(sys.argv[2])):
    if os.fork() == 0:  # so that they share what they have imported
        agent.main(["--log-level", "error", "--callback", f"{sys.argv[1]}?id=box{number}"])
sys.stdin.read()
"""


@pytest.mark.once
def test_200_agents_on_one_listener(tmp_path: Path) -> None:
    count = 200
    left: list[str] = []
    with ReverseListener("127.0.0.1", token=TOKEN, on_left=lambda conn: left.append(conn.id)) as listener:
        command = [sys.executable, "-c", LAUNCHER, f"http://127.0.0.1:{listener.port}/cb", str(count)]
        environ = {**os.environ, "SOCKERLESS_AGENT_TOKEN": TOKEN}
        with spawned(command, env=environ, stdin=subprocess.PIPE, start_new_session=True) as launcher:
            try:
                conns = [listener.wait_for(f"box{number}", DEADLINE) for number in range(count)]
                assert len(listener) == count
                processes = [conn.popen(["sh", "-c", "echo $0; read x; exit 7", conn.id], text=True) for conn in conns]
                for conn, process in zip(conns, processes, strict=True):
                    assert process.stdout.readline() == f"{conn.id}\n"
                for process in processes:
                    process.stdin.write("\n")
                    process.stdin.close()
                assert [process.wait(DEADLINE) for process in processes] == [7] * count
            finally:
                os.killpg(launcher.pid, signal.SIGTERM)
            for conn in conns:
                conn.wait_closed()
    assert sorted(left) == sorted(f"box{number}" for number in range(count))


def test_an_id_that_the_token_function_does_not_know_is_refused(tmp_path: Path) -> None:
    with ReverseListener("127.0.0.1", token={"good": TOKEN}.get) as listener:
        with dialling(tmp_path, listener.port, "--callback-retries", "1", query="?id=evil", token="") as evil:
            assert evil.wait() == 1
            assert "HTTP status 401" in evil.log
        with pytest.raises(Unauthorized):
            AgentConn.dial(f"ws://127.0.0.1:{listener.port}/agents/evil/ws", None)
        with dialling(tmp_path, listener.port, query="?id=good"):
            assert listener.wait_for("good", DEADLINE).run(["true"]).returncode == 0


def test_a_client_behind_a_listener_is_told_of_the_lifetime_and_of_the_loss(
    tmp_path: Path, listener: ReverseListener
) -> None:
    with dialling(tmp_path, listener.port, "--lifetime", "3600s", "--lifetime-signal", "USR1") as agent:
        listener.wait_for("box", DEADLINE)
        with AgentConn.dial(f"ws://127.0.0.1:{listener.port}/agents/box/ws", TOKEN, patience=1) as conn:
            process = conn.popen(["sh", "-c", "echo up; exec sleep 300"])
            assert process.stdout.readline() == b"up\n"
            agent.process.send_signal(signal.SIGUSR1)
            assert conn.lifetime_expired.wait(DEADLINE)
            agent.process.kill()
            with pytest.raises(ConnectionLost):
                process.wait(DEADLINE)


def test_a_client_behind_a_listener_takes_all_that_it_started_with_it(
    tmp_path: Path, listener: ReverseListener
) -> None:
    with dialling(tmp_path, listener.port, "--keep-alive", "--", "sh", "-c", "echo up; exec sleep 300") as agent:
        listener.wait_for("box", DEADLINE)
        conn = AgentConn.dial(f"ws://127.0.0.1:{listener.port}/agents/box/ws", TOKEN)
        script = (
            f"trap 'touch {tmp_path}/hung-up; exit 1' HUP; setsid sleep 300 & echo $!; while :; do sleep 0.02; done"
        )
        child = int(conn.popen(["sh", "-c", script]).stdout.readline())
        assert conn.attach().stdout.readline() == b"up\n"
        conn.close()
        agent.wait_for_log("exec ended: exit code 1 ")
        agent.wait_for_log("attach ended")
        assert (tmp_path / "hung-up").exists()
        deadline = time.monotonic() + DEADLINE
        while os.path.exists(f"/proc/{child}"):
            assert time.monotonic() < deadline
            time.sleep(0.01)

"""The gateway's TCP endpoint with TLS: Docker's own client, openssl, other clients, and certificates of every kind."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from by_hand import UPGRADE, Connection
from certificates import Authority
from docking import DEADLINE, GATEWAY, ROOT, Gateway, Terminal
from support import TOKEN, Agent, eventually, need, wait_gone

from agent import make_client_tls

OpenTerminal = Callable[..., Terminal]


@pytest.fixture(scope="module")
def client_pem(ours: Authority) -> str:
    return ours.issue("client.pem", "alice.example")


@pytest.fixture(scope="module")
def secure(web: Agent, ours: Authority, server_pem: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that wants certificates from its clients."""
    flags = ("-H", "tcp://127.0.0.1:0", "--tls-cert", server_pem, "--tls-client-ca", ours.path)
    gateway = Gateway(tmp_path_factory.mktemp("gateway"), *flags, f"--agent=web={web.address}")
    gateway.wait_for_log("agent web: connected")
    yield gateway
    assert gateway.stop() == 0
    assert "unexpected error" not in gateway.log, gateway.log


def port_of(gateway: Gateway) -> int:
    return int(gateway.wait_for_log(r"clients on 127\.0\.0\.1:(\d+) with TLS")[1])


def flags_for(gateway: Gateway, ca: str, pem: str, name: str = "127.0.0.1") -> tuple[str, ...]:
    """What a person gives Docker's client."""
    files = ("--tlscacert", ca, "--tlscert", pem, "--tlskey", pem)
    return ("-H", f"tcp://{name}:{port_of(gateway)}", "--tlsverify", *files)


@pytest.fixture
def flags(secure: Gateway, ours: Authority, client_pem: str) -> tuple[str, ...]:
    return flags_for(secure, ours.path, client_pem)


def connect(gateway: Gateway, tls: ssl.SSLContext) -> ssl.SSLSocket:
    """A connection for which an end without TLS's goodbye is an error."""
    sock = socket.create_connection(("127.0.0.1", port_of(gateway)), DEADLINE)
    return tls.wrap_socket(sock, server_hostname="127.0.0.1", suppress_ragged_eofs=False)


@pytest.fixture
def dial(secure: Gateway, ours: Authority, client_pem: str) -> Iterator[Callable[[], Connection]]:
    tls = make_client_tls(ours.path, client_pem)
    with contextlib.ExitStack() as stack:
        yield lambda: Connection(stack.enter_context(connect(secure, tls)))


# ── Docker's own client ───────────────────────────────────────────────────────


def test_a_command_has_its_streams_and_its_status(secure: Gateway, flags: tuple[str, ...]) -> None:
    script = "cat; echo err >&2; exit 3"
    for name in ("127.0.0.1", "localhost"):
        at = (flags[0], f"tcp://{name}:{port_of(secure)}", *flags[2:])
        assert secure.docker(*at, "exec", "-i", "web", "sh", "-c", script, data=b"hello") == (3, b"hello", b"err\n")
    assert secure.docker(*flags, "exec", "web", "sh", "-c", script) == (3, b"", b"err\n")


def test_the_end_of_stdin_arrives_and_output_goes_on_after_it(secure: Gateway, flags: tuple[str, ...]) -> None:
    assert secure.docker(*flags, "exec", "-i", "web", "cat", data=b"hi\n") == (0, b"hi\n", b"")
    data = os.urandom(3 << 20)
    assert secure.docker(*flags, "exec", "-i", "web", "cat", data=data) == (0, data, b"")
    script = "sha256sum; head -c 3000000 /dev/zero"  # all of it after the half-close
    code, stdout, stderr = secure.docker(*flags, "exec", "-i", "web", "sh", "-c", script, data=data)
    assert (code, stderr, stdout[:64].decode()) == (0, b"", hashlib.sha256(data).hexdigest())
    assert stdout.endswith(bytes(3_000_000))


def test_a_command_that_does_not_read_its_input_loses_no_output(secure: Gateway, flags: tuple[str, ...]) -> None:
    """The client still sends when the gateway says goodbye."""
    for _ in range(5):
        result = secure.docker(*flags, "exec", "-i", "web", "sh", "-c", "echo early; exit 5", data=bytes(8 << 20))
        assert result[:2] == (5, b"early\n")


def test_output_of_any_size_arrives_whole(secure: Gateway, flags: tuple[str, ...]) -> None:
    code, stdout, stderr = secure.docker(*flags, "exec", "web", "head", "-c", str(64 << 20), "/dev/zero")
    assert (code, len(stdout), stdout.strip(b"\0"), stderr) == (0, 64 << 20, b"", b"")


def test_a_terminal_follows_the_persons_and_passes_keys_on(
    secure: Gateway, flags: tuple[str, ...], open_terminal: OpenTerminal
) -> None:
    script = "trap 'stty size' WINCH; trap 'exit 7' INT; stty size; while sleep 0.05; do :; done"
    terminal = open_terminal(secure, *flags, "exec", "-it", "web", "sh", "-c", script, columns=91, rows=31)
    terminal.wait_for("^31 91$")
    terminal.resize(70, 20)
    terminal.wait_for("^20 70$")
    terminal.type("\x03")
    assert terminal.wait() == 7
    terminal.assert_as_before()


def test_attach_and_logs_follow_the_main_process(box: Any, ours: Authority, server_pem: str, client_pem: str) -> None:
    agent, _ = box
    at = ("-H", "tcp://127.0.0.1:0", "--tls-cert", server_pem, "--tls-client-ca", ours.path)
    directory = Path(client_pem).parent / "attach"
    directory.mkdir()
    gateway = Gateway(directory, *at, f"--agent=box={agent.address}")
    try:
        gateway.wait_for_log("agent box: connected")
        docker_flags = flags_for(gateway, ours.path, client_pem)
        with (
            gateway.start(*docker_flags, "logs", "-f", "box") as logs,
            gateway.start(*docker_flags, "attach", "box") as attached,
        ):
            assert logs.stdout is not None and attached.stdout is not None and attached.stdin is not None
            assert logs.stdout.readline() == b"ready\n"
            gateway.wait_for_log("begin POST .*/attach")
            attached.stdin.write(b"over TLS\n")
            attached.stdin.flush()
            assert attached.stdout.readline() == b"got over TLS\n"
            assert logs.stdout.readline() == b"got over TLS\n"
            attached.send_signal(signal.SIGTERM)  # is passed on
            assert attached.wait(DEADLINE) == 21
            assert logs.stdout.read() == b""
            assert logs.wait(DEADLINE) == 0
        gateway.stop()
    finally:
        gateway.kill()


def test_a_tree_is_copied_both_ways(secure: Gateway, flags: tuple[str, ...], tmp_path: Path) -> None:
    source, there, back = tmp_path / "source", tmp_path / "there", tmp_path / "back"
    (source / "sub").mkdir(parents=True)
    (source / "sub/data").write_bytes(os.urandom(5 << 20))
    (source / "link").symlink_to("sub/data")
    assert secure.docker(*flags, "cp", str(source), f"web:{there}")[0] == 0
    assert secure.docker(*flags, "cp", f"web:{there}", str(back))[0] == 0
    assert (back / "sub/data").read_bytes() == (source / "sub/data").read_bytes()
    assert os.readlink(back / "link") == "sub/data"


def test_a_client_that_is_killed_leaves_nothing_running(
    secure: Gateway, flags: tuple[str, ...], tmp_path: Path
) -> None:
    """Its stdin was not at its end: that TLS's goodbye is missing shows at once that it is not now, either."""
    script = f"echo $$ > {tmp_path}/pid; exec sleep 1000"
    with secure.start(*flags, "exec", "-i", "web", "sh", "-c", script) as process:
        pid = int(eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "its PID"))
        process.kill()
    wait_gone(pid)


# ── other clients ─────────────────────────────────────────────────────────────


# The SDK leaves the sockets of its streams to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")
def test_the_sdk_for_python_speaks_tls(
    secure: Gateway, ours: Authority, client_pem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):  # would win over what the SDK is told
        monkeypatch.delenv(name, raising=False)
    tls = docker.tls.TLSConfig(client_cert=(client_pem, client_pem), ca_cert=ours.path, verify=True)
    client = docker.DockerClient(f"https://127.0.0.1:{port_of(secure)}", tls=tls, timeout=int(DEADLINE))
    try:
        container = client.containers.get("web")
        assert container.exec_run(["sh", "-c", "echo out; echo err >&2; exit 4"], demux=True) == (
            4,
            (b"out\n", b"err\n"),
        )
        stream = container.exec_run(["sh", "-c", "echo one; echo two"], stream=True).output
        assert b"".join(stream) == b"one\ntwo\n"
    finally:
        client.close()
        gc.collect()


def s_client(gateway: Gateway, *flags: str) -> tuple[int, str]:
    """The exit code and output of openssl s_client, which asks for /_ping once it is connected."""
    need("openssl")
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port_of(gateway)}", "-ign_eof", *flags]
    request = "GET /_ping HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\r\n"
    done = subprocess.run(
        command, input=request, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=DEADLINE
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_openssl_verifies_the_certificate_and_gets_an_answer_to_its_end(
    secure: Gateway, ours: Authority, client_pem: str, version: str
) -> None:
    mine = ("-cert", client_pem, "-key", client_pem)
    verified = ("-CAfile", ours.path, "-verify_return_error", "-verify_ip", "127.0.0.1")
    code, text = s_client(secure, version, *verified, *mine)
    assert (code, "Verify return code: 0 (ok)" in text, "HTTP/1.1 200 OK" in text) == (0, True, True), text
    assert "unexpected eof" not in text
    assert re.search(r"Cipher is (ECDHE-\S+-(GCM-\S+|CHACHA20-POLY1305)|TLS_\S+)", text), text


def test_nothing_older_than_tls_1_2_is_spoken(secure: Gateway) -> None:
    for version in ("-tls1", "-tls1_1"):
        code, text = s_client(secure, version, "-cipher", "ALL:@SECLEVEL=0")
        assert (code != 0, "200 OK" in text) == (True, False), text


@pytest.mark.parametrize("with_fin", [False, True])
def test_a_goodbye_is_the_end_of_stdin_whether_tcp_ends_with_it_or_not(
    dial: Callable[[], Connection], with_fin: bool
) -> None:
    """Go's TLS leaves TCP open, and that of Rust closes its half."""
    connection = dial()
    exec_id = connection.create("sh", "-c", "cat; echo end", AttachStdin=True)
    connection.send("POST", f"/exec/{exec_id}/start", *UPGRADE, body=b"{}")
    assert connection.read_head()[0] == 101
    connection.sock.sendall(b"hello\n")
    sock = connection.sock
    assert isinstance(sock, ssl.SSLSocket)
    sock.settimeout(0)
    with pytest.raises(ssl.SSLWantReadError):
        sock.unwrap()
    if with_fin:
        socket.socket.shutdown(sock, socket.SHUT_WR)
    sock.settimeout(DEADLINE)
    assert b"".join(data for _, data in connection.frames()) == b"hello\nend\n"


def test_a_connection_that_is_cut_is_no_end_of_stdin(dial: Callable[[], Connection], tmp_path: Path) -> None:
    connection = dial()
    script = f"echo $$ > {tmp_path}/pid; cat > {tmp_path}/data && echo whole > {tmp_path}/verdict"
    exec_id = connection.create("sh", "-c", script, AttachStdin=True)
    connection.send("POST", f"/exec/{exec_id}/start", *UPGRADE, body=b"{}")
    assert connection.read_head()[0] == 101
    connection.sock.sendall(b"a part")
    eventually(lambda: (tmp_path / "data").exists() and (tmp_path / "data").read_bytes() == b"a part", "the part")
    socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)  # without a word of TLS's
    wait_gone(int((tmp_path / "pid").read_text()))
    assert not (tmp_path / "verdict").exists()


def test_a_slow_reader_gets_all_of_the_output_and_a_proper_end(
    secure: Gateway, ours: Authority, client_pem: str
) -> None:
    """The gateway's goodbye waits until there is room for it."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(DEADLINE)
    sock.connect(("127.0.0.1", port_of(secure)))
    tls = make_client_tls(ours.path, client_pem)
    with tls.wrap_socket(sock, server_hostname="127.0.0.1", suppress_ragged_eofs=False) as stream:
        connection = Connection(stream)
        exec_id = connection.create("head", "-c", str(4 << 20), "/dev/zero")
        connection.send("POST", f"/exec/{exec_id}/start", *UPGRADE, body=b"{}")
        assert connection.read_head()[0] == 101
        assert sum(len(data) for _, data in connection.frames()) == 4 << 20  # an SSLEOFError if the goodbye is missing


def test_a_connection_is_used_again_and_requests_may_come_ahead(dial: Callable[[], Connection]) -> None:
    connection = dial()
    for _ in range(3):
        assert connection.ask("GET", "/info")[0] == 200
    for _ in range(3):
        connection.send("GET", "/v1.40/version")
    for _ in range(3):
        assert connection.read_answer()[0] == 200


# ── certificates ──────────────────────────────────────────────────────────────


def test_without_a_certificate_a_client_is_told_that_it_needs_one(secure: Gateway, ours: Authority) -> None:
    at = ("-H", f"tcp://127.0.0.1:{port_of(secure)}", "--tls", "--tlscacert", ours.path)
    assert "a client certificate is needed" in secure.refused(*at, "ps")
    assert secure.docker(*at, "exec", "web", "true")[0] != 0
    secure.wait_for_log(r"client refused: a client certificate is needed.* \(127\.0\.0\.1:\d+\)")
    with connect(secure, make_client_tls(ours.path)) as sock:
        connection = Connection(sock)
        connection.send("GET", "/_ping")
        status, _, body = connection.read_answer()
        assert (status, json.loads(body)["message"]) == (403, "a client certificate is needed")


def test_a_client_certificate_that_is_not_good_gets_no_further_than_tls(
    secure: Gateway, ours: Authority, theirs: Authority
) -> None:
    for pem, alert, logged in (
        (ours.issue("late.pem", "late.example", expired=True), "expired", "certificate has expired"),
        (theirs.issue("bob.pem", "bob.example"), "unknown ca|unknown certificate authority", "local issuer"),
    ):
        assert re.search(f"tls: .*({alert})", secure.refused(*flags_for(secure, ours.path, pem), "ps"))
        secure.wait_for_log(f"client refused: the TLS handshake failed: .*{logged}")
        for version in ("-tls1_2", "-tls1_3"):
            _, text = s_client(secure, version, "-CAfile", ours.path, "-cert", pem, "-key", pem)
            assert re.search(f"alert .*({alert})", text), text
            assert "200 OK" not in text


def test_the_client_refuses_a_gateway_whose_certificate_is_not_good(
    start_gateway: Callable[..., Gateway], web: Agent, ours: Authority, theirs: Authority, client_pem: str
) -> None:
    for pem, words in (
        (ours.issue("other-name.pem", "other.example"), "127.0.0.1"),
        (ours.issue("expired.pem", "127.0.0.1", expired=True), "expired"),
        (theirs.issue("unrelated.pem", "127.0.0.1"), "unknown authority"),
    ):
        gateway = start_gateway("-H", "tcp://127.0.0.1:0", "--tls-cert", pem, f"--agent=web={web.address}")
        said = gateway.refused(*flags_for(gateway, ours.path, client_pem), "ps")
        assert re.search(f"x509: .*{words}", said), said
        gateway.wait_for_log("client refused: the TLS handshake failed: .*bad certificate|unknown|expired")


def test_the_wrong_protocol_is_told_so(secure: Gateway, start_gateway: Callable[..., Gateway], ours: Authority) -> None:
    at = ("-H", f"tcp://127.0.0.1:{port_of(secure)}")
    assert secure.docker(*at, "ps")[0] != 0
    with socket.create_connection(("127.0.0.1", port_of(secure)), DEADLINE) as sock:
        connection = Connection(sock)
        connection.send("GET", "/_ping")
        status, _, body = connection.read_answer()
        assert (status, "this port speaks TLS" in json.loads(body)["message"]) == (400, True)
    plain = start_gateway("-H", "tcp://127.0.0.1:0")
    host, port = plain.wait_for_log(r"clients on (127\.0\.0\.1):(\d+)").groups()
    at = ("-H", f"tcp://{host}:{port}", "--tls", "--tlscacert", ours.path)
    assert "server gave HTTP response to HTTPS client" in plain.refused(*at, "ps")
    plain.wait_for_log("client refused: HTTP status 400: this port speaks no TLS")


def served_names(gateway: Gateway, ours: Authority) -> list[str]:
    with connect(gateway, make_client_tls(ours.path)) as sock:
        return [str(value) for _, value in (sock.getpeercert() or {})["subjectAltName"]]


def test_sighup_reloads_the_certificates_and_drops_no_session(
    start_gateway: Callable[..., Gateway], web: Agent, ours: Authority, theirs: Authority, tmp_path: Path
) -> None:
    pem, clients = ours.issue("rotated.pem", "127.0.0.1", "first.example"), tmp_path / "clients.pem"
    clients.write_text(Path(ours.path).read_text())
    flags = ("-H", "tcp://127.0.0.1:0", "--tls-cert", pem, "--tls-client-ca", str(clients))
    gateway = start_gateway(*flags, f"--agent=web={web.address}")
    gateway.wait_for_log("agent web: connected")
    before = flags_for(gateway, ours.path, ours.issue("alice.pem", "alice.example"))
    after = flags_for(gateway, ours.path, theirs.issue("bob.pem", "bob.example"))
    with gateway.start(*before, "exec", "-i", "web", "cat") as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"before\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"before\n"
        assert gateway.docker(*after, "ps")[0] != 0
        Path(pem).write_text("nonsense")
        gateway.process.send_signal(signal.SIGHUP)
        gateway.wait_for_log(f"what was read before stays in use: '{re.escape(pem)}' holds no PEM certificate")
        assert "first.example" in served_names(gateway, ours)
        ours.issue("rotated.pem", "127.0.0.1", "second.example")
        clients.write_text(Path(theirs.path).read_text())
        gateway.process.send_signal(signal.SIGHUP)
        gateway.wait_for_log("new connections get the certificates that were read now")
        assert "second.example" in served_names(gateway, ours)
        assert gateway.docker(*after, "ps", "-q")[0] == 0
        assert gateway.docker(*before, "ps", "-q")[0] != 0
        process.stdin.write(b"after\n")
        process.stdin.close()
        assert process.stdout.read() == b"after\n"
        process.wait(DEADLINE)


# ── agents ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("scheme", ["", "wss://", "https://"])
def test_an_agent_that_speaks_tls_is_dialled_with_it(
    start_gateway: Callable[..., Gateway],
    start_agent: Callable[..., Agent],
    ours: Authority,
    server_pem: str,
    client_pem: str,
    scheme: str,
) -> None:
    strict = start_agent("--tls-cert", server_pem, "--tls-client-ca", ours.path)
    plain = start_agent("--addr", "unix:" + client_pem + ".sock")
    flags = (f"--agent=web={scheme}{strict.address}", f"--agent=plain={plain.address}")
    gateway = start_gateway(*flags, "--ca", ours.path, "--cert", client_pem)
    assert gateway.wait_for_log("agent (web|plain): connected", count=2)
    assert gateway.output("exec", "web", "echo", "hi") == "hi\n"
    assert gateway.output("exec", "plain", "echo", "hi") == "hi\n"
    lacking = start_gateway(*flags, "--ca", ours.path)
    eventually(lambda: "a client certificate is needed" in lacking.output("inspect", "web"), "the reason")


def test_agents_dial_in_with_tls(
    start_gateway: Callable[..., Gateway],
    ours: Authority,
    theirs: Authority,
    server_pem: str,
    client_pem: str,
    tmp_path: Path,
) -> None:
    flags = ("--listen-tls-cert", server_pem, "--listen-tls-client-ca", ours.path)
    gateway = start_gateway("--listen", "127.0.0.1:0", *flags)
    url = f"https://{gateway.wait_for_log(r'agents may dial (.*)')[1]}/connect?id=box"
    command = [sys.executable, str(ROOT / "agent.py"), "--callback", url, "--callback-ca", ours.path]
    environ = {**os.environ, "SOCKERLESS_AGENT_TOKEN": TOKEN}
    stranger = theirs.issue("stranger.pem", "box.example")
    refused = subprocess.run(
        [*command, "--callback-retries", "1", "--callback-cert", stranger], env=environ, capture_output=True, text=True
    )
    assert (refused.returncode, "unknown ca" in refused.stderr) == (1, True), refused.stderr
    with subprocess.Popen([*command, "--callback-cert", client_pem], env=environ, stderr=subprocess.DEVNULL) as agent:
        try:
            gateway.wait_for_log("agent box: joined")
            assert gateway.output("exec", "box", "echo", "hi") == "hi\n"
        finally:
            agent.kill()


# ── mistakes ──────────────────────────────────────────────────────────────────


def start_wrongly(*flags: str) -> tuple[int, str]:
    """The exit code and the one line of a gateway that does not start."""
    done = subprocess.run(
        [sys.executable, str(GATEWAY), *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.stderr.count("\n") == 1, done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("-H TCP --tls-key PEM", "--tls-key needs --tls-cert"),
        ("-H TCP --tls-client-ca CA", "--tls-client-ca needs --tls-cert"),
        ("-H TCP --tls-cert /nonexistent", "cannot read '/nonexistent'"),
        ("-H TCP --tls-cert CA", "cannot use the private key"),
        ("-H UNIX --tls-cert PEM", "a unix socket needs no TLS"),
        ("-H UNIX --listen-tls-cert PEM", "--listen-tls-cert needs --listen"),
        ("-H UNIX --key PEM", "--key needs --cert"),
        ("-H UNIX --agent=web=127.0.0.1:1 --ca /nonexistent", "cannot read '/nonexistent'"),
        ("-H tcp://0.0.0.0:0", "add --tls-cert and --tls-client-ca, or --insecure"),
        ("-H tcp://:0", "add --tls-cert and --tls-client-ca, or --insecure"),
        ("-H tcp://0.0.0.0:0 --tls-cert PEM", "add --tls-cert and --tls-client-ca, or --insecure"),
    ],
)
def test_flags_that_make_no_sense_are_one_line(
    ours: Authority, server_pem: str, tmp_path: Path, words: str, message: str
) -> None:
    known = {"TCP": "tcp://127.0.0.1:0", "UNIX": f"unix://{tmp_path}/docker.sock", "PEM": server_pem, "CA": ours.path}
    code, said = start_wrongly(*(known.get(word, word) for word in words.split()))
    assert (code, message in said) == (2, True), said


def test_nobody_is_let_in_from_elsewhere_without_a_certificate_by_accident(
    start_gateway: Callable[..., Gateway], ours: Authority, server_pem: str
) -> None:
    """What does not start is in the test before."""
    start_gateway("-H", "tcp://0.0.0.0:0", "--insecure").wait_for_log("HAS NO AUTHENTICATION")
    flags = ("--tls-cert", server_pem, "--tls-client-ca", ours.path)
    strict = start_gateway("-H", "tcp://0.0.0.0:0", *flags)
    strict.wait_for_log(r"clients on 0\.0\.0\.0:\d+ with TLS")
    assert "HAS NO AUTHENTICATION" not in strict.log

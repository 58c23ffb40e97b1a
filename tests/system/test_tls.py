"""TLS in server mode, of the listener and of the client: certificates of every kind, reloads, and what is no TLS."""

from __future__ import annotations

import os
import re
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from certificates import Authority
from running import RunningAgent, spawned
from support import DEADLINE, TOKEN, Agent, eventually, need, run_agent

import agent_client
from agent import ConfigError, load_config
from agent_client import AgentConn, ConnectFailed, ReverseListener, ServerTLS, Unauthorized, make_client_tls


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory, ours: Authority, server_pem: str) -> Iterator[Agent]:
    """An agent with TLS, for whom no certificate is needed."""
    agent = Agent(tmp_path_factory.mktemp("agent"), "--tls-cert", server_pem)
    yield agent
    assert agent.stop() == 0
    assert "unexpected error" not in agent.log, agent.log


@pytest.fixture(scope="module")
def strict_agent(tmp_path_factory: pytest.TempPathFactory, ours: Authority, server_pem: str) -> Iterator[Agent]:
    """An agent that wants certificates from its clients, and no token."""
    flags = ("--tls-cert", server_pem, "--tls-client-ca", ours.path)
    agent = Agent(tmp_path_factory.mktemp("strict"), *flags, token="")
    yield agent
    assert agent.stop() == 0
    assert "unexpected error" not in agent.log, agent.log


def s_client(agent: Agent, *flags: str) -> tuple[int, str]:
    """The exit code and output of openssl s_client, which asks for /health once it is connected."""
    need("openssl")
    command = ["openssl", "s_client", "-connect", agent.address, "-ign_eof", *flags]
    request = f"GET /health HTTP/1.1\r\nHost: {agent.address}\r\n\r\n"
    done = subprocess.run(
        command, input=request, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=DEADLINE
    )
    return done.returncode, done.stdout


def echo(agent: Agent, tls: ssl.SSLContext, token: str | None = TOKEN) -> bytes:
    with AgentConn.dial(agent.address, token, tls=tls) as conn:
        return bytes(conn.run(["echo", "hi"], capture_output=True).stdout)


# What is spoken.


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_openssl_verifies_the_certificate_and_gets_an_answer(agent: Agent, ours: Authority, version: str) -> None:
    code, text = s_client(agent, version, "-CAfile", ours.path, "-verify_return_error", "-verify_ip", "127.0.0.1")
    assert code == 0, text
    assert "Verify return code: 0 (ok)" in text
    assert '{"status": "ok"}' in text
    assert re.search(r"Cipher is (ECDHE-\S+-(GCM-\S+|CHACHA20-POLY1305)|TLS_\S+)", text), text
    assert "Compression: NONE" in text


@pytest.mark.parametrize("version", ["-tls1", "-tls1_1"])
def test_nothing_older_than_tls_1_2_is_spoken(agent: Agent, version: str) -> None:
    code, text = s_client(agent, version, "-cipher", "ALL:@SECLEVEL=0")
    assert code != 0
    assert '"status"' not in text
    assert re.search(r"protocol version|no protocols available|unsupported protocol", text), text


@pytest.mark.parametrize("cipher", ["AES128-GCM-SHA256", "ECDHE-RSA-AES128-SHA", "DHE-RSA-AES256-SHA", "NULL-SHA256"])
def test_a_cipher_without_forward_secrecy_or_authentication_is_refused(agent: Agent, cipher: str) -> None:
    code, text = s_client(agent, "-tls1_2", "-cipher", f"{cipher}:@SECLEVEL=0")
    assert code != 0
    assert "handshake failure" in text, text


def test_renegotiation_and_resumption_are_not_offered(agent: Agent, ours: Authority) -> None:
    for version in ("-tls1_2", "-tls1_3"):
        _, text = s_client(agent, version, "-CAfile", ours.path)
        assert "New Session Ticket arrived" not in text
        assert "TLS session ticket:" not in text
    command = ["openssl", "s_client", "-connect", agent.address, "-tls1_2"]
    done = subprocess.run(command, input="R\n", capture_output=True, text=True, timeout=DEADLINE)
    assert "no renegotiation" in done.stderr, done.stderr


def test_a_session_streams_both_ways_at_once(agent: Agent, ours: Authority) -> None:
    data = os.urandom(16 << 20)
    with AgentConn.dial(f"wss://{agent.address}", TOKEN, tls=make_client_tls(ours.path)) as conn:
        assert conn.run(["cat"], input=data, capture_output=True).stdout == data


# What is not TLS, or no more.


def test_plain_http_on_the_tls_port_is_told_so(agent: Agent) -> None:
    with pytest.raises(ConnectFailed, match="HTTP status 400"):
        AgentConn.dial(agent.address, TOKEN)
    host, _, port = agent.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n")
        answer = b"".join(iter(lambda: sock.recv(4096), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert int(re.search(rb"Content-Length: (\d+)", head)[1]) == len(body)  # type: ignore[index]
    assert b"TLS" in body


def test_tls_on_a_plain_port_is_told_so(start_agent: Callable[..., Agent], ours: Authority) -> None:
    plain = start_agent()
    with pytest.raises(ConnectFailed, match="does not speak TLS"):
        AgentConn.dial(plain.address, TOKEN, tls=make_client_tls(ours.path))
    with pytest.raises(ConnectFailed, match="does not speak TLS"):
        agent_client.fetch_health(plain.address, make_client_tls(ours.path))
    assert plain.health() == {"status": "ok"}


def test_clients_that_stall_in_the_handshake_hold_up_nobody(agent: Agent, ours: Authority) -> None:
    host, _, port = agent.address.rpartition(":")
    hello = ssl.MemoryBIO()
    context = make_client_tls(ours.path)
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), hello, server_hostname="localhost").do_handshake()
    greeting = hello.read()
    stalled = []
    try:
        for number in range(200):
            stalled.append(socket.create_connection((host, int(port)), timeout=DEADLINE))
            stalled[-1].sendall((b"", greeting[:1], greeting[:100], greeting)[number % 4])
        for _ in range(3):
            assert echo(agent, context) == b"hi\n"
        for sock in stalled:  # each is let go of in the end
            while True:
                try:
                    if not sock.recv(65536):
                        break
                except ConnectionResetError:
                    break
    finally:
        for sock in stalled:
            sock.close()


def test_garbage_in_the_handshake_is_one_line_of_the_log(start_agent: Callable[..., Agent], server_pem: str) -> None:
    agent = start_agent("--tls-cert", server_pem)
    host, _, port = agent.address.rpartition(":")
    for garbage in (
        b"\x00" * 100,
        b"\x16\x03\x01\xff\xff" + b"x" * 70000,
        os.urandom(5000),
        b"\x15\x03\x03\x00\x02\x02\x28",
    ):
        with socket.create_connection((host, int(port)), timeout=DEADLINE) as sock:
            try:
                sock.sendall(garbage)
                while sock.recv(65536):
                    pass
            except (ConnectionResetError, BrokenPipeError):
                pass
    agent.wait_for_log("(?s)(the TLS handshake failed.*){4}")
    assert "Traceback" not in agent.log


# Certificates of the server.


def test_the_client_refuses_a_server_whose_certificate_is_not_good(
    start_agent: Callable[..., Agent], ours: Authority, theirs: Authority
) -> None:
    trusting = make_client_tls(ours.path)
    for pem, words in (
        (ours.issue("other-name.pem", "other.example"), "IP address mismatch"),
        (ours.issue("expired.pem", "127.0.0.1", expired=True), "certificate has expired"),
        (theirs.issue("unrelated.pem", "127.0.0.1"), "unable to get local issuer certificate"),
    ):
        agent = start_agent("--tls-cert", pem)
        with pytest.raises(ConnectFailed, match=f"its certificate is not trusted: .*{words}"):
            echo(agent, trusting)
        with pytest.raises(ConnectFailed, match=f"its certificate is not trusted: .*{words}"):
            agent_client.fetch_health(agent.address, trusting)
        agent.wait_for_log("the TLS handshake failed")
    with pytest.raises(ConnectFailed, match="its certificate is not trusted"):  # the system knows none of them
        AgentConn.dial(f"wss://{agent.address}/ws", TOKEN)


# Certificates of clients.


def test_a_client_certificate_opens_the_door_and_is_named_in_the_log(strict_agent: Agent, ours: Authority) -> None:
    pem = ours.issue("client.pem", "alice.example")
    assert echo(strict_agent, make_client_tls(ours.path, pem), token=None) == b"hi\n"
    strict_agent.wait_for_log(r"connected peer='127.0.0.1:\d+ \(alice.example\)'")


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_openssl_with_a_client_certificate_that_is_not_good_gets_no_answer(
    strict_agent: Agent, ours: Authority, theirs: Authority, version: str
) -> None:
    good = ours.issue("good.pem", "good.example")
    code, text = s_client(strict_agent, version, "-CAfile", ours.path, "-cert", good, "-key", good)
    assert (code, '"status": "ok"' in text) == (0, True), text
    for pem, alert in (
        (ours.issue("expired.pem", "late.example", expired=True), "certificate expired"),
        (theirs.issue("unrelated.pem", "bob.example"), "unknown ca"),
    ):
        code, text = s_client(strict_agent, version, "-CAfile", ours.path, "-cert", pem, "-key", pem)
        assert '"status"' not in text
        assert f"alert {alert}" in text, text


def test_a_client_whose_certificate_is_not_good_is_told_why(
    strict_agent: Agent, ours: Authority, theirs: Authority
) -> None:
    for pem, words in (
        (ours.issue("expired.pem", "late.example", expired=True), "certificate expired"),
        (theirs.issue("unrelated.pem", "bob.example"), "unknown ca"),
    ):
        with pytest.raises(ConnectFailed, match=words):
            echo(strict_agent, make_client_tls(ours.path, pem), token=None)
    strict_agent.wait_for_log("TLS handshake failed: certificate has expired")
    strict_agent.wait_for_log("TLS handshake failed: unable to get local issuer certificate")


def test_without_a_certificate_there_is_health_and_nothing_else(strict_agent: Agent, ours: Authority) -> None:
    trusting = make_client_tls(ours.path)
    with pytest.raises(Unauthorized, match="a client certificate is needed"):
        echo(strict_agent, trusting)
    assert agent_client.fetch_health(strict_agent.address, trusting) == {"status": "ok"}
    strict_agent.wait_for_log(r"client refused: a client certificate is needed peer='127.0.0.1:\d+'")


def test_a_certificate_does_not_replace_the_token(
    start_agent: Callable[..., Agent], ours: Authority, server_pem: str
) -> None:
    agent = start_agent("--tls-cert", server_pem, "--tls-client-ca", ours.path)
    tls = make_client_tls(ours.path, ours.issue("client.pem", "alice.example"))
    with pytest.raises(Unauthorized):
        echo(agent, tls, token=None)
    assert echo(agent, tls) == b"hi\n"


# Reloading.


def served_names(agent: Agent, ours: Authority) -> list[str]:
    """What the certificate is for that a new connection gets."""
    host, _, port = agent.address.rpartition(":")
    context = make_client_tls(ours.path)
    with (
        socket.create_connection((host, int(port)), DEADLINE) as sock,
        context.wrap_socket(sock, server_hostname="127.0.0.1") as secure,
    ):
        certificate = secure.getpeercert() or {}
        return [str(value) for _, value in certificate["subjectAltName"]]


def test_sighup_reloads_the_certificate_and_drops_no_session(
    start_agent: Callable[..., Agent], ours: Authority
) -> None:
    pem = ours.issue("rotated.pem", "127.0.0.1", "first.example")
    agent = start_agent("--tls-cert", pem)
    with AgentConn.dial(agent.address, TOKEN, tls=make_client_tls(ours.path)) as conn:
        with conn.popen(["cat"]) as process:
            process.stdin.write(b"before\n")
            assert process.stdout.readline() == b"before\n"
            assert "first.example" in served_names(agent, ours)
            ours.issue("rotated.pem", "127.0.0.1", "second.example")
            assert "first.example" in served_names(agent, ours)
            agent.process.send_signal(1)
            agent.wait_for_log("the certificates that were read now")
            assert "second.example" in served_names(agent, ours)
            process.stdin.write(b"after\n")
            assert process.stdout.readline() == b"after\n"
        conn.close()
    assert "connection lost" not in agent.log
    assert agent.stop() == 0


def test_a_reload_that_fails_keeps_the_old_certificate_and_says_why(
    start_agent: Callable[..., Agent], ours: Authority
) -> None:
    pem = ours.issue("broken.pem", "127.0.0.1", "first.example")
    agent = start_agent("--tls-cert", pem)
    Path(pem).write_text("nonsense")
    agent.process.send_signal(1)
    agent.wait_for_log(rf"goes on with the certificates that it has: '{re.escape(pem)}' holds no PEM certificate")
    assert "first.example" in served_names(agent, ours)
    Path(pem).unlink()
    agent.process.send_signal(1)
    agent.wait_for_log("goes on with the certificates that it has: cannot read")
    ours.issue("broken.pem", "127.0.0.1", "second.example")
    agent.process.send_signal(1)
    eventually(lambda: "second.example" in served_names(agent, ours), "the new certificate")


def test_a_reload_changes_whose_certificates_are_good(
    start_agent: Callable[..., Agent], ours: Authority, theirs: Authority, server_pem: str, tmp_path: Path
) -> None:
    authorities = tmp_path / "clients.pem"
    authorities.write_text(Path(ours.path).read_text())
    agent = start_agent("--tls-cert", server_pem, "--tls-client-ca", str(authorities))
    before = make_client_tls(ours.path, ours.issue("client.pem", "alice.example"))
    after = make_client_tls(ours.path, theirs.issue("client.pem", "bob.example"))
    assert echo(agent, before) == b"hi\n"
    with pytest.raises(ConnectFailed):
        echo(agent, after)
    authorities.write_text(Path(theirs.path).read_text())
    agent.process.send_signal(1)
    agent.wait_for_log("the certificates that were read now")
    assert echo(agent, after) == b"hi\n"
    with pytest.raises(ConnectFailed):
        echo(agent, before)


def test_sighup_still_reaches_a_main_process_that_handles_it_and_does_not_end_another(
    start_agent: Callable[..., Agent], server_pem: str
) -> None:
    script = "trap 'echo got HUP' HUP; echo ready; while :; do sleep 0.05; done"
    agent = start_agent("--tls-cert", server_pem, "--keep-alive", "--", "sh", "-c", script)
    agent.wait_for_output(b"ready\n")
    agent.process.send_signal(1)
    agent.wait_for_output(b"got HUP\n")
    agent.wait_for_log("the certificates that were read now")
    other = start_agent("--tls-cert", server_pem, "--keep-alive", "--", "sleep", "1000")
    other.process.send_signal(1)
    other.wait_for_log("the certificates that were read now")
    assert other.stop() == 143  # of its SIGTERM; the SIGHUP would have made it 129


# Mistakes at the start.


def test_a_file_that_cannot_be_used_is_a_mistake_in_a_flag(
    ours: Authority, theirs: Authority, server_pem: str, tmp_path: Path
) -> None:
    need("openssl")
    empty, broken, key, locked = (tmp_path / name for name in ("empty.pem", "broken.pem", "key.pem", "locked.pem"))
    empty.touch()
    broken.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    text = Path(server_pem).read_text()
    key.write_text(re.search(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----\n", text, re.S)[0])  # type: ignore[index]
    certificate = tmp_path / "certificate.pem"
    certificate.write_text(text.replace(key.read_text(), ""))
    subprocess.run(["openssl", "pkey", "-in", key, "-aes128", "-passout", "pass:hush", "-out", locked], check=True)
    cert = ("--tls-cert", server_pem)
    callback = ("--callback", "https://127.0.0.1:1/?id=x")
    for flags, words in (
        (("--tls-cert", str(empty)), "holds no PEM certificate"),
        (("--tls-cert", str(broken)), "holds no PEM certificate"),
        (("--tls-cert", str(certificate)), "cannot use the private key"),
        (("--tls-cert", str(certificate), "--tls-key", str(empty)), "cannot use the private key"),
        (("--tls-cert", str(certificate), "--tls-key", str(locked)), "has a passphrase"),
        (
            ("--tls-cert", theirs.issue("server.pem", "127.0.0.1"), "--tls-key", str(key)),
            "is not that of the certificate",
        ),
        (("--tls-key", str(key)), "it needs --tls-cert"),
        (("--tls-client-ca", ours.path), "it needs --tls-cert"),
        ((*cert, "--tls-client-ca", str(empty)), "tls-client-ca: .*holds no PEM certificate"),
        ((*cert, *callback), "reverse mode"),
        ((*cert, "--addr", f"unix:{tmp_path}/sock"), "unix socket"),
        ((*callback, "--callback-ca", str(empty)), "callback-ca: .*holds no PEM certificate"),
        ((*callback, "--callback-ca", str(broken)), "callback-ca: .*holds no PEM certificate"),
        ((*callback, "--callback-cert", str(empty)), "callback-cert: .*holds no PEM certificate"),
        ((*callback, "--callback-key", str(key)), "it needs --callback-cert"),
        (("--callback", "http://127.0.0.1:1/?id=x", "--callback-ca", ours.path), "https: or wss:"),
    ):
        with pytest.raises(ConfigError, match=f"^flag --.*{words}"):
            load_config(flags, {})
    result = run_agent("--tls-cert", str(empty))
    assert (result.returncode, result.stderr.count("\n"), str(empty) in result.stderr) == (2, 1, True), result


# The probe, the client's command line, and the listener.


def test_the_probe_speaks_tls(agent: Agent, strict_agent: Agent, server_pem: str) -> None:
    for asked in (agent, strict_agent):
        assert run_agent("--probe", "--addr", asked.address, "--tls-cert", server_pem).returncode == 0
    assert run_agent("--probe", "--addr", agent.address).returncode == 1


def client(*arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, agent_client.__file__, *arguments]
    environ = {**os.environ, "SOCKERLESS_AGENT_TOKEN": token}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=DEADLINE)


def test_the_command_line_speaks_tls(agent: Agent, strict_agent: Agent, ours: Authority, theirs: Authority) -> None:
    at = ("--addr", f"wss://localhost:{agent.address.rpartition(':')[2]}")
    assert client("exec", *at, "--ca", ours.path, "--", "echo", "hi").stdout == "hi\n"
    assert client("health", *at, "--ca", ours.path).stdout == '{\n  "status": "ok"\n}\n'
    refused = client("exec", *at, "--ca", theirs.path, "--", "true")
    assert (refused.returncode, "not trusted" in refused.stderr) == (125, True), refused
    pem = ours.issue("client.pem", "alice.example")
    strict = ("--addr", strict_agent.address, "--ca", ours.path)
    assert client("exec", *strict, "--cert", pem, "--", "echo", "hi").stdout == "hi\n"
    lacking = client("exec", *strict, "--", "true")
    assert (lacking.returncode, lacking.stderr.count("\n")) == (125, 1)
    assert "a client certificate is needed" in lacking.stderr
    for flags, words in (
        (("--ca", "/nonexistent"), "cannot read"),
        (("--key", pem), "--key needs --cert"),
        (("--ca", ours.path, "--addr", "ws://127.0.0.1:1/ws"), "wss://"),
        (("--ca", ours.path, "--addr", "unix:/nonexistent"), "unix socket"),
    ):
        wrong = client("exec", *flags, "--", "true")
        assert (wrong.returncode, wrong.stderr.count("\n")) == (125, 1), wrong
        assert words in wrong.stderr


def test_an_agent_in_reverse_mode_shows_the_listener_its_certificate(
    tmp_path: Path, ours: Authority, theirs: Authority, server_pem: str
) -> None:
    with ReverseListener("127.0.0.1", token=TOKEN, tls=ServerTLS(server_pem, client_ca=ours.path)) as listener:
        url = f"https://127.0.0.1:{listener.port}/cb?id=box"
        trusting = ("--callback", url, "--callback-ca", ours.path, "--callback-retries", "1")
        refused = RunningAgent(tmp_path, *trusting)
        assert refused.wait() == 1
        assert "HTTP status 403" in refused.log
        unrelated = theirs.issue("agent.pem", "box.example")
        refused = RunningAgent(tmp_path, *trusting, "--callback-cert", unrelated)
        assert refused.wait() == 1
        assert "unknown ca" in refused.log
        running = RunningAgent(tmp_path, *trusting, "--callback-cert", ours.issue("agent.pem", "box.example"))
        conn = listener.wait_for("box", DEADLINE)
        assert conn.run(["echo", "hi"], capture_output=True).stdout == b"hi\n"
        running.stop()


def test_the_listener_speaks_tls_and_reloads_its_certificate(tmp_path: Path, ours: Authority) -> None:
    pem = ours.issue("listener.pem", "127.0.0.1", "first.example")
    command = [sys.executable, agent_client.__file__, "listen", "--addr", "127.0.0.1:0"]
    command += ["--tls-cert", pem, "--tls-client-ca", ours.path]
    environ = {**os.environ, "SOCKERLESS_AGENT_TOKEN": TOKEN}
    with spawned(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as backend:
        assert backend.stdout is not None
        assert backend.stderr is not None
        match = re.fullmatch(r"listening on (127.0.0.1:\d+)\n", backend.stdout.readline())
        assert match is not None
        mine = ours.issue("agent.pem", "box.example")
        flags = ("--callback", f"https://{match[1]}/cb?id=box", "--callback-ca", ours.path, "--callback-cert", mine)
        running = RunningAgent(tmp_path, *flags)
        assert backend.stdout.readline() == "agent box joined\n"
        through = ("--via", match[1], "--agent", "box", "--ca", ours.path)
        assert client("exec", *through, "--cert", mine, "--", "echo", "hi").stdout == "hi\n"
        assert "a client certificate is needed" in client("exec", *through, "--", "true").stderr
        Path(pem).write_text("nonsense")
        backend.send_signal(1)
        lines = iter(backend.stderr.readline, "")
        assert any("what was read before stays in use" in line for line in lines)
        assert client("exec", *through, "--cert", mine, "--", "echo", "hi").stdout == "hi\n"
        running.stop()
        backend.terminate()
        assert backend.wait(DEADLINE) == 0
